"""Held-out loss: summed nats of every token, ends of documents included, over tokens and over UTF-8 bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from hotloop.engine.data.evaluation import evaluation_batches, evaluation_documents
from hotloop.engine.data.shards import Split
from hotloop.engine.model import Transformer
from hotloop.kernels.cross_entropy import linear_cross_entropy


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats per token."""
    bits_per_byte: float
    perplexity: float
    tokens: int
    bytes: int
    documents: int
    context: int
    stride: int
    seconds: float

    def to_dict(self) -> dict[str, float | int]:
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: Transformer,
    split: Split,
    *,
    context: int,
    stride: int | None = None,
    max_bytes: int | None = None,
    seed: int = 0,
    micro_batch: int = 16,
    poll: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Score whole documents, drawn by the seed up to `max_bytes` of text (none: all).

    Windows of `context` tokens advance by `stride` (none: context), so that every token is scored once, with at least
    context - stride tokens before it where the document has them. Returns None if `poll` asks to stop.
    """
    began = time.perf_counter()
    stride = context if stride is None else stride
    documents, n_bytes, _ = evaluation_documents(split, max_bytes, seed)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = 0
    try:
        for batch in evaluation_batches(split, context, stride, documents, micro_batch):
            if poll():
                return None
            tokens += batch.n_supervised
            batch = batch.to(device)
            h = model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
            nats += linear_cross_entropy(h, model.head_weight, batch.targets, reduction="sum").double()
    finally:
        model.train(was_training)
    total = nats.item()
    return Evaluation(
        loss=total / max(tokens, 1),
        bits_per_byte=total / math.log(2) / max(n_bytes, 1),
        perplexity=math.exp(min(total / max(tokens, 1), 700.0)),
        tokens=tokens,
        bytes=n_bytes,
        documents=len(documents),
        context=context,
        stride=stride,
        seconds=time.perf_counter() - began,
    )
