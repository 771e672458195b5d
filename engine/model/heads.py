"""What stands between hidden states and logits: the head of masked language models, and classifiers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop.engine.config import ModelConfig
from hotloop.engine.model.layers import make_norm


class MaskedHead(nn.Module):
    """norm(gelu(dense(h))), which the tied decoder then multiplies; `bias` is the decoder's, one a token."""

    def __init__(self, config: ModelConfig, vocab_size: int):
        super().__init__()
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.dense = nn.Linear(config.d_model, config.d_model, bias=config.bias)
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, h: Tensor) -> Tensor:  # (..., D)
        return self.norm(F.gelu(self.dense(h), approximate=self.approximate))


class Classifier(nn.Module):
    """One vector a segment to one row of logits, by `classifier_head`:

    linear:      out(dropout(x))
    bert:        out(dropout(tanh(dense(x))))           dense is what BERT calls the pooler
    modernbert:  out(dropout(norm(gelu(dense(x)))))
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, kind = config.d_model, config.classifier_head
        self.kind, self.pooling = kind, config.pooling
        if kind != "linear":
            self.dense = nn.Linear(D, D, bias=config.bias)
        if kind == "modernbert":
            self.norm = make_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.out = nn.Linear(D, config.n_labels, bias=config.classifier_bias)

    def forward(self, h: Tensor, cu_seqlens: Tensor) -> Tensor:  # (N, D), (S + 1,) int32 -> (S, n_labels)
        x = pool(h, cu_seqlens, self.pooling)
        if self.kind == "bert":
            x = torch.tanh(self.dense(x))
        elif self.kind == "modernbert":
            x = self.norm(F.gelu(self.dense(x)))
        return self.out(self.dropout(x))


def pool(h: Tensor, cu_seqlens: Tensor, pooling: str) -> Tensor:
    """(N, D), (S + 1,) int32 -> (S, D): one vector a segment, finite where a segment is empty and h is finite.

    One kernel each, of static shape and deterministic; a segment's NaN stays its own.
    """
    if pooling == "mean":
        # Not by an index_add (unordered atomics on a GPU) nor by a product with 0s and 1s (0 * NaN).
        total = torch.segment_reduce(h.float(), "sum", offsets=cu_seqlens, axis=0, unsafe=True, initial=0.0)
        return (total / cu_seqlens.diff().clamp(min=1)[:, None]).to(h.dtype)
    rows = cu_seqlens[:-1] if pooling == "cls" else cu_seqlens[1:] - 1
    return h[rows.clamp(0, h.shape[0] - 1)]
