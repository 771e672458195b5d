"""Row softmax: a masked block per row, its size by a heuristic."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotloop.emulator import Launch, Module

from gallery.case import Case, Machine, Tensors, poison


@triton.heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["columns"])})
@triton.jit
def softmax(x, y, columns, stride_x, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride_x + column, mask=column < columns, other=-float("inf"))
    powers = tl.exp(values - tl.max(values, 0))
    tl.store(y + row * columns + column, powers / tl.sum(powers, 0), mask=column < columns)


def tensors(shape: tuple[int, ...]) -> Tensors:
    rows, columns = shape
    x = torch.randn(rows, columns + 3, generator=torch.Generator().manual_seed(0)) * 4
    return {"x": x[:, :columns], "y": poison(rows, columns, dtype=torch.float32)}


def launch_triton(t: Tensors) -> None:
    rows, columns = t["x"].shape
    softmax[(rows,)](t["x"], t["y"], columns, t["x"].stride(0))


def launch_cuda(module: Module, t: Tensors, machine: Machine) -> Launch:
    rows, columns = t["x"].shape
    return module.launch("softmax", (rows,), (128,), 0, [t["x"], t["y"], columns, t["x"].stride(0)], **machine)


CASE = Case(
    name="softmax",
    shapes=[(3, 7), (5, 130), (2, 1000)],
    tensors=tensors,
    formula=lambda t: {"y": torch.softmax(t["x"], -1)},
    launch_triton=launch_triton,
    launch_cuda=launch_cuda,
)
