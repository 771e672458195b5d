"""The C++ backend of attention on every instruction set: all options and head sizes, its memory, its threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hotloop.kernels import _C
from hotloop.kernels.attention import attention, attention_varlen_with_lse, attention_with_lse, cpu
from hotloop.kernels.attention.op import ops
from hotloop.kernels.attention.options import Call, Options
from hotloop.kernels.attention.reference import dropout_keep
from hotloop.kernels.dispatch import BackendError, use_backend
from hotloop.kernels.testing import assert_no_worse

HAS = {
    "baseline": True,
    "avx2": "avx2" in _C.instruction_sets(),
    "avx512": "avx512f" in _C.instruction_sets(),
    "avx512_bf16": "avx512_bf16" in _C.instruction_sets(),
}
EVERYTHING: dict[str, Any] = {"softcap": 5.0, "alibi": True, "sinks": True, "dropout_p": 0.3, "seed": 2**40 + 5}
OPTIONS: tuple[dict[str, Any], ...] = (
    {"causal": True},
    {"window_size": (17, 9), "sinks": True},
    {"softcap": 2.0, "scale": 0.3},
    {"alibi": True, "causal": True, "window_size": (70, None)},
    {"scale": -0.2},
    {"scale": 0.0, "causal": True},
    {"dropout_p": 0.4, "seed": 7},
    {"causal": True, **EVERYTHING},
)


@pytest.fixture(params=HAS)
def instruction_set(request) -> Iterator[str]:
    if not HAS[request.param]:
        pytest.skip(f"this CPU has no {request.param}")
    _C.force_instruction_set(request.param)
    yield request.param
    _C.force_instruction_set("")


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def composed(
    q: Tensor, k: Tensor, v: Tensor, *, causal=False, window_size=(None, None), scale=None, softcap=None,
    alibi_slopes=None, sinks=None, dropout_p=0.0, seed=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in PyTorch, products and probabilities in the dtype of q; every query sees a key."""
    (B, Tq, Hq, D), Tk = q.shape, k.shape[1]
    q, k, v = (x.transpose(1, 2).repeat_interleave(Hq // x.shape[2], 1) for x in (q, k, v))
    distance = torch.arange(Tk) - (torch.arange(Tq)[:, None] + Tk - Tq)
    left, right = (math.inf if side is None else side for side in window_size)
    hidden = (distance > (0 if causal else right)) | (distance < -left)
    wide = torch.promote_types(q.dtype, torch.float32)
    s = (q @ k.mT).to(wide) * (D**-0.5 if scale is None else scale)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = s if alibi_slopes is None else s - alibi_slopes.to(wide)[..., None, None] * distance.abs()
    s = s.masked_fill(hidden, -math.inf)
    lse = torch.logsumexp(s, -1)
    lse = lse if sinks is None else torch.logaddexp(lse, sinks.to(wide)[:, None])
    p = torch.exp(s - lse[..., None])
    if dropout_p > 0:
        p = p * dropout_keep(torch.tensor(seed), torch.arange(B), Hq, Tq, Tk, dropout_p) / (1 - dropout_p)
    return (p.to(q.dtype) @ v).transpose(1, 2), lse


Shape = tuple[int, int, int, int, int, int]
"""B, Tq, Tk, Hq, Hk, D"""


def results(
    f: Any, rounded: torch.dtype, computed: torch.dtype, shape: Shape, *, alibi=False, sinks=False, **options: Any
) -> dict[str, Tensor]:
    """o, lse and all gradients of f, from inputs that are rounded to one dtype and given in another."""
    B, Tq, Tk, Hq, Hk, D = shape
    draws = {"q": (B, Tq, Hq, D), "k": (B, Tk, Hk, D), "v": (B, Tk, Hk, D)}
    draws |= {"alibi_slopes": (B, Hq)} if alibi else {}
    draws |= {"sinks": (Hq,)} if sinks else {}
    inputs = {name: drawn(*size, seed=i, dtype=rounded) for i, (name, size) in enumerate(draws.items())}
    if alibi:
        inputs["alibi_slopes"] = inputs["alibi_slopes"].abs() / 8
    inputs = {name: x.to(computed).requires_grad_() for name, x in inputs.items()}
    do, dlse = drawn(B, Tq, Hq, D, seed=6, dtype=rounded).to(computed), drawn(B, Hq, Tq, seed=7)
    o, lse = f(**inputs, **options)
    gradients = torch.autograd.grad((o, lse), list(inputs.values()), (do, dlse.to(lse.dtype)))
    return {"o": o.detach(), "lse": lse.detach(), **dict(zip((f"d{n}" for n in inputs), gradients, strict=True))}


def check(dtype: torch.dtype, shape: Shape, options: dict[str, Any], instruction_set: str = "") -> None:
    factor = 2.0 if instruction_set == "baseline" else 1.25  # without fma each term is rounded twice, PyTorch's once
    truth = results(composed, dtype, torch.float64, shape, **options)
    same = results(composed, dtype, dtype, shape, **options)
    with use_backend("cpu"):
        ours = results(attention_with_lse, dtype, dtype, shape, **options)
    for name, x in ours.items():
        assert_no_worse(x, same[name], truth[name], name=f"{name} {dtype} {shape} {options}", factor=factor, ulps=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_option(instruction_set: str, dtype: torch.dtype) -> None:
    for options in OPTIONS:
        check(dtype, (2, 70, 150, 4, 2, 24), options, instruction_set)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_head_size(instruction_set: str, dtype: torch.dtype) -> None:
    """Less than a vector, vectors and a half, an odd number of them, the largest."""
    for D in (8, 16, 40, 80, 128, 512):
        check(dtype, (1, 66, 131, 2, 1, D), {"causal": True}, instruction_set)


@pytest.mark.parametrize("lengths", [(1, 1), (15, 17), (64, 64), (128, 129), (129, 300), (250, 700)], ids=str)
def test_lengths_around_the_blocks(lengths: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for options in ({}, {"causal": True}, {"window_size": (40, 3)}):
            if lengths != (1, 1):  # o is the value there, and dq the difference of equal numbers
                check(dtype, (1, *lengths, 2, 2, 32), options)


def packed_call(dtype: torch.dtype, lengths: list[int], heads: tuple[int, int], **options: Any) -> list[Tensor]:
    total, (Hq, Hk) = sum(lengths) + 3, heads
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    q, do = (drawn(total, Hq, 16, seed=s, dtype=dtype) for s in (1, 4))
    k, v = (drawn(total, Hk, 16, seed=s, dtype=dtype) for s in (2, 3))
    slopes, sinks = drawn(len(lengths), Hq, seed=5).abs(), drawn(Hq, seed=6)
    inputs = [x.requires_grad_() for x in (q, k, v, slopes, sinks)]
    with use_backend("cpu"):
        o, lse = attention_varlen_with_lse(
            q, k, v, cu_seqlens_q=cu_seqlens, alibi_slopes=slopes, sinks=sinks, **options
        )
        seen = lse.detach().masked_fill(lse == -math.inf, 0)
        return [o.detach(), seen, *torch.autograd.grad((o, lse), inputs, (do, seen))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[700], [1, 0, 300, 64, 129, 5] * 3], ids=["few long", "many short"])
def test_threads_do_not_matter(lengths: list[int], dtype: torch.dtype) -> None:
    """Few long segments are split over tasks that add up dq; of many short ones each thread packs its own keys."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(packed_call(dtype, lengths, (2, 1), causal=True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_memory(instruction_set: str, dtype: torch.dtype, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace full of NaN gives the same bits as one full of zeros, and nothing is written behind it."""
    lengths = [520] if split else [70, 0, 33, 128] * 4
    found = []
    for byte in (0, 255):
        rooms: list[Tensor] = []

        def room(size: int, rooms: list[Tensor] = rooms, byte: int = byte) -> Tensor:
            rooms.append(torch.full((size + 4096,), byte, dtype=torch.uint8))
            return rooms[-1]

        monkeypatch.setattr(cpu, "_room", room)
        found.append(packed_call(dtype, lengths, (2, 1), causal=True, window_size=(100, None)))
        assert len(rooms) == 2
        assert all((room[-4096:] == byte).all() for room in rooms)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_nothing_is_read_or_written_outside(instruction_set: str) -> None:
    """Heads of a wider buffer full of NaN, results in the middle of another one."""
    T, H, D = 37, 2, 24
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        around = torch.full((3, T, H + 2, D + 16), math.nan, dtype=dtype)
        q, k, v = (around[i, :, 1:-1, 8:-8] for i in range(3))
        for i, x in enumerate((q, k, v)):
            x.copy_(drawn(T, H, D, seed=i, dtype=dtype))
        room = torch.full((T * H * D + 128,), 3.0, dtype=dtype)
        lse_room = torch.full((H * T + 128,), 3.0)
        o, lse = room[64:-64].view(T, H, D), lse_room[64:-64].view(H, T)
        cu_seqlens = torch.tensor([0, 20, 35], dtype=torch.int32)
        options = Options(T, T, -1, 0, 0.2, 0.0, 0.0)
        call = cpu._Arguments(Call(q, k, v, cu_seqlens, cu_seqlens, None, None, None, options), o, lse)
        workspace = torch.empty(_C.attention_forward_workspace(call.problem, 1), dtype=torch.uint8)
        _C.attention_forward(call.problem, call.numbers, workspace.data_ptr(), 1)
        assert o.isfinite().all()
        assert not o[35:].any()
        assert (lse[:, 35:] == -math.inf).all()
        assert (room[:64] == 3).all()
        assert (room[-64:] == 3).all()
        assert (lse_room[:64] == 3).all()
        assert (lse_room[-64:] == 3).all()


def test_each_gradient_alone() -> None:
    """What is not needed is not computed, and what is has the same bits."""
    q, do = (drawn(2, 70, 4, 16, seed=s) for s in (1, 4))
    k, v = (drawn(2, 90, 2, 16, seed=s) for s in (2, 3))
    slopes, sinks = drawn(4, seed=5).abs(), drawn(4, seed=6)
    options = (70, 90, -1, 0, 0.25, 3.0, 0.0)
    o, lse = ops.attention_forward(q, k, v, None, None, slopes, sinks, None, *options, "cpu")
    saved = (do, torch.ones_like(lse), q, k, v, o, lse, None, None, slopes, sinks, None, *options, "cpu")
    whole = ops.attention_backward(*saved, [True] * 5)
    assert all(x.any() for x in whole)
    for i in range(5):
        alone = ops.attention_backward(*saved, [i == j for j in range(5)])
        assert torch.equal(alone[i], whole[i])
        assert all(x.numel() == 0 for j, x in enumerate(alone) if i != j)


def test_values_at_the_ends() -> None:
    """Scores far apart, probabilities that vanish; NaN and infinities as in fp64, in queries that see them."""
    q, k, v = (drawn(1, 80, 2, 16, seed=s) for s in (1, 2, 3))
    for factor in (1e-30, 1e-4, 1e2, 1e4):
        with use_backend("cpu"):
            o, lse = attention_with_lse(q * factor, k * factor, v, causal=True)
        with use_backend("reference"):
            truth = attention_with_lse((q * factor).double(), (k * factor).double(), v.double(), causal=True)
            same = attention_with_lse(q * factor, k * factor, v, causal=True)
        assert_no_worse(o, same.o, truth.o, name=f"o, factor {factor}", ulps=4)
        assert_no_worse(lse, same.lse, truth.lse, name=f"lse, factor {factor}", ulps=4)
    for value in (math.nan, math.inf):
        for x in (q, k, v):
            before = x[0, 50, 1, 3].item()
            x[0, 50, 1, 3] = value
            with use_backend("cpu"):
                o, lse = attention_with_lse(q, k, v, causal=True)
            with use_backend("reference"):
                truth = attention_with_lse(q.double(), k.double(), v.double(), causal=True)
            x[0, 50, 1, 3] = before
            assert torch.equal(o[:, 50:].isfinite(), truth.o[:, 50:].isfinite())
            assert torch.equal(lse.isnan(), truth.lse.isnan())
            assert torch.equal(lse.isinf(), truth.lse.isinf())


def test_memory_is_linear_in_the_length() -> None:
    def sizes(T: int) -> list[int]:
        x = torch.empty(1, 1, 2, 64).expand(1, T, 2, 64)
        options = Options(T, T, -1, 0, 1.0, 0.0, 0.0)
        call = cpu._Arguments(Call(x, x, x, None, None, None, None, None, options), x, x)
        return [f(call.problem, 2) for f in (_C.attention_forward_workspace, _C.attention_backward_workspace)]

    bytes_of_q = 65_536 * 2 * 64 * 4
    for short, long in zip(sizes(32_768), sizes(65_536), strict=True):
        assert long <= 2 * short
        assert long <= 20 * bytes_of_q


def test_other_devices_and_dtypes_are_refused() -> None:
    with use_backend("cpu"):
        x = torch.zeros(1, 2, 1, 8)
        with pytest.raises(BackendError, match="takes float32, bfloat16 and float16"):
            attention(x.double(), x.double(), x.double())
        elsewhere = Call(*[x.to("meta")] * 3, None, None, None, None, None, Options(2, 2, -1, -1, 1.0, 0.0, 0.0))
        assert cpu.supports(elsewhere, False) == "runs on the CPU, q is on meta"
