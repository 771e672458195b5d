"""Checkpoints of other libraries in and out: folders of config.json + model.safetensors (+ tokenizer.json).

A family is data (families.py): how its settings read as a ModelConfig (settings.py), and which of its tensors make up
each of ours. Our fused matrices (qkv, gate and up) are concatenations of theirs along the output dimension.
read.py takes a folder in, write.py writes one.
"""

from hotloop.engine.pretrained.families import FAMILIES
from hotloop.engine.pretrained.read import load_pretrained
from hotloop.engine.pretrained.write import save_pretrained

__all__ = ["FAMILIES", "load_pretrained", "save_pretrained"]
