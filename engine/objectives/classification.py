"""Classification: one row of logits a text, compared with its label or with its set of labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hotloop.engine.model import Transformer
from hotloop.kernels.cross_entropy import cross_entropy


class ClassificationObjective(nn.Module):
    """Batch -> loss = sum over the texts / normalizer.

    single-label   weight[target] * nll            normalizer: the sum of weight[target] over the global batch
    multi-label    mean over K labels of the binary cross entropy, positives times weight[k]
                                                   normalizer: the texts of the global batch

    so the losses (and gradients) of micro-batches and ranks add up to those of the global batch. Segments without a
    text (IGNORE_INDEX) contribute nothing.
    """

    weight: Tensor | None  # (K,)

    def __init__(self, model: Transformer, weights: Sequence[float] | None = None):
        super().__init__()
        self.model = model
        device = next(model.parameters()).device
        weight = None if weights is None else torch.tensor(weights, dtype=torch.float32, device=device)
        self.register_buffer("weight", weight, persistent=False)

    def forward(
        self,
        tokens: Tensor,  # (R, T) int64
        targets: Tensor,  # (S,) int64 or (S, K) float32, IGNORE_INDEX where there is no text
        positions: Tensor,  # (R, T) int64, from 0 in each text
        cu_seqlens: Tensor,  # (S + 1,) int32, bounds of the texts over the R T positions
        normalizer: Tensor,  # () fp32
    ) -> Tensor:
        h = self.model.hidden_states(tokens, cu_seqlens=cu_seqlens, positions=positions)
        logits = self.model.classify(h, cu_seqlens)
        if targets.dim() == 1:
            return cross_entropy(logits, targets, weight=self.weight, normalizer=normalizer)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.binary_cross_entropy_with_logits(
            logits, targets.clamp(min=0).to(logits.dtype), pos_weight=self.weight, reduction="none"
        )
        return torch.where(targets >= 0, loss, 0).sum() / (normalizer * targets.shape[1])
