"""Counter-based random words: the same on every backend, device, layout, tiling and thread count.

Philox-4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is a function
from a 128-bit counter and a 64-bit key to four 32-bit words. Here in int64 tensor operations, as the definition of
right: products of two 32-bit words wrap in 64 bits, and the bits that are kept are right.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK_32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def philox_4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],  # broadcastable int64, each in [0, 2^32)
    key: tuple[int | Tensor, int | Tensor],  # each in [0, 2^32)
) -> tuple[Tensor, ...]:  # 4 of int64, uniform over [0, 2^32)
    """Four 32-bit words for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        # >> is arithmetic: the mask removes the sign that a product above 2^63 wraps to.
        c0, c1 = ((product1 >> 32) & MASK_32) ^ c1 ^ k0, product1 & MASK_32
        c2, c3 = ((product0 >> 32) & MASK_32) ^ c3 ^ k1, product0 & MASK_32
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & MASK_32, (k1 + _KEY_INCREMENTS[1]) & MASK_32
    return torch.broadcast_tensors(c0, c1, c2, c3)
