"""What the ops of attention promise to autograd, torch.compile, autocast, checkpointing and function transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from hotloop.kernels.attention import (
    attention,
    attention_varlen,
    attention_varlen_with_lse,
    attention_with_lse,
    cu_seqlens_from_document_ids,
    platform,
)
from hotloop.kernels.attention.arguments import assert_cu_seqlens
from hotloop.kernels.attention.op import TABLE, ops
from hotloop.kernels.attention.options import Call, Options
from hotloop.kernels.dispatch import BackendError, use_backend

BACKENDS = ("cpu", "torch", "reference")
RICH = ("cpu", "reference")  # serve all options


def widest(backend: str) -> torch.dtype:
    return torch.float32 if backend == "cpu" else torch.float64


def qkv(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend: str, varlen: bool, dtype: torch.dtype) -> None:
    q, k, v = qkv(*((7, 2, 8) if varlen else (2, 7, 2, 8)), dtype=dtype)
    cu_seqlens = torch.tensor([0, 3, 3, 5], dtype=torch.int32) if varlen else None
    rich = backend in RICH
    alibi_slopes = torch.rand(2, requires_grad=True) if rich else None
    sinks = torch.randn(2, requires_grad=True) if rich else None
    seed, dropout_p = (torch.tensor(5), 0.25) if rich else (None, 0.0)
    options = (7, 7, -1, 0, 0.3, 2.0 if rich else 0.0, dropout_p)
    forward = (q, k, v, cu_seqlens, None, alibi_slopes, sinks, seed, *options, backend)
    if dtype == torch.bfloat16:
        # Dense and packed gradients in 16 bits are compared bit for bit between eager and traced runs, too.
        torch.library.opcheck(ops.attention_forward.default, forward, rtol=0.0, atol=0.0)
    else:
        torch.library.opcheck(ops.attention_forward.default, forward)
    with torch.no_grad():
        o, lse = ops.attention_forward(*forward)
    saved = (*(x.detach() for x in (q, k, v)), o, lse, cu_seqlens, None)
    extras = tuple(None if x is None else x.detach() for x in (alibi_slopes, sinks, seed))
    for dlse in (None, torch.randn_like(lse)):
        for needs in ([True] * 5, [False, True, False, False, True]):
            needs = [n and (i < 3 or rich) for i, n in enumerate(needs)]
            arguments = (torch.randn_like(o), dlse, *saved, *extras, *options, backend, needs)
            torch.library.opcheck(ops.attention_backward.default, arguments)


def loss_of(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, **options: Any) -> Tensor:
    if cu_seqlens is None:
        o, lse = attention_with_lse(q, k, v, causal=True, **options)
    else:
        o, lse = attention_varlen_with_lse(q, k, v, cu_seqlens_q=cu_seqlens, causal=True, **options)
    return o.float().square().sum() + lse.masked_fill(lse.isinf(), 0).sin().sum()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("varlen", [False, True])
def test_compile_equals_eager(backend: str, varlen: bool) -> None:
    torch._dynamo.reset()
    cu_seqlens = torch.tensor([0, 3, 9, 9], dtype=torch.int32) if varlen else None
    x, _, _ = qkv(*((9, 2, 8) if varlen else (2, 9, 2, 8)))
    extras: dict[str, Any] = {}
    if backend in RICH:
        slopes, sinks = torch.rand(2, requires_grad=True), torch.randn(2, requires_grad=True)
        extras = {"alibi_slopes": slopes, "sinks": sinks, "dropout_p": 0.3, "seed": 11}
    inputs = [x, *(t for t in extras.values() if isinstance(t, Tensor))]

    def loss(x: Tensor, **extras: Any) -> Tensor:
        return loss_of(x, x, x, cu_seqlens, **extras)

    with use_backend(backend):
        eager = torch.autograd.grad(loss(x, **extras), inputs)
        value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, **extras)
        compiled = torch.autograd.grad(value, inputs)
    for expected, actual in zip(eager, compiled, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_inductor_with_dynamic_shapes() -> None:
    """One graph for two lengths, the projection and the slicing of a model included."""
    torch._dynamo.reset()
    w = torch.randn(16, 48, generator=torch.Generator().manual_seed(0)) / 4
    frames = []

    def loss(x: Tensor) -> Tensor:
        q, k, v = ((x @ w).unflatten(-1, (3, 2, 8))).unbind(-3)
        return attention(q, k, v, causal=True).square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for T in (12, 20):
        x = torch.randn(2, T, 16, requires_grad=True)
        (eager,) = torch.autograd.grad(loss(x), x)
        (actual,) = torch.autograd.grad(compiled(x), x)
        torch.testing.assert_close(actual, eager, rtol=1e-5, atol=1e-5)
        frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert frames[0] == frames[1], f"compiled again for another length: {frames}"


def test_compile_packing_and_random_seed() -> None:
    torch._dynamo.reset()
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 4, 5, 5]])
    x, _, _ = qkv(12, 2, 8)

    def f(x: Tensor) -> Tensor:
        cu_seqlens = cu_seqlens_from_document_ids(ids, capacity=8)
        return attention_varlen(x, x, x, cu_seqlens_q=cu_seqlens, dropout_p=0.5)

    o = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    cu_seqlens = cu_seqlens_from_document_ids(ids, capacity=8)
    keep_all = attention_varlen(x, x, x, cu_seqlens_q=cu_seqlens)
    assert o.shape == x.shape
    assert not torch.equal(o, keep_all), "dropout had no effect under torch.compile"


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor_as_q_k_and_v(backend: str) -> None:
    x, _, _ = qkv(2, 5, 2, 8, dtype=widest(backend))
    with use_backend(backend):
        (same,) = torch.autograd.grad(loss_of(x, x, x, None), x)
        parts = [x.detach().clone().requires_grad_() for _ in range(3)]
        separate = torch.autograd.grad(loss_of(*parts, None), parts)
    tolerance = 1e3 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(same, sum(separate), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(backend: str) -> None:
    q, k, v = qkv(2, 9, 2, 8)
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        o = attention(q, k, v.bfloat16())
    assert o.dtype == torch.bfloat16
    gradients = torch.autograd.grad(o.sum(), (q, k, v))
    assert [g.dtype for g in gradients] == [torch.float32] * 3
    with use_backend(backend):
        parts = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
        expected = attention(*parts)
        expected_gradients = torch.autograd.grad(expected.sum(), parts)
    assert torch.equal(o, expected)
    for actual, expected in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(actual, expected.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(*(x.detach().double() for x in (q, k, v))).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_mask(use_reentrant: bool) -> None:
    q, k, v = qkv(2, 9, 2, 8)

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, dropout_p=0.5).square()

    torch.manual_seed(3)
    plain = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    torch.manual_seed(3)
    again = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    checkpoint(f, *again, use_reentrant=use_reentrant).sum().backward()
    for expected, x in zip(plain, again, strict=True):
        assert x.grad is not None
        assert torch.equal(expected, x.grad)


def test_functional_call() -> None:
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = torch.nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            return attention(*self.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3), causal=True)

    torch.manual_seed(0)
    layer, other, x = Layer(), Layer(), torch.randn(2, 5, 16)
    parameters = dict(other.named_parameters())
    value = torch.func.functional_call(layer, parameters, (x,))
    assert torch.equal(value, other(x))
    expected = torch.autograd.grad(other(x).square().sum(), list(parameters.values()))
    actual = torch.autograd.grad(value.square().sum(), list(parameters.values()))
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "double backward", "compiled grad"])
def test_transforms_are_right_or_refused(backend: str, transform: str) -> None:
    q, k, v = qkv(2, 5, 2, 8, dtype=widest(backend))
    q = q.detach()
    k, v = k.detach(), v.detach()

    def loss(q: Tensor) -> Tensor:
        return loss_of(q, k, v, None)

    q_ = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(q_), q_)
    tangent = torch.ones_like(q)
    attempts = {
        "grad": (lambda: torch.func.grad(loss)(q), gradient),
        "compiled grad": (lambda: torch.compile(torch.func.grad(loss), backend="aot_eager")(q), gradient),
        "jvp": (lambda: torch.func.jvp(loss, (q,), (tangent,))[1], (gradient * tangent).sum()),
        "vmap": (
            lambda: torch.func.vmap(lambda q, k, v: attention(q[None], k[None], v[None], causal=True)[0])(q, k, v),
            attention(q, k, v, causal=True),
        ),
        "double backward": (
            lambda: torch.autograd.grad(torch.autograd.grad(loss(q_), q_, create_graph=True)[0].square().sum(), q_)[0],
            None,
        ),
    }
    attempt, expected = attempts[transform]
    torch._dynamo.reset()
    with use_backend(backend):
        try:
            value = attempt()
        except Exception as refusal:  # any type: what matters is that there is a reason and no number
            if not str(refusal).strip():
                raise AssertionError(f"{transform} was refused without a reason") from refusal
            return
    assert expected is not None, f"{transform} gave a number without a second derivative: {value}"
    tolerance = 1e5 * torch.finfo(q.dtype).eps
    torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("varlen", [False, True])
def test_work_follows_needs_input_grad(backend: str, varlen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[bool]] = []
    chosen = TABLE[backend]

    def backward(*arguments: Any) -> Any:
        seen.append(arguments[-1])
        return chosen.backward(*arguments)

    spy = type(chosen)(chosen.name, chosen.supports, chosen.forward, backward)
    monkeypatch.setitem(TABLE._by_name, backend, spy)
    q, k, v = (x.detach() for x in qkv(*((6, 2, 8) if varlen else (2, 6, 2, 8))))
    cu_seqlens = torch.tensor([0, 4, 6], dtype=torch.int32) if varlen else None
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    with use_backend(backend):
        expected = torch.autograd.grad(loss_of(*full, cu_seqlens), full)
        for i in range(3):
            inputs = [x.clone().requires_grad_(i == j) for j, x in enumerate((q, k, v))]
            loss_of(*inputs, cu_seqlens).backward()
            assert seen[-1][:3] == [i == j for j in range(3)]
            assert torch.equal(inputs[i].grad, expected[i])
            assert all(x.grad is None for j, x in enumerate(inputs) if i != j)
        before = len(seen)
        with torch.no_grad():
            assert not loss_of(*full, cu_seqlens).requires_grad
        assert not loss_of(q, k, v, cu_seqlens).requires_grad
        assert len(seen) == before


def test_only_lse_has_a_gradient() -> None:
    gradients = {}
    for backend in BACKENDS:
        q, k, v = qkv(2, 5, 2, 8, dtype=widest(backend))
        with use_backend(backend):
            lse = attention_with_lse(q, k, v, causal=True).lse
            gradients[backend] = torch.autograd.grad(lse.sin().sum(), (q, k, v))
        assert torch.equal(gradients[backend][2], torch.zeros_like(v))
    for backend in BACKENDS:
        for a, b in zip(gradients[backend], gradients["reference"], strict=True):
            tolerance = 1e3 * torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["fused", "transposed", "expanded"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(layout: str, backend: str) -> None:
    """Strided inputs and upstream gradients give the same bits; results and gradients are contiguous."""
    generator = torch.Generator().manual_seed(0)
    if layout == "fused":
        q, k, v = torch.randn(2, 7, 3, 2, 8, generator=generator).unbind(2)
    elif layout == "transposed":
        q, k, v = (torch.randn(2, 2, 8, 7, generator=generator).permute(0, 3, 1, 2) for _ in range(3))
    else:
        q, k, v = (torch.randn(1, 1, 2, 8, generator=generator).expand(2, 7, 2, 8) for _ in range(3))
    do = torch.randn(2, 2, 7, 8, generator=generator).transpose(1, 2)
    results = []
    for inputs in ((q, k, v), tuple(x.contiguous() for x in (q, k, v))):
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        with use_backend(backend):
            o = attention(*inputs, causal=True)
            gradients = torch.autograd.grad(o, inputs, do)
        assert all(x.is_contiguous() for x in (o, *gradients))
        results.append((o, *gradients))
    for strided, contiguous in zip(*results, strict=True):
        assert torch.equal(strided, contiguous)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1, 4], "start at 0"), ([0, 4, 3], "decreases"), ([0, 4, 9], "past the 8"), ([0, 1, 8], "longer than .* = 6")],
)
def test_assertions_about_boundaries(values: list[int], message: str) -> None:
    """What `check` asserts on a device is asserted at once on the CPU."""
    with pytest.raises(RuntimeError, match=f"cu_seqlens_k .*{message}"):
        assert_cu_seqlens("cu_seqlens_k", torch.tensor(values, dtype=torch.int32), 8, 6)
    assert_cu_seqlens("cu_seqlens_k", torch.tensor([0, 3, 3, 8], dtype=torch.int32), 8, 6)


@pytest.mark.parametrize("varlen", [False, True])
def test_fake_cuda_shapes(varlen: bool) -> None:
    """Shapes, dtypes and devices of a CUDA call, with no CUDA at hand and no data.

    The backward op is called by its name: a build of PyTorch without CUDA aborts on a graph of CUDA tensors.
    """
    with FakeTensorMode():
        q = torch.empty((6, 4, 16) if varlen else (3, 6, 4, 16), dtype=torch.bfloat16, device="cuda")
        k = torch.empty((*q.shape[:-2], 2, 16), dtype=torch.bfloat16, device="cuda")
        slopes, sinks = torch.empty(4, dtype=torch.bfloat16, device="cuda"), torch.empty(4, device="cuda")
        options: dict[str, Any] = {"alibi_slopes": slopes, "sinks": sinks, "dropout_p": 0.1, "softcap": 30.0}
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda") if varlen else None
        if cu_seqlens is not None:
            options["check"] = True  # asserted on the device
            o, lse = attention_varlen_with_lse(q, k, k, cu_seqlens_q=cu_seqlens, window_size=(4, None), **options)
        else:
            o, lse = attention_with_lse(q, k, k, window_size=(4, None), **options)
        assert (o.shape, o.dtype, o.device.type) == (q.shape, torch.bfloat16, "cuda")
        assert (lse.shape, lse.dtype) == ((4, 6) if varlen else (3, 4, 6), torch.float32)
        seed, needs = torch.empty((), dtype=torch.int64, device="cuda"), [True, True, False, True, True]
        saved = (q, k, k, o, lse, cu_seqlens, None, slopes.float(), sinks, seed)
        gradients = ops.attention_backward(o, None, *saved, 6, 6, 4, -1, 0.25, 30.0, 0.1, "reference", needs)
        assert [tuple(x.shape) for x in gradients] == [tuple(q.shape), tuple(k.shape), (0,), (4,), (4,)]
        assert [x.dtype for x in gradients[:2]] == [torch.bfloat16] * 2
        assert {x.device.type for x in gradients} == {"cuda"}


@pytest.mark.parametrize("varlen", [False, True])
def test_cuda_adapter_fits_the_signatures_of_aten(varlen: bool) -> None:
    """The calls of the CUDA half of the backend `torch`, on meta tensors: argument lists, shapes and dtypes."""
    q = torch.empty((6, 4, 16) if varlen else (3, 6, 4, 16), dtype=torch.bfloat16, device="meta")
    k = torch.empty((8, 2, 16) if varlen else (3, 8, 2, 16), dtype=torch.bfloat16, device="meta")
    cu_q, cu_k = (torch.empty(4, dtype=torch.int32, device="meta") if varlen else None for _ in range(2))
    for left, right in ((-1, 0), (-1, -1), (2, 1)):
        call = Call(q, k, k, cu_q, cu_k, None, None, None, Options(6, 8, left, right, 0.25, 0.0, 0.0))
        o, lse = platform.forward(call)
        assert (o.shape, o.dtype, lse.dtype) == (q.shape, q.dtype, torch.float32)
        assert lse.shape == ((4, 6) if varlen else (3, 4, 6))
        needs = [True, False, True, False, False]
        for dlse in (None, torch.empty_like(lse)):
            gradients = platform.backward(call, o, lse, o, dlse, needs)
            assert [tuple(x.shape) for x in gradients] == [tuple(q.shape), (0,), tuple(k.shape), (0,), (0,)]


def test_packing_of_another_device_reads_no_value() -> None:
    ids = torch.empty(2, 3, dtype=torch.int32, device="meta")
    packed = cu_seqlens_from_document_ids(ids, capacity=5)
    assert (packed.shape, packed.dtype, packed.device.type) == ((6,), torch.int32, "meta")


def test_choice_and_reasons() -> None:
    q, k, v = qkv(1, 4, 2, 8)
    arguments: dict[str, Any] = {
        "alibi_slopes": torch.rand(2),
        "sinks": torch.rand(2),
        "softcap": 3.0,
        "dropout_p": 0.5,
    }
    for name, value in arguments.items():
        with use_backend("torch"), pytest.raises(BackendError, match="PyTorch's kernels"):
            attention(q, k, v, **{name: value})
        assert attention(q, k, v, **{name: value}).shape == q.shape  # others serve it
    with use_backend("nothing"), pytest.raises(BackendError, match="has only cpu, torch, triton, cuda, reference"):
        attention(q, k, v)
    with use_backend("cpu"), pytest.raises(BackendError, match="takes float32, bfloat16 and float16"):
        attention(q.double(), k.double(), v.double())
    none, options = (None,) * 5, Options(4, 4, -1, -1, 1.0, 0.0, 0.0)
    assert TABLE.choose(Call(q, k, v, *none, options), needs_dlse=True).name == "cpu"
    with FakeTensorMode():
        wide = torch.empty(1, 4, 2, 256, dtype=torch.bfloat16, device="cuda")
        call = Call(wide, wide, wide, *none, options)
        assert "8 of which the gradient of lse needs" in str(platform.supports(call, needs_dlse=True))
        single = wide.float()
        assert "not torch.float32" in str(
            platform.supports(Call(single, single, single, *none, options), needs_dlse=False)
        )
        assert platform.supports(call, needs_dlse=False) is None or not torch.cuda.is_available()


def test_a_gradient_penalty_is_refused():
    """With the constant gradient of a sum, first derivatives that pass for constants would be silently wrong."""
    q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        (attention(q, k, v).sum() + dq.square().sum()).backward()
