"""Drawn calls of attention for tests of its raw backends, and what PyTorch makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.attention import reference
from hotloop.kernels.attention.options import Call, Options
from hotloop.kernels.testing import assert_no_worse, lay_out

NAMES = ("o", "lse", "dq", "dk", "dv", "dalibi_slopes", "dsinks")


@dataclass(frozen=True)
class Case:
    """One call; dense of batch size B, or packed where `cu_q` is given (then B counts nothing)."""

    Tq: int
    Tk: int
    Hq: int = 2
    Hk: int = 1
    D: int = 16
    B: int = 1
    left: int = -1
    right: int = -1
    scale: float | None = None
    softcap: float = 0.0
    alibi: int = 0
    """Dimensions of alibi_slopes; 0: none."""
    sinks: bool = False
    dropout_p: float = 0.0
    has_dlse: bool = True
    cu_q: tuple[int, ...] = ()
    cu_k: tuple[int, ...] = ()
    """Empty: that of q."""
    layout: str = "contiguous"

    @property
    def options(self) -> Options:
        scale = self.D**-0.5 if self.scale is None else self.scale
        return Options(self.Tq, self.Tk, self.left, self.right, scale, self.softcap, self.dropout_p)

    @property
    def needs(self) -> list[bool]:
        return [True, True, True, self.alibi > 0, self.sinks]

    def blocks(self) -> Iterator[tuple[int, slice, slice]]:
        """(batch, rows of q, rows of k) of what is computed on its own."""
        if not self.cu_q:
            for b in range(self.B):
                yield b, slice(0, self.Tq), slice(0, self.Tk)
        else:
            for b, (at_q, at_k) in enumerate(zip(pairwise(self.cu_q), pairwise(self.cu_k or self.cu_q), strict=True)):
                yield b, slice(*at_q), slice(*at_k)


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    seed: Tensor | None
    do: Tensor
    dlse: Tensor | None

    def call(self, options: Options) -> Call:
        return Call(
            self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, self.alibi_slopes, self.sinks, self.seed,
            options,
        )  # fmt: skip

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        changed: dict[str, Any] = {name: None if x is None else f(x) for name, x in vars(self).items()}
        return Inputs(**changed)

    def double(self) -> Inputs:
        return self.map(lambda x: x.double() if x.is_floating_point() else x)


def draw(case: Case, dtype: torch.dtype, *, seed: int = 0, size: float = 1.0) -> Inputs:
    """NaN wherever nothing may be read: past the last boundary, and upstream of rows that see no key."""
    generator = torch.Generator().manual_seed(seed)
    packed = bool(case.cu_q)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def rows(T: int, H: int) -> Tensor:
        return normal(*(() if packed else (case.B,)), T, H, case.D)

    q, do = rows(case.Tq, case.Hq) * size, rows(case.Tq, case.Hq)
    k, v = rows(case.Tk, case.Hk), rows(case.Tk, case.Hk)
    dlse = normal(*((case.Hq, case.Tq) if packed else (case.B, case.Hq, case.Tq)))
    if packed:
        for x, end in ((q, case.cu_q[-1]), (do, case.cu_q[-1]), (k, (case.cu_k or case.cu_q)[-1])):
            x[end:] = math.nan
        v[(case.cu_k or case.cu_q)[-1] :] = math.nan
        dlse[:, case.cu_q[-1] :] = math.nan
    for b, at_q, at_k in case.blocks():
        hidden = ~visible(case, at_q.stop - at_q.start, at_k.stop - at_k.start).any(1)
        (do if packed else do[b])[at_q][hidden] = math.nan
        (dlse if packed else dlse[b])[:, at_q][:, hidden] = math.nan

    def boundaries(cu: tuple[int, ...]) -> Tensor | None:
        return torch.tensor(cu, dtype=torch.int32) if packed else None

    S = len(case.cu_q) - 1 if packed else case.B
    q, k, v, do = (lay_out(x.to(dtype), case.layout) for x in (q, k, v, do))
    return Inputs(
        q, k, v, boundaries(case.cu_q), boundaries(case.cu_k or case.cu_q),
        torch.rand((case.Hq,) if case.alibi == 1 else (S, case.Hq), generator=generator) if case.alibi else None,
        normal(case.Hq) if case.sinks else None,
        torch.tensor(5 * 2**40 + 7) if case.dropout_p else None,
        do, dlse if case.has_dlse else None,
    )  # fmt: skip


def visible(case: Case, Tq: int, Tk: int) -> Tensor:  # (Tq, Tk)
    place, j = torch.arange(Tq)[:, None] + Tk - Tq, torch.arange(Tk)
    seen = torch.ones(Tq, Tk, dtype=torch.bool)
    seen &= (j >= place - case.left) if case.left >= 0 else seen
    return seen & (j <= place + case.right) if case.right >= 0 else seen


Backend = Any
"""A module with `forward` and `backward`."""


def run(backend: Backend, case: Case, x: Inputs) -> list[Tensor]:
    """o, lse and the gradients."""
    call = x.call(case.options)
    o, lse = backend.forward(call)
    gradients = backend.backward(call, o, lse, x.do, x.dlse, case.needs)
    return [o, lse, *gradients]


def eager(case: Case, x: Inputs) -> list[Tensor]:
    """What `run` gives, by PyTorch's own operators in the dtype of q: scores and softmax in fp32, and probabilities
    rounded to that dtype, as its fused kernels and models written in it have them."""
    names = ("q", "k", "v", "alibi_slopes", "sinks")
    leaves = {n: getattr(x, n).detach().clone().requires_grad_() for n in names if getattr(x, n) is not None}
    q, k, v = (leaves[n] for n in ("q", "k", "v"))
    packed, G = bool(case.cu_q), case.Hq // case.Hk
    o, lse = torch.zeros_like(q), torch.full_like(x.do.sum(-1).transpose(-1, -2).float(), -math.inf)
    loss = q.new_zeros((), dtype=torch.float32)
    for b, at_q, at_k in case.blocks():
        q_, k_, v_, do_ = (t if packed else t[b] for t in (q, k, v, x.do))
        q_, k_, v_ = q_[at_q], k_[at_k].repeat_interleave(G, 1), v_[at_k].repeat_interleave(G, 1)
        Tq, Tk = q_.shape[0], k_.shape[0]
        seen = visible(case, Tq, Tk)
        rows = seen.any(1)
        if not rows.any():
            continue
        s = torch.einsum("ihd,jhd->hij", q_.float(), k_.float()) * case.options.scale
        s = case.softcap * torch.tanh(s / case.softcap) if case.softcap else s
        if case.alibi:
            slopes = leaves["alibi_slopes"] if case.alibi == 1 else leaves["alibi_slopes"][b]
            s = s - slopes[:, None, None] * (torch.arange(Tq)[:, None] + Tk - Tq - torch.arange(Tk)).abs()
        s = s.masked_fill(~seen, -math.inf)[:, rows]
        everything = s
        if case.sinks:
            everything = torch.cat([s, leaves["sinks"][:, None, None].expand(-1, s.shape[1], 1)], -1)
        p = torch.softmax(everything, -1)[..., :Tk]
        if x.seed is not None:
            keep = reference.dropout_keep(x.seed, torch.tensor([b]), case.Hq, Tq, Tk, case.dropout_p)[0, :, rows]
            p = p * keep / (1 - case.dropout_p)
        o_ = torch.einsum("hij,jhd->ihd", p.to(v_.dtype), v_)
        lse_ = torch.logsumexp(everything, -1)
        with torch.no_grad():
            (o if packed else o[b])[at_q][rows] = o_
            target = (lse if packed else lse[b])[:, at_q]
            target[:, rows] = lse_
        loss = loss + (o_.float() * do_[at_q][rows].float()).sum()
        if x.dlse is not None:
            loss = loss + (lse_ * (x.dlse if packed else x.dlse[b])[:, at_q][:, rows]).sum()
    gradients: dict[str, Tensor] = {}
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    empty = q.new_empty(0)
    return [
        o.detach(), lse,
        *(gradients.get(n, torch.zeros_like(leaves[n])) if n in leaves else empty for n in names),
    ]  # fmt: skip


def check(
    backend: Backend,
    case: Case,
    dtype: torch.dtype,
    *,
    size: float = 1.0,
    same: Callable[[Case, Inputs], list[Tensor]] = eager,
) -> list[Tensor]:
    """Results of the backend, which are no further from the reference in fp64 than PyTorch's in the dtype."""
    x = draw(case, dtype, size=size)
    found, theirs, exact = run(backend, case, x), same(case, x), run(reference, case, x.double())
    # ds = p * (dp - delta) may cancel: a rounding is then relative to what was subtracted.
    largest = [t.nan_to_num().double().norm(dim=-1).amax().item() if t.numel() else 0.0 for t in (x.do, x.v)]
    terms = largest[0] * largest[1] * abs(case.options.scale) * torch.finfo(dtype).eps
    atol = {"dq": terms, "dk": terms, "dalibi_slopes": 4 * terms * case.Tk, "dsinks": 4 * terms}
    for name, *results in zip(NAMES, found, theirs, exact, strict=True):
        what = f"{name} of {case} in {dtype}"
        assert_no_worse(*results, name=what, ulps=4, atol=atol.get(name, 0.0))
        assert results[0].is_contiguous(), what
    return found
