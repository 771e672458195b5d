"""Counter-based random bits for stochastic rounding: the same bits on every backend, device, layout and thread count.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is a function
from a 128-bit counter and a 64-bit key to four 32-bit words. Stochastic rounding needs 16 bits an element, so one call
serves eight elements. With i the logical index of an element, the bits are

    counter = (i // 8 mod 2^32, i // 8 // 2^32, step, stream)        key = (seed mod 2^32, seed // 2^32)
    bits(i) = (philox(counter, key)[i % 8 // 2] >> 16 * (i % 2)) & 0xFFFF

Here in int64 tensor operations: products of two 32-bit words wrap in 64 bits, and the bits that are kept are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS_PER_CALL = 8
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
# Elements rounded at a time: the int64 temporaries of one pass stay in a core's cache.
_BLOCK = 1 << 18


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int], rounds: int = 10) -> list[Tensor]:
    """Four 32-bit words for each counter. counter: int64 tensors that broadcast, values in [0, 2^32); key likewise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # >> is arithmetic: the mask removes the sign that a product above 2^63 wraps to.
        c0, c1 = ((product1 >> 32) & _WORD) ^ c1 ^ k0, product1 & _WORD
        c2, c3 = ((product0 >> 32) & _WORD) ^ c3 ^ k1, product0 & _WORD
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return list(torch.broadcast_tensors(c0, c1, c2, c3))


def random_bits(start: int, count: int, *, seed: int, step: Tensor, stream: int) -> Tensor:
    """16 random bits for each of the logical indices start .. start + count - 1.

    step: () on the device that gets the bits, an integer below 2^32 of any dtype. Returns (count,) int32 in [0, 2^16).
    """
    device = step.device
    first, last = start // ELEMENTS_PER_CALL, (start + count - 1) // ELEMENTS_PER_CALL
    calls = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    words = philox_4x32(
        (calls & _WORD, calls >> 32, step.to(torch.int64), torch.full((), stream, dtype=torch.int64, device=device)),
        (seed & _WORD, seed >> 32),
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
