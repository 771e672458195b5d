"""Random bits for stochastic rounding: a function of seed, step and the logical index of the element.

Stochastic rounding needs 16 bits an element, so one call of Philox serves eight. With i the logical index, the bits are

    counter = (i // 8 mod 2^32, i // 8 // 2^32, step, stream)        key = (seed mod 2^32, seed // 2^32)
    bits(i) = (philox(counter, key)[i % 8 // 2] >> 16 * (i % 2)) & 0xFFFF
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.philox import MASK_32, philox_4x32_10

ELEMENTS_PER_CALL = 8
# Elements rounded at a time: the int64 temporaries of one pass stay in a core's cache.
_BLOCK = 1 << 18


def random_bits(start: int, count: int, *, seed: int, step: Tensor, stream: int) -> Tensor:
    """16 random bits for each of the logical indices start .. start + count - 1.

    step: () on the device that gets the bits, an integer below 2^32 of any dtype. Returns (count,) int32 in [0, 2^16).
    """
    device = step.device
    first, last = start // ELEMENTS_PER_CALL, (start + count - 1) // ELEMENTS_PER_CALL
    calls = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    words = philox_4x32_10(
        (calls & MASK_32, calls >> 32, step.to(torch.int64), torch.full((), stream, dtype=torch.int64, device=device)),
        (seed & MASK_32, seed >> 32),
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    return halves.view(-1).narrow(0, start - first * ELEMENTS_PER_CALL, count).to(torch.int32)


def round_stochastic_(out: Tensor, x: Tensor, start: int, *, seed: int, step: Tensor, stream: int) -> None:
    """Round x to bf16 up or down with probabilities that make the expectation x, and write it to out.

    out: (N,) bf16; x: (N,) fp32; element j has the logical index start + j; step: (). Adds 16 random bits below the
    last bit that bf16 keeps and cuts. Values that bf16 holds stay as they are; so do inf and NaN.
    """
    for begin in range(0, x.numel(), _BLOCK):
        part = x.narrow(0, begin, min(_BLOCK, x.numel() - begin))
        noise = random_bits(start + begin, part.numel(), seed=seed, step=step, stream=stream)
        # Noise on the bits of inf would make a NaN of it.
        noise = noise.masked_fill_(~part.isfinite(), 0)
        bits = noise.add_(part.view(torch.int32)).bitwise_and_(-0x10000)
        out.narrow(0, begin, part.numel()).copy_(bits.view(torch.float32))
