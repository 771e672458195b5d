"""Lion: options, table of backends, and the formula they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import cpu, cuda, reference, triton
from hotloop.kernels.optimizers.base import BaseOptimizer
from hotloop.kernels.optimizers.checks import check_betas

LION = Table(
    "lion",
    Backend("cpu", cpu.supports, cpu.RULES.lion),
    Backend("cuda", cuda.supports, cuda.RULES.lion),
    Backend("triton", triton.supports, triton.RULES.lion),
    Backend("reference", reference.supports, reference.lion),
)


class Lion(BaseOptimizer):
    """The sign of a mean of gradients (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv:2302.06675).

    With decay = 1 - lr * weight_decay, in fp64 and rounded once to fp32, per element in fp32, every operation rounded
    to nearest, in this order, none contracted:

        g = grad * factor                                       # -g with maximize
        p = p * decay
        p = p - lr * sign(m * beta1 + g * (1 - beta1))          # sign(0) = 0
        m = m * beta2 + g * (1 - beta2)

    All else (clipping, skipped steps, storage, rounding, shards, attributes) is as in `AdamW`.
    """

    table = LION
    moments = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
            "betas": betas,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "master": master,
            "rounding": rounding,
            "maximize": maximize,
        }
        super().__init__(params, defaults, max_grad_norm=max_grad_norm, check_finite=check_finite, seed=seed)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        check_betas(group["betas"])
