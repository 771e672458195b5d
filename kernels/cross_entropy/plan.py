"""What a call of `linear_cross_entropy` will hold in memory, before it is made."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import config, gemm
from hotloop.kernels.cross_entropy.checks import SCHEDULES
from hotloop.kernels.cross_entropy.contract import gradient_dtype
from hotloop.kernels.dispatch import forced_backend


@dataclass(frozen=True)
class Plan:
    """Bytes of both schedules at their peak, forward and backward. `print(plan)` shows them."""

    tokens: int
    projected: int
    """Rows that are projected: fewer with `max_valid`."""
    vocabulary: int
    width: int
    dtype: torch.dtype
    schedule: str
    """The one that the call takes."""
    inputs: int
    gradients: int
    """Of input and linear_weight, those that are required."""
    one_pass: int
    """Beside inputs and gradients; so are the following."""
    recompute: int
    chunk_rows: int
    """Rows of logits at a time in `one_pass`."""
    tile_columns: int
    """Columns of logits at a time in the backward pass of `recompute`."""

    def __str__(self) -> str:
        mib = 1 << 20
        rows = [
            ("one_pass", self.one_pass, f"{self.chunk_rows:,} rows of logits at a time, 3 units of matrix product"),
            ("recompute", self.recompute, f"{self.tile_columns:,} columns of logits at a time, 4 units"),
        ]
        lines = [
            f"{self.tokens:,} tokens, {self.projected:,} projected, {self.vocabulary:,} classes, width {self.width:,}, "
            f"{str(self.dtype).removeprefix('torch.')}",
            f"inputs {self.inputs / mib:,.0f} MiB, gradients {self.gradients / mib:,.0f} MiB; beside them:",
        ]
        for name, size, how in rows:
            lines.append(f"  {'*' if name == self.schedule else ' '} {name:<10} {size / mib:>8,.0f} MiB  {how}")
        return "\n".join(lines)


def linear_cross_entropy_plan(
    input: Tensor,  # (*, D)
    linear_weight: Tensor,  # (V, D)
    *,
    reduction: str = "mean",
    max_valid: int | None = None,
    schedule: str = "auto",
) -> Plan:
    """What `linear_cross_entropy` of these tensors would hold; tensors on the device "meta" will do (an upper bound
    for a CPU, where sums of 16-bit products may need no room).

    Without gradients required of `input` and `linear_weight` the plan is that of a call that computes none. On a CPU
    rows whose targets are ignored are left out, which the plan cannot know: it is for all rows, or `max_valid`. Where
    the backend "triton" is forced it is for that one, of the kind "sm_90", without statistics and label smoothing.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
    if linear_weight.dim() != 2 or input.dim() == 0 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(linear_weight.shape)} and input {tuple(input.shape)}: expected (V, D) and "
            "(..., D)"
        )
    (v, d), n, dtype = linear_weight.shape, input.numel() // max(input.shape[-1], 1), input.dtype
    projected = n if max_valid is None else config.capacity(n, max_valid)
    direct = gemm.is_there(dtype, input.device)
    item, wide = dtype.itemsize, gradient_dtype(dtype).itemsize
    copied = 0 if projected == n else projected * d * item
    step, width = config.chunk_rows(projected, v, dtype), config.tile_columns(projected, v, d, dtype)

    one_pass = min(step, projected) * v * item + copied
    if linear_weight.requires_grad and step < projected:
        one_pass += config.sum_bytes(v, d, dtype, direct=direct)
    recompute = min(config.recompute_rows(projected, v, d, dtype), projected) * v * item + copied
    if input.requires_grad or linear_weight.requires_grad:
        tile = projected * min(width, v) * item
        sums = config.sum_bytes(projected, d, dtype, direct=direct) if input.requires_grad and width < v else 0
        recompute = max(recompute, tile + copied) + sums
    if forced_backend() == "triton":
        needs = (input.requires_grad, linear_weight.requires_grad)
        one_pass, recompute, width = _by_triton(projected, v, d, dtype, one_pass, *needs, max_valid is None)
    return Plan(
        tokens=n, projected=projected, vocabulary=v, width=d, dtype=dtype,
        schedule=schedule if schedule != "auto" else "recompute" if reduction == "none" else "one_pass",
        inputs=(n + v) * d * item,
        gradients=(n * d * input.requires_grad + v * d * linear_weight.requires_grad) * wide,
        one_pass=one_pass, recompute=recompute, chunk_rows=min(step, projected), tile_columns=min(width, v),
    )  # fmt: skip


def _by_triton(
    n: int, v: int, d: int, dtype: torch.dtype, one_pass: int, dinput: bool, dweight: bool, is_counted: bool
) -> tuple[int, int, int]:
    """Bytes of both schedules, and columns of a tile, where the projection's kernels are the backend's own.
    is_counted: `one_pass` uses them too."""
    results = config.results_bytes(n, v, dtype)
    width = config.projected_columns(n, v, d, dtype, config.projection(90, dtype).dlogits)
    if not (dinput or dweight):
        return results, results, width
    if is_counted:
        step = config.chunk_rows(n, v, dtype)
        is_summed = dweight and step < n and gradient_dtype(dtype) != torch.float32
        one_pass = config.room_bytes(min(step, n), v, dtype) + 4 * v * d * is_summed
    sums = 4 * n * d if dinput and width < v else 0
    return one_pass, max(results, config.room_bytes(n, min(width, v), dtype) + sums), width
