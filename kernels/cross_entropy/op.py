"""`cross_entropy`: losses of logits that exist already. Schema, fake, gradient, public function.

The operator gives the loss of each row; the reduction is PyTorch's. It is declared once and served by the backends of
`CROSS_ENTROPY`; the forward pass saves lse (natural logarithm, fp32) whatever the backend.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.autograd import first_order
from hotloop.kernels.cross_entropy import cpu, cuda, platform, reference, triton
from hotloop.kernels.cross_entropy.checks import (
    as_constant,
    check_constant,
    check_normalizer,
    check_options,
    check_target_range,
    check_tensors,
    loss_scale,
)
from hotloop.kernels.cross_entropy.contract import Options, accumulation_dtype
from hotloop.kernels.dispatch import Backend, Table
from hotloop.kernels.workspace import empty

lib = torch.library.Library("hotloop", "FRAGMENT")
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale"
lib.define(
    f"cross_entropy_forward(Tensor input, Tensor target, Tensor? weight, Tensor? token_weight, {_OPTIONS}, "
    "bool inplace_backward, str backend) -> (Tensor loss, Tensor lse)"
)
_BACKWARD = f"Tensor target, Tensor? weight, Tensor? token_weight, Tensor lse, {_OPTIONS}, str backend"
lib.define(f"cross_entropy_backward(Tensor dloss, Tensor input, {_BACKWARD}) -> Tensor")
lib.define(f"cross_entropy_backward_(Tensor dloss, Tensor(a!) input, {_BACKWARD}) -> ()")


def _platform_forward(
    input: Tensor, target: Tensor, weight: Tensor | None, token_weight: Tensor | None, options: Options
) -> tuple[Tensor, Tensor]:
    rows = platform.rows_forward(input, target, weight, token_weight, options, False)
    return rows.loss, rows.lse


CROSS_ENTROPY = Table(
    "cross_entropy",
    Backend("cpu", cpu.supports, cpu.KERNELS.loss_and_lse, cpu.KERNELS.rows_backward),
    Backend("torch", lambda input, *_, **__: None, _platform_forward, platform.rows_backward),
    Backend("cuda", cuda.supports, cuda.KERNELS.loss_and_lse, cuda.KERNELS.rows_backward),
    Backend("triton", triton.supports, triton.KERNELS.loss_and_lse, triton.KERNELS.rows_backward),
    Backend(
        "reference", lambda input, *_, **__: None, reference.cross_entropy_forward, reference.cross_entropy_backward
    ),
)


def _forward(
    input: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) accumulation dtype
    token_weight: Tensor | None,  # (N,) accumulation dtype
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    if target.device.type == "cpu":
        check_target_range(target, input.shape[1], ignore_index)
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    with torch._C._DisableAutocast():
        return CROSS_ENTROPY[backend].forward(input, target, weight, token_weight, options)


def _backward_into(
    out: Tensor,
    dloss: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,
    *rest: Any,
) -> Tensor:
    *options, backend = rest
    backward = CROSS_ENTROPY[backend].backward
    assert backward is not None
    with torch._C._DisableAutocast():
        backward(dloss, input, target, weight, token_weight, lse, Options(*options), out)
    return out


def _backward(dloss: Tensor, input: Tensor, *rest: Any) -> Tensor:
    return _backward_into(empty(input.shape, input.dtype, input.device), dloss, input, *rest)


def _backward_(dloss: Tensor, input: Tensor, *rest: Any) -> None:
    _backward_into(input, dloss, input, *rest)
    torch.autograd.graph.increment_version(input)  # a backend that stores through a pointer doesn't


def _fake_forward(input: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = input.shape[:1], accumulation_dtype(input.dtype)
    return input.new_empty(shape, dtype=dtype), input.new_empty(shape, dtype=dtype)


for _device in ("CPU", "CUDA"):
    lib.impl("cross_entropy_forward", _forward, _device)
    lib.impl("cross_entropy_backward", _backward, _device)
    lib.impl("cross_entropy_backward_", _backward_, _device)
torch.library.register_fake("hotloop::cross_entropy_forward", _fake_forward, lib=lib)
torch.library.register_fake(
    "hotloop::cross_entropy_backward", lambda dloss, input, *_: input.new_empty(input.shape), lib=lib
)
torch.library.register_fake("hotloop::cross_entropy_backward_", lambda *_: None, lib=lib)
ops = torch.ops.hotloop


class CrossEntropy(torch.autograd.Function):
    """The gradient, registered on the operator itself, so that no path around the public function can lose it."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        input, target, weight, token_weight, *options, ctx.inplace, ctx.backend = args
        with torch._C._AutoDispatchBelowAutograd():
            loss, lse = ops.cross_entropy_forward(*args)
        ctx.save_for_backward(input, target, weight, token_weight, lse)
        ctx.options = options
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return loss, lse

    @staticmethod
    @first_order("cross_entropy")
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dloss is None or not ctx.needs_input_grad[0]:
            return (None,) * 11
        input, target, weight, token_weight, lse = ctx.saved_tensors
        rest = (target, weight, token_weight, lse, *ctx.options, ctx.backend)
        if ctx.inplace and type(dloss) is Tensor:  # while a compiler traces, memory is its own to reuse
            dinput = input.detach()
            ops.cross_entropy_backward_(dloss, dinput, *rest)
        else:
            dinput = ops.cross_entropy_backward(dloss, input, *rest)
        return (dinput, *(None,) * 10)


lib.impl("cross_entropy_forward", lambda *args: CrossEntropy.apply(*args), "Autograd")


def cross_entropy(
    input: Tensor,  # (*, V)
    target: Tensor,  # (*) int64
    *,
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (*)
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: Tensor | float | None = None,  # ()
    inplace_backward: bool = False,
) -> Tensor:  # () or (*), fp32 (fp64 for fp64 input)
    """Cross entropy of logits and class indices, in fp32 whatever the dtype of the logits.

    x = logit_scale * input.float()
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    row = F.cross_entropy(x, target, weight, reduction="none", label_smoothing=label_smoothing)
    row = torch.where(target == ignore_index, 0, token_weight * (row + z_loss * x.logsumexp(-1) ** 2))

    "none" gives `row`; "sum" its sum; "mean" the sum over the sum of the valid rows' class weights (their count without
    `weight`). Of the two scalar reductions `normalizer`, a number or a scalar on the device, is the denominator
    instead: the global count of supervised tokens under gradient accumulation and data parallelism. Where every row is
    ignored the loss and all gradients are 0 (`F.cross_entropy` gives NaN). The classes are the last dimension.

    `inplace_backward`: the backward pass may write the gradient into `input`'s memory; whatever else still needs those
    logits in a backward pass then raises. (A function that torch.compile compiles plans its memory by itself.)

    Gradient: `input`. Raises ValueError or TypeError for shapes, dtypes, devices and options that do not fit, and on a
    CPU IndexError for a target that is neither a class nor `ignore_index`. z_loss: PaLM, arXiv:2204.02311; softcap:
    Gemma 2, arXiv:2408.00118.
    """
    options = Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check_options(options, reduction, normalizer)
    check_tensors(input, target, input.shape[-1] if input.dim() else 0, weight, token_weight)
    check_constant(weight=weight, token_weight=token_weight, normalizer=normalizer)
    if isinstance(normalizer, Tensor):
        check_normalizer(normalizer, input)
    if inplace_backward and input.requires_grad and input.is_leaf:
        raise ValueError(
            "inplace_backward was given for logits that are a leaf (a parameter), whose values the backward pass would "
            "overwrite: pass inplace_backward=False"
        )
    dtype = accumulation_dtype(input.dtype)
    weight, token_weight = as_constant(weight, dtype), as_constant(token_weight, dtype)
    logits, rows = input.reshape(target.numel(), input.shape[-1]), target.reshape(-1)
    backend = CROSS_ENTROPY.choose(logits, rows).name
    loss, _ = ops.cross_entropy_forward(logits, rows, weight, token_weight, *options, inplace_backward, backend)
    if reduction == "none":
        return loss.view(target.shape)
    scale, _ = loss_scale(rows, weight, normalizer, reduction, ignore_index, None, dtype)
    return loss.sum() * scale
