"""Functions for Triton kernels that Triton lacks: shared by ops."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """To 2 ulp. Below 5/8 an odd polynomial, minimax (relative error 2e-10); above 1 - 2 / (e^2|x| + 1)."""
    z = x * x
    q = z * 0.00214754 - 0.00818268
    q = q * z + 0.02170297
    q = q * z - 0.05394720
    q = q * z + 0.13333210
    q = q * z - 0.33333331
    small = q * z * x + x
    size = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(tl.minimum(2.0 * size, 32.0)) + 1.0)
    large = tl.where(x < 0, -large, large)
    return tl.where(x != x, x, tl.where(size < 0.625, small, large))
