"""Sums in fp32 of products of 16-bit matrices on a CPU, which PyTorch does not offer, by the MKL inside it.

PyTorch's wheels for x86 are linked with MKL and export its Fortran interface, in which GEMM_BF16BF16F32 and
GEMM_F16F16F32 take 16-bit matrices and add to an fp32 one. Nothing is rounded on the way, and in bf16 it is 1.3 times
as fast as a product that is then widened and added (V = 50,304, 512 rows, D = 512, two Zen 4 cores). Other builds lack
them; `ProductSum` then takes the two steps.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LARGEST = 2**31 - 1
_NAMES = {torch.bfloat16: "GEMM_BF16BF16F32", torch.float16: "GEMM_F16F16F32"}


def is_there(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `add_product` takes matrices of `dtype` on this device."""
    return device.type == "cpu" and _function(dtype) is not None


def add_product(
    total: Tensor,  # (M, N) fp32, contiguous
    a: Tensor,  # (M, K) bf16 or fp16, rows or columns contiguous
    b: Tensor,  # (K, N) like a, rows contiguous
    beta: float,
) -> None:
    """total = beta * total + a @ b. With beta = 0 what is in `total` is not read."""
    (m, k), n = a.shape, b.shape[1]
    by_rows = a.stride(1) == 1
    lda, ldb = a.stride(0 if by_rows else 1), b.stride(0)
    if min(m, n, k) == 0:
        total.mul_(beta) if beta else total.zero_()
        return
    # Fortran stores matrices by columns and so reads transposes: total.T = beta * total.T + b.T @ a.T.
    _function(a.dtype)(
        ctypes.c_char_p(b"N"), ctypes.c_char_p(b"N" if by_rows else b"T"), _integer(n), _integer(m), _integer(k),
        _number(1.0), ctypes.c_void_p(b.data_ptr()), _integer(ldb), ctypes.c_void_p(a.data_ptr()), _integer(lda),
        _number(beta), ctypes.c_void_p(total.data_ptr()), _integer(n),
    )  # fmt: skip


def serves(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether `add_product` takes these."""
    return (
        is_there(a.dtype, a.device)
        and a.dtype == b.dtype
        and total.dtype == torch.float32
        and total.is_contiguous()
        and 1 in a.stride()
        and b.stride(1) == 1
        and max(*a.shape, *a.stride(), *b.shape, *b.stride()) <= _LARGEST
    )


def _integer(x: int) -> Any:
    return ctypes.byref(ctypes.c_int32(x))


def _number(x: float) -> Any:
    return ctypes.byref(ctypes.c_float(x))


@cache
def _function(dtype: torch.dtype) -> Any:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return getattr(ctypes.CDLL(str(library)), _NAMES[dtype])
    except (OSError, AttributeError, KeyError):
        return None
