"""Backend `torch`: PyTorch's own fused and foreach operations, on CPU and CUDA, for AdamW and SGD.

`torch._fused_adamw_` and `torch._fused_sgd_` take tensors of one dtype only. Where all are fp32 they run on them
directly. Where parameters, gradients or moments are bf16, they are widened bucket by bucket into fp32 temporaries,
updated, and rounded back: on the CPU a bucket stays in the cache between the three passes.

Not bit-equal to the reference: the kernels divide by 1 / factor where the reference multiplies by factor, AdamW's moves
the first moment by interpolation, and multiply-adds are contracted. Trajectories agree to rounding (tests state the
bound). The norm depends on the number of threads in its last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from hotloop.kernels.optimizers import reference
from hotloop.kernels.optimizers.philox import round_stochastic_
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

_DEVICES = ("cpu", "cuda")


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return _supports_device(grads[0].device)


def supports(update: Update) -> str | None:
    if update.quantised:
        return "PyTorch's kernels have no 8-bit moments"
    return _supports_device(update.device)


def _supports_device(device: torch.device) -> str | None:
    if device.type in _DEVICES:
        return None
    return f"serves {' and '.join(_DEVICES)} tensors, got {device.type}"


def sum_of_squares(grads: list[Tensor], kept: DeviceTables | None = None) -> Tensor:
    """Sum of squares of all elements, () fp64: fp32 sums over chunks, added in fp64 in a fixed order.

    grads: any shapes, fp32 or bf16, one device. Relative error below 1e-5. On CUDA a tensor whose sum of squares passes
    fp32's range counts as not finite; on the CPU it is summed again in fp64.
    """
    if grads[0].device.type != "cpu":
        # The CUDA kernel cuts tensors into chunks of 65,536 itself.
        norms = list(torch._foreach_norm(grads, 2, dtype=torch.float32))
        return reference.fixed_order_sum(torch.stack(norms).double().square_())
    # BLAS's dot product reads at the speed of memory: 30 M elements in 3.5 ms on two Zen 5 cores, 4.7 in chunks of 64K;
    # `_foreach_norm` of whole tensors takes 4.1 and errs 60 times as much.
    chunks = (chunk.float() for grad in grads for chunk in grad.reshape(-1).split(4 * reference.CHUNK))
    total = reference.fixed_order_sum(torch.stack([torch.dot(x, x) for x in chunks]).double())
    if not total.isfinite():  # a CPU tensor: reading it waits for nothing
        return reference.sum_of_squares(grads)
    return total


def adamw(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of AdamW in place. factor, skip: () fp32. Leaves fp32 gradients multiplied by the factor."""
    group = update.group
    beta1, beta2 = group["betas"]
    options: dict[str, Any] = {
        "lr": _lr(update), "beta1": beta1, "beta2": beta2, "weight_decay": group["weight_decay"], "eps": group["eps"],
        "amsgrad": False, "maximize": group["maximize"],
    }  # fmt: skip

    def kernel(columns: list[list[Tensor]], **scaling: Any) -> None:
        params, grads, exp_avgs, exp_avg_sqs = columns
        steps = [update.step] * len(params)
        torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], steps, **options, **scaling)

    _run(kernel, update, factor, skip)


def sgd(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of SGD in place. factor, skip: () fp32. Leaves fp32 gradients multiplied by the factor."""
    group = update.group
    options: dict[str, Any] = {
        "lr": _lr(update), "weight_decay": group["weight_decay"], "momentum": group["momentum"], "dampening": 0.0,
        "nesterov": group["nesterov"], "maximize": group["maximize"], "is_first_step": False,
    }  # fmt: skip

    def kernel(columns: list[list[Tensor]], **scaling: Any) -> None:
        params, grads, *buffers = columns
        torch._fused_sgd_(params, grads, buffers[0] if buffers else [], **options, **scaling)

    _run(kernel, update, factor, skip)


def _lr(update: Update) -> Any:
    lr = update.group["lr"]
    if isinstance(lr, Tensor):
        # The CUDA kernels read an fp32 scalar; the CPU ones take any, read on the host.
        return lr.item() if update.device.type == "cpu" else lr.to(update.device, torch.float32, non_blocking=True)
    return lr


Kernel = Callable[..., None]
"""(columns in fp32: parameters, gradients, moments..., *, grad_scale, found_inf) in place"""


def _run(kernel: Kernel, update: Update, factor: Tensor, skip: Tensor) -> None:
    on_cpu = factor.device.type == "cpu"
    if on_cpu and skip:  # CPU tensors: reading them waits for nothing
        return
    # The kernels divide gradients by `grad_scale` and write them back, which costs a pass where nothing is clipped.
    grad_scale = None if on_cpu and factor == 1 else factor.reciprocal()
    found_inf = None if on_cpu else skip

    def step(columns: list[list[Tensor]]) -> None:
        kernel(columns, grad_scale=grad_scale, found_inf=found_inf)

    params = [_flat(p) for p in update.params]
    columns = [params if update.masters is None else [_flat(x) for x in update.masters]]
    columns += [[_flat(x) for x in xs] for xs in (update.grads, *update.moments)]
    if all(x[0].dtype == torch.float32 for x in columns) and update.masters is None:
        step(columns)
    else:
        _staged(update, step, params, columns)
    for param, flat in zip(update.params, params, strict=True):
        if not param.is_contiguous():
            param.copy_(flat.view(param.shape))
    # The fused kernels do not tell autograd that they write (torch 2.13): a backward pass through an old value would
    # silently take the new one.
    torch.autograd.graph.increment_version(update.tensors)


def _flat(x: Tensor) -> Tensor:
    # A copy where x is not contiguous: the kernels walk memory and, on the CPU, do not look at strides.
    return x.contiguous().view(-1)


def _staged(
    update: Update, step: Callable[[list[list[Tensor]]], None], params: list[Tensor], columns: list[list[Tensor]]
) -> None:
    # Measured on two Zen 5 cores, 30 M bf16 parameters with masters: 2^16 36 ms, 2^18 30, 2^19 27, 2^20 27, 2^22 32.
    bucket = 1 << (19 if update.device.type == "cpu" else 24)
    narrow = [column[0].dtype != torch.float32 for column in columns]
    width = min(bucket, sum(p.numel() for p in params))
    staging = {i: torch.empty(width, dtype=torch.float32, device=update.device) for i, x in enumerate(narrow) if x}
    for pieces in _buckets([p.numel() for p in params], bucket):
        stored = [[column[i].narrow(0, begin, end - begin) for i, begin, end in pieces] for column in columns]
        sizes = [end - begin for _, begin, end in pieces]
        wide = list(stored)
        for i, buffer in staging.items():
            wide[i] = list(buffer.narrow(0, 0, sum(sizes)).split(sizes))
            torch._foreach_copy_(wide[i], stored[i])
        step(wide)
        for i in staging:
            if i == 1:  # gradients
                continue
            if not update.stochastic:
                torch._foreach_copy_(stored[i], wide[i])
                continue
            stream = max(i - 1, 0)
            for out, x, (n, begin, _) in zip(stored[i], wide[i], pieces, strict=True):
                start = update.starts[n] + begin
                round_stochastic_(out, x, start, seed=update.seed, step=update.step, stream=stream)
        if update.masters is not None:
            torch._foreach_copy_([params[i].narrow(0, begin, end - begin) for i, begin, end in pieces], wide[0])


def _buckets(sizes: list[int], capacity: int) -> Iterator[list[tuple[int, int, int]]]:
    """Cut tensors of these sizes into runs (tensor, begin, end) and gather runs of at most `capacity` elements."""
    pieces: list[tuple[int, int, int]] = []
    free = capacity
    for i, size in enumerate(sizes):
        begin = 0
        while begin < size:
            end = min(size, begin + free)
            pieces.append((i, begin, end))
            free -= end - begin
            begin = end
            if free == 0:
                yield pieces
                pieces, free = [], capacity
    if pieces:
        yield pieces
