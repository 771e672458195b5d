"""Backend `cuda`: AdamW, Lion and SGD in CUDA C++ (csrc/optimizers/elementwise.cu), bit-equal to the reference.

One launch updates all tensors of an `Update`; each is read once and written once.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import cpu, reference, tables
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

# As in csrc/optimizers/elementwise_cuda.h.
UPDATE_THREADS = SUM_THREADS = 256
_BLOCKS_OF_A_CHUNK = 256
_OPTIONS = struct.Struct("<8i5f4xQ")
_RULES = {"adamw": 0, "lion": 1, "sgd": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _supports_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"serves cuda tensors, got {device.type}"
    extension = cpu.extension()
    if extension is None:
        return "hotloop.kernels._C is missing: install a C++ compiler, then hotloop again"
    if not extension.cuda_architectures():
        return "hotloop.kernels._C has no CUDA code: install hotloop again where nvcc is, with HOTLOOP_BUILD_CUDA=all"
    return None


def supports(update: Update) -> str | None:
    return _supports_device(update.device)


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return _supports_device(grads[0].device)


@dataclass(frozen=True)
class Launch:
    """Arguments of a kernel in their order, tensors and bytes, and its grid."""

    grid: int
    arguments: dict[str, Any]

    def addresses(self) -> list[int]:
        return [x.data_ptr() for x in self.arguments.values() if isinstance(x, Tensor)]


def sum_of_squares(grads: list[Tensor], kept: DeviceTables) -> Tensor:
    """`reference.sum_of_squares`, to the bit, in one launch."""
    flat = [g.contiguous() for g in grads]
    launch = sum_launch(flat, kept)
    if not launch.grid:
        return torch.zeros((), dtype=torch.float64, device=grads[0].device)
    _c().optimizer_sum_of_squares_cuda(*launch.addresses(), launch.grid, _stream(grads[0].device))
    return launch.arguments["sums"][0]


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
    return Launch(count, arguments)


def adamw(update: Update, factor: Tensor, skip: Tensor) -> None:
    beta1, beta2 = update.group["betas"]
    constants = (beta1, 1 - beta1, beta2, 1 - beta2, update.group["eps"])
    _run("adamw", update, factor, skip, reference.adamw_scalars(update), constants)


def lion(update: Update, factor: Tensor, skip: Tensor) -> None:
    beta1, beta2 = update.group["betas"]
    _run("lion", update, factor, skip, reference.lion_scalars(update), (beta1, 1 - beta1, beta2, 1 - beta2))


def sgd(update: Update, factor: Tensor, skip: Tensor) -> None:
    constants = (update.group["momentum"], update.group["weight_decay"])
    _run("sgd", update, factor, skip, reference.sgd_scalars(update), constants)


def _run(
    rule: str, update: Update, factor: Tensor, skip: Tensor, scalars: Sequence[Tensor], constants: Sequence[float]
) -> None:
    # Copies where a tensor is not contiguous.
    params, grads = ([x.contiguous() for x in xs] for xs in (update.params, update.grads))
    launch = update_launch(rule, update, params, grads, factor, skip, scalars, constants)
    _execute(launch, update.device)
    for param, written in zip(update.params, params, strict=True):
        if written is not param:
            param.copy_(written)
    # Stores through pointers do not tell autograd that they write.
    torch.autograd.graph.increment_version(update.tensors)


def update_launch(
    rule: str, update: Update, params: list[Tensor], grads: list[Tensor], factor: Tensor, skip: Tensor,
    scalars: Sequence[Tensor], constants: Sequence[float],
) -> Launch:  # fmt: skip
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
        *[0.0] * (5 - len(constants)),
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
    return Launch(len(chunks) // 2 * (_BLOCKS_OF_A_CHUNK // (UPDATE_THREADS // 32)), arguments)


def _execute(launch: Launch, device: torch.device) -> None:
    _c().optimizer_update_cuda(*launch.addresses(), launch.arguments["options"], launch.grid, _stream(device))


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _c() -> Any:
    found = cpu.extension()
    assert found is not None
    return found
