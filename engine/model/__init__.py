"""The one Transformer, a decoder or an encoder. Reading order: layers.py, heads.py, transformer.py.

Shapes: B sequences, T tokens, D model width, V vocabulary, Hq query heads, Hk key and value heads, C head dimension,
S segments (packed documents).
Parameters and activations have one dtype (fp32 or bf16); autocast is not used. Norm statistics, rotary angles, softmax
and the loss are computed in fp32 whatever that dtype is.
"""

from hotloop.engine.model.layers import KeyValueCache, feed_forward_width, head_dimension, is_local
from hotloop.engine.model.transformer import Transformer, padded_vocabulary

__all__ = ["KeyValueCache", "Transformer", "feed_forward_width", "head_dimension", "is_local", "padded_vocabulary"]
