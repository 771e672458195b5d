"""Boundaries of packed documents, computed where the document ids are."""

from __future__ import annotations

import torch
from torch import Tensor


def cu_seqlens_from_document_ids(
    document_ids: Tensor,  # (B, T) or (total,) integer
    *,
    capacity: int | None = None,
) -> Tensor:  # (capacity + 1,) int32
    """Cumulative segment lengths of packed documents, for `attention_varlen` over the flattened B * T positions.

        flat = document_ids.flatten()
        starts = [0] + [i for i in range(1, total) if flat[i] != flat[i - 1] or i % T == 0]
        cu_seqlens = starts + [total] * (capacity + 1 - len(starts))

    A segment is a run of equal ids within one row; ids need not be sorted or consecutive. The shape depends on
    `capacity` alone and no value is read on the host, so a step that packs differently runs the same graph. `capacity`
    None means one segment for each position, which always suffices.

    Raises ValueError for other shapes, dtypes or a capacity below the number of rows, and RuntimeError (on a GPU a
    device-side assertion) if there are more segments than `capacity`.
    """
    if document_ids.dim() not in (1, 2):
        raise ValueError(f"document_ids {tuple(document_ids.shape)}: expected (B, T) or (total,)")
    if document_ids.dtype.is_floating_point or document_ids.dtype.is_complex:
        raise ValueError(f"document_ids {document_ids.dtype}: expected an integer dtype")
    ids = document_ids if document_ids.dim() == 2 else document_ids[None]
    B, T = ids.shape
    total = B * T
    if total >= 2**31:
        raise ValueError(f"document_ids has {total} positions: cu_seqlens is int32; pass fewer than 2**31")
    capacity = total if capacity is None else capacity
    if capacity < (B if T else 0):
        raise ValueError(f"capacity {capacity}: the {B} rows of document_ids have at least one segment each")

    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    starts = starts.flatten()
    ordinal = starts.cumsum(0)
    if total:
        torch._assert_async(ordinal[-1] <= capacity, "document_ids has more segments than capacity")
    # Positions that start nothing, and segments past the capacity, write `total` into the last entry, where it belongs.
    slot = torch.where(starts, ordinal - 1, capacity).clamp_max(capacity)
    position = torch.arange(total, device=ids.device, dtype=torch.int32)
    value = torch.where(starts & (slot < capacity), position, total)
    return torch.full((capacity + 1,), total, device=ids.device, dtype=torch.int32).scatter_(0, slot, value.int())
