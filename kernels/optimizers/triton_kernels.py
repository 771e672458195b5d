"""Triton kernels of AdamW, Lion and SGD: one launch updates a list of tensors, one sums the squares of their gradients.

The arithmetic is that of reference.py, to the bit, which launches must leave alone: `enable_fp_fusion=False` (no
contraction), `enable_reflect_ftz=False` (denormals stay). Tables and chunks: see tables.py. Tiles are (BLOCKS, 256): a
row is a block, whose elements share the scale of 8-bit moments. A program whose blocks are full, contiguous and aligned
takes the FAST path, with accesses of 128 bits and one call of Philox for eight elements; the other path masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(256)
COLUMNS: tl.constexpr = tl.constexpr(10)


# Storage


@triton.jit
def read(address, offsets, mask, dtype: tl.constexpr, FAST: tl.constexpr):
    pointers = address.to(tl.pointer_type(dtype))
    if FAST:
        return tl.load(tl.multiple_of(pointers, 16) + offsets)
    else:
        return tl.load(pointers + offsets, mask=mask, other=0)


@triton.jit
def write(address, offsets, mask, x, FAST: tl.constexpr):
    pointers = address.to(tl.pointer_type(x.dtype))
    if FAST:
        tl.store(tl.multiple_of(pointers, 16) + offsets, x)
    else:
        tl.store(pointers + offsets, x, mask=mask)


@triton.jit
def words_of(call, seed, step):
    """Philox's four words for each call, see philox.py."""
    zero = tl.zeros_like(call).to(tl.uint32)
    return tl.philox(seed, call.to(tl.uint32), (call >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero)


@triton.jit
def random_bits(offsets, start, seed, step, BLOCKS: tl.constexpr, FAST: tl.constexpr):
    """16 random bits (uint32) for each element of the tile, by its logical index."""
    if FAST:
        first = (start + tl.min(tl.min(offsets, 1), 0)) // 8
        call = first + (tl.arange(0, BLOCKS) * 32)[:, None] + tl.arange(0, 32)[None, :]
        w0, w1, w2, w3 = words_of(call, seed, step)
        # An element's number in its call is 4 a + 2 b + c: word 2 a + b, half c. `join` adds the fastest dimension.
        low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
        high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
        return tl.reshape(tl.join(low, high), (BLOCKS, 256))
    else:
        return bits_of(start + offsets, seed, step)


@triton.jit
def bits_of(index, seed, step):
    """The 16 random bits (uint32) of logical indices, each from a call of its own."""
    w0, w1, w2, w3 = words_of(index // 8, seed, step)
    pair = (index % 8) // 2
    word = tl.where(pair == 0, w0, tl.where(pair == 1, w1, tl.where(pair == 2, w2, w3)))
    return (word >> (16 * (index % 2)).to(tl.uint32)) & 0xFFFF


@triton.jit
def of_stream(bits, stream: tl.constexpr):
    """The bits of a stream, from an element's random bits."""
    multiplier: tl.constexpr = 1 if stream == 0 else (44205 if stream == 1 else 64805)
    return (bits * multiplier) & 0xFFFF


@triton.jit
def rounded(x, dtype: tl.constexpr, noise, STOCHASTIC: tl.constexpr):
    """x (fp32) in `dtype`: to nearest, or to bf16 with random bits."""
    if STOCHASTIC and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000  # noise would make a NaN of inf
        bits += tl.where(finite, noise, 0)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dequantised(codes, scale, UNSIGNED: tl.constexpr):
    """fp32 of codes (BLOCKS, 256) uint8 and scale (BLOCKS,); the map is in quantised.py."""
    shift: tl.constexpr = 20 if UNSIGNED else 19
    zero: tl.constexpr = 2.0**-31 if UNSIGNED else 2.0**-7
    zero_bits: tl.constexpr = (96 if UNSIGNED else 120) << 23
    largest: tl.constexpr = 255 if UNSIGNED else 127
    c = codes.to(tl.int32)
    value = (((c & largest) << shift) + zero_bits).to(tl.float32, bitcast=True) - zero
    if not UNSIGNED:
        value = tl.where(c >= 128, -value, value)
    return value * scale[:, None]


@triton.jit
def quantised(x, mask, noise, UNSIGNED: tl.constexpr, STOCHASTIC: tl.constexpr, FAST: tl.constexpr):
    """(codes (BLOCKS, 256) uint8, scale (BLOCKS,)) of x."""
    shift: tl.constexpr = 20 if UNSIGNED else 19
    zero: tl.constexpr = 2.0**-31 if UNSIGNED else 2.0**-7
    zero_bits: tl.constexpr = (96 if UNSIGNED else 120) << 23
    largest: tl.constexpr = 255 if UNSIGNED else 127
    scale_of_largest: tl.constexpr = 0.5333333611488342 if UNSIGNED else 0.5182186365127563
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF  # numbers without a sign are ordered as their bits are
    inside = size if FAST else tl.where(mask, size, 0)
    scale = tl.max(inside, 1).to(tl.float32, bitcast=True) * scale_of_largest
    scale = tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)  # 2^-126; NaN stays
    w = size.to(tl.float32, bitcast=True) * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None] + zero
    added = noise << (shift - 16) if STOCHASTIC else 1 << (shift - 1)
    code = ((w.to(tl.uint32, bitcast=True) & 0x7FFFFFFF) - zero_bits + added) >> shift
    code = tl.minimum(code, largest)
    if UNSIGNED:
        code = tl.where((code == 0) & (bits > 0), 1, code)
    else:
        code += tl.where(bits < 0, 128, 0).to(tl.uint32)
    return code.to(tl.uint8), scale


# Rules: (p, g, moments, device scalars, constants) -> (p, moments)


@triton.jit
def adamw(p, g, m, v, scalars, beta1, rest1, beta2, rest2):
    decay, step_size, eps = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2)
    p = p * decay
    m = m * beta1 + g * rest1
    v = v * beta2 + g * rest2 * g
    return p - tl.div_rn(step_size * m, tl.sqrt_rn(v) + eps), m, v


@triton.jit
def lion(p, g, m, scalars, beta1, rest1, beta2, rest2):
    decay, lr = tl.load(scalars), tl.load(scalars + 1)
    p = p * decay
    direction = m * beta1 + g * rest1
    p = p - tl.where(direction > 0, lr, tl.where(direction < 0, -lr, 0.0))
    return p, m * beta2 + g * rest2


@triton.jit
def sgd(p, g, b, scalars, momentum, weight_decay, HAS_MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr):
    lr = tl.load(scalars)
    g = g + p * weight_decay
    if HAS_MOMENTUM:
        b = b * momentum + g
        g = g + b * momentum if NESTEROV else b
    return p - lr * g, b


# Update


@triton.jit
def read_moment(
    tensor, column: tl.constexpr, offsets, mask, block, there, dtype: tl.constexpr, UNSIGNED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    stored = read(tl.load(tensor + 3 + column), offsets, mask, dtype, FAST)
    if dtype == tl.uint8:
        scale = read(tl.load(tensor + 5 + column), block, there, tl.float32, False)
        return dequantised(stored, scale, UNSIGNED)
    else:
        return stored.to(tl.float32)


@triton.jit
def write_moment(
    tensor, column: tl.constexpr, x, offsets, mask, block, there, bits, dtype: tl.constexpr, UNSIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    noise = of_stream(bits, column + 1) if STOCHASTIC else 0
    if dtype == tl.uint8:
        codes, scale = quantised(x, mask, noise, UNSIGNED, STOCHASTIC, FAST)
        write(tl.load(tensor + 3 + column), offsets, mask, codes, FAST)
        write(tl.load(tensor + 5 + column), block, there, scale, False)
    else:
        write(tl.load(tensor + 3 + column), offsets, mask, rounded(x, dtype, noise, STOCHASTIC), FAST)


@triton.jit
def update_blocks(
    tensor, first, blocks, row, per_row, start, scalars, factor, step, seed, c0, c1, c2, c3,
    RULE: tl.constexpr, PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, MOMENT_DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr, HAS_MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr, BLOCKS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Blocks first .. first + BLOCKS - 1 of one tensor."""
    block = first + tl.arange(0, BLOCKS)
    there = block < blocks
    lane = tl.arange(0, 256)
    if FAST:
        offsets = first * 256 + (tl.arange(0, BLOCKS) * 256)[:, None] + lane[None, :]
        mask = offsets >= 0  # not used
    else:
        column = (block % per_row * 256)[:, None] + lane[None, :]
        offsets = (block // per_row * row)[:, None] + column
        mask = there[:, None] & (column < row)

    bits = random_bits(offsets, start, seed, step, BLOCKS, FAST) if STOCHASTIC else 0
    param, master = tl.load(tensor), tl.load(tensor + 1)
    g = read(tl.load(tensor + 2), offsets, mask, GRAD_DTYPE, FAST).to(tl.float32) * factor
    if MAXIMIZE:
        g = -g
    if HAS_MASTER:
        p = read(master, offsets, mask, tl.float32, FAST)
    else:
        p = read(param, offsets, mask, PARAM_DTYPE, FAST).to(tl.float32)

    if RULE == "adamw":
        m = read_moment(tensor, 0, offsets, mask, block, there, MOMENT_DTYPE, False, FAST)
        v = read_moment(tensor, 1, offsets, mask, block, there, MOMENT_DTYPE, True, FAST)
        p, m, v = adamw(p, g, m, v, scalars, c0, c1, c2, c3)
        write_moment(tensor, 1, v, offsets, mask, block, there, bits, MOMENT_DTYPE, True, STOCHASTIC, FAST)
    elif RULE == "lion":
        m = read_moment(tensor, 0, offsets, mask, block, there, MOMENT_DTYPE, False, FAST)
        p, m = lion(p, g, m, scalars, c0, c1, c2, c3)
    else:
        m = g  # not used without momentum
        if HAS_MOMENTUM:
            m = read_moment(tensor, 0, offsets, mask, block, there, MOMENT_DTYPE, False, FAST)
        p, m = sgd(p, g, m, scalars, c0, c1, HAS_MOMENTUM, NESTEROV)
    if HAS_MOMENTUM:
        write_moment(tensor, 0, m, offsets, mask, block, there, bits, MOMENT_DTYPE, False, STOCHASTIC, FAST)

    if HAS_MASTER:
        write(master, offsets, mask, p, FAST)
        write(param, offsets, mask, p.to(PARAM_DTYPE), FAST)
    else:
        noise = of_stream(bits, 0) if STOCHASTIC else 0
        write(param, offsets, mask, rounded(p, PARAM_DTYPE, noise, STOCHASTIC), FAST)


@triton.jit(do_not_specialize=["seed"])
def update_kernel(
    table,
    chunks,
    scalars,  # (3,) fp32, by rule: (decay, step_size, eps), (decay, lr), (lr,)
    factor_pointer,  # () fp32
    skip_pointer,  # () fp32
    step_pointer,  # () fp32
    seed,
    c0,  # constants, by rule: (beta1, 1 - beta1, beta2, 1 - beta2), the same, (momentum, weight_decay)
    c1,
    c2,
    c3,
    RULE: tl.constexpr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    MOMENT_DTYPE: tl.constexpr,
    HAS_MASTER: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    NESTEROV: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One step of all tensors of the table. Nothing where skip. Grid: chunks x (256 / BLOCKS)."""
    if tl.load(skip_pointer) != 0:
        return
    parts: tl.constexpr = 256 // BLOCKS
    chunk = tl.program_id(0) // parts
    tensor = table + tl.load(chunks + 2 * chunk) * COLUMNS
    first = tl.load(chunks + 2 * chunk + 1) + tl.program_id(0) % parts * BLOCKS
    numel, row, start = tl.load(tensor + 7), tl.load(tensor + 8), tl.load(tensor + 9)
    per_row = (row + 255) // 256
    blocks = numel // row * per_row
    if first >= blocks:
        return
    factor, step = tl.load(factor_pointer), tl.load(step_pointer)

    addresses = tl.load(tensor) | tl.load(tensor + 1) | tl.load(tensor + 2) | tl.load(tensor + 3) | tl.load(tensor + 4)
    fast = (addresses % 16 == 0) & ((first + BLOCKS) * 256 <= numel) & ((row % 256 == 0) | (row == numel))
    if STOCHASTIC:
        fast = fast & (start % 8 == 0)
    if fast:
        update_blocks(
            tensor, first, blocks, row, per_row, start, scalars, factor, step, seed, c0, c1, c2, c3,
            RULE, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, HAS_MASTER, HAS_MOMENTUM, STOCHASTIC, MAXIMIZE, NESTEROV,
            BLOCKS, True,
        )  # fmt: skip
    else:
        update_blocks(
            tensor, first, blocks, row, per_row, start, scalars, factor, step, seed, c0, c1, c2, c3,
            RULE, PARAM_DTYPE, GRAD_DTYPE, MOMENT_DTYPE, HAS_MASTER, HAS_MOMENTUM, STOCHASTIC, MAXIMIZE, NESTEROV,
            BLOCKS, False,
        )  # fmt: skip


# Sum of squares


@triton.jit
def halved(x, ROWS: tl.constexpr, N: tl.constexpr):
    """x (ROWS, N) fp64 -> (ROWS, N / 2): the first half plus the second."""
    first, second = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, N // 2)), (0, 2, 1)))
    return first + second


@triton.jit
def chunk_sum(address, begin, count, dtype: tl.constexpr, FAST: tl.constexpr):
    """Sum of squares of `count` elements, as `chunk_sums` of reference.py: (1, 1) fp64."""
    run = (tl.arange(0, 16) * 4096)[:, None]
    lane = tl.arange(0, 64)[None, :]
    total = tl.zeros((16, 64), tl.float64)
    for line in range(64):
        offsets = run + line * 64 + lane
        x = read(address, begin + offsets, offsets < count, dtype, FAST).to(tl.float32).to(tl.float64)
        total += x * x  # exact, so that contraction could change no bit
    total = halved(total, 16, 64)
    total = halved(total, 16, 32)
    total = halved(total, 16, 16)
    total = halved(total, 16, 8)
    total = halved(total, 16, 4)
    total = tl.reshape(halved(total, 16, 2), (1, 16))
    total = halved(total, 1, 16)
    total = halved(total, 1, 8)
    total = halved(total, 1, 4)
    return halved(total, 1, 2)


@triton.jit
def sum_of_squares_kernel(
    table,  # (gradients, 3) int64: address, elements, 0 for fp32 and 1 for bf16
    chunks,  # (N, 2) int64: gradient, first element
    sums,  # (N,) fp64, scratch; the result is in the first
    arrived,  # () int32: 0 before and after
    N,
):
    """Grid N: each program sums a chunk, and the last to arrive adds the chunks by halving."""
    pid = tl.program_id(0)
    row = table + tl.load(chunks + 2 * pid) * 3
    begin = tl.load(chunks + 2 * pid + 1)
    address, count, kind = tl.load(row), tl.load(row + 1) - begin, tl.load(row + 2)
    fast = (address % 16 == 0) & (count >= 65536)
    one = tl.zeros((1, 1), tl.int32)
    if kind == 0:
        if fast:
            total = chunk_sum(address, begin, count, tl.float32, True)
        else:
            total = chunk_sum(address, begin, count, tl.float32, False)
    else:
        if fast:
            total = chunk_sum(address, begin, count, tl.bfloat16, True)
        else:
            total = chunk_sum(address, begin, count, tl.bfloat16, False)
    tl.store(sums + pid + one, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == N - 1:
        tl.debug_barrier()
        width = 1
        while width < N:
            width *= 2
        alive = N
        lane = tl.arange(0, 1024)
        while width > 1:
            width //= 2
            for at in range(0, width, 1024):
                i = at + lane
                a = tl.load(sums + i, mask=(i < width) & (i < alive), other=0.0, cache_modifier=".cg")
                b = tl.load(sums + i + width, mask=(i < width) & (i + width < alive), other=0.0, cache_modifier=".cg")
                tl.store(sums + i, a + b, mask=(i < width) & (i < alive))
            tl.debug_barrier()
            alive = tl.minimum(alive, width)
        tl.store(arrived, 0)
