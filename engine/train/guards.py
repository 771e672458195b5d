"""Steps that must not happen: non-finite or outlying losses.

The decision to skip a step is taken on the device, inside the optimizer's update; the host learns of it LAG steps later
and counts. Beyond the budget the run rewinds to the last good checkpoint and goes on with the data after the range.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

from hotloop.engine.config import GuardConfig

# The host reads what the device did this many steps ago: late enough never to wait for it, and a fixed number, so that
# a resumed run decides at the same steps.
LAG = 2


class OutlierGuard:
    """Exponential mean and variance of the loss over the accepted steps, on the device.

    z = (loss - mean) / std, with weight 2 / (window + 1) for a new loss; nothing is an outlier before `window` / 4
    accepted steps.
    """

    def __init__(self, config: GuardConfig, device: torch.device):
        self.limit = float("inf") if config.outlier_z is None else config.outlier_z
        self.weight = 2 / (config.window + 1)
        self.warm = config.window // 4
        self.mean = torch.zeros((), dtype=torch.float64, device=device)
        self.variance = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def __call__(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """() loss -> (skip as fp32 0 or 1, z). Statistics take the loss only where it is not skipped."""
        loss = loss.double()
        deviation = loss - self.mean
        z = torch.where(self.count > 1, deviation / (self.variance + 1e-12).sqrt(), torch.zeros_like(loss))
        skip = ~loss.isfinite() | ((self.count >= self.warm) & (z > self.limit))
        weight = torch.clamp(1 / (self.count + 1), min=self.weight)
        variance = (1 - weight) * (self.variance + weight * deviation.square())
        self.mean = torch.where(skip, self.mean, self.mean + weight * deviation)
        self.variance = torch.where(skip, self.variance, variance)
        self.count = torch.where(skip, self.count, self.count + 1)
        return skip.float(), z.float()

    def state(self) -> dict[str, float]:
        return {"mean": self.mean.item(), "variance": self.variance.item(), "count": self.count.item()}

    def load_state(self, state: dict[str, float]) -> None:
        for name in ("mean", "variance", "count"):
            getattr(self, name).fill_(state[name])


class SkipBudget:
    """Host side: the steps that were skipped, and whether they are too many."""

    def __init__(self, config: GuardConfig):
        self.config = config
        self.skipped: deque[int] = deque()

    def record(self, step: int) -> None:
        self.skipped.append(step)

    def exceeded(self, step: int) -> bool:
        """Whether more steps than the budget were skipped among the last `budget_window` up to `step`."""
        while self.skipped and self.skipped[0] <= step - self.config.budget_window:
            self.skipped.popleft()
        return sum(skipped <= step for skipped in self.skipped) > self.config.skip_budget

    def state(self) -> dict[str, Any]:
        return {"skipped": list(self.skipped)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.skipped = deque(state["skipped"])
