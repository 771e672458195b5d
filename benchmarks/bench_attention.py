"""Attention, dense and over packed documents, against scaled_dot_product_attention.

python benchmarks/bench_attention.py --out benchmarks/results/attention
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.attention import attention, attention_varlen
from hotloop.kernels.attention.arguments import options_of
from hotloop.kernels.attention.op import TABLE

from harness.case import Case, Provider, Results, by_backend, no_worse_than, simple
from harness.command import bench, ids, main
from harness.measure import device

EAGER = "torch SDPA"
H, C = 6, 64  # heads, head dimension
LENGTHS = (57, 301, 12, 128, 77, 449, 256, 30, 190, 260, 97, 191)  # documents of the packed case: 2,048 positions


def step(call: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str, upstream: Tensor, *inputs: Tensor) -> Results:
    """forward: the output, under no_grad. full: the output and fresh gradients of q, k, v."""
    if mode == "forward":
        with torch.no_grad():
            return (call(*inputs),)
    o = call(*inputs)
    return (o.detach(), *torch.autograd.grad(o, inputs, upstream))


def inputs_of(*shape: int, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The upstream gradient, and q, k, v."""
    draw = torch.Generator().manual_seed(0)
    do, q, k, v = (torch.randn(shape, generator=draw).to(device(), dtype) for _ in range(4))
    return do, (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B, T, H, C) in and out, causal without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None).transpose(1, 2)


def in_fp64(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str, do: Tensor, qkv: tuple[Tensor, ...]
) -> Results:
    return step(call, mode, do.double(), *(x.detach().double().requires_grad_() for x in qkv))


# --- dense ---


def dense_providers(
    B: int, T: int, dtype: torch.dtype, mode: str, everything: bool
) -> dict[str, Callable[[], Provider]]:
    do, qkv = inputs_of(B, T, H, C, dtype=dtype)
    options = options_of(qkv[0], T, T, True, (None, None), None, None, 0.0)
    arguments = (*qkv, None, None, None, None, options, False)
    own = partial(step, lambda q, k, v: attention(q, k, v, causal=True), mode, do, *qkv)
    found = by_backend(TABLE, arguments, own, reference=everything)
    found[EAGER] = simple(partial(step, sdpa, mode, do, *qkv))
    found["torch compile"] = simple(partial(step, torch.compile(sdpa), mode, do, *qkv))
    return found


def dense_case(B: int, T: int, dtype: torch.dtype, mode: str, everything: bool) -> Case:
    products = 2 if mode == "forward" else 7  # q k', p v; then q k' again, do v', dq, dk, dv

    def truth() -> Results:
        return in_fp64(sdpa, mode, *inputs_of(B, T, H, C, dtype=dtype))

    return Case(
        kernel_name="attention", mode=mode, x=("T", "context", T),
        config={"B": B, "H": H, "D": C, "causal": True, "dtype": str(dtype).removeprefix("torch.")},
        providers=lambda: dense_providers(B, T, dtype, mode, everything),
        gate=no_worse_than(EAGER, truth, dtype),
        work=products * 2 * B * H * C * (T * (T + 1) // 2), unit="FLOP", dtype=dtype,
    )  # fmt: skip


# --- packed ---


def document_mask(lengths: tuple[int, ...]) -> Tensor:
    """(T, T): causal within each document."""
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document[:, None] == document).tril().to(device())


def boundaries(lengths: tuple[int, ...]) -> list[int]:
    return [sum(lengths[:i]) for i in range(len(lengths) + 1)]


def each_document(lengths: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    parts = [sdpa(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in pairwise(boundaries(lengths))]
    return torch.cat(parts)


def packed_providers(dtype: torch.dtype, mode: str, everything: bool) -> dict[str, Callable[[], Provider]]:
    total, longest = sum(LENGTHS), max(LENGTHS)
    do, qkv = inputs_of(total, H, C, dtype=dtype)
    cu_seqlens = torch.tensor(boundaries(LENGTHS), dtype=torch.int32, device=device())
    mask = document_mask(LENGTHS)

    def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, causal=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q[None], k[None], v[None], mask)[0]

    options = options_of(qkv[0], longest, longest, True, (None, None), None, None, 0.0)
    arguments = (*qkv, cu_seqlens, cu_seqlens, None, None, options, False)
    found = by_backend(TABLE, arguments, partial(step, own, mode, do, *qkv), reference=everything)
    found["torch SDPA, dense mask"] = simple(partial(step, masked, mode, do, *qkv))
    found["torch SDPA, document by document"] = simple(partial(step, partial(each_document, LENGTHS), mode, do, *qkv))
    return found


def packed_case(dtype: torch.dtype, mode: str, everything: bool) -> Case:
    pairs = sum(n * (n + 1) // 2 for n in LENGTHS)

    def truth() -> Results:
        return in_fp64(partial(each_document, LENGTHS), mode, *inputs_of(sum(LENGTHS), H, C, dtype=dtype))

    return Case(
        kernel_name="attention_varlen", mode=mode, x=("T", "positions", sum(LENGTHS)),
        config={"documents": len(LENGTHS), "H": H, "D": C, "causal": True, "dtype": str(dtype).removeprefix("torch.")},
        providers=lambda: packed_providers(dtype, mode, everything),
        gate=no_worse_than("torch SDPA, document by document", truth, dtype),
        work=(2 if mode == "forward" else 7) * 2 * H * C * pairs, unit="FLOP", dtype=dtype,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    shapes = [(8, 256), (1, 2048), *([(2, 1024), (1, 4096)] if everything else [])]
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("forward", "full"):
            for B, T in shapes:
                yield dense_case(B, T, dtype, mode, everything)
            yield packed_case(dtype, mode, everything)


SMALL = list(cases(False))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_attention(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
