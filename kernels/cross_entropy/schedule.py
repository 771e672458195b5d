"""Linear cross entropy over any backend's row kernels: which rows are projected, in which chunks, what is accumulated.

`one_pass`: chunks of rows outside; the loss and all gradients of a chunk while its logits exist; 3 units of matrix
product. `recompute`: the forward pass keeps lse alone; the backward pass computes tiles of the vocabulary again, each
over all rows, so that a tile's rows of the weight gradient are one product; 4 units, for upstream gradients that are
known only in the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import config, gemm
from hotloop.kernels.cross_entropy.contract import (
    Coefficients,
    Gradients,
    Needs,
    Options,
    Rows,
    Upstream,
    accumulation_dtype,
    gradient_dtype,
    row_coefficients,
)
from hotloop.kernels.workspace import empty, workspace


class ForwardKernel(Protocol):
    def __call__(
        self,
        logits: Tensor,  # (N, V) raw; not written
        target: Tensor,  # (N,) int64
        weight: Tensor | None,  # (V,) accumulation dtype
        token_weight: Tensor | None,  # (N,) accumulation dtype
        options: Options,
        stats: bool,
        /,
    ) -> Rows: ...


class ForwardBackwardKernel(Protocol):
    def __call__(
        self,
        logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
        target: Tensor,
        weight: Tensor | None,
        token_weight: Tensor | None,
        scale: Tensor,  # () accumulation dtype
        options: Options,
        stats: bool,
        /,
    ) -> Rows: ...


class ColumnsBackwardKernel(Protocol):
    def __call__(
        self,
        logits: Tensor,  # (N, width) raw, a tile of the vocabulary; overwritten with the gradient
        first: int,  # column of the vocabulary in logits[:, 0]
        target: Tensor,
        factors: Coefficients,
        weight: Tensor | None,  # (V,), not the tile's part
        lse: Tensor,  # (N,)
        entropy: Tensor,  # (N,); (0,) where factors.dentropy is None
        options: Options,
        /,
    ) -> None: ...


class RowKernels(NamedTuple):
    """What a backend supplies; logits are contiguous and no target but ignore_index is out of range."""

    forward: ForwardKernel
    forward_backward_: ForwardBackwardKernel
    columns_backward_: ColumnsBackwardKernel


@dataclass(frozen=True)
class Selection:
    """The rows that are projected: those whose target is not ignore_index, compacted where that needs no device read.

    exact (CPU): precisely the valid rows. bounded (`max_valid` given): the valid rows and, up to a length known to the
    host, rows that are ignored. mask: all rows, with zeros instead of the input of ignored ones.
    """

    index: Tensor | None  # (n,) row of the input in each projected row; None: all rows
    position: Tensor | None  # (N,) bounded: projected row of each row of the input
    valid: Tensor | None  # (N,) bool; None: every row
    filled: Tensor | None  # (n,) bool, bounded: this projected row is a valid row

    @staticmethod
    def exact(target: Tensor, ignore_index: int) -> Selection:
        valid = target != ignore_index
        if valid.all():
            return Selection(None, None, None, None)
        return Selection(valid.nonzero().squeeze(1), None, valid, None)

    @staticmethod
    def bounded(target: Tensor, ignore_index: int, max_valid: int) -> Selection:
        n = target.shape[0]
        capacity = config.capacity(n, max_valid)
        valid = target != ignore_index
        position = valid.cumsum(0) - 1
        slot = torch.where(valid & (position < capacity), position, capacity)  # slot `capacity` takes what is left over
        rows = torch.arange(n, device=target.device)
        index = torch.zeros(capacity + 1, dtype=torch.int64, device=target.device).scatter_(0, slot, rows)[:-1]
        filled = torch.arange(capacity, device=target.device) < valid.sum()
        return Selection(index, slot.clamp(max=max(capacity - 1, 0)), valid & (slot < capacity), filled)

    @staticmethod
    def mask(target: Tensor, ignore_index: int) -> Selection:
        return Selection(None, None, target != ignore_index, None)

    @staticmethod
    def choose(target: Tensor, ignore_index: int, max_valid: int | None) -> Selection:
        if target.device.type == "cpu":
            return Selection.exact(target, ignore_index)
        if max_valid is not None:
            return Selection.bounded(target, ignore_index, max_valid)
        return Selection.mask(target, ignore_index)

    def take(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(N, ...) -> (n, ...); rows that are not valid get `fill`."""
        kept = self.valid if self.index is None else self.filled
        x = x if self.index is None else x.index_select(0, self.index)
        return x if kept is None else x.masked_fill(~_column(kept, x), fill)

    def put(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """(n, ...) -> (N, ...); rows that are not valid get `fill`."""
        if self.valid is None:
            return x
        if self.position is not None:
            if x.shape[0] == 0:
                return x.new_full((self.valid.shape[0], *x.shape[1:]), fill)
            return x.index_select(0, self.position).masked_fill_(~_column(self.valid, x), fill)
        if self.index is not None:
            return x.new_full((self.valid.shape[0], *x.shape[1:]), fill).index_copy_(0, self.index, x)
        return x.masked_fill(~_column(self.valid, x), fill)

    def put_rows(self, rows: Rows, stats: bool) -> Rows:
        return Rows(
            self.put(rows.loss),
            self.put(rows.nll),
            self.put(rows.lse),
            self.put(rows.entropy) if stats else rows.entropy,
            self.put(rows.predicted, -1) if stats else rows.predicted,
        )


class ProductSum:
    """sum_k a_k @ b_k, accumulated in at least fp32; the products themselves run in the dtype of a and b.

    One product alone goes straight to the result. Several of bf16 are added in fp32 where `gemm.py` can; elsewhere each
    product of narrow matrices is rounded once before it is added.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, steps: int):
        wide = accumulation_dtype(dtype)
        self.sum = empty(shape, dtype if steps == 1 else wide, device)
        self.empty = True

    def add(self, a: Tensor, b: Tensor) -> None:
        if self.sum.dtype == a.dtype:
            self.sum.addmm_(a, b, beta=0 if self.empty else 1)
        elif gemm.serves(self.sum, a, b):
            gemm.add_product(self.sum, a, b, beta=0 if self.empty else 1)
        else:
            room_rows = config.product_rows(a.shape[0], b.shape[1], a.dtype)
            room = workspace("product", (room_rows, b.shape[1]), a.dtype, a.device)
            for rows, total in zip(a.split(len(room)), self.sum.split(len(room)), strict=True):
                part = torch.mm(rows, b, out=room[: len(rows)])
                total.copy_(part) if self.empty else total.add_(part)
        self.empty = False

    def result(self) -> Tensor:
        return self.sum.zero_() if self.empty else self.sum


def one_pass(
    kernels: RowKernels,
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,) accumulation dtype
    token_weight: Tensor | None,  # (N,) accumulation dtype
    scale: Tensor,  # () accumulation dtype
    options: Options,
    max_valid: int | None,
    stats: bool,
    needs: Needs,
) -> tuple[Tensor, Rows, Gradients]:
    """scale * sum of the row losses, the rows' results, and the gradients of the former (in `gradient_dtype`)."""
    selection = Selection.choose(target, options.ignore_index, max_valid)
    h, t = selection.take(input), selection.take(target, options.ignore_index)
    token_weight = None if token_weight is None else selection.take(token_weight)
    (n, d), v = h.shape, linear_weight.shape[0]
    saved = gradient_dtype(h.dtype)
    late_scale = saved != h.dtype  # fp16: rows of logits' gradients would underflow if scaled here
    row_scale = torch.ones_like(scale) if late_scale else scale

    step = config.chunk_rows(n, v, h.dtype)
    starts = range(0, n, step)
    buffer = workspace("logits", (step if n else 0, v), h.dtype, h.device)
    dh = empty((n, d), h.dtype, h.device) if needs.input else None
    dw = ProductSum((v, d), h.dtype, h.device, len(starts)) if needs.linear_weight else None
    db = h.new_zeros(v, dtype=scale.dtype) if needs.linear_bias else None
    parts = []
    for start in starts:
        chunk = slice(start, min(start + step, n))
        logits = project(h[chunk], linear_weight, linear_bias, out=buffer[: chunk.stop - start])
        part_weight = None if token_weight is None else token_weight[chunk]
        if not any(needs):
            parts.append(kernels.forward(logits, t[chunk], weight, part_weight, options, stats))
            continue
        parts.append(kernels.forward_backward_(logits, t[chunk], weight, part_weight, row_scale, options, stats))
        dlogits = logits
        if dh is not None:
            torch.mm(dlogits, linear_weight, out=dh[chunk])
        if dw is not None:
            dw.add(dlogits.T, h[chunk])
        if db is not None:
            db += dlogits.sum(0, dtype=db.dtype)

    rows = _joined(parts, h)
    gradients = Gradients(
        input.new_empty(0) if dh is None else selection.put(dh),
        input.new_empty(0) if dw is None else dw.result(),
        input.new_empty(0) if db is None else db,
    )
    if late_scale:
        gradients = Gradients(*(g.to(saved).mul_(scale) for g in gradients))
    return rows.loss.sum() * scale, selection.put_rows(rows, stats), Gradients(*(g.to(saved) for g in gradients))


def recompute_forward(
    kernels: RowKernels,
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    max_valid: int | None,
    stats: bool,
) -> Rows:
    selection = Selection.choose(target, options.ignore_index, max_valid)
    h, t = selection.take(input), selection.take(target, options.ignore_index)
    token_weight = None if token_weight is None else selection.take(token_weight)
    (n, d), v = h.shape, linear_weight.shape[0]
    step = config.recompute_rows(n, v, d, h.dtype)
    buffer = workspace("logits", (step if n else 0, v), h.dtype, h.device)
    parts = []
    for start in range(0, n, step):
        chunk = slice(start, min(start + step, n))
        logits = project(h[chunk], linear_weight, linear_bias, out=buffer[: chunk.stop - start])
        part_weight = None if token_weight is None else token_weight[chunk]
        parts.append(kernels.forward(logits, t[chunk], weight, part_weight, options, stats))
    return selection.put_rows(_joined(parts, h), stats)


def recompute_backward(
    kernels: RowKernels,
    upstream: Upstream,  # (N,) each
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,), or (0,) where upstream.entropy is None
    options: Options,
    max_valid: int | None,
    needs: Needs,
) -> Gradients:
    selection = Selection.choose(target, options.ignore_index, max_valid)
    h, t, row_lse = selection.take(input), selection.take(target, options.ignore_index), selection.take(lse)
    row_entropy = entropy if upstream.entropy is None else selection.take(entropy)
    token_weight = None if token_weight is None else selection.take(token_weight)
    upstream = Upstream(*(None if g is None else selection.take(g) for g in upstream))
    (n, d), v = h.shape, linear_weight.shape[0]
    factors = row_coefficients(upstream, t, weight, token_weight, row_lse, v, options)

    width = config.tile_columns(n, v, d, h.dtype)
    starts = range(0, v, width) if n else range(0)
    buffer = workspace("logits", (n * width,), h.dtype, h.device)
    dh = ProductSum((n, d), h.dtype, h.device, len(starts)) if needs.input else None
    dw = empty((v, d), h.dtype, h.device) if needs.linear_weight else None
    db = h.new_empty(v) if needs.linear_bias else None
    for first in starts:
        tile = slice(first, min(first + width, v))
        tile_weight = linear_weight[tile]
        bias = None if linear_bias is None else linear_bias[tile]
        out = buffer[: n * (tile.stop - first)].view(n, tile.stop - first)
        dlogits = project(h, tile_weight, bias, out=out)
        kernels.columns_backward_(dlogits, first, t, factors, weight, row_lse, row_entropy, options)
        if dh is not None:
            dh.add(dlogits, tile_weight)
        if dw is not None:
            torch.mm(dlogits.T, h, out=dw[tile])
        if db is not None:
            db[tile] = dlogits.sum(0, dtype=lse.dtype)
    if not n:
        dw, db = (None if g is None else g.zero_() for g in (dw, db))
    return Gradients(
        input.new_empty(0) if dh is None else selection.put(dh.result()).to(input.dtype),
        input.new_empty(0) if dw is None else dw,
        input.new_empty(0) if db is None else db,
    )


def project(h: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, out: Tensor) -> Tensor:
    """out = h @ linear_weight.T + linear_bias"""
    if linear_bias is None:
        return torch.mm(h, linear_weight.T, out=out)
    return torch.addmm(linear_bias, h, linear_weight.T, out=out)


def _joined(parts: list[Rows], h: Tensor) -> Rows:
    if not parts:
        loss, nll, lse, entropy = (h.new_empty(0, dtype=accumulation_dtype(h.dtype)) for _ in range(4))
        return Rows(loss, nll, lse, entropy, h.new_empty(0, dtype=torch.int64))
    return parts[0] if len(parts) == 1 else Rows(*(torch.cat(x) for x in zip(*parts, strict=True)))


def _column(mask: Tensor, x: Tensor) -> Tensor:
    """(n,) -> (n, 1, ...) for masking rows of x."""
    return mask.view(-1, *[1] * (x.dim() - 1))
