"""Backend `cpu`: AdamW, Lion and SGD in C++ (csrc/optimizers), bit-equal to the reference.

One call updates all tensors of an `Update`; each is read once and written once. Threads: torch's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.cuda import extension
from hotloop.kernels.optimizers import reference, tables
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _supports_device(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"serves cpu tensors, got {device.type}"
    if extension() is None:
        return "hotloop.kernels._C is missing: install a C++ compiler, then hotloop again"
    return None


def supports(update: Update) -> str | None:
    return _supports_device(update.device)


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return _supports_device(grads[0].device)


def sum_of_squares(grads: list[Tensor], kept: DeviceTables | None = None) -> Tensor:
    """`reference.sum_of_squares`, to the bit."""
    flat = [g.contiguous() for g in grads]
    table = tables.gradient_rows(flat, _TYPES)
    return torch.tensor(_c().optimizer_sum_of_squares(table, torch.get_num_threads()), dtype=torch.float64)


def adamw(update: Update, factor: Tensor, skip: Tensor) -> None:
    beta1, beta2 = update.group["betas"]
    constants = (beta1, 1 - beta1, beta2, 1 - beta2, update.group["eps"])
    _run(0, update, factor, skip, reference.adamw_scalars(update), constants)


def lion(update: Update, factor: Tensor, skip: Tensor) -> None:
    beta1, beta2 = update.group["betas"]
    _run(1, update, factor, skip, reference.lion_scalars(update), (beta1, 1 - beta1, beta2, 1 - beta2))


def sgd(update: Update, factor: Tensor, skip: Tensor) -> None:
    constants = (update.group["momentum"], update.group["weight_decay"])
    _run(2, update, factor, skip, reference.sgd_scalars(update), constants)


def _run(
    rule: int, update: Update, factor: Tensor, skip: Tensor, scalars: Sequence[Tensor], constants: Sequence[float]
) -> None:
    if skip:  # CPU tensors: reading them waits for nothing
        return
    # Copies where a tensor is not contiguous.
    params, grads = ([x.contiguous() for x in xs] for xs in (update.params, update.grads))
    _c().optimizer_update(
        rule,
        _TYPES[params[0].dtype],
        _TYPES[grads[0].dtype],
        _TYPES[update.moments[0][0].dtype] if update.moments else 0,
        len(update.moments),
        stochastic=update.stochastic,
        maximize=update.group["maximize"],
        nesterov=update.group.get("nesterov", False),
        seed=update.seed,
        step=int(update.step),
        factor=float(factor),
        scalars=[float(x) for x in scalars],
        constants=constants,
        table=tables.rows_of(update, params, grads),
        threads=torch.get_num_threads(),
    )
    for param, written in zip(update.params, params, strict=True):
        if written is not param:
            param.copy_(written)
    # Stores through pointers do not tell autograd that they write.
    torch.autograd.graph.increment_version(update.tensors)


def _c() -> Any:
    found = extension()
    assert found is not None
    return found
