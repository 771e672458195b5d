"""Triton kernels of a linear cross entropy: logits of some rows, gradients of a part of the vocabulary, their products.
The legend: triton_projection_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.cross_entropy.triton_kernels import logit
from hotloop.kernels.cross_entropy.triton_projection_kernels import class_of, place, raw_logits

# Logits, and the gradient with respect to them


@triton.jit
def store_tile(out, stride, tile, other, x, column, end, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr):
    """x in `out`, which has room for whole tiles; 0 in columns from `end` on, anything in rows of nobody."""
    x = tl.where((column < end)[None, :], x, 0.0)
    out += tl.cast(tile, tl.int64) * BLOCK * stride + other * BLOCK_V
    local = tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_V)[None, :]
    tl.store(out + local, x.to(out.dtype.element_ty))


@triton.jit
def logits_kernel(
    h,
    h_stride,
    W,
    W_stride,
    bias,  # (V,)
    index,  # (n,) int64
    count_pointer,  # () int64
    logits,  # (n, V), both rounded up to whole tiles; columns from V on become 0
    logits_stride,
    V,
    D,
    HAS_BIAS: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Raw logits. Grid: the product of the numbers of tiles of rows and of columns."""
    count = tl.load(count_pointer).to(tl.int32)
    tile, other, is_live = place(count, tl.cdiv(V, BLOCK_V), BLOCK, GROUP)
    if not is_live:
        return
    rows, column = tile * BLOCK + tl.arange(0, BLOCK), other * BLOCK_V + tl.arange(0, BLOCK_V)
    places = tl.load(index + rows, mask=rows < count, other=0)
    z = raw_logits(
        h, places * h_stride, W, W_stride, other * BLOCK_V, V, D, bias, HAS_BIAS, IS_EVEN, PRECISION, BLOCK, BLOCK_V,
        BLOCK_D,
    )  # fmt: skip
    store_tile(logits, logits_stride, tile, other, z, column, V, BLOCK, BLOCK_V)


@triton.jit
def dlogits_kernel(
    h,
    h_stride,
    W,
    W_stride,
    bias,  # (V,)
    index,  # (n,) int64
    count_pointer,  # () int64
    target_pointer,  # (N,) int64
    a_pointer,  # (N,) fp32, as the factors that follow
    b_pointer,
    c_pointer,
    dentropy_pointer,
    weight,  # (V,) fp32
    lse_pointer,  # (N,)
    entropy_pointer,  # (N,)
    dlogits,  # (n, width), both rounded up to whole tiles; columns from `width` on become 0
    dlogits_stride,
    first,  # column of the vocabulary in column 0
    end,  # and the one after the last
    V,
    D,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_C: tl.constexpr,
    HAS_DENTROPY: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradient with respect to raw logits. Grid: the product of the numbers of tiles of rows and of columns."""
    count = tl.load(count_pointer).to(tl.int32)
    tile, other, is_live = place(count, tl.cdiv(end - first, BLOCK_V), BLOCK, GROUP)
    if not is_live:
        return
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(index + rows, mask=rows < count, other=0)
    at = first + other * BLOCK_V
    z = raw_logits(
        h, places * h_stride, W, W_stride, at, end, D, bias, HAS_BIAS, IS_EVEN, PRECISION, BLOCK, BLOCK_V, BLOCK_D
    )
    x = logit(z, logit_scale, softcap, HAS_SOFTCAP)
    column = at + tl.arange(0, BLOCK_V)
    target, lse = class_of(tl.load(target_pointer + places), V), tl.load(lse_pointer + places)
    a, b = tl.load(a_pointer + places), tl.load(b_pointer + places)
    a = tl.where(lse == float("inf"), float("nan"), a)  # all of the row's gradient is NaN, not only that logit's
    below = x - lse[:, None]
    p = tl.exp(below)
    dx = a[:, None] * p + b[:, None] * tl.where(column[None, :] == target[:, None], p - 1.0, p)
    if HAS_C:
        if HAS_WEIGHT:
            w = tl.load(weight + column, mask=column < end, other=0.0)
            dx -= tl.load(c_pointer + places)[:, None] * w[None, :]
        else:
            dx -= tl.load(c_pointer + places)[:, None]
    if HAS_DENTROPY:
        # p log p is 0 where log p is -inf
        entropy = tl.load(entropy_pointer + places)
        dx -= tl.load(dentropy_pointer + places)[:, None] * p * (tl.maximum(below, -1e30) + entropy[:, None])
    if HAS_SOFTCAP:
        share = x / softcap
        dx *= 1.0 - share * share
    store_tile(dlogits, dlogits_stride, tile, other, dx * logit_scale, column, end, BLOCK, BLOCK_V)


# Products of that gradient


@triton.jit
def dinput_kernel(
    dlogits,  # (n, width)
    dlogits_stride,
    W,  # (width, D): the rows of the tile of the vocabulary
    W_stride,
    index,
    count_pointer,
    sums,  # (n, D) fp32, of the tiles of the vocabulary before this one and with it
    out,  # (N, D), where IS_LAST
    width,
    D,
    HAS_SUM: tl.constexpr,
    IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits @ W. Grid: the product of the numbers of tiles of rows and of D."""
    count = tl.load(count_pointer).to(tl.int32)
    tile, other, is_live = place(count, tl.cdiv(D, BLOCK_D), BLOCK, GROUP)
    if not is_live:
        return
    lane, depth = tl.arange(0, BLOCK), other * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_V)
    left = dlogits + tile.to(tl.int64) * BLOCK * dlogits_stride
    left += lane.to(tl.int64)[:, None] * dlogits_stride + k[None, :]
    right = W + k[:, None] * W_stride + depth[None, :]
    across = (depth < D)[None, :]
    dh = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    for at in range(0, width, BLOCK_V):
        dx = tl.load(left + at)
        # dlogits are 0 from `width` on, but what is not in the tile of W may be infinite.
        w = tl.load(right + tl.cast(at, tl.int64) * W_stride, mask=(k < width - at)[:, None] & across, other=0.0)
        dh = tl.dot(dx, w, dh, input_precision=PRECISION)

    rows = tile * BLOCK + lane
    inside = (rows < count)[:, None] & across
    offsets = rows.to(tl.int64)[:, None] * D + depth[None, :]
    if HAS_SUM:
        dh += tl.load(sums + offsets, mask=inside, other=0.0)
    if IS_LAST:
        places = tl.load(index + rows, mask=rows < count, other=0)
        tl.store(out + places[:, None] * D + depth[None, :], dh.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + offsets, dh, mask=inside)


@triton.jit
def dweight_kernel(
    dlogits,  # (n, width)
    dlogits_stride,
    h,
    h_stride,
    index,
    count_pointer,
    sums,  # (width, D) fp32, of the chunks of rows before this one and with it; may be `out`
    out,  # (width, D), where IS_LAST
    width,
    D,
    HAS_SUM: tl.constexpr,
    IS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dlogits^T @ h, over the rows there are. Grid: the product of the numbers of tiles of columns and of D."""
    count = tl.load(count_pointer).to(tl.int32)
    if HAS_SUM and not IS_LAST and count == 0:
        return
    tile, other, _ = place(width, tl.cdiv(D, BLOCK_D), BLOCK_V, GROUP)
    columns, depth = tile * BLOCK_V + tl.arange(0, BLOCK_V), other * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK)
    left = dlogits + k[:, None].to(tl.int64) * dlogits_stride + columns[None, :]
    across = (depth < D)[None, :]
    dw = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for at in range(0, count, BLOCK):
        # What is in a row of nobody may be NaN.
        inside = k < count - at
        places = tl.load(index + at + k, mask=inside, other=0)
        dx = tl.load(left + tl.cast(at, tl.int64) * dlogits_stride, mask=inside[:, None], other=0.0)
        x = tl.load(h + places[:, None] * h_stride + depth[None, :], mask=inside[:, None] & across, other=0.0)
        dw = tl.dot(tl.trans(dx), x, dw, input_precision=PRECISION)

    inside = (columns < width)[:, None] & across
    offsets = columns.to(tl.int64)[:, None] * D + depth[None, :]
    if HAS_SUM:
        dw += tl.load(sums + offsets, mask=inside, other=0.0)
    if IS_LAST:
        tl.store(out + offsets, dw.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(sums + offsets, dw, mask=inside)


@triton.jit
def dbias_kernel(
    dlogits,  # (n, width)
    dlogits_stride,
    count_pointer,
    out,  # (width,) fp32
    width,
    HAS_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Sums of the columns of dlogits, added to what is in `out` where HAS_SUM. Grid: tiles of columns."""
    count = tl.load(count_pointer).to(tl.int32)
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.arange(0, BLOCK)
    pointers = dlogits + k[:, None].to(tl.int64) * dlogits_stride + columns[None, :]
    sums = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for at in range(0, count, BLOCK):
        dx = tl.load(pointers + tl.cast(at, tl.int64) * dlogits_stride, mask=(k < count - at)[:, None], other=0.0)
        sums += dx.to(tl.float32)
    db = tl.sum(sums, 0)
    if HAS_SUM:
        db += tl.load(out + columns, mask=columns < width, other=0.0)
    tl.store(out + columns, db, mask=columns < width)
