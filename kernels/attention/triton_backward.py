"""Triton kernels of attention, backward: what depends on a row of o alone, then dk and dv by key tiles, dq by query
tiles. Each result belongs to one program, so that sums have one order and nothing is added by atomics.

The formula is in reference.py, rows and tiles in triton_tiles.py. `delta` is rowsum(do * o) - dlse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.attention.triton_tiles import (
    LOG2_E,
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


@triton.jit(do_not_specialize=["T", "Hq", "tiles"])
def delta_kernel(
    o,  # (B, T, Hq, D) contiguous
    do,  # like o, of any strides; D contiguous
    lse,  # (B, Hq, T)
    dlse,  # like lse
    sinks,  # (Hq,)
    delta,  # like lse
    dsinks,  # (B * tiles, Hq) fp32: sums over a tile's rows
    do_strides,  # of batch, position, head
    T,
    Hq,
    tiles,  # of a batch
    D: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    HAS_DSINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B * tiles, Hq). A row that sees no key has no gradient, whatever is upstream of it."""
    b, h = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64)
    i = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    inside = i < T
    place = (b * Hq + h) * T + i
    x_lse = tl.load(lse + place, mask=inside, other=float("-inf"))
    sees_any = x_lse != float("-inf")
    x_o = load_tile(o + h * D, (b * T + i) * Hq * D, sees_any, 0, D, BLOCK_D, True)
    x_do = load_tile(do + b * do_strides[0] + h * do_strides[2], i * do_strides[1], sees_any, 0, D, BLOCK_D, True)
    x_delta = tl.sum(x_o.to(tl.float32) * x_do.to(tl.float32), 1)
    if HAS_DLSE:
        x_delta -= tl.load(dlse + place, mask=sees_any, other=0.0)
    tl.store(delta + place, x_delta, mask=inside)
    if HAS_DSINKS:
        p = tl.exp2((tl.load(sinks + h) - x_lse) * LOG2_E)
        terms = tl.where(sees_any, p * x_delta, 0.0)
        tl.store(dsinks + tl.program_id(0) * Hq + h, -tl.sum(terms, 0))


@triton.jit(do_not_specialize=SIZES)
def dkdv_kernel(
    q,  # (B, Tq, Hq, D), or (Tq, Hq, D) where PACKED; D contiguous
    k,  # (B, Tk, Hk, D), or (Tk, Hk, D)
    v,  # like k
    do,  # like q
    lse,  # (B, Hq, Tq), or (Hq, Tq)
    delta,  # like lse
    dk,  # like k, contiguous
    dv,
    alibi_slopes,  # (Hq,), or (B, Hq) with alibi_stride Hq
    seed,  # () int64
    cu_seqlens_q,  # (segments + 1,) int32
    cu_seqlens_k,
    q_strides,  # of batch, position, head
    k_strides,
    v_strides,
    do_strides,
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
    scale,
    magnitude,  # of scale, and positive
    softcap,
    threshold,
    kept_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of dk and dv that a program has
    DEPTH: tl.constexpr,  # columns of all others at a time; at least D: all, and BLOCK_D too
):
    """Scores are transposed, (BLOCK_N, BLOCK_M), so that p and ds are left operands as they come."""
    tile, head, part = program_tile(tiles, heads, section, (D + BLOCK_D - 1) // BLOCK_D, False)
    batch, at, hk, first, start_k, length_k, start_q, length_q = tile_rows(
        tile, head, cu_seqlens_k, cu_seqlens_q, segments, Tk, Tq, Hk, 1, BLOCK_N, PACKED
    )
    if first >= length_k:
        return
    at, hk = at.to(tl.int64), hk.to(tl.int64)
    Hq = Hk * GROUP
    j = first + tl.arange(0, BLOCK_N)
    inside, shift = j < length_k, length_k - length_q
    place = (start_k + j).to(tl.int64)
    k += at * k_strides[0] + hk * k_strides[2]
    v += at * v_strides[0] + hk * v_strides[2]
    k_rows, v_rows = place * k_strides[1], place * v_strides[1]
    if DEPTH >= D:
        x_k = load_tile(k, k_rows, inside, 0, D, DEPTH, True)
        x_v = load_tile(v, v_rows, inside, 0, D, DEPTH, True)
    q += at * q_strides[0] + start_q.to(tl.int64) * q_strides[1] + hk * GROUP * q_strides[2]
    do += at * do_strides[0] + start_q.to(tl.int64) * do_strides[1] + hk * GROUP * do_strides[2]
    lse += (at * Hq + hk * GROUP) * Tq + start_q
    if HAS_DK:
        delta += (at * Hq + hk * GROUP) * Tq + start_q
    word = 0
    if HAS_DROPOUT:
        word = tl.load(seed)

    unit = score_unit(magnitude, HAS_SOFTCAP, HAS_ALIBI, NATURAL)
    x_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    x_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = tl.minimum(first + BLOCK_N, length_k) - 1
    # From the first row that sees a key: no gradient upstream of a row that sees none is ever read.
    begin, full_begin, full_end, end = seen_range(
        first, last, -shift, window_right, window_left, length_q, GROUP, BLOCK_M, 1, HAS_RIGHT, HAS_LEFT
    )
    for phase in tl.static_range(0 if HAS_RIGHT else 1, 3):
        lower = begin if phase == 0 else full_begin if phase == 1 else full_end
        upper = tl.minimum(full_begin, end) if phase == 0 else full_end if phase == 1 else end
        for m in range(lower, upper, BLOCK_M):
            row = m + tl.arange(0, BLOCK_M)
            i, g = row // GROUP, row % GROUP
            has_row = i < length_q
            i_far, g_far = i.to(tl.int64), g.to(tl.int64)
            q_rows = i_far * q_strides[1] + g_far * q_strides[2]
            do_rows = i_far * do_strides[1] + g_far * do_strides[2]
            x_q = load_tile(q, q_rows, has_row, part * BLOCK_D, D, BLOCK_D, phase != 1)
            if DEPTH >= D:
                x = tl.dot(x_k, tl.trans(x_q), input_precision=PRECISION)
            else:
                x = row_products(k, k_rows, inside, q, q_rows, has_row, D, DEPTH, PRECISION)
            slopes = 0.0
            if HAS_ALIBI:
                slopes = in_base(tl.load(alibi_slopes + batch * alibi_stride + hk * GROUP + g)[None, :], NATURAL)
            x, t = scores(
                x, i[None, :], j[:, None], shift, slopes, magnitude, softcap,
                IS_NEGATIVE, HAS_SOFTCAP, HAS_ALIBI, NATURAL,
            )  # fmt: skip
            x_lse = tl.load(lse + g_far * Tq + i, mask=has_row, other=float("inf"))
            x_lse = in_base(tl.where(x_lse == float("-inf"), float("inf"), x_lse), NATURAL)
            p = power(x * unit - x_lse[None, :], NATURAL)
            if phase != 1:
                visible = is_visible(
                    i[None, :], j[:, None], length_q, length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                )
                p = tl.where(visible, p, 0.0)
            x_do = load_tile(do, do_rows, has_row, part * BLOCK_D, D, BLOCK_D, phase != 1)
            p_kept = p
            if HAS_DROPOUT:
                h = (hk * GROUP + g).to(tl.int32)
                keep = tl.trans(is_kept(word, batch, h, i, first, threshold, BLOCK_N))
                p_kept = tl.where(keep, p * kept_scale, 0.0)
            if HAS_DV:
                x_dv = tl.dot(p_kept.to(x_do.dtype), x_do, x_dv, input_precision=PRECISION)
            if HAS_DK:
                if DEPTH >= D:
                    dp = tl.dot(x_v, tl.trans(x_do), input_precision=PRECISION)
                else:
                    dp = row_products(v, v_rows, inside, do, do_rows, has_row, D, DEPTH, PRECISION)
                if HAS_DROPOUT:
                    dp = tl.where(keep, dp * kept_scale, 0.0)
                ds = p * (dp - tl.load(delta + g_far * Tq + i, mask=has_row, other=0.0)[None, :])
                if HAS_SOFTCAP:
                    ds *= 1.0 - t * t
                x_dk = tl.dot(ds.to(x_q.dtype), x_q, x_dk, input_precision=PRECISION)

    rows = ((at * Tk + place) * Hk + hk) * D
    if HAS_DV:
        store_tile(dv, rows, inside, x_dv, part * BLOCK_D, D, BLOCK_D)
    if HAS_DK:
        store_tile(dk, rows, inside, x_dk * scale, part * BLOCK_D, D, BLOCK_D)


@triton.jit(do_not_specialize=SIZES)
def dq_kernel(
    q,  # (B, Tq, Hq, D), or (Tq, Hq, D) where PACKED; D contiguous
    k,  # (B, Tk, Hk, D), or (Tk, Hk, D)
    v,  # like k
    do,  # like q
    lse,  # (B, Hq, Tq), or (Hq, Tq)
    delta,  # like lse
    dq,  # like q, contiguous
    dalibi,  # like lse: sums over a row
    alibi_slopes,  # (Hq,), or (B, Hq) with alibi_stride Hq
    seed,  # () int64
    cu_seqlens_q,  # (segments + 1,) int32
    cu_seqlens_k,
    q_strides,  # of batch, position, head
    k_strides,
    v_strides,
    do_strides,
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
    scale,
    magnitude,  # of scale, and positive
    softcap,
    threshold,
    kept_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    IS_NEGATIVE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DALIBI: tl.constexpr,
    NATURAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,  # columns of dq that a program has
    DEPTH: tl.constexpr,  # columns of all others at a time; at least D: all, and BLOCK_D too
):
    tile, head, part = program_tile(tiles, heads, section, (D + BLOCK_D - 1) // BLOCK_D, HAS_RIGHT)
    batch, at, hk, first, start_q, length_q, start_k, length_k = tile_rows(
        tile, head, cu_seqlens_q, cu_seqlens_k, segments, Tq, Tk, Hk, GROUP, BLOCK_M, PACKED
    )
    if first >= length_q * GROUP:
        return
    at, hk = at.to(tl.int64), hk.to(tl.int64)
    Hq = Hk * GROUP
    row, column = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    i, g = row // GROUP, row % GROUP
    h = hk * GROUP + g
    inside, shift = i < length_q, length_k - length_q
    place = (start_q + i).to(tl.int64)
    number = (at * Hq + h) * Tq + place
    x_lse = tl.load(lse + number, mask=inside, other=float("-inf"))
    sees_any = x_lse != float("-inf")
    x_lse = in_base(tl.where(sees_any, x_lse, float("inf")), NATURAL)
    x_delta = tl.load(delta + number, mask=inside, other=0.0)
    q += at * q_strides[0]
    do += at * do_strides[0]
    q_rows, do_rows = place * q_strides[1] + h * q_strides[2], place * do_strides[1] + h * do_strides[2]
    if DEPTH >= D:
        x_q = load_tile(q, q_rows, inside, 0, D, DEPTH, True)
        x_do = load_tile(do, do_rows, sees_any, 0, D, DEPTH, True)
    k += at * k_strides[0] + start_k.to(tl.int64) * k_strides[1] + hk * k_strides[2]
    v += at * v_strides[0] + start_k.to(tl.int64) * v_strides[1] + hk * v_strides[2]
    slopes, word = 0.0, 0
    if HAS_ALIBI:
        slopes = in_base(tl.load(alibi_slopes + batch * alibi_stride + h, mask=sees_any, other=0.0)[:, None], NATURAL)
    if HAS_DROPOUT:
        word = tl.load(seed)

    unit = score_unit(magnitude, HAS_SOFTCAP, HAS_ALIBI, NATURAL)
    x_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    x_dalibi = tl.zeros((BLOCK_M,), tl.float32)
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
            v_tile, v_rows = v + tl.cast(n, tl.int64) * v_strides[1], column * v_strides[1]
            x_k = load_tile(k_tile, k_rows, has_key, part * BLOCK_D, D, BLOCK_D, phase != 1)
            if DEPTH >= D:
                x = tl.dot(x_q, tl.trans(x_k), input_precision=PRECISION)
            else:
                x = row_products(q, q_rows, inside, k_tile, k_rows, has_key, D, DEPTH, PRECISION)
            x, t = scores(
                x, i[:, None], j[None, :], shift, slopes, magnitude, softcap,
                IS_NEGATIVE, HAS_SOFTCAP, HAS_ALIBI, NATURAL,
            )  # fmt: skip
            p = power(x * unit - x_lse[:, None], NATURAL)
            if phase != 1:
                visible = is_visible(
                    i[:, None], j[None, :], length_q, length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                )
                p = tl.where(visible, p, 0.0)
            if DEPTH >= D:
                x_v = load_tile(v_tile, v_rows, has_key, 0, D, DEPTH, phase != 1)
                dp = tl.dot(x_do, tl.trans(x_v), input_precision=PRECISION)
            else:
                dp = row_products(do, do_rows, sees_any, v_tile, v_rows, has_key, D, DEPTH, PRECISION)
            if HAS_DROPOUT:
                keep = is_kept(word, batch, h.to(tl.int32), i, n, threshold, BLOCK_N)
                dp = tl.where(keep, dp * kept_scale, 0.0)
            ds = p * (dp - x_delta[:, None])
            if HAS_DALIBI:
                x_dalibi -= tl.sum(ds * tl.abs(i[:, None] + shift - j[None, :]).to(tl.float32), 1)
            if HAS_DQ:
                if HAS_SOFTCAP:
                    ds *= 1.0 - t * t
                x_dq = tl.dot(ds.to(x_k.dtype), x_k, x_dq, input_precision=PRECISION)

    if HAS_DQ:
        rows = ((at * Tq + place) * Hq + h) * D
        store_tile(dq, rows, inside, x_dq * scale, part * BLOCK_D, D, BLOCK_D)
    if HAS_DALIBI:
        tl.store(dalibi + number, x_dalibi, mask=i < tl.where(part == 0, length_q, 0))


@triton.jit(do_not_specialize=["T"])
def segment_sums_kernel(
    x,  # (Hq, T) fp32
    cu_seqlens,  # (segments + 1,) int32
    sums,  # (segments, Hq) fp32
    T,
    BLOCK: tl.constexpr,
):
    """Grid (segments, Hq)."""
    segment, h = tl.program_id(0), tl.program_id(1)
    begin, end = tl.load(cu_seqlens + segment), tl.load(cu_seqlens + segment + 1)
    row = x + h.to(tl.int64) * T
    parts = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, BLOCK):
        i = first + tl.arange(0, BLOCK)
        parts += tl.load(row + i, mask=i < end, other=0.0)
    tl.store(sums + segment.to(tl.int64) * tl.num_programs(1) + h, tl.sum(parts, 0))
