"""Backend `cpu`: rows of logits in C++, one pass over memory each, the others in cache. See csrc/cross_entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options, Rows
from hotloop.kernels.dispatch import BackendError

_MISSING: str | None = None
try:
    from hotloop.kernels import _C
except ImportError as error:
    _MISSING = f"needs the compiled extension, which is missing ({error}): `hotloop doctor` says how to build it"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(input: Tensor, *_: object, **__: object) -> str | None:
    if input.device.type != "cpu":
        return f"runs on the CPU, the input is on {input.device}"
    if input.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, the input is {input.dtype}"
    return _MISSING


def _refuse_others(logits: Tensor) -> None:
    """The operators take a backend's name from anyone, and what follows reads memory by its address."""
    reason = supports(logits)
    if reason is not None:
        raise BackendError(f"backend 'cpu' {reason}")


def rows_forward(
    logits: Tensor,  # (N, V) raw; not written
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) fp32
    token_weight: Tensor | None,  # (N,) fp32
    options: Options,
    stats: bool,
) -> Rows:
    return _rows(logits, target, weight, token_weight, options, stats)


def rows_forward_backward_(
    logits: Tensor,  # (N, V) raw; overwritten with the gradient of scale * rows.loss.sum()
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,)
    token_weight: Tensor | None,  # (N,)
    scale: Tensor,  # ()
    options: Options,
    stats: bool,
) -> Rows:
    return _rows(logits, target, weight, token_weight, options, stats, out=logits, dloss=scale.expand(target.shape))


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
    _call(_by_rows(logits), target.contiguous(), weight, token_weight, options, (None,) * 5, dense, dloss)
    if dense is not out:
        out.copy_(dense)


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
    _refuse_others(logits)
    n, width = logits.shape
    # Where a logit is +inf all of the row's gradient is NaN, as in PyTorch, and not only that logit's.
    a = torch.where(lse.isposinf(), torch.nan, factors.a)
    part = None if weight is None else weight[first : first + width].contiguous()
    entropy_or_none = None if factors.dentropy is None else entropy
    kept = [_dense(x) for x in (target, a, factors.b, factors.c, factors.dentropy, part, lse, entropy_or_none)]
    _C.cross_entropy_columns(
        logits.data_ptr(), logits.stride(0), DTYPES[logits.dtype], n, width, first, *map(_pointer, kept),
        options.ignore_index, options.softcap or 0.0, options.logit_scale, torch.get_num_threads(),
    )  # fmt: skip


def _rows(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    stats: bool,
    out: Tensor | None = None,
    dloss: Tensor | None = None,
) -> Rows:
    logits, target = _by_rows(logits), target.contiguous()
    n = logits.shape[0]
    loss, nll, lse, entropy = (logits.new_empty(k, dtype=torch.float32) for k in (n, n, n, n if stats else 0))
    rows = Rows(loss, nll, lse, entropy, torch.empty(n if stats else 0, dtype=torch.int64))
    _call(logits, target, weight, token_weight, options, rows if stats else (*rows[:3], None, None), out, dloss)
    return rows


def _call(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    results: tuple[Tensor | None, ...],  # loss, nll, lse, entropy, predicted
    out: Tensor | None,
    dloss: Tensor | None,
) -> None:
    _refuse_others(logits)
    n, v = logits.shape
    weight, token_weight = _dense(weight), _dense(token_weight)
    dloss = None if dloss is None else dloss.float()
    _C.cross_entropy_rows(
        logits.data_ptr(), logits.stride(0), DTYPES[logits.dtype], n, v, target.data_ptr(), _pointer(weight),
        float(v) if weight is None else weight.sum().item(), _pointer(token_weight),
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 0.0, options.logit_scale,
        *map(_pointer, results),
        _pointer(out), 0 if out is None else out.stride(0), _pointer(dloss), 0 if dloss is None else dloss.stride(0),
        torch.get_num_threads(),
    )  # fmt: skip


def _by_rows(logits: Tensor) -> Tensor:
    """A row's elements next to each other; rows may be apart."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def forward(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    rows = rows_forward(input, target, weight, token_weight, options, False)
    return rows.loss, rows.lse
