"""From what the caller wrote to what the op takes: checks of metadata, defaults, casts. No device value is read.

Every check raises ValueError that names the argument, what was given and what is expected.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hotloop.kernels.attention.options import Options, lse_dtype

MAX_HEAD_DIM = 512
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in autocast's dtype where it is on, by differentiable casts; fp64 stays, as in PyTorch's own ops."""
    device = q.device.type
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
    return q, k, v


def check_qkv(q: Tensor, k: Tensor, v: Tensor, varlen: bool) -> None:
    dim, layout = (3, "(total, heads, head_dim)") if varlen else (4, "(batch, positions, heads, head_dim)")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dim:
            raise ValueError(f"{name} {tuple(x.shape)}: expected {layout}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} is {x.dtype}: expected one of {', '.join(map(str, DTYPES))}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype} and q is {q.dtype}: expected one dtype; cast before the call")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: expected one device")
    if k.shape != v.shape:
        raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)}: expected equal shapes")
    Hq, Hk, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if k.shape[-1] != D:
        raise ValueError(f"head_dim of k is {k.shape[-1]} and of q {D}: expected the same")
    if D % 8 != 0 or not 8 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim {D}: expected a multiple of 8 up to {MAX_HEAD_DIM}; pad q, k and v with zeros")
    if Hq < 1 or Hk < 1 or Hq % Hk != 0:
        raise ValueError(f"q has {Hq} heads and k {Hk}: the heads of k must divide those of q")
    if not varlen and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch size {q.shape[0]} and k {k.shape[0]}: expected the same")


def check_cu_seqlens(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None) -> None:
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if x is None:
            continue
        if x.dim() != 1 or x.shape[0] < 2:
            raise ValueError(f"{name} {tuple(x.shape)}: expected (segments + 1,) for at least one segment")
        if x.dtype != torch.int32:
            raise ValueError(f"{name} is {x.dtype}: expected torch.int32")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} and q on {q.device}: expected one device")
    if cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"q has {q.shape[0]} positions and k {k.shape[0]}: cross attention needs cu_seqlens_k")
    elif cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"cu_seqlens_q has {cu_seqlens_q.shape[0] - 1} segments and cu_seqlens_k {cu_seqlens_k.shape[0] - 1}: "
            "expected as many"
        )


def assert_cu_seqlens(name: str, cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """RuntimeError where the values are wrong; on a GPU an assertion of the device, and nothing waits."""
    lengths = cu_seqlens.diff()
    torch._assert_async(cu_seqlens.select(0, 0) == 0, f"{name} does not start at 0")
    torch._assert_async((lengths >= 0).all(), f"{name} decreases")
    torch._assert_async(cu_seqlens.select(0, -1) <= total, f"{name} ends past the {total} positions")
    torch._assert_async((lengths <= max_seqlen).all(), f"{name} has a segment longer than max_seqlen = {max_seqlen}")


def options_of(
    q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: tuple[int | None, int | None],
    scale: float | None,
    softcap: float | None,
    dropout_p: float,
) -> Options:
    for name, value in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if value < 0:
            raise ValueError(f"{name} = {value}: must not be negative")
    if len(window_size) != 2:
        raise ValueError(f"window_size = {window_size}: expected (left, right)")
    left, right = (-1 if side is None else side for side in window_size)
    if left < -1 or right < -1:
        raise ValueError(f"window_size = {window_size}: expected two numbers that are not negative, or None or -1")
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"scale = {scale}: must be finite")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap = {softcap}: must be finite and greater than 0, or None for none")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p = {dropout_p}: must be at least 0 and below 1")
    return Options(
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        window_left=left,
        window_right=0 if causal else right,
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        softcap=0.0 if softcap is None else float(softcap),
        dropout_p=float(dropout_p),
    )


def per_head(
    name: str, x: Tensor | None, q: Tensor, batch: int | None = None
) -> Tensor | None:  # (Hq,) or, where `batch` is given, (batch, Hq), in lse's dtype
    if x is None:
        return None
    Hq = q.shape[-2]
    expected = [(Hq,)] if batch is None else [(Hq,), (batch, Hq)]
    if tuple(x.shape) not in expected:
        raise ValueError(f"{name} {tuple(x.shape)}: expected {' or '.join(map(str, expected))}")
    if not x.is_floating_point():
        raise ValueError(f"{name} is {x.dtype}: expected a floating-point dtype")
    if x.device != q.device:
        raise ValueError(f"{name} is on {x.device} and q on {q.device}: expected one device")
    return x.to(lse_dtype(q.dtype))


def seed_tensor(seed: int | Tensor | None, dropout_p: float, q: Tensor) -> Tensor | None:  # () int64
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed {tuple(seed.shape)} {seed.dtype}: expected one torch.int64 element")
        if seed.device != q.device:
            raise ValueError(f"seed is on {seed.device} and q on {q.device}: expected one device")
        return seed.reshape(()) if dropout_p > 0 else None
    if seed is not None and not 0 <= seed < 2**63:
        raise ValueError(f"seed = {seed}: expected 0 <= seed < 2**63")
    if dropout_p == 0:
        return None
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=q.device)
    return torch.full((), seed, dtype=torch.int64, device=q.device)
