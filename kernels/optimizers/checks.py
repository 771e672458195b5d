"""What every optimizer refuses, in words that name the parameter or the option."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import sharding
from hotloop.kernels.optimizers.state import STATE_DTYPES

DTYPES = (torch.float32, torch.bfloat16)


def check_parameter(name: str, p: Any) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(p).__name__}")
    if p.dtype not in DTYPES:
        raise TypeError(f"{name} is {p.dtype}: expected float32 or bfloat16")
    if p.layout != torch.strided:
        raise TypeError(f"{name} is a {type(p).__name__} of layout {p.layout}: expected a dense tensor")
    misplaced = sharding.placement_error(p) if sharding.is_sharded(p) else None
    if misplaced:
        raise ValueError(f"{name} (shape {tuple(p.shape)}) {misplaced}")


def check_options(group: dict[str, Any]) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.ndim != 0:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}: expected a number or a 0-dim tensor")
    elif not lr >= 0:
        raise ValueError(f"lr = {lr}: must not be negative")
    if not 0 <= group["weight_decay"] < math.inf:
        raise ValueError(f"weight_decay = {group['weight_decay']}: expected a finite number, at least 0")
    for name, allowed in (
        ("state_dtype", tuple(STATE_DTYPES)),
        ("master", (None, "float32")),
        ("rounding", ("nearest", "stochastic")),
    ):
        if group[name] not in allowed:
            raise ValueError(f"{name} = {group[name]!r}: expected one of {', '.join(map(repr, allowed))}")


def check_betas(betas: Any) -> None:
    if len(betas) != 2 or not all(isinstance(b, float | int) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas = {betas}: expected two numbers of at least 0 and below 1")
