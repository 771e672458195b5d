"""AdamW: options, table of backends, and the formula they share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.optimizers import cpu, cuda, platform, reference, triton
from hotloop.kernels.optimizers.base import BaseOptimizer
from hotloop.kernels.optimizers.checks import check_betas

ADAMW = Table(
    "adamw",
    Backend("cpu", cpu.supports, cpu.RULES.adamw),
    Backend("torch", platform.supports, platform.adamw),
    Backend("cuda", cuda.supports, cuda.RULES.adamw),
    Backend("triton", triton.supports, triton.RULES.adamw),
    Backend("reference", reference.supports, reference.adamw),
)


class AdamW(BaseOptimizer):
    """Adam with decoupled weight decay (Kingma and Ba, arXiv:1412.6980; Loshchilov and Hutter, arXiv:1711.05101).

    With t the number of steps made, this one included, and per step and group, in fp64, each rounded once to fp32:

        decay     = 1 - lr * weight_decay
        step_size = lr * sqrt(1 - beta2 ** t) / (1 - beta1 ** t)
        eps_t     = eps * sqrt(1 - beta2 ** t)                  # in place of a division of sqrt(v)

    and per element in fp32, every operation rounded to nearest, in this order, none contracted:

        g = grad * factor                                       # -g with maximize
        p = p * decay
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + (g * (1 - beta2)) * g
        p = p - (step_size * m) / (sqrt(v) + eps_t)

    `factor` is `min(max_grad_norm / (grad_norm + 1e-6), 1)`, as in `clip_grad_norm_`, over GradScaler's scale. The
    update uses m and v before they are rounded to `state_dtype`. Backend `reference` is this to the bit; backend
    `torch` (PyTorch's fused kernel, chosen on CPU and CUDA) agrees to rounding.

    Args:
        params: tensors, (name, tensor) pairs or dicts of a group, float32 or bfloat16, dense; names appear in errors.
        lr: a number or a 0-dim tensor, which may live on the device and be written between steps.
        betas, eps, weight_decay: as above; options of a group.
        max_grad_norm: clip the norm over all gradients of all groups to this; None: no clipping.
        check_finite: False: where nothing is clipped, do not measure the norm (`grad_norm` stays as it is) and do not
            look for non-finite gradients; saves one reading of them.
        state_dtype: of both moments, "float32", "bfloat16" or "int8" (8-bit codes, a scale for 256 of them; parameters
            with fewer than 4,096 elements or rows shorter than 32, so all vectors, keep fp32 moments).
        master: "float32": keep an fp32 copy of each bfloat16 parameter, update it, and round it to the parameter.
        rounding: of bfloat16 and 8-bit tensors that carry information from step to step (moments, parameters without
            a master): "nearest", or "stochastic" with bits that depend on seed, step and logical index only. The
            second moment needs it: with beta2 above 1 - 2^-9 a step takes less than half a bfloat16 ulp away, and
            rounding to nearest never lets it fall.
        maximize: ascend.
        seed: of stochastic rounding.

    Gradients may be float32 or bfloat16 whatever the parameter is (`Tensor.grad_dtype`). `.grad` may be left multiplied
    by `factor`, as by `clip_grad_norm_`.

    Attributes, both 0-dim on the first parameter's device and written in place by each step (clone to keep):
        grad_norm: float32, norm of all gradients before clipping.
        skipped_steps: int64, number of steps skipped since construction.

    A step is skipped if the norm is not finite or if the attribute `found_inf` (a tensor set by GradScaler or by the
    caller, who also removes it) is not zero. It then changes no parameter, moment, master or step counter. All that is
    decided on the device; `step` never waits for it.
    """

    table = ADAMW
    moments = ("exp_avg", "exp_avg_sq")
    foreign_options = ("amsgrad", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
            "eps": eps,
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
        if not 0 <= group["eps"] < math.inf:
            raise ValueError(f"eps = {group['eps']}: expected a finite number, at least 0")

    def _check_foreign(self, saved: dict[str, Any]) -> None:
        if saved.get("amsgrad"):
            raise ValueError("the state dict was saved with amsgrad=True, which this AdamW does not implement")
        if saved.get("decoupled_weight_decay") is False and saved["weight_decay"] != 0:
            raise ValueError(
                f"the state dict is torch.optim.Adam's with weight_decay = {saved['weight_decay']} added to gradients; "
                "AdamW's decay is decoupled from them: set weight_decay to 0 in the dictionary or start anew"
            )
