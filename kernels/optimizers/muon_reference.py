"""Muon in plain PyTorch, in fp64, one matrix at a time: the definition of right, on any device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hotloop.kernels.optimizers.muon_polynomials import Triple, per_step
from hotloop.kernels.optimizers.muon_rule import decay_and_lr, is_sharded, lr_scale, on_whole_matrices
from hotloop.kernels.optimizers.reference import Kept, store
from hotloop.kernels.optimizers.update import Update


def supports(update: Update) -> str | None:
    return None


def muon(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of Muon in place; the formula is in `Muon`'s docstring. factor, skip: () fp32."""
    group = update.group
    triples = per_step(group["ns_coefficients"], group["ns_steps"])

    def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
        return [newton_schulz(x, triples, group["eps"]) for x in matrices]

    directions = [move_momentum(update, i, factor, skip) for i in range(len(update.params))]
    done = on_whole_matrices(update, directions, orthogonalise) if is_sharded(update) else orthogonalise(directions)
    decay, lr = decay_and_lr(update)
    for i, (param, o) in enumerate(zip(update.params, done, strict=True)):
        master = param if update.masters is None else update.masters[i]
        p = master.double() * decay - lr * lr_scale(update, i) * o
        store(master, p.float(), skip, update, update.starts[i], stream=0)
        if update.masters is not None:
            param.copy_(torch.where(skip != 0, param, master.to(param.dtype)))


def move_momentum(update: Update, i: int, factor: Tensor, skip: Tensor) -> Tensor:
    """Moves the momentum of matrix i; returns the direction (R, C) fp64 that is to be orthogonalised."""
    group, kept = update.group, Kept(update, i, 0)
    g = update.grads[i].double() * factor
    if group["maximize"]:
        g = -g
    m = kept.read().double()
    m = m + (1 - group["momentum"]) * (g - m)
    kept.write(m.float(), skip)
    return g + group["momentum"] * (m - g) if group["nesterov"] else m


def newton_schulz(x: Tensor, triples: Iterable[Triple], eps: float) -> Tensor:
    """a X + b X X^T X + c (X X^T)^2 X for each triple, from X = x / max(|x|_F, eps), in x's dtype. x: (R, C).

    With x = U diag(s) V^T this is U diag(p(s / |s|)) V^T, p the composition of the odd quintics.
    """
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x).clamp(min=eps)
    for a, b, c in triples:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
