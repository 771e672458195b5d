"""Drop-ins give their peers' values and gradients: PyTorch's on the CPU, Liger's from its kernels in the emulator."""

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.drop_in import liger
from hotloop.kernels.drop_in import torch_functional as ours_of

REDUCTIONS = ("mean", "sum", "none")


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    upstream = torch.linspace(0.5, 1.5, loss.numel()).view(loss.shape).to(loss.dtype)
    return (loss.detach(), *torch.autograd.grad(loss, inputs, upstream))


def assert_alike(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, equal_nan=True, **(tolerance or {"rtol": 2e-5, "atol": 2e-6}))


# --- torch.nn.functional ---

SHAPES = [((9,), ()), ((6, 9), (6,)), ((4, 9, 5), (4, 5)), ((2, 9, 3, 2), (2, 3, 2))]


@pytest.mark.parametrize(("shape", "rows"), SHAPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 3}, {"weight": True}])
def test_cross_entropy_is_pytorchs(shape, rows, reduction, options):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).requires_grad_()
    t = torch.randint(9, rows, generator=draw)
    given: dict[str, Any] = {**options, "reduction": reduction}
    if "weight" in options:
        given |= {"weight": torch.rand(9, generator=draw) + 0.1, "label_smoothing": 0.1}
    assert_alike(gradients(ours_of.cross_entropy(x, t, **given), x), gradients(F.cross_entropy(x, t, **given), x))


@pytest.mark.parametrize("function", ["logits", "linear"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_but_ignored_rows_is_pytorchs_nan(function, reduction):
    x, w = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    t = torch.full((3,), -100)
    if function == "logits":
        calls = (ours_of.cross_entropy(x, t, reduction=reduction), F.cross_entropy(x, t, reduction=reduction))
        assert_alike(*(gradients(loss, x) for loss in calls))
        return
    ours = gradients(ours_of.linear_cross_entropy(x, w, t, reduction=reduction), x, w)
    assert_alike(ours, gradients(F.cross_entropy(x @ w.T, t, reduction=reduction), x, w))


def test_legacy_arguments_and_dtypes():
    x, t = torch.randn(6, 9), torch.randint(9, (6,))
    for size_average, reduce in itertools.product((None, True, False), repeat=2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # both arguments are deprecated
            ours = ours_of.cross_entropy(x, t, None, size_average, -100, reduce)
            theirs = F.cross_entropy(x, t, None, size_average, -100, reduce)
        torch.testing.assert_close(ours, theirs)
    assert ours_of.cross_entropy(x.bfloat16(), t).dtype == torch.bfloat16


def test_what_is_not_served_says_so():
    with pytest.raises(TypeError, match=r"target is torch.float32, class probabilities: expected class indices"):
        ours_of.cross_entropy(torch.randn(3, 5), torch.rand(3, 5))
    with pytest.raises(ValueError, match=r"linear_weight has shape \(7, 2, 5\): expected \(C, in_features\)"):
        ours_of.linear_cross_entropy(torch.randn(3, 5), torch.randn(7, 2, 5), torch.zeros(3, 2, dtype=torch.int64))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2, "ignore_index": 3}, {"weight": True, "bias": True}])
def test_linear_cross_entropy_is_pytorchs(reduction, options):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    draw = torch.Generator().manual_seed(0)
    x, w = (torch.randn(shape, generator=draw).requires_grad_() for shape in ((6, 5), (9, 5)))
    t = torch.randint(9, (6,), generator=draw)
    given = {k: v for k, v in options.items() if k not in ("weight", "bias")} | {"reduction": reduction}
    inputs = [x, w]
    if "weight" in options:
        given["weight"] = torch.rand(9, generator=draw) + 0.1
        given["linear_bias"] = torch.randn(9, generator=draw).requires_grad_()
        inputs.append(given["linear_bias"])
    ours = gradients(ours_of.linear_cross_entropy(x, w, t, **given), *inputs)
    assert_alike(ours, gradients(F.linear_cross_entropy(x, w, t, **given), *inputs))


# --- Liger-Kernel ---

LIGER: list[dict[str, Any]] = [
    {},
    {"ignore_index": 3, "lse_square_scale": 1e-2, "label_smoothing": 0.1},
    {"softcap": 3.0, "reduction": "sum"},
    {"weight": True, "lse_square_scale": 1e-2, "label_smoothing": 0.1},
    {"lse_square_scale": 1e-2, "return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True},
]


def both(name: str, given: dict[str, Any]) -> tuple[Any, Any]:
    transformers = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    return getattr(liger, name)(**given), getattr(transformers, name)(**given)


def values(found: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    if isinstance(found, Tensor):
        return gradients(found, *inputs)
    extra = (found.z_loss, found.token_accuracy, found.predicted_tokens)
    return (*gradients(found.loss, *inputs), *(x.detach() for x in extra if x is not None))


@pytest.mark.parametrize("options", LIGER)
def test_cross_entropy_is_ligers(options):
    emulator = pytest.importorskip("hotloop.emulator")
    draw = torch.Generator().manual_seed(0)
    x, t = torch.randn(5, 70, generator=draw), torch.randint(70, (5,), generator=draw)
    t[1] = options.get("ignore_index", -100)
    given = {**options, **({"weight": torch.rand(70, generator=draw) + 0.1} if "weight" in options else {})}
    ours, theirs = both("LigerCrossEntropyLoss", given)
    own = x.clone().requires_grad_()
    found = values(ours(own, t), own)
    with emulator.triton("sm_80"):
        peer = x.clone().requires_grad_()
        expected = values(theirs(peer * 1.0, t), peer)  # its kernel overwrites its input
    assert_alike(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("options", [*LIGER, {"use_token_scaling": True}])
def test_fused_linear_cross_entropy_is_ligers(options):
    emulator = pytest.importorskip("hotloop.emulator")
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(5, 8, generator=draw), torch.randn(70, 8, generator=draw)
    bias, t = torch.randn(70, generator=draw), torch.randint(70, (5,), generator=draw)
    t[1] = options.get("ignore_index", -100)
    given = {k: v for k, v in options.items() if k != "weight"}
    if "weight" in options:
        given["ce_weight"] = torch.rand(70, generator=draw) + 0.1
    ours, theirs = both("LigerFusedLinearCrossEntropyLoss", given)
    results = []
    for module in (ours, theirs):
        inputs = [v.clone().requires_grad_() for v in (w, x, bias)]
        with emulator.triton("sm_80"):
            results.append(values(module(inputs[0], inputs[1], t, inputs[2]), *inputs))
    assert_alike(*results, rtol=5e-5, atol=5e-6)
