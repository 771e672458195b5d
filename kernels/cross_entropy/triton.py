"""Backend `triton`: rows of logits, and tiles of the vocabulary, each in one launch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options
from hotloop.kernels.cross_entropy.raw import RawRows, Results

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Elements of a row that a program works on at a time: 8 a thread, one 128-bit access of bf16. With 16, registers spill.
MOST, THREADS_WORTH = 2048, 8


def supports(input: Tensor, *_: object, **__: object) -> str | None:
    if find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'hotloop[triton]'"
    if input.device.type != "cuda":
        return f"serves cuda tensors, got {input.device.type}"
    if input.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, the input is {input.dtype}"
    return None


def run_rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    results: Results,
    out: Tensor | None,
    dloss: Tensor | None,
    count: Tensor | None = None,  # () int64 on the device: rows from this one on are left alone
) -> None:
    from hotloop.kernels.cross_entropy.triton_kernels import rows_kernel

    n, v = logits.shape
    block, warps = _shape(v)
    rows_kernel[(n,)](
        logits, logits.stride(0), target, weight, token_weight, None if weight is None else weight.sum(), *results,
        out, 0 if out is None else out.stride(0), dloss, 0 if dloss is None else dloss.stride(0), count, v,
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 1.0, options.logit_scale,
        HAS_RESULTS=results[0] is not None, HAS_STATS=results[-1] is not None, HAS_GRADIENT=out is not None,
        IS_ALIKE=out is not None and out.stride(0) == logits.stride(0), HAS_WEIGHT=weight is not None,
        HAS_TOKEN_WEIGHT=token_weight is not None, HAS_SMOOTHING=options.label_smoothing > 0,
        HAS_Z_LOSS=options.z_loss != 0, HAS_SOFTCAP=options.softcap is not None, HAS_COUNT=count is not None,
        BLOCK=block, num_warps=warps,
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
    from hotloop.kernels.cross_entropy.triton_kernels import columns_kernel

    n, width = logits.shape
    block, warps = _shape(width)
    columns_kernel[(n, -(-width // block))](
        logits, logits.stride(0), width, first, target, *factors, weight, lse, entropy, options.ignore_index,
        options.softcap or 1.0, options.logit_scale, HAS_C=factors.c is not None,
        HAS_DENTROPY=factors.dentropy is not None, HAS_WEIGHT=weight is not None,
        HAS_SOFTCAP=options.softcap is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _shape(width: int) -> tuple[int, int]:
    """(elements, warps) of a block, for rows of this width."""
    block = min(MOST, max(128, 1 << max(width - 1, 1).bit_length()))
    return block, max(1, block // (32 * THREADS_WORTH))


KERNELS = RawRows("triton", supports, run_rows, _columns)
