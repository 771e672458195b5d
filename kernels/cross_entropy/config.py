"""Sizes of chunks: pure functions of shape, dtype and device.

Measured on two cores (AMD EPYC, family 26; L2 1 MiB a core, L3 32 MiB): the three products of N = 2048, D = 256,
V = 50304 in chunks of 256, 512, 1024 and 2048 rows take 1.88, 1.74, 1.70 and 1.76 s in fp32, and 0.78, 0.60, 0.53 and
0.50 s in bf16. Small chunks read the projection weight and its gradient more often, large ones fault more fresh pages.
"""

from __future__ import annotations

import torch

CHUNK_BYTES = 256 << 20
"""Logits that exist at a time in `one_pass`."""
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
    """Rows whose logits are computed at a time (at least one): equal chunks within `CHUNK_BYTES`."""
    return _equal_parts(n, CHUNK_BYTES // (max(v, 1) * dtype.itemsize))


def recompute_rows(n: int, v: int, d: int, dtype: torch.dtype) -> int:
    """Rows of logits at a time in the forward pass of `recompute`, whose room the backward pass keeps."""
    return _equal_parts(n, max(0, RECOMPUTE_BYTES - sum_bytes(n, d, dtype)) // (max(v, 1) * dtype.itemsize))


def tile_columns(n: int, v: int, d: int, dtype: torch.dtype) -> int:
    """Columns of the vocabulary whose gradient is computed at a time, for all rows."""
    return _equal_parts(v, max(0, RECOMPUTE_BYTES - sum_bytes(n, d, dtype)) // (max(n, 1) * dtype.itemsize))


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


def _equal_parts(total: int, limit: int) -> int:
    limit = max(MULTIPLE, limit // MULTIPLE * MULTIPLE)
    if total <= limit:
        return max(total, 1)
    parts = -(-total // limit)
    return -(-total // (parts * MULTIPLE)) * MULTIPLE
