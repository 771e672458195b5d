"""`linear_cross_entropy`, its statistics and module: accuracy, schedules, compaction, work done, contract."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hotloop.kernels.cross_entropy import (
    LinearCrossEntropy,
    config,
    cross_entropy,
    gemm,
    linear_cross_entropy,
    linear_cross_entropy_stats,
)
from hotloop.kernels.cross_entropy.cases import (
    ALL_OPTIONS,
    EPS,
    IGNORE,
    composed,
    options,
    row_gradient,
    serving,
    small_blocks,
    targets,
    value_and_gradients,
)
from hotloop.kernels.cross_entropy.contract import Needs, Options, Upstream
from hotloop.kernels.cross_entropy.linear import ONE_PASS, RECOMPUTE
from hotloop.kernels.cross_entropy.schedule import ProductSum, Selection
from hotloop.kernels.dispatch import BackendError, explain, use_backend
from hotloop.kernels.testing import LAYOUTS, assert_no_worse, draw_values, lay_out

BACKENDS = serving(ONE_PASS)
IN_FP64 = serving(ONE_PASS, torch.float64)
OFF_THE_CPU = serving(ONE_PASS, device="meta")
OPS = torch.ops.hotloop
SCHEDULES = ("one_pass", "recompute")


def exact(shape: tuple[int, ...], size: float, *, seed: int, dtype: torch.dtype) -> Tensor:
    """Multiples of size / 4 of few bits: their products and sums of products are exact in fp32, so that what differs
    between two ways to compute a loss is not the order in which a logit was summed."""
    return (draw_values(shape, seed=seed, dtype=torch.float64) * 4).round().clamp(-16, 16).to(dtype) * (size / 4)


def operands(n: int = 23, d: int = 6, v: int = 11, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    h = draw_values((n, d), seed=1, dtype=dtype).requires_grad_()
    w = draw_values((v, d), seed=2, dtype=dtype).requires_grad_()
    return h, w, targets(n, v, 3, 0.3)


# Accuracy


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_option_is_pytorchs_in_fp64(backend: str, schedule: str, reduction: str):
    if schedule == "one_pass" and reduction == "none":
        schedule = "auto"
    h, w, t = operands(33, dtype=torch.float64)
    h, t = h.detach().view(3, 11, 6).requires_grad_(), t.view(3, 11)
    bias = torch.randn(11).double().requires_grad_()
    weights = {"weight": torch.rand(11).double(), "token_weight": torch.randn(3, 11).double()}
    cases = [{name: value} for name, value in (ALL_OPTIONS | weights).items()]
    for chosen in [{}, *cases, ALL_OPTIONS, ALL_OPTIONS | weights]:
        chosen = chosen | {"reduction": reduction}
        expected = value_and_gradients(composed(F.linear(h, w, bias), t, **chosen), h, w, bias)
        with use_backend(backend), small_blocks():
            loss = linear_cross_entropy(h, w, t, linear_bias=bias, schedule=schedule, **chosen)
            actual = value_and_gradients(loss, h, w, bias)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13, msg=lambda m, c=chosen: f"{c}: {m}")


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradcheck(backend: str, schedule: str):
    h, w, t = operands(5, 3, 7, torch.float64)
    bias = torch.randn(7).double().requires_grad_()
    weights = {"weight": torch.rand(7).double(), "token_weight": torch.rand(5).double()}
    with use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda h, w, b: linear_cross_entropy(h, w, t, linear_bias=b, schedule=schedule, **ALL_OPTIONS, **weights),
            (h, w, bias),
        )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_pytorch(backend: str, schedule: str, dtype: torch.dtype, data: st.DataObject):
    n = data.draw(st.sampled_from([0, 1, 2, 13, 40]), "n")
    v = data.draw(st.sampled_from([1, 2, 7, 33]), "v")
    d = data.draw(st.sampled_from([1, 5, 16]), "d")
    size = data.draw(st.sampled_from([2.0**-10, 1.0, 64.0]), "size")  # the last gives logits of some 1e4
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    chosen = options(data.draw(st.integers(0, 767), "options"), n, v)
    if chosen["reduction"] == "none":
        schedule = "recompute"
    t = lay_out(targets(n, v, n, data.draw(st.sampled_from([0.0, 0.3, 1.0]), "ignored")), layout)
    inputs = [exact((n, d), size, seed=d, dtype=dtype), exact((v, d), min(size, 8.0), seed=v, dtype=dtype)]
    if data.draw(st.booleans(), "bias"):
        inputs.append(exact((v,), 1.0, seed=n, dtype=dtype))
    wide = {k: x.double() if isinstance(x, Tensor) else x for k, x in chosen.items()}
    laid_out = {k: lay_out(x, layout) if isinstance(x, Tensor) else x for k, x in chosen.items()}

    truth_in = [x.double().requires_grad_() for x in inputs]
    same_in = [x.clone().requires_grad_() for x in inputs]
    ours_in = [lay_out(x, layout).requires_grad_() for x in inputs]
    logits = F.linear(truth_in[0], truth_in[1], *truth_in[2:])
    truth = value_and_gradients(composed(logits, t, **wide), *truth_in)
    same = value_and_gradients(composed(F.linear(same_in[0], same_in[1], *same_in[2:]), t, **chosen), *same_in)
    with use_backend(backend), small_blocks():
        loss = linear_cross_entropy(
            ours_in[0], ours_in[1], t, linear_bias=ours_in[2] if inputs[2:] else None, schedule=schedule, **laid_out
        )
        ours = value_and_gradients(loss, *ours_in)
    assert loss.dtype == torch.float32
    # The logits are rounded to `dtype` by both, z_loss squares them, and PyTorch's loss is rounded to it once more.
    rounded = 0.5 * torch.finfo(dtype).eps * truth[0].abs().max().item() if truth[0].numel() else 0.0
    assert_no_worse(ours[0], same[0].float(), truth[0], name="loss", ulps=4, atol=rounded)
    # exp(x - lse) carries the rounding of lse, which one_pass has no need of.
    lse = logits.detach().abs().max().item() if schedule == "recompute" and n else 0.0
    terms = row_gradient(t, chosen) * EPS * (4 + lse)
    sums = (inputs[1].abs().sum(0), inputs[0].abs().sum(0), torch.tensor([float(n)]))
    for name, sum_of, *gradients in zip(
        ("dinput", "dlinear_weight", "dlinear_bias"), sums, ours[1:], same[1:], truth[1:], strict=False
    ):
        atol = terms * sum_of.double().max().item() if sum_of.numel() else 0.0
        assert_no_worse(*gradients, name=name, ulps=4, atol=atol)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_propagate_as_in_pytorch(backend: str, schedule: str, value: float):
    h, w, t = operands()
    bias = torch.zeros(11)
    bias[4] = value
    for t_all in (t, torch.full_like(t, 4), torch.full_like(t, 3)):
        expected = value_and_gradients(F.cross_entropy(F.linear(h, w, bias), t_all), h, w)
        with use_backend(backend):
            loss = linear_cross_entropy(h, w, t_all, linear_bias=bias, schedule=schedule)
            loss, *gradients = value_and_gradients(loss, h, w)
        torch.testing.assert_close(loss, expected[0], equal_nan=True)
        for actual, wanted in zip(gradients, expected[1:], strict=True):
            # PyTorch's ignored rows are 0 * NaN; ours have no gradient.
            rows = t_all != IGNORE if actual.shape == h.shape else slice(None)
            torch.testing.assert_close(actual[rows], wanted[rows], equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ignored_rows_reach_nothing(backend: str, schedule: str):
    h, w, t = operands()
    keep = t != IGNORE
    poisoned = torch.where(keep[:, None], h.detach(), float("nan")).requires_grad_()
    kept = h.detach()[keep].requires_grad_()
    expected = value_and_gradients(F.cross_entropy(F.linear(kept, w), t[keep]), kept, w)
    with use_backend(backend):
        loss, dh, dw = value_and_gradients(linear_cross_entropy(poisoned, w, t, schedule=schedule), poisoned, w)
    torch.testing.assert_close((loss, dh[keep], dw), expected)
    assert not dh[~keep].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("n", [0, 3])
def test_all_rows_ignored(backend: str, schedule: str, n: int):
    h, w, _ = operands(n)
    bias = torch.zeros(11, requires_grad=True)
    with use_backend(backend):
        for normalizer in (None, torch.tensor(0.0), torch.tensor(8)):
            loss = linear_cross_entropy(
                h, w, torch.full((n,), IGNORE), linear_bias=bias, normalizer=normalizer, schedule=schedule
            )
            result = value_and_gradients(loss, h, w, bias)
            assert [x.count_nonzero().item() for x in result] == [0, 0, 0, 0]
            assert [x.isnan().any().item() for x in result] == [False] * 4
        out = linear_cross_entropy_stats(h, w, torch.full((n,), IGNORE))
        assert out.n_valid == 0
        assert torch.equal(out.predicted, torch.full((n,), -1))


def test_micro_batches_add_up_to_the_batch():
    n, v = 384, 700
    h, w, t = operands(n, 64, v)
    normalizer = (t != IGNORE).sum()
    _, dh, dw = value_and_gradients(linear_cross_entropy(h, w, t, normalizer=normalizer), h, w)
    for size in (96, 31):
        dw_sum, dh_parts = torch.zeros_like(dw), []
        for part, t_part in zip(h.detach().split(size), t.split(size), strict=True):
            part.requires_grad_()
            _, dh_part, dw_part = value_and_gradients(
                linear_cross_entropy(part, w, t_part, normalizer=normalizer), part, w
            )
            dh_parts.append(dh_part)
            dw_sum += dw_part
        assert (dw_sum - dw).norm() <= 1e-6 * dw.norm()
        assert (torch.cat(dh_parts) - dh).norm() <= 1e-6 * dh.norm()


def test_shift_predicts_the_next_token_and_never_across_documents():
    h = torch.randn(2, 8, 6, requires_grad=True)
    w = torch.randn(11, 6, requires_grad=True)
    t = torch.randint(0, 11, (2, 8))
    t[0, 3] = IGNORE  # first token of a document
    token_weight = torch.rand(2, 8)
    chosen: dict[str, Any] = {"token_weight": token_weight, "reduction": "none"}
    expected = composed(F.linear(h, w)[:, :-1], t[:, 1:], token_weight=token_weight[:, 1:], reduction="none")
    actual = linear_cross_entropy(h, w, t, shift=True, **chosen)
    torch.testing.assert_close(actual, F.pad(expected, (0, 1)))
    assert actual[0, 2] == 0
    mean = linear_cross_entropy(h, w, t, shift=True)
    expected_mean = F.cross_entropy(F.linear(h, w)[:, :-1].flatten(0, 1), t[:, 1:].flatten())
    torch.testing.assert_close(value_and_gradients(mean, h, w), value_and_gradients(expected_mean, h, w))
    assert linear_cross_entropy(h[:, :1], w, t[:, :1], shift=True) == 0
    assert linear_cross_entropy(h[:, :0], w, t[:, :0], shift=True) == 0


def test_a_padded_vocabulary_never_enters_the_softmax():
    h, w, t = operands(v=16)
    t = t.clamp(max=10)
    expected = value_and_gradients(F.cross_entropy(F.linear(h, w[:11]), t), h, w)
    torch.testing.assert_close(value_and_gradients(linear_cross_entropy(h, w[:11], t), h, w), expected)


# Statistics


@pytest.mark.parametrize("backend", IN_FP64)
@pytest.mark.parametrize("schedule", ["auto", "one_pass", "recompute"])
def test_statistics(backend: str, schedule: str):
    h, w, t = operands(24, dtype=torch.float64)
    h, t = h.view(2, 12, 6), t.view(2, 12)
    x = 2.0 * torch.tanh(0.7 * F.linear(h, w) / 2.0)
    valid = t != IGNORE
    logp = x.log_softmax(-1)
    with use_backend(backend), small_blocks():
        out = linear_cross_entropy_stats(h, w, t, z_loss=0.1, softcap=2.0, logit_scale=0.7, schedule=schedule)
    zero = torch.zeros(())
    picked = logp.gather(-1, t.clamp(min=0)[..., None]).squeeze(-1)
    torch.testing.assert_close(out.loss, composed(F.linear(h, w), t, z_loss=0.1, softcap=2.0, logit_scale=0.7))
    torch.testing.assert_close(out.nll, torch.where(valid, -picked, zero))
    torch.testing.assert_close(out.lse, torch.where(valid, x.logsumexp(-1), zero))
    torch.testing.assert_close(out.z_loss, torch.where(valid, 0.1 * x.logsumexp(-1).square(), zero))
    torch.testing.assert_close(out.entropy, torch.where(valid, -(logp.exp() * logp).sum(-1), zero))
    assert torch.equal(out.predicted, torch.where(valid, x.argmax(-1), -1))
    assert torch.equal(out.correct, valid & (x.argmax(-1) == t))
    assert out.n_valid == valid.sum()
    detached = [not x.requires_grad for x in (out.nll, out.lse, out.z_loss, out.entropy)]
    assert detached == [schedule == "one_pass"] * 4


@pytest.mark.parametrize("backend", IN_FP64)
def test_statistics_are_differentiable(backend: str):
    h, w, t = operands(5, 3, 7, torch.float64)

    def f(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        out = linear_cross_entropy_stats(h, w, t, z_loss=0.1, softcap=2.0, reduction="none", label_smoothing=0.1)
        return out.loss, out.nll, out.lse, out.z_loss, out.entropy

    with use_backend(backend), small_blocks():
        assert torch.autograd.gradcheck(f, (h, w))


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_where_a_probability_is_zero(backend: str):
    h, w = torch.ones(2, 1, requires_grad=True), torch.ones(3, 1, requires_grad=True)
    bias = torch.tensor([0.0, float("-inf"), 0.0])
    with use_backend(backend):
        out = linear_cross_entropy_stats(h, w, torch.tensor([0, 2]), linear_bias=bias)
    torch.testing.assert_close(out.entropy, torch.full((2,), 2.0).log())
    dh, dw = torch.autograd.grad(out.entropy.sum(), (h, w))
    assert torch.equal(dh, torch.zeros(2, 1))
    assert torch.equal(dw, torch.zeros(3, 1))


def test_statistics_without_gradients_take_one_pass():
    h, w, t = operands()
    with torch.no_grad():
        out = linear_cross_entropy_stats(h, w, t)
    torch.testing.assert_close(out, linear_cross_entropy_stats(h, w, t))


# Compaction


@pytest.mark.parametrize("mode", ["bounded", "mask"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_selections_of_a_gpu_give_the_same(mode: str, schedule: str, dtype: torch.dtype):
    """They are plain tensor arithmetic, so they run on a CPU as well; NaN in ignored rows must not spread."""
    h, w, t = operands(37, dtype=dtype)
    h = torch.where((t != IGNORE)[:, None], h.detach(), float("nan")).requires_grad_()
    token_weight = torch.rand(37)
    max_valid = int((t != IGNORE).sum())

    def run() -> tuple[Tensor, ...]:
        out = linear_cross_entropy_stats(
            h, w, t, token_weight=token_weight, z_loss=0.1, max_valid=max_valid, schedule=schedule
        )
        return *value_and_gradients(out.loss, h, w), *(x.detach() for x in out[1:])

    def choose(target: Tensor, ignore_index: int, max_valid: int) -> Selection:
        if mode == "mask":
            return Selection.mask(target, ignore_index)
        selection = Selection.bounded(target, ignore_index, max_valid)
        assert selection.index is not None
        assert selection.index.shape[0] == config.capacity(37, max_valid) < 37
        return selection

    expected = run()
    with mock.patch.object(Selection, "choose", choose), small_blocks():
        actual = run()
    for a, b in zip(actual, expected, strict=True):
        assert not a.isnan().any()
        assert (a.double() - b.double()).norm() <= 2 * torch.finfo(h.dtype).eps * b.double().norm()


@pytest.mark.parametrize(("valid", "max_valid"), [(0, 0), (0, 5), (5, 5), (7, 8), (12, 12), (12, 3)])
def test_bounded_selection(valid: int, max_valid: int):
    n = 12
    t = torch.full((n,), IGNORE)
    t[torch.randperm(n, generator=torch.Generator().manual_seed(0))[:valid]] = 1
    with small_blocks():
        selection = Selection.bounded(t, IGNORE, max_valid)
    x = torch.arange(1.0, n + 1)
    taken = selection.take(x)
    assert taken.shape == (min(n, -(-max_valid // 4) * 4),)
    kept = x[t != IGNORE][: len(taken)]  # of an overflow, the rows that fit
    assert torch.equal(taken, F.pad(kept, (0, len(taken) - len(kept))))
    assert torch.equal(selection.put(taken, -1.0), torch.where(torch.isin(x, kept), x, -1.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_valid_rows_than_promised_give_nan(schedule: str, reduction: str):
    h, w, t = operands()
    valid = int((t != IGNORE).sum())
    if reduction == "none":
        schedule = "recompute"
    chosen: dict[str, Any] = {"reduction": reduction, "schedule": schedule}
    assert linear_cross_entropy(h, w, t, max_valid=valid, **chosen).isfinite().all()
    loss = linear_cross_entropy(h, w, t, max_valid=valid - 1, **chosen)
    assert loss.isnan().all()
    dh, dw = torch.autograd.grad(loss.sum(), (h, w))
    assert dh[t != IGNORE].isnan().all()
    assert dw.isnan().all()


# Work done


def products(f: Callable[[], Any]) -> int:
    """Matrix products that f computes."""
    with torch.autograd.profiler.profile() as profile:
        f()
    return sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in profile.function_events)


@pytest.mark.parametrize(
    ("reduction", "input", "head", "expected"),
    [
        ("mean", False, False, 1),
        ("mean", True, False, 2),
        ("mean", False, True, 2),
        ("mean", True, True, 3),
        ("none", False, False, 1),
        ("none", True, False, 3),
        ("none", False, True, 3),
        ("none", True, True, 4),
    ],
)
def test_work_follows_the_gradients_that_are_asked_for(reduction: str, input: bool, head: bool, expected: int):
    h, w, t = operands()
    h, w = h.detach().requires_grad_(input), w.detach().requires_grad_(head)

    def step() -> None:
        loss = linear_cross_entropy(h, w, t, reduction=reduction).sum()
        if loss.requires_grad:
            loss.backward()

    assert products(step) == expected
    assert (h.grad is not None, w.grad is not None) == (input, head)
    with torch.no_grad():
        assert products(lambda: linear_cross_entropy(h, w, t, reduction=reduction)) == 1


def test_gradients_agree_when_one_side_is_frozen():
    h, w, t = operands()
    bias = torch.zeros(11, requires_grad=True)
    for schedule in SCHEDULES:
        every = torch.autograd.grad(linear_cross_entropy(h, w, t, linear_bias=bias, schedule=schedule), (h, w, bias))
        for at in range(3):
            given = [x if i == at else x.detach() for i, x in enumerate((h, w, bias))]
            loss = linear_cross_entropy(given[0], given[1], t, linear_bias=given[2], schedule=schedule)
            (alone,) = torch.autograd.grad(loss, given[at])
            assert torch.equal(alone, every[at])


def test_tied_embedding():
    w = torch.randn(11, 6, requires_grad=True)
    tokens, t = torch.randint(0, 11, (2, 9)), torch.randint(0, 11, (2, 9))
    expected = value_and_gradients(
        F.cross_entropy(F.linear(F.embedding(tokens, w).tanh(), w).flatten(0, 1), t.flatten()), w
    )
    for schedule in SCHEDULES:
        loss = linear_cross_entropy(F.embedding(tokens, w).tanh(), w, t, schedule=schedule)
        torch.testing.assert_close(value_and_gradients(loss, w), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_upstream_scale_and_retained_graphs(dtype: torch.dtype):
    h, w, t = operands(dtype=dtype)
    once = torch.autograd.grad(linear_cross_entropy(h, w, t), (h, w))
    loss = linear_cross_entropy(h, w, t)
    assert torch.autograd.grad(loss * 1, (h, w), retain_graph=True)[0].equal(once[0])
    for scale in (4.0, 1.0, 0.5):
        scaled = torch.autograd.grad(loss * scale, (h, w), retain_graph=True)
        for a, b in zip(scaled, once, strict=True):
            torch.testing.assert_close(a, b * scale)
    last = torch.autograd.grad(loss * 2, (h, w))
    torch.testing.assert_close(last, tuple(2 * g for g in once))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, (h, w))


def test_a_large_loss_scale_saves_fp16_gradients_from_underflow():
    n, v = 512, 256
    h = (draw_values((n, 8), seed=0, dtype=torch.float32) * 1e-3).half().requires_grad_()
    w = (draw_values((v, 8), seed=1, dtype=torch.float32) * 1e-3).half().requires_grad_()
    t = targets(n, v, 2, 0.0)
    loss = linear_cross_entropy(h, w, t)
    dh, dw = torch.autograd.grad(loss * 2.0**16, (h, w))
    wide = [x.detach().double().requires_grad_() for x in (h, w)]
    dh_wide, dw_wide = torch.autograd.grad(F.cross_entropy(F.linear(*wide), t) * 2.0**16, wide)
    assert (dw.double() - dw_wide).norm() < 2e-3 * dw_wide.norm()
    assert (dh.double() - dh_wide).norm() < 2e-3 * dh_wide.norm()


# The operators' contract

NUMBERS = (IGNORE, *ALL_OPTIONS.values(), None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stats", [False, True])
def test_opcheck(backend: str, stats: bool):
    h, w, t = operands(5, 3, 7)
    bias, weight, token_weight = torch.zeros(7, requires_grad=True), torch.rand(7), torch.rand(5)
    rows = (h, w, t, bias, weight, token_weight)
    plain = (h, w.detach(), t, None, None, None)
    one_pass, forward = OPS.linear_cross_entropy_one_pass.default, OPS.linear_cross_entropy_rows.default
    scale = torch.tensor(0.3)
    torch.library.opcheck(one_pass, (*rows, scale, *NUMBERS, stats, True, True, True, backend))
    torch.library.opcheck(one_pass, (*plain, scale, *NUMBERS, stats, True, False, False, backend))
    torch.library.opcheck(forward, (*rows, *NUMBERS, stats, backend))
    torch.library.opcheck(forward, (*plain, *NUMBERS, stats, backend))
    upstream = (torch.rand(5), None, torch.rand(5), torch.rand(5) if stats else None)
    saved = (torch.rand(5), torch.rand(5 if stats else 0))
    detached = [None if x is None else x.detach() for x in rows]
    torch.library.opcheck(
        OPS.linear_cross_entropy_rows_backward.default,
        (*upstream, *detached, *saved, *NUMBERS, True, False, True, backend),
    )


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mean": lambda h, w, t: linear_cross_entropy(h, w, t),
    "shift": lambda h, w, t: linear_cross_entropy(h, w, t, shift=True, max_valid=30, **ALL_OPTIONS),
    "none": lambda h, w, t: linear_cross_entropy(h, w, t, reduction="none").square().sum(),
    "stats": lambda h, w, t: linear_cross_entropy_stats(h, w, t, z_loss=0.1).entropy.sum(),
}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", LOSSES)
def test_compiled_equals_eager(name: str, compiler: str):
    torch._dynamo.reset()
    h, w, t = operands()
    f = LOSSES[name]
    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    expected = value_and_gradients(f(h, w, t), h, w)
    for _ in range(2):
        torch.testing.assert_close(value_and_gradients(compiled(h, w, t), h, w), expected)
    with torch.no_grad():
        torch.testing.assert_close(compiled(h, w, t), expected[0])
    frozen = compiled(h, w.detach(), t)
    torch.testing.assert_close(torch.autograd.grad(frozen, h)[0], expected[1])


def test_compiled_with_one_tensor_passed_twice():
    torch._dynamo.reset()
    x = torch.randn(7, 7, requires_grad=True)
    t = targets(7, 7, 0, 0.2)
    for schedule in SCHEDULES:

        def f(h: Tensor, w: Tensor, s: str = schedule) -> Tensor:
            return linear_cross_entropy(h, w, t, schedule=s)

        compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
        expected = value_and_gradients(F.cross_entropy(F.linear(x, x), t), x)
        torch.testing.assert_close(value_and_gradients(f(x, x), x), expected)
        torch.testing.assert_close(value_and_gradients(compiled(x, x), x), expected)


def test_compiled_backward_twice_through_a_retained_graph():
    torch._dynamo.reset()
    h, w, t = operands()
    loss = torch.compile(LOSSES["mean"], fullgraph=True, backend="aot_eager")(h, w, t)
    first = torch.autograd.grad(loss, (h, w), torch.tensor(3.0), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), torch.tensor(3.0))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_autocast_projects_in_the_narrow_dtype(schedule: str):
    h, w, t = operands()
    narrow = linear_cross_entropy(h.bfloat16(), w.bfloat16(), t, schedule=schedule)
    expected = value_and_gradients(narrow, h, w)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, w, t, schedule=schedule)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(value_and_gradients(loss, h, w), expected, rtol=0, atol=0)
    wide = linear_cross_entropy(h, w, t)
    assert wide != loss
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert linear_cross_entropy(h, w, t) == wide
    h64, w64, _ = operands(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_cross_entropy(h64, w64, t) == linear_cross_entropy(h64.detach(), w64.detach(), t)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_activation_checkpointing(schedule: str, reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    h, w, t = operands()
    expected = value_and_gradients(linear_cross_entropy(h, w, t, schedule=schedule), h, w)
    loss = checkpoint(lambda h, w: linear_cross_entropy(h, w, t, schedule=schedule), h, w, use_reentrant=reentrant)
    loss.backward()
    torch.testing.assert_close((loss.detach(), h.grad, w.grad), expected, rtol=0, atol=0)


def test_vmap_is_a_loop():
    h, w, t = operands()
    hs, w = torch.randn(3, *h.shape), w.detach()
    for reduction in ("mean", "none"):
        looped = torch.stack([linear_cross_entropy(x, w, t, reduction=reduction) for x in hs])
        torch.testing.assert_close(
            torch.vmap(lambda x, r=reduction: linear_cross_entropy(x, w, t, reduction=r))(hs), looped
        )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_transforms_without_a_rule_are_refused(schedule: str):
    h, w, t = operands()
    plain = h.detach()

    def f(h: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, t, schedule=schedule)

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(f)(plain)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(f, (plain,), (plain,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(torch.autograd.forward_ad.make_dual(plain, plain))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.compile(torch.func.grad(f), backend="aot_eager")(plain)
    (dh,) = torch.autograd.grad(f(h), h, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (f(h) + dh.square().sum()).backward()


def test_the_operator_alone_gives_no_gradient_that_it_did_not_compute():
    h, w, t = operands()
    loss, *_ = OPS.linear_cross_entropy_one_pass(
        h, w, t, None, None, None, torch.ones(()), *NUMBERS, False, True, False, False, "torch"
    )
    with pytest.raises(RuntimeError, match="without asking for the gradient of linear_weight"):
        loss.backward()


def test_shapes_and_dtypes_on_a_device_that_is_not_there():
    """No autograd: PyTorch's engine wants a driver even for fake CUDA tensors."""
    with FakeTensorMode(), torch.no_grad():
        for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64,) * 2):
            h, w = torch.empty(4, 6, 8, dtype=dtype, device="cuda"), torch.empty(10, 8, dtype=dtype, device="cuda")
            t = torch.empty(4, 6, dtype=torch.int64, device="cuda")
            out = linear_cross_entropy_stats(h, w, t, max_valid=5)
            assert (out.loss.shape, out.loss.dtype, out.loss.device.type) == ((), wide, "cuda")
            assert {(x.shape, x.dtype) for x in (out.nll, out.lse, out.z_loss, out.entropy)} == {(t.shape, wide)}
            assert (out.correct.dtype, out.predicted.dtype, out.n_valid.shape) == (torch.bool, torch.int64, ())
            assert linear_cross_entropy(h, w, t, reduction="none").shape == (4, 6)
            flat = (h.view(24, 8), w, t.view(24), None, None, None)
            *_, dh, dw, db = OPS.linear_cross_entropy_one_pass(
                *flat, out.loss, *NUMBERS, False, True, True, False, "torch"
            )
            saved = torch.float32 if dtype == torch.float16 else dtype
            assert [(tuple(g.shape), g.dtype) for g in (dh, dw, db)] == [
                ((24, 8), saved),
                ((10, 8), saved),
                ((0,), saved),
            ]
            rows = out.lse.view(24)
            dh, dw, db = OPS.linear_cross_entropy_rows_backward(
                rows, None, None, None, *flat, rows, rows, *NUMBERS, False, True, True, "torch"
            )
            assert [(tuple(g.shape), g.dtype) for g in (dh, dw, db)] == [
                ((0,), dtype),
                ((10, 8), dtype),
                ((10,), dtype),
            ]


@pytest.mark.parametrize("max_valid", [None, 5])
@pytest.mark.parametrize("backend", OFF_THE_CPU)
def test_off_the_cpu_no_value_is_read(backend: str, max_valid: int | None):
    """The backends' own code on meta tensors, on which reading a value raises."""
    h, w = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((24, 8), (10, 8)))
    t = torch.empty(24, dtype=torch.int64, device="meta")
    numbers = Options(IGNORE, **ALL_OPTIONS)
    every = Needs(True, True, True)
    with small_blocks():
        loss, rows, _ = ONE_PASS[backend].forward(
            h, w, t, w[:, 0], None, None, torch.empty((), device="meta"), numbers, max_valid, True, every
        )
        assert loss.shape == ()
        rows = RECOMPUTE[backend].forward(h, w, t, w[:, 0], None, None, numbers, max_valid, True)
        backward = RECOMPUTE[backend].backward
        assert backward is not None
        upstream = Upstream(rows.loss, rows.nll, rows.lse, rows.entropy)
        backward(upstream, h, w, t, w[:, 0], None, None, rows.lse, rows.entropy, numbers, max_valid, every)


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 63, 2048, 100_000])
@pytest.mark.parametrize("v", [1, 4096, 50_304, 262_144])
def test_chunks(n: int, v: int, dtype: torch.dtype):
    for count, size in ((n, config.chunk_rows(n, v, dtype)), (v, config.tile_columns(n, v, 64, dtype))):
        other = v if count == n else n
        assert 1 <= size <= max(count, 1)
        assert size == max(count, 1) or size % config.MULTIPLE == 0
        assert size * other * dtype.itemsize <= config.CHUNK_BYTES or size <= config.MULTIPLE
    assert 1 <= config.block_rows(n, v, "cpu") <= max(n, 1)


def test_capacity_is_rounded_up_and_never_above_the_rows():
    assert [config.capacity(5000, k) for k in (0, 1, 1024, 1025, 5000)] == [0, 1024, 1024, 2048, 5000]


# Module


def test_module_is_the_function():
    weight, bias = torch.rand(11), True
    head = LinearCrossEntropy(6, 11, bias=bias, weight=weight, shift=True, **ALL_OPTIONS)
    assert set(dict(head.named_parameters())) == {"linear_weight", "linear_bias"}
    h, t = torch.randn(2, 9, 6, requires_grad=True), targets(18, 11, 0, 0.2).view(2, 9)
    token_weight = torch.rand(2, 9)
    w, b = head.linear_weight, head.linear_bias
    expected = linear_cross_entropy(
        h, w, t, linear_bias=b, weight=weight, token_weight=token_weight, shift=True, normalizer=5.0, **ALL_OPTIONS
    )
    actual = head(h, t, token_weight=token_weight, normalizer=5.0)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(
        composed(head.logits(h)[:, :-1], t[:, 1:], reduction="none"),
        linear_cross_entropy(h, w, t, linear_bias=b, softcap=3.0, logit_scale=0.7, shift=True, reduction="none")[
            :, :-1
        ],
    )


def test_functional_call_uses_the_parameters_it_is_given():
    head = LinearCrossEntropy(6, 11)
    h, _, t = operands()
    w = torch.randn(11, 6, requires_grad=True)
    loss = torch.func.functional_call(head, {"linear_weight": w}, (h, t))
    expected = value_and_gradients(F.cross_entropy(F.linear(h, w), t), h, w)
    torch.testing.assert_close(value_and_gradients(loss, h, w), expected)
    assert head.linear_weight.grad is None


def test_module_ties_an_embedding_with_a_padded_vocabulary():
    embedding = nn.Embedding(16, 6)
    head = LinearCrossEntropy(6, 11, tied_weight=embedding.weight)
    assert head.linear_weight is embedding.weight
    tokens, t = torch.randint(0, 11, (9,)), torch.randint(0, 11, (9,))
    loss = head(embedding(tokens), t)
    expected = F.cross_entropy(F.linear(embedding(tokens), embedding.weight[:11]), t)
    torch.testing.assert_close(
        value_and_gradients(loss, embedding.weight), value_and_gradients(expected, embedding.weight)
    )
    assert head.logits(embedding(tokens)).shape == (9, 11)
    with pytest.raises(ValueError, match=r"tied_weight has shape \(16, 6\): expected \(17 or more, 6\)"):
        LinearCrossEntropy(6, 17, tied_weight=embedding.weight)


@pytest.fixture
def one_rank() -> Iterator[Any]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp2_gathers_the_modules_weight_and_a_sharded_weight_is_refused(one_rank: Any):
    from torch.distributed.fsdp import fully_shard

    h, _, t = operands()
    head = LinearCrossEntropy(6, 11)
    plain = head.linear_weight.detach().clone().requires_grad_()
    fully_shard(head, mesh=one_rank)
    loss = head(h, t)
    loss.backward()
    expected = value_and_gradients(linear_cross_entropy(h, plain, t), h, plain)
    torch.testing.assert_close((loss.detach(), h.grad, head.linear_weight.grad.full_tensor()), expected)
    head.reshard()
    with pytest.raises(TypeError, match=r"linear_weight is a DTensor.*LinearCrossEntropy own the projection"):
        linear_cross_entropy(h, head.linear_weight, t)
    with pytest.raises(TypeError, match="input is a DTensor"):
        cross_entropy(head.linear_weight, t[:11])


# Choice of backend and errors


def test_explain_and_forcing():
    h, w, t = operands()
    lines = explain("linear_cross_entropy", h, w, t).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "linear_cross_entropy.one_pass",
        "linear_cross_entropy.recompute",
    ]
    with use_backend("flash"), pytest.raises(BackendError, match="'flash' was asked for"):
        linear_cross_entropy(h, w, t)


def test_a_compiled_loss_follows_use_backend_and_reads_the_environment(monkeypatch: pytest.MonkeyPatch):
    h, w, t = operands()
    seen: list[Any] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "one_pass" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(LOSSES["mean"], fullgraph=True, backend=record)
    compiled(h, w, t)
    with use_backend("reference"):
        compiled(h, w, t)
    compiled(h, w, t)
    assert seen == ["cpu", "reference"]
    torch._dynamo.reset()
    monkeypatch.setenv("HOTLOOP_BACKEND", "reference")
    compiled(h, w, t)
    assert seen == ["cpu", "reference", "reference"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"schedule": "fast"}, ValueError, "schedule 'fast'"),
        ({"schedule": "one_pass", "reduction": "none"}, ValueError, "schedule 'one_pass' .* use 'recompute'"),
        ({"normalizer": 3.0, "reduction": "none"}, ValueError, "normalizer was given with reduction 'none'"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \(2,\)"),
        ({"max_valid": -1}, ValueError, "max_valid -1"),
        ({"softcap": -2.0}, ValueError, "softcap -2.0"),
        ({"linear_weight": torch.randn(7, 4)}, ValueError, r"linear_weight has shape \(7, 4\) and input \(5, 3\)"),
        ({"linear_weight": torch.randn(7)}, ValueError, r"linear_weight has shape \(7,\)"),
        ({"linear_weight": torch.randn(0, 3)}, ValueError, "0 classes"),
        (
            {"linear_weight": torch.randn(7, 3).bfloat16()},
            TypeError,
            "linear_weight has dtype torch.bfloat16.*autocast",
        ),
        ({"linear_weight": torch.randn(7, 3, device="meta")}, ValueError, "linear_weight is on meta"),
        ({"linear_bias": torch.randn(6)}, ValueError, r"linear_bias has shape \(6,\)"),
        ({"linear_bias": torch.randn(7).double()}, TypeError, "linear_bias has dtype torch.float64"),
        ({"input": torch.randn(())}, ValueError, r"input \(\)"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target has shape \(4,\) and input \(5, 3\)"),
        ({"target": torch.zeros(5)}, TypeError, "target has dtype torch.float32"),
        ({"target": torch.zeros(5, dtype=torch.int64, device="meta")}, ValueError, "target is on meta"),
        ({"target": torch.full((5,), 7)}, IndexError, "target 7"),
        ({"target": torch.full((5,), 7), "reduction": "none"}, IndexError, "target 7"),
        ({"weight": torch.ones(6)}, ValueError, r"weight has shape \(6,\)"),
        ({"token_weight": torch.ones(4)}, ValueError, r"token_weight has shape \(4,\)"),
        ({"token_weight": torch.ones(5, requires_grad=True)}, ValueError, "token_weight requires a gradient"),
        (
            {"input": torch.randn(3), "target": torch.tensor(0), "shift": True},
            ValueError,
            "shift was given for a single",
        ),
    ],
)
def test_errors_say_what_was_given(change: dict[str, Any], error: type[Exception], message: str):
    given = {"input": torch.randn(5, 3), "linear_weight": torch.randn(7, 3), "target": torch.zeros(5).long()} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(given.pop("input"), given.pop("linear_weight"), given.pop("target"), **given)


# Sums of products in fp32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_rows", [True, False])
def test_products_are_added_in_fp32(dtype: torch.dtype, by_rows: bool):
    if not gemm.is_there(dtype, torch.device("cpu")):
        pytest.skip("this build of PyTorch exports no such product: `ProductSum` takes two steps")
    draw = torch.Generator().manual_seed(0)
    for m, k, n in ((1, 1, 1), (7, 33, 5), (64, 129, 40), (3, 0, 4), (130, 16, 1)):
        a = torch.randn(*((m, k) if by_rows else (k, m)), generator=draw).to(dtype)
        a = a if by_rows else a.T
        b = torch.randn(k, n + 3, generator=draw).to(dtype)[:, :n]  # rows apart
        total = torch.full((m, n), math.nan)
        assert gemm.serves(total, a, b) or k == 0
        exact = a.double() @ b.double()
        for beta in (0.0, 1.0):
            gemm.add_product(total, a, b, beta=beta)
            expected = exact * (1 + beta)
            torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5)
    assert not gemm.serves(total, a.float(), b.float())
    assert not gemm.serves(total, a, b.T.contiguous().T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_both_ways_to_add_products_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    draw = torch.Generator().manual_seed(1)
    parts = [
        (torch.randn(40, 16, generator=draw).to(dtype), torch.randn(16, 24, generator=draw).to(dtype)) for _ in range(5)
    ]
    exact = sum(a.double() @ b.double() for a, b in parts)
    errors = {}
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(gemm, "serves", lambda *_: False)
        total = ProductSum((40, 24), dtype, torch.device("cpu"), len(parts))
        for a, b in parts:
            total.add(a, b)
        errors[direct] = ((total.result().double() - exact).norm() / exact.norm()).item()
    assert errors[False] < torch.finfo(dtype).eps
    assert errors[True] <= errors[False]
    if gemm.is_there(dtype, torch.device("cpu")):
        assert errors[True] < 1e-6
