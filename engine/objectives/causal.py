"""Causal language modelling: every token of a document, its end included, is predicted from those before it."""

from __future__ import annotations

from torch import Tensor, nn

from hotloop.engine.model import Transformer
from hotloop.kernels.cross_entropy import linear_cross_entropy


class CausalObjective(nn.Module):
    """Batch -> loss = sum of nll over the supervised tokens / normalizer.

    `normalizer` is the count of supervised tokens of the whole global batch, so the losses (and gradients) of
    micro-batches and ranks add up to those of the global batch, however it is split.
    """

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor,  # (B, T) int64, -100 where nothing is supervised
        positions: Tensor,  # (B, T) int64, from 0 in each document
        cu_seqlens: Tensor,  # (capacity + 1,) int32, document bounds over the B T positions
        normalizer: Tensor,  # () fp32
    ) -> Tensor:
        h = self.model.hidden_states(tokens, cu_seqlens=cu_seqlens, positions=positions)
        return linear_cross_entropy(h, self.model.head_weight, targets, normalizer=normalizer)
