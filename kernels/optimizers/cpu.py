"""Backend `cpu`: AdamW, Lion and SGD in C++ (csrc/optimizers), bit-equal to the reference.

One call updates all tensors of an `Update`; each is read once and written once. Threads: torch's number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hotloop.kernels.extension import loaded, missing
from hotloop.kernels.optimizers import tables
from hotloop.kernels.optimizers.raw import RawRules
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

_RULES = {"adamw": 0, "lion": 1, "sgd": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}


def _supports_device(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"serves cpu tensors, got {device.type}"
    return missing()


def supports(update: Update) -> str | None:
    return _supports_device(update.device)


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return _supports_device(grads[0].device)


def sum_of_squares(grads: list[Tensor], kept: DeviceTables | None = None) -> Tensor:
    """`reference.sum_of_squares`, to the bit."""
    flat = [g.contiguous() for g in grads]
    table = tables.gradient_rows(flat, _TYPES)
    return torch.tensor(loaded().optimizer_sum_of_squares(table, torch.get_num_threads()), dtype=torch.float64)


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
    if skip:  # CPU tensors: reading them waits for nothing
        return
    loaded().optimizer_update(
        _RULES[rule],
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


RULES = RawRules(_run)
