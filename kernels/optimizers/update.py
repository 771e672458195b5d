"""What an update rule gets: the tensors of one launch. Shared by the optimizers and their backends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hotloop.kernels.optimizers.tables import DeviceTables


@dataclass(frozen=True)
class Update:
    """Parameters of one group, device, storage and sharding that share a step counter.

    All lists have one entry a parameter; of a sharded parameter they hold this rank's shard. A rule writes `params`,
    `masters`, `moments` and `scales`, each in place; `grads` may be left multiplied by the gradient factor.
    """

    tensors: list[Tensor]  # the parameters as the optimizer was given them: DTensors where they are sharded
    params: list[Tensor]  # any shape and strides, fp32 or bf16: what the model reads
    masters: list[Tensor] | None  # contiguous fp32, the parameter in full precision; None: the parameters are that
    grads: list[Tensor]  # shape of the parameter, any strides, fp32 or bf16
    moments: tuple[list[Tensor], ...]  # one list a moment: contiguous, shape of the parameter, fp32, bf16 or uint8
    scales: tuple[list[Tensor], ...]  # of uint8 moments, fp32 (rows, blocks of a row), see quantised.py; else empty
    unsigned: tuple[bool, ...]  # one a moment: whether it is never negative
    rows: list[int]  # elements of a row (an index of the first dimension): blocks of a scale end with it
    starts: list[int]  # index of the first element among the elements of all parameters, none of them sharded
    step: Tensor  # () fp32: steps made, this one included
    group: dict[str, Any]  # the options of the parameter group
    seed: int
    tables: DeviceTables  # what launches of the optimizer keep on the device

    @property
    def device(self) -> torch.device:
        return self.step.device

    @property
    def stochastic(self) -> bool:
        """Whether bf16 and uint8 tensors that carry information from step to step are rounded stochastically."""
        return bool(self.group["rounding"] == "stochastic")

    @property
    def quantised(self) -> bool:
        return bool(self.scales)
