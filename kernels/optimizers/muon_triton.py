"""Backend `triton` of Muon: matrices batched by shape, symmetric products once, element-wise work fused.

A batch of N matrices costs one launch for its momentum and one for its update for each orientation, and 3 a
Newton-Schulz step: X X^T and b A + c A^2 by `symmetric_product_kernel`, and a X + B X by the platform's batched GEMM.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from hotloop.kernels.optimizers import tables
from hotloop.kernels.optimizers.muon_polynomials import Triple, per_step
from hotloop.kernels.optimizers.muon_rule import decay_and_lr, is_sharded, lr_scale, on_whole_matrices
from hotloop.kernels.optimizers.reference import Kept
from hotloop.kernels.optimizers.triton import triton_dtype
from hotloop.kernels.optimizers.update import Update

# Elements of a batch at most, so that its five temporaries stay below 1.5 GB.
BATCH = 1 << 27


@dataclass(frozen=True)
class TileConfig:
    """Launch configuration of the element-wise kernels."""

    BLOCK_R: int
    BLOCK_C: int
    num_warps: int


# 8 elements a thread: one 128-bit access of bf16, and few enough for Philox, which spills to the stack at 32 a thread.
TILE = TileConfig(BLOCK_R=32, BLOCK_C=64, num_warps=8)


@dataclass(frozen=True)
class ProductConfig:
    """Launch configuration of `symmetric_product_kernel`."""

    BLOCK: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


def product_config(size: int) -> ProductConfig:
    """For matrices of `size` rows. Registers spill with a BLOCK_K of 64 on sm_120, with 4 warps on sm_100."""
    if size <= 64:
        return ProductConfig(BLOCK=64, BLOCK_K=32, num_warps=8, num_stages=3)
    return ProductConfig(BLOCK=128, BLOCK_K=32, num_warps=8, num_stages=3)


def supports(update: Update) -> str | None:
    if find_spec("triton") is None:
        return "needs triton, which is not installed: pip install 'hotloop[triton]'"
    device = update.params[0].device
    return None if device.type == "cuda" else f"serves cuda tensors, got {device.type}"


def muon(update: Update, factor: Tensor, skip: Tensor, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """One step of Muon in place. factor, skip: () fp32. dtype: of Newton-Schulz."""
    eps, triples = update.group["eps"], per_step(update.group["ns_coefficients"], update.group["ns_steps"])

    def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
        return newton_schulz_of(matrices, triples, eps)

    if is_sharded(update):
        rows = list(update.params)
        for indices in alike(update.params):
            x = torch.empty(len(indices), *rows[indices[0]].shape, dtype=dtype, device=update.device)
            move_momentum(update, indices, x, factor, skip)
            for i, direction in zip(indices, x, strict=True):
                rows[i] = direction
        done = on_whole_matrices(update, rows, orthogonalise)
        for indices in alike(update.params):
            write_params(update, indices, torch.stack([done[i] for i in indices]), skip)
    else:
        for m, n, members in batches(update.params):
            x = torch.empty(sum(map(len, members)), m, n, dtype=dtype, device=update.device)
            counts = [len(indices) for indices in members]
            for indices, part in zip(members, x.split(counts), strict=True):
                move_momentum(update, indices, part, factor, skip)
            for indices, part in zip(members, newton_schulz(x, triples, eps).split(counts), strict=True):
                write_params(update, indices, part, skip)
    torch.autograd.graph.increment_version(update.params)


def alike(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Indices of matrices of the same shape."""
    found: dict[torch.Size, list[int]] = defaultdict(list)
    for i, x in enumerate(matrices):
        found[x.shape].append(i)
    return list(found.values())


def batches(matrices: Sequence[Tensor]) -> Iterator[tuple[int, int, list[list[int]]]]:
    """(m, n, indices of matrices (m, n) and of matrices (n, m)), m <= n: of BATCH elements at most, or one matrix."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for i, x in enumerate(matrices):
        found[tuple(sorted(x.shape))].append(i)
    for (m, n), indices in found.items():
        most = max(1, BATCH // (m * n))
        for begin in range(0, len(indices), most):
            some = indices[begin : begin + most]
            yield m, n, [[some[i] for i in same] for same in alike([matrices[i] for i in some])]


# Newton-Schulz


def newton_schulz(x: Tensor, triples: Sequence[Triple], eps: float) -> Tensor:
    """`muon_reference.newton_schulz` for a batch, with fp32 accumulation. x: (N, m, n), m <= n, overwritten."""
    x.div_(torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).clamp_(min=eps).float())
    y = torch.empty_like(x)
    gram, quadratic = (x.new_empty(x.shape[0], x.shape[1], x.shape[1]) for _ in range(2))
    for a, b, c in triples:
        symmetric_product(gram, x)
        symmetric_product(quadratic, gram, alpha=c, beta=b)
        torch.baddbmm(x, quadratic, x, beta=a, out=y)
        x, y = y, x
    return x


def symmetric_product(out: Tensor, x: Tensor, alpha: float = 1.0, beta: float = 0.0) -> None:
    """out = alpha X X^T, plus beta X where that is given: X is then symmetric. x: (N, M, K), out: (N, M, M)."""
    from hotloop.kernels.optimizers.muon_kernels import symmetric_product_kernel

    count, rows, depth = x.shape
    config = product_config(rows)
    tiles = -(-rows // config.BLOCK)
    symmetric_product_kernel[tiles * (tiles + 1) // 2, count](
        x, x, out, rows, depth, alpha, beta, HAS_A=beta != 0, BLOCK=config.BLOCK, BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def newton_schulz_of(matrices: list[Tensor], triples: Sequence[Triple], eps: float) -> list[Tensor]:
    """For matrices (R, C) of any shapes."""
    done = list(matrices)
    for m, _, members in batches(matrices):
        indices = [i for same in members for i in same]
        wide = torch.stack([matrices[i] if len(matrices[i]) == m else matrices[i].mT for i in indices])
        for i, x in zip(indices, newton_schulz(wide, triples, eps), strict=True):
            done[i] = x if len(matrices[i]) == m else x.mT
    return done


# Element-wise work


def move_momentum(update: Update, indices: list[int], x: Tensor, factor: Tensor, skip: Tensor) -> None:
    """Moves the momenta of these matrices of one shape; writes their directions to x (N, R, C) or (N, C, R)."""
    from hotloop.kernels.optimizers.muon_kernels import momentum_kernel

    grads = [update.grads[i].contiguous() for i in indices]
    codes = [Kept(update, i, 0) for i in indices] if update.quantised else []
    buffers = [k.read() for k in codes] or [update.moments[0][i] for i in indices]
    group, (rows, columns) = update.group, grads[0].shape
    momentum_kernel[grid(grads)](
        kept(update, "grads", indices, tables.addresses(grads)),
        kept(update, "buffers", indices, tables.addresses(buffers)),
        kept(update, "starts", indices, [update.starts[i] for i in indices]), x, factor, skip, update.step, update.seed,
        rows, columns, group["momentum"], MAXIMIZE=group["maximize"], NESTEROV=group["nesterov"],
        STOCHASTIC=update.stochastic, TRANSPOSED=x.shape[1:] != grads[0].shape, GRAD_DTYPE=triton_dtype(grads[0]),
        BUFFER_DTYPE=triton_dtype(buffers[0]), **asdict(TILE),
    )  # fmt: skip
    for k, buffer in zip(codes, buffers, strict=False):  # no k where nothing is quantised
        k.write(buffer, skip)


def write_params(update: Update, indices: list[int], x: Tensor, skip: Tensor) -> None:
    """p = decay p - lr scale x for these matrices of one shape. x: (N, R, C) or (N, C, R)."""
    from hotloop.kernels.optimizers.muon_kernels import update_kernel

    params = [update.params[i] for i in indices]
    dense = [p.contiguous() for p in params]
    targets = dense if update.masters is None else [update.masters[i] for i in indices]
    decay, lr = decay_and_lr(update)
    rates = torch.stack([decay, lr * lr_scale(update, indices[0])]).float()
    rows, columns = dense[0].shape
    update_kernel[grid(dense)](
        kept(update, "targets", indices, tables.addresses(targets)),
        kept(update, "params", indices, tables.addresses(dense)),
        kept(update, "starts", indices, [update.starts[i] for i in indices]), x, rates, skip, update.step, update.seed,
        rows, columns, HAS_MASTER=update.masters is not None, STOCHASTIC=update.stochastic,
        TRANSPOSED=x.shape[1:] != dense[0].shape, TARGET_DTYPE=triton_dtype(targets[0]),
        PARAM_DTYPE=triton_dtype(dense[0]), **asdict(TILE),
    )  # fmt: skip
    for param, written in zip(params, dense, strict=True):
        if written is not param:
            param.copy_(written)


def grid(matrices: list[Tensor]) -> tuple[int, int, int]:
    rows, columns = matrices[0].shape
    return -(-rows // TILE.BLOCK_R), -(-columns // TILE.BLOCK_C), len(matrices)


def kept(update: Update, purpose: str, indices: list[int], numbers: list[int]) -> Tensor:
    """(N,) int64 on the device, one number for each of these matrices."""
    place = "muon", purpose, id(update.group), update.params[0].dtype, indices[0]
    return update.tables.get(place, numbers, update.device)
