"""The dtype policy of a run, explicit and without autocast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """dtype of parameters and activations, and how the optimizer keeps what that dtype cannot hold."""

    name: str
    dtype: torch.dtype
    master: Literal["float32"] | None
    rounding: Literal["nearest", "stochastic"]


POLICIES = {
    "fp32": Precision("fp32", torch.float32, None, "nearest"),
    "bf16": Precision("bf16", torch.bfloat16, "float32", "nearest"),
    "bf16_stochastic": Precision("bf16_stochastic", torch.bfloat16, None, "stochastic"),
}


def resolve(name: str, device: torch.device) -> Precision:
    """The policy of a recipe's train.precision; `auto` is bf16 where the device multiplies it natively."""
    if name == "auto":
        name = "bf16" if multiplies_bf16(device) else "fp32"
    return POLICIES[name]


def multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # oneDNN runs bf16 on any AVX-512 machine, but only these instructions make it faster than fp32.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def accumulate_in_fp32(module: nn.Module) -> None:
    """Let the gradients of bf16 parameters be summed over micro-batches and ranks in fp32."""
    for parameter in module.parameters():
        if parameter.dtype != torch.float32:
            parameter.grad_dtype = torch.float32
