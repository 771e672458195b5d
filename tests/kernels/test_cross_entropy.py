"""`cross_entropy`: the reference against PyTorch in fp64, backends against the reference, the operator's contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hotloop.kernels.cross_entropy import cross_entropy
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
from hotloop.kernels.cross_entropy.contract import Options
from hotloop.kernels.cross_entropy.op import CROSS_ENTROPY
from hotloop.kernels.dispatch import BackendError, explain, use_backend
from hotloop.kernels.testing import LAYOUTS, VALUES, assert_no_worse, draw_values, lay_out

BACKENDS = serving(CROSS_ENTROPY)
IN_FP64 = serving(CROSS_ENTROPY, torch.float64)
OFF_THE_CPU = serving(CROSS_ENTROPY, device="meta")
OPS = torch.ops.hotloop


# The reference


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", IN_FP64)
def test_every_option_is_pytorchs_in_fp64(backend: str, reduction: str):
    x = draw_values((3, 11, 17), dtype=torch.float64).requires_grad_()
    t = targets(33, 17, 0, 0.2).view(3, 11)
    weights = {"weight": torch.rand(17).double(), "token_weight": torch.randn(3, 11).double()}
    cases = [{name: value} for name, value in (ALL_OPTIONS | weights).items()]
    for chosen in [{}, *cases, ALL_OPTIONS, ALL_OPTIONS | weights]:
        expected = value_and_gradients(composed(x, t, reduction=reduction, **chosen), x)
        with use_backend(backend), small_blocks():
            actual = value_and_gradients(cross_entropy(x, t, reduction=reduction, **chosen), x)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14, msg=lambda m, c=chosen: f"{c}: {m}")


@pytest.mark.parametrize("backend", IN_FP64)
def test_gradcheck(backend: str):
    x = draw_values((5, 7), dtype=torch.float64).requires_grad_()
    t = targets(5, 7, 1, 0.2)
    weights = {"weight": torch.rand(7).double(), "token_weight": torch.rand(5).double()}
    with use_backend(backend):
        for reduction in ("mean", "none"):
            assert torch.autograd.gradcheck(
                lambda x, r=reduction: cross_entropy(x, t, reduction=r, **ALL_OPTIONS, **weights), (x,)
            )


# Backends


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_worse_than_pytorch(backend: str, dtype: torch.dtype, data: st.DataObject):
    n = data.draw(st.sampled_from([0, 1, 2, 13, 40]), "n")
    v = data.draw(st.sampled_from([1, 2, 7, 33, 130]), "v")
    kind = data.draw(st.sampled_from(VALUES), "values")
    layout = data.draw(st.sampled_from(LAYOUTS), "layout")
    chosen = options(data.draw(st.integers(0, 767), "options"), n, v)
    t = lay_out(targets(n, v, n, data.draw(st.sampled_from([0.0, 0.3, 1.0]), "ignored")), layout)
    x = draw_values((n, v), kind, seed=v, dtype=dtype)
    if dtype == torch.float16 and kind == "large":
        x = x.clamp(-3e4, 3e4)
    wide = {k: w.double() if isinstance(w, Tensor) else w for k, w in chosen.items()}
    laid_out = {k: lay_out(w, layout) if isinstance(w, Tensor) else w for k, w in chosen.items()}

    truth_in, same_in, ours_in = x.double().requires_grad_(), x.clone().requires_grad_(), lay_out(x, layout)
    truth, dtruth = value_and_gradients(composed(truth_in, t, **wide), truth_in)
    same, dsame = value_and_gradients(composed(same_in, t, **chosen), same_in)
    ours_in.requires_grad_()
    with use_backend(backend), small_blocks():
        ours, dours = value_and_gradients(cross_entropy(ours_in, t, **laid_out), ours_in)
    assert ours.dtype == torch.float32
    assert_no_worse(ours, same.float(), truth, name="loss", ulps=4)
    assert_no_worse(dours, dsame, dtruth, name="dinput", ulps=4, atol=EPS * row_gradient(t, chosen))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["target", "other"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinities_propagate_as_in_pytorch(backend: str, where: str, value: float):
    x = draw_values((4, 9), dtype=torch.float32)
    t = torch.tensor([0, 3, 5, 8])
    x[1, 3 if where == "target" else 6] = value
    for chosen in ({}, {"label_smoothing": 0.1}):
        expected_in, actual_in = x.clone().requires_grad_(), x.clone().requires_grad_()
        expected = value_and_gradients(F.cross_entropy(expected_in, t, reduction="none", **chosen), expected_in)
        with use_backend(backend):
            actual = value_and_gradients(cross_entropy(actual_in, t, reduction="none", **chosen), actual_in)
        torch.testing.assert_close(actual, expected, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_ignored_row_has_no_loss_and_no_gradient_whatever_is_in_it(backend: str):
    x = draw_values((4, 9), dtype=torch.float32)
    x[2] = float("nan")
    x.requires_grad_()
    t = torch.tensor([0, 3, IGNORE, 8])
    with use_backend(backend):
        loss, dx = value_and_gradients(cross_entropy(x, t), x)
    keep = torch.tensor([0, 1, 3])
    kept = x.detach()[keep].requires_grad_()
    expected, dkept = value_and_gradients(F.cross_entropy(kept, t[keep]), kept)
    torch.testing.assert_close((loss, dx[keep]), (expected, dkept))
    assert torch.equal(dx[2], torch.zeros(9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored(backend: str, n: int, reduction: str):
    x = torch.randn(n, 5, requires_grad=True)
    with use_backend(backend):
        for normalizer in (None, 0.0) if reduction != "none" else (None,):
            n_or_none = None if normalizer is None else torch.tensor(normalizer)
            loss = cross_entropy(x, torch.full((n,), IGNORE), reduction=reduction, normalizer=n_or_none)
            assert torch.equal(loss, torch.zeros(n) if reduction == "none" else torch.zeros(()))
            (dx,) = torch.autograd.grad(loss.sum(), x)
            assert torch.equal(dx, torch.zeros(n, 5))


def test_ignore_index_may_be_a_class():
    x, t = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    torch.testing.assert_close(cross_entropy(x, t, ignore_index=1), F.cross_entropy(x, t, ignore_index=1))


def test_normalizer_is_the_denominator_and_may_stay_on_the_device():
    x, t = torch.randn(6, 4), torch.tensor([0, 1, 2, IGNORE, 1, 0])
    total = F.cross_entropy(x, t, reduction="sum")
    for normalizer in (8.0, torch.tensor(8.0), torch.tensor([8])):
        for reduction in ("mean", "sum"):
            torch.testing.assert_close(cross_entropy(x, t, normalizer=normalizer, reduction=reduction), total / 8)


def test_a_single_row_and_further_dimensions():
    torch.testing.assert_close(
        cross_entropy(torch.arange(4.0), torch.tensor(2)), F.cross_entropy(torch.arange(4.0), torch.tensor(2))
    )
    x, t = torch.randn(2, 3, 5, 7), torch.randint(0, 7, (2, 3, 5))
    expected = F.cross_entropy(x.movedim(-1, 1), t, reduction="none")
    torch.testing.assert_close(cross_entropy(x, t, reduction="none"), expected)


# In place


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inplace_backward_writes_the_gradient_over_the_logits(backend: str, dtype: torch.dtype):
    x = torch.randn(6, 9, dtype=dtype, requires_grad=True)
    t = torch.tensor([0, 1, 2, IGNORE, 1, 8])
    with use_backend(backend):
        (expected,) = torch.autograd.grad(cross_entropy(x, t, **ALL_OPTIONS), x)
        logits = x * 1
        before = logits.detach().clone()
        loss = cross_entropy(logits, t, inplace_backward=True, **ALL_OPTIONS)
        assert torch.equal(logits, before)
        loss.backward()
    assert torch.equal(x.grad, expected)
    assert torch.equal(logits.detach(), expected)


def test_whoever_needs_overwritten_logits_again_is_refused():
    x, t = torch.randn(6, 9, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    logits = x * 1
    squares = logits.square().sum()
    loss = cross_entropy(logits, t, inplace_backward=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_callers_logits_stay_without_inplace_backward():
    logits = torch.randn(6, 9, requires_grad=True) * 1
    before, version = logits.detach().clone(), logits._version
    cross_entropy(logits, torch.zeros(6, dtype=torch.int64), softcap=2.0).backward()
    assert torch.equal(logits, before)
    assert logits._version == version


# The operator's contract

CALL = (*ALL_OPTIONS.values(),)


def operands(n: int = 5, v: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(n, v, requires_grad=True), targets(n, v, 1, 0.2), torch.rand(v), torch.rand(n)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str):
    x, t, weight, token_weight = operands()
    numbers = (IGNORE, *CALL)
    torch.library.opcheck(OPS.cross_entropy_forward.default, (x, t, weight, token_weight, *numbers, False, backend))
    torch.library.opcheck(
        OPS.cross_entropy_forward.default, (x, t, None, None, IGNORE, 0.0, 0.0, None, 1.0, False, backend)
    )
    saved = (t, weight, token_weight, x.detach().logsumexp(-1))
    for op in (OPS.cross_entropy_backward.default, OPS.cross_entropy_backward_.default):
        torch.library.opcheck(op, (torch.rand(5), x.detach().clone(), *saved, *numbers, backend))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler: str, inplace: bool):
    torch._dynamo.reset()
    x, t, weight, token_weight = operands()

    def f(x: Tensor) -> Tensor:
        return cross_entropy(
            x * 2, t, weight=weight, token_weight=token_weight, inplace_backward=inplace, **ALL_OPTIONS
        )

    compiled = torch.compile(f, fullgraph=True, backend=compiler)
    torch.testing.assert_close(value_and_gradients(compiled(x), x), value_and_gradients(f(x), x))


def test_compiled_with_one_tensor_passed_twice():
    torch._dynamo.reset()
    x, t, _, _ = operands(7, 7)

    def f(x: Tensor, y: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return cross_entropy(x, t) + cross_entropy(y, u, z_loss=0.1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(value_and_gradients(compiled(x, x, t, t), x), value_and_gradients(f(x, x, t, t), x))


def test_autocast_keeps_fp32_logits():
    x, t, _, _ = operands()
    with torch.autocast("cpu", torch.bfloat16):
        loss = value_and_gradients(cross_entropy(x, t), x)
    torch.testing.assert_close(loss, value_and_gradients(cross_entropy(x, t), x), rtol=0, atol=0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool):
    from torch.utils.checkpoint import checkpoint

    x, t, _, _ = operands()
    loss = checkpoint(lambda x: cross_entropy(x, t, **ALL_OPTIONS), x, use_reentrant=reentrant)
    expected = value_and_gradients(cross_entropy(x, t, **ALL_OPTIONS), x)
    loss.backward()
    torch.testing.assert_close((loss.detach(), x.grad), expected, rtol=0, atol=0)


def test_vmap_is_a_loop():
    xs, t = torch.randn(3, 5, 7), targets(5, 7, 1, 0.2)
    torch.testing.assert_close(
        torch.vmap(lambda x: cross_entropy(x, t))(xs), torch.stack([cross_entropy(x, t) for x in xs])
    )


def test_transforms_without_a_rule_are_refused():
    x, t, _, _ = operands()
    plain = x.detach()

    def f(x: Tensor) -> Tensor:
        return cross_entropy(x, t)

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(f)(plain)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.jvp(f, (plain,), (plain,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        f(torch.autograd.forward_ad.make_dual(plain, plain))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.compile(torch.func.grad(f), backend="aot_eager")(plain)
    (dx,) = torch.autograd.grad(f(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (f(x) + dx.square().sum()).backward()


def test_shapes_and_dtypes_on_a_device_that_is_not_there():
    """No autograd: PyTorch's engine wants a driver even for fake CUDA tensors."""
    with FakeTensorMode(), torch.no_grad():
        for dtype, loss_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
            x = torch.empty(4, 6, 10, dtype=dtype, device="cuda")
            t = torch.empty(4, 6, dtype=torch.int64, device="cuda")
            loss = cross_entropy(x, t, z_loss=0.1, normalizer=torch.empty((), device="cuda"))
            rows = cross_entropy(x, t, reduction="none")
            assert (loss.shape, loss.dtype, loss.device.type) == ((), loss_dtype, "cuda")
            assert (rows.shape, rows.dtype, rows.device.type) == ((4, 6), loss_dtype, "cuda")
            numbers = (IGNORE, *CALL, "torch")
            flat, lse = x.view(24, 10), rows.view(24)
            dx = OPS.cross_entropy_backward(lse, flat, t.view(24), None, None, lse, *numbers)
            assert (dx.shape, dx.dtype, dx.device.type) == ((24, 10), dtype, "cuda")


@pytest.mark.parametrize("name", OFF_THE_CPU)
def test_off_the_cpu_no_value_is_read(name: str):
    """The backend's own code on meta tensors, on which reading a value raises."""
    x, t = torch.empty(24, 10, dtype=torch.bfloat16, device="meta"), torch.empty(24, dtype=torch.int64, device="meta")
    numbers = Options(IGNORE, *CALL)
    backend = CROSS_ENTROPY[name]
    loss, lse = backend.forward(x, t, None, None, numbers)
    assert backend.backward is not None
    backend.backward(loss, x, t, None, None, lse, numbers, torch.empty_like(x))
    with pytest.raises(RuntimeError, match="meta tensors"):
        bool((t == 0).any())


# Choice of backend and errors


def test_explain_and_forcing():
    x, t, _, _ = operands()
    assert "  * cpu " in explain("cross_entropy", x, t)
    assert "torch.float64" in explain("cross_entropy", x.double(), t)
    with use_backend("reference"):
        assert "  * reference " in explain("cross_entropy", x, t)
    with use_backend("flash"), pytest.raises(BackendError, match="'flash' was asked for, but cross_entropy has only"):
        cross_entropy(x, t)


def test_a_compiled_loss_follows_use_backend():
    torch._dynamo.reset()
    x, t, _, _ = operands()
    seen: list[Any] = []

    def record(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(node.args[-1] for node in graph.graph.nodes if "cross_entropy_forward" in str(node.target))
        return graph.forward

    compiled = torch.compile(lambda x: cross_entropy(x, t), fullgraph=True, backend=record)
    compiled(x)
    with use_backend("reference"):
        compiled(x)
    assert seen == ["cpu", "reference"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction 'avg'"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss -1.0"),
        ({"softcap": 0.0}, ValueError, "softcap 0.0"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale nan"),
        ({"normalizer": 3.0, "reduction": "none"}, ValueError, "normalizer was given with reduction 'none'"),
        ({"normalizer": torch.ones(2)}, ValueError, r"normalizer has shape \(2,\)"),
        ({"normalizer": torch.ones((), device="meta")}, ValueError, "normalizer is on meta"),
        ({"normalizer": torch.ones((), requires_grad=True)}, ValueError, "normalizer requires a gradient"),
        ({"input": torch.randn(5, 7).long()}, TypeError, "input has dtype torch.int64"),
        ({"input": torch.randn(())}, ValueError, r"input \(\)"),
        ({"input": torch.randn(5, 0)}, ValueError, "0 classes"),
        ({"target": torch.zeros(5)}, TypeError, r"target has dtype torch.float32.*target.long\(\)"),
        ({"target": torch.zeros(5, dtype=torch.int32)}, TypeError, "target has dtype torch.int32"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, ValueError, r"target has shape \(4,\) and input \(5, 7\)"),
        (
            {"target": torch.zeros(5, dtype=torch.int64, device="meta")},
            ValueError,
            "target is on meta and input on cpu",
        ),
        ({"target": [0] * 5}, TypeError, "target is a list"),
        ({"target": torch.full((5,), 7)}, IndexError, "target 7 .flat position 0.: expected a class from 0 to 6"),
        ({"target": torch.full((5,), -1)}, IndexError, "target -1"),
        ({"weight": torch.ones(6)}, ValueError, r"weight has shape \(6,\).*\(7,\)"),
        ({"weight": torch.ones(7, requires_grad=True)}, ValueError, "weight requires a gradient"),
        ({"token_weight": torch.ones(7)}, ValueError, r"token_weight has shape \(7,\)"),
        ({"inplace_backward": True, "input": torch.randn(5, 7, requires_grad=True)}, ValueError, "are a leaf"),
    ],
)
def test_errors_say_what_was_given(change: dict[str, Any], error: type[Exception], message: str):
    arguments = {"input": torch.randn(5, 7), "target": torch.zeros(5, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        cross_entropy(arguments.pop("input"), arguments.pop("target"), **arguments)
