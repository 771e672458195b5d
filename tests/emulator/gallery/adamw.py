"""One AdamW step: bf16 parameter and gradient, float32 master weight and moments, in place."""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hotloop.emulator import Launch, Module

from gallery.case import Case, Machine, Tensors, poison


class Step(NamedTuple):
    lr: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    correction1: float = 1 / (1 - 0.9**3)
    correction2: float = 1 / (1 - 0.95**3)


@triton.jit
def adamw(p, w, m, v, g, n, step, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    gradient = tl.load(g + i, inside).to(tl.float32)
    weight, m1, m2 = tl.load(w + i, inside), tl.load(m + i, inside), tl.load(v + i, inside)
    m1 = step.beta1 * m1 + (1 - step.beta1) * gradient
    m2 = step.beta2 * m2 + (1 - step.beta2) * gradient * gradient
    change = m1 * step.correction1 / (tl.sqrt_rn(m2 * step.correction2) + step.eps) + step.weight_decay * weight
    weight = weight - step.lr * change
    tl.store(w + i, weight, inside)
    tl.store(m + i, m1, inside)
    tl.store(v + i, m2, inside)
    tl.store(p + i, weight.to(tl.bfloat16), inside)


def tensors(shape: tuple[int, ...]) -> Tensors:
    (n,) = shape
    draw = torch.Generator().manual_seed(0)
    w, m, g = (torch.randn(n, generator=draw) for _ in range(3))
    v = torch.rand(n, generator=draw)
    return {"p": poison(n, dtype=torch.bfloat16), "w": w, "m": m, "v": v, "g": g.bfloat16()}


def formula(t: Tensors) -> Tensors:
    s, g = Step(), t["g"].to(t["w"].dtype)
    m = s.beta1 * t["m"] + (1 - s.beta1) * g
    v = s.beta2 * t["v"] + (1 - s.beta2) * g * g
    w = t["w"] - s.lr * (m * s.correction1 / ((v * s.correction2).sqrt() + s.eps) + s.weight_decay * t["w"])
    return {"p": w.to(t["p"].dtype), "w": w, "m": m, "v": v}


NAMES = ("p", "w", "m", "v", "g")


def launch_triton(t: Tensors) -> None:
    n = t["w"].numel()
    adamw[(triton.cdiv(n, 1024),)](*(t[name] for name in NAMES), n, Step(), BLOCK=1024)


def launch_cuda(module: Module, t: Tensors, machine: Machine) -> Launch:
    n = t["w"].numel()
    arguments = [*(t[name] for name in NAMES), n, struct.pack("<7f", *Step())]
    return module.launch("adamw", (-(-n // 1024),), (128,), 0, arguments, **machine)


CASE = Case(
    name="adamw",
    shapes=[(5,), (1027,), (2500,)],
    tensors=tensors,
    formula=formula,
    launch_triton=launch_triton,
    launch_cuda=launch_cuda,
)
