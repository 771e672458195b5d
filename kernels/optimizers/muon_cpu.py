"""Backend `cpu` of Muon: a matrix is a task, threads take tasks, and the platform's GEMM does half of each symmetric
product.

A step is 98 % matrix products. Each thread runs the whole of a matrix with single-threaded GEMMs: threads meet once a
step, not in each of the 15 products of a matrix, and a tall matrix is worked on as it lies, so nothing is transposed.
Batching matrices of a shape into `torch.bmm` is slower here: one product of 768 x 3072 already takes 16 ms of a core.

Symmetric products (X X^T, and b A + c A^2 with A = X X^T) are made block row by block row, from the diagonal to the
right, and mirrored. Share of the full product's time on a Zen 5 core (AVX-512 bf16; with mirroring) in block rows of

                                  384     256     192     128      96      64
    share of the work, 768        0.75    0.67    0.63    0.58    0.56    0.54
    X X^T, 768 x 3072             0.79    0.70    0.66    0.63    0.63    0.63
    X X^T, 768 x 768              0.79    0.71    0.69    0.69    0.70    0.75
    b A + c A^2, 768 x 768        0.80    0.72    0.70    0.69    0.73    0.77
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import TypeVar

import torch
from torch import Tensor

from hotloop.kernels.optimizers.muon_polynomials import Triple, per_step
from hotloop.kernels.optimizers.muon_rule import decay_and_lr, is_sharded, lr_scale, on_whole_matrices
from hotloop.kernels.optimizers.philox import round_stochastic_
from hotloop.kernels.optimizers.reference import Kept
from hotloop.kernels.optimizers.update import Update

T = TypeVar("T")
BLOCK = 128
# Elements that the element-wise passes take at a time: their fp32 temporaries stay in a core's cache.
STRIP = 1 << 18
# A step of fewer FLOPs than this runs in the calling thread: handing out its matrices would take longer.
_WORTH_THREADS = 1e8


def supports(update: Update) -> str | None:
    device = update.params[0].device
    return None if device.type == "cpu" else f"serves cpu tensors, got {device.type}"


def muon(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of Muon in place. factor, skip: () fp32."""
    if skip:  # CPU tensors: reading them waits for nothing
        return
    eps, triples = update.group["eps"], per_step(update.group["ns_coefficients"], update.group["ns_steps"])
    multiplier = -factor.item() if update.group["maximize"] else factor.item()
    decay, lr = (x.item() for x in decay_and_lr(update))

    def move(i: int) -> Tensor:
        return move_momentum(update, i, multiplier)

    def write(i: int, o: Tensor) -> None:
        write_params(update, i, o, decay, lr * lr_scale(update, i))

    if is_sharded(update):

        def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
            return run(lambda i: newton_schulz(matrices[i], triples, eps), [flops(x, triples) for x in matrices])

        directions = [move(i) for i in range(len(update.params))]
        for i, o in enumerate(on_whole_matrices(update, directions, orthogonalise)):
            write(i, o)
    else:
        run(lambda i: write(i, newton_schulz(move(i), triples, eps)), [flops(p, triples) for p in update.params])
    torch.autograd.graph.increment_version(update.params)


def flops(x: Tensor, triples: Sequence[Triple]) -> int:
    """Of the full products of a matrix (R, C)."""
    m, n = sorted(x.shape)
    return len(triples) * 2 * m * m * (2 * n + m)


# Element-wise passes


def move_momentum(update: Update, i: int, multiplier: float) -> Tensor:
    """Moves the momentum of matrix i; returns the direction (R, C) bf16, of any scale, to be orthogonalised."""
    group = update.group
    kept = Kept(update, i, 0) if update.quantised else None
    buffer = update.moments[0][i] if kept is None else kept.read()
    direction = torch.empty(buffer.shape, dtype=torch.bfloat16)
    for begin, (grad, stored, out) in strips(update.grads[i], buffer, direction):
        g = grad.float() if multiplier == 1 else grad.float() * multiplier
        m = torch.lerp(stored.float(), g, 1 - group["momentum"])
        store(stored, m, update, update.starts[i] + begin, stream=1)
        out.copy_(torch.lerp(g, m, group["momentum"]) if group["nesterov"] else m)
    if kept is not None:
        kept.write(buffer, torch.zeros(()))
    return direction


def write_params(update: Update, i: int, o: Tensor, decay: float, lr: float) -> None:
    """p = decay * p - lr * o for matrix i."""
    param = update.params[i]
    target = param if update.masters is None else update.masters[i]
    for begin, (p, d, out) in strips(target, o, param):
        store(p, torch.add(p.float() * decay, d.float(), alpha=-lr), update, update.starts[i] + begin, stream=0)
        if update.masters is not None:
            out.copy_(p)


def strips(*matrices: Tensor) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """(logical index of the first element, the same few rows of each matrix)."""
    rows, columns = matrices[0].shape
    height = max(1, STRIP // max(columns, 1))
    for begin in range(0, rows, height):
        yield begin * columns, tuple(x.narrow(0, begin, min(height, rows - begin)) for x in matrices)


def store(stored: Tensor, new: Tensor, update: Update, start: int, stream: int) -> None:
    """Round `new` (fp32) to what is stored."""
    if stored.dtype == torch.bfloat16 and update.stochastic:
        rounded = torch.empty(new.numel(), dtype=torch.bfloat16)
        round_stochastic_(rounded, new.reshape(-1), start, seed=update.seed, step=update.step, stream=stream)
        new = rounded.view(new.shape)
    stored.copy_(new)


# Newton-Schulz


def newton_schulz(u: Tensor, triples: Sequence[Triple], eps: float) -> Tensor:
    """`muon_reference.newton_schulz` in bf16 with fp32 accumulation. u: (R, C) contiguous, overwritten."""
    u.div_(torch.linalg.vector_norm(u, dtype=torch.float64).clamp(min=eps))
    tall = u.shape[0] > u.shape[1]
    spare = torch.empty_like(u)
    x, y = (u.mT, spare.mT) if tall else (u, spare)
    m = x.shape[0]
    gram, quadratic = (torch.empty(m, m, dtype=u.dtype) for _ in range(2))
    for a, b, c in triples:
        gram_(gram, x)
        quadratic_(quadratic, gram, b, c)
        if tall:
            torch.addmm(x.mT, x.mT, quadratic, beta=a, out=y.mT)
        else:
            torch.addmm(x, quadratic, x, beta=a, out=y)
        x, y = y, x
    return x.mT if tall else x


def gram_(out: Tensor, x: Tensor) -> None:
    """X X^T."""
    for rows, right in block_rows(len(x)):
        torch.mm(x[rows], x[right].mT, out=out[rows, right])
        mirror_(out, rows)


def quadratic_(out: Tensor, a: Tensor, b: float, c: float) -> None:
    """b A + c A^2 for a symmetric A."""
    for rows, right in block_rows(len(a)):
        torch.addmm(a[rows, right], a[rows], a[:, right], beta=b, alpha=c, out=out[rows, right])
        mirror_(out, rows)


def block_rows(size: int) -> Iterator[tuple[slice, slice]]:
    """(rows of a block row, columns from its diagonal block to the right)."""
    for begin in range(0, size, BLOCK):
        yield slice(begin, min(begin + BLOCK, size)), slice(begin, size)


def mirror_(out: Tensor, rows: slice) -> None:
    """Copy what lies right of a block row's diagonal block to below it."""
    out[rows.stop :, rows].copy_(out[rows, rows.stop :].mT)


# Threads


def run(task: Callable[[int], T], works: Sequence[float]) -> list[T]:
    """[task(i) for every i], begun with the longest, on as many threads as PyTorch has."""
    order = sorted(range(len(works)), key=lambda i: -works[i])
    threads = torch.get_num_threads()
    count = min(threads, len(works))
    if count < 2 or sum(works) < _WORTH_THREADS:
        return [task(i) for i in range(len(works))]
    # no_grad is a thread's own.
    done = _workers(os.getpid(), count, threads // count).map(torch.no_grad()(task), order)
    return [result for _, result in sorted(zip(order, done, strict=True), key=lambda pair: pair[0])]


@cache
def _workers(process: int, count: int, threads: int) -> ThreadPoolExecutor:
    """`count` threads that each run PyTorch's operations on `threads` threads; of this process, as a fork has none."""
    mine = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "muon", torch.set_num_threads, (threads,))
    started = Barrier(count)
    list(pool.map(lambda _: started.wait(), range(count)))
    # The workers have also set what threads made from now on start with: back to what it was.
    torch.set_num_threads(mine)
    return pool
