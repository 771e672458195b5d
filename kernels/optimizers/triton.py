"""Backend `triton`: AdamW, Lion and SGD, bit-equal to the reference; one launch updates all tensors of an `Update`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import tables
from hotloop.kernels.optimizers.raw import RawRules
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

# Blocks of 256 elements that a program takes, 8 elements a thread: one 128-bit access of bf16, two of fp32.
BLOCKS = 4
WARPS = 4
# No contraction, and denormals are kept: the reference's bits.
EXACT: dict[str, Any] = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def _supports_device(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'hotloop[triton]'"
    return None if device.type == "cuda" else f"serves cuda tensors, got {device.type}"


def supports(update: Update) -> str | None:
    return _supports_device(update.device)


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return _supports_device(grads[0].device)


def sum_of_squares(grads: list[Tensor], kept: DeviceTables) -> Tensor:
    """`reference.sum_of_squares`, to the bit, in one launch."""
    from hotloop.kernels.optimizers.triton_kernels import sum_of_squares_kernel

    device = grads[0].device
    flat = [g.contiguous() for g in grads]
    rows, chunks = tables.gradient_rows(flat, _TYPES), tables.gradient_chunks(flat)
    count = len(chunks) // 2
    if not count:
        return torch.zeros((), dtype=torch.float64, device=device)
    sums = torch.empty(count, dtype=torch.float64, device=device)
    table = kept.get("gradients", rows + chunks, device)
    arrived = kept.get("arrived", (0,), device).view(torch.int32)
    sum_of_squares_kernel[(count,)](table, table[len(rows) :], sums, arrived, count, num_warps=WARPS)
    return sums[0]


def _run(
    rule: str,
    update: Update,
    params: list[Tensor],
    grads: list[Tensor],
    factor: Tensor,
    skip: Tensor,
    scalars: Sequence[Tensor],
    constants: Sequence[float],
) -> None:
    from hotloop.kernels.optimizers.triton_kernels import update_kernel

    rows = tables.rows_of(update, params, grads)
    chunks = tables.chunks_of(rows)
    place = rule, id(update.group), params[0].dtype, grads[0].dtype, update.quantised
    table = update.tables.get(place, rows + chunks, update.device)
    update_kernel[(len(chunks) // 2 * (256 // BLOCKS),)](
        table, table[len(rows) :], torch.stack(tuple(scalars)), factor, skip, update.step, update.seed,
        *constants, *[0.0] * (4 - len(constants)),
        RULE=rule, PARAM_DTYPE=triton_dtype(params[0]), GRAD_DTYPE=triton_dtype(grads[0]),
        MOMENT_DTYPE=triton_dtype(update.moments[0][0]) if update.moments else None,
        HAS_MASTER=update.masters is not None, HAS_MOMENTUM=bool(update.moments), STOCHASTIC=update.stochastic,
        MAXIMIZE=update.group["maximize"], NESTEROV=update.group.get("nesterov", False), BLOCKS=BLOCKS,
        num_warps=WARPS, **EXACT,
    )  # fmt: skip


RULES = RawRules(_run)


def triton_dtype(x: Tensor) -> Any:
    import triton.language as tl

    return getattr(tl, str(x.dtype).removeprefix("torch."))
