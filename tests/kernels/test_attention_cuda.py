"""Backend `cuda` of attention in the emulator: forward against fp64, no worse than PyTorch; counted work; budgets."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hotloop.kernels import gpu
from hotloop.kernels.attention import attention, attention_varlen_with_lse, attention_with_lse, cuda, reference
from hotloop.kernels.attention.options import Call, Options
from hotloop.kernels.cuda import Launch
from hotloop.kernels.dispatch import BackendError, use_backend
from hotloop.kernels.testing import assert_no_worse

emulator = pytest.importorskip("hotloop.emulator")

SOURCE = Path(__file__).resolve().parents[2] / "csrc" / "attention" / "attention.cu"
BUDGETS = Path(__file__).with_name("attention_cuda_budgets.json")
BF16, FP16 = torch.bfloat16, torch.float16
A100, RTX = 164 << 10, 100 << 10  # shared memory of a multiprocessor: one tiling for head_dim 128 each
SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "lockstep", "async_copies": "late"},
    {"schedule": "random", "seed": 1, "async_copies": "early"},
    {"schedule": "random", "seed": 2, "async_copies": "late"},
]
CAUSAL = {"right": 0}
MASKS: tuple[dict[str, int], ...] = (
    {},
    CAUSAL,
    {"left": 17, "right": 9},
    {"left": 30, "right": 0},
    {"right": 5},
    {"left": 0},
)


@cache
def module(target: str) -> Any:
    return emulator.Module.from_cuda(SOURCE, arch=target, include_dirs=[SOURCE.parents[1]])


@contextmanager
def emulated(target: str = "sm_80", shared: int = A100, **schedule: Any) -> Iterator[list[Any]]:
    """Launches of the backend run in the emulator, over poisoned results; the counters of each."""
    counters: list[Any] = []

    def run(launch: Launch, device: torch.device) -> None:
        given = {name: 0 if x is None else x for name, x in launch.arguments.items()}
        for name in ("o", "lse"):
            given[name].fill_(math.nan)
        done = module(target).launch(launch.kernel, launch.grid, launch.block, launch.shared, given, **schedule)
        counters.append(done.counters)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", run)
        patch.setattr(cuda, "shared_memory", lambda device: shared)
        yield counters


def draw(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * scale).to(dtype)


def draw_qkv(
    Tq: int, Tk: int, heads: tuple[int, int], D: int, dtype: torch.dtype, B: int = 1, scale: float = 1.0
) -> list[Tensor]:
    Hq, Hk = heads
    lengths = ((Tq, Hq), (Tk, Hk), (Tk, Hk))
    return [draw(B, T, H, D, seed=s, dtype=dtype, scale=scale) for s, (T, H) in enumerate(lengths)]


def options_of(
    q: Tensor, k: Tensor, left: int = -1, right: int = -1, softcap: float = 0.0, scale: float = 0.0
) -> Options:
    return Options(q.shape[-3], k.shape[-3], left, right, scale or q.shape[-1] ** -0.5, softcap, 0.0)


def forward(q: Tensor, k: Tensor, v: Tensor, options: Options, cu: tuple[Tensor, ...] = ()) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = cu or (None, None)
    return cuda.forward(Call(q, k, v, cu_q, cu_k, None, None, None, options))


def visible(Tq: int, Tk: int, options: Options) -> Tensor:  # (Tq, Tk)
    distance = torch.arange(Tk) - (torch.arange(Tq)[:, None] + Tk - Tq)
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    seen &= distance <= options.window_right if options.window_right >= 0 else seen
    return seen & (distance >= -options.window_left) if options.window_left >= 0 else seen


def pytorch(q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """PyTorch's attention in the dtype of its inputs, the softcap in that dtype, too; 0 where nothing is seen."""
    group = q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    seen = visible(q.shape[2], k.shape[2], options)
    if options.softcap > 0:
        s = options.softcap * torch.tanh((q @ k.mT) * (options.scale / options.softcap))
        o = torch.softmax(s.masked_fill(~seen, -math.inf), -1) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=options.scale)
    return o.masked_fill(~seen.any(-1)[:, None], 0).transpose(1, 2)


def check(q: Tensor, k: Tensor, v: Tensor, options: Options, o: Tensor, lse: Tensor) -> None:
    """o against PyTorch's in its dtype, lse against the formula in fp32."""
    none = (None,) * 5
    truth = reference.forward(Call(*(x.double() for x in (q, k, v)), *none, options))
    single = reference.forward(Call(*(x.float() for x in (q, k, v)), *none, options))
    assert o.is_contiguous()
    assert_no_worse(o, pytorch(q, k, v, options), truth[0], name="o", ulps=4)
    assert_no_worse(lse, single[1], truth[1], name="lse", ulps=16)


# Every size, dtype, head_dim, tiling, target, schedule and mask occurs; their products are drawn in the slow tests.
SIZES = ((1, 1), (113, 203), (203, 113), (128, 217), (217, 128), (108, 256), (256, 108), (65, 64))
HEADS = ((1, 1), (2, 2), (3, 1), (4, 2))
PAIRS = [
    (size, HEADS[i % 4], (64, 128)[i % 2], (BF16, FP16)[i // 2 % 2], (A100, RTX)[i // 4 % 2],
     ("sm_80", "sm_90a")[i // 2 % 2], SCHEDULES[i // 2 % 3], MASKS[i % len(MASKS)])
    for i, size in enumerate(SIZES)
]  # fmt: skip


@pytest.mark.parametrize(("size", "heads", "D", "dtype", "shared", "target", "schedule", "mask"), PAIRS)
def test_accuracy(size, heads, D, dtype, shared, target, schedule, mask):
    q, k, v = draw_qkv(*size, heads, D, dtype)
    options = options_of(q, k, **mask)
    with emulated(target, shared, **schedule):
        check(q, k, v, options, *forward(q, k, v, options))


DRAWN = {
    "B": st.integers(1, 2),
    "Tq": st.integers(1, 300),
    "Tk": st.integers(0, 300),
    "heads": st.sampled_from([*HEADS, (5, 1), (12, 1)]),
    "D": st.sampled_from([64, 128]),
    "dtype": st.sampled_from([BF16, FP16]),
    "left": st.sampled_from([-1, -1, 0, 1, 40, 100, 2**31 - 1]),
    "right": st.sampled_from([-1, 0, 0, 1, 40, 100, 2**31 - 1]),
    "softcap": st.sampled_from([0.0, 0.0, 2.0, 50.0]),
    "scale": st.sampled_from([0.0, 0.0, 0.5, 1e-3]),
    "shared": st.sampled_from([A100, RTX]),
    "target": st.sampled_from(["sm_80", "sm_90a", "sm_120"]),
    "schedule": st.sampled_from(SCHEDULES),
}


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(**DRAWN)
def test_accuracy_on_drawn_cases(B, Tq, Tk, heads, D, dtype, left, right, softcap, scale, shared, target, schedule):
    q, k, v = draw_qkv(Tq, Tk, heads, D, dtype, B)
    options = options_of(q, k, left, right, softcap, scale)
    with emulated(target, shared, **schedule):
        check(q, k, v, options, *forward(q, k, v, options))


def test_more_heads_than_rows_of_a_tile():
    """A group of 130 heads, so that a tile ends within a query."""
    q, k, v = draw_qkv(3, 20, (130, 1), 64, BF16)
    options = options_of(q, k, right=0)
    with emulated():
        check(q, k, v, options, *forward(q, k, v, options))


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(softcap):
    """Small scores, where tanh is nearly the identity, and scores that it cuts off."""
    for scale in (0.1, 5.0):
        q, k, v = draw_qkv(40, 90, (2, 1), 64, FP16, scale=scale)
        options = options_of(q, k, right=0, softcap=softcap)
        with emulated():
            check(q, k, v, options, *forward(q, k, v, options))


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("kind", ["large", "rising", "falling", "equal", "low"])
def test_extreme_scores(kind, dtype):
    """Scores of 1e9, which rise or fall from block to block, that are all equal, or all far below zero."""
    q, k, v = draw_qkv(70, 200, (2, 1), 64, dtype)
    if kind == "large":
        q, k = q * 1e4, k * 1e4
    elif kind in ("rising", "falling"):
        q = q.abs()
        k = torch.linspace(0, 30, 200)[None, :, None, None].expand_as(k).to(dtype)
        k = k.flip(1) if kind == "falling" else k
    elif kind == "equal":
        q, k = torch.full_like(q, 3e4), torch.full_like(k, 3e4)
    else:
        q, k = q.abs() + 100, -k.abs() - 100
    for mask in ({}, CAUSAL):
        options = options_of(q, k, **mask)
        with emulated():
            o, lse = forward(q, k, v, options)
        check(q, k, v, options, o, lse)


def test_infinities_and_nan_stay_in_their_rows():
    q, k, v = draw_qkv(40, 70, (2, 2), 64, FP16)
    options = options_of(q, k)
    with emulated():
        clean, _ = forward(q, k, v, options)
        q[0, 3, 0], q[0, 17, 1, 5] = math.nan, math.inf
        o, lse = forward(q, k, v, options)
    bad = torch.zeros(1, 40, 2, dtype=torch.bool)
    bad[0, 3, 0] = bad[0, 17, 1] = True
    assert o[bad].isnan().all()
    assert lse.transpose(1, 2)[bad].isnan().all()
    assert torch.equal(o[~bad], clean[~bad])


@pytest.mark.parametrize("Tk", [0, 3, 70])
def test_queries_that_see_nothing(Tk):
    """Of 200 causal queries the last Tk see keys: a tile without any block, and one with some rows of none."""
    q, k, v = draw_qkv(200, Tk, (2, 1), 64, BF16)
    options = options_of(q, k, right=0)
    with emulated():
        o, lse = forward(q, k, v, options)
        empty, _ = forward(q[:, :0], k, v, options)
    assert empty.shape == (1, 0, 2, 64)
    assert not o[:, : 200 - Tk].any()
    assert (lse[:, :, : 200 - Tk] == -math.inf).all()
    check(q, k, v, options, o, lse)


@pytest.mark.parametrize("Tk", [100, 150])
def test_narrow_and_endless_windows(Tk):
    """Windows of one key or two, at the ends of blocks and of a warp's rows, and windows beyond all keys."""
    q, k, v = draw_qkv(150, Tk, (1, 1), 64, BF16)
    for left, right in ((2**31 - 1, 2**31 - 1), (0, 0), (1, 0), (0, 1)):
        options = options_of(q, k, left, right)
        with emulated():
            check(q, k, v, options, *forward(q, k, v, options))


def test_bits_do_not_depend_on_the_schedule():
    for D, shared in ((64, A100), (128, RTX)):
        q, k, v = draw_qkv(70, 150, (2, 1), D, BF16)
        options = options_of(q, k, right=0)
        results = []
        for schedule in SCHEDULES:
            with emulated(shared=shared, **schedule):
                results.append(forward(q, k, v, options))
        for o, lse in results[1:]:
            assert torch.equal(o, results[0][0])
            assert torch.equal(lse, results[0][1])


# --- packed batches ---


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


LENGTHS_Q = (3, 0, 130, 1, 0, 43, 0, 0)
LENGTHS_K = (3, 5, 70, 1, 0, 100, 0, 0)


@pytest.mark.parametrize(
    ("heads", "mask", "schedule"),
    [((6, 2), {}, SCHEDULES[0]), ((1, 1), CAUSAL, SCHEDULES[1]), ((3, 1), {"left": 20, "right": 4}, SCHEDULES[2])],
)
def test_packed_documents(heads, mask, schedule):
    """Each as alone, bit for bit; NaN in one reaches no other; past the end zeros, whatever is there."""
    (Hq, Hk), (total_q, total_k) = heads, (sum(LENGTHS_Q) + 9, sum(LENGTHS_K) + 5)
    q = draw(total_q, Hq, 64, seed=1, dtype=BF16)
    k, v = (draw(total_k, Hk, 64, seed=s, dtype=BF16) for s in (2, 3))
    for x in (q[-9:], k[-5:], v[-5:]):
        x.fill_(math.nan)
    boundaries = cu(*LENGTHS_Q), cu(*LENGTHS_K)
    options = options_of(q, k, **mask)
    with emulated(**schedule):
        o, lse = forward(q, k, v, options, boundaries)
    assert not o[-9:].any()
    assert (lse[:, -9:] == -math.inf).all()
    poisoned_q = boundaries[0][2:4].tolist()
    k[slice(*boundaries[1][2:4].tolist())] = math.nan
    with emulated():
        poisoned, poisoned_lse = forward(q, k, v, options, boundaries)
    at_q = at_k = 0
    for a, b in zip(LENGTHS_Q, LENGTHS_K, strict=True):
        rows, keys = slice(at_q, at_q + a), slice(at_k, at_k + b)
        at_q, at_k = at_q + a, at_k + b
        if [rows.start, rows.stop] == poisoned_q:
            assert poisoned[rows].isnan().any()
            continue
        assert torch.equal(poisoned[rows], o[rows])
        assert torch.equal(poisoned_lse[:, rows], lse[:, rows])
        one = (q[None, rows], k[None, keys], v[None, keys])
        alone = options_of(one[0], one[1], **mask)
        with emulated():
            o_, lse_ = forward(*one, alone)
        assert torch.equal(o_[0], o[rows])
        assert torch.equal(lse_[0], lse[:, rows])
        check(*one, alone, o[None, rows], lse[None, :, rows])


@pytest.mark.parametrize("segments", [31, 32, 33, pytest.param(1030, marks=pytest.mark.slow)])
def test_many_segments(segments):
    """Segments of 0, 1 and 2 positions and ten empty ones, found by a search of one, two and three steps."""
    lengths = [i % 3 for i in range(segments - 10)]
    boundaries = cu(*lengths, *([0] * 10))
    q = draw(sum(lengths) + 1, 2, 64, seed=1, dtype=FP16)
    k, v = (draw(sum(lengths) + 1, 1, 64, seed=s, dtype=FP16) for s in (2, 3))
    with emulated():
        o, _ = forward(q, k, v, options_of(q, k), (boundaries, boundaries))
    position = torch.arange(len(q))
    document = torch.bucketize(position, boundaries, right=True)
    seen = (document[:, None] == document) & (position < boundaries[-1])
    s = torch.einsum("ihd,jd->hij", q.double(), k[:, 0].double()) / 8
    p = torch.softmax(s.masked_fill(~seen, -math.inf), -1).nan_to_num(0)
    torch.testing.assert_close(o.double(), torch.einsum("hij,jd->ihd", p, v[:, 0].double()), rtol=2e-3, atol=2e-3)


def test_public_functions(monkeypatch):
    monkeypatch.setattr(cuda, "supports_device", lambda device: None)
    monkeypatch.setattr(gpu, "lacking", lambda index: None)
    q, k, v = draw_qkv(40, 40, (2, 1), 64, BF16)
    with emulated() as launches, use_backend("cuda"):
        o, lse = attention_with_lse(q, k, v, causal=True)
        packed, packed_lse = attention_varlen_with_lse(q[0], k[0], v[0], cu_seqlens_q=cu(40), causal=True)
    assert len(launches) == 2
    check(q, k, v, options_of(q, k, right=0), o, lse)
    assert torch.equal(packed[None], o)
    assert torch.equal(packed_lse[None], lse)


# --- memory layouts ---


def test_strided_inputs_are_read_in_place():
    """Slices of one fused projection: 16-byte aligned rows; what lies between them is out of bounds in the emulator."""
    fused = draw(2, 70, 3, 2, 64, seed=1, dtype=BF16)
    q, k, v = fused.unbind(2)
    options = options_of(q, k, right=0)
    with emulated():
        o, lse = forward(q, k, v, options)
        expected = forward(q.contiguous(), k.contiguous(), v.contiguous(), options)
        heads_first = forward(*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)), options)
    assert all(cuda.aligned(x) is x for x in (q, k, v))
    for other in (expected, heads_first):
        assert torch.equal(o, other[0])
        assert torch.equal(lse, other[1])


def test_rows_that_cp_async_cannot_read_are_copied():
    x = draw(1, 20, 2, 64, seed=1, dtype=BF16)
    offset = torch.zeros(x.numel() + 8, dtype=BF16)[1 : x.numel() + 1].view(x.shape).copy_(x)
    padded = F.pad(x, (0, 3))[..., :64]
    transposed = x.mT.contiguous().mT
    options = options_of(x, x)
    with emulated():
        expected, _ = forward(x, x, x, options)
        for odd in (offset, padded, transposed):
            assert cuda.aligned(odd) is not odd
            assert torch.equal(forward(odd, odd, odd, options)[0], expected)
    single = torch.zeros(100, dtype=BF16)[8:72].as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert cuda.aligned(single) is single, "strides of dimensions of size 1 do not matter"


# --- counted work ---


@pytest.mark.parametrize(("D", "shared", "keys"), [(64, A100, 64), (128, A100, 64), (128, RTX, 32)])
@pytest.mark.parametrize(("heads", "mask"), [((1, 1), CAUSAL), ((4, 1), CAUSAL), ((2, 1), {"left": 70, "right": 0})])
def test_counted_work(D, shared, keys, heads, mask):
    """K and V of the blocks that a tile sees are read once for it, a warp multiplies the blocks that its rows see."""
    T, (Hq, Hk) = 300, heads
    q, k, v = draw_qkv(T, T, heads, D, BF16)
    options = options_of(q, k, **mask)
    with emulated(shared=shared) as launches:
        forward(q, k, v, options)
    (counted,) = launches
    seen = visible(T, T, options).repeat_interleave(Hq // Hk, 0)
    blocks = F.pad(seen, (0, -T % keys)).unflatten(1, (-1, keys)).any(-1)
    sizes = torch.full((blocks.shape[1],), keys)
    sizes[-1] -= -T % keys
    tiles = F.pad(blocks, (0, 0, 0, -len(blocks) % cuda.ROWS)).unflatten(0, (-1, cuda.ROWS)).any(1)
    warps = F.pad(blocks, (0, 0, 0, -len(blocks) % 32)).unflatten(0, (-1, 32)).any(1)
    read = q.numel() + 2 * Hk * D * (tiles * sizes).sum().item()
    assert counted["global_load_bytes"] == 2 * read
    assert counted["global_store_bytes"] == 2 * q.numel() + 4 * Hq * T
    assert counted["mma_m16n8k16"] == 2 * Hk * warps.sum().item() * (32 // 16) * (keys // 8) * (D // 16)
    assert counted["shared_bank_conflicts"] == 0


def test_causal_work_is_half():
    counts = []
    for mask in ({}, CAUSAL):
        q, k, v = draw_qkv(1024, 1024, (1, 1), 64, BF16)
        with emulated() as launches:
            forward(q, k, v, options_of(q, k, **mask))
        counts.append(launches[0]["mma_m16n8k16"])
    assert 0.5 < counts[1] / counts[0] < 0.54


def test_longest_tiles_come_first(monkeypatch):
    """The first CTAs of a causal launch take the last rows, of as many heads as share the L2 cache."""
    T, H = 300, 4
    q, k, v = draw_qkv(T, T, (H, H), 64, BF16)
    options = options_of(q, k, **CAUSAL)
    monkeypatch.setattr(cuda, "_L2_BYTES", 2 * 2 * T * 64 * 2)
    o, lse = torch.full_like(q, math.nan), torch.full((1, H, T), math.nan)
    for ctas, written in ((2, [(0, 256), (1, 256)]), (6, [(0, 0), (1, 0)]), (8, [(0, 0), (1, 0), (2, 256), (3, 256)])):
        launch = cuda.launch(Call(q, k, v, *[None] * 5, options), o, lse, A100)
        with emulated():
            replace(launch, grid=(ctas, 1)).run(q.device)
        first = [(~lse[0, h].isnan()).nonzero()[:1].flatten().tolist() for h in range(H)]
        assert [(h, at[0]) for h, at in enumerate(first) if at] == written


# --- a GPU ---


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_accuracy_on_this_gpu(dtype, D, mask):
    for size, heads in itertools.product((*SIZES, (1000, 1023)), HEADS):
        q, k, v = draw_qkv(*size, heads, D, dtype)
        options = options_of(q, k, **mask)
        there = [x.cuda() for x in (q, k, v)]
        reason = cuda.supports(Call(*there, *[None] * 5, options), False)
        if reason is not None:
            pytest.skip(reason)
        results = [forward(*there, options) for _ in range(3)]
        packed = forward(*(x[0] for x in there), options, (cu(size[0]).cuda(), cu(size[1]).cuda()))
        o, lse = (x.cpu() for x in results[0])
        check(q, k, v, options, o, lse)
        for again in (*results[1:], (packed[0][None], packed[1][None])):
            assert torch.equal(again[0].cpu(), o)
            assert torch.equal(again[1].cpu(), lse)


# --- choice ---


def test_launches_are_data():
    assert [cuda.tiling(128, shared).keys for shared in (A100, 227 << 10, RTX)] == [64, 64, 32]
    assert cuda.tiling(64, RTX) == cuda.tiling(64, A100)
    q, k, v = (torch.empty(4, 8192, H, 128, dtype=BF16, device="meta") for H in (32, 8, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "aligned", lambda x: x)
        launch = cuda.launch(Call(q, k, v, *[None] * 5, options_of(q, k)), q, q, A100)
        packed = [x.flatten(0, 1) for x in (q, k, v)]
        boundaries = torch.empty(11, dtype=torch.int32, device="meta")
        call = Call(*packed, boundaries, boundaries, None, None, None, options_of(q, k))
        of_documents = cuda.launch(call, q, q, A100)
    assert launch.kernel == "attention_forward_bf16_d128_keys64_stages3"
    assert launch.grid == (4 * 8 * 8192 * 4 // 128, 1)
    assert launch.shared == 2 * 128 * (128 + 3 * 64)
    assert of_documents.grid == (8 * (4 * 8192 * 4 // 128 + 10 + 1), 1)


def test_reasons():
    q, k, v = draw_qkv(8, 8, (2, 1), 64, BF16)
    options = options_of(q, k)
    none: tuple[Any, ...] = (None,) * 4

    def reason(*tensors: Tensor, rest: tuple[Any, ...] = none, **changes: Any) -> str:
        return str(cuda.supports(Call(*tensors, *rest, None, replace(options, **changes)), False))

    assert "not torch.float32" in reason(q.float(), k.float(), v.float())
    assert "head_dim 32: takes 64 and 128" in reason(q[..., :32], k[..., :32], v[..., :32])
    assert "no dropout" in reason(q, k, v, dropout_p=0.1)
    assert "no alibi_slopes" in reason(q, k, v, rest=(None, None, torch.zeros(2), None))
    assert "no sinks" in reason(q, k, v, rest=(None, None, None, torch.zeros(2)))
    assert "scale -1.0 and softcap 0.0: takes" in reason(q, k, v, scale=-1.0)
    assert "scale 1.0 and softcap 1e+20: takes" in reason(q, k, v, scale=1.0, softcap=1e20)
    assert "below 1073741824" in reason(q.expand(1, 8, 2, 64)[:, :1].expand(1, 2**29, 2, 64), k, v)
    k.requires_grad_()
    assert reason(q, k, v) == "serves cuda tensors, got cpu"
    with use_backend("cuda"), pytest.raises(BackendError, match="serves cuda tensors, got cpu"):
        attention(q, k, v)
    with pytest.MonkeyPatch.context() as patch:  # as on a GPU, but for the backend that has the gradients
        patch.setattr(cuda, "supports_device", lambda device: None)
        patch.setattr(gpu, "lacking", lambda index: None)
        assert reason(q, k, v) == "gradients are computed by backend triton, which serves cuda tensors, got cpu"
        with torch.no_grad():
            assert reason(q, k, v) == "None"


# --- compiled for every target ---


def kernels(dtype: str) -> list[str]:
    shapes = [(D, t) for D, tilings in cuda.TILINGS.items() for t in tilings]
    return [f"attention_forward_{dtype}_d{D}_keys{t.keys}_stages{t.stages}" for D, t in shapes]


def measured() -> dict[str, dict[str, int]]:
    found = {}
    targets = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
    for target, dtype in [*((target, "bf16") for target in targets), ("sm_80", "fp16")]:
        for name in kernels(dtype):
            r = emulator.static(SOURCE, target, name=name, include_dirs=[SOURCE.parents[1]])
            found[f"{name}, {target}"] = r.budget("HMMA", "LDSM", "LDGSTS.128", "STG.128")
    return found


@pytest.mark.slow  # compiles for every target
def test_budgets():
    from hotloop.emulator import cuda as compiler

    if "release 13.0" not in compiler.version(compiler.find_nvcc()):
        pytest.skip("the budgets are of nvcc 13.0, not of this nvcc")
    rows = measured()
    assert rows == json.loads(BUDGETS.read_text())
    for name, row in rows.items():
        assert row["spills"] == row["stack"] == 0, name
        assert min(row[kind] for kind in ("HMMA", "LDSM", "LDGSTS.128", "STG.128")) > 0, name


if __name__ == "__main__":
    BUDGETS.write_text(json.dumps(measured(), indent=1) + "\n")
