"""Backend `torch`: rows of logits by PyTorch's operators, in cache-sized blocks, in place where the contract allows it.

`torch.softmax(out=)` is PyTorch's fastest pass over a row on a CPU (0.65 of the time of `exp` alone), so the logarithm of
the sum comes from its largest entry: with m = x.amax(-1), softmax(x).amax(-1) = 1 / sum(exp(x - m)). Losses are
(m - x[target]) + log(sum): subtracting x[target] from lse would cancel where |x| is large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import config
from hotloop.kernels.cross_entropy.contract import (
    Coefficients,
    Options,
    Rows,
    Upstream,
    accumulation_dtype,
    row_coefficients,
)


def rows_forward(
    logits: Tensor,  # (N, V) raw; not written
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) accumulation dtype
    token_weight: Tensor | None,  # (N,) accumulation dtype
    options: Options,
    stats: bool,
) -> Rows:
    rows = _empty_rows(logits, stats)
    for block in _blocks(logits):
        x = _capped(logits[block], options, may_alias=True)
        _forward_block(x, torch.empty_like(x), target, weight, token_weight, options, rows, block)
    return rows


def rows_forward_backward_(
    logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    scale: Tensor,  # ()
    options: Options,
    stats: bool,
) -> Rows:
    rows = _empty_rows(logits, stats)
    for block in _blocks(logits):
        x = _capped(logits[block], options, may_alias=True)
        chain = _cap_slope(x, options)
        _forward_block(x, x, target, weight, token_weight, options, rows, block)
        t, lse = target[block], rows.lse[block]
        upstream = Upstream(scale.expand(t.shape))
        coefficients = row_coefficients(
            upstream, t, weight, _part(token_weight, block), lse, logits.shape[1], options
        )
        _gradient_(x, chain, t, coefficients, weight, options)
        if x.data_ptr() != logits[block].data_ptr():
            logits[block].copy_(x)
    return rows


def columns_backward_(
    logits: Tensor,  # (N, width) raw; overwritten with the gradient
    first: int,  # column of the vocabulary in logits[:, 0]
    target: Tensor,  # (N,) int64
    coefficients: Coefficients,
    weight: Tensor | None,  # (V,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,); (0,) where no coefficient needs it
    options: Options,
) -> None:
    width = logits.shape[1]
    local = target - first
    inside = (local >= 0) & (local < width)
    # Where a logit is +inf all of the row's gradient is NaN, as in PyTorch, and not only that logit's.
    a = torch.where(lse.isposinf(), torch.nan, coefficients.a)
    coefficients = coefficients._replace(a=a, b=torch.where(inside, coefficients.b, 0.0))
    local = torch.where(inside, local, options.ignore_index)
    weight = None if weight is None else weight[first : first + width]
    for block in _blocks(logits):
        x = _capped(logits[block], options, may_alias=True)
        chain = _cap_slope(x, options)
        x.sub_(lse[block, None])
        part = Coefficients(*(_part(c, block) for c in coefficients))
        if part.dentropy is not None:  # p (a - dentropy (log p + entropy)), with p log p = 0 where p is 0
            factor = x.clamp(min=-1e30).add_(entropy[block, None]).mul_(-part.dentropy[:, None]).add_(part.a[:, None])
            x.exp_().mul_(factor)
            part = part._replace(a=None)
        else:
            x.exp_()
        _gradient_(x, chain, local[block], part, weight, options, outside=options.ignore_index)
        if x.data_ptr() != logits[block].data_ptr():
            logits[block].copy_(x)
