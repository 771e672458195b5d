"""SGD: options, table of backends, and the formula they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import cpu, cuda, platform, reference, triton
from hotloop.kernels.optimizers.base import BaseOptimizer

SGD_TABLE = Table(
    "sgd",
    Backend("cpu", cpu.supports, cpu.RULES.sgd),
    Backend("torch", platform.supports, platform.sgd),
    Backend("cuda", cuda.supports, cuda.RULES.sgd),
    Backend("triton", triton.supports, triton.RULES.sgd),
    Backend("reference", reference.supports, reference.sgd),
)


class SGD(BaseOptimizer):
    """Gradient descent with momentum or Nesterov's, as `torch.optim.SGD` without dampening: the decay is added to g.

    Per element in fp32, every operation rounded to nearest, in this order, none contracted:

        g = grad * factor                                       # -g with maximize
        g = g + p * weight_decay
        b = b * momentum + g                                    # with momentum > 0
        p = p - lr * (g + b * momentum  if nesterov else  b)    # p - lr * g without momentum

    All else (clipping, skipped steps, storage, rounding, shards, attributes) is as in `AdamW`. The buffer is called
    `momentum_buffer`, as in torch.optim.SGD, and begins as zeros. Without momentum there is none.
    """

    table = SGD_TABLE
    moments = ("momentum_buffer",)
    foreign_options = ("foreach", "differentiable", "fused")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        max_grad_norm: float | None = None,
        check_finite: bool = True,
        state_dtype: str = "float32",
        master: str | None = None,
        rounding: str = "nearest",
        maximize: bool = False,
        seed: int = 0,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "dampening": 0.0,  # torch.optim.SGD reads it from a state dictionary's groups
            "state_dtype": state_dtype,
            "master": master,
            "rounding": rounding,
            "maximize": maximize,
        }
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, check_finite=check_finite, seed=seed)

    def _moments_of(self, group: dict[str, Any]) -> tuple[str, ...]:
        return self.moments if group["momentum"] > 0 else ()

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum = {group['momentum']}: expected a number of at least 0 and below 1")
        if group["dampening"] != 0:
            raise ValueError(f"dampening = {group['dampening']}: this SGD has none, expected 0")
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("nesterov=True with momentum = 0: give a momentum, or leave nesterov out")
