"""Backend `cpu`: rows of logits in C++, one pass over memory each, the others in cache. See csrc/cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options
from hotloop.kernels.cross_entropy.raw import RawRows, Results
from hotloop.kernels.extension import loaded, missing

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(input: Tensor, *_: object, **__: object) -> str | None:
    if input.device.type != "cpu":
        return f"runs on the CPU, the input is on {input.device}"
    if input.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, the input is {input.dtype}"
    return missing()


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    results: Results,
    out: Tensor | None,
    dloss: Tensor | None,
) -> None:
    n, v = logits.shape
    loaded().cross_entropy_rows(
        logits.data_ptr(), logits.stride(0), DTYPES[logits.dtype], n, v, target.data_ptr(), _pointer(weight),
        float(v) if weight is None else weight.sum().item(), _pointer(token_weight),
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 0.0, options.logit_scale,
        *map(_pointer, results),
        _pointer(out), 0 if out is None else out.stride(0), _pointer(dloss), 0 if dloss is None else dloss.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip


def _columns(
    logits: Tensor,
    first: int,
    target: Tensor,
    factors: Coefficients,
    weight: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    options: Options,
) -> None:
    n, width = logits.shape
    # Where a logit is +inf all of the row's gradient is NaN, as in PyTorch, and not only that logit's.
    a = torch.where(lse.isposinf(), torch.nan, factors.a)
    part = None if weight is None else weight[first : first + width]
    kept = (target, a, factors.b, factors.c, factors.dentropy, part, lse, entropy)
    loaded().cross_entropy_columns(
        logits.data_ptr(), logits.stride(0), DTYPES[logits.dtype], n, width, first, *map(_pointer, kept),
        options.ignore_index, options.softcap or 0.0, options.logit_scale, torch.get_num_threads(),
    )  # fmt: skip


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


KERNELS = RawRows("cpu", supports, _rows, _columns)
