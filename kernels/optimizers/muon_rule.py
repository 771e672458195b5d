"""What every backend of Muon shares: the scalars of a step, and the way of sharded matrices to whole ones and back."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import sharding
from hotloop.kernels.optimizers.reference import device_scalar
from hotloop.kernels.optimizers.update import Update

Orthogonalise = Callable[[list[Tensor]], list[Tensor]]
"""Whole matrices (R, C), of any shapes -> their approximate polar factors, of the same shapes."""

LR_SCALES: dict[str | None, Callable[[int, int], float]] = {
    None: lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_norm": lambda rows, columns: math.sqrt(rows / columns),
    "unscaled": lambda rows, columns: 1.0,
}


def lr_scale(update: Update, i: int) -> float:
    """What lr is multiplied by for matrix i, by its whole shape, which is not empty."""
    return LR_SCALES[update.group["adjust_lr_fn"]](*update.tensors[i].shape)


def decay_and_lr(update: Update) -> tuple[Tensor, Tensor]:
    """(1 - lr * weight_decay, lr), each () fp64 on the device."""
    lr = device_scalar(update.group["lr"], update.device)
    return 1 - lr * update.group["weight_decay"], lr


def is_sharded(update: Update) -> bool:
    """Whether this rank has only some rows of the matrices."""
    return sharding.ranks_of(update.tensors[0]) is not None


def on_whole_matrices(update: Update, rows: list[Tensor], orthogonalise: Orthogonalise) -> list[Tensor]:
    """This rank's rows of the polar factors of matrices of which it has `rows`, one entry a parameter.

    A stack of N matrices of a shape, of which each rank has some rows, is exchanged for one of which each rank has some
    whole matrices. So Newton-Schulz, too, is shared out over the ranks. Every rank of the mesh must call this.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = sharding.layout(update.tensors[0])
    by_rows, by_matrix = ([Shard(dim) if p.is_shard() else p for p in placements] for dim in (1, 0))
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for i, p in enumerate(update.tensors):
        alike[p.shape].append(i)
    stacks = {shape: torch.stack([rows[i] for i in members]) for shape, members in alike.items()}
    whole = {shape: _moved(x, (len(x), *shape), mesh, by_rows, by_matrix) for shape, x in stacks.items()}
    done = iter(orthogonalise([x for stack in whole.values() for x in stack]))
    result = list(rows)
    for shape, members in alike.items():
        mine = whole[shape]
        for x in mine:
            x.copy_(next(done))
        for i, x in zip(members, _moved(mine, (len(members), *shape), mesh, by_matrix, by_rows), strict=True):
            result[i] = x
    return result


def _moved(x: Tensor, shape: Sequence[int], mesh: Any, placed: Sequence[Any], wanted: Sequence[Any]) -> Tensor:
    """The local part of a tensor of this shape, placed otherwise."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    whole = DTensor.from_local(x, mesh, placed, run_check=False, shape=torch.Size(shape), stride=stride)
    return whole.redistribute(placements=wanted).to_local().contiguous()
