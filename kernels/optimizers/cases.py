"""Drawn cases of the element-wise optimizers, and what their tests compare."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers.adamw import AdamW
from hotloop.kernels.optimizers.base import BaseOptimizer
from hotloop.kernels.optimizers.lion import Lion
from hotloop.kernels.optimizers.sgd import SGD

RULES: dict[str, tuple[type[BaseOptimizer], dict[str, Any]]] = {
    "adamw": (AdamW, {"weight_decay": 0.1, "betas": (0.9, 0.99)}),
    "lion": (Lion, {"weight_decay": 0.1}),
    "sgd": (SGD, {"weight_decay": 0.1}),
    "momentum": (SGD, {"weight_decay": 0.1, "momentum": 0.9}),
    "nesterov": (SGD, {"weight_decay": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
}
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype, str | None]] = {
    "fp32": (torch.float32, torch.float32, None),
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "bf16, master": (torch.bfloat16, torch.bfloat16, "float32"),
    "bf16, master, fp32 gradients": (torch.bfloat16, torch.float32, "float32"),
}


def bits(x: Tensor) -> Tensor:
    return x.reshape(-1).contiguous().view(torch.uint8)


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(bits(a), bits(b)), f"tensor {i} {tuple(a.shape)} {a.dtype}"
