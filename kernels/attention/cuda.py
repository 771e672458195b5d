"""Backend `cuda`: attention's forward on tensor cores, in CUDA C++ (csrc/attention/attention.cu).

One launch serves dense and packed batches; the grid follows from shapes alone. Gradients are computed by the kernels of
backend `triton`, from the same o and lse.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hotloop.kernels import gpu
from hotloop.kernels.attention import triton
from hotloop.kernels.attention.options import Call
from hotloop.kernels.cuda import Launch, supports_device
from hotloop.kernels.dispatch import Backend

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# As in csrc/attention/tiles.cuh and forward.cuh.
ROWS, THREADS = 128, 128
_PROBLEM = struct.Struct("<9q9i5f")
_LARGEST = 2**30
_SMALLEST = 2.0**-50
LOG2_E = math.log2(math.e)
# Probabilities may grow to 2^HEADROOM before sums are rescaled, which is therefore seldom; fp16 holds less than 2^16.
HEADROOM = 8
# Scores relative to a reference beyond FAR are found by a subtraction of their own; up to there an addition of the
# tensor cores is rounded to 2^-16 at most, in units of exp2.
FAR = 256
_ALIGNMENT = 16  # bytes, of what cp.async copies
# What the CTAs that run at the same time may read of K and V, to find it in the L2 cache of any of these GPUs.
_L2_BYTES = 16 << 20


@dataclass(frozen=True)
class Tiling:
    """Keys of a block, and buffers for blocks of K and V."""

    keys: int
    stages: int

    def shared(self, D: int) -> int:
        """Bytes of shared memory of a CTA: Q's tile and the ring."""
        return 2 * D * (ROWS + self.keys * self.stages)


# By head_dim, larger first: the first of which two CTAs share a multiprocessor, so that one computes while the other
# waits. 64 keys at head_dim 128 take 80 KiB, which GPUs with 100 KiB (sm_86, sm_89, sm_120) do not have twice.
TILINGS = {64: (Tiling(64, 3),), 128: (Tiling(64, 3), Tiling(32, 2))}
CTAS, _OWN_SHARED = 2, 1024 + 1024  # bytes that the system and the kernel's variables take of each


def tiling(D: int, shared_memory: int) -> Tiling:
    """The tiling for a multiprocessor with so many bytes of shared memory."""
    fitting = [t for t in TILINGS[D] if CTAS * (t.shared(D) + _OWN_SHARED) <= shared_memory]
    return fitting[0] if fitting else TILINGS[D][-1]


def supports(call: Call, needs_dlse: bool) -> str | None:
    q, k, v, options = call.q, call.k, call.v, call.options
    if q.dtype not in DTYPES:
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] not in TILINGS:
        return f"head_dim {q.shape[-1]}: takes {' and '.join(map(str, TILINGS))}"
    if options.dropout_p > 0:
        return "has no dropout"
    if call.alibi_slopes is not None:
        return "has no alibi_slopes"
    if call.sinks is not None:
        return "has no sinks"
    if not all(_SMALLEST <= x <= 1 / _SMALLEST for x in (options.scale, options.softcap or 1.0)):
        return f"scale {options.scale} and softcap {options.softcap}: takes {_SMALLEST} to {1 / _SMALLEST}"
    if max(q.shape[-3] * q.shape[-2], k.shape[-3]) >= _LARGEST:
        return f"positions times heads of q, and positions of k, must be below {_LARGEST}"
    lacking = supports_device(q.device) or gpu.lacking(q.device.index)
    if lacking is None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        lacking = triton.supports(call, needs_dlse)
        lacking = None if lacking is None else f"gradients are computed by backend triton, which {lacking}"
    return lacking


def forward(call: Call) -> tuple[Tensor, Tensor]:
    o = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty(call.lse_shape, dtype=torch.float32)
    if o.numel() > 0:
        launch(call, o, lse, shared_memory(call.q.device)).run(call.q.device)
    return o, lse


def launch(
    call: Call,
    o: Tensor,  # as q, contiguous
    lse: Tensor,  # (B, Hq, Tq) or (Hq, total_q), contiguous
    shared_memory: int,
) -> Launch:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_, options = call
    q, k, v = aligned(q), aligned(k), aligned(v)
    Tq, Hq, D = q.shape[-3:]
    Tk, Hk = k.shape[-3:-1]
    group = Hq // Hk
    if cu_seqlens_q is None:
        batch, slots = q.shape[0], -(-Tq * group // ROWS)
        columns = batch * Hk
    else:
        batch = cu_seqlens_q.shape[0] - 1
        slots, columns = Tq * group // ROWS + batch + 1, Hk  # a bound that the kernel explains: find_segment
    together = min(columns, max(1, _L2_BYTES // max(1, 2 * Tk * D * q.element_size())))
    t = tiling(D, shared_memory)
    unit = options.softcap or options.scale
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "o": o,
        "lse": lse,
        "problem": _PROBLEM.pack(
            *(stride for x in (q, k, v) for stride in strides(x)),
            *(batch, Tq, Tk, Hk, group),
            *(min(side, _LARGEST) for side in (options.window_left, options.window_right)),
            *(slots, together),
            *(unit, unit * LOG2_E, HEADROOM / (unit * LOG2_E), FAR / (unit * LOG2_E)),
            options.scale / unit if options.softcap > 0 else 0.0,
        ),
    }
    name = f"attention_forward_{DTYPES[q.dtype]}_d{D}_keys{t.keys}_stages{t.stages}"
    return Launch(name, (slots * columns, 1), THREADS, t.shared(D), arguments)


def aligned(x: Tensor) -> Tensor:
    """x, or a copy where cp.async could not read its rows."""
    step = _ALIGNMENT // x.element_size()
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    fits = x.data_ptr() % _ALIGNMENT == 0 and strides[-1:] == [1] and all(s % step == 0 for s in strides[:-1])
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def strides(x: Tensor) -> tuple[int, ...]:  # batch, position, head
    return (x.stride(0) if x.dim() == 4 else 0, *x.stride()[-3:-1])


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor."""
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


BACKEND = Backend("cuda", supports, forward, triton.backward)
