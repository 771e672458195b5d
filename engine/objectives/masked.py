"""Masked language modelling: hidden tokens are predicted from both sides; the rest of the text costs no projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hotloop.engine.data.batches import IGNORE_INDEX
from hotloop.engine.model import Transformer
from hotloop.kernels.cross_entropy import linear_cross_entropy


class MaskedObjective(nn.Module):
    """Batch -> loss = sum of nll over the hidden tokens / normalizer.

    `normalizer` is the count of hidden tokens of the whole global batch, so the losses (and gradients) of micro-batches
    and ranks add up to those of the global batch, however it is split. `most` bounds the hidden tokens of a row: the
    head runs on so many rows and no more, with nothing read back from the device. More of them give a NaN loss.
    """

    def __init__(self, model: Transformer, most: int):
        super().__init__()
        self.model, self.most = model, most

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        targets: Tensor,  # (B, T) int64, -100 where nothing is hidden
        positions: Tensor,  # (B, T) int64, from 0 in each document
        cu_seqlens: Tensor,  # (capacity + 1,) int32, document bounds over the B T positions
        normalizer: Tensor,  # () fp32
    ) -> Tensor:
        h = self.model.hidden_states(tokens, cu_seqlens=cu_seqlens, positions=positions)
        max_valid = tokens.shape[0] * self.most
        row, target, overflow = supervised_rows(targets, max_valid)
        loss = linear_cross_entropy(
            self.model.head_input(h.flatten(0, 1)[row]), self.model.head_weight, target,
            linear_bias=self.model.head_bias, normalizer=normalizer, max_valid=max_valid,
        )  # fmt: skip
        return loss.masked_fill(overflow, float("nan"))


def supervised_rows(targets: Tensor, max_valid: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compact targets (*) int64 to `max_valid` rows, in order and without a host sync.

    Returns (max_valid,) which row each is (0 where there are fewer), (max_valid,) its target (then IGNORE_INDEX), and
    () whether there are more.
    """
    flat = targets.flatten()
    valid = flat != IGNORE_INDEX
    count = valid.cumsum(0)
    # Those that are ignored, or beyond the bound, go to one slot more, which is cut off.
    slot = torch.where(valid, count - 1, max_valid).clamp(max=max_valid)
    at = torch.arange(len(flat), device=flat.device)
    row = flat.new_zeros(max_valid + 1).scatter(0, slot, at)
    target = flat.new_full((max_valid + 1,), IGNORE_INDEX).scatter(0, slot, flat)
    return row[:max_valid], target[:max_valid], count[-1] > max_valid
