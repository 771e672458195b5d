"""The sum of squares by float atomics (any order) and by the program that ends last (one order); a histogram."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotloop.emulator import Launch, Module

from gallery.case import Case, Machine, Tensors, poison

BLOCK = 256


@triton.jit
def sum_of_squares(x, n, unordered, ordered, partial, arrived, exponents, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    exponent = (value.to(tl.int32, bitcast=True) >> 23) & 255
    tl.atomic_add(exponents + exponent, 1, mask=i < n, sem="relaxed")
    total = tl.sum(value * value, 0)
    tl.atomic_add(unordered, total, sem="relaxed")
    tl.store(partial + tl.program_id(0), total)
    last = tl.num_programs(0) - 1
    if tl.atomic_add(arrived, 1, sem="acq_rel") == last:
        part = tl.arange(0, PARTS)
        parts = tl.load(partial + part, mask=part <= last, other=0.0)
        tl.store(ordered, tl.sum(parts, 0))
        tl.store(arrived, 0)


def tensors(shape: tuple[int, ...]) -> Tensors:
    (n,) = shape
    return {
        "x": torch.randn(n, generator=torch.Generator().manual_seed(0)),
        "unordered": torch.zeros(1),
        "ordered": poison(1, dtype=torch.float32),
        "partial": poison(64, dtype=torch.float32),
        "arrived": torch.zeros(1, dtype=torch.int32),
        "exponents": torch.zeros(256, dtype=torch.int32),
    }


def formula(t: Tensors) -> Tensors:
    total = t["x"].square().sum(0, keepdim=True)
    exponent = (t["x"].float().view(torch.int32) >> 23) & 255
    return {
        "unordered": total,
        "ordered": total,
        "arrived": torch.zeros(1),
        "exponents": torch.bincount(exponent, minlength=256),
    }


NAMES = ("unordered", "ordered", "partial", "arrived", "exponents")


def launch_triton(t: Tensors) -> None:
    n = t["x"].numel()
    outputs = [t[name] for name in NAMES]
    sum_of_squares[(triton.cdiv(n, BLOCK),)](t["x"], n, *outputs, BLOCK=BLOCK, PARTS=64, num_warps=4)


def launch_cuda(module: Module, t: Tensors, machine: Machine) -> Launch:
    n = t["x"].numel()
    arguments = [t["x"], n, *(t[name] for name in NAMES)]
    return module.launch("sum_of_squares", (min(-(-n // BLOCK), 5),), (128,), 0, arguments, **machine)


CASE = Case(
    name="reduction",
    shapes=[(100,), (1111,), (2999,)],
    tensors=tensors,
    formula=formula,
    launch_triton=launch_triton,
    launch_cuda=launch_cuda,
    unordered=frozenset({"unordered", "partial"}),
)
