"""The C++ rows of logits on every instruction set: odd widths, conversions, exp and tanh at their ends."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels import _C
from hotloop.kernels.cross_entropy import cpu, cross_entropy, linear_cross_entropy_stats, reference
from hotloop.kernels.cross_entropy.cases import ALL_OPTIONS, EPS, composed, row_gradient, targets, value_and_gradients
from hotloop.kernels.cross_entropy.contract import Options
from hotloop.kernels.dispatch import BackendError, use_backend
from hotloop.kernels.testing import LAYOUTS, assert_no_worse, draw_values, lay_out

HAS = {"baseline": True, "avx2": "avx2" in _C.instruction_sets(), "avx512": "avx512f" in _C.instruction_sets()}
WIDTHS = [1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1000, 5003]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=HAS, autouse=True)
def instruction_set(request) -> Iterator[str]:
    if not HAS[request.param]:
        pytest.skip(f"this CPU has no {request.param}")
    _C.force_instruction_set(request.param)
    with use_backend("cpu"):
        yield request.param
    _C.force_instruction_set("")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 3.0, "z_loss": 1e-2}, ALL_OPTIONS])
def test_every_width(options: dict[str, Any], dtype: torch.dtype):
    for v in WIDTHS:
        x, t = draw_values((5, v), seed=v, dtype=dtype), targets(5, v, v, 0.2)
        if v > 4:
            t[0], t[1] = v - 1, 0
        weight = {"weight": draw_values((v,), seed=1, dtype=torch.float32).abs() + 0.1} if v % 2 else {}
        wide = {k: w.double() for k, w in weight.items()}
        truth_in, same_in, ours_in = (x.to(d).requires_grad_() for d in (torch.float64, dtype, dtype))
        truth = value_and_gradients(composed(truth_in, t, **options, **wide), truth_in)
        same = value_and_gradients(composed(same_in, t, **options, **weight), same_in)
        ours = value_and_gradients(cross_entropy(ours_in, t, **options, **weight), ours_in)
        assert_no_worse(ours[0], same[0].float(), truth[0], name=f"loss, V {v}", ulps=4)
        atol = EPS * row_gradient(t, {"reduction": "mean", **options, **weight})
        assert_no_worse(ours[1], same[1], truth[1], name=f"dinput, V {v}", ulps=4, atol=atol)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_statistics_and_their_gradients(label_smoothing: float, softcap: float | None):
    for n, d, v in ((7, 5, 33), (4, 3, 1000)):
        h, w = draw_values((n, d), seed=1, dtype=torch.float32), draw_values((v, d), seed=2, dtype=torch.float32)
        t = targets(n, v, 3, 0.3)
        call = {"reduction": "none", "z_loss": 0.1, "softcap": softcap, "label_smoothing": label_smoothing}

        def results(h: Tensor, w: Tensor, backend: str, t: Tensor = t, call: Any = call) -> list[Tensor]:
            h, w = h.requires_grad_(), w.requires_grad_()
            with use_backend(backend):
                out = linear_cross_entropy_stats(h, w, t, **call)
            parts = [out.loss, out.nll, out.lse, out.entropy]
            weighed = sum((p * torch.linspace(0.5, 1.5, len(p)) * (i + 1)).sum() for i, p in enumerate(parts))
            return [*parts, *torch.autograd.grad(weighed, (h, w)), out.predicted.float()]

        names = ("loss", "nll", "lse", "entropy", "dh", "dw", "predicted")
        truth, ours = results(h.double(), w.double(), "reference"), results(h.clone(), w.clone(), "cpu")
        same = results(h.clone(), w.clone(), "reference")
        for name, o, s, exact in zip(names, ours, same, truth, strict=True):
            assert_no_worse(o.detach(), s.detach(), exact.detach().double(), name=name, ulps=8, atol=8 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_read_exactly(dtype: torch.dtype):
    """The lse of one logit is the logit."""
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)[:, None]
    rows = cpu.KERNELS.rows_forward(x, torch.zeros(len(x), dtype=torch.int64), None, None, Options(), False)
    torch.testing.assert_close(rows.lse, x[:, 0].float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_to_nearest_even(dtype: torch.dtype):
    """Of two equal logits the gradient of the one that is no target is half the upstream gradient, exactly."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()]
    between = torch.cat([every, every * (1 + 2.0**-12), every * (1 - 2.0**-12), (every[1:] + every[:-1]) / 2])
    between = torch.cat([between, torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 7e4])
    dloss = 2 * between[between.abs() < 1e38]
    x = torch.zeros(len(dloss), 2, dtype=dtype)
    out = torch.empty_like(x)
    t = torch.zeros(len(dloss), dtype=torch.int64)
    cpu.KERNELS.rows_backward(dloss, x, t, None, None, dloss, Options(), out)
    assert torch.equal(out[:, 1], (0.5 * dloss).to(dtype))
    nan = torch.full((2,), float("nan"))
    cpu.KERNELS.rows_backward(nan, x[:2], t[:2], None, None, nan, Options(), out[:2])
    assert out[:2].isnan().all()


def test_exp_is_good_to_an_ulp():
    """p of a logit d below another one is exp(d) / (1 + exp(d)): the gradient shows it."""
    d = -torch.cat([torch.linspace(0, 88, 200_001), torch.tensor([0.0, 87.3, 88.1, 104.0, 1e4, float("inf")])])
    x = torch.stack([torch.zeros_like(d), d], 1)
    out = torch.empty_like(x)
    one = torch.ones(len(d))
    cpu.KERNELS.rows_backward(one, x, torch.zeros(len(d), dtype=torch.int64), None, None, one, Options(), out)
    truth = torch.softmax(x.double(), 1)[:, 1]
    error = (out[:, 1].double() - truth).abs()
    normal = truth > 2.0**-126
    assert (error[normal] / truth[normal]).max() < 2 * 2.0**-23
    assert error[~normal].max() < 2.0**-126
    assert out[-1, 1] == 0


def test_tanh_is_good_to_two_ulps():
    x = torch.cat([torch.logspace(-38, 2, 100_001), torch.linspace(0.5, 0.75, 10_001)])
    x = torch.cat([x, -x, torch.tensor([0.0, -0.0, float("inf"), -float("inf")])])[:, None]
    rows = cpu.KERNELS.rows_forward(x, torch.zeros(len(x), dtype=torch.int64), None, None, Options(softcap=1.0), False)
    truth = x[:, 0].double().tanh()
    error = (rows.lse.double() - truth).abs() / truth.abs().clamp_min(2.0**-126)
    assert error.max() < 3 * 2.0**-23


def test_threads_do_not_matter():
    x, t = draw_values((300, 777), dtype=torch.bfloat16), targets(300, 777, 0, 0.2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            y = x.clone()
            scale = torch.tensor(0.1)
            rows = cpu.KERNELS.rows_forward_backward_(y, t, None, None, scale, Options(**ALL_OPTIONS), True)
            found.append([y, *rows])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_nothing_is_written_outside():
    """Rows of a wider buffer: what lies between them, and the logits of a forward pass, stay as they are."""
    for dtype in DTYPES:
        for v in (1, 5, 16, 33):
            buffer = torch.full((4, v + 7), 3.0, dtype=dtype)
            t = torch.zeros(4, dtype=torch.int64)
            cpu.KERNELS.rows_forward(buffer[:, 2 : 2 + v], t, None, None, Options(softcap=1.0), True)
            assert (buffer == 3).all()
            cpu.KERNELS.rows_forward_backward_(buffer[:, 2 : 2 + v], t, None, None, torch.tensor(1.0), Options(), False)
            assert (buffer[:, :2] == 3).all()
            assert (buffer[:, 2 + v :] == 3).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_whatever_the_layout(layout: str):
    """Where the logits' columns are apart the gradient goes to them, and not to what follows the first."""
    for dtype in DTYPES:
        x, t = draw_values((5, 37), dtype=dtype), targets(5, 37, 0, 0.3)
        expected_in = x.clone().requires_grad_()
        expected = value_and_gradients(cross_entropy(expected_in, t), expected_in)
        room = lay_out(x, layout)
        whole = torch.empty(0, dtype=dtype).set_(room.untyped_storage())
        untouched = torch.ones(len(whole), dtype=torch.bool)
        inside = torch.arange(len(whole)).as_strided(room.shape, room.stride(), room.storage_offset())
        untouched[inside.flatten()] = False
        before = whole[untouched].clone()
        logits = room.requires_grad_().view_as(room)
        loss = cross_entropy(logits, t, inplace_backward=True)
        actual = (loss.detach(), torch.autograd.grad(loss, logits)[0])
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        assert torch.equal(room.detach(), actual[1])
        torch.testing.assert_close(whole[untouched], before, rtol=0, atol=0, equal_nan=True)


def test_long_rows_sum_as_exactly_as_short_ones():
    v = 300_000
    x = draw_values((2, v), seed=4, dtype=torch.float32)
    t = torch.tensor([0, v - 1])
    ours = cpu.KERNELS.rows_forward(x, t, None, None, Options(), True)
    truth = reference.rows_forward(x.double(), t, None, None, Options())
    torch.testing.assert_close(ours.lse.double(), truth.lse, rtol=2e-7, atol=0)
    torch.testing.assert_close(ours.entropy.double(), truth.entropy, rtol=4e-7, atol=0)
    torch.testing.assert_close(ours.loss, F.cross_entropy(x, t, reduction="none"), rtol=1e-6, atol=0)


def test_other_devices_and_dtypes_are_refused():
    t = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(BackendError, match="float64"):
        cross_entropy(torch.zeros(2, 3).double(), t)
    with pytest.raises(BackendError, match="on meta"):
        cpu.KERNELS.rows_forward(torch.zeros(2, 3, device="meta"), t, None, None, Options(), False)


def test_an_instruction_set_that_is_none_is_refused():
    with pytest.raises(ValueError, match="expected baseline, avx2, avx512 or avx512_bf16"):
        _C.force_instruction_set("sse9")
