"""Triton kernel of attention, forward: one program for each tile of query rows, online softmax in base 2.

The formula is in reference.py, rows and tiles in triton_tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.attention.triton_tiles import (
    LN_2,
    SIZES,
    in_base,
    is_kept,
    is_visible,
    load_tile,
    power,
    program_tile,
    row_products,
    score_unit,
    scores,
    seen_range,
    store_tile,
    tile_rows,
)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q,  # (B, Tq, Hq, D), or (Tq, Hq, D) where PACKED; D contiguous
    k,  # (B, Tk, Hk, D), or (Tk, Hk, D)
    v,  # like k
    o,  # like q, contiguous
    lse,  # (B, Hq, Tq), or (Hq, Tq) where PACKED; fp32, contiguous
    alibi_slopes,  # (Hq,), or (B, Hq) with alibi_stride Hq; fp32
    sinks,  # (Hq,) fp32
    seed,  # () int64
    cu_seqlens_q,  # (segments + 1,) int32
    cu_seqlens_k,
    q_strides,  # of batch, position, head
    k_strides,
    v_strides,
    alibi_stride,
    Tq,
    Tk,
    Hk,
    segments,
    tiles,
    heads,
    section,
    window_left,
    window_right,
    magnitude,  # of the scale, and positive
    softcap,
    threshold,  # of dropped words
    kept_scale,  # 1 / (1 - dropout_p)
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of o that a program has
    DEPTH: tl.constexpr,  # columns of q and k at a time; at least D: all, and BLOCK_D too
):
    tile, head, part = program_tile(tiles, heads, section, (D + BLOCK_D - 1) // BLOCK_D, HAS_RIGHT)
    batch, at, hk, first, start_q, length_q, start_k, length_k = tile_rows(
        tile, head, cu_seqlens_q, cu_seqlens_k, segments, Tq, Tk, Hk, GROUP, BLOCK_M, PACKED
    )
    if first >= length_q * GROUP:
        return
    row, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i, h = row // GROUP, hk * GROUP + row % GROUP
    inside, shift = i < length_q, length_k - length_q
    at, place = at.to(tl.int64), (start_q + i).to(tl.int64)
    q += at * q_strides[0]
    q_rows = place * q_strides[1] + h.to(tl.int64) * q_strides[2]
    k += at * k_strides[0] + start_k.to(tl.int64) * k_strides[1] + hk.to(tl.int64) * k_strides[2]
    v += at * v_strides[0] + start_k.to(tl.int64) * v_strides[1] + hk.to(tl.int64) * v_strides[2]
    if DEPTH >= D:
        x_q = load_tile(q, q_rows, inside, 0, D, DEPTH, True)
    slopes, word = 0.0, 0
    if HAS_ALIBI:
        has_keys = i < tl.where(length_k > 0, length_q, 0)  # past the last boundary there is no batch either
        slopes = in_base(tl.load(alibi_slopes + batch * alibi_stride + h, mask=has_keys, other=0.0)[:, None], NATURAL)
    if HAS_DROPOUT:
        word = tl.load(seed)

    unit = score_unit(magnitude, HAS_SOFTCAP, HAS_ALIBI, NATURAL)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(first + BLOCK_M - 1, length_q * GROUP - 1) // GROUP
    begin, full_begin, full_end, end = seen_range(
        first // GROUP, last, shift, window_left, window_right, length_k, 1, BLOCK_N, 4, HAS_LEFT, HAS_RIGHT
    )
    for phase in tl.static_range(0 if HAS_LEFT else 1, 3):
        lower = begin if phase == 0 else full_begin if phase == 1 else full_end
        upper = tl.minimum(full_begin, end) if phase == 0 else full_end if phase == 1 else end
        for n in range(lower, upper, BLOCK_N):
            j = n + column
            has_key = j < length_k
            k_tile, k_rows = k + tl.cast(n, tl.int64) * k_strides[1], column * k_strides[1]
            if DEPTH >= D:
                x_k = load_tile(k_tile, k_rows, has_key, 0, D, DEPTH, phase != 1)
                x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
            else:
                x = row_products(q, q_rows, inside, k_tile, k_rows, has_key, D, DEPTH, PRECISION)
            x, _ = scores(
                x, i[:, None], j[None, :], shift, slopes, magnitude, softcap,
                IS_NEGATIVE, HAS_SOFTCAP, HAS_ALIBI, NATURAL,
            )  # fmt: skip
            if phase != 1:
                visible = is_visible(
                    i[:, None], j[None, :], length_q, length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                )
                x = tl.where(visible, x, float("-inf"))
            peak = tl.maximum(highest, tl.max(x, 1) * unit)
            base = tl.where(peak == float("-inf"), 0.0, peak)  # no difference of infinities while nothing is seen
            p = power(x * unit - base[:, None], NATURAL)
            shrink = power(highest - base, NATURAL)
            total = total * shrink + tl.sum(p, 1)
            if HAS_DROPOUT:
                p = tl.where(is_kept(word, batch, h, i, n, threshold, BLOCK_N), p, 0.0)
            v_tile, v_rows = v + tl.cast(n, tl.int64) * v_strides[1], column * v_strides[1]
            x_v = load_tile(v_tile, v_rows, has_key, part * BLOCK_D, D, BLOCK_D, phase != 1)
            sums = tl.dot(p.to(x_v.dtype), x_v, sums * shrink[:, None], input_precision=PRECISION)
            highest = peak

    sees_none = total == 0.0
    if HAS_SINKS:
        sink = in_base(tl.load(sinks + h), NATURAL)
        peak = tl.maximum(highest, sink)
        shrink = tl.where(sees_none, 1.0, power(highest - peak, NATURAL))
        total = tl.where(sees_none, 0.0, total * shrink + power(sink - peak, NATURAL))
        sums *= shrink[:, None]
        highest = peak
    inverse = kept_scale / tl.where(sees_none, 1.0, total)
    Hq = Hk * GROUP
    o_rows = ((at * Tq + place) * Hq + h) * D
    store_tile(o, o_rows, inside, sums * inverse[:, None], part * BLOCK_D, D, BLOCK_D)
    x_lse = tl.where(sees_none, float("-inf"), tl.log2(total) * LN_2 + (highest if NATURAL else highest * LN_2))
    tl.store(lse + (at * Hq + h) * Tq + place, x_lse, mask=i < tl.where(part == 0, length_q, 0))
