"""Matrix product in bf16 with float32 sums, tiles by autotuning, copies ahead of use."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hotloop.emulator import Launch, Module

from gallery.case import Case, Machine, Tensors, poison


@triton.autotune(
    configs=[
        triton.Config({"BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3),
        triton.Config({"BM": 32, "BN": 32, "BK": 64}, num_warps=2, num_stages=2),
    ],
    key=["M", "N", "K"],
)
@triton.jit
def matmul(a, b, c, M, N, K, stride_a, stride_b, stride_c, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        depth = first + k
        left = tl.load(a + m[:, None] * stride_a + depth[None, :], (m[:, None] < M) & (depth[None, :] < K), other=0.0)
        right = tl.load(b + depth[:, None] * stride_b + n[None, :], (depth[:, None] < K) & (n[None, :] < N), other=0.0)
        total = tl.dot(left, right, total)
    place = c + m[:, None] * stride_c + n[None, :]
    tl.store(place, total.to(tl.bfloat16), (m[:, None] < M) & (n[None, :] < N))


def tensors(shape: tuple[int, ...]) -> Tensors:
    M, N, K = shape
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=draw).bfloat16(), torch.randn(K, N, generator=draw).bfloat16()
    return {"a": a, "b": b, "c": poison(M, N, dtype=torch.bfloat16)}


def launch_triton(t: Tensors) -> None:
    (M, K), N = t["a"].shape, t["b"].shape[1]

    def grid(meta: dict[str, int]) -> tuple[int, int]:
        return triton.cdiv(M, meta["BM"]), triton.cdiv(N, meta["BN"])

    matmul[grid](t["a"], t["b"], t["c"], M, N, K, t["a"].stride(0), t["b"].stride(0), t["c"].stride(0))


def launch_cuda(module: Module, t: Tensors, machine: Machine) -> Launch:
    (M, K), N = t["a"].shape, t["b"].shape[1]
    grid = (-(-N // 64), -(-M // 64))
    return module.launch("matmul", grid, (128,), 4 * 64 * 64 * 2, [t["a"], t["b"], t["c"], M, N, K], **machine)


CASE = Case(
    name="matmul",
    shapes=[(40, 24, 72), (72, 136, 40), (65, 80, 272)],
    tensors=tensors,
    formula=lambda t: {"c": t["a"] @ t["b"]},
    launch_triton=launch_triton,
    launch_cuda=launch_cuda,
)
