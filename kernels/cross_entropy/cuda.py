"""Backend `cuda`: rows of logits, and tiles of the vocabulary, in CUDA C++ (csrc/cross_entropy/cross_entropy.cu)."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options, Rows
from hotloop.kernels.cuda import Launch, supports_device
from hotloop.kernels.dispatch import BackendError

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NUMBERS = struct.Struct("<q4f")
# Beside the row, for the merging of warps.
_STATIC_SHARED = 2048
_LARGEST_GRID_Y = 65_535


def supports(input: Tensor, *_: object, **__: object) -> str | None:
    if input.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, the input is {input.dtype}"
    return supports_device(input.device)


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
    _refuse_others(logits)
    n, width = logits.shape
    vectors = 1 + -(-width * logits.element_size() // 16)
    threads = min(256, -(-vectors // 32) * 32)
    weight, lse, target = _dense(weight), lse.contiguous(), target.contiguous()
    for begin in range(0, n if width else 0, _LARGEST_GRID_Y):
        rows = slice(begin, min(begin + _LARGEST_GRID_Y, n))
        a, b, c, dentropy = (_dense(x) for x in factors.rows(rows))
        arguments = {
            "logits": logits[rows],
            "logits_stride": _integer(logits.stride(0)),
            "width": _integer(width),
            "first": _integer(first),
            "targets": target[rows],
            "a": a,
            "b": b,
            "c": c,
            "dentropy": dentropy,
            "weight": weight,
            "lse": lse[rows],
            "entropy": None if dentropy is None else entropy[rows],
            "numbers": _numbers(options),
        }
        grid = (-(-vectors // threads), rows.stop - rows.start)
        Launch(f"cross_entropy_columns_{DTYPES[logits.dtype]}", grid, threads, 0, arguments).run(logits.device)


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
    _refuse_others(logits)
    n, v = logits.shape
    if not n:
        return
    weight, token_weight = _dense(weight), _dense(token_weight)
    loss, nll, lse, entropy, predicted = rows or (None,) * 5
    stats = predicted is not None and predicted.shape[0] > 0
    dloss = None if dloss is None else dloss.float()
    room = 16 * (1 + -(-v * logits.element_size() // 16))
    kept = out is not None and room + _STATIC_SHARED <= shared_memory(logits.device)
    # 8 vectors a thread keep enough loads in flight; a row in shared memory leaves room for one CTA at a time.
    threads = min(1024 if kept and room > 48 << 10 else 512, max(32, -(-room // (16 * 8 * 32)) * 32))
    arguments = {
        "logits": _by_rows(logits),
        "logits_stride": _integer(_by_rows(logits).stride(0)),
        "targets": target.contiguous(),
        "weight": weight,
        "token_weight": token_weight,
        "weight_sum": None if weight is None else weight.sum(),
        "loss": loss,
        "nll": nll,
        "lse": lse,
        "entropy": entropy if stats else None,
        "predicted": predicted if stats else None,
        "out": out,
        "out_stride": _integer(0 if out is None else out.stride(0)),
        "dloss": dloss,
        "dloss_stride": _integer(0 if dloss is None else dloss.stride(0)),
        "v": _integer(v),
        "numbers": _numbers(options),
        "is_kept": struct.pack("<i", kept),
    }
    name = f"cross_entropy_rows_{DTYPES[logits.dtype]}"
    Launch(name, (n, 1), threads, room if kept else 0, arguments).run(logits.device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a CTA may ask for."""
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def _refuse_others(logits: Tensor) -> None:
    """The operators take a backend's name from anyone, and what follows reads memory by its address."""
    reason = supports(logits)
    if reason is not None:
        raise BackendError(f"backend 'cuda' {reason}")


def _numbers(options: Options) -> bytes:
    return _NUMBERS.pack(
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 0.0, options.logit_scale
    )


def _integer(x: int) -> bytes:
    return x.to_bytes(8, "little", signed=True)


def _empty_rows(logits: Tensor, stats: bool) -> Rows:
    n = logits.shape[0]
    loss, nll, lse, entropy = (logits.new_empty(k, dtype=torch.float32) for k in (n, n, n, n if stats else 0))
    return Rows(loss, nll, lse, entropy, logits.new_empty(n if stats else 0, dtype=torch.int64))


def _by_rows(logits: Tensor) -> Tensor:
    """A row's elements next to each other; rows may be apart."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
