"""Launch configurations of the Triton kernels: a pure function of kernel, GPU, width of an element and head_dim.

The tables hold the largest tiles that fit a GPU's shared memory and registers without a spill, by ahead-of-time
compilation (tests/kernels/attention_budgets.json). They have not been timed on a GPU; `tune.py` measures there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    BLOCK_M: int
    """Query rows: (position, head of the group) pairs."""
    BLOCK_N: int
    """Keys."""
    num_warps: int
    num_stages: int
    BLOCK_D: int
    """Columns of the result that a program has."""
    DEPTH: int
    """Columns of other tensors that it has at a time: all, as of the result, or a part."""


KERNELS = ("forward", "dkdv", "dq")

Row = tuple[int, ...]
"""The fields of a tile, but for the last two where all columns are there at once."""

Table = dict[tuple[int, int], tuple[Row, Row, Row]]
"""(bytes of an element, most columns) -> forward, dkdv, dq."""

# Each operand is there twice, as TF32 and the rest of it.
FP32: Table = {
    (4, 64): ((32, 32, 8, 2), (16, 32, 4, 2, 64, 32), (16, 32, 4, 2, 64, 32)),
    (4, 512): ((32, 32, 4, 2, 64, 32), (16, 32, 4, 2, 64, 32), (16, 32, 4, 2, 64, 32)),
}
SM_120: Table = {
    (2, 64): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 32, 8, 2)),
    (2, 128): ((128, 32, 8, 3), (32, 64, 8, 2), (64, 64, 8, 2)),
    (2, 256): ((64, 16, 8, 2), (32, 32, 8, 2), (64, 32, 8, 1)),
    (2, 512): ((32, 16, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2)),
    **FP32,
}
TABLES: dict[str, Table] = {
    "sm_80": {
        (2, 64): ((128, 128, 8, 3), (32, 128, 8, 2), (128, 64, 8, 2)),
        (2, 128): ((128, 64, 8, 3), (32, 64, 8, 2), (128, 32, 8, 2)),
        (2, 256): ((64, 32, 8, 2), (32, 32, 8, 2), (64, 32, 8, 2)),
        (2, 512): ((32, 32, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2)),
        **FP32,
    },
    "sm_86": SM_120 | {(2, 128): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2))},
    "sm_90": {
        (2, 64): ((128, 128, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        (2, 128): ((128, 64, 8, 3), (32, 128, 8, 2), (128, 32, 8, 2)),
        (2, 256): ((64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
        (2, 512): ((32, 16, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2)),
        **FP32,
    },
    "sm_100": {
        (2, 64): ((128, 64, 8, 2), (64, 128, 8, 2), (128, 64, 8, 2)),
        (2, 128): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2)),
        (2, 256): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
        (2, 512): ((32, 16, 8, 2), (16, 16, 8, 2), (32, 16, 8, 2)),
        **FP32,
    },
    "sm_120": SM_120,
}
# Instead, on every GPU, where scores take more than a factor (softcap, ALiBi, dropout): that needs registers.
RICH: Table = {
    (2, 64): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    (2, 128): ((64, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
    (2, 256): ((64, 16, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2)),
    (2, 512): ((32, 16, 8, 2), (16, 16, 8, 2), (16, 16, 8, 2)),
    (4, 512): ((32, 32, 8, 2, 64, 32), (16, 32, 4, 2, 64, 32), (16, 32, 4, 2, 64, 32)),
}

# Bytes of second-level cache.
CACHE = {"sm_80": 40 << 20, "sm_86": 6 << 20, "sm_90": 50 << 20, "sm_100": 126 << 20, "sm_120": 96 << 20}


def family(arch: int) -> str:
    """The table that serves a GPU of compute capability `arch` (80 for 8.0): the newest that is not newer.

    sm_86 and sm_120 have 99 KiB of shared memory a block; sm_87 has sm_80's.
    """
    if arch in (80, 87):
        return "sm_80"
    return next(
        name for name, since in (("sm_120", 120), ("sm_100", 100), ("sm_90", 90), ("sm_86", 0)) if arch >= since
    )


def block_d(D: int) -> int:
    """Columns of a tile: a power of two, and at least what a tensor core sums at a time."""
    return max(16, 1 << (D - 1).bit_length())


def tile(kernel: str, arch: int, itemsize: int, D: int, is_rich: bool) -> Tile:
    """is_rich: with softcap, ALiBi or dropout."""
    table, whole = RICH if is_rich else TABLES[family(arch)], block_d(D)
    rows = next(rows for (size, columns), rows in table.items() if size == itemsize and columns >= D)
    BLOCK_M, BLOCK_N, num_warps, num_stages, *parts = rows[KERNELS.index(kernel)]
    BLOCK_D, DEPTH = (min(part, whole) for part in parts) if parts else (whole, whole)
    return Tile(BLOCK_M, BLOCK_N, num_warps, num_stages, BLOCK_D, DEPTH)


def section(arch: int, heads: int, Tk: int, D: int, itemsize: int) -> int:
    """Heads that are worked on at a time: as many as have keys and values in half of the second-level cache."""
    return max(1, min(heads, CACHE[family(arch)] // 2 // max(1, 2 * Tk * D * itemsize)))
