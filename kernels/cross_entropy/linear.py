"""`linear_cross_entropy`: projection and loss in one, without the logits of all rows. Schema, fake, gradient.

Two operators: `one_pass` gives a scalar loss together with its gradients, which the backward pass only has to scale;
`rows` gives the loss of each row and differentiable statistics, and computes logits again in its backward pass.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hotloop.kernels.autograd import first_order
from hotloop.kernels.cross_entropy import cpu, cuda, platform, reference, schedule, triton, triton_projection
from hotloop.kernels.cross_entropy.checks import (
    SCHEDULES,
    as_constant,
    check_constant,
    check_normalizer,
    check_options,
    check_target_range,
    check_tensors,
    loss_scale,
    under_autocast,
)
from hotloop.kernels.cross_entropy.contract import Needs, Options, Rows, Upstream, accumulation_dtype, gradient_dtype
from hotloop.kernels.dispatch import Backend, Table

lib = torch.library.Library("hotloop", "FRAGMENT")
_ROWS = "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? token_weight"
_OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float? softcap, float logit_scale, int? max_valid"
_NEEDS = "bool need_dinput, bool need_dlinear_weight, bool need_dlinear_bias"
_RESULTS = "Tensor loss, Tensor nll, Tensor lse, Tensor entropy, Tensor predicted"
_GRADIENTS = "Tensor dinput, Tensor dlinear_weight, Tensor dlinear_bias"
lib.define(
    f"linear_cross_entropy_one_pass({_ROWS}, Tensor scale, {_OPTIONS}, bool stats, {_NEEDS}, str backend) "
    f"-> ({_RESULTS}, {_GRADIENTS})"
)
lib.define(f"linear_cross_entropy_rows({_ROWS}, {_OPTIONS}, bool stats, str backend) -> ({_RESULTS})")
lib.define(
    "linear_cross_entropy_rows_backward(Tensor? dloss, Tensor? dnll, Tensor? dlse, Tensor? dentropy, "
    f"{_ROWS}, Tensor lse, Tensor entropy, {_OPTIONS}, {_NEEDS}, str backend) -> ({_GRADIENTS})"
)


def _kernels(of: Any) -> schedule.RowKernels:
    return schedule.RowKernels(of.rows_forward, of.rows_forward_backward_, of.columns_backward_)


_CPU, _TORCH, _CUDA = map(_kernels, (cpu.KERNELS, platform, cuda.KERNELS))
ONE_PASS = Table(
    "linear_cross_entropy.one_pass",
    Backend("cpu", cpu.supports, partial(schedule.one_pass, _CPU)),
    Backend("torch", lambda input, *_, **__: None, partial(schedule.one_pass, _TORCH)),
    Backend("cuda", cuda.supports, partial(schedule.one_pass, _CUDA)),
    Backend("triton", triton.supports, triton_projection.one_pass),
    Backend("reference", lambda input, *_, **__: None, reference.linear_one_pass),
)
RECOMPUTE = Table(
    "linear_cross_entropy.recompute",
    Backend("cpu", cpu.supports, partial(schedule.recompute_forward, _CPU), partial(schedule.recompute_backward, _CPU)),
    Backend(
        "torch",
        lambda input, *_, **__: None,
        partial(schedule.recompute_forward, _TORCH),
        partial(schedule.recompute_backward, _TORCH),
    ),
    Backend(
        "cuda",
        cuda.supports,
        partial(schedule.recompute_forward, _CUDA),
        partial(schedule.recompute_backward, _CUDA),
    ),
    Backend(
        "triton",
        triton.supports,
        triton_projection.recompute_forward,
        triton_projection.recompute_backward,
    ),
    Backend("reference", lambda input, *_, **__: None, reference.linear_forward, reference.linear_backward),
)


def _one_pass(
    input: Tensor,  # (N, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    linear_bias: Tensor | None,  # (V,)
    weight: Tensor | None,  # (V,) accumulation dtype
    token_weight: Tensor | None,  # (N,) accumulation dtype
    scale: Tensor,  # () accumulation dtype
    *rest: Any,
) -> tuple[Tensor, ...]:
    """The loss is `scale` times the sum of the rows'; results and gradients that aren't asked for have no elements."""
    *numbers, max_valid, stats, need_dinput, need_dweight, need_dbias, backend = rest
    options = Options(*numbers)
    if target.device.type == "cpu":
        check_target_range(target, linear_weight.shape[0], options.ignore_index)
    with torch._C._DisableAutocast():
        loss, rows, gradients = ONE_PASS[backend].forward(
            input, linear_weight, target, linear_bias, weight, token_weight, scale, options, max_valid, stats,
            Needs(need_dinput, need_dweight, need_dbias),
        )  # fmt: skip
    return (loss, *rows[1:], *gradients)


def _rows(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, max_valid, stats, backend = rest
    options = Options(*numbers)
    if target.device.type == "cpu":
        check_target_range(target, linear_weight.shape[0], options.ignore_index)
    with torch._C._DisableAutocast():
        return tuple(
            RECOMPUTE[backend].forward(
                input, linear_weight, target, linear_bias, weight, token_weight, options, max_valid, stats
            )
        )


def _rows_backward(
    dloss: Tensor | None,  # (N,)
    dnll: Tensor | None,  # (N,)
    dlse: Tensor | None,  # (N,)
    dentropy: Tensor | None,  # (N,)
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    lse: Tensor,  # (N,)
    entropy: Tensor,  # (N,), or (0,) if it wasn't asked for
    *rest: Any,
) -> tuple[Tensor, ...]:
    *numbers, max_valid, need_dinput, need_dweight, need_dbias, backend = rest
    upstream = Upstream(dloss, dnll, dlse, dentropy)
    backward = RECOMPUTE[backend].backward
    assert backward is not None
    with torch._C._DisableAutocast():
        return tuple(
            backward(
                upstream, input, linear_weight, target, linear_bias, weight, token_weight, lse, entropy,
                Options(*numbers), max_valid, Needs(need_dinput, need_dweight, need_dbias),
            )
        )  # fmt: skip


def _fake_rows(input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    stats = rest[-2]
    n, dtype = input.shape[0], accumulation_dtype(input.dtype)
    loss, nll, lse, entropy = (input.new_empty(k, dtype=dtype) for k in (n, n, n, n if stats else 0))
    return loss, nll, lse, entropy, input.new_empty(n if stats else 0, dtype=torch.int64)


def _fake_gradients(
    input: Tensor, linear_weight: Tensor, needs: tuple[bool, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    shapes = (tuple(input.shape), tuple(linear_weight.shape), (linear_weight.shape[0],))
    return tuple(
        input.new_empty(shape if need else (0,), dtype=dtype) for shape, need in zip(shapes, needs, strict=True)
    )


def _fake_one_pass(input: Tensor, linear_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *_, stats, need_dinput, need_dweight, need_dbias, _ = rest
    _, *rows = _fake_rows(input, stats, None)
    needs = (need_dinput, need_dweight, need_dbias)
    loss = input.new_empty((), dtype=accumulation_dtype(input.dtype))
    return (loss, *rows, *_fake_gradients(input, linear_weight, needs, gradient_dtype(input.dtype)))


def _fake_rows_backward(*args: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(args[4], args[5], args[-4:-1], args[4].dtype)


for _device in ("CPU", "CUDA"):
    lib.impl("linear_cross_entropy_one_pass", _one_pass, _device)
    lib.impl("linear_cross_entropy_rows", _rows, _device)
    lib.impl("linear_cross_entropy_rows_backward", _rows_backward, _device)
torch.library.register_fake("hotloop::linear_cross_entropy_one_pass", _fake_one_pass, lib=lib)
torch.library.register_fake("hotloop::linear_cross_entropy_rows", _fake_rows, lib=lib)
torch.library.register_fake("hotloop::linear_cross_entropy_rows_backward", _fake_rows_backward, lib=lib)
ops = torch.ops.hotloop

_DIFFERENTIABLE = {"input": 0, "linear_weight": 1, "linear_bias": 3}
"""Position of each tensor with a gradient among the operators' arguments."""


class OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, *others = ops.linear_cross_entropy_one_pass(*args)
        ctx.save_for_backward(*others[-3:])
        ctx.computed, ctx.dtype, ctx.n_args = args[-4:-1], args[0].dtype, len(args)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.n_args
        if dloss is None:
            return tuple(result)
        for (name, at), gradient, computed in zip(
            _DIFFERENTIABLE.items(), ctx.saved_tensors, ctx.computed, strict=True
        ):
            if not ctx.needs_input_grad[at]:
                continue
            if not computed:
                raise RuntimeError(
                    f"hotloop::linear_cross_entropy_one_pass was called without asking for the gradient of {name}, "
                    "which requires one: call linear_cross_entropy instead of the operator"
                )
            result[at] = _scaled(gradient, dloss, ctx.dtype)
        return tuple(result)


def _scaled(gradient: Tensor, dloss: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * dloss, in the gradient's memory unless it is needed again (retain_graph) or a compiler traces."""
    if type(dloss) is not Tensor or torch._C._autograd._get_current_graph_task_keep_graph():
        return (gradient * dloss).to(dtype)
    if dloss.device.type == "cpu" and dloss.item() == 1:
        return gradient.detach().to(dtype)
    return gradient.detach().mul_(dloss).to(dtype)


class RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            loss, nll, lse, entropy, predicted = ops.linear_cross_entropy_rows(*args)
        ctx.save_for_backward(*args[:6], lse, entropy)
        *ctx.numbers, stats, ctx.backend = args[6:]
        ctx.n_args = len(args)
        ctx.mark_non_differentiable(*([predicted] if stats else [entropy, predicted]))
        ctx.set_materialize_grads(False)
        return loss, nll, lse, entropy, predicted

    @staticmethod
    @first_order("linear_cross_entropy")
    def backward(
        ctx: Any, dloss: Tensor | None, dnll: Tensor | None, dlse: Tensor | None, dentropy: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.n_args
        if not (dloss is None and dnll is None and dlse is None and dentropy is None):
            needs = [ctx.needs_input_grad[at] for at in _DIFFERENTIABLE.values()]
            gradients = ops.linear_cross_entropy_rows_backward(
                dloss, dnll, dlse, dentropy, *ctx.saved_tensors, *ctx.numbers, *needs, ctx.backend
            )
            for at, gradient, need in zip(_DIFFERENTIABLE.values(), gradients, needs, strict=True):
                result[at] = gradient if need else None
        return tuple(result)


lib.impl("linear_cross_entropy_one_pass", lambda *args: OnePass.apply(*args), "Autograd")
lib.impl("linear_cross_entropy_rows", lambda *args: RowLosses.apply(*args), "Autograd")


class LinearCrossEntropyOutput(NamedTuple):
    """Results of `linear_cross_entropy_stats`. Rows whose target is ignored have 0 (`predicted`: -1, `correct`: False).

    With `shift`, position t describes the prediction of target[t + 1], and the last position is ignored.
    """

    loss: Tensor  # () or (*) as `linear_cross_entropy` gives it
    nll: Tensor  # (*) lse - x[target]: without weights and smoothing
    lse: Tensor  # (*) natural logarithm of the sum of the exponentials of the logits
    z_loss: Tensor  # (*) z_loss * lse ** 2
    entropy: Tensor  # (*) of the predicted distribution, in nats
    correct: Tensor  # (*) bool: predicted == target
    predicted: Tensor  # (*) int64: the class of the largest logit
    n_valid: Tensor  # () int64: rows that are not ignored


def linear_cross_entropy(
    input: Tensor,  # (*, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (*) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (*)
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    normalizer: Tensor | float | None = None,  # ()
    max_valid: int | None = None,
    schedule: str = "auto",
) -> Tensor:  # () or (*), fp32 (fp64 for fp64 input)
    """`cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` without ever holding all logits.

    The products run in the dtype of `input`, `linear_weight` and `linear_bias`; everything between them in fp32. All
    options are `cross_entropy`'s, and:

    shift: position t predicts target[..., t + 1] and weighs it with token_weight[..., t + 1]; the last position of each
    sequence is ignored, and "none" gives it 0. Where target carries `ignore_index` at the first token of a document, no
    position predicts across its start.

    max_valid: a bound on the number of targets that aren't `ignore_index`, known to the host. On a GPU only so many
    rows (rounded up to 1,024) are projected, without reading anything back. More valid targets give a NaN loss. On a
    CPU ignored rows are never projected and the bound is only checked. Without it a GPU projects all rows, but for the
    backend "triton", whose own products do the work of the rows that have a target and of no others.

    schedule: "one_pass" computes loss and gradients together, and only for a scalar loss; its backward pass scales the
    gradients in place, so going through it twice is an error unless retain_graph=True was given the first time.
    "recompute" computes logits again in the backward pass, and on the backend "triton" keeps none in the forward pass.
    "auto": "one_pass" for "mean" and "sum".

    A vocabulary that is padded for speed is passed as linear_weight[:vocab]. Gradients that nobody requires are not
    computed; under torch.no_grad() none is. Gradients: `input`, `linear_weight`, `linear_bias`. Raises as
    `cross_entropy` does.
    """
    loss, *_ = _linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, token_weight, reduction, shift, normalizer, max_valid,
        schedule, Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale), stats=False,
    )  # fmt: skip
    return loss


def linear_cross_entropy_stats(
    input: Tensor,  # (*, D)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (*) int64
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    token_weight: Tensor | None = None,  # (*)
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shift: bool = False,
    normalizer: Tensor | float | None = None,  # ()
    max_valid: int | None = None,
    schedule: str = "auto",
) -> LinearCrossEntropyOutput:
    """`linear_cross_entropy` together with what else the logits say about each row.

    With the schedule "recompute", which "auto" means here wherever a gradient may be asked for, loss, nll, lse, z_loss
    and entropy are differentiable. With "one_pass", which costs less, only the loss is; the statistics are detached.
    """
    loss, rows, target, n_valid = _linear_cross_entropy(
        input, linear_weight, target, linear_bias, weight, token_weight, reduction, shift, normalizer, max_valid,
        schedule, Options(ignore_index, label_smoothing, z_loss, softcap, logit_scale), stats=True,
    )  # fmt: skip
    nll, lse, entropy, predicted = (x.view(target.shape) for x in (rows.nll, rows.lse, rows.entropy, rows.predicted))
    correct = (predicted == target) & (target != ignore_index)
    return LinearCrossEntropyOutput(loss, nll, lse, z_loss * lse.square(), entropy, correct, predicted, n_valid)


def _linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    weight: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
    shift: bool,
    normalizer: Tensor | float | None,
    max_valid: int | None,
    schedule: str,
    options: Options,
    *,
    stats: bool,
) -> tuple[Tensor, Rows, Tensor, Tensor]:
    """The loss, the rows' results (flat), the targets that rows were compared with, and the number of valid rows."""
    check_options(options, reduction, normalizer)
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
    if schedule == "one_pass" and reduction == "none":
        raise ValueError(
            "schedule 'one_pass' was given with reduction 'none', whose upstream gradients it can't know: "
            "use 'recompute'"
        )
    if max_valid is not None and max_valid < 0:
        raise ValueError(f"max_valid {max_valid}: expected a number of rows, or None")
    input, linear_weight, linear_bias = under_autocast(input, linear_weight, linear_bias)  # type: ignore[assignment]
    if linear_weight.dim() != 2 or input.dim() == 0 or linear_weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(linear_weight.shape)} and input {tuple(input.shape)}: expected (V, D) and "
            "(..., D)"
        )
    v, d = linear_weight.shape
    check_tensors(input, target, v, weight, token_weight, linear_weight=linear_weight, linear_bias=linear_bias)
    if linear_bias is not None and linear_bias.shape != (v,):
        raise ValueError(f"linear_bias has shape {tuple(linear_bias.shape)}: expected ({v},)")
    check_constant(weight=weight, token_weight=token_weight, normalizer=normalizer)
    if isinstance(normalizer, Tensor):
        check_normalizer(normalizer, input)
    if shift:
        if target.dim() == 0:
            raise ValueError("shift was given for a single target: expected a sequence, target of shape (..., T)")
        end = target.new_full((*target.shape[:-1], min(1, target.shape[-1])), options.ignore_index)
        target = torch.cat((target[..., 1:], end), dim=-1)
        token_weight = None if token_weight is None else token_weight.roll(-1, -1)

    dtype = accumulation_dtype(input.dtype)
    weight, token_weight = as_constant(weight, dtype), as_constant(token_weight, dtype)
    h, t = input.reshape(target.numel(), d), target.reshape(-1)
    scale, n_valid = loss_scale(t, weight, normalizer, reduction, options.ignore_index, max_valid, dtype)
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (h, linear_weight, linear_bias)]
    if schedule == "auto":
        schedule = "recompute" if reduction == "none" or (stats and any(needs)) else "one_pass"
    table = ONE_PASS if schedule == "one_pass" else RECOMPUTE
    backend = table.choose(h, linear_weight, t).name
    tensors = (h, linear_weight, t, linear_bias, weight, token_weight)
    if schedule == "one_pass":
        loss, nll, lse, entropy, predicted, *_ = ops.linear_cross_entropy_one_pass(
            *tensors, scale, *options, max_valid, stats, *needs, backend
        )
    else:
        loss, nll, lse, entropy, predicted = ops.linear_cross_entropy_rows(
            *tensors, *options, max_valid, stats, backend
        )
        loss = (loss * scale).view(target.shape) if reduction == "none" else loss.sum() * scale
    return loss, Rows(loss, nll, lse, entropy, predicted), target, n_valid
