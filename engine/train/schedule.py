"""The learning rate of a step: a pure function, so that a resumed run needs no state for it."""

from __future__ import annotations

import math

from hotloop.engine.config import OptimizerConfig, ScheduleConfig


def learning_rate(optimizer: OptimizerConfig, schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Learning rate of the step with index `step` (0 .. total_steps - 1) of a run.

    With peak = optimizer.lr, final = peak * schedule.final_lr_ratio, W = schedule.warmup_steps, N = total_steps:

        warm-up      step < W:  peak * (step + 1) / W, so that step W - 1 has the peak exactly
        constant     peak
        linear       from the peak in a straight line to final at step N - 1
        cosine       the same along half a period of a cosine (Loshchilov and Hutter, arXiv:1608.03983)
        trapezoid    peak, then linear over the last round(decay_fraction * N) steps (Hägele et al., arXiv:2405.18392)

    The fall starts at the last warm-up step (step 0 without warm-up). Peak and final are met exactly. Steps from N on
    keep final. A run that ends in its warm-up never falls; neither does a run of one step.

    Raises ValueError on a negative step or total_steps below 1.
    """
    if step < 0:
        raise ValueError(f"step = {step}: must not be negative")
    if total_steps < 1:
        raise ValueError(f"total_steps = {total_steps}: must be at least 1")
    peak, final = optimizer.lr, optimizer.lr * schedule.final_lr_ratio
    if step < schedule.warmup_steps:
        return peak * ((step + 1) / schedule.warmup_steps)
    last = total_steps - 1
    start = max(schedule.warmup_steps - 1, 0)
    if schedule.kind == "trapezoid":
        start = max(start, last - round(schedule.decay_fraction * total_steps))
    if schedule.kind == "constant" or step <= start or start >= last:
        return peak
    progress = min((step - start) / (last - start), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    # Two products rather than final + (peak - final) * share, which misses the peak by a rounding.
    return peak * share + final * (1 - share)
