"""Launches of the CUDA C++ kernels in hotloop.kernels._C."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.extension import loaded, missing


def supports_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"serves cuda tensors, got {device.type}"
    if (reason := missing()) is not None:
        return reason
    if not loaded().cuda_architectures():
        return "hotloop.kernels._C has no CUDA code: install hotloop again where nvcc is, with HOTLOOP_BUILD_CUDA=all"
    return None


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel's name and shape, and its arguments in order: tensors, None for a null pointer, bytes."""

    kernel: str
    grid: tuple[int, int]
    block: int
    shared: int  # bytes
    arguments: Mapping[str, Any]

    def run(self, device: torch.device) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        packed = [as_bytes(x) for x in self.arguments.values()]
        with torch.cuda.device(device):
            loaded().cuda_launch(self.kernel, *self.grid, self.block, self.shared, packed, stream)


def as_bytes(argument: Tensor | bytes | None) -> bytes:
    if isinstance(argument, bytes):
        return argument
    return (0 if argument is None else argument.data_ptr()).to_bytes(8, "little")
