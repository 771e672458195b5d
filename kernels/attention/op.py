"""Attention: the ops, their gradient, and the public functions. The formula is in `reference.py`.

Letters: B batch, S segments, Tq and Tk positions, Hq and Hk heads (Hk divides Hq), D head dimension.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotloop.kernels.attention import cpu, cuda, platform, reference, triton
from hotloop.kernels.attention.arguments import (
    assert_cu_seqlens,
    autocast,
    check_cu_seqlens,
    check_qkv,
    options_of,
    per_head,
    seed_tensor,
)
from hotloop.kernels.attention.options import Call, Options, lse_dtype
from hotloop.kernels.autograd import first_order
from hotloop.kernels.dispatch import Table

UNBOUNDED = (None, None)

# On a CPU ours takes at most 0.93 of the time of PyTorch's kernel (one Zen 4 thread; fp32, bf16 and fp16, 32 to 2,048
# positions, D 8 to 256, with and without backward); only for the single query of a cached step it may take more: 0.33
# ms against 0.17 (fp32, 512 keys, 8 heads), though 0.24 against 0.58 in bf16.
TABLE = Table("attention", cpu.BACKEND, platform.BACKEND, triton.BACKEND, cuda.BACKEND, reference.BACKEND)

# --- the ops ---

OPTIONS = (
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int window_left, int window_right, float scale, float softcap, "
    "float dropout_p"
)

lib = torch.library.Library("hotloop", "FRAGMENT")
lib.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, "
    f"Tensor? sinks, Tensor? seed, {OPTIONS}, str backend) -> (Tensor o, Tensor lse)"
)
lib.define(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, "
    f"{OPTIONS}, str backend, bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalibi_slopes, Tensor dsinks)"
)
ops = torch.ops.hotloop


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *options_and_backend: Any,
) -> tuple[Tensor, Tensor]:
    *fields, backend = options_and_backend
    options = Options(*fields)
    if cu_seqlens_q is not None:
        _check_boundaries("q", cu_seqlens_q, q.shape[0], options.max_seqlen_q)
        if cu_seqlens_k is None:
            cu_seqlens_k = cu_seqlens_q
        else:
            _check_boundaries("k", cu_seqlens_k, k.shape[0], options.max_seqlen_k)
    with _without_autocast(q.device.type):
        return TABLE[backend].forward(Call(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options))


def _backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    *options_backend_needs: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *fields, backend, needs = options_backend_needs
    function = TABLE[backend].backward
    assert function is not None
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    call = Call(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, Options(*fields))
    with _without_autocast(q.device.type):
        return function(call, o, lse, do, dlse, list(needs))


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast stays in force inside an op's implementation; there it would round fp32 arithmetic to 16 bits."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _check_boundaries(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """The values of cu_seqlens, where they can be read without waiting for a device."""
    if cu_seqlens.device.type != "cpu":
        return
    values = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(values)]
    if values[0] != 0 or min(lengths) < 0:
        raise ValueError(f"cu_seqlens_{name} {_brief(values)}: must start at 0 and never decrease")
    if values[-1] > total:
        raise ValueError(f"cu_seqlens_{name} ends at {values[-1]}, but {name} has {total} positions")
    if max(lengths) > max_seqlen:
        raise ValueError(
            f"cu_seqlens_{name} has a segment of {max(lengths)} positions, longer than max_seqlen_{name} = {max_seqlen}"
        )


def _brief(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:7]))}, ... {values[-1]}]"


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (q.shape[0], q.shape[2], q.shape[1]) if cu_seqlens_q is None else (q.shape[1], q.shape[0])
    return q.new_empty(q.shape), q.new_empty(shape, dtype=lse_dtype(q.dtype))


def _fake_backward(
    do: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    needs = rest[-1]
    return tuple(
        x.new_empty(x.shape) if x is not None and needed else q.new_empty(0)
        for x, needed in zip((q, k, v, alibi_slopes, sinks), needs, strict=True)
    )


for _device in ("CPU", "CUDA"):
    lib.impl("attention_forward", _forward, _device)
    lib.impl("attention_backward", _backward, _device)
torch.library.register_fake("hotloop::attention_forward", _fake_forward, lib=lib)
torch.library.register_fake("hotloop::attention_backward", _fake_backward, lib=lib)


class Attention(torch.autograd.Function):
    """The gradient, registered on the op itself (Autograd key), so that no path around the op can lose it."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, ctx.options_and_backend = arguments[:8], arguments[8:]
        with torch._C._AutoDispatchBelowAutograd():
            o, lse = ops.attention_forward(*arguments)
        ctx.save_for_backward(*tensors, o, lse)
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @first_order("attention")
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, o, lse = ctx.saved_tensors
        needed = ctx.needs_input_grad
        needs = [*needed[:3], *needed[5:7]]
        gradients = ops.attention_backward(
            o.new_zeros(o.shape) if do is None else do,
            dlse,
            q,
            k,
            v,
            o,
            lse,
            cu_seqlens_q,
            cu_seqlens_k,
            alibi_slopes,
            sinks,
            seed,
            *ctx.options_and_backend,
            needs,
        )
        dq, dk, dv, dalibi_slopes, dsinks = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return dq, dk, dv, None, None, dalibi_slopes, dsinks, *([None] * (1 + len(ctx.options_and_backend)))


lib.impl("attention_forward", Attention.apply, "Autograd")

# --- the public functions ---


class AttentionOutput(NamedTuple):
    o: Tensor
    lse: Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = UNBOUNDED,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Multi-head attention, exact, in memory linear in the sequence length where the backend allows.

        s = einsum("bihd,bjhd->bhij", q, k.repeat_interleave(Hq // Hk, 2)) * scale     # scale None: D ** -0.5
        s = softcap * torch.tanh(s / softcap)                                          # where given
        s = s - alibi_slopes * (i + Tk - Tq - j).abs()                                 # where given
        s = s.masked_fill(~visible, -inf)
        p = torch.softmax(torch.cat([sinks, s], -1), -1)[..., 1:]                      # sinks where given
        o = einsum("bhij,bjhd->bihd", F.dropout(p, dropout_p), v.repeat_interleave(Hq // Hk, 2))

    q (B, Tq, Hq, D), k and v (B, Tk, Hk, D), Hk divides Hq; D a multiple of 8 up to 512; fp16, bf16, fp32 or fp64, all
    three the same (under autocast they are cast to its dtype). Any strides; slices of one fused projection are read in
    place. Returns o (B, Tq, Hq, D), contiguous.

    `causal` and `window_size` (left, right; None or -1: unbounded) are aligned at the bottom right: query i sees key j
    if i + Tk - Tq - left <= j <= i + Tk - Tq + right, and causal means right = 0. A query that sees no key gives 0 and
    has no gradient. `alibi_slopes` (Hq,) or (B, Hq) and `sinks` (Hq,), floating point, get gradients. `seed` of the
    dropout mask: an int in [0, 2**63), an int64 tensor of one element on q's device, or None, drawn there by torch's
    generator; the mask depends on (seed, batch, head, query, key) alone (`reference.dropout_keep`).

    Raises ValueError for arguments that do not fit and hotloop.kernels.dispatch.BackendError if a forced backend does
    not serve them.

    Dao, "FlashAttention-2: Faster attention with better parallelism and work partitioning" (2023).
    """
    return _attention(
        q,
        k,
        v,
        None,
        None,
        None,
        None,
        causal,
        window_size,
        scale,
        softcap,
        alibi_slopes,
        sinks,
        dropout_p,
        seed,
        False,
    ).o


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = UNBOUNDED,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> AttentionOutput:
    """Like `attention`, with lse (B, Hq, Tq) in natural log, fp32 (fp64 for fp64), differentiable.

    lse = torch.logsumexp(torch.cat([sinks, s], -1), -1)      # before dropout; -inf for a query that sees no key
    """
    return _attention(
        q, k, v, None, None, None, None, causal, window_size, scale, softcap, alibi_slopes, sinks, dropout_p, seed, True
    )


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = UNBOUNDED,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    check: bool = False,
) -> Tensor:
    """Attention within each segment of a packed batch; segments never see each other, not even their NaN.

        for q_s, k_s, v_s in segments:
            o_s = attention(q_s[None], k_s[None], v_s[None], ...)[0]

    q (total_q, Hq, D), k and v (total_k, Hk, D); returns o (total_q, Hq, D). Segment s is the rows from
    `cu_seqlens_q[s]` to `cu_seqlens_q[s + 1]` of q and likewise of k and v; cu_seqlens_* (S + 1,) int32 start at 0 and
    never decrease (`cu_seqlens_from_document_ids` builds them). Segments may be empty, so a fixed capacity is filled by
    repeating the last entry. Rows past `cu_seqlens_*[-1]` give zeros, in gradients too. `cu_seqlens_k` None: that of q.
    `max_seqlen_*` bounds the longest segment from above; None: the total length. `alibi_slopes` (Hq,) or (S, Hq). The
    dropout mask counts batch, query and key by segment: it is that of `attention` on the segments as a batch.

    Errors as `attention`. The values of cu_seqlens and max_seqlen are checked where cu_seqlens is on the CPU; on a GPU
    they are not read, and boundaries that decrease, pass the total or exceed max_seqlen are undefined. `check` asserts
    there that they do not (a failure ends the process' use of the device; nothing waits).
    """
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window_size, scale, softcap, alibi_slopes, sinks, dropout_p, seed, False, check,
    ).o  # fmt: skip


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = UNBOUNDED,
    scale: float | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    check: bool = False,
) -> AttentionOutput:
    """Like `attention_varlen`, with lse (Hq, total_q), differentiable; see `attention_with_lse`."""
    return _attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        causal, window_size, scale, softcap, alibi_slopes, sinks, dropout_p, seed, True, check,
    )  # fmt: skip


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    window_size: tuple[int | None, int | None],
    scale: float | None,
    softcap: float | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    seed: int | Tensor | None,
    needs_dlse: bool,
    check: bool = False,
) -> AttentionOutput:
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, varlen=cu_seqlens_q is not None)
    if cu_seqlens_q is None:
        batch, max_seqlen_q, max_seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        cu_seqlens_k = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
        check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k)
        batch = cu_seqlens_q.shape[0] - 1
        max_seqlen_q = q.shape[0] if max_seqlen_q is None else max_seqlen_q
        if max_seqlen_k is None:
            max_seqlen_k = max_seqlen_q if cu_seqlens_k is None else k.shape[0]
        if check and q.device.type != "cpu":
            assert_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.shape[0], max_seqlen_q)
            if cu_seqlens_k is not None:
                assert_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[0], max_seqlen_k)
    options = options_of(q, max_seqlen_q, max_seqlen_k, causal, window_size, scale, softcap, dropout_p)
    alibi_slopes = per_head("alibi_slopes", alibi_slopes, q, batch)
    sinks = per_head("sinks", sinks, q)
    seed = seed_tensor(seed, options.dropout_p, q)
    # One tensor in two argument places would be an alias that compiled graphs may merge or refuse; views are distinct.
    k = k.view_as(k) if k is q else k
    v = v.view_as(v) if v is q or v is k else v
    backend = TABLE.choose(Call(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed, options), needs_dlse)
    o, lse = ops.attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, seed,
        options.max_seqlen_q, options.max_seqlen_k, options.window_left, options.window_right, options.scale,
        options.softcap, options.dropout_p, backend.name,
    )  # fmt: skip
    return AttentionOutput(o, lse)
