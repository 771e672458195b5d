"""Backend `triton` of a linear cross entropy by `recompute`: projection and loss in one kernel, no logits in memory.

Which rows have a target is known on the device alone. They are numbered there (`Selection.bounded`), every kernel
reads their count, and what is launched for more rows than there are leaves at once: forward and backward do the
products of the rows that have a target, whether `max_valid` is given or not. Rows of the input are read, and results
written, where they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import config
from hotloop.kernels.cross_entropy.config import Projection, Tile
from hotloop.kernels.cross_entropy.contract import Gradients, Needs, Options, Rows, Upstream, row_coefficients
from hotloop.kernels.cross_entropy.schedule import Selection

MERGED_ROWS = 128
BIAS_ROWS, BIAS_COLUMNS = 32, 64
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
"""Of products of fp32 matrices, by `torch.get_float32_matmul_precision()`. Tensor cores cut sums off where units for
fp32 round them, so that three products of TF32 are no match for one of fp32."""


class Order(NamedTuple):
    """The rows that have a target, one after another."""

    index: Tensor  # (n,) int64: row of the input
    count: Tensor  # () int64: as many are valid, and the rest are nobody's

    @staticmethod
    def of(target: Tensor, ignore_index: int, max_valid: int | None) -> Order:
        most = target.shape[0] if max_valid is None else max_valid
        selection = Selection.bounded(target, ignore_index, most)
        assert selection.index is not None
        assert selection.filled is not None
        return Order(selection.index, selection.filled.sum())


def recompute_forward(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,) fp32
    token_weight: Tensor | None,  # (N,) fp32
    options: Options,
    max_valid: int | None,
    stats: bool,
) -> Rows:
    from hotloop.kernels.cross_entropy.triton_projection_kernels import merge_kernel, results_kernel

    n_all, n_stats = input.shape[0], input.shape[0] if stats else 0
    loss, nll, lse, entropy = (input.new_zeros(k, dtype=torch.float32) for k in (n_all, n_all, n_all, n_stats))
    rows = Rows(loss, nll, lse, entropy, target.new_full((n_stats,), -1))
    order = Order.of(target, options.ignore_index, max_valid)
    n, (v, d) = order.index.shape[0], linear_weight.shape
    if n == 0:
        return rows
    h, w, bias, target = dense_rows(input), dense_rows(linear_weight), dense(linear_bias), target.contiguous()
    weight, token_weight = dense(weight), dense(token_weight)
    has_spread = options.label_smoothing > 0
    tile = tiles(input).results
    tile = tile.half() if stats or has_spread else tile  # registers would spill
    span = config.split_columns(n, v, tile)
    splits = -(-v // span)
    parts = torch.empty((3 + 2 * has_spread + stats, splits, n), dtype=torch.float32, device=h.device)
    firsts = torch.empty((splits, n), dtype=torch.int32, device=h.device) if stats else None
    results_kernel[(-(-n // tile.rows) * splits,)](
        h, h.stride(0), w, w.stride(0), bias, *order, target, weight, parts, firsts, n, v, d, span, splits,
        options.softcap or 1.0, options.logit_scale, HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        HAS_SPREAD=has_spread, HAS_STATS=stats, HAS_SOFTCAP=options.softcap is not None,
        IS_EVEN=d % tile.width == 0, **launch(tile),
    )  # fmt: skip
    merge_kernel[(-(-n // MERGED_ROWS),)](
        parts, firsts, *order, target, weight, token_weight, None if weight is None else weight.sum(), loss, nll, lse,
        entropy, rows.predicted, n, v, splits, options.label_smoothing, options.z_loss, HAS_WEIGHT=weight is not None,
        HAS_TOKEN_WEIGHT=token_weight is not None, HAS_SPREAD=has_spread, HAS_STATS=stats,
        HAS_Z_LOSS=options.z_loss != 0, BLOCK=MERGED_ROWS, num_warps=4,
    )  # fmt: skip
    return rows


def recompute_backward(
    upstream: Upstream,  # (N,) each
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,), or (0,) where upstream.entropy is None
    options: Options,
    max_valid: int | None,
    needs: Needs,
) -> Gradients:
    from hotloop.kernels.cross_entropy import triton_projection_kernels as kernels

    order = Order.of(target, options.ignore_index, max_valid)
    n, (v, d) = order.index.shape[0], linear_weight.shape
    factors = row_coefficients(upstream, target, weight, token_weight, lse, v, options).dense()
    h, w, bias, target = dense_rows(input), dense_rows(linear_weight), dense(linear_bias), target.contiguous()
    weight, lse, entropy = dense(weight), lse.contiguous(), entropy.contiguous()
    made = tiles(input)
    project = made.dlogits
    if factors.c is not None and factors.dentropy is not None:
        project = project.half()  # registers would spill
    width = config.projected_columns(n, v, d, h.dtype, made.dlogits)
    starts = range(0, v, width) if n else range(0)
    shape = config.padded(n, project.rows), config.padded(min(width, v), made.dlogits.columns)
    dlogits = torch.empty(shape, dtype=h.dtype, device=h.device)
    dinput = input.new_zeros(input.shape if needs.input else 0)
    dweight = (torch.empty if n else torch.zeros)((v, d) if needs.linear_weight else 0, dtype=h.dtype, device=h.device)
    dbias = (torch.empty if n else torch.zeros)(v if needs.linear_bias else 0, dtype=h.dtype, device=h.device)
    sums = torch.empty((n, d) if needs.input and len(starts) > 1 else 0, dtype=torch.float32, device=h.device)
    for first in starts:
        part = slice(first, min(first + width, v))
        columns = part.stop - first
        kernels.dlogits_kernel[(-(-n // project.rows) * -(-columns // project.columns),)](
            h, h.stride(0), w, w.stride(0), bias, *order, target, *factors, weight, lse, entropy, dlogits,
            dlogits.stride(0), first, part.stop, v, d, options.softcap or 1.0, options.logit_scale,
            HAS_BIAS=bias is not None, HAS_C=factors.c is not None, HAS_DENTROPY=factors.dentropy is not None,
            HAS_WEIGHT=weight is not None, HAS_SOFTCAP=options.softcap is not None, IS_EVEN=d % project.width == 0,
            **launch(project),
        )  # fmt: skip
        if needs.input:
            tile = made.dinput
            kernels.dinput_kernel[(-(-n // tile.rows) * -(-d // tile.width),)](
                dlogits, dlogits.stride(0), w[part], w.stride(0), *order, sums, dinput, columns, d, HAS_SUM=first > 0,
                IS_LAST=part.stop == v, **launch(tile),
            )  # fmt: skip
        if needs.linear_weight:
            tile = made.dweight
            kernels.dweight_kernel[(-(-columns // tile.columns) * -(-d // tile.width),)](
                dlogits, dlogits.stride(0), h, h.stride(0), *order, dweight[part], columns, d, **launch(tile)
            )
        if needs.linear_bias:
            kernels.dbias_kernel[(-(-columns // BIAS_COLUMNS),)](
                dlogits, dlogits.stride(0), order.count, dbias[part], columns, BLOCK=BIAS_ROWS, BLOCK_V=BIAS_COLUMNS,
                num_warps=4,
            )  # fmt: skip
    return Gradients(dinput, dweight, dbias)


def tiles(x: Tensor) -> Projection:
    return config.projection(capability(x.device), x.dtype)


def capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(tile: Tile) -> dict[str, Any]:
    return {
        "PRECISION": PRECISIONS[torch.get_float32_matmul_precision()],
        "BLOCK": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_D": tile.width,
        "GROUP": config.GROUP,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def dense_rows(x: Tensor) -> Tensor:
    """x (N, D) with a row's elements next to each other."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
