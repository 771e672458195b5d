"""One optimizer step: accumulate over micro-batches, sum over ranks, judge, update. Nothing waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hotloop.engine.data.batches import Batch
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.guards import OutlierGuard
from hotloop.kernels.optimizers import AdamW


class Phases:
    """Milliseconds of the parts of a step: host clock on the CPU, events on a CUDA stream (read after the step)."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """The part `name` ends here."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def milliseconds(self) -> dict[str, float]:
        """Part -> ms. On CUDA only once the device has passed the last mark."""
        parts: dict[str, float] = {}
        for (_, a), (name, b) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(a, torch.cuda.Event):
                assert isinstance(b, torch.cuda.Event)
                parts[name] = parts.get(name, 0.0) + a.elapsed_time(b)
            else:
                assert isinstance(b, float)
                parts[name] = parts.get(name, 0.0) + (b - a) * 1e3
        return parts


@dataclass
class StepResult:
    """What a step leaves behind, on the device until it is drained."""

    loss: Tensor  # () mean nats per supervised token of the global batch
    loss_z: Tensor  # ()
    grad_norm: Tensor  # () before clipping
    skipped: Tensor  # () 1 where nothing was updated
    stop: Tensor  # () more than 0 where any rank was asked to stop
    phases: Phases = field(repr=False)


class TrainStep:
    def __init__(
        self,
        objective: Callable[..., Tensor],  # (tokens, targets, positions, cu_seqlens, normalizer) -> ()
        parameters: Sequence[nn.Parameter],
        optimizer: AdamW,
        guard: OutlierGuard,
        ranks: Ranks,
    ):
        self.objective, self.parameters = objective, parameters
        self.optimizer, self.guard, self.ranks = optimizer, guard, ranks

    def __call__(self, batches: Sequence[Batch], n_supervised: float, lr: float, stop: bool = False) -> StepResult:
        """`n_supervised` is that of the whole global batch; `batches` are this rank's micro-batches of it."""
        return self.update(*self.accumulate(batches, n_supervised, stop), n_supervised, lr)

    def accumulate(self, batches: Sequence[Batch], n_supervised: float, stop: bool = False) -> tuple[Tensor, Phases]:
        """This rank's gradients. Returns [loss, stop], what the ranks have yet to sum.

        After running out of memory here it can be tried again: nothing but gradients has changed.
        """
        device = self.ranks.device
        phases = Phases(device)
        normalizer = torch.full((), float(n_supervised or 1), device=device)
        shared = torch.tensor([0.0, float(stop)], device=device)
        for batch in batches:
            batch = batch.to(device)
            loss = self.objective(batch.tokens, batch.targets, batch.positions, batch.cu_seqlens, normalizer)
            loss.backward()
            shared[0] += loss.detach()
        phases.mark("forward_backward_ms")
        return shared, phases

    def update(self, shared: Tensor, phases: Phases, n_supervised: float, lr: float) -> StepResult:
        """Sum over ranks, judge, and take the optimizer's step or leave everything as it is."""
        self.ranks.sum_([*(p.grad for p in self.parameters if p.grad is not None), shared])
        if self.ranks.world_size > 1:
            phases.mark("communication_ms")
        if n_supervised > 0:
            skip, loss_z = self.guard(shared[0])
        else:  # contributes nothing: no decay, no momentum, no loss that others are compared with
            skip, loss_z = torch.ones_like(shared[0]), torch.zeros_like(shared[0])
        self.optimizer.found_inf = skip
        skipped_before = self.optimizer.skipped_steps.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        phases.mark("optimizer_ms")
        return StepResult(
            loss=shared[0],
            loss_z=loss_z,
            grad_norm=self.optimizer.grad_norm.clone(),
            skipped=(self.optimizer.skipped_steps - skipped_before).float(),
            stop=shared[1],
            phases=phases,
        )
