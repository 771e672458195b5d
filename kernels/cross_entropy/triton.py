"""Backend `triton`: rows of logits, and tiles of the vocabulary, each in one launch."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options, Rows
from hotloop.kernels.dispatch import BackendError

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


def rows_forward(
    logits: Tensor,  # (N, V) raw; not written
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) fp32
    token_weight: Tensor | None,  # (N,) fp32
    options: Options,
    stats: bool,
) -> Rows:
    rows = _empty_rows(logits, stats)
    _rows(logits, target, weight, token_weight, options, rows, None, None)
    return rows


def rows_forward_backward_(
    logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    scale: Tensor,  # ()
    options: Options,
    stats: bool,
) -> Rows:
    rows = _empty_rows(logits, stats)
    _rows(logits, target, weight, token_weight, options, rows, logits, scale.expand(target.shape))
    return rows


def rows_backward(
    dloss: Tensor,  # (N,)
    logits: Tensor,  # (N, V) raw
    target: Tensor,  # (N,)
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    lse: Tensor,  # (N,); not needed: exp(x - lse) would be less accurate where |x| is large
    options: Options,
    out: Tensor,  # (N, V): a new tensor, or logits itself
) -> None:
    dense = _by_rows(out)  # out itself, but where its columns are apart
    _rows(logits, target, weight, token_weight, options, None, dense, dloss)
    if dense is not out:
        out.copy_(dense)


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    rows = rows_forward(input, target, weight, token_weight, options, False)
    return rows.loss, rows.lse


def columns_backward_(
    logits: Tensor,  # (N, width) raw, a tile of the vocabulary; overwritten with the gradient
    first: int,  # column of the vocabulary in logits[:, 0]
    target: Tensor,  # (N,) int64
    factors: Coefficients,  # zero in ignored rows
    weight: Tensor | None,  # (V,)
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,); (0,) where factors.dentropy is None
    options: Options,
) -> None:
    from hotloop.kernels.cross_entropy.triton_kernels import columns_kernel

    n, width = logits.shape
    if not n or not width:
        return
    block, warps = _shape(width)
    a, b, c, dentropy = (None if x is None else x.contiguous() for x in factors)
    columns_kernel[(n, -(-width // block))](
        logits, logits.stride(0), width, first, target.contiguous(), a, b, c, dentropy,
        None if weight is None else weight.contiguous(), lse.contiguous(), entropy, options.ignore_index,
        options.softcap or 1.0, options.logit_scale, HAS_C=c is not None, HAS_DENTROPY=dentropy is not None,
        HAS_WEIGHT=weight is not None, HAS_SOFTCAP=options.softcap is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    rows: Rows | None,
    out: Tensor | None,
    dloss: Tensor | None,
) -> None:
    from hotloop.kernels.cross_entropy.triton_kernels import rows_kernel

    if logits.dtype not in DTYPES:
        raise BackendError(f"backend 'triton' takes float32, bfloat16 and float16, the input is {logits.dtype}")
    n, v = logits.shape
    if not n:
        return
    logits = _by_rows(logits)
    weight, token_weight = (None if x is None else x.contiguous() for x in (weight, token_weight))
    dloss = None if dloss is None else dloss.float()
    loss, nll, lse, entropy, predicted = rows or (None,) * 5
    block, warps = _shape(v)
    rows_kernel[(n,)](
        logits, logits.stride(0), target.contiguous(), weight, token_weight,
        None if weight is None else weight.sum(), loss, nll, lse, entropy, predicted,
        out, 0 if out is None else out.stride(0), dloss, 0 if dloss is None else dloss.stride(0), v,
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 1.0, options.logit_scale,
        HAS_RESULTS=rows is not None, HAS_STATS=rows is not None and rows.predicted.shape[0] > 0,
        HAS_GRADIENT=out is not None, IS_ALIKE=out is not None and out.stride(0) == logits.stride(0),
        HAS_WEIGHT=weight is not None, HAS_TOKEN_WEIGHT=token_weight is not None,
        HAS_SMOOTHING=options.label_smoothing > 0, HAS_Z_LOSS=options.z_loss != 0,
        HAS_SOFTCAP=options.softcap is not None, BLOCK=block, num_warps=warps,
    )  # fmt: skip


def _shape(width: int) -> tuple[int, int]:
    """(elements, warps) of a block, for rows of this width."""
    block = min(MOST, max(128, 1 << max(width - 1, 1).bit_length()))
    return block, max(1, block // (32 * THREADS_WORTH))


def _empty_rows(logits: Tensor, stats: bool) -> Rows:
    n = logits.shape[0]
    loss, nll, lse, entropy = (logits.new_empty(k, dtype=torch.float32) for k in (n, n, n, n if stats else 0))
    return Rows(loss, nll, lse, entropy, logits.new_empty(n if stats else 0, dtype=torch.int64))


def _by_rows(logits: Tensor) -> Tensor:
    """A row's elements next to each other; rows may be apart."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
