"""Numbers of attention: the reference against loops over softmax, every backend against the reference in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hotloop.kernels.attention import (
    AttentionOutput,
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_with_lse,
    cu_seqlens_from_document_ids,
)
from hotloop.kernels.attention.reference import dropout_keep
from hotloop.kernels.attention.segments import plan
from hotloop.kernels.dispatch import use_backend
from hotloop.kernels.philox import philox_4x32_10
from hotloop.kernels.testing import LAYOUTS, assert_no_worse, lay_out

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
BACKENDS = ("cpu", "torch", "reference")
SIZES = ((1, 1), (113, 203), (128, 217), (108, 256), (256, 512), (64, 1023))
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window_size": (17, 9)},
    {"causal": True, "window_size": (30, None)},
    {"window_size": (-1, 5)},
)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def cu(*lengths: int, device: str = "cpu") -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def gradients(f: Callable[..., Any], inputs: tuple[Tensor, ...], do: Tensor, dlse: Tensor | None) -> list[Tensor]:
    """o, lse where dlse is given, and the gradients of the inputs."""
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = f(*inputs)
    if dlse is None:
        o = output.o if isinstance(output, AttentionOutput) else output
        return [o.detach(), *torch.autograd.grad(o, inputs, do)]
    return [output.o.detach(), output.lse.detach(), *torch.autograd.grad(output, inputs, (do, dlse.to(output.lse)))]


# --- the reference against the definition ---


def by_loops(
    q: Tensor, k: Tensor, v: Tensor, *, causal=False, window_size=(None, None), scale=None, softcap=None,
    alibi_slopes=None, sinks=None, keep=None, dropout_p=0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention one query at a time, differentiable; rows that see no key stay 0 and -inf."""
    (B, Tq, Hq, D), (Tk, Hk) = q.shape, k.shape[1:3]
    left, right = (None if side in (None, -1) else side for side in window_size)
    right = 0 if causal else right
    scale = 1 / math.sqrt(D) if scale is None else scale
    o, lse = {}, {}
    for b in range(B):
        for h in range(Hq):
            for i in range(Tq):
                center = i + Tk - Tq
                seen = [
                    j for j in range(Tk)
                    if (left is None or j >= center - left) and (right is None or j <= center + right)
                ]  # fmt: skip
                if not seen:
                    o[b, h, i], lse[b, h, i] = q.new_zeros(D), q.new_full((), -math.inf)
                    continue
                s = (k[b, seen, h // (Hq // Hk)] @ q[b, i, h]) * scale
                s = s if softcap is None else softcap * torch.tanh(s / softcap)
                if alibi_slopes is not None:
                    slope = alibi_slopes[h] if alibi_slopes.dim() == 1 else alibi_slopes[b, h]
                    s = s - slope * torch.tensor([abs(center - j) for j in seen], dtype=q.dtype)
                all_s = s if sinks is None else torch.cat([s, sinks[h : h + 1]])
                p = torch.softmax(all_s, 0)[: len(seen)]
                p = p if keep is None else p * keep[b, h, i, seen] / (1 - dropout_p)
                o[b, h, i], lse[b, h, i] = p @ v[b, seen, h // (Hq // Hk)], torch.logsumexp(all_s, 0)
    grid = [(b, h, i) for b in range(B) for h in range(Hq) for i in range(Tq)]
    out = torch.stack([o[at] for at in grid]).view(B, Hq, Tq, D).transpose(1, 2)
    return out, torch.stack([lse[at] for at in grid]).view(B, Hq, Tq)


@pytest.mark.parametrize("size", [(4, 4), (3, 6), (6, 3), (1, 5)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "scale": 0.7},
        {"window_size": (2, 1), "softcap": 1.5},
        {"causal": True, "window_size": (1, 3), "alibi": 1, "sinks": True},
        {"alibi": 2, "dropout_p": 0.4},
        {"causal": True, "softcap": 2.0, "alibi": 2, "sinks": True, "dropout_p": 0.25},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
def test_reference_against_loops(size: tuple[int, int], options: dict[str, Any]) -> None:
    """o, lse and every gradient of the reference, in fp64, grouped heads throughout, lse in the loss."""
    (Tq, Tk), options = size, dict(options)
    B, Hq, Hk, D = 2, 4, 2, 8
    alibi, with_sinks = options.pop("alibi", 0), options.pop("sinks", False)
    inputs = {"q": normal(B, Tq, Hq, D, seed=1), "k": normal(B, Tk, Hk, D, seed=2), "v": normal(B, Tk, Hk, D, seed=3)}
    if alibi:
        inputs["alibi_slopes"] = normal(*((Hq,) if alibi == 1 else (B, Hq)), seed=4)
    if with_sinks:
        inputs["sinks"] = normal(Hq, seed=5)
    do, dlse = normal(B, Tq, Hq, D, seed=6), normal(B, Hq, Tq, seed=7)
    extra: dict[str, Any] = {}
    if "dropout_p" in options:
        extra = {"keep": dropout_keep(torch.tensor(9), torch.arange(B), Hq, Tq, Tk, options["dropout_p"])}

    def run(f: Callable[..., Any], **more: Any) -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        o, lse = f(**leaves, **options, **more)
        loss = (o * do).sum() + (lse.masked_fill(lse == -math.inf, 0) * dlse).sum()
        return [o, lse, *torch.autograd.grad(loss, list(leaves.values()))]

    with use_backend("reference"):
        actual = run(attention_with_lse, **({"seed": 9} if extra else {}))
    for name, a, e in zip(("o", "lse", *inputs), actual, run(by_loops, **extra), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("varlen", [False, True])
def test_gradcheck(backend: str, varlen: bool) -> None:
    """By finite differences, all options that the backend serves, of (o, lse)."""
    q, k, v = (normal(*((7, 2, 8) if varlen else (1, 4, 2, 8)), seed=s).requires_grad_() for s in range(3))
    rich = (normal(2, seed=3).requires_grad_(), normal(2, seed=4).requires_grad_()) if backend == "reference" else ()

    def f(q: Tensor, k: Tensor, v: Tensor, *extra: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"causal": True, "window_size": (2, None)}
        if extra:
            options |= {"alibi_slopes": extra[0], "sinks": extra[1], "softcap": 3.0, "dropout_p": 0.3, "seed": 1}
        if varlen:
            o, lse = attention_varlen_with_lse(q, k, v, cu_seqlens_q=cu(3, 0, 4), **options)
        else:
            o, lse = attention_with_lse(q, k, v, **options)
        return o, lse

    with use_backend(backend):
        assert torch.autograd.gradcheck(f, (q, k, v, *rich), fast_mode=backend == "torch")


def test_philox_known_answers() -> None:
    """The vectors that the authors of Philox publish with Random123."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    ones = (0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2
    for (counter, key), expected in {
        ((0,) * 4, (0,) * 2): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ones: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        pi: (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    }.items():
        words = philox_4x32_10(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
        assert tuple(int(w) for w in words) == expected


# --- accuracy of the backends ---


def sdpa(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """PyTorch's attention in the dtype of its inputs."""
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    o = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible)
    return o.transpose(1, 2)


def visible_mask(Tq: int, Tk: int, causal: bool = False, window_size: tuple[Any, Any] = (None, None)) -> Tensor | None:
    left, right = (-1 if side is None else side for side in window_size)
    right = 0 if causal else right
    distance = torch.arange(Tk) - (torch.arange(Tq)[:, None] + Tk - Tq)
    visible = torch.ones(Tq, Tk, dtype=torch.bool)
    visible &= distance <= right if right >= 0 else visible
    visible &= distance >= -left if left >= 0 else visible
    return None if visible.all() else visible


def check_accuracy(
    backends: tuple[str, ...], dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, with_lse: bool, **mask: Any
) -> None:
    """No further from the fp64 reference than PyTorch's attention in the same dtype, gradients included."""
    (B, Tq, Hq, D), Tk = q.shape, k.shape[1]
    do = normal(*q.shape, seed=11, dtype=dtype, device=q.device)
    dlse = normal(B, Hq, Tq, seed=12, device=q.device) * with_lse
    with use_backend("reference"):
        inputs = tuple(x.double() for x in (q, k, v))
        truth = gradients(lambda *x: attention_with_lse(*x, **mask), inputs, do.double(), dlse)
    visible = visible_mask(Tq, Tk, **mask)
    visible = None if visible is None else visible.to(q.device)
    hidden = (truth[1] == -math.inf).transpose(1, 2)  # PyTorch gives NaN or numbers there, the contract zeros
    if with_lse:
        same = gradients(lambda *x: AttentionOutput(sdpa(*x, visible), naive_lse(*x, visible)), (q, k, v), do, dlse)
        same[1] = same[1].masked_fill(hidden.transpose(1, 2), -math.inf).float()
    else:
        same = gradients(lambda *x: sdpa(*x, visible), (q, k, v), do, None)
        del truth[1]
    names = ["o", *(["lse"] if with_lse else []), "dq", "dk", "dv"]
    for backend in backends:
        with use_backend(backend):
            if with_lse:
                actual = gradients(lambda *x: attention_with_lse(*x, **mask), (q, k, v), do, dlse)
            else:
                actual = gradients(lambda *x: attention(*x, **mask), (q, k, v), do, None)
        for name, a, s, t in zip(names, actual, same, truth, strict=True):
            if name in ("o", "dq"):
                s = s.masked_fill(hidden[..., None], 0)
                assert not a[hidden].any(), f"{name} of a row that sees no key is not 0"
            if name in ("dq", "dk") and min(Tq, Tk) <= 8:
                # ds = p * (do @ v - do @ o) may cancel, with one key entirely: rounding is relative to those two terms,
                # and among few keys, or the lse of few queries, it is luck whose is smaller.
                terms = (do.double().norm(dim=-1).amax() * v.double().norm(dim=-1).amax() * D**-0.5).expand(1)
                a, s, t = (torch.cat([x.flatten(), terms.to(x.dtype)]) for x in (a, s, t))
                t = torch.cat([t[:-1], s[-1:].double()])
            assert_no_worse(a, s, t, name=f"{backend} {name} {dtype} {(Tq, Tk)} {mask}", ulps=4)


def naive_lse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = (q.transpose(1, 2) @ k.transpose(1, 2).mT) * q.shape[-1] ** -0.5
    s = s if visible is None else s.masked_fill(~visible, torch.finfo(s.dtype).min / 4)
    return torch.logsumexp(s, -1)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_accuracy_at_listed_sizes(device: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Both directions of each size (Tq < Tk, and Tq > Tk with rows that see nothing), plain and causal."""
    for Tq, Tk in {size, size[::-1]}:
        q = normal(1, Tq, 2, 64, seed=1, dtype=dtype, device=device)
        k, v = (normal(1, Tk, 1, 64, seed=s, dtype=dtype, device=device) for s in (2, 3))
        for mask in MASKS[:2]:
            check_accuracy(served(device, dtype), dtype, q, k, v, False, **mask)


def served(device: str, dtype: torch.dtype) -> tuple[str, ...]:
    """The backends to check; that PyTorch's kernel on CUDA refuses fp32 is in `test_choice_and_reasons`."""
    if device == "cpu":
        return BACKENDS
    return ("reference",) if dtype == torch.float32 else ("torch", "reference")


def widest(backend: str) -> torch.dtype:
    return torch.float32 if backend == "cpu" else torch.float64


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    B=st.integers(1, 2),
    Tq=st.integers(1, 70),
    Tk=st.integers(1, 70),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    D=st.sampled_from([8, 24, 64]),
    mask=st.sampled_from(MASKS),
    with_lse=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
)
def test_accuracy_on_drawn_cases(
    dtype: torch.dtype,
    B: int,
    Tq: int,
    Tk: int,
    heads: tuple[int, int],
    D: int,
    mask: dict,
    with_lse: bool,
    layout: str,
) -> None:
    Hq, Hk = heads
    q = lay_out(normal(B, Tq, Hq, D, seed=1, dtype=dtype), layout)
    k, v = (lay_out(normal(B, Tk, Hk, D, seed=s, dtype=dtype), layout) for s in (2, 3))
    for device in DEVICES:
        moved = [x.to(device) for x in (q, k, v)]
        check_accuracy(served(device, dtype), dtype, *moved, with_lse, **mask)


# --- packed batches ---

LENGTHS = st.sampled_from([0, 1, 3, 8, 8, 17])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.tuples(LENGTHS, LENGTHS), min_size=1, max_size=7),
    tail=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    cross=st.booleans(),
    mask=st.sampled_from(MASKS),
    wide=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_packed_equals_its_documents_one_by_one(
    lengths: list[tuple[int, int]], tail: tuple[int, int], cross: bool, mask: dict, wide: bool, backend: str
) -> None:
    """Also: rows past the last boundary give 0 and -inf, and zero gradients, whatever they hold."""
    dtype = widest(backend) if wide else torch.bfloat16
    lengths_q = [a for a, _ in lengths]
    lengths_k = [b for _, b in lengths] if cross else lengths_q
    total_q, total_k = sum(lengths_q) + tail[0], sum(lengths_k) + (tail[1] if cross else tail[0])
    q, do = (normal(total_q, 4, 8, seed=s, dtype=dtype) for s in (1, 4))
    k, v = (normal(total_k, 2, 8, seed=s, dtype=dtype) for s in (2, 3))
    dlse = normal(4, total_q, seed=5)
    for x in (q, k, v, do):
        x[sum(lengths_k) if x is k or x is v else sum(lengths_q) :] = math.nan
    dlse[:, sum(lengths_q) :] = math.nan
    boundaries: dict[str, Any] = {"cu_seqlens_q": cu(*lengths_q, 0, 0)}
    if cross:
        boundaries |= {"cu_seqlens_k": cu(*lengths_k, 0, 0)}
    with use_backend(backend):
        packed = gradients(lambda *x: attention_varlen_with_lse(*x, **boundaries, **mask), (q, k, v), do, dlse)
        expected = [torch.zeros_like(x) for x in packed]
        expected[1].fill_(-math.inf)
        at_q = at_k = 0
        for a, b in zip(lengths_q, lengths_k, strict=True):
            rows, keys = slice(at_q, at_q + a), slice(at_k, at_k + b)
            inputs = (q[None, rows], k[None, keys], v[None, keys])
            alone = gradients(lambda *x: attention_with_lse(*x, **mask), inputs, do[None, rows], dlse[None, :, rows])
            expected[0][rows], expected[1][:, rows], expected[2][rows] = alone[0][0], alone[1][0], alone[2][0]
            expected[3][keys], expected[4][keys] = alone[3][0], alone[4][0]
            at_q, at_k = at_q + a, at_k + b
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, x, e in zip(("o", "lse", "dq", "dk", "dv"), packed, expected, strict=True):
        torch.testing.assert_close(x, e.to(x.dtype), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_documents_are_isolated_bit_for_bit(
    device: str, backend: str, dtype: torch.dtype, causal: bool, poison: float
) -> None:
    """Lengths as in training: runs of whole contexts, interrupted, equal short ones, ragged ones, an empty one."""
    if backend not in served(device, dtype):
        return
    lengths = [64, 64, 20, 0, 20, 24, 64, 64, 31, 33, 256]
    boundaries = cu(*lengths, 0, device=device)
    total = sum(lengths)
    x = normal(total, 3 * 2, 16, seed=1, dtype=dtype, device=device)
    do = normal(total, 2, 16, seed=2, dtype=dtype, device=device)

    def run(x: Tensor) -> list[Tensor]:
        def f(x: Tensor) -> Tensor:
            q, k, v = x.unflatten(1, (3, 2)).unbind(1)
            return attention_varlen(q, k, v, cu_seqlens_q=boundaries, max_seqlen_q=256, causal=causal)

        with use_backend(backend):
            return gradients(f, (x,), do, None)

    clean = run(x)
    for changed in (0, 2, 5, 8, 10):
        start, stop = sum(lengths[:changed]), sum(lengths[: changed + 1])
        altered = x.clone()
        altered[start:stop] = altered[start:stop] * 3 if poison == 1e4 else poison
        others = torch.ones(total, dtype=torch.bool, device=device)
        others[start:stop] = False
        result = run(altered)
        assert not torch.equal(result[0][start:stop], clean[0][start:stop]), "the change itself must show"
        for name, a, e in zip(("o", "dqkv"), result, clean, strict=True):
            assert torch.equal(a[others], e[others]), f"{name} of other documents changed with document {changed}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("device", DEVICES)
def test_deterministic(device: str, backend: str) -> None:
    if backend not in served(device, torch.bfloat16):
        return
    q, k, v, do = (normal(300, 4, 64, seed=s, dtype=torch.bfloat16, device=device) for s in range(4))
    boundaries = cu(100, 37, 100, 63, device=device)
    with use_backend(backend):
        first, *others = (
            gradients(lambda *x: attention_varlen(*x, cu_seqlens_q=boundaries, causal=True), (q, k, v), do, None)
            for _ in range(4)
        )
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


def test_plan_of_a_training_batch() -> None:
    """Whole contexts become strided batches, and every segment is in exactly one of them."""
    lengths = [256, 256, 100, 156, 256, 256, 256, 0, 100, 156]
    boundaries = tuple(cu(*lengths).tolist())
    result = plan(boundaries, boundaries)
    found = sorted((run.start_q + i * run.step_q, run.length_q) for run in result.runs for i in range(run.count))
    assert found == [(a, n) for a, n in zip(boundaries, lengths, strict=False) if n]
    assert sorted((run.count, run.length_q) for run in result.runs) == [(2, 100), (2, 156), (2, 256), (3, 256)]
    whole = plan((0, 8, 16, 24, 24), (0, 8, 16, 24, 24))
    assert len(whole.runs) == 1
    assert whole.runs[0].covers(24, 24)
    assert not whole.runs[0].covers(25, 25)


@pytest.mark.parametrize("Tk", [0, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_fully_masked(backend: str, Tk: int) -> None:
    """Five causal queries of Tk keys: the first 5 - Tk see none. NaN upstream of them must not reach anything."""
    q, do = (normal(2, 5, 2, 8, seed=s, dtype=widest(backend)) for s in (0, 1))
    k, v = (normal(2, Tk, 2, 8, seed=s, dtype=widest(backend)) for s in (2, 3))
    hidden = 5 - Tk
    do[:, :hidden] = math.nan
    dlse = normal(2, 2, 5, seed=4)
    dlse[:, :, :hidden] = math.nan
    with use_backend(backend):
        o, lse, dq, dk, dv = gradients(lambda *x: attention_with_lse(*x, causal=True), (q, k, v), do, dlse)
        assert attention(q[:0], k[:0], v[:0]).shape == (0, 5, 2, 8)
        assert attention(q[:, :0], k, v).shape == (2, 0, 2, 8)
    assert not o[:, :hidden].any()
    assert not dq[:, :hidden].any()
    assert (lse[:, :, :hidden] == -math.inf).all()
    assert all(x.isfinite().all() for x in (o, dq, dk, dv, lse[:, :, hidden:]))
    assert Tk == 0 or all(x.any() for x in (o, dq, dk, dv))


# --- dropout ---


def test_dropout_rate_and_unbiasedness() -> None:
    keep = dropout_keep(torch.tensor(7), torch.arange(4), 4, 128, 128, 0.3)
    n = keep.numel()
    deviation = (keep.sum().item() - 0.7 * n) / math.sqrt(n * 0.3 * 0.7)
    assert abs(deviation) < 4, f"{keep.double().mean():.4f} kept, expected 0.7 ({deviation:.1f} standard deviations)"
    for dim in range(4):  # neighbours in batch, head, query and key are independent
        a, b = keep.narrow(dim, 0, keep.shape[dim] - 1), keep.narrow(dim, 1, keep.shape[dim] - 1)
        both = ((a & b).double().mean().item() - 0.49) * math.sqrt(a.numel() / (0.49 * 0.51))
        assert abs(both) < 5, f"neighbours along dimension {dim} are both kept too often or seldom: {both:.1f}"
    q, k = normal(1, 8, 2, 8, seed=0), normal(1, 40, 2, 8, seed=1)
    v = torch.ones(1, 40, 2, 8, dtype=torch.float64)
    mean = torch.stack([attention(q, k, v, dropout_p=0.5, seed=s) for s in range(200)]).mean()
    assert abs(mean.item() - 1) < 0.02, f"the mean over 200 masks is {mean.item():.4f}, expected 1"


def test_dropout_mask_is_that_of_the_segments_as_a_batch() -> None:
    q, k, v, do = (normal(3, 6, 2, 8, seed=s) for s in range(4))
    options: dict[str, Any] = {"dropout_p": 0.4, "seed": 123, "causal": True}
    dense = gradients(lambda *x: attention(*x, **options), (q, k, v), do, None)
    flat = tuple(x.flatten(0, 1) for x in (q, k, v))
    packed = gradients(
        lambda *x: attention_varlen(*x, cu_seqlens_q=cu(6, 6, 6), **options), flat, do.flatten(0, 1), None
    )
    for a, b in zip(packed, dense, strict=True):
        torch.testing.assert_close(a, b.flatten(0, 1), rtol=1e-12, atol=1e-12)


def test_dropout_seeds() -> None:
    q, k, v = (normal(1, 16, 2, 8, seed=s) for s in range(3))

    def run(seed: int | Tensor | None) -> Tensor:
        return attention(q, k, v, dropout_p=0.5, seed=seed)

    assert torch.equal(run(5), run(torch.tensor(5)))
    assert torch.equal(run(5), run(torch.tensor([5])))
    assert not torch.equal(run(5), run(6))
    assert not torch.equal(run(5), run(5 + 2**40)), "the high half of the seed has no part"
    torch.manual_seed(0)
    first = run(None)
    assert not torch.equal(first, run(None))
    torch.manual_seed(0)
    assert torch.equal(first, run(None)), "a seed of None must follow torch's generator"
    state = torch.get_rng_state()
    attention(q, k, v, seed=None)
    assert torch.equal(state, torch.get_rng_state()), "without dropout the generator must not move"


# --- packing ---


@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=6, max_size=6), min_size=1, max_size=4),
    spare=st.integers(0, 3),
)
def test_cu_seqlens_from_document_ids(rows: list[list[int]], spare: int) -> None:
    ids = torch.tensor(rows)
    flat, T = ids.flatten().tolist(), ids.shape[1]
    starts = [i for i in range(len(flat)) if i % T == 0 or flat[i] != flat[i - 1]]
    capacity = len(starts) + spare
    result = cu_seqlens_from_document_ids(ids, capacity=capacity)
    assert result.dtype == torch.int32
    assert result.tolist() == starts + [len(flat)] * (capacity + 1 - len(starts))
    assert cu_seqlens_from_document_ids(ids).tolist() == starts + [len(flat)] * (len(flat) + 1 - len(starts))
    if len(starts) > ids.shape[0]:
        with pytest.raises(RuntimeError, match="more segments than capacity"):
            cu_seqlens_from_document_ids(ids, capacity=len(starts) - 1)


def test_cu_seqlens_from_document_ids_refuses() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int32)
    assert cu_seqlens_from_document_ids(ids[0]).tolist() == [0, 3, 3, 3]
    for bad, message in ((ids[None], "expected"), (ids.float(), "integer dtype")):
        with pytest.raises(ValueError, match=message):
            cu_seqlens_from_document_ids(bad)
    with pytest.raises(ValueError, match="2 rows of document_ids"):
        cu_seqlens_from_document_ids(ids, capacity=1)


# --- what is refused ---


def test_bad_arguments() -> None:
    x = torch.zeros(2, 4, 4, 16)
    two, half, short = x[:, :, :3], x.bfloat16(), x[:1]
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((x[0], x, x), {}, r"q \(4, 4, 16\): expected \(batch"),
        ((x, two, two), {}, "q has 4 heads and k 3"),
        ((x, x, two), {}, r"k \(2, 4, 4, 16\) and v \(2, 4, 3, 16\)"),
        ((x, x[..., :8], x[..., :8]), {}, "head_dim of k is 8 and of q 16"),
        ((x[..., :12],) * 3, {}, "head_dim 12: expected a multiple of 8 up to 512"),
        ((torch.zeros(1, 1, 1, 520),) * 3, {}, "head_dim 520"),
        ((x.int(),) * 3, {}, "q is torch.int32: expected one of"),
        ((x, half, half), {}, "k is torch.bfloat16 and q is torch.float32"),
        ((x, short, short), {}, "batch size 2 and k 1"),
        ((x, x.to("meta"), x), {}, "k is on meta and q on cpu"),
        ((x, x, x), {"window_size": (-2, 0)}, r"window_size = \(-2, 0\)"),
        ((x, x, x), {"window_size": (1,)}, "expected \\(left, right\\)"),
        ((x, x, x), {"scale": math.inf}, "scale = inf"),
        ((x, x, x), {"softcap": 0.0}, "softcap = 0.0"),
        ((x, x, x), {"dropout_p": 1.0}, "dropout_p = 1.0"),
        ((x, x, x), {"dropout_p": 0.1, "seed": -1}, "seed = -1"),
        ((x, x, x), {"dropout_p": 0.1, "seed": torch.tensor(1.0)}, "seed .* torch.float32"),
        ((x, x, x), {"alibi_slopes": torch.zeros(3)}, r"alibi_slopes \(3,\): expected \(4,\) or \(2, 4\)"),
        ((x, x, x), {"alibi_slopes": torch.zeros(4, dtype=torch.int32)}, "alibi_slopes is torch.int32"),
        ((x, x, x), {"sinks": torch.zeros(2, 4)}, r"sinks \(2, 4\): expected \(4,\)"),
    ]
    for tensors, options, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*tensors, **options)


def test_bad_boundaries() -> None:
    x = torch.zeros(6, 2, 8)
    good = cu(2, 4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"cu_seqlens_q": good.long()}, "cu_seqlens_q is torch.int64: expected torch.int32"),
        ({"cu_seqlens_q": good[None]}, r"cu_seqlens_q \(1, 3\): expected \(segments \+ 1,\)"),
        ({"cu_seqlens_q": good[:1]}, "at least one segment"),
        ({"cu_seqlens_q": good, "cu_seqlens_k": cu(6)}, "2 segments and cu_seqlens_k 1"),
        ({"cu_seqlens_q": good.to("meta")}, "cu_seqlens_q is on meta"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 2], dtype=torch.int32)}, "must start at 0 and never decrease"),
        ({"cu_seqlens_q": torch.tensor([1, 4, 6], dtype=torch.int32)}, "must start at 0 and never decrease"),
        ({"cu_seqlens_q": cu(4, 4)}, "cu_seqlens_q ends at 8, but q has 6 positions"),
        ({"cu_seqlens_q": good, "cu_seqlens_k": cu(3, 4)}, "cu_seqlens_k ends at 7, but k has 6 positions"),
        ({"cu_seqlens_q": good, "max_seqlen_q": 3}, "segment of 4 positions, longer than max_seqlen_q = 3"),
        ({"cu_seqlens_q": good, "max_seqlen_q": -1}, "max_seqlen_q = -1"),
    ]
    for options, message in cases:
        for name in BACKENDS:
            with use_backend(name), pytest.raises(ValueError, match=message):
                attention_varlen(x, x, x, **options)
    with pytest.raises(ValueError, match="cross attention needs cu_seqlens_k"):
        attention_varlen(x, x[:4], x[:4], cu_seqlens_q=cu(4))
