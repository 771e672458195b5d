"""Drop-ins around attention: FlashAttention-2's functions against its documentation, PyTorch's against PyTorch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hotloop.kernels.attention import attention
from hotloop.kernels.drop_in import flash_attn
from hotloop.kernels.drop_in.padding import ValidRows
from hotloop.kernels.drop_in.torch_functional import scaled_dot_product_attention
from hotloop.kernels.testing import assert_no_worse


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cu(*lengths: int) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def gradients(f: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """The outputs of f, and the gradients of the inputs for a fixed upstream of the first output."""
    inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
    outputs = f(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = torch.autograd.grad(outputs[0], inputs, normal(*outputs[0].shape, seed=99, dtype=outputs[0].dtype))
    return [*(x.detach() for x in outputs if x is not None), *grads]


# --- FlashAttention-2 ---

COMMON = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
BOTH_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")


@pytest.mark.parametrize(
    ("name", "required", "more"),
    [
        ("flash_attn_func", ("q", "k", "v"), {}),
        ("flash_attn_kvpacked_func", ("q", "kv"), {}),
        ("flash_attn_qkvpacked_func", ("qkv",), {}),
        ("flash_attn_varlen_func", ("q", "k", "v", *BOTH_LENGTHS), {"block_table": None}),
        ("flash_attn_varlen_kvpacked_func", ("q", "kv", *BOTH_LENGTHS), {}),
        ("flash_attn_varlen_qkvpacked_func", ("qkv", "cu_seqlens", "max_seqlen"), {}),
    ],
)
def test_signatures_are_the_peers(name: str, required: tuple[str, ...], more: dict[str, Any]) -> None:
    parameters = inspect.signature(getattr(flash_attn, name)).parameters
    given = {p.name: p.default for p in parameters.values() if p.default is not p.empty}
    assert tuple(parameters) == (*required, *COMMON, *more)
    assert given == {**COMMON, **more}


def as_documented(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    alibi_slopes=None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sentences of the peer's docstring, dense: out (B, Tq, Hq, D) and softmax_lse (B, Hq, Tq)."""
    (_, Tq, Hq, D), (Tk, Hk) = q.shape, k.shape[1:3]
    k, v = (x.repeat_interleave(Hq // Hk, 2) for x in (k, v))
    s = torch.einsum("bihd,bjhd->bhij", q, k) * (1 / math.sqrt(D) if softmax_scale is None else softmax_scale)
    s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
    i, j = torch.arange(Tq)[:, None], torch.arange(Tk)
    if alibi_slopes is not None:
        s = s - alibi_slopes[..., None, None] * (i + Tk - Tq - j).abs()
    left, right = window_size
    seen = (i + Tk - Tq - j <= left) | torch.tensor(left < 0)
    seen = seen & ((j <= i + Tk - Tq + right) | torch.tensor(right < 0))
    seen = seen & (j <= i + Tk - Tq) if causal else seen
    blind = ~seen.any(1)
    s = s.masked_fill(~(seen | blind[:, None]), -math.inf)
    o = torch.einsum("bhij,bjhd->bihd", s.softmax(-1), v).masked_fill(blind[:, None, None], 0)
    return o, s.logsumexp(-1).masked_fill(blind, math.inf)


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True, "deterministic": True},
    {"window_size": (2, 1), "softmax_scale": 0.3},
    {"causal": True, "window_size": (2, 3), "softcap": 1.5},
    {"softcap": -1.0, "window_size": (-1, 0)},
    {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)},
    {"causal": True, "alibi_slopes": torch.linspace(0, 1, 8, dtype=torch.float64).view(2, 4)},
)


@pytest.mark.parametrize("size", [(5, 5), (2, 5), (5, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_flash_attn_is_as_documented(size: tuple[int, int], options: dict[str, Any]) -> None:
    """Values, softmax_lse and gradients of all six; the segments of the packed ones are the rows of the batch."""
    (Tq, Tk), B = size, 2
    D = 12 if Tq < Tk else 8
    q, k, v = normal(B, Tq, 4, D, seed=1), normal(B, Tk, 2, D, seed=2), normal(B, Tk, 2, D, seed=3)
    probs = {**options, "return_attn_probs": True}
    truth = gradients(
        lambda *x: as_documented(*x, **{n: o for n, o in options.items() if n != "deterministic"}), q, k, v
    )

    def check(actual: list[Tensor]) -> None:
        for a, t in zip(actual, truth, strict=True):
            torch.testing.assert_close(a, t, rtol=1e-10, atol=1e-11)

    check(gradients(lambda *x: flash_attn.flash_attn_func(*x, **probs), q, k, v))
    check(gradients(lambda q, k, v: flash_attn.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), **probs), q, k, v))
    only = flash_attn.flash_attn_func(q, k, v, **options)
    torch.testing.assert_close(only, truth[0], rtol=1e-10, atol=1e-11)

    lengths = (cu(*[Tq] * B), cu(*[Tk] * B), Tq, torch.tensor(Tk))

    def batched(found: Any) -> tuple[Tensor, Tensor]:
        out, lse, none = found
        assert none is None
        return out.unflatten(0, (B, Tq)), lse.unflatten(1, (B, Tq)).transpose(0, 1)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = (x.flatten(0, 1) for x in (q, k, v))
        return batched(flash_attn.flash_attn_varlen_func(*rows, *lengths, **probs))

    def varlen_kv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv = torch.stack([k, v], 2).flatten(0, 1)
        return batched(flash_attn.flash_attn_varlen_kvpacked_func(q.flatten(0, 1), kv, *lengths, **probs))

    check(gradients(varlen, q, k, v))
    check(gradients(varlen_kv, q, k, v))
    if Tq != Tk:
        return

    def together(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # (B, T, 3, Hq, D)
        return torch.stack([q, k.repeat_interleave(2, 2), v.repeat_interleave(2, 2)], 2)

    def varlen_qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        qkv = together(q, k, v).flatten(0, 1)
        return batched(flash_attn.flash_attn_varlen_qkvpacked_func(qkv, lengths[0], None, **probs))

    check(gradients(lambda *x: flash_attn.flash_attn_qkvpacked_func(together(*x), **probs), q, k, v))
    check(gradients(varlen_qkv, q, k, v))


def test_flash_attn_dropout() -> None:
    """The mask is that of `attention` from the same generator, whichever function applies it."""
    q, k, v = (normal(2, 9, 2, 8, seed=s) for s in range(3))
    for function in (
        lambda: attention(q, k, v, dropout_p=0.4),
        lambda: flash_attn.flash_attn_func(q, k, v, 0.4),
        lambda: flash_attn.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), 0.4),
        lambda: flash_attn.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu(9, 9), cu(9, 9), 9, 9, 0.4
        ).view(q.shape),
    ):
        torch.manual_seed(3)
        actual = function()
        torch.manual_seed(3)
        torch.testing.assert_close(actual, attention(q, k, v, dropout_p=0.4))
    assert (actual - attention(q, k, v)).abs().max() > 0.1


def test_flash_attn_refuses() -> None:
    q = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"return_attn_probs with dropout_p = 0.5: probabilities are never formed"):
        flash_attn.flash_attn_func(q, q, q, 0.5, return_attn_probs=True)
    with pytest.raises(ValueError, match="block_table: a paged cache is not served"):
        flash_attn.flash_attn_varlen_func(q[0], q[0], q[0], cu(4), cu(4), 4, 4, block_table=torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r"qkv \(1, 4, 2, 8\): expected \(batch, positions, 3, heads, head_dim\)"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match=r"kv \(4, 3, 2, 8\): expected \(total, 2, heads, head_dim\)"):
        flash_attn.flash_attn_varlen_kvpacked_func(q[0], torch.zeros(4, 3, 2, 8), cu(4), cu(4), 4, 4)
    with pytest.raises(ValueError, match="head_dim of k is 16 and of q 8"):
        flash_attn.flash_attn_func(q, torch.zeros(1, 4, 2, 16), torch.zeros(1, 4, 2, 16))


# --- torch.nn.functional ---

LEADING = st.sampled_from([(), (2,), (2, 4), (1, 3, 2), (0, 2)])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), leading=LEADING)
def test_scaled_dot_product_attention_is_pytorchs(data: st.DataObject, dtype: torch.dtype, leading) -> None:
    """Drawn shapes, head dimensions and masks; o and every gradient no further from fp64 than PyTorch's."""
    L, S = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20))
    E, Ev = data.draw(st.sampled_from([(8, 8), (16, 8), (5, 5), (8, 13)]))
    gqa = len(leading) > 1 and data.draw(st.booleans())
    heads = leading[:-1] + ((1,) if gqa else leading[-1:])
    shapes = [(*leading, L, E), (*heads, S, E), (*heads, S, Ev)]
    if leading == (2, 4) and not gqa and data.draw(st.booleans()):
        shapes[1] = (1, 4, S, E)  # broadcasts
    q, k, v = (normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes))
    options: dict[str, Any] = {"scale": data.draw(st.sampled_from([None, 0.3])), "enable_gqa": gqa}
    mask = data.draw(st.sampled_from(["none", "causal", "keys"]))
    if mask == "causal":
        options["is_causal"] = True
    elif mask == "keys":
        keys = torch.rand(*(leading[:-1] or (1,)), S, generator=torch.Generator().manual_seed(L)) < 0.6
        keys[..., data.draw(st.integers(0, S - 1))] = True
        keys = keys[0] if len(leading) < 2 else keys[..., None, None, :]
        expanded = len(leading) > 1 and data.draw(st.booleans())
        options["attn_mask"] = keys.expand(*leading, L, S) if expanded else keys
    actual = gradients(lambda *x: scaled_dot_product_attention(*x, **options), q, k, v)
    same = gradients(lambda *x: F.scaled_dot_product_attention(*x, **options), q, k, v)
    truth = gradients(lambda *x: F.scaled_dot_product_attention(*x, **options), *(x.double() for x in (q, k, v)))
    for name, a, s, t in zip(("o", "dq", "dk", "dv"), actual, same, truth, strict=True):
        # With few keys ds = p * (do @ v - do @ o) cancels: rounding is relative to the two terms.
        atol = 0.0 if name in ("o", "dv") else 16 * torch.finfo(dtype).eps
        assert_no_worse(a, s, t, name=f"{name} {shapes} {mask}", factor=2, ulps=8, atol=atol)


def test_keys_nobody_sees_and_rows_that_see_none() -> None:
    q, k, v = (normal(2, 3, s, 8, seed=s) for s in (4, 5, 5))
    v = normal(2, 3, 5, 8, seed=9)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5]).view(2, 1, 1, 5)
    k[0, :, 1], v[0, :, 4] = math.nan, math.nan  # hidden
    o, dq, dk, dv = gradients(lambda *x: scaled_dot_product_attention(*x, attn_mask=mask), q, k, v)
    assert not o[1].any()
    for x in (dq[1], dk[1], dv[1], dk[0, :, [1, 4]], dv[0, :, [1, 4]]):
        assert not x.any()
    kept = [0, 2, 3]
    expected = F.scaled_dot_product_attention(q[0], k[0][:, kept], v[0][:, kept])
    torch.testing.assert_close(o[0], expected)


def test_scaled_dot_product_attention_refuses() -> None:
    x = torch.zeros(2, 4, 6, 8)
    call = scaled_dot_product_attention
    with pytest.raises(ValueError, match="varies along heads or queries: expected a bool mask of keys"):
        call(x, x, x, torch.ones(6, 6, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"attn_mask \(2, 1, 1, 6\) is torch.float32 and adds to the scores"):
        call(x, x, x, torch.zeros(2, 1, 1, 6))
    with pytest.raises(ValueError, match="attn_mask and is_causal exclude each other"):
        call(x, x, x, torch.ones(6, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="query has 4 heads and key 2: expected the same, or enable_gqa=True"):
        call(x, x[:, :2], x[:, :2])
    with pytest.raises(ValueError, match=r"query \(8,\): expected at least 2 dimensions"):
        call(x[0, 0, 0], x, x)


def test_signature_is_pytorchs() -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    parameters = inspect.signature(scaled_dot_product_attention).parameters
    assert tuple(parameters) == names
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False]
    assert all(f"{name}=" in F.scaled_dot_product_attention.__doc__ for name in names[3:])


# --- padding ---


@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (2, 0), (0, 4)], ids=str)
def test_valid_rows(shape: tuple[int, int]) -> None:
    """Valid rows first, in order; back again; and twice differentiable, as a permutation is."""
    for fill in ("drawn", "none", "all"):
        valid = (
            torch.rand(shape, generator=torch.Generator().manual_seed(1)) < {"drawn": 0.5, "none": 0, "all": 2}[fill]
        )
        x = normal(*shape, 2, 3, seed=0).requires_grad_()
        rows = ValidRows.of(valid)
        packed = rows.pack(x)
        n = int(valid.sum())
        assert torch.equal(packed[:n], x[valid])
        assert torch.equal(packed[n:], x[~valid])
        assert torch.equal(rows.unpack(packed), x)
        assert rows.cu_seqlens.tolist() == [0, *valid.sum(1).cumsum(0).tolist()]
        assert rows.cu_seqlens.dtype == torch.int32
    if x.numel() == 0:
        return
    assert torch.autograd.gradcheck(rows.pack, x)
    assert torch.autograd.gradgradcheck(rows.pack, x)
    weight = normal(*packed.shape, seed=1)
    functional = torch.func.grad(lambda x: (rows.pack(x) * weight).sum())
    for transform in (functional, torch.compile(functional, backend="aot_eager")):
        torch.testing.assert_close(transform(x.detach()), rows.unpack(weight))


# --- torch.compile, and no wait for a device ---


def drop_ins(keys: Tensor, boundaries: Tensor) -> dict[str, Callable[..., Tensor]]:
    def sdpa(*x: Tensor, **options: Any) -> Tensor:
        return scaled_dot_product_attention(*(y.transpose(1, 2) for y in x), **options)

    return {
        "keys": lambda q, k, v: sdpa(q, k, v, attn_mask=keys[:, None, None]),
        "causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
        "flash": lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)[0],
        "varlen": lambda q, k, v: flash_attn.flash_attn_varlen_func(
            q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), boundaries, boundaries, None, None, causal=True
        ),
    }


@pytest.mark.parametrize("name", ["keys", "causal", "flash", "varlen"])
def test_compiled_equals_eager(name: str) -> None:
    q, k, v = (normal(2, 6, 2, 12, seed=s, dtype=torch.float32) for s in range(3))
    keys = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 0, 0]]).bool()
    f = drop_ins(keys, cu(5, 7))[name]
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, q, k, v), gradients(f, q, k, v), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["keys", "causal", "flash", "varlen"])
def test_no_value_is_read(name: str) -> None:
    """A fake tensor has no values: reading one raises."""
    with FakeTensorMode():
        q, k, v = (torch.empty(2, 6, 2, 12, requires_grad=True) for _ in range(3))
        keys, boundaries = torch.empty(2, 6, dtype=torch.bool), torch.empty(3, dtype=torch.int32)
        o = drop_ins(keys, boundaries)[name](q, k, v)
        assert [x.shape for x in torch.autograd.grad(o.sum(), (q, k, v))] == [q.shape] * 3
