"""A training loop of one's own, from hotloop's parts: python examples/train.py DOCUMENTS WORK_FOLDER [STEPS]"""

import sys
from pathlib import Path

import torch

from hotloop.engine.config import ModelConfig
from hotloop.engine.data.batches import BatchSource
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.data.shards import Corpus
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.engine.pretrained import save_pretrained
from hotloop.kernels.optimizers import AdamW


def main(documents: str, work: str, steps: int = 100) -> None:
    shards = Path(work) / "shards"
    if not shards.exists():
        prepare([Path(documents)], shards, PrepareConfig(vocab_size=1024))
    corpus = Corpus(shards)
    data = BatchSource(corpus.split("train"), context=256, global_batch=8, seed=0)

    model = Transformer(ModelConfig(256, corpus.vocab_size, n_layers=2, d_model=128, n_heads=4)).initialize(seed=0)
    objective = CausalObjective(model)
    optimizer = AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)

    for step in range(steps):
        # The loss is divided by the supervised tokens of the whole global batch, so micro-batches simply add up.
        normalizer = torch.tensor(float(data.n_supervised(step)))
        loss = torch.zeros(())
        for batch in data.micro_batches(step, micro_batch=4):
            part = objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, normalizer)
            part.backward()
            loss += part.detach()
        optimizer.step()  # clips and skips non-finite gradients inside
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  grad norm {optimizer.grad_norm.item():.3f}")
    save_pretrained(model, Path(work) / "model", tokenizer=corpus.tokenizer_path)


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
