"""The norm of all gradients, which clipping and the finite check read."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import cpu, cuda, platform, reference, sharding, triton
from hotloop.kernels.optimizers.tables import DeviceTables

GRAD_NORM = Table(
    "grad_norm",
    Backend("cpu", cpu.supports_sum_of_squares, cpu.sum_of_squares),
    Backend("torch", platform.supports_sum_of_squares, platform.sum_of_squares),
    Backend("cuda", cuda.supports_sum_of_squares, cuda.sum_of_squares),
    Backend("triton", triton.supports_sum_of_squares, triton.sum_of_squares),
    Backend("reference", reference.supports_sum_of_squares, reference.sum_of_squares),
)
# As `torch.nn.utils.clip_grad_norm_` has it.
EPS = 1e-6


def sum_of_squares(
    params: list[Tensor], device: torch.device, chosen: dict[tuple[Any, ...], Backend], kept: DeviceTables
) -> Tensor:
    """Over all gradients and ranks, () fp64 on the device. Ranks sum their own rows, then add in their order.

    chosen: the backends of an optimizer's steps so far, where the one for each device is noted.
    """
    alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        alike[p.device, sharding.ranks_of(p)].append(sharding.local(p.grad))
    total = torch.zeros((), dtype=torch.float64, device=device)
    for (place, ranks), grads in alike.items():
        key = (GRAD_NORM.op, place)
        if key not in chosen:
            chosen[key] = GRAD_NORM.choose(grads)
        squares = sharding.sum_over_ranks(chosen[key].forward(grads, kept), ranks)
        total = total + squares.to(device, non_blocking=True)
    return total
