"""The formulas in plain PyTorch, one tensor at a time: the definition of right, on any device.

Every operation below is one IEEE fp32 (or, where it says so, fp64) operation rounded to nearest, in the written order,
without contraction into fused multiply-adds. A backend that claims bit-equality reproduces exactly these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hotloop.kernels.optimizers import quantised
from hotloop.kernels.optimizers.philox import random_bits, round_stochastic_
from hotloop.kernels.optimizers.tables import DeviceTables
from hotloop.kernels.optimizers.update import Update

CHUNK = 65_536
RUN = 4096
_ROW = 64
# Elements squared at a time: bounds the fp64 temporaries of the norm to 16 MiB.
_AT_ONCE = 32 * CHUNK


def supports_sum_of_squares(grads: list[Tensor]) -> str | None:
    return None


def sum_of_squares(grads: list[Tensor], kept: DeviceTables | None = None) -> Tensor:
    """Sum of squares of all elements, () fp64. grads: any shapes, fp32 or bf16, one device.

    Each gradient is cut, in logical order, into chunks of 65,536 elements and these into 16 runs of 4,096, the last
    ones filled with zeros. A run is 64 rows of 64: the rows are added one after the other, and the row that this gives
    is summed by halving (x[:n/2] + x[n/2:] until one is left). The runs of a chunk are halved likewise, and so are the
    chunks of all gradients, filled with zeros to a power of two.

    The squares are exact in fp64 and cannot overflow, so the sum is finite if and only if every gradient is.
    """
    chunks = [chunk_sums(part) for grad in grads for part in grad.reshape(-1).split(_AT_ONCE) if part.numel()]
    device = grads[0].device if grads else None
    return fixed_order_sum(torch.cat(chunks)) if chunks else torch.zeros((), dtype=torch.float64, device=device)


def chunk_sums(x: Tensor) -> Tensor:
    """x (N,) -> (chunks,) fp64."""
    chunks = -(-x.numel() // CHUNK)
    squares = torch.zeros(chunks * CHUNK, dtype=torch.float64, device=x.device)
    squares[: x.numel()] = x.double().square_()
    rows = squares.view(-1, RUN // _ROW, _ROW)
    total = rows[:, 0].clone()
    for row in range(1, RUN // _ROW):
        total += rows[:, row]
    return halving_sum(halving_sum(total).view(chunks, CHUNK // RUN))


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
    """(decay, step_size, eps), each () fp32: computed in fp64 from the step counter, rounded once."""
    group, t = update.group, update.step.double()
    lr = device_scalar(group["lr"], t.device)
    beta1, beta2 = group["betas"]
    decay = 1 - lr * group["weight_decay"]
    bias2_sqrt = torch.sqrt(1 - torch.pow(beta2, t))
    step_size = lr * bias2_sqrt / (1 - torch.pow(beta1, t))
    return decay.float(), step_size.float(), (update.group["eps"] * bias2_sqrt).float()


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


def supports(update: Update) -> str | None:
    return None


def adamw(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of AdamW in place; the formula is in `AdamW`'s docstring. factor, skip: () fp32."""
    beta1, beta2 = update.group["betas"]
    decay, step_size, eps = adamw_scalars(update)

    def rule(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = p * decay
        m = m * beta1 + g * (1 - beta1)
        v = v * beta2 + g * (1 - beta2) * g
        return p - step_size * m / (sqrt_rn(v) + eps), m, v

    _apply(rule, update, factor, skip)


def lion(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of Lion in place; the formula is in `Lion`'s docstring. factor, skip: () fp32."""
    beta1, beta2 = update.group["betas"]
    decay, lr = lion_scalars(update)

    def rule(p: Tensor, g: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        p = p * decay
        direction = m * beta1 + g * (1 - beta1)
        p = p - torch.where(direction > 0, lr, torch.where(direction < 0, -lr, 0.0))
        return p, m * beta2 + g * (1 - beta2)

    _apply(rule, update, factor, skip)


def sgd(update: Update, factor: Tensor, skip: Tensor) -> None:
    """One step of SGD in place; the formula is in `SGD`'s docstring. factor, skip: () fp32."""
    group = update.group
    momentum, weight_decay = group["momentum"], group["weight_decay"]
    (lr,) = sgd_scalars(update)

    def rule(p: Tensor, g: Tensor, *buffers: Tensor) -> tuple[Tensor, ...]:
        g = g + p * weight_decay
        if not buffers:
            return (p - lr * g,)
        b = buffers[0] * momentum + g
        direction = g + b * momentum if group["nesterov"] else b
        return p - lr * direction, b

    _apply(rule, update, factor, skip)


def lion_scalars(update: Update) -> tuple[Tensor, Tensor]:
    """(decay, lr), each () fp32: in fp64, rounded once."""
    lr = device_scalar(update.group["lr"], update.device)
    return (1 - lr * update.group["weight_decay"]).float(), lr.float()


def sgd_scalars(update: Update) -> tuple[Tensor]:
    """(lr,), () fp32."""
    return (device_scalar(update.group["lr"], update.device).float(),)


def _apply(rule: Callable[..., tuple[Tensor, ...]], update: Update, factor: Tensor, skip: Tensor) -> None:
    """rule: (p, g, *moments), each fp32 -> the new (p, *moments). Result k is rounded with random bits of stream k."""
    for i, param in enumerate(update.params):
        master = param if update.masters is None else update.masters[i]
        g = update.grads[i].float() * factor
        if update.group["maximize"]:
            g = -g
        kept = [Kept(update, i, k) for k in range(len(update.moments))]
        new, *moments = rule(master.float(), g, *[moment.read() for moment in kept])
        store(master, new, skip, update, update.starts[i], 0)
        for moment, x in zip(kept, moments, strict=True):
            moment.write(x, skip)
        if update.masters is not None:
            param.copy_(torch.where(skip != 0, param, master.to(param.dtype)))


class Kept:
    """A moment of a parameter as it is stored: fp32, bf16, or codes with a scale."""

    def __init__(self, update: Update, i: int, moment: int):
        self.update, self.start, self.row, self.stream = update, update.starts[i], update.rows[i], moment + 1
        self.stored, self.unsigned = update.moments[moment][i], update.unsigned[moment]
        self.scale = update.scales[moment][i] if update.quantised else None

    def read(self) -> Tensor:
        if self.scale is None:
            return self.stored.float()
        return quantised.dequantise(self.stored, self.scale, self.row, self.unsigned)

    def write(self, x: Tensor, skip: Tensor) -> None:
        update = self.update
        if self.scale is None:
            store(self.stored, x, skip, update, self.start, self.stream)
            return
        noise = None
        if update.stochastic:
            noise = random_bits(self.start, x.numel(), seed=update.seed, step=update.step, stream=self.stream)
            noise = noise.view(x.shape)
        codes, scale = quantised.quantise(x, self.row, self.unsigned, noise)
        self.stored.copy_(torch.where(skip != 0, self.stored, codes))
        self.scale.copy_(torch.where(skip != 0, self.scale, scale))


def store(stored: Tensor, new: Tensor, skip: Tensor, update: Update, start: int, stream: int) -> None:
    if stored.dtype == torch.bfloat16 and update.stochastic:
        rounded = torch.empty(new.numel(), dtype=torch.bfloat16, device=new.device)
        round_stochastic_(rounded, new.reshape(-1), start, seed=update.seed, step=update.step, stream=stream)
        new = rounded.view(new.shape)
    stored.copy_(torch.where(skip != 0, stored, new.to(stored.dtype)))
