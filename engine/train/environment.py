"""What a run's bits depend on besides its recipe, and what is lost when it changes.

A resumed run equals the uninterrupted one bit for bit on the same machine, instruction set, thread count, versions,
backend choices, micro-batch and world size. Elsewhere it goes on, and says which of these has changed.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

# Field of `environment` -> why another value gives other bits.
CHANGES_BITS = {
    "hotloop": "kernels may compute in another order",
    "torch": "its kernels may compute in another order",
    "cuda": "its libraries may compute in another order",
    "cudnn": "its kernels may compute in another order",
    "architecture": "vector units differ",
    "cpu": "libraries choose code by CPU model",
    "instruction_set": "sums are split over vectors of another width",
    "extension": "the compiled backends were built by another compiler or choose other instructions",
    "threads": "sums are split over threads otherwise",
    "devices": "kernels and their schedules depend on the device",
    "matmul_precision": "float32 products are rounded otherwise",
    "deterministic": "torch may choose other kernels",
    "backends": "another backend computes in another order",
    "micro_batch": "gradients are summed in other groups",
    "world_size": "gradients are summed in other groups",
}

STILL_HOLDS = "from here on not bit-equal to an uninterrupted run; the global batches are the same"


def environment(
    *, backends: Mapping[str, str] | None = None, micro_batch: int | None = None, world_size: int = 1
) -> dict[str, Any]:
    """What `guarantee_lost` compares, and what a report prints: plain values that JSON keeps.

    backends: op -> name of the backend that serves it in this run.
    """
    cuda = torch.cuda.is_available()
    return {
        "hotloop": _version("hotloop"),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cpu": cpu_model(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "extension": extension(),
        "threads": torch.get_num_threads(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "backends": dict(sorted((backends or {}).items())),
        "micro_batch": micro_batch,
        "world_size": world_size,
    }


def guarantee_lost(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each difference between two environments that ends bit-equality; empty where it holds.

    >>> guarantee_lost({**here, "threads": 8}, {**here, "threads": 2})
    ['threads: 8 -> 2 (sums are split over threads otherwise): from here on not bit-equal to an uninterrupted run; ...']
    """
    return [
        f"{name}: {_show(saved.get(name))} -> {_show(now.get(name))} ({why}): {STILL_HOLDS}"
        for name, why in CHANGES_BITS.items()
        if saved.get(name) != now.get(name)
    ]


def cpu_model() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        names = {name.strip(): value.strip() for name, value in fields.items()}
        if "model name" in names:
            return names["model name"]
        if "CPU part" in names:  # arm64 gives numbers, not names
            return f"implementer {names.get('CPU implementer')} part {names['CPU part']}"
    return platform.processor() or platform.machine()


def extension() -> str | None:
    """Compiler and instruction sets of hotloop.kernels._C; None where it is not built."""
    try:
        from hotloop.kernels import _C
    except ImportError:
        return None
    return f"{_C.compiler()}; {' '.join(_C.instruction_sets())}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_show(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_show, value)) or "none"
    return "unknown" if value is None else str(value)
