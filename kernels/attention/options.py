"""What a call of attention asks for, apart from its tensors: the part of the contract that all backends share.

Letters: B batch, S segments (documents of a packed batch), Tq and Tk positions of q and k, Hq and Hk heads (Hk divides
Hq), D head dimension. Dense tensors are (B, T, H, D); packed ones (total, H, D) with `cu_seqlens` (S + 1,) int32.

A backend is three functions

    supports(call, needs_dlse) -> None, or the reason why not
    forward(call) -> o, lse
    backward(call, o, lse, do, dlse, needs) -> dq, dk, dv, dalibi_slopes, dsinks

with both cu_seqlens None for dense calls, o in the shape and dtype of q, lse (B, Hq, Tq) or (Hq, total) in
`lse_dtype(q.dtype)`, dlse None or like lse, and `needs` five booleans: a gradient that is not needed is returned as
`q.new_empty(0)`. Results are contiguous and alias nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Options:
    max_seqlen_q: int
    """Tq, or an upper bound of the longest segment of q."""
    max_seqlen_k: int
    window_left: int
    """Query i sees keys from i + (Tk - Tq) - window_left on; -1: unbounded."""
    window_right: int
    """Query i sees keys up to i + (Tk - Tq) + window_right; -1: unbounded, 0: causal."""
    scale: float
    softcap: float
    """0: none."""
    dropout_p: float


class Call(NamedTuple):
    """The tensors and options of a call."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    options: Options

    @property
    def is_packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def lse_shape(self) -> tuple[int, ...]:
        *batch, T, Hq, _ = self.q.shape
        return (*batch, Hq, T)


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, and of the arithmetic inside, for q, k, v of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def first_visible_query(Tq: int, Tk: int, options: Options) -> int:
    """The first query that sees a key; those after it do, too: the last one is aligned with the last key. Tq: none."""
    if Tk == 0:
        return Tq
    return 0 if options.window_right < 0 else max(0, Tq - Tk - options.window_right)
