"""Random bits for stochastic rounding: a function of seed, step and the logical index of the element.

Stochastic rounding needs 16 bits an element, so one call of Philox serves eight, and all that is rounded of an element
(stream 0: the parameter, 1 and 2: its moments) takes its bits from the same 16. With i the logical index, they are

    counter = (i // 8 mod 2^32, i // 8 // 2^32, step, 0)             key = (seed mod 2^32, seed // 2^32)
    bits(i) = (philox(counter, key)[i % 8 // 2] >> 16 * (i % 2)) & 0xFFFF
    bits(i, stream) = bits(i) * MULTIPLIERS[stream] & 0xFFFF

A product with an odd number permutes the 16-bit numbers, so every stream is uniform, which is what makes rounding
unbiased. Pairs of two streams are the points of a lattice that is nearly as even as 2^16 points allow (spectral test:
255 of 275), so that the streams of an element are as good as independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hotloop.kernels.philox import MASK_32, philox_4x32_10

ELEMENTS_PER_CALL = 8
MULTIPLIERS = (1, 44_205, 64_805)
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
        (calls & MASK_32, calls >> 32, step.to(torch.int64), torch.zeros((), dtype=torch.int64, device=device)),
        (seed & MASK_32, seed >> 32),
    )
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=1)
    bits = halves.view(-1).narrow(0, start - first * ELEMENTS_PER_CALL, count)
    return (bits * MULTIPLIERS[stream] & 0xFFFF).to(torch.int32)


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
