"""Attention forward in bf16 with an online softmax, causal or not, and the log of each row's sum."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from hotloop.emulator import Launch, Module

from gallery.case import Case, Machine, Tensors, poison

D = 64
LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def attention(q, k, v, o, lse, T, scale, CAUSAL: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    head = tl.program_id(1).to(tl.int64) * T * D
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    dim = tl.arange(0, D)
    query = tl.load(q + head + row[:, None] * D + dim[None, :], mask=row[:, None] < T, other=0.0)
    highest = tl.full((BM,), -float("inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    out = tl.zeros((BM, D), tl.float32)
    end = tl.minimum((tl.program_id(0) + 1) * BM, T) if CAUSAL else T
    for first in tl.range(0, end, BN, num_stages=2):
        column = first + tl.arange(0, BN)
        key = tl.load(k + head + column[None, :] * D + dim[:, None], mask=column[None, :] < T, other=0.0)
        score = tl.dot(query, key) * (scale * LOG2_E)
        seen = column[None, :] < T
        if CAUSAL:
            seen &= row[:, None] >= column[None, :]
        score = tl.where(seen, score, -float("inf"))
        peak = tl.maximum(highest, tl.max(score, 1))
        weight = tl.exp2(score - peak[:, None])
        shrink = tl.exp2(highest - peak)
        total = total * shrink + tl.sum(weight, 1)
        value = tl.load(v + head + column[:, None] * D + dim[None, :], mask=column[:, None] < T, other=0.0)
        out = tl.dot(weight.to(tl.bfloat16), value, out * shrink[:, None])
        highest = peak
    tl.store(o + head + row[:, None] * D + dim[None, :], (out / total[:, None]).to(tl.bfloat16), mask=row[:, None] < T)
    tl.store(lse + tl.program_id(1) * T + row, (highest + tl.log2(total)) / LOG2_E, mask=row < T)


def tensors(shape: tuple[int, ...]) -> Tensors:
    heads, T, causal = shape
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(heads, T, D, generator=draw).bfloat16() for _ in range(3))
    o, lse = poison(heads, T, D, dtype=torch.bfloat16), poison(heads, T, dtype=torch.float32)
    return {"q": q, "k": k, "v": v, "o": o, "lse": lse, "causal": torch.tensor(causal)}


def formula(t: Tensors) -> Tensors:
    """Scores and their sums in float32 at least, as PyTorch's own kernels have them; weights in the dtype of v."""
    wide = torch.promote_types(t["q"].dtype, torch.float32)
    score = (t["q"].to(wide) @ t["k"].to(wide).mT) * D**-0.5
    if t["causal"]:
        score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
    return {"o": torch.softmax(score, -1).to(t["v"].dtype) @ t["v"], "lse": torch.logsumexp(score, -1)}


def launch_triton(t: Tensors) -> None:
    heads, T, _ = t["q"].shape
    tensors = (t["q"], t["k"], t["v"], t["o"], t["lse"])
    attention[triton.cdiv(T, 64), heads](*tensors, T, D**-0.5, CAUSAL=bool(t["causal"]), D=D, BM=64, BN=32, num_warps=4)


SHARED = (64 + 2 * 32) * D * 2


def launch_cuda(module: Module, t: Tensors, machine: Machine) -> Launch:
    heads, T, _ = t["q"].shape
    arguments = [t["q"], t["k"], t["v"], t["o"], t["lse"], T, int(t["causal"]), D**-0.5]
    return module.launch("attention", (-(-T // 64), heads), (128,), SHARED, arguments, **machine)


# Lengths that end a tile of keys at each of the 8 columns that a thread holds (4 groups of 2), and a tile of queries in
# each of its row groups, so that every bound of the kernels is met with equality once.
RAGGED = (2, 11, 18, 27, 35, 42, 51, 58)

CASE = Case(
    name="attention",
    shapes=[(2, 40, 1), (1, 100, 0), (1, 141, 1)],
    tensors=tensors,
    formula=formula,
    launch_triton=launch_triton,
    launch_cuda=launch_cuda,
)
