"""Backend `cpu`: blocked attention in C++, forward and backward. See csrc/attention."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.attention.options import Call, lse_dtype
from hotloop.kernels.dispatch import Backend
from hotloop.kernels.extension import loaded, missing
from hotloop.kernels.workspace import workspace

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
UNBOUNDED = 1 << 30


def supports(call: Call, needs_dlse: bool) -> str | None:
    q = call.q
    if q.device.type != "cpu":
        return f"runs on the CPU, q is on {q.device}"
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, q is {q.dtype}"
    return missing()


def forward(call: Call) -> tuple[Tensor, Tensor]:
    o = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty(call.lse_shape, dtype=lse_dtype(call.q.dtype))
    given = _Arguments(call, o, lse)
    kernels, threads = loaded(), torch.get_num_threads()
    room = _room(kernels.attention_forward_workspace(given.problem, threads))
    kernels.attention_forward(given.problem, given.numbers, room.data_ptr(), threads)
    return o, lse


def backward(
    call: Call, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, *_ = call
    given = _Arguments(call, o.contiguous(), lse)
    dq, dk, dv = (x.new_empty(x.shape if needed else 0) for x, needed in zip((q, k, v), needs[:3], strict=True))
    per_head = (given.segments, q.shape[-2])
    dalibi_slopes, dsinks = (
        q.new_empty(per_head, dtype=lse.dtype) if needed else q.new_empty(0) for needed in needs[3:]
    )
    do, dlse = _unit_stride(do), None if dlse is None else dlse.contiguous()
    results = [
        x.data_ptr() if needed else 0 for x, needed in zip((dq, dk, dv, dalibi_slopes, dsinks), needs, strict=True)
    ]
    gradients = [*given.strided(do), _address(dlse), *results]
    kernels, threads = loaded(), torch.get_num_threads()
    room = _room(kernels.attention_backward_workspace(given.problem, threads))
    kernels.attention_backward(given.problem, gradients, given.numbers, room.data_ptr(), threads)
    if needs[3] and call.alibi_slopes is not None and call.alibi_slopes.dim() == 1:
        dalibi_slopes = dalibi_slopes.sum(0)
    return dq, dk, dv, dalibi_slopes, dsinks.sum(0) if needs[4] else dsinks


class _Arguments:
    """The numbers of `Problem` and `Numbers` in csrc/attention/attention.h, and the tensors that they point into."""

    def __init__(self, call: Call, o: Tensor, lse: Tensor):
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options = call
        self.packed = call.is_packed
        self.segments = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        per_head = [None if x is None else x.contiguous() for x in (alibi_slopes, sinks)]
        boundaries = [None if x is None else x.contiguous() for x in (cu_seqlens_q, cu_seqlens_k)]
        self.kept = (q, k, v, o, lse, *per_head, *boundaries)
        (Tq, Hq, D), (Tk, Hk) = q.shape[-3:], k.shape[-3:-1]
        left, right = (UNBOUNDED if x < 0 else min(x, UNBOUNDED) for x in (options.window_left, options.window_right))
        self.problem = [
            DTYPES[q.dtype], self.segments, Hq, Hk, D, Tq, Tk, *map(_address, boundaries),
            *self.strided(q), *self.strided(k), *self.strided(v),
            _address(per_head[0]), 0 if alibi_slopes is None or alibi_slopes.dim() == 1 else Hq, _address(per_head[1]),
            left, right, 0 if seed is None else int(seed), int(options.dropout_p * 2**32) if seed is not None else 0,
            o.data_ptr(), lse.data_ptr(),
        ]  # fmt: skip
        self.numbers = [options.scale, options.softcap, 1 / (1 - options.dropout_p)]

    def strided(self, x: Tensor) -> tuple[int, int, int, int]:
        """`Strided` of (batch, positions, heads, D) or (positions, heads, D)."""
        return (x.data_ptr(), 0 if self.packed else x.stride(0), x.stride(-3), x.stride(-2))


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _room(size: int) -> Tensor:
    return workspace("attention.cpu", (size,), torch.uint8, torch.device("cpu"))


BACKEND = Backend("cpu", supports, forward, backward)
