"""What a kernel of the gallery must say of itself to be run on every target, shape and schedule."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import hotloop.emulator
from hotloop.emulator import Launch, Module
from hotloop.emulator.fixture import SCHEDULES

HERE = Path(__file__).parent
Tensors = dict[str, Tensor]
Machine = Mapping[str, Any]

__all__ = ["CUDA_TARGETS", "SCHEDULES", "TRITON_TARGETS", "Case", "Machine", "Tensors", "module", "poison"]

TRITON_TARGETS = ("sm_80", "sm_90", "sm_120")
CUDA_TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")


@dataclass(frozen=True)
class Case:
    name: str
    shapes: Sequence[tuple[int, ...]]  # ragged: no tile divides them
    tensors: Callable[[tuple[int, ...]], Tensors]  # inputs and outputs, outputs poisoned
    formula: Callable[[Tensors], Tensors]  # PyTorch's result, in the dtype of what it is given
    launch_triton: Callable[[Tensors], object] | None = None
    launch_cuda: Callable[[Module, Tensors, Machine], Launch] | None = None
    slack: float = 1e-6  # on top of PyTorch's own error, as a share of the largest value
    unordered: frozenset[str] = frozenset()  # outputs whose bits depend on the order of atomics

    def run(self, language: str, target: str, tensors: Tensors, machine: Machine) -> None:
        """Launches on `tensors`, in place. A report of a fault that Triton is not known for fails the test."""
        if language == "triton":
            assert self.launch_triton is not None
            with hotloop.emulator.triton(target, on_report="collect", **machine) as gpu:
                self.launch_triton(tensors)
            assert {report.kind for report in gpu.reports} <= known_faults(target), gpu.reports[0]
            assert gpu.counters["warp_instructions"] > 0
        else:
            assert self.launch_cuda is not None
            assert self.launch_cuda(module(self.name, target), tensors, machine).reports == []

    def check(self, given: Tensors, got: Tensors) -> None:
        """The error against float64 is no worse than twice PyTorch's in the kernel's dtypes, plus slack."""
        exact = self.formula({name: x.double() if x.is_floating_point() else x for name, x in given.items()})
        plain = self.formula(given)
        for name, right in exact.items():
            allowed = 2 * error(plain[name], right) + self.slack * right.double().abs().max().item()
            assert error(got[name], right) <= allowed, f"{self.name}: {name}"


def known_faults(target: str) -> set[str]:
    """Before 3.7.1 Triton fenced the first tiles of a pipelined loop only: those that cp.async brings later reach wgmma
    without a fence.proxy.async (triton-lang/triton #9610, #10537)."""
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:3])
    return {"proxy-fence"} if target == "sm_90" and version < (3, 7, 1) else set()


def error(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().nan_to_num(nan=torch.inf).item()


def poison(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype)


@functools.cache
def module(name: str, target: str, *defines: str) -> Module:
    return Module.from_cuda(HERE / f"{name}.cu", arch=target, defines=defines)
