"""What an update rule gets: the tensors of one launch. Shared by the optimizers and their backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Update:
    """Parameters of one group, device and pair of dtypes that share a step counter.

    All lists have one entry a parameter. A rule writes `params`, `masters` and `moments`, each in place; `grads` may be
    left multiplied by the gradient factor.
    """

    params: list[Tensor]  # any shape and strides, fp32 or bf16: what the model reads
    masters: (
        list[Tensor] | None
    )  # contiguous fp32, the parameter at full precision; None: the parameters are all there is
    grads: list[Tensor]  # shape of the parameter, any strides, fp32 or bf16
    moments: tuple[list[Tensor], ...]  # one list a moment: contiguous, shape of the parameter, fp32 or bf16
    starts: list[int]  # logical index of the parameter's first element; multiples of 8
    step: Tensor  # () fp32: steps made, this one included
    group: dict[str, Any]  # the options of the parameter group
    seed: int

    @property
    def stochastic(self) -> bool:
        """Whether bf16 tensors that carry information from step to step are rounded stochastically."""
        return self.group["rounding"] == "stochastic"
