"""The public functions of FlashAttention-2 (flash_attn 2.x) by their own names, signatures and values.

    from hotloop.kernels.drop_in.flash_attn import flash_attn_func      # was: from flash_attn import flash_attn_func

Layouts, masks aligned at the bottom right, `window_size`, `softcap` <= 0 for none and head dimensions that are no
multiple of 8 (padded, a copy) are the peer's. Beyond it: CPU, fp32 and fp64, dropout together with softcap, gradients
of `alibi_slopes` and softmax_lse, head dimensions up to 512, `max_seqlen_*` that are None or tensors on a device (not
read: the total length bounds them). Different:

- gradients are always deterministic, whatever `deterministic` says;
- the dropout mask is this package's, another than the peer's from the same state of the generator;
- rows past cu_seqlens[-1] give zeros, where the peer leaves them undefined;
- softmax_lse is that of the scores with the alibi bias as documented. The peer's kernel drops a term that is constant
  along a row where `causal`, and its softmax_lse lacks it.

`return_attn_probs` returns (out, softmax_lse, None): the peer's third result, for its own tests, exists with dropout
only, which is an error here. So is a paged cache (`block_table`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.attention import attention_varlen_with_lse, attention_with_lse
from hotloop.kernels.drop_in.padding import host_bound, pad_head_dim

Window = tuple[int, int]
Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,  # (B, Tq, Hq, D)
    k: Tensor,  # (B, Tk, Hk, D)
    v: Tensor,  # (B, Tk, Hk, D)
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # (Hq,) or (B, Hq)
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:  # (B, Tq, Hq, D), softmax_lse (B, Hq, Tq)
    return _attention(
        q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_kvpacked_func(
    q: Tensor,  # (B, Tq, Hq, D)
    kv: Tensor,  # (B, Tk, 2, Hk, D)
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    k, v = _unbind("kv", kv, 2, 5)
    return _attention(
        q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,  # (B, T, 3, H, D)
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    q, k, v = _unbind("qkv", qkv, 3, 5)
    return _attention(
        q, k, v, None, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_varlen_func(
    q: Tensor,  # (total_q, Hq, D)
    k: Tensor,  # (total_k, Hk, D)
    v: Tensor,  # (total_k, Hk, D)
    cu_seqlens_q: Tensor,  # (S + 1,) int32
    cu_seqlens_k: Tensor,  # (S + 1,) int32
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,  # (Hq,) or (S, Hq)
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: None = None,
) -> Result:  # (total_q, Hq, D), softmax_lse (Hq, total_q)
    if block_table is not None:
        raise ValueError("block_table: a paged cache is not served; expected None, and k and v as (total_k, Hk, D)")
    segments = _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attention(
        q, k, v, segments, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,  # (total_q, Hq, D)
    kv: Tensor,  # (total_k, 2, Hk, D)
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None,
    max_seqlen_k: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    k, v = _unbind("kv", kv, 2, 4)
    segments = _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _attention(
        q, k, v, segments, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,  # (total, 3, H, D)
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor | None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    q, k, v = _unbind("qkv", qkv, 3, 4)
    segments = _segments(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _attention(
        q, k, v, segments, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
    )


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: dict[str, Any] | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
) -> Result:
    if return_attn_probs and dropout_p > 0:
        raise ValueError(
            f"return_attn_probs with dropout_p = {dropout_p}: probabilities are never formed; pass dropout_p=0.0 for "
            "softmax_lse, and take the dropout mask from hotloop.kernels.attention.reference.dropout_keep"
        )
    D = v.shape[-1]
    options: dict[str, Any] = {
        "causal": causal,
        "window_size": tuple(None if side < 0 else side for side in window_size),
        "scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "softcap": softcap if softcap > 0 else None,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
    }
    q, k, v = pad_head_dim(q, k, v)
    if segments is None:
        o, lse = attention_with_lse(q, k, v, **options)
    else:
        o, lse = attention_varlen_with_lse(q, k, v, **segments, **options)
    o = o if o.shape[-1] == D else o[..., :D]
    if not return_attn_probs:
        return o
    return o, lse.masked_fill(lse == -torch.inf, torch.inf), None  # the peer's mark of a row that sees no key


def _segments(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int | Tensor | None, max_seqlen_k: int | Tensor | None
) -> dict[str, Any]:
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": host_bound(max_seqlen_q),
        "max_seqlen_k": host_bound(max_seqlen_k),
    }


def _unbind(name: str, x: Tensor, count: int, dim: int) -> tuple[Tensor, ...]:
    if x.dim() != dim or x.shape[-3] != count:
        expected = ", ".join(("batch", "positions") if dim == 5 else ("total",))
        raise ValueError(f"{name} {tuple(x.shape)}: expected ({expected}, {count}, heads, head_dim)")
    return x.unbind(-3)


__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]
