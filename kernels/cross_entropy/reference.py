"""The formula of `contract.py` in PyTorch: the definition of right. Any device, fp64 capable, nothing in place."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import (
    Gradients,
    Needs,
    Options,
    Rows,
    Upstream,
    accumulation_dtype,
    gradient_dtype,
    row_coefficients,
)


def capped(logits: Tensor, options: Options) -> Tensor:
    """x of the formula from raw logits, in the accumulation dtype."""
    x = logits.to(accumulation_dtype(logits.dtype)) * options.logit_scale
    return x if options.softcap is None else options.softcap * torch.tanh(x / options.softcap)


def rows_forward(
    logits: Tensor,  # (N, V) raw
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) accumulation dtype
    token_weight: Tensor | None,  # (N,) accumulation dtype
    options: Options,
) -> Rows:
    x = capped(logits, options)
    valid = target != options.ignore_index
    at = torch.where(valid, target, 0)
    lse = x.logsumexp(-1)
    logp = x.log_softmax(-1)  # not x - lse, which cancels where |x| is large
    nll = -logp.gather(-1, at.unsqueeze(-1)).squeeze(-1)
    row = (1 - options.label_smoothing) * (nll if weight is None else weight[at] * nll)
    if options.label_smoothing:
        smooth = -(logp if weight is None else weight * logp).sum(-1) / x.shape[-1]
        row = row + options.label_smoothing * smooth
    if options.z_loss:
        row = row + options.z_loss * lse.square()
    if token_weight is not None:
        row = token_weight * row
    p = logp.exp()
    entropy = -(p * torch.where(p == 0, 0.0, logp)).sum(-1)  # p log p is 0 where p is
    predicted = x.argmax(-1)
    row, nll, lse, entropy = (torch.where(valid, r, 0.0) for r in (row, nll, lse, entropy))
    return Rows(row, nll, lse, entropy, torch.where(valid, predicted, -1))


def rows_backward(
    upstream: Upstream,
    logits: Tensor,  # (N, V) raw
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    options: Options,
) -> Tensor:  # (N, V), accumulation dtype
    x = capped(logits, options)
    valid = target != options.ignore_index
    at = torch.where(valid, target, 0)
    a, b, c, dentropy = row_coefficients(
        upstream, target, weight, token_weight, x.logsumexp(-1), logits.shape[-1], options
    )
    logp = x.log_softmax(-1)
    p = logp.exp()
    onehot = torch.zeros_like(p).scatter_(-1, at[:, None], 1.0)
    dx = b[:, None] * (p - onehot) + a[:, None] * p
    if dentropy is not None:
        finite_logp = torch.where(p == 0, 0.0, logp)
        entropy = -(p * finite_logp).sum(-1)
        dx = dx - dentropy[:, None] * p * (finite_logp + entropy[:, None])
    if c is not None:
        dx = dx - (c[:, None] if weight is None else c[:, None] * weight)
    dx = dx * options.logit_scale
    if options.softcap is not None:
        dx = dx * (1 - (x / options.softcap).square())
    return torch.where(valid[:, None], dx, 0.0)


def cross_entropy_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    rows = rows_forward(input, target, weight, token_weight, options)
    return rows.loss, rows.lse


def cross_entropy_backward(
    dloss: Tensor,  # (N,)
    input: Tensor,  # (N, V)
    target: Tensor,  # (N,)
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    lse: Tensor,  # (N,)
    options: Options,
    out: Tensor,  # (N, V): a new tensor, or input itself
) -> None:
    out.copy_(rows_backward(Upstream(dloss), input, target, weight, token_weight, options))


def linear_forward(
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
    logits = _project(input, linear_weight, linear_bias)
    rows = rows_forward(logits, target, weight, token_weight, options)
    return rows if stats else rows._replace(entropy=rows.entropy.new_empty(0), predicted=rows.predicted.new_empty(0))


def linear_backward(
    upstream: Upstream,
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    options: Options,
    max_valid: int | None,
    needs: Needs,
) -> Gradients:
    logits = _project(input, linear_weight, linear_bias)
    dlogits = rows_backward(upstream, logits, target, weight, token_weight, options)
    # A row that is ignored isn't projected at all, so that what is in it (NaN too) reaches no gradient.
    valid = (target != options.ignore_index)[:, None]
    h = torch.where(valid, input.to(dlogits.dtype), 0.0)
    dh = (dlogits @ linear_weight.to(dlogits.dtype)).where(valid, 0.0)
    return Gradients(
        dh.to(input.dtype) if needs.input else input.new_empty(0),
        (dlogits.T @ h).to(input.dtype) if needs.linear_weight else input.new_empty(0),
        dlogits.sum(0).to(input.dtype) if needs.linear_bias else input.new_empty(0),
    )


def linear_one_pass(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor,  # ()
    options: Options,
    max_valid: int | None,
    stats: bool,
    needs: Needs,
) -> tuple[Tensor, Rows, Gradients]:
    saved = gradient_dtype(input.dtype)
    wide = (input.to(saved), linear_weight.to(saved), target, None if linear_bias is None else linear_bias.to(saved))
    rows = linear_forward(*wide, weight, token_weight, options, max_valid, stats)
    upstream = Upstream(scale.expand(target.shape))
    gradients = linear_backward(
        upstream, *wide, weight, token_weight, rows.lse, rows.entropy, options, max_valid, needs
    )
    return rows.loss.sum() * scale, rows, gradients


def _project(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(input.dtype)
    logits = input.to(dtype) @ linear_weight.to(dtype).T
    return logits if linear_bias is None else logits + linear_bias.to(dtype)
