"""Moments of 8 bits: a block of up to 256 elements of one row shares a scale, each element is a code.

With u = x / scale in [-1, 1], a code is a sign and a number whose leading zeros are an exponent to the base 8 and
whose other bits are a linear fraction (the dynamic tree of Dettmers, arXiv:2110.02861, in base 8: everything below is
then exact in fp32 but one multiplication by 8/7). For a code c > 0 with L = floor(log2(c)) and `top` = 7 (unsigned;
6 with a sign)

    value(c) = (7/8 * (c + 1) / 2^L - 3/4) * 8^(L - top)        value(0) = 0

From 8^-k to 8^-(k-1) the values are evenly spaced, c = 2^(top+1) - 1 is 1, and neighbouring pieces share their ends.
With a scale in bits for 256 codes it is finest near the block's maximum, and spans a factor of 2 million (unsigned).
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
# Tensors that are kept in fp32, by logical size, so that layouts agree: they are not worth it, and their rows are
# short. A vector has rows of one element.
SMALLEST_TENSOR = 4096
SHORTEST_ROW = 32
UNSIGNED_MOMENTS = frozenset({"exp_avg_sq"})
SCALE_SUFFIX = "_scale"
# A smaller scale would have a reciprocal beyond fp32.
SMALLEST_SCALE = 2.0**-126
_SIGN = 128


def is_quantised(numel: int, row: int) -> bool:
    """Whether state_dtype = "int8" applies to a parameter of this logical size."""
    return numel >= SMALLEST_TENSOR and row >= SHORTEST_ROW


def blocks_of(row: int) -> int:
    return -(-row // BLOCK)


def dequantise(codes: Tensor, scale: Tensor, row: int, unsigned: bool) -> Tensor:
    """codes: (rows, ...) uint8 with `row` elements a row; scale: (rows, blocks) fp32. Returns fp32 of codes' shape."""
    top = 7 if unsigned else 6
    c = codes.to(torch.int32)
    magnitude = c if unsigned else c & (_SIGN - 1)
    # The exponent of an fp32 number is the position of the leading bit.
    log2 = (magnitude.float().view(torch.int32) >> 23) - 127
    fraction = (magnitude + 1).float() * _power_of_two(-log2) * 0.875 - 0.75
    value = torch.where(magnitude > 0, fraction * _power_of_two(3 * (log2 - top)), 0.0)
    if not unsigned:
        value = torch.where(c >= _SIGN, -value, value)
    return value * _expand(scale, row).view(codes.shape)


def quantise(x: Tensor, row: int, unsigned: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scale) of x, fp32 (rows, ...). noise: integers in [0, 2^16) of x's shape for stochastic rounding.

    The nearest code, or one of the two neighbours with probabilities that make the expectation x. A positive unsigned
    number never becomes zero: a second moment of zero would be divided by.
    """
    top = 7 if unsigned else 6
    absmax = x.new_zeros(x.numel() // row, blocks_of(row) * BLOCK)
    absmax[:, :row] = x.abs().view(-1, row)
    scale = absmax.view(-1, blocks_of(row), BLOCK).amax(-1).clamp_(min=SMALLEST_SCALE)
    u = x.abs() * _expand(scale.reciprocal(), row).view(x.shape)
    # 8^-(z+1) <= u < 8^-z, from the exponent; u is at most 1 and a rounding.
    z = (((126 - (u.view(torch.int32) >> 23)).clamp_(0, 23) * 43) >> 7).clamp_(max=top)
    v = u * _power_of_two(3 * z)
    # Counts from 1. The last piece goes down to zero in one step.
    t = torch.where(z == top, v + 1, (v + 0.75) * _EIGHT_SEVENTHS * _power_of_two(top - z))
    t = torch.round(t) if noise is None else torch.floor(t + noise.float() * 2.0**-16)
    codes = t.to(torch.int32).sub_(1).clamp_(max=2 ** (top + 1) - 1)
    if unsigned:
        codes = torch.where((codes == 0) & (x > 0), 1, codes)
    else:
        codes = codes + torch.where(x.view(torch.int32) < 0, _SIGN, 0)
    return codes.to(torch.uint8), scale


_EIGHT_SEVENTHS = 1.1428571939468384  # 8/7 in fp32


def _power_of_two(e: Tensor) -> Tensor:
    return ((e + 127) << 23).view(torch.float32)


def _expand(scale: Tensor, row: int) -> Tensor:
    """(rows, blocks) -> (rows, row): each block's number for its elements."""
    return scale.repeat_interleave(BLOCK, dim=1)[:, :row]
