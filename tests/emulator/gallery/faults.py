"""Triton kernels with one planted fault each. A comment `fault:` marks the line that the report must name."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_past_the_end(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)  # fault: out-of-bounds
    tl.store(y + i, value, mask=i < n)


@triton.jit
def copy_from_odd_start(x, y, start, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    source = tl.max_contiguous(tl.multiple_of(start + i, 4), 4)
    value = tl.load(x + source)  # fault: misaligned
    tl.store(y + i, value, mask=i < n)


@triton.jit
def add_without_atomics(x, total, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + i), 0)
    before = tl.load(total)
    tl.store(total, before + part)  # fault: global-race


@triton.jit
def pairs_to_one_place(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i // 2, value)  # fault: conflicting-stores
