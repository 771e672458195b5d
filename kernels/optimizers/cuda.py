"""Backend `cuda`: AdamW, Lion and SGD in CUDA C++ (csrc/optimizers/elementwise.cu), bit-equal to the reference.

One launch updates all tensors of an `Update`; each is read once and written once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.kernels.cuda import Launch, supports_device
from hotloop.kernels.optimizers import tables
from hotloop.kernels.optimizers.raw import RawRules
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

# As in csrc/optimizers/elementwise.cu.
UPDATE_THREADS = SUM_THREADS = 256
_BLOCKS_OF_A_CHUNK = 256
_OPTIONS = struct.Struct("<8i4fQ")
_RULES = {"adamw": 0, "lion": 1, "sgd": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def supports(update: Update) -> str | None:
    return supports_device(update.device)


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return supports_device(grads[0].device)


def sum_of_squares(grads: list[Tensor], kept: DeviceTables) -> Tensor:
    """`reference.sum_of_squares`, to the bit, in one launch."""
    flat = [g.contiguous() for g in grads]
    launch = sum_launch(flat, kept)
    if not launch.grid[0]:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    launch.run(grads[0].device)
    total: Tensor = launch.arguments["sums"][0]
    return total


def sum_launch(flat: list[Tensor], kept: DeviceTables) -> Launch:
    device = flat[0].device
    rows, chunks = tables.gradient_rows(flat, _TYPES), tables.gradient_chunks(flat)
    count = len(chunks) // 2
    table = kept.get("gradients", rows + chunks, device)
    arguments = {
        "table": table,
        "chunks": table[len(rows) :],
        "sums": torch.empty(count, dtype=torch.float64, device=device),
        "arrived": kept.get("arrived", (0,), device).view(torch.int32),
        "count": struct.pack("<i", count),
    }
    return Launch("optimizer_sum_of_squares", (count, 1), SUM_THREADS, 0, arguments)


def _run(
    rule: str,
    update: Update,
    params: list[Tensor],
    grads: list[Tensor],
    factor: Tensor,
    skip: Tensor,
    scalars: Sequence[Tensor],
    constants: Sequence[float],
) -> None:
    rows = tables.rows_of(update, params, grads)
    chunks = tables.chunks_of(rows)
    place = rule, id(update.group), params[0].dtype, grads[0].dtype, update.quantised
    table = update.tables.get(place, rows + chunks, update.device)
    options = _OPTIONS.pack(
        _RULES[rule],
        _TYPES[params[0].dtype],
        _TYPES[grads[0].dtype],
        _TYPES[update.moments[0][0].dtype] if update.moments else 0,
        len(update.moments),
        update.stochastic,
        update.group["maximize"],
        update.group.get("nesterov", False),
        *constants,
        *[0.0] * (4 - len(constants)),
        update.seed,
    )
    arguments = {
        "table": table,
        "chunks": table[len(rows) :],
        "scalars": torch.stack(tuple(scalars)),
        "factor": factor,
        "skip": skip,
        "step": update.step,
        "options": options,
    }
    name = f"optimizer_{rule}{'_codes' if update.quantised else ''}{'_stochastic' if update.stochastic else ''}"
    blocks = len(chunks) // 2 * (_BLOCKS_OF_A_CHUNK // (UPDATE_THREADS // 32))
    Launch(name, (blocks, 1), UPDATE_THREADS, 0, arguments).run(update.device)


RULES = RawRules(_run)
