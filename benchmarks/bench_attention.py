"""Attention, dense and over packed documents, against scaled_dot_product_attention and flex_attention.

python benchmarks/bench_attention.py --out benchmarks/results/attention

OMP_NUM_THREADS=1 shows the kernels without the threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hotloop.kernels.attention import attention, attention_varlen
from hotloop.kernels.attention.arguments import options_of
from hotloop.kernels.attention.op import TABLE
from hotloop.kernels.attention.options import Call

from harness.case import Case, Provider, Results, by_backend, no_worse_than, simple
from harness.command import bench, ids, main
from harness.measure import device

EAGER = "torch SDPA"
C = 64  # head dimension
LENGTHS = (57, 301, 12, 128, 77, 449, 256, 30, 190, 260, 97, 191)  # documents of a packed case: 2,048 positions
SHORT = (
    9, 140, 61, 33, 75, 118, 20, 47, 101, 66, 88, 14, 52, 203, 39, 70, 27, 96, 58, 110, 43, 81, 16, 64, 125, 35, 72, 90,
    49, 46,
)  # fmt: skip


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


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """(B, T, H, C) in and out; a mask says all there is to say."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None).transpose(1, 2)


def in_fp64(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], mode: str, do: Tensor, qkv: tuple[Tensor, ...]
) -> Results:
    return step(call, mode, do.double(), *(x.detach().double().requires_grad_() for x in qkv))


# --- dense ---


def dense_case(
    B: int,
    T: int,
    dtype: torch.dtype,
    mode: str,
    everything: bool,
    *,
    H: int = 6,
    causal: bool = True,
) -> Case:
    products = 2 if mode == "forward" else 7  # q k', p v; then q k' again, do v', dq, dk, dv
    peer = partial(sdpa, causal=causal)

    def providers() -> dict[str, Callable[[], Provider]]:
        do, qkv = inputs_of(B, T, H, C, dtype=dtype)

        def run(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Results]:
            return partial(step, call, mode, do, *qkv)

        options = options_of(qkv[0], T, T, causal, (None, None), None, None, 0.0)
        arguments = (Call(*qkv, None, None, None, None, None, options), False)
        own = run(lambda q, k, v: attention(q, k, v, causal=causal))
        found = by_backend(TABLE, arguments, own, reference=everything)
        found[EAGER] = simple(run(peer))
        found["torch compile"] = simple(run(torch.compile(peer)))
        return found

    def truth() -> Results:
        return in_fp64(peer, mode, *inputs_of(B, T, H, C, dtype=dtype))

    config = {"B": B, "H": H, "D": C, "causal": causal, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        kernel_name="attention", mode=mode, x=("T", "context", T),
        config=config, providers=providers, gate=no_worse_than(EAGER, truth, dtype),
        work=products * 2 * B * H * C * (T * (T + 1) // 2 if causal else T * T), unit="FLOP", dtype=dtype,
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


def flex(lengths: tuple[int, ...]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """PyTorch's compiled flex_attention, causal within each document."""
    total = sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device())

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == document[j]) & (i >= j)

    mask = create_block_mask(visible, None, None, total, total, device=device().type)
    compiled = torch.compile(flex_attention)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled(*(x.detach()[None].transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)[0]

    return call


def packed_case(
    lengths: tuple[int, ...],
    dtype: torch.dtype,
    mode: str,
    everything: bool,
    *,
    H: int = 6,
) -> Case:
    pairs, total, longest = sum(n * (n + 1) // 2 for n in lengths), sum(lengths), max(lengths)
    by_document = partial(each_document, lengths)

    def providers() -> dict[str, Callable[[], Provider]]:
        do, qkv = inputs_of(total, H, C, dtype=dtype)
        cu_seqlens = torch.tensor(boundaries(lengths), dtype=torch.int32, device=device())
        mask = document_mask(lengths)

        def run(call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], Results]:
            return partial(step, call, mode, do, *qkv)

        def own(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention_varlen(q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=longest, causal=True)

        def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q[None], k[None], v[None], mask)[0]

        options = options_of(qkv[0], longest, longest, True, (None, None), None, None, 0.0)
        arguments = (Call(*qkv, cu_seqlens, cu_seqlens, None, None, None, options), False)
        found = by_backend(TABLE, arguments, run(own), reference=everything)
        found["torch SDPA, dense mask"] = simple(run(masked))
        found["torch SDPA, document by document"] = simple(run(by_document))
        if mode == "forward":  # flex_attention has no backward on the CPU
            found["torch compile, flex_attention"] = simple(run(flex(lengths)))
        return found

    def truth() -> Results:
        return in_fp64(by_document, mode, *inputs_of(total, H, C, dtype=dtype))

    config = {"documents": len(lengths), "H": H, "D": C, "causal": True, "dtype": str(dtype).removeprefix("torch.")}
    return Case(
        kernel_name="attention_varlen", mode=mode, x=("T", "positions", total),
        config=config, providers=providers, gate=no_worse_than("torch SDPA, document by document", truth, dtype),
        work=(2 if mode == "forward" else 7) * 2 * H * C * pairs, unit="FLOP", dtype=dtype,
    )  # fmt: skip


def cases(everything: bool) -> Iterator[Case]:
    shapes = [(8, 256), (1, 2048), *([(2, 1024), (1, 4096)] if everything else [])]
    for dtype in (torch.float32, torch.bfloat16):
        for mode in ("forward", "full"):
            for B, T in shapes:
                yield dense_case(B, T, dtype, mode, everything)
            yield packed_case(LENGTHS, dtype, mode, everything)
            if everything:
                for causal in (True, False):
                    yield dense_case(2, 1024, dtype, mode, False, H=8, causal=causal)
                    yield dense_case(4, 2048, dtype, mode, False, H=8, causal=causal)
                yield packed_case(SHORT, dtype, mode, False, H=8)


SMALL = list(cases(False))


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_attention(benchmark, case: Case) -> None:
    bench(benchmark, case)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
