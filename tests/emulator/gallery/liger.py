"""Liger's cross-entropy, forward and backward, as its wheel ships it: a kernel that nobody here wrote."""

from __future__ import annotations

import torch
from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

from gallery.case import Case, Tensors, poison


def tensors(shape: tuple[int, ...]) -> Tensors:
    rows, vocabulary = shape
    draw = torch.Generator().manual_seed(0)
    target = torch.randint(vocabulary, (rows,), generator=draw)
    target[1] = -100
    x = torch.randn(rows, vocabulary, generator=draw) * 3
    return {
        "x": x,
        "target": target,
        "loss": poison(dtype=torch.float32),
        "dx": poison(rows, vocabulary, dtype=x.dtype),
    }


def formula(t: Tensors) -> Tensors:
    x = t["x"].detach().clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(x, t["target"], label_smoothing=0.1)
    loss.backward()
    assert x.grad is not None
    return {"loss": loss.detach(), "dx": x.grad}


def launch_triton(t: Tensors) -> None:
    x = t["x"].clone().requires_grad_()
    # target, weight, ignore_index, lse_square_scale, label_smoothing, reduction; the logits are overwritten by Liger
    loss = LigerCrossEntropyFunction.apply(x * 1, t["target"], None, -100, 0.0, 0.1, "mean")[0]
    loss.backward()
    assert x.grad is not None
    t["loss"].copy_(loss.detach())
    t["dx"].copy_(x.grad)


CASE = Case(
    name="liger cross-entropy",
    shapes=[(3, 100), (4, 1031), (2, 4096)],
    tensors=tensors,
    formula=formula,
    launch_triton=launch_triton,
)
