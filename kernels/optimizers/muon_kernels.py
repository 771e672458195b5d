"""Triton kernels of Muon: momentum, symmetric product, update. One launch each for all matrices of a shape.

N matrices of shape (R, C) are worked on as X (N, m, n) with m = min(R, C): where R > C, X holds their transposes.
Gradients, moments and parameters stay where they are; `*_table` (N,) int64 hold the addresses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hotloop.kernels.optimizers.triton_kernels import bits_of, of_stream
from hotloop.kernels.optimizers.triton_kernels import rounded as rounded_with

# Symmetric product


@triton.jit
def lower_tile(t):
    """(row, column <= row) of the t-th tile of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * t + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is off by an ulp: row (row + 1) / 2 <= t < (row + 1) (row + 2) / 2 decides.
    row = tl.where(row * (row + 1) // 2 > t, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= t, row + 1, row)
    return row, t - row * (row + 1) // 2


@triton.jit
def symmetric_product_kernel(
    X,  # (N, M, K) contiguous
    A,  # (N, M, M) contiguous, each symmetric; read where HAS_A
    OUT,  # (N, M, M) contiguous
    M,
    K,
    alpha,
    beta,
    HAS_A: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """OUT = alpha X X^T + beta A: the tiles on and below the diagonal, each stored as it is and mirrored.

    Grid (T (T + 1) / 2, N) with T = ceil(M / BLOCK); a full product would have T^2 tiles.
    """
    i, j = lower_tile(tl.program_id(0))
    n = tl.program_id(1).to(tl.int64)
    # Addresses: 64-bit for the tile, 32-bit within it, which halves the registers they take.
    first, second = (i * BLOCK).to(tl.int64), (j * BLOCK).to(tl.int64)
    left, right = X + (n * M + first) * K, X + (n * M + second) * K
    lane, depth = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    across, down = lane[:, None] * K + depth[None, :], lane[None, :] * K + depth[:, None]
    row_inside, column_inside = lane < M - i * BLOCK, lane < M - j * BLOCK
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = depth < K - k
        x = tl.load(left + k + across, mask=row_inside[:, None] & inside[None, :], other=0.0)
        y = tl.load(right + k + down, mask=column_inside[None, :] & inside[:, None], other=0.0)
        sums = tl.dot(x, y, sums, input_precision="ieee")
    sums *= alpha
    inside = row_inside[:, None] & column_inside[None, :]
    place = lane[:, None] * M + lane[None, :]
    if HAS_A:
        a = tl.load(A + (n * M + first) * M + second + place, mask=inside, other=0.0)
        sums += beta * a.to(tl.float32)
    tile = sums.to(OUT.dtype.element_ty)
    tl.store(OUT + (n * M + first) * M + second + place, tile, mask=inside)
    if i != j:
        mirrored = column_inside[:, None] & row_inside[None, :]
        tl.store(OUT + (n * M + second) * M + first + place, tl.trans(tile), mask=mirrored)


# Element-wise


@triton.jit
def rounded(x, index, seed, step, stream: tl.constexpr, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """x (fp32) in `dtype`: to nearest, or to bf16 with the random bits that `philox.py` specifies."""
    if STOCHASTIC and dtype == tl.bfloat16:
        return rounded_with(x, dtype, of_stream(bits_of(index, seed, step), stream), True)
    else:
        return x.to(dtype)


@triton.jit
def momentum_kernel(
    grad_table,
    buffer_table,
    start_table,  # (N,) int64: logical index of the first element
    X,  # (N, R, C), or (N, C, R) where TRANSPOSED
    factor_pointer,  # () fp32
    skip_pointer,  # () fp32
    step_pointer,  # () fp32
    seed,
    R,
    C,
    momentum,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    BUFFER_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m += (1 - momentum) (g - m); X = g + momentum (m - g) or m. Nothing where skip. Grid (tiles of R, of C, N)."""
    if tl.load(skip_pointer) != 0:
        return
    n = tl.program_id(2).to(tl.int64)
    grads = tl.load(grad_table + n).to(tl.pointer_type(GRAD_DTYPE))
    buffers = tl.load(buffer_table + n).to(tl.pointer_type(BUFFER_DTYPE))
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    place = rows[:, None] * C + columns[None, :]

    factor = tl.load(factor_pointer)
    g = tl.load(grads + place, mask=inside, other=0.0).to(tl.float32) * (-factor if MAXIMIZE else factor)
    m = tl.load(buffers + place, mask=inside, other=0.0).to(tl.float32)
    m += (1.0 - momentum) * (g - m)
    u = g + momentum * (m - g) if NESTEROV else m

    stored = rounded(m, tl.load(start_table + n) + place, seed, tl.load(step_pointer), 1, BUFFER_DTYPE, STOCHASTIC)
    tl.store(buffers + place, stored, mask=inside)
    x = u.to(X.dtype.element_ty)
    if TRANSPOSED:
        mirrored = columns.to(tl.int64)[:, None] * R + rows[None, :]
        tl.store(X + n * R * C + mirrored, tl.trans(x), mask=tl.trans(inside))
    else:
        tl.store(X + n * R * C + place, x, mask=inside)


@triton.jit
def update_kernel(
    target_table,  # what is updated: parameters, or their masters
    param_table,  # the copy to write where HAS_MASTER
    start_table,
    X,
    rates,  # (2,) fp32: decay, lr * scale
    skip_pointer,
    step_pointer,
    seed,
    R,
    C,
    HAS_MASTER: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TARGET_DTYPE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """p = decay p - lr scale X. Nothing where skip. Grid (tiles of R, of C, N)."""
    if tl.load(skip_pointer) != 0:
        return
    n = tl.program_id(2).to(tl.int64)
    targets = tl.load(target_table + n).to(tl.pointer_type(TARGET_DTYPE))
    rows = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (rows < R)[:, None] & (columns < C)[None, :]
    place = rows[:, None] * C + columns[None, :]
    if TRANSPOSED:
        mirrored = columns.to(tl.int64)[:, None] * R + rows[None, :]
        x = tl.trans(tl.load(X + n * R * C + mirrored, mask=tl.trans(inside), other=0.0))
    else:
        x = tl.load(X + n * R * C + place, mask=inside, other=0.0)

    p = tl.load(targets + place, mask=inside, other=0.0).to(tl.float32)
    p = p * tl.load(rates) - x.to(tl.float32) * tl.load(rates + 1)
    stored = rounded(p, tl.load(start_table + n) + place, seed, tl.load(step_pointer), 0, TARGET_DTYPE, STOCHASTIC)
    tl.store(targets + place, stored, mask=inside)
    if HAS_MASTER:
        params = tl.load(param_table + n).to(tl.pointer_type(PARAM_DTYPE))
        tl.store(params + place, p.to(PARAM_DTYPE), mask=inside)
