"""Arithmetic that numpy lacks: bfloat16, fused multiply-add, directed rounding, flushing of subnormal numbers.

Values of 16- and 32-bit types are computed in float64 and rounded once. Where float64 itself is inexact, the result is
first rounded *to odd* (truncated, with the last bit set if anything was lost); with at least two spare bits a second
rounding of such a number, in any direction, is right (Boldo and Melquiond). NaN payloads are not modelled.
"""

from __future__ import annotations

import numpy as np

from hotloop.emulator.types import Array

MANTISSA = {"f32": 24, "f16": 11, "bf16": 8, "tf32": 11}  # bits of precision, the hidden one included
SMALLEST_EXPONENT = {"f32": -126, "f16": -14, "bf16": -126, "tf32": -126}
LARGEST = {"f32": 3.4028234663852886e38, "f16": 65504.0, "bf16": 3.3895313892515355e38, "tf32": 3.4011621342146535e38}
_LOW29 = np.int64(0x1FFFFFFF)
_MIDPOINT = np.int64(0x10000000)
_TINY = np.float32(1.1754943508222875e-38)


def flush(x: Array) -> Array:
    """Subnormal float32 numbers become zeros of their sign (`.ftz`)."""
    small = np.abs(x) < _TINY
    return np.where(small, np.copysign(np.float32(0), x), x) if small.any() else x


def saturate(x: Array) -> Array:
    """Into [0, 1]; NaN becomes 0 (`.sat`)."""
    one = x.dtype.type(1)
    return np.where(x > 0, np.minimum(x, one), x.dtype.type(0)).astype(x.dtype)


def to_bf16(x: Array) -> Array:
    """float32 -> bfloat16 bits (uint16), to nearest even."""
    u = np.ascontiguousarray(x).view(np.uint32)
    rounded = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(x)
    return np.where(nan, np.uint16(0x7FFF), rounded) if nan.any() else rounded


def from_bf16(h: Array) -> Array:
    return (h.astype(np.uint32) << np.uint32(16)).view(np.float32)


def low(u: Array) -> Array:
    return (u & np.uint32(0xFFFF)).astype(np.uint16)


def high(u: Array) -> Array:
    return (u >> np.uint32(16)).astype(np.uint16)


def pack(lo: Array, hi: Array) -> Array:
    return lo.astype(np.uint32) | (hi.astype(np.uint32) << np.uint32(16))


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd."""
    s = a + b
    t = s - a
    error = (a - (s - t)) + (b - t)
    lost = (error != 0) & np.isfinite(s)
    if not lost.any():
        return s
    bits = np.ascontiguousarray(s).view(np.int64)
    even = (bits & 1) == 0
    # Truncation towards the true value: step to the neighbour on the side of the error, whose last bit is odd.
    bits = np.where(lost & even, np.where((error > 0) == (s > 0), bits + 1, bits - 1), bits)
    return bits.view(np.float64)


def odd_fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c for operands of at most 24 bits, in float64, rounded to odd: the product is exact there."""
    return odd_sum(np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add of float32, to nearest even.

    Rounding twice (float64, float32) differs from rounding once only if the float64 sum lies on a midpoint of float32
    numbers, or among subnormal ones. Both are rare, so that they are looked for instead of always being computed.
    """
    s = np.multiply(a, b, dtype=np.float64) + c
    r = s.astype(np.float32)
    # A zero that comes of inf - inf or of an exact cancellation stays as it is.
    doubtful = ((s.view(np.int64) & _LOW29) == _MIDPOINT) | ((np.abs(r) < 2 * _TINY) & (s != 0))
    if doubtful.any():
        return odd_fma(a, b, c).astype(np.float32)
    return r


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """a * b = p + e exactly (Dekker), without overflow or underflow."""
    p = a * b
    split = np.float64(134217729.0)
    ah = split * a
    ah = ah - (ah - a)
    bh = split * b
    bh = bh - (bh - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def fma64(a: Array, b: Array, c: Array) -> Array:
    """Fused multiply-add of float64 to nearest even; exponents near the ends of the range are rounded twice."""
    a, b, c = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64), np.asarray(c, np.float64))
    plain = a * b + c
    p, e = two_product(a, b)
    s = p + c
    t = s - p
    tail = odd_sum((p - (s - t)) + (c - t), e)
    magnitude = np.abs(p)
    safe = np.isfinite(plain) & (magnitude < 1e300) & (magnitude > 1e-270) & np.isfinite(tail)
    return np.where(safe, s + tail, plain)


def round_to(x: Array, fmt: str, mode: str) -> Array:
    """float64 (exact, or rounded to odd) -> float64 that holds a number of `fmt`, rounded rn, rz, rm, rp or rna."""
    x = np.asarray(x, np.float64)
    finite = np.isfinite(x) & (x != 0)
    _, exponent = np.frexp(np.where(finite, x, 1.0))
    exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[fmt])
    ulp = np.ldexp(1.0, exponent - MANTISSA[fmt] + 1)
    scaled = np.where(finite, x, 0.0) / ulp
    if mode == "rn":
        whole = np.rint(scaled)
    elif mode == "rna":
        whole = np.trunc(scaled + np.copysign(0.5, scaled))
    else:
        whole = {"rz": np.trunc, "rm": np.floor, "rp": np.ceil}[mode](scaled)
    y = np.copysign(whole * ulp, x)
    big = np.abs(y) > LARGEST[fmt]
    if big.any():
        to_infinity = {"rn": big, "rna": big, "rz": big & False, "rm": x < 0, "rp": x > 0}[mode]
        y = np.where(big, np.where(to_infinity, np.copysign(np.inf, x), np.copysign(LARGEST[fmt], x)), y)
    return np.where(finite, y, x)


def encode(x: Array, fmt: str) -> Array:
    """float64 numbers that `fmt` represents -> its array (bits for bf16)."""
    if fmt == "bf16":
        return to_bf16(x.astype(np.float32))
    return x.astype(np.float16 if fmt == "f16" else np.float32)


def multiply_high64(a: Array, b: Array) -> Array:
    """The upper half of the 128-bit product of unsigned 64-bit numbers."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & mask, a >> half, b & mask, b >> half
    t = a1 * b0 + ((a0 * b0) >> half)
    w = (t & mask) + a0 * b1
    return a1 * b1 + (t >> half) + (w >> half)


def multiply_high64_signed(a: Array, b: Array) -> Array:
    ua, ub = a.view(np.uint64), np.asarray(b).view(np.uint64)
    h = multiply_high64(ua, ub)
    zero = np.uint64(0)
    return (h - np.where(a < 0, ub, zero) - np.where(np.asarray(b) < 0, ua, zero)).view(np.int64)
