"""Backend `torch`: rows of logits by PyTorch's operators, in cache-sized blocks, in place where the contract allows it.

`torch.softmax(out=)` is PyTorch's fastest pass over a row on a CPU (0.65 of the time of `exp` alone), so the logarithm
of the sum comes from its largest entry: with m = x.amax(-1), softmax(x).amax(-1) = 1 / sum(exp(x - m)). Losses are
(m - x[target]) + log(sum): subtracting x[target] from lse would cancel where |x| is large.

Blocks hold the passes over logits only. What is per row is done once for all rows: small operators cost as much as a
pass over a block when the vocabulary is small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

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
    columns = _find(target, options)
    sums = _empty_sums(logits, options, stats)
    for block, p in _blocks(logits):
        x = _capped(logits[block], options, p)
        _softmax(x, p, columns.at[block], weight, sums, block)
    return _rows(sums, columns, weight, token_weight, logits.shape[1], options)


def rows_forward_backward_(
    logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    scale: Tensor,  # ()
    options: Options,
    stats: bool,
) -> Rows:
    v = logits.shape[1]
    columns = _find(target, options)
    sums = _empty_sums(logits, options, stats)
    upstream = Upstream(scale.expand(target.shape))
    factors = None
    if not options.z_loss:  # whose factor needs lse, which is known block by block
        factors = row_coefficients(upstream, target, weight, token_weight, sums.m, v, options)
    for block, room in _blocks(logits, out=logits):
        x = _capped(logits[block], options, room)
        slope = _cap_slope(x, options)
        _softmax(x, x, columns.at[block], weight, sums, block)
        if factors is not None:
            part = factors.rows(block)
        else:
            lse, rows = _lse(sums.m[block], sums.peak[block]), Upstream(scale.expand(x.shape[:1]))
            part = row_coefficients(rows, target[block], weight, _part(token_weight, block), lse, v, options)
        _gradient_(x, part, columns.rows(block), weight, slope, options)
        _store(x, logits[block])
    return _rows(sums, columns, weight, token_weight, v, options)


def rows_backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V) raw
    target: Tensor,  # (N,)
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    lse: Tensor,  # (N,)
    options: Options,
    out: Tensor,  # (N, V): a new tensor, or logits itself
) -> None:
    v = logits.shape[1]
    columns = _find(target, options)
    factors = row_coefficients(Upstream(dloss), target, weight, token_weight, lse, v, options)
    for block, p in _blocks(logits, out=out):
        x = _capped(logits[block], options, p)
        slope = _cap_slope(x, options)
        torch.softmax(x, 1, out=p)  # not exp(x - lse), which is less accurate where |x| is large
        _gradient_(p, factors.rows(block), columns.rows(block), weight, slope, options)
        _store(p, out[block])


def columns_backward_(
    logits: Tensor,  # (N, width) raw, a tile of the vocabulary; overwritten with the gradient
    first: int,  # column of the vocabulary in logits[:, 0]
    target: Tensor,  # (N,) int64
    factors: Coefficients,  # zero in ignored rows
    weight: Tensor | None,  # (V,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,); (0,) where factors.dentropy is None
    options: Options,
) -> None:
    width = logits.shape[1]
    columns = _find(target, options, (first, width))
    weight = None if weight is None else weight[first : first + width]
    # Where a logit is +inf all of the row's gradient is NaN, as in PyTorch, and not only that logit's.
    factors = factors._replace(a=torch.where(lse.isposinf(), torch.nan, factors.a))
    for block, room in _blocks(logits, out=logits):
        x = _capped(logits[block], options, room)
        slope = _cap_slope(x, options)
        logp = x.sub_(lse[block, None])
        # log p + entropy; the clamp makes p log p 0 where log p is -inf
        below = None if factors.dentropy is None else logp.clamp(min=-1e30).add_(entropy[block, None])
        _gradient_(logp.exp_(), factors.rows(block), columns.rows(block), weight, slope, options, below)
        _store(x, logits[block])


class _Columns(NamedTuple):
    """Where each row's target is among the columns at hand."""

    at: Tensor  # (N,) 0 where it isn't among them
    inside: Tensor | None  # (N,) it is; None: in every row that is valid
    ignored: Tensor | None  # (N,) the row has no target; None: no row is so

    def rows(self, block: slice) -> _Columns:
        return _Columns(self.at[block], _part(self.inside, block), _part(self.ignored, block))


def _find(target: Tensor, options: Options, tile: tuple[int, int] | None = None) -> _Columns:
    """`tile`: first column and width of a part of the vocabulary; None: all of it."""
    ignored = target == options.ignore_index
    # A value costs nothing to read on a CPU, and nowhere else is it read.
    some = None if target.device.type == "cpu" and not ignored.any() else ignored
    if tile is None:
        return _Columns(target if some is None else torch.where(ignored, 0, target), None, some)
    first, width = tile
    inside = (target >= first) & (target < first + width) & ~ignored
    return _Columns(torch.where(inside, target - first, 0), inside, some)


class _Sums(NamedTuple):
    """What the passes over the logits leave of each row."""

    m: Tensor  # (N,) largest x
    peak: Tensor  # (N,) largest p, 1 / sum(exp(x - m))
    x_target: Tensor  # (N,) x of the target
    spread: Tensor | None  # (N,) sum of w (m - x), for label smoothing
    entropy: Tensor  # (N,) or (0,)
    predicted: Tensor  # (N,) or (0,)


def _empty_sums(logits: Tensor, options: Options, stats: bool) -> _Sums:
    n = logits.shape[0]
    dtype = accumulation_dtype(logits.dtype)
    m, peak, x_target = (logits.new_empty(n, dtype=dtype) for _ in range(3))
    spread = torch.empty_like(m) if options.label_smoothing else None
    entropy = logits.new_empty(n if stats else 0, dtype=dtype)
    return _Sums(m, peak, x_target, spread, entropy, logits.new_empty(n if stats else 0, dtype=torch.int64))


def _softmax(
    x: Tensor,  # (n, V) accumulation dtype, scaled and capped
    p: Tensor,  # (n, V) overwritten with softmax(x); may be x
    at: Tensor,  # (n,)
    weight: Tensor | None,
    sums: _Sums,  # (N,) each; `block` is filled
    block: slice,
) -> None:
    m = torch.amax(x, 1, out=sums.m[block])
    sums.x_target[block] = x.gather(1, at[:, None]).squeeze(1)
    if sums.spread is not None:
        below = torch.sub(m[:, None], x)
        sums.spread[block] = below.sum(1) if weight is None else below @ weight
    if sums.predicted.numel():
        sums.predicted[block] = x.argmax(1)
    torch.softmax(x, 1, out=p)
    torch.amax(p, 1, out=sums.peak[block])
    if sums.entropy.numel():
        sums.entropy[block] = torch.special.entr(p).sum(1)


def _lse(m: Tensor, peak: Tensor) -> Tensor:
    return torch.where(m.isinf(), m, m - peak.log())


def _rows(
    sums: _Sums, columns: _Columns, weight: Tensor | None, token_weight: Tensor | None, v: int, options: Options
) -> Rows:
    log_sum = -sums.peak.log()  # of exp(x - m)
    lse = _lse(sums.m, sums.peak)
    nll = (sums.m - sums.x_target) + log_sum
    row = nll * (1 - options.label_smoothing)
    if weight is not None:
        row = row * weight[columns.at]
    if sums.spread is not None:
        total = v if weight is None else weight.sum()
        row = row + (sums.spread + total * log_sum) * (options.label_smoothing / v)
    if options.z_loss:
        row = row + options.z_loss * lse.square()
    if token_weight is not None:
        row = row * token_weight
    rows = Rows(row, nll, lse, sums.entropy, sums.predicted)
    if columns.ignored is None:
        return rows
    row, nll, lse = (x.masked_fill_(columns.ignored, 0.0) for x in (row, nll, lse))
    if sums.predicted.numel():
        sums.entropy.masked_fill_(columns.ignored, 0.0)
        sums.predicted.masked_fill_(columns.ignored, -1)
    return rows


def _gradient_(
    p: Tensor,  # (n, width) overwritten with the gradient with respect to the raw logits
    factors: Coefficients,  # (n,) each
    columns: _Columns,  # (n,) each
    weight: Tensor | None,  # (width,)
    slope: Tensor | None,  # (n, width)
    options: Options,
    below: Tensor | None = None,  # (n, width) log p + entropy, where factors.dentropy is given; overwritten
) -> None:
    a, b = factors.a, factors.b
    at = columns.at[:, None]
    p_target = p.gather(1, at).squeeze(1)
    if below is None or factors.dentropy is None:
        p.mul_((a + b)[:, None])
    else:
        whole = below.mul_(-factors.dentropy[:, None]).add_(a[:, None])
        a = whole.gather(1, at).squeeze(1)
        p.mul_(whole.add_(b[:, None]))
    dx_target = a * p_target + b * (p_target - 1)
    if columns.inside is not None:
        dx_target = torch.where(columns.inside, dx_target, p.gather(1, at).squeeze(1))
    dx = p.scatter_(1, at, dx_target[:, None])
    if factors.c is not None:
        dx.sub_(factors.c[:, None]) if weight is None else dx.addcmul_(factors.c[:, None], weight, value=-1)
    if slope is not None:
        dx.mul_(slope)
    if options.logit_scale != 1:
        dx.mul_(options.logit_scale)
    if columns.ignored is not None:  # 0 * NaN: a row that is ignored has no gradient whatever is in it
        dx.masked_fill_(columns.ignored[:, None], 0.0)


def _capped(logits: Tensor, options: Options, out: Tensor) -> Tensor:
    """x of the contract, in `out`; `logits` itself where it is x already. `out` may be `logits`."""
    if logits.dtype == out.dtype and options.logit_scale == 1 and options.softcap is None:
        return logits
    out.copy_(logits)
    if options.logit_scale != 1:
        out.mul_(options.logit_scale)
    return out if options.softcap is None else out.div_(options.softcap).tanh_().mul_(options.softcap)


def _cap_slope(x: Tensor, options: Options) -> Tensor | None:
    return None if options.softcap is None else (x / options.softcap).square_().neg_().add_(1)


def _store(x: Tensor, out: Tensor) -> None:
    if x.data_ptr() != out.data_ptr():
        out.copy_(x)


def _blocks(logits: Tensor, out: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows, and room for each in the accumulation dtype: in `out` where that has it, else shared by all."""
    n, v = logits.shape
    step = config.block_rows(n, v, logits.device.type)
    dtype = accumulation_dtype(logits.dtype)
    whole = out if out is not None and out.dtype == dtype else None
    scratch = torch.empty((step if whole is None else 0, v), dtype=dtype, device=logits.device)
    for start in range(0, n, step):
        block = slice(start, min(start + step, n))
        yield block, scratch[: block.stop - start] if whole is None else whole[block]


def _part(x: Tensor | None, block: slice) -> Tensor | None:
    return None if x is None else x[block]
