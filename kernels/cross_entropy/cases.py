"""Cross entropy as PyTorch composes it, and drawn cases: shared by the tests and benchmarks of this op."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from hotloop.kernels.cross_entropy import config
from hotloop.kernels.dispatch import Table
from hotloop.kernels.testing import draw_values

IGNORE = -100
EPS = torch.finfo(torch.float32).eps
ALL_OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0, "logit_scale": 0.7}
REDUCTIONS = ("mean", "sum", "none")


def composed(
    input: Tensor,  # (*, V)
    target: Tensor,  # (*)
    *,
    weight: Tensor | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = IGNORE,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | None = None,
) -> Tensor:
    """What a user of PyTorch writes for the same loss, in the dtype of the input."""
    x = input.reshape(-1, input.shape[-1])
    t = target.reshape(-1)
    if logit_scale != 1:
        x = logit_scale * x
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    weight = None if weight is None else weight.to(x.dtype)
    row = F.cross_entropy(x, t, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        row = row + z_loss * x.logsumexp(-1).square()
    if token_weight is not None:
        row = row * token_weight.reshape(-1).to(x.dtype)
    valid = t != ignore_index
    row = torch.where(valid, row, 0.0)
    if reduction == "none":
        return row.view(target.shape)
    if normalizer is not None:
        return row.sum() / normalizer
    if reduction == "sum":
        return row.sum()
    counts = valid.to(x.dtype) if weight is None else torch.where(valid, weight[torch.where(valid, t, 0)], 0.0)
    return row.sum() / counts.sum() if valid.any() else row.sum() * 0


def value_and_gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients of the loss weighed with fixed upstream gradients."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).view(loss.shape)
    if loss.dim() == 0:
        upstream = torch.tensor(1.0)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream.to(loss))


def targets(n: int, v: int, seed: int, ignored: float) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(0, v, (n,), generator=g)
    return torch.where(torch.rand(n, generator=g) < ignored, IGNORE, t)


def options(bits: int, n: int, v: int) -> dict[str, Any]:
    """Options of a call: bit 0 says which smoothing, bits 1 to 7 turn an option on each, the rest is the reduction."""
    chosen: dict[str, Any] = {"reduction": REDUCTIONS[(bits >> 8) % 3]}
    values = {
        "label_smoothing": 0.1 if bits & 1 else 1.0,
        "z_loss": 1e-2,
        "softcap": 4.0,
        "logit_scale": 0.5,
        "weight": draw_values((v,), seed=bits, dtype=torch.float32).abs() + 0.1,
        "token_weight": draw_values((n,), seed=bits + 1, dtype=torch.float32),
        "normalizer": 7.0,
    }
    for bit, (name, value) in enumerate(values.items(), start=1):
        if bits >> bit & 1 and not (name == "normalizer" and chosen["reduction"] == "none"):
            chosen[name] = value
    return chosen


def row_gradient(target: Tensor, chosen: dict[str, Any]) -> float:
    """How large the terms b * p and b of a row's gradient can be, whose difference may be small."""
    weight, token_weight, normalizer = chosen.get("weight"), chosen.get("token_weight"), chosen.get("normalizer")
    b = 1.5 if weight is None else 1.5 * weight.max().item()
    if token_weight is not None and token_weight.numel():
        b *= token_weight.abs().max().item()
    if normalizer is not None:
        return b / normalizer
    valid = target[target != IGNORE]
    if chosen["reduction"] != "mean" or not valid.numel():
        return b
    return b / (valid.numel() if weight is None else weight[valid].sum().item())


def serving(table: Table, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[str]:
    """The backends that take inputs of this dtype on this device."""
    return [
        name for name, why_not in table.reasons(torch.empty(1, 1, dtype=dtype, device=device)).items() if not why_not
    ]


def small_blocks() -> Any:
    """Sizes at which small tensors go through several chunks, tiles and blocks, the last of them ragged."""
    return mock.patch.multiple(
        config, CHUNK_BYTES=4 * 128, WIDE_CHUNK_BYTES=4 * 128, RECOMPUTE_BYTES=4 * 128, PRODUCT_BYTES=4 * 32,
        MULTIPLE=4, BLOCK_ELEMENTS=40, CAPACITY_MULTIPLE=4,
    )  # fmt: skip
