"""Backend `triton`: one forward and one backward family for every option, dtype up to fp32, and head_dim."""

from __future__ import annotations

from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels import gpu
from hotloop.kernels.attention import config, tune
from hotloop.kernels.attention.options import Call
from hotloop.kernels.dispatch import Backend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_ROWS = 2**31 - 2**16
"""Query rows of one head of k, which are counted in 32 bits."""
MOST_STRIDE = 2**22
"""Elements between positions of k or v, whose offsets within a tile are 32-bit."""
DELTA_ROWS, SUM_ROWS = 32, 1024


def supports(call: Call, needs_dlse: bool) -> str | None:
    q, k, *_ = call
    if find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'hotloop[triton]'"
    if q.device.type != "cuda":
        return f"serves cuda tensors, got {q.device.type}"
    if q.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {q.dtype}"
    if q.shape[-3] * (q.shape[-2] // k.shape[-2]) > MOST_ROWS:
        return f"counts query rows of a head of k in 32 bits: up to {MOST_ROWS}"
    return gpu.lacking(q.device.index)


class Problem:
    """What a call's tensors and options mean to the kernels, derived once for all of them."""

    def __init__(self, call: Call):
        def dense(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.contiguous()

        q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, _, self.seed, self.options = call
        self.q = _rows(q)
        self.k, self.v = (x if abs(x.stride(-3)) < MOST_STRIDE else x.contiguous() for x in (_rows(k), _rows(v)))
        self.alibi_slopes = dense(alibi_slopes)
        self.cu_seqlens_q, self.cu_seqlens_k = dense(cu_seqlens_q), dense(cu_seqlens_k)
        self.is_packed = call.is_packed

    @property
    def segments(self) -> int:
        return 0 if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def batch(self) -> int:
        return 1 if self.is_packed else self.q.shape[0]

    @property
    def positions(self) -> tuple[int, int]:
        """Tq and Tk of a batch, or in all."""
        return self.q.shape[-3], self.k.shape[-3]

    @property
    def is_rich(self) -> bool:
        """Whether scores take more than a factor."""
        return self.options.softcap > 0 or self.options.dropout_p > 0 or self.alibi_slopes is not None

    @property
    def group(self) -> int:
        return self.q.shape[-2] // self.k.shape[-2]

    def arguments(self) -> dict[str, Any]:
        """Those that all kernels with tiles have in common."""
        options, alibi = self.options, self.alibi_slopes
        # A window that reaches past every segment is none: no further code, no sums that pass 32 bits.
        left = options.window_left if options.window_left < options.max_seqlen_k - 1 else -1
        right = options.window_right if options.window_right < options.max_seqlen_q - 1 else -1
        (Tq, Tk), scale = self.positions, options.scale
        return {
            "q": self.q, "k": self.k, "v": self.v, "alibi_slopes": alibi, "seed": self.seed,
            "cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k,
            "q_strides": strides(self.q), "k_strides": strides(self.k), "v_strides": strides(self.v),
            "alibi_stride": 0 if alibi is None or alibi.dim() == 1 else alibi.shape[1],
            "Tq": Tq, "Tk": Tk, "Hk": self.k.shape[-2], "segments": self.segments,
            "window_left": left, "window_right": right,
            # Not 0, which times the -inf of what is masked were NaN.
            "magnitude": max(abs(scale), torch.finfo(torch.float32).tiny), "softcap": options.softcap,
            "threshold": int(options.dropout_p * 2**32), "kept_scale": 1 / (1 - options.dropout_p),
            "GROUP": self.group, "D": self.q.shape[-1],
            "PACKED": self.is_packed, "IS_NEGATIVE": scale < 0,
            "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "HAS_SOFTCAP": options.softcap > 0,
            "HAS_ALIBI": alibi is not None, "HAS_DROPOUT": options.dropout_p > 0,
            "NATURAL": self.q.dtype == torch.float32,
            "PRECISION": "tf32x3" if self.q.dtype == torch.float32 else "ieee",
            "enable_fp_fusion": self.q.dtype != torch.float32,
        }  # fmt: skip

    def launch(self, kernel: Any, name: str, by_keys: bool = False, **arguments: Any) -> None:
        """One program for each tile of query rows, or `by_keys`, and head of k."""
        (Tq, Tk), (Hk, D), itemsize = self.positions, self.k.shape[-2:], self.q.dtype.itemsize
        arch = gpu.arch_of(self.q.device)
        tile = tune.tile(name, self.q.device, arch, itemsize, D, self.is_rich)
        rows, block = (Tk, tile.BLOCK_N) if by_keys else (Tq * self.group, tile.BLOCK_M)
        # Packed: see `tile_rows`. What lies past the last boundary is one more segment.
        tiles = rows // block + self.segments + 1 if self.is_packed else -(-rows // block)
        heads, parts = self.batch * Hk, -(-D // tile.BLOCK_D)
        if rows == 0 or heads == 0:
            return
        section = config.section(arch, heads, min(Tk, self.options.max_seqlen_k), D, itemsize)
        run(
            self.q, kernel, (tiles * heads * parts,),
            {**self.arguments(), **arguments, "tiles": tiles, "heads": heads, "section": section, **asdict(tile)},
        )  # fmt: skip


def run(on: Tensor, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """Launch on the device of `on`: Triton takes the current one."""
    with torch.cuda.device_of(on):
        kernel[grid](**arguments)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    from hotloop.kernels.attention.triton_forward import forward_kernel

    o = call.q.new_empty(call.q.shape)
    lse = call.q.new_empty(call.lse_shape, dtype=torch.float32)
    sinks = None if call.sinks is None else call.sinks.contiguous()
    Problem(call).launch(forward_kernel, "forward", o=o, lse=lse, sinks=sinks, HAS_SINKS=sinks is not None)
    return o, lse


def backward(
    call: Call, o: Tensor, lse: Tensor, do: Tensor, dlse: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from hotloop.kernels.attention.triton_backward import dkdv_kernel, dq_kernel

    q, k, v, cu_seqlens_q, _, alibi_slopes, sinks, _, options = call
    needs_dq, needs_dk, needs_dv, needs_dalibi, needs_dsinks = needs
    dq, dk, dv = (x.new_empty(x.shape if n else 0) for x, n in zip((q, k, v), needs, strict=False))
    delta, dalibi, dsinks = None, q.new_empty(0), q.new_empty(0)
    problem = Problem(call)
    do, o, lse = _rows(do), o.contiguous(), lse.contiguous()
    if needs_dq or needs_dk or needs_dalibi or needs_dsinks:
        delta, dsinks = _delta(problem, do, dlse, o, lse, sinks if needs_dsinks else None)
    shared: dict[str, Any] = {"do": do, "do_strides": strides(do), "lse": lse, "delta": delta, "scale": options.scale}
    if needs_dk or needs_dv:
        problem.launch(dkdv_kernel, "dkdv", True, **shared, dk=dk, dv=dv, HAS_DK=needs_dk, HAS_DV=needs_dv)
    if needs_dq or needs_dalibi:
        rows = torch.empty_like(lse) if needs_dalibi else None
        problem.launch(dq_kernel, "dq", **shared, dq=dq, dalibi=rows, HAS_DQ=needs_dq, HAS_DALIBI=needs_dalibi)
        if rows is not None and alibi_slopes is not None:
            dalibi = _sum_rows(rows, cu_seqlens_q, alibi_slopes)
    return dq, dk, dv, dalibi, dsinks


def _delta(
    problem: Problem, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """delta like lse, and the gradient of `sinks` (Hq,), empty where that is None."""
    from hotloop.kernels.attention.triton_backward import delta_kernel

    (Hq, D), B, T = o.shape[-2:], problem.batch, problem.positions[0]
    delta, tiles = torch.empty_like(lse), -(-T // DELTA_ROWS)
    dsinks = lse.new_empty((B * tiles, Hq) if sinks is not None else 0)
    if o.numel():
        run(
            o, delta_kernel, (B * tiles, Hq),
            {
                "o": o, "do": do, "lse": lse, "dlse": None if dlse is None else dlse.contiguous(),
                "sinks": None if sinks is None else sinks.contiguous(), "delta": delta, "dsinks": dsinks,
                "do_strides": strides(do), "T": T, "Hq": Hq, "tiles": tiles, "D": D, "HAS_DLSE": dlse is not None,
                "HAS_DSINKS": sinks is not None, "BLOCK": DELTA_ROWS, "BLOCK_D": config.block_d(D),
                # A product fused into the first addition of a sum is rounded differently by lanes that hold the same
                # rows, and which of them is stored is not defined.
                "enable_fp_fusion": False,
            },
        )  # fmt: skip
    return delta, o.new_empty(0) if sinks is None else dsinks.sum(0)


def _sum_rows(rows: Tensor, cu_seqlens: Tensor | None, alibi_slopes: Tensor) -> Tensor:
    """Sums over positions, like `alibi_slopes`. rows: like lse."""
    from hotloop.kernels.attention.triton_backward import segment_sums_kernel

    if cu_seqlens is None:
        return rows.sum(-1) if alibi_slopes.dim() == 2 else rows.sum((0, 2))
    if alibi_slopes.dim() == 1:
        return rows.sum(-1)
    sums = torch.empty_like(alibi_slopes, memory_format=torch.contiguous_format)
    arguments = {"x": rows, "cu_seqlens": cu_seqlens, "sums": sums, "T": rows.shape[-1], "BLOCK": SUM_ROWS}
    run(rows, segment_sums_kernel, tuple(sums.shape), {**arguments, "enable_fp_fusion": False})
    return sums


def _rows(x: Tensor) -> Tensor:
    """x, with the elements of a row next to each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, position and head; packed tensors have no batch."""
    return (x.stride(0) if x.dim() == 4 else 0), x.stride(-3), x.stride(-2)


BACKEND = Backend("triton", supports, forward, backward)
