"""What peers accept and the op does not: head dimensions of any size, and padding between the rows of a batch.

The mask stays where it is: shapes depend on shapes alone, so that nothing waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.attention import attention_varlen


def pad_head_dim(
    q: Tensor,  # (..., D)
    k: Tensor,  # (..., D)
    v: Tensor,  # (..., Dv)
) -> tuple[Tensor, Tensor, Tensor]:  # (..., W), W the multiple of 8 from max(D, Dv) on
    """Zeros that change no score and whose part of the output is 0. A tensor that has W columns is not copied."""
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"head_dim of k is {k.shape[-1]} and of q {q.shape[-1]}: expected the same")
    width = -(-max(q.shape[-1], v.shape[-1]) // 8) * 8
    q, k, v = (x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (q, k, v))
    return q, k, v


def host_bound(max_seqlen: int | Tensor | None) -> int | None:
    """A bound that the host knows; None stands for the total length."""
    if isinstance(max_seqlen, Tensor):
        return int(max_seqlen) if max_seqlen.device.type == "cpu" else None
    return max_seqlen


class _Permute(torch.autograd.Function):
    """x[order], whose gradient is a gather as well, by the inverse.

    The gradient that PyTorch has for x.index_select(0, order) adds row by row: 86 ms where this takes 8, and that of
    x[order] 16 (2,048 rows of 8 x 64 fp32, 2 Zen 4 threads).
    """

    @staticmethod
    def forward(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return x.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(dy, inverse, order), None, None


@dataclass(frozen=True)
class ValidRows:
    """The rows of a padded batch (B, T) in the order valid ones first, as segments of `attention_varlen`."""

    order: Tensor  # (B * T,) int64: where a row comes from
    place: Tensor  # (B * T,) int64: where it goes, the inverse
    cu_seqlens: Tensor  # (B + 1,) int32
    shape: tuple[int, ...]  # (B, T)

    @staticmethod
    def of(valid: Tensor) -> ValidRows:  # (B, T) bool
        flat = valid.flatten()
        position = torch.arange(flat.shape[0], device=flat.device)
        before = flat.cumsum(0) - flat.long()  # valid rows before each
        total = flat.sum()
        place = torch.where(flat, before, total + position - before)
        order = torch.empty_like(place).scatter_(0, place, position)
        return ValidRows(order, place, F.pad(valid.sum(1).cumsum(0), (1, 0)).int(), tuple(valid.shape))

    def pack(self, x: Tensor) -> Tensor:  # (B, T, H, D) -> (B * T, H, D)
        return _Permute.apply(x.flatten(0, 1), self.order, self.place)

    def unpack(self, x: Tensor) -> Tensor:  # (B * T, H, D) -> (B, T, H, D)
        return _Permute.apply(x, self.place, self.order).unflatten(0, self.shape)


def attention_valid_keys(
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    valid: Tensor,  # (B, Tk) bool
    **options: Any,
) -> Tensor:  # (B, Tq, Hq, D)
    """Every query sees the valid keys of its row of the batch, in any order; k and v are copied once."""
    (B, Tq, Hq, D), Tk = q.shape, k.shape[1]
    keys = ValidRows.of(valid)
    o = attention_varlen(
        q.flatten(0, 1), keys.pack(k), keys.pack(v),
        cu_seqlens_q=torch.arange(B + 1, device=q.device, dtype=torch.int32) * Tq, cu_seqlens_k=keys.cu_seqlens,
        max_seqlen_q=Tq, max_seqlen_k=Tk, **options,
    )  # fmt: skip
    return o.view(B, Tq, Hq, D)
