"""Functions of torch.nn.functional (2.13) by their own names, signatures and values.

Where PyTorch's value differs from ours PyTorch's is given: a mean over no rows is NaN. What it takes and we do not is
an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from hotloop.kernels.attention import attention
from hotloop.kernels.cross_entropy.linear import linear_cross_entropy as _linear
from hotloop.kernels.cross_entropy.op import cross_entropy as _logits
from hotloop.kernels.drop_in.padding import attention_valid_keys, pad_head_dim

# --- losses ---


def cross_entropy(
    input: Tensor,  # (C,), (N, C) or (N, C, d_1, ..., d_K)
    target: Tensor,  # (), (N,) or (N, d_1, ..., d_K)
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` of class indices, in the input's dtype."""
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    _check_indices(target)
    logits = input if input.dim() <= 2 else input.movedim(1, -1)
    options: dict[str, Any] = {"weight": weight, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
    loss = _logits(logits, target, reduction=reduction, **options)
    return _mean_of_none(loss, target, weight, ignore_index, reduction).to(input.dtype)


def linear_cross_entropy(
    input: Tensor,  # (in_features,) or (N, in_features)
    linear_weight: Tensor,  # (C, in_features)
    target: Tensor,  # () or (N,)
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
) -> Tensor:
    """`torch.nn.functional.linear_cross_entropy` of class indices. `options` choose PyTorch's chunks, here unused."""
    _check_indices(target)
    if linear_weight.dim() != 2:
        raise ValueError(
            f"linear_weight has shape {tuple(linear_weight.shape)}: expected (C, in_features); losses of more "
            "dimensions are torch.nn.functional.linear_cross_entropy's"
        )
    ignored = -100 if ignore_index is None else ignore_index
    loss = _linear(
        input, linear_weight, target, linear_bias=linear_bias, weight=weight, reduction=reduction,
        ignore_index=ignored, label_smoothing=label_smoothing,
    )  # fmt: skip
    return _mean_of_none(loss, target, weight, ignored, reduction).to(input.dtype)


def _check_indices(target: Tensor) -> None:
    if target.is_floating_point():
        raise TypeError(
            f"target is {target.dtype}, class probabilities: expected class indices (int64); "
            "torch.nn.functional.cross_entropy takes probabilities"
        )


def _mean_of_none(loss: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str) -> Tensor:
    """A mean over no rows is NaN; its gradients are 0."""
    if reduction != "mean":
        return loss
    return torch.where(total_weight(target, weight, ignore_index) == 0, torch.nan, loss)


def total_weight(target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    valid = target != ignore_index
    if weight is None:
        return valid.sum().float()
    return torch.where(valid, weight.float()[torch.where(valid, target, 0)], 0.0).sum()


# --- attention ---


def scaled_dot_product_attention(
    query: Tensor,  # (..., Hq, L, E)
    key: Tensor,  # (..., H, S, E)
    value: Tensor,  # (..., H, S, Ev)
    attn_mask: Tensor | None = None,  # broadcastable to (..., Hq, L, S), equal along Hq and L
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # (..., Hq, L, Ev)
    """`torch.nn.functional.scaled_dot_product_attention`: is_causal is aligned at the top left, dimensions broadcast.

    `attn_mask` is served where it says which keys all queries see: bool, and of size 1 (or expanded from it) along
    heads and queries, e.g. (B, 1, 1, S); k and v are then copied once, visible keys first, without reading the mask. A
    mask that varies along queries, or that adds to the scores, is an error: its bytes are L * S, which the kernels
    exist to avoid. A query that sees no key gives 0. E or Ev that is no multiple of 8, or E != Ev, costs a padded copy.
    The dropout mask is another than PyTorch's from the same state of the generator.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 2:
            raise ValueError(f"{name} {tuple(x.shape)}: expected at least 2 dimensions")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal exclude each other: expected one of them")
    (L, E), S, Ev = query.shape[-2:], key.shape[-2], value.shape[-1]
    Hq, H = _heads(query), max(_heads(key), _heads(value))
    if Hq == 1 and not enable_gqa:
        Hq = H
    if H not in (1, Hq) and not enable_gqa:
        raise ValueError(f"query has {Hq} heads and key {H}: expected the same, or enable_gqa=True")
    batch = query.shape[:-3]
    if not batch == key.shape[:-3] == value.shape[:-3]:
        batch = torch.broadcast_shapes(batch, key.shape[:-3], value.shape[:-3])
    B = math.prod(batch)
    scale = E**-0.5 if scale is None else scale
    query, key, value = pad_head_dim(query, key, value)

    def dense(x: Tensor, heads: int) -> Tensor:  # (B, T, heads, D)
        T, D = x.shape[-2:]
        if x.shape == (B, heads, T, D):
            return x.transpose(1, 2)
        return x.expand(*batch, heads, T, D).reshape(B, heads, T, D).transpose(1, 2)

    q, k, v = dense(query, Hq), dense(key, H), dense(value, H)
    options: dict[str, Any] = {"scale": scale, "dropout_p": dropout_p}
    if attn_mask is not None and q.numel() > 0:
        o = attention_valid_keys(q, k, v, _valid_keys(attn_mask, (*batch, Hq, L, S)), **options)
    elif is_causal and L < S:  # query i sees keys 0 to i: none past the first L
        o = attention(q, k[:, :L], v[:, :L], causal=True, **options)
    elif is_causal:
        o = attention(q, k, v, window_size=(None, L - S), **options)
    else:
        o = attention(q, k, v, **options)
    dimensions = max(query.dim(), key.dim(), value.dim())
    o = o if o.shape[-1] == Ev else o[..., :Ev]
    o = o.transpose(1, 2)
    return o if dimensions == 4 else o.reshape((*batch, Hq, L, Ev)[-dimensions:])


def _heads(x: Tensor) -> int:
    return x.shape[-3] if x.dim() > 2 else 1


def _valid_keys(attn_mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(B, S) bool, from what sizes and strides say: no value is read."""
    Hq, L, S = shape[-3:]
    if attn_mask.dtype != torch.bool:
        why = f"is {attn_mask.dtype} and adds to the scores"
    else:
        mask = attn_mask.expand(shape)
        if (Hq == 1 or mask.stride(-3) == 0) and (L == 1 or mask.stride(-2) == 0):
            return mask[..., 0, 0, :].reshape(-1, S)
        why = "varies along heads or queries"
    raise ValueError(
        f"attn_mask {tuple(attn_mask.shape)} {why}: expected a bool mask of keys, (..., 1, S). For a causal mask pass "
        "is_causal=True; for documents use hotloop.kernels.attention.attention_varlen, for a window its window_size, "
        "for a linear bias its alibi_slopes; any other mask is torch.nn.functional.scaled_dot_product_attention's"
    )


__all__ = ["cross_entropy", "linear_cross_entropy", "scaled_dot_product_attention"]
