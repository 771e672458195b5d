"""Triton kernels of a linear cross entropy: the results of rows, without their logits. The formula and its letters:
contract.py.

Legend: n rows are projected of N, in the order of `index` (n,) int64, a row of the input in each; those from `count` ()
int64, which only the device knows, are nobody's. Programs of tiles of rows at or beyond it leave before they read
anything else. W (V, D) is the projection weight, h (N, D) the input; rows of both lie at any distance, their elements
next to each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.cross_entropy.triton_kernels import logit


@triton.jit
def place(count, others, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """(tile of rows, other tile, whether there is such a tile) of this program, among those that hold rows at all.

    A group of tiles of rows passes all other tiles before the next: what both read stays in the cache.
    """
    tiles = tl.cdiv(count, BLOCK)
    program = tl.program_id(0)
    first = program // (GROUP * others) * GROUP
    size = tl.maximum(tl.minimum(tiles - first, GROUP), 1)
    within = program % (GROUP * others)
    return first + within % size, within // size, program < tiles * others


@triton.jit
def raw_logits(
    h, row, W, W_stride, at, end, D, bias,
    HAS_BIAS: tl.constexpr, IS_EVEN: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits (BLOCK, BLOCK_V) in fp32 of the rows whose first elements are h[row], at columns at .. at + BLOCK_V - 1;
    from column `end` on those of the last one before it."""
    local = tl.minimum(tl.arange(0, BLOCK_V), end - 1 - at)
    depth = tl.arange(0, BLOCK_D)
    # Addresses: 64-bit for the tile, 32-bit within it, which halves the registers they take.
    left = h + row[:, None] + depth[None, :]
    right = W + tl.cast(at, tl.int64) * W_stride + local[None, :] * W_stride + depth[:, None]
    sums = tl.zeros((BLOCK, BLOCK_V), tl.float32)
    for k in range(0, D, BLOCK_D):
        if IS_EVEN:
            x, w = tl.load(left + k), tl.load(right + k)
        else:
            inside = depth < D - k
            x = tl.load(left + k, mask=inside[None, :], other=0.0)
            w = tl.load(right + k, mask=inside[:, None], other=0.0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    if HAS_BIAS:
        sums += tl.load(bias + at + local).to(tl.float32)[None, :]
    return sums


# Results of rows


@triton.jit
def finite(x):
    return tl.where((x == float("inf")) | (x == float("-inf")), 0.0, x)


@triton.jit
def rise(m, new):
    """What exp(x - m) is multiplied with, in logarithm, where the maximum rises from m to `new`. Where one of them is
    infinite 0 takes its place, so that a sum is infinite where a logit is, and NaN only where a logit is NaN."""
    return tl.where(m == float("-inf"), 0.0, finite(m) - finite(new))


@triton.jit
def first_of(first, here, m, highest):
    """Column of the largest logit; 2147483647: none yet. Where there is a NaN the column of the first, with the sign
    bit set."""
    rises = (highest > m) | ((highest == m) & (first == 2147483647))
    return tl.where((first >= 0) & ((here < 0) | rises), here, first)


@triton.jit
def class_of(target, V):
    """A target as int32; -1 where it is no class."""
    return tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def results_kernel(
    h,
    h_stride,
    W,
    W_stride,
    bias,  # (V,)
    index,  # (n,) int64
    count_pointer,  # () int64
    target_pointer,  # (N,) int64
    weight,  # (V,) fp32
    parts,  # (fields, splits, n) fp32: m, total, x of the target, then spread and weights, then product
    firsts,  # (splits, n) int32
    n,
    V,
    D,
    span,  # columns of a split
    splits,
    softcap,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    IS_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
):
    """What a tile of rows needs of a split of the vocabulary: maxima, and sums that follow them. Grid: the product of
    the numbers of tiles of rows and of splits."""
    count = tl.load(count_pointer).to(tl.int32)
    tile, split, is_live = place(count, splits, BLOCK, GROUP)
    if not is_live:
        return
    rows = tile * BLOCK + tl.arange(0, BLOCK)
    places = tl.load(index + rows, mask=rows < count, other=0)
    target = class_of(tl.load(target_pointer + places), V)
    begin = split * span
    end = tl.minimum(begin + span, V)

    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, x_target = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    spread, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    weights = 0.0
    first = tl.full((BLOCK,), 2147483647, tl.int32)
    for at in range(begin, end, BLOCK_V):
        z = raw_logits(
            h, places * h_stride, W, W_stride, at, end, D, bias, HAS_BIAS, IS_EVEN, PRECISION, BLOCK, BLOCK_V, BLOCK_D
        )
        column = at + tl.arange(0, BLOCK_V)
        inside = (column < end)[None, :]
        x = tl.where(inside, logit(z, logit_scale, softcap, HAS_SOFTCAP), float("-inf"))
        x_target += tl.sum(tl.where(column[None, :] == target[:, None], x, 0.0), 1)

        is_nan = x != x
        highest = tl.max(tl.where(is_nan, float("-inf"), x), 1)
        if HAS_STATS:
            # Where all logits are -inf, so is what lies outside; but its columns are higher.
            here = tl.where(x == highest[:, None], column[None, :], 2147483647)
            here = tl.min(tl.where(is_nan, column[None, :] | -2147483648, here), 1)
            first = first_of(first, here, m, highest)
        new = tl.maximum(m, highest)
        drop = rise(m, new)
        shrink = tl.exp(drop)
        d = x - finite(new)[:, None]
        e = tl.exp(d)
        if HAS_STATS:
            # exp(d) * d is 0 where d is -inf
            product = shrink * (product + drop * total) + tl.sum(e * tl.maximum(d, -104.0), 1)
        if HAS_SPREAD:
            if HAS_WEIGHT:
                w = tl.load(weight + column, mask=column < end, other=0.0)
            else:
                w = tl.where(column < end, 1.0, 0.0)
            spread -= tl.where(weights > 0, weights * drop, 0.0)
            spread += tl.sum(tl.where(inside, -d * w[None, :], 0.0), 1)
            weights += tl.sum(w, 0)
        total = shrink * total + tl.sum(e, 1)
        m = new

    inside = rows < count
    out = parts + tl.cast(split, tl.int64) * n + rows
    field = tl.cast(splits, tl.int64) * n
    tl.store(out, m, mask=inside)
    tl.store(out + field, total, mask=inside)
    tl.store(out + 2 * field, x_target, mask=inside)
    if HAS_SPREAD:
        tl.store(out + 3 * field, spread, mask=inside)
        tl.store(out + 4 * field, tl.zeros((BLOCK,), tl.float32) + weights, mask=inside)
    if HAS_STATS:
        tl.store(out + (5 if HAS_SPREAD else 3) * field, product, mask=inside)
        tl.store(firsts + tl.cast(split, tl.int64) * n + rows, first, mask=inside)


@triton.jit
def merge_kernel(
    parts,
    firsts,
    index,
    count_pointer,
    target_pointer,
    weight,
    token_weight,  # (N,) fp32
    weight_sum,  # () fp32, of class weights
    loss,  # (N,) fp32, as the three that follow
    nll,
    lse,
    entropy,
    predicted,  # (N,) int64
    n,
    V,
    splits,
    label_smoothing,
    z_loss,
    HAS_WEIGHT: tl.constexpr,
    HAS_TOKEN_WEIGHT: tl.constexpr,
    HAS_SPREAD: tl.constexpr,
    HAS_STATS: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The results of rows from those of splits, in the order of the vocabulary. Grid: blocks of rows."""
    count = tl.load(count_pointer).to(tl.int32)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) * BLOCK >= count:
        return
    inside = rows < count
    field = tl.cast(splits, tl.int64) * n
    m = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, x_target = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    spread, product = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    weights = tl.zeros((BLOCK,), tl.float32)
    first = tl.full((BLOCK,), 2147483647, tl.int32)
    for split in range(splits):
        part = parts + tl.cast(split, tl.int64) * n + rows
        highest = tl.load(part, mask=inside, other=0.0)
        others = tl.load(part + field, mask=inside, other=1.0)
        x_target += tl.load(part + 2 * field, mask=inside, other=0.0)
        if HAS_STATS:
            here = tl.load(firsts + tl.cast(split, tl.int64) * n + rows, mask=inside, other=0)
            first = first_of(first, here, m, highest)
        new = tl.maximum(m, highest)
        drop, their = rise(m, new), rise(highest, new)
        if HAS_STATS:
            their_product = tl.load(part + (5 if HAS_SPREAD else 3) * field, mask=inside, other=0.0)
            product = tl.exp(drop) * (product + drop * total) + tl.exp(their) * (their_product + their * others)
        if HAS_SPREAD:
            their_weights = tl.load(part + 4 * field, mask=inside, other=0.0)
            spread += tl.load(part + 3 * field, mask=inside, other=0.0)
            spread -= tl.where(weights > 0, weights * drop, 0.0) + tl.where(
                their_weights > 0, their_weights * their, 0.0
            )
            weights += their_weights
        total = tl.exp(drop) * total + tl.exp(their) * others
        m = new

    places = tl.load(index + rows, mask=inside, other=0)
    target = tl.load(target_pointer + places)
    # A target that is no class makes the row NaN.
    is_class = (target >= 0) & (target < V)
    x_target = tl.where(is_class, x_target, float("nan"))
    # A row with an infinite maximum has no sum, and the infinity as the logarithm of it.
    infinite = (m == float("inf")) | (m == float("-inf"))
    row_lse = tl.where(infinite, tl.where(total != total, float("nan"), m), m + tl.log(total))
    total = tl.where(infinite, float("nan"), total)
    log_total = tl.log(total)
    # Not lse - x[target], which would cancel where |x| is large.
    row_nll = (m - x_target) + log_total
    w = tl.load(weight + target, mask=is_class, other=0.0) if HAS_WEIGHT else 1.0
    share = tl.load(token_weight + places) if HAS_TOKEN_WEIGHT else 1.0
    value = row_nll * (1.0 - label_smoothing) * w
    if HAS_SPREAD:
        all_weights = tl.load(weight_sum) if HAS_WEIGHT else V * 1.0
        value += (spread + all_weights * log_total) * (label_smoothing / V)
    if HAS_Z_LOSS:
        value += z_loss * row_lse * row_lse
    tl.store(loss + places, value * share, mask=inside)
    tl.store(nll + places, row_nll, mask=inside)
    tl.store(lse + places, row_lse, mask=inside)
    if HAS_STATS:
        tl.store(entropy + places, log_total - product / total, mask=inside)
        tl.store(predicted + places, (first & 2147483647).to(tl.int64), mask=inside)
