"""What the autograd functions of all ops share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(op: str) -> Callable[[Backward], Backward]:
    """For the backward pass of an op that has first derivatives only: differentiating its results again raises.

    `torch.autograd.function.once_differentiable` does that only where an upstream gradient requires a gradient itself;
    with the constant 1 of `loss.backward(create_graph=True)` a gradient penalty would silently count as a constant.
    """
    message = f"hotloop: {op} has first derivatives only, and its gradient was differentiated again".encode()

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            if not torch.is_grad_enabled():  # no create_graph
                return gradients
            refuse = torch._C._functions.DelayedError(message, len(gradients))
            return refuse(*(None if g is None else g.detach().requires_grad_() for g in gradients))  # type: ignore[arg-type]

        return wrapper

    return decorate
