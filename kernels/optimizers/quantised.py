"""Moments of 8 bits: a block of up to 256 elements of one row shares a scale, each element is a code.

A code is a float of 8 bits whose distances from zero, not whose values, are spaced like floats. Beside a sign it has
n = 4 fraction bits and an exponent of 3, with K = 7; second moments, which have no sign, n = 3 and an exponent of 5,
with K = 31. With exponent e and fraction f of c = 2^n e + f

    value(c) = (x(c) - 2^-K) * scale        x(c) = 2^(e - K) * (1 + f / 2^n)

where the fp32 bits of x(c) are c shifted and a constant. Near zero the values are evenly spaced, by 2^-(K + n) * scale;
further out neighbours are a 2^n-th of a binade apart, and what is largest in a block has the last code. Adam divides
one moment by the root of the other, element by element, so that it is the relative error that counts. Where gradients
within a block are normal with scales spread by a factor of 1, e, e^2, e^3 (two standard deviations), the error of
m / sqrt(v) is 1.9, 1.9, 2.0 and 6.0 %; with the dynamic tree of Dettmers (arXiv:2110.02861), finer near the maximum and
coarser below, it is 1.1, 1.8, 3.8 and 14 %.
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
    map_ = _UNSIGNED if unsigned else _SIGNED
    c = codes.to(torch.int32)
    value = ((c & map_.largest) << map_.shift).add_(map_.zero_bits).view(torch.float32) - map_.zero
    if not unsigned:
        value = torch.where(c >= _SIGN, -value, value)
    return value * _expand(scale, row).view(codes.shape)


def quantise(x: Tensor, row: int, unsigned: bool, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(codes, scale) of x, fp32 (rows, ...). noise: integers in [0, 2^16) of x's shape for stochastic rounding.

    The nearest code (of two, the larger), or one of the two neighbours with probabilities that make the expectation x.
    A positive unsigned number never becomes zero: a second moment of zero would be divided by.
    """
    map_ = _UNSIGNED if unsigned else _SIGNED
    absmax = x.new_zeros(x.numel() // row, blocks_of(row) * BLOCK)
    absmax[:, :row] = x.abs().view(-1, row)
    scale = (absmax.view(-1, blocks_of(row), BLOCK).amax(-1) * map_.scale_of_largest).clamp_(min=SMALLEST_SCALE)
    w = x.abs() * _expand(scale.reciprocal(), row).view(x.shape) + map_.zero
    added = 1 << map_.shift - 1 if noise is None else noise.to(torch.int32) << map_.shift - 16
    bits = w.view(torch.int32) & 0x7FFFFFFF  # the sign that a NaN may have
    codes = ((bits - map_.zero_bits + added) >> map_.shift).clamp_(max=map_.largest)
    if unsigned:
        codes = torch.where((codes == 0) & (x > 0), 1, codes)
    else:
        codes = codes + torch.where(x.view(torch.int32) < 0, _SIGN, 0)
    return codes.to(torch.uint8), scale


class _Map:
    def __init__(self, fraction_bits: int, K: int, largest: int, scale_of_largest: float):
        self.shift = 23 - fraction_bits  # of a code's fraction to the top of an fp32 number's
        self.zero, self.zero_bits = 2.0**-K, (127 - K) << 23
        self.largest, self.scale_of_largest = largest, scale_of_largest


_SIGNED = _Map(4, 7, 127, 0.5182186365127563)  # 1 / (1.9375 - 2^-7) in fp32
_UNSIGNED = _Map(3, 31, 255, 0.53333336114883423)  # 1 / 1.875


def _expand(scale: Tensor, row: int) -> Tensor:
    """(rows, blocks) -> (rows, row): each block's number for its elements."""
    return scale.repeat_interleave(BLOCK, dim=1)[:, :row]
