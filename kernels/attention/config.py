"""Launch configurations of the Triton kernels: a pure function of kernel, GPU, width of an element and head_dim."""

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


def block_d(D: int) -> int:
    """Columns of a tile: a power of two, and at least what a tensor core sums at a time."""
    return max(16, 1 << (D - 1).bit_length())


def tile(kernel: str, arch: int, itemsize: int, D: int) -> Tile:
    return Tile(32, 32, 4, 2, block_d(D), block_d(D))


def section(arch: int, heads: int, Tk: int, D: int, itemsize: int) -> int:
    return max(1, min(heads, (20 << 20) // max(1, 2 * Tk * D * itemsize)))
