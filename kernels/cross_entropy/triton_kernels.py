"""Triton kernels of cross entropy: rows of logits (results, and the gradient where it is asked for), and tiles of the
vocabulary (gradient from results). The formula and its letters: contract.py.

A program takes a row. It walks it in blocks that begin at multiples of 8 elements, whatever the vocabulary, so that all
blocks but those at the row's ends move 128 bits at a time without a mask. Sums follow the running maximum: where it
rises from m to m', the sum of exp(x - m) shrinks by exp(m - m'), and so on. The gradient reads the row again.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.triton_math import tanh


@triton.jit
def logit(z, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """x of the contract from a raw logit."""
    if HAS_SOFTCAP:
        return tanh(z.to(tl.float32) * (logit_scale / softcap)) * softcap
    else:
        return z.to(tl.float32) * logit_scale


@triton.jit
def read(pointers, inside, fill, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=inside, other=fill)
    else:
        return tl.load(pointers)


# Rows


@triton.jit
def row_block(
    m, total, spread, weights, product, nan, first, first_nan, logits, at, begin, end, weight, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SPREAD: tl.constexpr, HAS_STATS: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What is known of a row (maximum, sums, first places), after the elements at .. at + BLOCK - 1; the row has the
    elements begin .. end - 1."""
    offsets = at + tl.arange(0, BLOCK)
    inside = (offsets >= begin) & (offsets < end)
    x = logit(read(logits + offsets, inside, float("-inf"), MASKED), logit_scale, softcap, HAS_SOFTCAP)
    if MASKED:
        x = tl.where(inside, x, float("-inf"))  # the cap of -inf is finite, -inf times a negative scale is inf
    column = (offsets - begin).to(tl.int32)
    is_nan = (x != x) & inside
    nan = tl.maximum(nan, tl.max(is_nan.to(tl.int32), 0))

    highest = tl.max(tl.where(is_nan, float("-inf"), x), 0)
    if HAS_STATS:
        here = tl.min(tl.where((x == highest) & inside, column, 2147483647), 0)
        first = tl.where(highest > m, here, tl.where((highest == m) & (first < 0), here, first))
        first_nan = tl.minimum(first_nan, tl.min(tl.where(is_nan, column, 2147483647), 0))
    new = tl.maximum(m, highest)
    # While all is -inf: no differences of infinities.
    base, old = tl.where(new == float("-inf"), 0.0, new), tl.where(m == float("-inf"), 0.0, m)
    drop = tl.where(m == float("-inf"), 0.0, old - base)
    shrink = tl.exp(drop)
    d = x - base
    e = tl.exp(d)
    if HAS_STATS:
        # exp(d) * d is 0 where d is -inf
        product = shrink * (product + drop * total) + tl.sum(e * tl.where(d < -104.0, -104.0, d), 0)
    if HAS_SPREAD:
        w = tl.load(weight + column, mask=inside, other=0.0) if HAS_WEIGHT else tl.where(inside, 1.0, 0.0)
        spread += tl.where(weights > 0, weights * (base - old), 0.0) + tl.sum(tl.where(inside, -d * w, 0.0), 0)
        weights += tl.sum(w, 0)
    total = shrink * total + tl.sum(e, 0)
    return new, total, spread, weights, product, nan, first, first_nan


@triton.jit
def gradient_block(
    out, logits, at, begin, end, target, m, inverse, a, b, c, weight, logit_scale, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SPREAD: tl.constexpr, BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    offsets = at + tl.arange(0, BLOCK)
    inside = (offsets >= begin) & (offsets < end)
    column = (offsets - begin).to(tl.int32)
    x = logit(read(logits + offsets, inside, 0.0, MASKED), logit_scale, softcap, HAS_SOFTCAP)
    p = tl.exp(x - m) * inverse
    dx = a * p + b * tl.where(column == target, p - 1.0, p)
    if HAS_SPREAD:
        if HAS_WEIGHT:
            dx -= c * tl.load(weight + column, mask=inside, other=0.0)
        else:
            dx -= c
    if HAS_SOFTCAP:
        share = x / softcap
        dx *= 1.0 - share * share
    dx = (dx * logit_scale).to(out.dtype.element_ty)
    if MASKED:
        tl.store(out + offsets, dx, mask=inside)
    else:
        tl.store(out + offsets, dx)


@triton.jit
def rows_kernel(
    logits,
    logits_stride,
    target_pointer,  # (N,) int64
    weight,  # (V,) fp32
    token_weight,  # (N,) fp32
    weight_sum,  # () fp32, of class weights
    loss,  # (N,) fp32, as the four that follow; each only where it is asked for
    nll,
    lse,
    entropy,
    predicted,  # (N,) int64
    out,  # (N, V): gradient of sum(dloss * loss), where HAS_GRADIENT; may be the logits
    out_stride,
    dloss,  # (N,) fp32, or (1,) with dloss_stride 0
    dloss_stride,
    count_pointer,  # () int64, where HAS_COUNT: rows from this one on are left alone
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    HAS_RESULTS: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    IS_ALIKE: tl.constexpr,  # the gradient's rows are as far apart as those of the logits
    HAS_WEIGHT: tl.constexpr,
    HAS_TOKEN_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid N."""
    row = tl.program_id(0).to(tl.int64)
    if HAS_COUNT and row >= tl.load(count_pointer):
        return
    target = tl.load(target_pointer + row)
    begin = row * logits_stride
    end = begin + V
    if target == ignore_index:
        if HAS_RESULTS:
            tl.store(loss + row, 0.0)
            tl.store(nll + row, 0.0)
            tl.store(lse + row, 0.0)
            if HAS_STATS:
                tl.store(entropy + row, 0.0)
                tl.store(predicted + row, -1)
        if HAS_GRADIENT:
            first = row * out_stride
            for at in range(0, V, BLOCK):
                column = at + tl.arange(0, BLOCK)
                tl.store(out + first + column, tl.zeros((BLOCK,), out.dtype.element_ty), mask=column < V)
        return

    aligned = tl.multiple_of(begin // 8 * 8, 8)
    count = tl.cdiv(end - aligned, BLOCK)
    m, total, spread, weights, product = float("-inf"), 0.0, 0.0, 0.0, 0.0
    nan, first, first_nan = 0, -1, 2147483647
    for k in range(count):
        at = aligned + k * BLOCK
        if (at < begin) | (at + BLOCK > end):
            m, total, spread, weights, product, nan, first, first_nan = row_block(
                m, total, spread, weights, product, nan, first, first_nan, logits, at, begin, end, weight,
                logit_scale, softcap, HAS_SOFTCAP, HAS_WEIGHT, HAS_SMOOTHING, HAS_STATS, BLOCK, True,
            )  # fmt: skip
        else:
            m, total, spread, weights, product, nan, first, first_nan = row_block(
                m, total, spread, weights, product, nan, first, first_nan, logits, at, begin, end, weight,
                logit_scale, softcap, HAS_SOFTCAP, HAS_WEIGHT, HAS_SMOOTHING, HAS_STATS, BLOCK, False,
            )  # fmt: skip

    # A target that is no class makes the row NaN.
    is_class = (target >= 0) & (target < V)
    z = tl.load(logits + begin + target, mask=is_class, other=float("nan"))
    x_target = logit(z, logit_scale, softcap, HAS_SOFTCAP)
    # A row with an infinite maximum has no sum, and the infinity as the logarithm of it.
    infinite = (m == float("inf")) | (m == float("-inf"))
    total = tl.where(infinite | (nan > 0), float("nan"), total)
    log_total = tl.log(total)
    row_lse = tl.where(infinite, tl.where(nan > 0, float("nan"), m), m + log_total)
    # Not lse - x[target], which would cancel where |x| is large.
    row_nll = (m - x_target) + log_total
    w = tl.load(weight + target, mask=is_class, other=0.0) if HAS_WEIGHT else 1.0
    share = tl.load(token_weight + row) if HAS_TOKEN_WEIGHT else 1.0
    all_weights = tl.load(weight_sum) if HAS_WEIGHT else V * 1.0
    if HAS_RESULTS:
        value = row_nll * (1.0 - label_smoothing) * w
        if HAS_SMOOTHING:
            value += (spread + all_weights * log_total) * (label_smoothing / V)
        if HAS_Z_LOSS:
            value += z_loss * row_lse * row_lse
        tl.store(loss + row, value * share)
        tl.store(nll + row, row_nll)
        tl.store(lse + row, row_lse)
        if HAS_STATS:
            tl.store(entropy + row, log_total - product / total)
            tl.store(predicted + row, tl.where(nan > 0, first_nan, first).to(tl.int64))
    if HAS_GRADIENT:
        drow = tl.load(dloss + row * dloss_stride) * share
        b = drow * (1.0 - label_smoothing) * w
        c = drow * (label_smoothing / V)
        a = c * all_weights
        if HAS_Z_LOSS:
            a += drow * (2.0 * z_loss) * row_lse
        inverse = 1.0 / total
        # The gradient's columns lie in `out` as the logits' in `logits`, but for where its row begins.
        shift = out if IS_ALIKE else out + (row * out_stride - begin)
        for k in range(count):
            at = aligned + k * BLOCK
            if (at < begin) | (at + BLOCK > end):
                gradient_block(
                    shift, logits, at, begin, end, target, m, inverse, a, b, c, weight, logit_scale, softcap,
                    HAS_SOFTCAP, HAS_WEIGHT, HAS_SMOOTHING, BLOCK, True,
                )  # fmt: skip
            else:
                gradient_block(
                    shift, logits, at, begin, end, target, m, inverse, a, b, c, weight, logit_scale, softcap,
                    HAS_SOFTCAP, HAS_WEIGHT, HAS_SMOOTHING, BLOCK, False,
                )  # fmt: skip


# Tiles of the vocabulary


@triton.jit
def columns_kernel(
    logits,  # (N, width) raw; overwritten with the gradient
    logits_stride,
    width,
    first,  # column of the vocabulary in column 0
    target_pointer,  # (N,) int64
    a_pointer,  # (N,) fp32, as the factors that follow: 0 in ignored rows
    b_pointer,
    c_pointer,
    dentropy_pointer,
    weight,  # (V,)
    lse_pointer,  # (N,)
    entropy_pointer,  # (N,)
    ignore_index,
    softcap,
    logit_scale,
    HAS_C: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N, blocks of a row)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    pointers = logits + row * logits_stride + column
    target = tl.load(target_pointer + row)
    if target == ignore_index:  # whatever is in it, NaN too
        tl.store(pointers, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=inside)
        return
    lse = tl.load(lse_pointer + row)
    a, b = tl.load(a_pointer + row), tl.load(b_pointer + row)
    a = tl.where(lse == float("inf"), float("nan"), a)  # all of the row's gradient is NaN, not only that logit's
    x = logit(tl.load(pointers, mask=inside, other=0.0), logit_scale, softcap, HAS_SOFTCAP)
    p = tl.exp(x - lse)
    dx = a * p + b * tl.where(column + first == target, p - 1.0, p)
    if HAS_C:
        w = tl.load(weight + first + column, mask=inside, other=0.0) if HAS_WEIGHT else 1.0
        dx -= tl.load(c_pointer + row) * w
    if HAS_DENTROPY:
        # p log p is 0 where log p is -inf
        dx -= tl.load(dentropy_pointer + row) * p * (tl.maximum(x - lse, -1e30) + tl.load(entropy_pointer + row))
    if HAS_SOFTCAP:
        share = x / softcap
        dx *= 1.0 - share * share
    tl.store(pointers, (dx * logit_scale).to(logits.dtype.element_ty), mask=inside)
