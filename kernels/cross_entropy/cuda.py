"""Backend `cuda`: rows of logits, and tiles of the vocabulary, in CUDA C++ (csrc/cross_entropy/cross_entropy.cu)."""

from __future__ import annotations

import struct
from functools import cache

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy.contract import Coefficients, Options
from hotloop.kernels.cross_entropy.raw import RawRows, Results
from hotloop.kernels.cuda import Launch, supports_device

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_NUMBERS = struct.Struct("<q4f")
# Beside the row, for the merging of warps.
_STATIC_SHARED = 2048
_LARGEST_GRID_Y = 65_535


def supports(input: Tensor, *_: object, **__: object) -> str | None:
    if input.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, the input is {input.dtype}"
    return supports_device(input.device)


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
    room = 16 * (1 + -(-v * logits.element_size() // 16))
    kept = out is not None and room + _STATIC_SHARED <= shared_memory(logits.device)
    # 8 vectors a thread keep enough loads in flight; a row in shared memory leaves room for one CTA at a time.
    threads = min(1024 if kept and room > 48 << 10 else 512, max(32, -(-room // (16 * 8 * 32)) * 32))
    arguments = {
        "logits": logits,
        "logits_stride": _integer(logits.stride(0)),
        "targets": target,
        "weight": weight,
        "token_weight": token_weight,
        "weight_sum": None if weight is None else weight.sum(),
        **dict(zip(("loss", "nll", "lse", "entropy", "predicted"), results, strict=True)),
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
    vectors = 1 + -(-width * logits.element_size() // 16)
    threads = min(256, -(-vectors // 32) * 32)
    for begin in range(0, n, _LARGEST_GRID_Y):
        rows = slice(begin, min(begin + _LARGEST_GRID_Y, n))
        a, b, c, dentropy = factors.rows(rows)
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
            "entropy": None if entropy is None else entropy[rows],
            "numbers": _numbers(options),
        }
        grid = (-(-vectors // threads), rows.stop - rows.start)
        Launch(f"cross_entropy_columns_{DTYPES[logits.dtype]}", grid, threads, 0, arguments).run(logits.device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a CTA may ask for."""
    found = torch.cuda.get_device_properties(device)
    return int(getattr(found, "shared_memory_per_block_optin", found.shared_memory_per_block))


def _numbers(options: Options) -> bytes:
    return _NUMBERS.pack(
        options.ignore_index, options.label_smoothing, options.z_loss, options.softcap or 0.0, options.logit_scale
    )


def _integer(x: int) -> bytes:
    return x.to_bytes(8, "little", signed=True)


KERNELS = RawRows("cuda", supports, _rows, _columns)
