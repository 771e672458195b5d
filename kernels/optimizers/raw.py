"""What backends share that update tensors by their address: the numbers of each rule, layouts, versions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hotloop.kernels.optimizers import reference
from hotloop.kernels.optimizers.update import Update


class Run(Protocol):
    def __call__(
        self,
        rule: str,  # "adamw", "lion", "sgd"
        update: Update,
        params: list[Tensor],  # contiguous, as the gradients are
        grads: list[Tensor],
        factor: Tensor,  # () fp32
        skip: Tensor,  # () fp32
        scalars: Sequence[Tensor],  # () fp32 each, by rule: see reference.py
        constants: Sequence[float],
        /,
    ) -> None: ...


class RawRules:
    """The rules of a backend that updates all tensors of an `Update` in one run."""

    def __init__(self, run: Run):
        self._run = run

    def adamw(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        self._update("adamw", update, factor, skip, reference.adamw_scalars(update), _betas(update))

    def lion(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        self._update("lion", update, factor, skip, reference.lion_scalars(update), _betas(update))

    def sgd(self, update: Update, factor: Tensor, skip: Tensor) -> None:
        constants = (update.group["momentum"], update.group["weight_decay"])
        self._update("sgd", update, factor, skip, reference.sgd_scalars(update), constants)

    def _update(
        self,
        rule: str,
        update: Update,
        factor: Tensor,
        skip: Tensor,
        scalars: Sequence[Tensor],
        constants: Sequence[float],
    ) -> None:
        # Copies where a tensor is not contiguous.
        params, grads = ([x.contiguous() for x in xs] for xs in (update.params, update.grads))
        self._run(rule, update, params, grads, factor, skip, scalars, constants)
        for param, written in zip(update.params, params, strict=True):
            if written is not param:
                param.copy_(written)
        # Stores through pointers do not tell autograd that they write.
        torch.autograd.graph.increment_version(update.tensors)


def _betas(update: Update) -> tuple[float, ...]:
    beta1, beta2 = update.group["betas"]
    return beta1, 1 - beta1, beta2, 1 - beta2
