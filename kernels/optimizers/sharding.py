"""Parameters that are sharded over ranks by rows: DTensors with the placement Shard(0), as `fully_shard` makes them.

An update works on each rank's own rows and needs no communication; random bits and quantisation blocks follow the
logical tensor, so every layout gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def is_sharded(x: Any) -> bool:
    return hasattr(x, "device_mesh")


def placement_error(p: Any) -> str | None:
    """Why a DTensor cannot be served, or None. Served: rows over one dimension of the mesh, copies over the others."""
    if [s for s in p.placements if not (s.is_replicate() or s.is_shard(0))] or len(_sharded_dims(p)) > 1:
        return f"is placed as {p.placements}: expected Shard(0) in at most one dimension of the mesh, else Replicate()"
    if p.ndim == 0 and _sharded_dims(p):
        return "is a sharded scalar"
    return None


def _sharded_dims(p: Any) -> list[int]:
    return [dim for dim, placement in enumerate(p.placements) if placement.is_shard()]


def layout(p: Any) -> Any:
    """What parameters of one update have in common: None, or mesh and placements."""
    return (p.device_mesh, tuple(p.placements)) if is_sharded(p) else None


def local(x: Any) -> Tensor:
    """This rank's rows."""
    return x.to_local() if is_sharded(x) else x


def ranks_of(p: Any) -> ProcessGroup | None:
    """The process group that the rows are spread over; None where this rank has all of them."""
    dims = _sharded_dims(p) if is_sharded(p) else []
    return p.device_mesh.get_group(dims[0]) if dims else None


def row_size(p: Tensor) -> int:
    """Elements of one index of the first dimension."""
    return p.numel() // p.shape[0] if p.ndim and p.shape[0] else 1


def first_row(p: Any) -> int:
    """Index of this rank's first row: ranks get ceil(rows / ranks) rows each while there are some."""
    dims = _sharded_dims(p) if is_sharded(p) else []
    if not dims:
        return 0
    size, rank = p.device_mesh.size(dims[0]), p.device_mesh.get_local_rank(dims[0])
    return int(min(p.shape[0], rank * -(-p.shape[0] // size)))


def like(p: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    """A tensor with one row for each row of p, sharded as p is. make: p's local rows -> contiguous local rows."""
    rows = make(local(p))
    if not is_sharded(p):
        return rows
    from torch.distributed.tensor import DTensor

    shape = torch.Size([*p.shape[:1], *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def rows_of(saved: Any, p: Any) -> Tensor:
    """Those rows of a saved tensor that this rank has of p. saved: whole, or sharded in whatever way."""
    if is_sharded(saved) and layout(saved) == layout(p):
        return local(saved)
    if is_sharded(saved):
        saved = saved.full_tensor()
    if not is_sharded(p) or p.ndim == 0:
        return saved
    return saved.narrow(0, first_row(p), local(p).shape[0])


def sum_over_ranks(x: Tensor, ranks: ProcessGroup | None) -> Tensor:
    """x () summed in the order of the ranks, which is the same everywhere; x itself without ranks."""
    if ranks is None:
        return x
    import torch.distributed as dist

    parts = x.new_empty(dist.get_world_size(ranks))
    dist.all_gather_into_tensor(parts, x.view(1), group=ranks)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
