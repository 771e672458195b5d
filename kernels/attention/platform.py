"""The backend `torch`: the kernels behind PyTorch's scaled_dot_product_attention, called by their own names because
only those give and take lse.

On the CPU: `_scaled_dot_product_flash_attention_for_cpu`. It has no packed form, so segments of equal lengths become
one dense batch seen through strides (`segments.py`). On CUDA: `_flash_attention_forward`, which has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels import gpu
from hotloop.kernels.attention.options import Call, Options, first_visible_query, lse_dtype
from hotloop.kernels.attention.segments import Run, plan
from hotloop.kernels.dispatch import Backend

aten = torch.ops.aten

CUDA_MAX_HEAD_DIM = 256
DLSE_COLUMNS = 8
FP32_BELOW = 224
"""Keys below which 16-bit tensors are computed in fp32. Time in bf16 over time in fp32 with the casts, forward and
backward of 2,048 positions, causal, one Zen 4 thread, H = 6, D = 64: 2.4 for 16 keys, 1.3 for 64, 2.0 for 100, 1.5 for
128, 1.1 for 208, 0.96 for 256, 0.86 for 512, 0.75 for 1,024; without a mask the same within 0.1 from 96 keys on."""


def supports(call: Call, needs_dlse: bool) -> str | None:
    q, options = call.q, call.options
    if options.softcap > 0:
        return "PyTorch's kernels have no softcap"
    if call.alibi_slopes is not None:
        return "PyTorch's kernels have no gradient for alibi_slopes"
    if call.sinks is not None:
        return "PyTorch's kernels have no sinks"
    if options.dropout_p > 0:
        return "PyTorch's kernels draw another dropout mask than the one that `seed` defines"
    if q.device.type == "cpu":
        return None
    if q.device.type != "cuda":
        return f"serves cpu and cuda, not {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"PyTorch's flash attention on CUDA takes float16 and bfloat16, not {q.dtype}"
    widest = CUDA_MAX_HEAD_DIM - (DLSE_COLUMNS if needs_dlse else 0)
    if q.shape[-1] > widest:
        return f"head_dim {q.shape[-1]}: PyTorch's flash attention on CUDA takes up to {CUDA_MAX_HEAD_DIM}" + (
            f", {DLSE_COLUMNS} of which the gradient of lse needs" if needs_dlse else ""
        )
    return gpu.lacking(q.device.index)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_, options = call
    if q.device.type != "cpu":
        return _cuda_forward(q, k, v, cu_seqlens_q, cu_seqlens_k, options)
    q, k, v = _for_gemm(q), _for_gemm(k), _for_gemm(v)
    if cu_seqlens_q is None or cu_seqlens_k is None:
        o, lse = _cpu_forward(q, k, v, options)
        return o.to(q.dtype).contiguous(), lse.contiguous()
    return _cpu_forward_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def backward(
    call: Call, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *_, options = call
    D = q.shape[-1]
    if dlse is not None:
        q, k, v, o, do = _fold_dlse(q, k, v, o, do, dlse, lse)
    if q.device.type != "cpu":
        dq, dk, dv = _cuda_backward(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, options)
    else:
        do, q, k, v, o = (_for_gemm(x) for x in (do, q, k, v, o))
        if cu_seqlens_q is None or cu_seqlens_k is None:
            dq, dk, dv = _cpu_backward(do, q, k, v, o, lse, options)
        else:
            dq, dk, dv = _cpu_backward_packed(do, q, k, v, o, lse, cu_seqlens_q, cu_seqlens_k, options)
    dq, dk, dv = (
        x[..., :D].to(q.dtype).contiguous() if needed else q.new_empty(0)
        for x, needed in zip((dq, dk, dv), needs, strict=False)
    )
    return dq, dk, dv, q.new_empty(0), q.new_empty(0)


def _fold_dlse(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, dlse: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same tensors with 8 more columns, by which a backward without a dlse argument adds p * dlse to ds.

    ds = p * (do @ v.T - rowsum(do * o)), so with dlse as a further column of do, ones as that of v and zeros as that of
    o, do @ v.T gains dlse and the rowsum gains nothing. A second column carries what rounding dlse to do's dtype lost.
    """
    dlse = dlse.masked_fill(lse == float("-inf"), 0).transpose(-1, -2)[..., None]
    high = dlse.to(do.dtype)
    columns = [high, (dlse - high.to(dlse.dtype)).to(do.dtype), *([torch.zeros_like(high)] * (DLSE_COLUMNS - 2))]
    q, k, o = (F.pad(x, (0, DLSE_COLUMNS)) for x in (q, k, o))
    v = F.pad(F.pad(v, (0, 2), value=1.0), (0, DLSE_COLUMNS - 2))
    return q, k, v, o, torch.cat([do, *columns], -1)


# --- CPU ---


def _for_gemm(x: Tensor) -> Tensor:
    """BLAS reads rows of stride-1 elements, at least their own length apart."""
    return x if x.stride(-1) == 1 and x.stride(-3) >= x.shape[-1] else x.contiguous()


def _cpu_mask(Tq: int, Tk: int, options: Options, dtype: torch.dtype) -> tuple[bool, Tensor | None]:
    """(is_causal, attn_mask (Tq, Tk) or None) of the kernel, whose causal mask starts at the top left."""
    left, right = options.window_left, options.window_right
    left_open = left < 0 or left >= Tk - 1
    right_open = right < 0 or right >= Tq - 1
    if left_open and right_open:
        return False, None
    if left_open and right == 0 and Tq == Tk:
        return True, None
    diagonal = torch.arange(Tk - Tq, Tk)[:, None]
    j = torch.arange(Tk)
    hidden = torch.zeros(Tq, Tk, dtype=torch.bool)
    if not left_open:
        hidden |= j < diagonal - left
    if not right_open:
        hidden |= j > diagonal + right
    return False, torch.zeros(Tq, Tk, dtype=lse_dtype(dtype)).masked_fill_(hidden, float("-inf"))


def _in_fp32(Tk: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit tensors of short segments in fp32: the kernel's 16-bit GEMMs of these sizes are slower than the casts."""
    if tensors[0].dtype in (torch.float16, torch.bfloat16) and Tk < FP32_BELOW:
        return tuple(x.float() for x in tensors)
    return tensors


def _cpu_forward(
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    options: Options,
) -> tuple[Tensor, Tensor]:
    """o (B, Tq, Hq, D), in fp32 or q's dtype, and lse (B, Hq, Tq)."""
    Tq, Tk, Hq = q.shape[1], k.shape[1], q.shape[2]
    first = first_visible_query(Tq, Tk, options)
    if first > 0 or q.numel() == 0:
        o = q.new_zeros(q.shape)
        lse = torch.full((q.shape[0], Hq, Tq), float("-inf"), dtype=lse_dtype(q.dtype))
        if first < Tq and q.numel() > 0:
            o[:, first:], lse[:, :, first:] = _cpu_forward(q[:, first:], k, v, options)
        return o, lse
    is_causal, mask = _cpu_mask(Tq, Tk, options, q.dtype)
    q, k, v = _in_fp32(Tk, q, k, v)
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        _repeat_heads(k, Hq).transpose(1, 2),
        _repeat_heads(v, Hq).transpose(1, 2),
        0.0,
        is_causal,
        attn_mask=mask,
        scale=options.scale,
    )
    return o.transpose(1, 2), lse


def _cpu_backward(
    do: Tensor,  # (B, Tq, Hq, D)
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    o: Tensor,  # (B, Tq, Hq, D)
    lse: Tensor,  # (B, Hq, Tq)
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, Tq, Hq, D), dk and dv (B, Tk, Hk, D), in fp32 or q's dtype."""
    Tq, Tk, Hq, Hk = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    first = first_visible_query(Tq, Tk, options)
    if first == Tq or q.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    if first > 0:
        dq = q.new_zeros(q.shape)
        dq[:, first:], dk, dv = _cpu_backward(
            do[:, first:], q[:, first:], k, v, o[:, first:], lse[:, :, first:], options
        )
        return dq, dk, dv
    is_causal, mask = _cpu_mask(Tq, Tk, options, q.dtype)
    do, q, k, v, o = _in_fp32(Tk, do, q, k, v, o)
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do.transpose(1, 2),
        q.transpose(1, 2),
        _repeat_heads(k, Hq).transpose(1, 2),
        _repeat_heads(v, Hq).transpose(1, 2),
        o.transpose(1, 2),
        lse,
        0.0,
        is_causal,
        attn_mask=mask,
        scale=options.scale,
    )
    return dq.transpose(1, 2), _sum_heads(dk.transpose(1, 2), Hk), _sum_heads(dv.transpose(1, 2), Hk)


def _cpu_forward_packed(
    q: Tensor,  # (total_q, Hq, D)
    k: Tensor,  # (total_k, Hk, D)
    v: Tensor,  # (total_k, Hk, D)
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor]:  # o (total_q, Hq, D), lse (Hq, total_q)
    (total, Hq, _), batches = q.shape, plan(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist()))
    if len(batches.runs) == 1 and batches.runs[0].covers(total, k.shape[0]):
        (run,) = batches.runs
        o, lse = _cpu_forward(run.of_q(q), run.of_k(k), run.of_k(v), options)
        return o.reshape(q.shape).to(q.dtype), lse.transpose(0, 1).reshape(Hq, total).contiguous()

    o = _empty_or_zeros(q, batches.written_q)
    lse = torch.full((total, Hq), float("-inf"), dtype=lse_dtype(q.dtype))
    for run in batches.runs:
        o_, lse_ = _cpu_forward(run.of_q(q), run.of_k(k), run.of_k(v), options)
        run.of_q(o).copy_(o_)
        run.of_q(lse).copy_(lse_.transpose(1, 2))
    return o, lse.mT.contiguous()


def _cpu_backward_packed(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (total_q, Hq, D), dk and dv (total_k, Hk, D)."""
    batches, lse = plan(tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())), lse.mT

    def gradients(run: Run) -> tuple[Tensor, Tensor, Tensor]:
        rows = (run.of_q(do), run.of_q(q), run.of_k(k), run.of_k(v), run.of_q(o))
        return _cpu_backward(*rows, run.of_q(lse).transpose(1, 2), options)

    if len(batches.runs) == 1 and batches.runs[0].covers(q.shape[0], k.shape[0]):
        dq, dk, dv = gradients(batches.runs[0])
        return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)

    dq = _empty_or_zeros(q, batches.written_q)
    dk, dv = _empty_or_zeros(k, batches.written_k), _empty_or_zeros(v, batches.written_k)
    for run in batches.runs:
        dq_, dk_, dv_ = gradients(run)
        run.of_q(dq).copy_(dq_)
        run.of_k(dk).copy_(dk_)
        run.of_k(dv).copy_(dv_)
    return dq, dk, dv


def _empty_or_zeros(x: Tensor, written: int) -> Tensor:
    """A contiguous result like x (total, ...), of which `written` rows will be written."""
    return x.new_empty(x.shape) if written == x.shape[0] else x.new_zeros(x.shape)


def _repeat_heads(x: Tensor, Hq: int) -> Tensor:
    """(B, Tk, Hk, D) -> (B, Tk, Hq, D): the kernel has no grouped heads."""
    return x if x.shape[2] == Hq else x.repeat_interleave(Hq // x.shape[2], 2)


def _sum_heads(x: Tensor, Hk: int) -> Tensor:
    """(B, Tk, Hq, D) -> (B, Tk, Hk, D)."""
    return x if x.shape[2] == Hk else x.unflatten(2, (Hk, -1)).sum(3)


# --- CUDA ---


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        shape = (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.full(shape, float("-inf"), dtype=torch.float32, device=q.device)
        return q.new_zeros(q.shape), lse
    is_causal = options.window_left < 0 and options.window_right == 0
    o, lse, *_ = aten._flash_attention_forward(
        _unit_stride(q),
        _unit_stride(k),
        _unit_stride(v),
        cu_seqlens_q,
        cu_seqlens_k,
        options.max_seqlen_q,
        options.max_seqlen_k,
        0.0,
        is_causal,
        False,
        scale=options.scale,
        window_size_left=options.window_left,
        window_size_right=options.window_right,
    )
    # The kernel marks a row that sees no key by +inf and leaves rows past cu_seqlens_q[-1] as they were allocated.
    lse = lse.masked_fill(lse == float("inf"), float("-inf"))
    if cu_seqlens_q is not None:
        past = _past_the_end(cu_seqlens_q, q.shape[0])
        o, lse = o.masked_fill(past[:, None, None], 0), lse.masked_fill(past, float("-inf"))
    return o.contiguous(), lse.contiguous()


def _cuda_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    if q.numel() == 0 or k.numel() == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    is_causal = options.window_left < 0 and options.window_right == 0
    with _deterministic():
        dq, dk, dv = aten._flash_attention_backward(
            _unit_stride(do),
            _unit_stride(q),
            _unit_stride(k),
            _unit_stride(v),
            o,
            lse.masked_fill(lse == float("-inf"), float("inf")),
            cu_seqlens_q,
            cu_seqlens_k,
            options.max_seqlen_q,
            options.max_seqlen_k,
            0.0,
            is_causal,
            torch.zeros(2, dtype=torch.uint64, device=q.device),  # the state of dropout, of which there is none
            torch.empty(0, device=q.device),
            scale=options.scale,
            window_size_left=options.window_left,
            window_size_right=options.window_right,
        )
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        past_q = _past_the_end(cu_seqlens_q, q.shape[0])[:, None, None]
        past_k = _past_the_end(cu_seqlens_k, k.shape[0])[:, None, None]
        dq, dk, dv = dq.masked_fill(past_q, 0), dk.masked_fill(past_k, 0), dv.masked_fill(past_k, 0)
    return dq, dk, dv


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _past_the_end(cu_seqlens: Tensor, total: int) -> Tensor:
    """(total,) bool."""
    return torch.arange(total, device=cu_seqlens.device) >= cu_seqlens[-1]


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's flash backward sums dq by atomics unless the process-wide switch, its only one, is on."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)


BACKEND = Backend("torch", supports, forward, backward)
