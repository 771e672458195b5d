"""The formulas in plain PyTorch, one tensor at a time: the definition of right, on any device.

Every operation below is one IEEE fp32 (or, where it says so, fp64) operation rounded to nearest, in the written order,
without contraction into fused multiply-adds. A backend that claims bit-equality reproduces exactly these.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.optimizers.philox import round_stochastic_
from hotloop.kernels.optimizers.update import Update

CHUNK = 65_536
# Chunks squared at a time: bounds the fp64 temporaries of the norm to 16 MiB.
_CHUNKS_AT_ONCE = 32


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return None


def sum_of_squares(grads: list[Tensor]) -> Tensor:
    """Sum of squares of all elements, () fp64. grads: any shapes, fp32 or bf16, one device.

    Each gradient is cut, in logical order, into chunks of 65,536 elements, the last one filled with zeros. A chunk is
    summed by halving (x[:n/2] + x[n/2:] until one is left), then the chunks of all gradients, filled with zeros to a
    power of two, likewise. The squares are exact in fp64 and cannot overflow, so the sum is finite if and only if every
    gradient is.
    """
    sums = []
    for grad in grads:
        for part in grad.reshape(-1).split(_CHUNKS_AT_ONCE * CHUNK):
            n = part.numel() // CHUNK
            whole, rest = part.double().square_().split([n * CHUNK, part.numel() - n * CHUNK])
            sums.append(halving_sum(whole.view(n, CHUNK)))
            if rest.numel():  # zeros up to the next power of two change no bit of what zeros up to a chunk give
                sums.append(fixed_order_sum(rest).view(1))
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    return fixed_order_sum(torch.cat(sums))


def fixed_order_sum(x: Tensor) -> Tensor:
    """Sum of x (N,) in an order that depends on N only."""
    width = 1 << max(x.numel() - 1, 0).bit_length()
    filled = x.new_zeros(width)
    filled.narrow(0, 0, x.numel()).copy_(x)
    return halving_sum(filled)


def halving_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, whose size is a power of two."""
    while x.shape[-1] > 1:
        first, second = x.chunk(2, dim=-1)
        x = first + second
    return x.squeeze(-1)


def adamw_scalars(update: Update) -> tuple[Tensor, Tensor, Tensor]:
    """(decay, step_size, bias2_sqrt), each () fp32: computed in fp64 from the step counter, rounded once."""
    group, t = update.group, update.step.double()
    lr = device_scalar(group["lr"], t.device)
    beta1, beta2 = group["betas"]
    decay = 1 - lr * group["weight_decay"]
    step_size = lr / (1 - torch.pow(beta1, t))
    bias2_sqrt = torch.sqrt(1 - torch.pow(beta2, t))
    return decay.float(), step_size.float(), bias2_sqrt.float()


def sqrt_rn(x: Tensor) -> Tensor:
    """Square root of fp32 rounded to nearest. `torch.sqrt` is not: on the CPU it calls MKL (2024.2), whose root of a
    random fp32 number was the second nearest in one of five draws.

    The root of an fp32 number is at least 2^-51 of its size away from the middle of two fp32 numbers, so that an fp64
    root that is off by an ulp still rounds the right way.
    """
    return torch.sqrt(x.double()).float()


def device_scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """() fp64 on the device, without a wait: a fill for a number, a copy for a tensor."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def supports_adamw(update: Update) -> str | None:
    return None


def adamw(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of AdamW in place; the formula is in `AdamW`'s docstring. factor, skip: () fp32."""
    beta1, beta2 = update.group["betas"]
    eps = update.group["eps"]
    decay, step_size, bias2_sqrt = adamw_scalars(update)
    exp_avgs, exp_avg_sqs = update.moments
    for i, param in enumerate(update.params):
        master = param if update.masters is None else update.masters[i]
        p, m, v = master.float(), exp_avgs[i].float(), exp_avg_sqs[i].float()
        g = update.grads[i].float() * factor
        if update.group["maximize"]:
            g = -g
        p = p * decay
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + g * (1 - beta2) * g
        p = p - step_size * m / (sqrt_rn(v) / bias2_sqrt + eps)
        for stream, (stored, new) in enumerate(((master, p), (exp_avgs[i], m), (exp_avg_sqs[i], v))):
            _store(stored, new, skip, update, update.starts[i], stream)
        if update.masters is not None:
            param.copy_(torch.where(skip != 0, param, master.to(param.dtype)))


def _store(stored: Tensor, new: Tensor, skip: Tensor, update: Update, start: int, stream: int) -> None:
    if stored.dtype == torch.bfloat16 and update.stochastic:
        rounded = torch.empty(new.numel(), dtype=torch.bfloat16, device=new.device)
        round_stochastic_(rounded, new.reshape(-1), start, seed=update.seed, step=update.step, stream=stream)
        new = rounded.view(new.shape)
    stored.copy_(torch.where(skip != 0, stored, new.to(stored.dtype)))
