"""What the Triton kernels of attention share: which tile a program has, what the tile sees, scores, the dropout mask.

Rows of a query tile are (position, head of the group) pairs of one head of k: row r is position r // GROUP and head
r % GROUP, so that a tile of k and v serves all query heads that read it. Positions count from a segment's start; key j
and position i + length_k - length_q are the same place.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from hotloop.kernels.triton_math import tanh

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))

# Arguments whose values make no other machine code.
SIZES = [
    "alibi_stride", "Tq", "Tk", "Hk", "segments", "tiles", "heads", "section", "window_left", "window_right", "scale",
    "magnitude", "softcap", "threshold", "kept_scale",
]  # fmt: skip

# --- which tile ---


@triton.jit
def program_tile(tiles, heads, section, PARTS: tl.constexpr, LAST_FIRST: tl.constexpr):
    """(tile, head, part of head_dim) of this program, of `tiles` for each of `heads`.

    Programs start in their order: the longest tiles of a causal mask first, so that short ones fill the end, and for
    `section` heads at a time, whose k and v stay in the cache.
    """
    program, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    first = program // (section * tiles) * section
    width = tl.minimum(section, heads - first)
    rest = program - first * tiles
    tile = rest // width
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, first + rest % width, part


@triton.jit
def tile_rows(
    tile,
    head,
    cu_seqlens,  # (segments + 1,) int32, of the tile's side, where PACKED
    cu_seqlens_other,
    segments,
    T,  # positions of the tile's side: of each batch, or in all
    T_other,
    Hk,
    GROUP: tl.constexpr,  # rows of a position
    BLOCK: tl.constexpr,  # rows of a tile
    PACKED: tl.constexpr,
):
    """(batch, its place in memory, head of k, first row within the segment; start and length of the segment, and of
    its other side).

    Packed: segment s owns the tiles from cu_seqlens[s] * GROUP // BLOCK + s on, as many as it needs or one more, and so
    is found without a table. Segment `segments` is what lies past the last boundary: it has nothing on the other side.
    """
    if PACKED:
        low = tile * 0
        high = low + segments
        while low < high:
            middle = (low + high + 1) // 2
            begin = tl.load(cu_seqlens + middle).to(tl.int64) * GROUP // BLOCK + middle
            low = tl.where(begin <= tile, middle, low)
            high = tl.where(begin <= tile, high, middle - 1)
        inside = low < segments
        start = tl.load(cu_seqlens + low)
        length = tl.load(cu_seqlens + low + 1, mask=inside, other=T) - start
        start_other = tl.load(cu_seqlens_other + low)
        length_other = tl.load(cu_seqlens_other + low + 1, mask=inside, other=0) - tl.where(inside, start_other, 0)
        row = (tile - (start.to(tl.int64) * GROUP // BLOCK + low)) * BLOCK
        return low, tile * 0, head, row.to(tl.int32), start, length, start_other, length_other
    else:
        batch = head // Hk
        none = tile * 0
        return batch, batch, head % Hk, tile * BLOCK, none, none + T, none, none + T_other


# --- what a tile sees ---


@triton.jit
def seen_range(
    first,  # positions first .. last of the tile
    last,
    shift,  # between the two sides: x and x + shift are the same place
    before,  # positions seen before that place, and after it
    after,
    length,  # of the other side
    GROUP: tl.constexpr,  # rows of a position of the other side
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HAS_BEFORE: tl.constexpr,
    HAS_AFTER: tl.constexpr,
):
    """Rows of the other side that the tile sees, begin .. end - 1, to be walked in steps of BLOCK, and those of these
    steps that all its positions see: full_begin .. full_end - 1."""
    begin = first * 0
    full_begin = begin
    end = begin + length
    full_end = end
    if HAS_BEFORE:
        begin = tl.maximum(first + shift - before, 0) // ALIGNMENT * ALIGNMENT
        full_begin = tl.maximum(last + shift - before, begin)
    if HAS_AFTER:
        end = tl.minimum(last + shift + after + 1, length)
        full_end = tl.minimum(first + shift + after + 1, length)
    begin, end, full_begin, full_end = begin * GROUP, end * GROUP, full_begin * GROUP, full_end * GROUP
    full_begin = begin + tl.cdiv(full_begin - begin, BLOCK) * BLOCK
    full_end = tl.maximum(begin + tl.maximum(full_end - begin, 0) // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def is_visible(
    i, j, length_q, length_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):  # fmt: skip
    """i, j: of any shapes that broadcast."""
    visible = (i < length_q) & (j < length_k)
    place = i + (length_k - length_q)
    if HAS_LEFT:
        visible &= j >= place - window_left
    if HAS_RIGHT:
        visible &= j <= place + window_right
    return visible


# --- memory ---


@triton.jit
def load_tile(base, rows, inside, first, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """(rows, WIDTH): columns first .. first + WIDTH - 1 of the rows at these offsets, zeros past D and, where MASKED,
    in rows that are not `inside`."""
    d = first + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] + d[None, :]
    if D % WIDTH == 0:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers)
    else:
        if MASKED:
            return tl.load(pointers, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        else:
            return tl.load(pointers, mask=(d < D)[None, :], other=0.0)


@triton.jit
def store_tile(base, rows, inside, x, first, D: tl.constexpr, WIDTH: tl.constexpr):
    d = first + tl.arange(0, WIDTH)
    tl.store(
        base + rows[:, None] + d[None, :], x.to(base.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :]
    )  # fmt: skip


@triton.jit
def row_products(
    a,
    a_rows,
    a_inside,
    b,
    b_rows,
    b_inside,
    D: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(rows of a, rows of b): a @ b.T, DEPTH columns of each in memory at a time."""
    sums = tl.zeros((a_rows.shape[0], b_rows.shape[0]), tl.float32)
    for first in range(0, D, DEPTH):
        x = load_tile(a, a_rows, a_inside, first, D, DEPTH, True)
        y = load_tile(b, b_rows, b_inside, first, D, DEPTH, True)
        sums = tl.dot(x, tl.trans(y), sums, input_precision=PRECISION)
    return sums


# --- scores ---
#
# In base 2, with log2(e) in their factor, where tensors are 16-bit. NATURAL, for fp32: a large score is then subtracted
# from a large lse with the rounding error of one product, where a change of base adds two.


@triton.jit
def in_base(x, NATURAL: tl.constexpr):
    """A natural score in the base of scores."""
    return x if NATURAL else x * LOG2_E


@triton.jit
def power(x, NATURAL: tl.constexpr):
    return tl.exp2(x * LOG2_E if NATURAL else x)


@triton.jit
def scores(
    x,  # products of rows of q and k
    i,  # positions of q, and of k: of any shapes that broadcast to that of x
    j,
    shift,  # length_k - length_q
    slopes,  # like i, in the base of scores
    magnitude,  # of the scale, and positive
    softcap,
    IS_NEGATIVE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    NATURAL: tl.constexpr,
):
    """(scores, but for the factor `score_unit`; tanh of the softcap)."""
    if IS_NEGATIVE:
        x = -x
    t = x
    if HAS_SOFTCAP:
        t = tanh(x * (magnitude / softcap))
        x = t * in_base(softcap, NATURAL)
    if HAS_ALIBI:
        if not HAS_SOFTCAP:
            x = x * in_base(magnitude, NATURAL)
        x -= slopes * tl.abs(i + shift - j).to(tl.float32)
    return x, t


@triton.jit
def score_unit(magnitude, HAS_SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, NATURAL: tl.constexpr):
    """A plain score takes its factor in the multiply-add under the exponential."""
    if HAS_SOFTCAP or HAS_ALIBI:
        return 1.0
    else:
        return in_base(magnitude, NATURAL)


# --- dropout ---


@triton.jit
def is_kept(
    seed,
    batch,
    h,  # (rows,) head of q
    i,  # (rows,) position
    first,  # of the keys; a multiple of 4
    threshold,
    BLOCK_N: tl.constexpr,
):
    """(rows, BLOCK_N): `reference.dropout_keep`, four keys from each call of Philox."""
    quads = first // 4 + tl.arange(0, BLOCK_N // 4)[None, :]
    zeros = tl.zeros_like(i)[:, None] + tl.zeros_like(quads)
    w0, w1, w2, w3 = tl.philox(seed, zeros + quads, zeros + i[:, None], zeros + h[:, None], zeros + batch)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= threshold.to(tl.uint32)
