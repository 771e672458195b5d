"""What every backend of cross entropy agrees on: the options of a loss, the results of rows, the dtypes of both.

Legend: N = rows, D = width of a row, V = vocabulary. With raw logits z (N, V), all in the accumulation dtype
(fp32; fp64 for fp64 inputs):

    x = softcap * tanh(logit_scale * z / softcap)                     # softcap only where given
    lse = x.logsumexp(-1)                                             # natural logarithm
    p = softmax(x)
    nll = lse - x[target]
    smooth = sum_v(w_v * (lse - x_v)) / V                             # w: class weights, 1 without
    row = token_weight * ((1 - label_smoothing) * w[target] * nll + label_smoothing * smooth + z_loss * lse ** 2)
    entropy = lse - sum_v(p_v * x_v)
    predicted = x.argmax(-1)

and 0 (predicted: -1) in rows whose target is ignore_index. For the sum over rows of
drow * row + dnll * nll + dlse * lse + dentropy * entropy the gradient with respect to x is

    dx = b * (p - onehot(target)) + a * p - c * w - dentropy * p * (x - lse + entropy)
    b = drow * token_weight * (1 - label_smoothing) * w[target] + dnll
    c = drow * token_weight * label_smoothing / V
    a = c * sum(w) + drow * token_weight * 2 * z_loss * lse + dlse

and dz = dx * logit_scale * (1 - (x / softcap) ** 2). In the target's column b * (p - 1) must be computed as such:
(a + b) * p - b has the rounding error of b where p is near 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Options(NamedTuple):
    """The options of a loss that are plain numbers, in the order of the operators' schemas."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


class Rows(NamedTuple):
    """Results of rows; `entropy` and `predicted` have no elements unless statistics were asked for."""

    loss: Tensor  # (N,) accumulation dtype: row, above
    nll: Tensor  # (N,) accumulation dtype
    lse: Tensor  # (N,) accumulation dtype
    entropy: Tensor  # (N,) or (0,) accumulation dtype
    predicted: Tensor  # (N,) or (0,) int64


class Upstream(NamedTuple):
    """Gradients with respect to the results of rows; None is zero."""

    loss: Tensor | None  # (N,) accumulation dtype
    nll: Tensor | None = None  # (N,)
    lse: Tensor | None = None  # (N,)
    entropy: Tensor | None = None  # (N,)


class Gradients(NamedTuple):
    """Gradients of a linear cross entropy; one that wasn't asked for has no elements."""

    input: Tensor  # (N, D) or (0,)
    linear_weight: Tensor  # (V, D) or (0,)
    linear_bias: Tensor  # (V,) or (0,)


class Needs(NamedTuple):
    """Which gradients of a linear cross entropy are asked for."""

    input: bool
    linear_weight: bool
    linear_bias: bool


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and of all arithmetic between the matrix products."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `one_pass` keeps gradients until the upstream scalar is known.

    fp16 gradients wait in fp32: before a gradient scaler's factor is applied they would underflow.
    """
    return torch.float32 if dtype == torch.float16 else dtype


class Coefficients(NamedTuple):
    """a, b and c of the gradient formula, and dentropy; rows that are ignored have 0 in all of them."""

    a: Tensor  # (N,)
    b: Tensor  # (N,)
    c: Tensor | None  # (N,), None: zero
    dentropy: Tensor | None  # (N,), None: zero

    def rows(self, block: slice) -> Coefficients:
        c, dentropy = (None if x is None else x[block] for x in (self.c, self.dentropy))
        return Coefficients(self.a[block], self.b[block], c, dentropy)

    def dense(self) -> Coefficients:
        c, dentropy = (None if x is None else x.contiguous() for x in (self.c, self.dentropy))
        return Coefficients(self.a.contiguous(), self.b.contiguous(), c, dentropy)


def row_coefficients(
    upstream: Upstream,
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    lse: Tensor,  # (N,)
    n_classes: int,
    options: Options,
) -> Coefficients:
    """The gradient formula's factors of each row."""
    valid = target != options.ignore_index
    a = b = torch.zeros_like(lse)
    c = None
    if upstream.loss is not None:
        drow = upstream.loss if token_weight is None else upstream.loss * token_weight
        b = drow * (1 - options.label_smoothing)
        if weight is not None:
            b = b * weight[torch.where(valid, target, 0)]
        if options.label_smoothing:
            c = drow * (options.label_smoothing / n_classes)
            a = c * (n_classes if weight is None else weight.sum())
        if options.z_loss:
            a = a + drow * (2 * options.z_loss) * lse
    if upstream.nll is not None:
        b = b + upstream.nll
    if upstream.lse is not None:
        a = a + upstream.lse
    return Coefficients(
        torch.where(valid, a, 0.0),
        torch.where(valid, b, 0.0),
        None if c is None else torch.where(valid, c, 0.0),
        None if upstream.entropy is None else torch.where(valid, upstream.entropy, 0.0),
    )
