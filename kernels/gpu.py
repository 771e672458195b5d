"""What backends ask of a GPU."""

from __future__ import annotations

from functools import cache

import torch


@torch.compiler.assume_constant_result
def lacking(index: int | None) -> str | None:
    """Why the CUDA device of this number does not run kernels for sm_80 and newer, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device on this machine"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    return None


@cache
def arch_of(device: torch.device) -> int:
    """80 for sm_80, and so on."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
