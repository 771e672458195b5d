"""Sizes of chunks: pure functions of shape, dtype and device.

Measured on two cores (AMD EPYC, family 26; L2 1 MiB a core, L3 32 MiB): the three products of N = 2048, D = 256,
V = 50304 in chunks of 256, 512, 1024 and 2048 rows take 1.88, 1.74, 1.70 and 1.76 s in fp32, and 0.78, 0.60, 0.53 and
0.50 s in bf16. Small chunks read the projection weight and its gradient more often, large ones fault more fresh pages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

CHUNK_BYTES = 256 << 20
"""16-bit logits that exist at a time in `one_pass`. Of several chunks gradients are summed in fp32 and rounded."""
WIDE_CHUNK_BYTES = 96 << 20
"""fp32 logits, whose gradients are summed where they are: chunks of a quarter of 2,048 rows cost 2 % of the time."""
RECOMPUTE_BYTES = 128 << 20
"""What `recompute` holds beside inputs and gradients: logits, and sums in fp32 of narrow gradients."""
PRODUCT_BYTES = 8 << 20
"""A narrow product on its way into a sum in fp32; PyTorch widens it into another tensor."""
MULTIPLE = 64
"""Chunks are multiples of this many rows (columns), so that matrix products have no ragged tiles in the middle."""
BLOCK_ELEMENTS = 1_600_000
"""Logits between two passes of elementwise work on a CPU: 6 MB in fp32, so that every pass but the first is in cache.
With smaller blocks the threads meet more often, which a machine with other work punishes."""
CAPACITY_MULTIPLE = 1024
"""`max_valid` is rounded up to this, so that a bound that varies a little doesn't change shapes."""


def chunk_rows(n: int, v: int, dtype: torch.dtype) -> int:
    """Rows whose logits are computed at a time (at least one), in equal chunks."""
    room = CHUNK_BYTES if dtype.itemsize < 4 else WIDE_CHUNK_BYTES
    return _equal_parts(n, room // (max(v, 1) * dtype.itemsize), MULTIPLE)


def recompute_rows(n: int, v: int, d: int, dtype: torch.dtype) -> int:
    """Rows of logits at a time in the forward pass of `recompute`, whose room the backward pass keeps."""
    return _equal_parts(n, max(0, RECOMPUTE_BYTES - sum_bytes(n, d, dtype)) // (max(v, 1) * dtype.itemsize), MULTIPLE)


def tile_columns(n: int, v: int, d: int, dtype: torch.dtype) -> int:
    """Columns of the vocabulary whose gradient is computed at a time, for all rows."""
    return _equal_parts(v, max(0, RECOMPUTE_BYTES - sum_bytes(n, d, dtype)) // (max(n, 1) * dtype.itemsize), MULTIPLE)


def product_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """Rows of a product that go into a sum at a time."""
    return max(1, min(rows, PRODUCT_BYTES // (max(columns, 1) * dtype.itemsize)))


def sum_bytes(rows: int, columns: int, dtype: torch.dtype, *, direct: bool = False) -> int:
    """What it takes to add products of narrow matrices in fp32; nothing for wide ones, whose sum is the gradient.

    direct: products are added as they are computed (`gemm.py`) and need no room of their own.
    """
    if dtype.itemsize >= 4:
        return 0
    product = 0 if direct else product_rows(rows, columns, dtype) * (dtype.itemsize + 4)
    return (rows * 4 + product) * columns


def block_rows(n: int, v: int, device_type: str) -> int:
    """Rows that elementwise passes share."""
    return max(1, min(n, BLOCK_ELEMENTS // max(v, 1))) if device_type == "cpu" else max(n, 1)


def capacity(n: int, max_valid: int) -> int:
    """Rows that are projected where `max_valid` of n bounds the valid ones."""
    return min(n, -(-max_valid // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE)


class Tile(NamedTuple):
    """Launch configuration of a kernel of the projection: elements of a tile along rows, vocabulary and width."""

    rows: int
    columns: int
    width: int
    num_warps: int
    num_stages: int

    def half(self) -> Tile:
        """For what needs more registers an element."""
        return self._replace(columns=self.columns // 2)


class Projection(NamedTuple):
    """Launch configurations of the projection's kernels on one architecture. Half a tile of columns of `dlogits` holds
    whole ones of `dinput`."""

    results: Tile
    dlogits: Tile
    dinput: Tile
    dweight: Tile


PROJECTIONS = {
    80: Projection(
        Tile(128, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 128, 128, 8, 3)
    ),
    90: Projection(
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 128, 128, 8, 3)
    ),
    100: Projection(
        Tile(128, 128, 64, 8, 4), Tile(128, 128, 64, 8, 3), Tile(128, 64, 128, 8, 3), Tile(64, 128, 128, 8, 3)
    ),
    120: Projection(
        Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 32, 128, 8, 3), Tile(32, 128, 128, 8, 3)
    ),
}
"""By compute capability, of 16-bit inputs. Those of 120 are for 99 KiB of shared memory, which 86 and 89 have too. None
spills registers, as nearly all do with 256 columns; with 3 stages two programs fit a multiprocessor of 90 and 100. No
time was measured on a GPU."""
WIDE_PROJECTION = Projection(
    Tile(64, 64, 32, 4, 2), Tile(64, 64, 32, 4, 2), Tile(64, 32, 64, 4, 2), Tile(32, 64, 64, 4, 2)
)
"""Of fp32 inputs."""
GROUP = 16
"""Tiles of rows that pass the vocabulary together: of 128 rows of 4,096 bf16 numbers 17 MB, which a second-level cache
holds."""
SPLITS = 32
"""Parts of the vocabulary whose results are merged, at least where it has so many tiles."""
PROGRAMS = 2048
"""Splits are more where rows are few, so that about this many programs exist."""
LEAST_COLUMNS = 2048
"""Of a tile of the vocabulary for the sum in fp32 of dinput, which each tile reads and writes: 0.75 operations a byte
and column."""


def projection(capability: int, dtype: torch.dtype) -> Projection:
    """For a compute capability of 10 * major + minor."""
    if dtype.itemsize > 2:
        return WIDE_PROJECTION
    if capability in (86, 89):
        return PROJECTIONS[120]
    return PROJECTIONS[max((known for known in PROJECTIONS if known <= capability), default=80)]


def split_columns(n: int, v: int, tile: Tile) -> int:
    """Columns of the vocabulary whose results of rows a program finds, a multiple of the tile's. It depends on nothing
    but shapes and the tile: so do the order of sums and their bits."""
    tiles, splits = -(-v // tile.columns), max(SPLITS, PROGRAMS // max(1, -(-n // tile.rows)))
    return -(-tiles // splits) * tile.columns


def projected_columns(n: int, v: int, d: int, dtype: torch.dtype, tile: Tile) -> int:
    """Columns of the vocabulary whose gradient is computed at a time, beside a sum of dinput in fp32."""
    fit = max(0, RECOMPUTE_BYTES - 4 * n * d) // (max(n, 1) * dtype.itemsize)
    return _equal_parts(v, max(LEAST_COLUMNS, fit), tile.columns)


def results_bytes(n: int, v: int, dtype: torch.dtype) -> int:
    """Of results of rows in splits of the vocabulary, without statistics and label smoothing."""
    return 3 * 4 * n * -(-v // split_columns(n, v, projection(90, dtype).results))


def room_bytes(n: int, v: int, dtype: torch.dtype) -> int:
    """Of logits, in whole tiles."""
    tile = projection(90, dtype).dlogits
    return padded(n, tile.rows) * padded(v, tile.columns) * dtype.itemsize


def padded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _equal_parts(total: int, limit: int, multiple: int) -> int:
    limit = max(multiple, limit // multiple * multiple)
    if total <= limit:
        return max(total, 1)
    parts = -(-total // limit)
    return -(-total // (parts * multiple)) * multiple
