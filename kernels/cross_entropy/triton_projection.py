"""Backend `triton` of a linear cross entropy: own kernels for the products too, which know how many rows there are.

Which rows have a target is known on the device alone. They are numbered there, every kernel reads their count, and what
is launched for more rows than there are leaves at once: forward and backward do the products of the rows that have a
target, with nothing read back. Rows of the input are read, and results and gradients written, where they are.

`recompute` keeps no logits in its forward pass, and those of a tile of the vocabulary in its backward pass.

Loads are 128 bits wide whatever the size of the vocabulary, where the width of a row is a multiple of 16: Triton
specialises on no other multiple. Elsewhere they are narrow, and right.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.cross_entropy import config, schedule, triton
from hotloop.kernels.cross_entropy.config import Projection, Tile
from hotloop.kernels.cross_entropy.contract import (
    Gradients,
    Needs,
    Options,
    Rows,
    Upstream,
    gradient_dtype,
    row_coefficients,
)
from hotloop.kernels.cross_entropy.schedule import Selection
from hotloop.kernels.gpu import arch_of

ROWS = triton.KERNELS
LOGITS = schedule.RowKernels(ROWS.rows_forward, ROWS.rows_forward_backward_, ROWS.columns_backward_)
MERGED_ROWS = 128
BIAS_ROWS, BIAS_COLUMNS = 32, 64
PRECISIONS = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
"""Of products of fp32 matrices, by `torch.get_float32_matmul_precision()`. Tensor cores cut sums off where units for
fp32 round them, so that three products of TF32 are no match for one of fp32."""


def one_pass(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,) fp32
    token_weight: Tensor | None,  # (N,) fp32
    scale: Tensor,  # () fp32
    options: Options,
    max_valid: int | None,
    stats: bool,
    needs: Needs,
) -> tuple[Tensor, Rows, Gradients]:
    """See `schedule.one_pass`, which serves where the host knows how many rows there are: with the platform's products.
    Without a gradient nothing is kept of the logits."""
    if not any(needs):
        rows = recompute_forward(
            input, linear_weight, target, linear_bias, weight, token_weight, options, max_valid, stats
        )
        none = input.new_empty(0, dtype=gradient_dtype(input.dtype))
        return rows.loss.sum() * scale, rows, Gradients(none, none, none)
    if max_valid is not None:
        return schedule.one_pass(
            LOGITS, input, linear_weight, target, linear_bias, weight, token_weight, scale, options, max_valid, stats,
            needs,
        )  # fmt: skip

    from hotloop.kernels.cross_entropy.triton_gradient_kernels import logits_kernel

    ROWS.refuse_others(input)
    selection, index, count = numbered(target, options.ignore_index, None)
    (n, d), v = input.shape, linear_weight.shape[0]
    h, w, bias, weight = dense_rows(input), dense_rows(linear_weight), dense(linear_bias), dense(weight)
    t = target.index_select(0, index)
    token_weight = None if token_weight is None else token_weight.index_select(0, index)
    saved = gradient_dtype(h.dtype)
    late_scale = saved != h.dtype  # fp16: rows of logits' gradients would underflow if scaled here
    dloss = (torch.ones_like(scale) if late_scale else scale).expand(n)

    made = tiles(h)
    tile = made.dlogits
    step = config.chunk_rows(n, v, h.dtype)
    starts = range(0, n, step)
    room = config.padded(min(step, n), tile.rows), config.padded(v, tile.columns)
    logits = torch.empty(room, dtype=h.dtype, device=h.device)
    # Of each chunk; in every second place, since Triton compiles once more for an address that 16 does not divide.
    first = torch.arange(0, max(n, 1), step, device=h.device).repeat_interleave(2)
    counts = (count - first).clamp(0, step)
    loss, nll, lse, entropy = (h.new_empty(k, dtype=torch.float32) for k in (n, n, n, n if stats else 0))
    predicted = target.new_empty(n if stats else 0)
    dinput = h.new_zeros((n, d) if needs.input else 0, dtype=saved)
    dweight = (torch.empty if n else torch.zeros)((v, d) if needs.linear_weight else 0, dtype=saved, device=h.device)
    sums = dweight
    if saved != torch.float32 and len(starts) > 1 and needs.linear_weight:
        sums = torch.empty((v, d), dtype=torch.float32, device=h.device)
    dbias = h.new_zeros(v if needs.linear_bias else 0, dtype=torch.float32)
    for i, start in enumerate(starts):
        chunk = slice(start, min(start + step, n))
        places, here = index[chunk], counts[2 * i]
        logits_kernel[(programs(chunk.stop - start, tile.rows, v, tile.columns),)](
            h, h.stride(0), w, w.stride(0), bias, places, here, logits, logits.stride(0), v, d,
            HAS_BIAS=bias is not None, IS_EVEN=d % tile.width == 0, **launch(tile),
        )  # fmt: skip
        part = logits[: chunk.stop - start, :v]
        wanted = (loss[chunk], nll[chunk], lse[chunk], *((entropy[chunk], predicted[chunk]) if stats else (None, None)))
        part_weight = None if token_weight is None else token_weight[chunk]
        triton.run_rows(part, t[chunk], weight, part_weight, options, wanted, part, dloss[chunk], here)
        if needs.input:
            run_dinput(made.dinput, logits, w, places, here, None, dinput, has_sum=False, is_last=True)
        if needs.linear_weight:
            run_dweight(
                made.dweight, logits, h, places, here, sums, dweight, has_sum=start > 0, is_last=chunk.stop == n
            )
        if needs.linear_bias:
            run_dbias(logits, here, dbias, has_sum=start > 0)

    gradients = Gradients(dinput, dweight, dbias.to(saved))
    if late_scale:
        gradients = Gradients(*(g.mul_(scale) for g in gradients))
    found = selection.put_rows(Rows(loss, nll, lse, entropy, predicted), stats)
    return found.loss.sum() * scale, found, gradients


def recompute_forward(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,)
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,
    token_weight: Tensor | None,
    options: Options,
    max_valid: int | None,
    stats: bool,
) -> Rows:
    from hotloop.kernels.cross_entropy.triton_projection_kernels import merge_kernel, results_kernel

    ROWS.refuse_others(input)
    n_all, n_stats = input.shape[0], input.shape[0] if stats else 0
    loss, nll, lse, entropy = (input.new_zeros(k, dtype=torch.float32) for k in (n_all, n_all, n_all, n_stats))
    rows = Rows(loss, nll, lse, entropy, target.new_full((n_stats,), -1))
    _, index, count = numbered(target, options.ignore_index, max_valid)
    n, (v, d) = index.shape[0], linear_weight.shape
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
    results_kernel[(programs(n, tile.rows, v, span),)](
        h, h.stride(0), w, w.stride(0), bias, index, count, target, weight, parts, firsts, n, v, d, span, splits,
        options.softcap or 1.0, options.logit_scale, HAS_BIAS=bias is not None, HAS_WEIGHT=weight is not None,
        HAS_SPREAD=has_spread, HAS_STATS=stats, HAS_SOFTCAP=options.softcap is not None, IS_EVEN=d % tile.width == 0,
        **launch(tile),
    )  # fmt: skip
    merge_kernel[(-(-n // MERGED_ROWS),)](
        parts, firsts, index, count, target, weight, token_weight, None if weight is None else weight.sum(), loss, nll,
        lse, entropy, rows.predicted, n, v, splits, options.label_smoothing, options.z_loss,
        HAS_WEIGHT=weight is not None, HAS_TOKEN_WEIGHT=token_weight is not None, HAS_SPREAD=has_spread,
        HAS_STATS=stats, HAS_Z_LOSS=options.z_loss != 0, BLOCK=MERGED_ROWS, num_warps=4,
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
    from hotloop.kernels.cross_entropy.triton_gradient_kernels import dlogits_kernel

    ROWS.refuse_others(input)
    _, index, count = numbered(target, options.ignore_index, max_valid)
    n, (v, d) = index.shape[0], linear_weight.shape
    factors = row_coefficients(upstream, target, weight, token_weight, lse, v, options).dense()
    h, w, bias, target = dense_rows(input), dense_rows(linear_weight), dense(linear_bias), target.contiguous()
    weight, lse, entropy = dense(weight), lse.contiguous(), entropy.contiguous()

    made = tiles(h)
    tile = made.dlogits
    tile = tile.half() if factors.c is not None and factors.dentropy is not None else tile  # registers would spill
    width = config.projected_columns(n, v, d, h.dtype, made.dlogits)
    starts = range(0, v, width) if n else range(0)
    room = config.padded(n, tile.rows), config.padded(min(width, v), made.dlogits.columns)
    dlogits = torch.empty(room, dtype=h.dtype, device=h.device)
    dinput = h.new_zeros(input.shape if needs.input else 0)
    dweight = (torch.empty if n else torch.zeros)((v, d) if needs.linear_weight else 0, dtype=h.dtype, device=h.device)
    dbias = h.new_zeros(v if needs.linear_bias else 0, dtype=torch.float32)
    sums = torch.empty((n, d) if needs.input and len(starts) > 1 else 0, dtype=torch.float32, device=h.device)
    for first in starts:
        part = slice(first, min(first + width, v))
        dlogits_kernel[(programs(n, tile.rows, part.stop - first, tile.columns),)](
            h, h.stride(0), w, w.stride(0), bias, index, count, target, *factors, weight, lse, entropy, dlogits,
            dlogits.stride(0), first, part.stop, v, d, options.softcap or 1.0, options.logit_scale,
            HAS_BIAS=bias is not None, HAS_C=factors.c is not None, HAS_DENTROPY=factors.dentropy is not None,
            HAS_WEIGHT=weight is not None, HAS_SOFTCAP=options.softcap is not None, IS_EVEN=d % tile.width == 0,
            **launch(tile),
        )  # fmt: skip
        if needs.input:
            is_last = part.stop == v
            run_dinput(made.dinput, dlogits, w[part], index, count, sums, dinput, has_sum=first > 0, is_last=is_last)
        if needs.linear_weight:
            run_dweight(made.dweight, dlogits, h, index, count, None, dweight[part], has_sum=False, is_last=True)
        if needs.linear_bias:
            run_dbias(dlogits, count, dbias[part], has_sum=False)
    return Gradients(dinput, dweight, dbias.to(h.dtype))


def run_dinput(
    tile: Tile,
    dlogits: Tensor,  # (n, width), rounded up to whole tiles
    w: Tensor,  # (width, D)
    index: Tensor,  # (n,)
    count: Tensor,  # ()
    sums: Tensor | None,  # (n, D) fp32; None: of nothing else
    dinput: Tensor,  # (N, D)
    *,
    has_sum: bool,
    is_last: bool,
) -> None:
    from hotloop.kernels.cross_entropy.triton_gradient_kernels import dinput_kernel

    n, (width, d) = index.shape[0], w.shape
    dinput_kernel[(programs(n, tile.rows, d, tile.width),)](
        dlogits, dlogits.stride(0), w, w.stride(0), index, count, sums, dinput, width, d, HAS_SUM=has_sum,
        IS_LAST=is_last, **launch(tile),
    )  # fmt: skip


def run_dweight(
    tile: Tile,
    dlogits: Tensor,  # (n, width), rounded up to whole tiles
    h: Tensor,  # (N, D)
    index: Tensor,  # (n,)
    count: Tensor,  # ()
    sums: Tensor | None,  # (width, D) fp32; None: of nothing else
    dweight: Tensor,  # (width, D)
    *,
    has_sum: bool,
    is_last: bool,
) -> None:
    from hotloop.kernels.cross_entropy.triton_gradient_kernels import dweight_kernel

    width, d = dweight.shape
    dweight_kernel[(programs(width, tile.columns, d, tile.width),)](
        dlogits, dlogits.stride(0), h, h.stride(0), index, count, sums, dweight, width, d, HAS_SUM=has_sum,
        IS_LAST=is_last, **launch(tile),
    )  # fmt: skip


def run_dbias(
    dlogits: Tensor,  # (n, width), rounded up to whole tiles
    count: Tensor,  # ()
    dbias: Tensor,  # (width,) fp32
    *,
    has_sum: bool,
) -> None:
    from hotloop.kernels.cross_entropy.triton_gradient_kernels import dbias_kernel

    width = dbias.shape[0]
    dbias_kernel[(-(-width // BIAS_COLUMNS),)](
        dlogits, dlogits.stride(0), count, dbias, width, HAS_SUM=has_sum, BLOCK=BIAS_ROWS, BLOCK_V=BIAS_COLUMNS,
        num_warps=4,
    )  # fmt: skip


def numbered(target: Tensor, ignore_index: int, max_valid: int | None) -> tuple[Selection, Tensor, Tensor]:
    """The rows that have a target: the selection of them; (n,) int64, the row of each, then anything; their count."""
    selection = Selection.bounded(target, ignore_index, target.shape[0] if max_valid is None else max_valid)
    assert selection.index is not None
    assert selection.filled is not None
    return selection, selection.index, selection.filled.sum()


def programs(rows: int, a: int, columns: int, b: int) -> int:
    """Tiles of a matrix."""
    return -(-rows // a) * -(-columns // b)


def tiles(x: Tensor) -> Projection:
    return config.projection(arch_of(x.device), x.dtype)


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
