"""units/floating.py and units/convert.py: exact rational arithmetic, rounded by hand, is the oracle."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from fragments import evaluate

PRECISION = {
    "f32": (24, -126, 127),
    "f16": (11, -14, 15),
    "bf16": (8, -126, 127),
    "tf32": (11, -126, 127),
    "f64": (53, -1022, 1023),
}
MODES = ("rn", "rz", "rm", "rp")


def rounded(x: Fraction, fmt: str, mode: str) -> float:
    """x != 0 in the format, as a float."""
    bits, low, high = PRECISION[fmt]
    exponent = max(math.floor(math.log2(abs(x))) if abs(x) > Fraction(1, 2**1000) else -1000, low - 1)
    while Fraction(2) ** exponent > abs(x):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(x):
        exponent += 1
    ulp = Fraction(2) ** (max(exponent, low) - bits + 1)
    q = x / ulp
    whole = {"rz": math.trunc, "rm": math.floor, "rp": math.ceil, "rn": round}.get(mode)
    n = whole(q) if whole else math.trunc(q + Fraction(1 if q > 0 else -1, 2))  # rna: halves away from zero
    y = n * ulp
    largest = (2 - Fraction(2) ** (1 - bits)) * Fraction(2) ** high
    if abs(y) > largest:
        grows = {"rn": True, "rna": True, "rz": False, "rm": x < 0, "rp": x > 0}[mode]
        return math.copysign(math.inf if grows else float(largest), x)
    return math.copysign(float(y), x)


def numbers(count: int, seed: int, scale: float = 4.0) -> np.ndarray:
    """float32 numbers of many magnitudes, subnormal ones included."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(count) * np.exp2(rng.uniform(-scale, scale, count))
    return x.astype(np.float32)


X, Y, Z = numbers(192, 0), numbers(192, 1), numbers(192, 2)
# Sums of far apart magnitudes, products near the middle of two numbers, and subnormal results.
X[:32] *= np.float32(2.0**60)
Y[32:64] = (X[32:64] * np.float32(1 + 2.0**-12)).astype(np.float32)
X[64:96] *= np.float32(2.0**-75)
Y[64:96] *= np.float32(2.0**-60)
Z[64:96] *= np.float32(2.0**-135)
EXACT = {
    "add": lambda x, y, z: x + y,
    "sub": lambda x, y, z: x - y,
    "mul": lambda x, y, z: x * y,
    "fma": lambda x, y, z: x * y + z,
    "div": lambda x, y, z: x / y,
    "rcp": lambda x, y, z: 1 / x,
}
ARGUMENTS = {"fma": "%a0, %a1, %a2", "rcp": "%a0"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opcode", EXACT)
def test_f32_in_every_rounding(opcode, mode):
    got = evaluate(f"{opcode}.{mode}.f32 %d, {ARGUMENTS.get(opcode, '%a0, %a1')};", [X, Y, Z], "f32", into=np.float32)
    want = [
        rounded(e, "f32", mode) if e else 0.0
        for e in (EXACT[opcode](*map(Fraction, map(float, r))) for r in zip(X, Y, Z, strict=True))
    ]
    np.testing.assert_array_equal(got, np.array(want, np.float32))


@pytest.mark.parametrize("mode", MODES)
def test_square_root_in_every_rounding(mode):
    x = np.abs(X)
    got = evaluate(f"sqrt.{mode}.f32 %d, %a0;", [x], "f32", into=np.float32)
    for root, value in zip(got, x, strict=True):
        below, above = (Fraction(float(np.nextafter(root, np.float32(s)))) for s in (0, np.inf))
        r, v = Fraction(float(root)), Fraction(float(value))
        if mode == "rn":
            assert ((below + r) / 2) ** 2 <= v <= ((above + r) / 2) ** 2
        elif mode == "rp":
            assert below**2 < v <= r**2
        else:
            assert r**2 <= v < above**2


def test_exact_cancellation_is_minus_zero_when_rounding_down():
    one, other = np.ones(1, np.float32), -np.ones(1, np.float32)
    assert np.signbit(evaluate("add.rm.f32 %d, %a0, %a1;", [one, other], "f32", into=np.float32))[0]
    assert not np.signbit(evaluate("add.rn.f32 %d, %a0, %a1;", [one, other], "f32", into=np.float32))[0]


def test_fma_where_rounding_twice_goes_wrong():
    """a * b + c lies just beside the middle of two float32 numbers, closer than float64 can tell."""
    a = np.array([1 + 2.0**-23, 1 + 2.0**-12], np.float32)
    b = np.array([1 + 2.0**-23, 1 + 2.0**-12], np.float32)
    c = np.array([2.0**-60, 2.0**-80], np.float32)
    got = evaluate("fma.rn.f32 %d, %a0, %a1, %a2;", [a, b, c], "f32", into=np.float32)
    want = [
        rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "f32", "rn")
        for x, y, z in zip(a, b, c, strict=True)
    ]
    np.testing.assert_array_equal(got, np.array(want, np.float32))
    middle = np.array([1 + 2.0**-24], np.float64).astype(np.float32)  # ties to 1
    assert middle[0] == 1


def test_f64_arithmetic():
    x, y, z = (v.astype(np.float64) * (1 + 2.0**-40) for v in (X, Y, Z))
    for opcode, function in (("add.rn", x + y), ("sub.rn", x - y), ("mul.rn", x * y), ("div.rn", x / y)):
        np.testing.assert_array_equal(evaluate(f"{opcode}.f64 %d, %a0, %a1;", [x, y], "f64", into=np.float64), function)
    got = evaluate("fma.rn.f64 %d, %a0, %a1, %a2;", [x, y, z], "f64", into=np.float64)
    want = [rounded(Fraction(a) * Fraction(b) + Fraction(c), "f64", "rn") for a, b, c in zip(x, y, z, strict=True)]
    np.testing.assert_array_equal(got, np.array(want))


TINY = np.array([1e-39, -1e-39, 1.2e-38, 1.0, -0.0, 1e-45, 3e-38, -2e-38], np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def test_flush_to_zero_of_inputs_and_results():
    one, half = np.ones(8, np.float32), np.full(8, 0.5, np.float32)
    same = lambda code, inputs, want: np.testing.assert_array_equal(
        evaluate(code, inputs, "f32", into=np.float32).view(np.uint32), want.astype(np.float32).view(np.uint32)
    )
    same("mul.ftz.f32 %d, %a0, %a1;", [TINY, half], flushed(flushed(TINY) * half))
    same("mul.f32 %d, %a0, %a1;", [TINY, half], TINY * half)
    same("add.ftz.f32 %d, %a0, %a1;", [TINY, TINY], flushed(flushed(TINY) * 2))
    same("fma.rn.ftz.f32 %d, %a0, %a1, %a2;", [TINY, one, TINY], flushed(flushed(TINY) * 2))
    same("neg.ftz.f32 %d, %a0;", [TINY], -flushed(TINY))
    same("max.ftz.f32 %d, %a0, %a0;", [TINY], flushed(TINY))
    same("rcp.approx.ftz.f32 %d, %a0;", [TINY[[0, 5, 3]]], np.array([np.inf, np.inf, 1]))
    same("cvt.ftz.f32.f32 %d, %a0;", [TINY], flushed(TINY))
    got = evaluate(".reg .pred %c; setp.gt.ftz.f32 %c, %a0, 0f00000000; selp.b32 %d, 1, 0, %c;", [TINY])
    np.testing.assert_array_equal(got, flushed(TINY) > 0)


def test_saturation():
    x = np.array([-1.0, 0.25, 2.0, np.nan], np.float32)
    got = evaluate("add.sat.f32 %d, %a0, 0f00000000;", [x], "f32", into=np.float32)
    np.testing.assert_array_equal(got, np.array([0, 0.25, 1, 0], np.float32))


def test_minimum_and_maximum():
    x = np.array([1, np.nan, np.nan, 0.0, -0.0, -np.inf], np.float32)
    y = np.array([2, 3, np.nan, -0.0, 0.0, 5], np.float32)
    for code, want in (
        ("min.f32", [1, 3, np.nan, -0.0, -0.0, -np.inf]),
        ("max.f32", [2, 3, np.nan, 0.0, 0.0, 5]),
        ("min.NaN.f32", [1, np.nan, np.nan, -0.0, -0.0, -np.inf]),
        ("max.NaN.f32", [2, np.nan, np.nan, 0.0, 0.0, 5]),
    ):
        got = evaluate(f"{code} %d, %a0, %a1;", [x, y], "f32", into=np.float32)
        np.testing.assert_array_equal(got, np.array(want, np.float32))
        np.testing.assert_array_equal(np.signbit(got[3:5]), np.signbit(np.array(want[3:5])))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx", np.exp2),
        ("lg2.approx", lambda x: np.log2(np.abs(x))),
        ("rsqrt.approx", lambda x: 1 / np.sqrt(np.abs(x))),
        ("sqrt.approx", lambda x: np.sqrt(np.abs(x))),
        ("rcp.approx", lambda x: 1 / x),
        ("sin.approx", np.sin),
        ("cos.approx", np.cos),
        ("tanh.approx", np.tanh),
    ],
)
def test_approximate_functions_are_rounded_once(opcode, function):
    x = numbers(64, 5)
    positive = opcode.startswith(("lg2", "rsqrt", "sqrt"))
    got = evaluate(f"{opcode}.f32 %d, %a0;", [np.abs(x) if positive else x], "f32", into=np.float32)
    np.testing.assert_array_equal(got, function(x.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("form", ["approx", "full"])
def test_approximate_division(form):
    np.testing.assert_array_equal(evaluate(f"div.{form}.f32 %d, %a0, %a1;", [X, Z], "f32", into=np.float32), X / Z)


def test_signs():
    x = np.array([1, -2, 0.0, -0.0, np.inf], np.float32)
    for code, want in (("neg", -x), ("abs", np.abs(x))):
        got = evaluate(f"{code}.f32 %d, %a0;", [x], "f32", into=np.float32)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    y = np.array([-1, 1, -1, 1, -1], np.float32)
    got = evaluate("copysign.f32 %d, %a0, %a1;", [y, x], "f32", into=np.float32)  # the sign of the first
    np.testing.assert_array_equal(got.view(np.uint32), np.copysign(x, y).view(np.uint32))


@pytest.mark.parametrize(
    ("test", "want"),
    [
        ("finite", [1, 1, 1, 0, 0]),
        ("infinite", [0, 0, 0, 1, 0]),
        ("number", [1, 1, 1, 1, 0]),
        ("notanumber", [0, 0, 0, 0, 1]),
        ("normal", [1, 0, 0, 0, 0]),
        ("subnormal", [0, 1, 0, 0, 0]),
    ],
)
def test_classes(test, want):
    x = np.array([1, 1e-40, 0, np.inf, np.nan], np.float32)
    got = evaluate(f".reg .pred %c; testp.{test}.f32 %c, %a0; selp.b32 %d, 1, 0, %c;", [x])
    np.testing.assert_array_equal(got, want)


HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


def half_bits(x: np.ndarray, fmt: str) -> np.ndarray:
    return torch.from_numpy(np.ascontiguousarray(x)).to(HALF[fmt]).view(torch.int16).numpy().view(np.uint16)


def half_values(bits: np.ndarray, fmt: str) -> np.ndarray:
    return torch.from_numpy(bits.view(np.int16).copy()).view(HALF[fmt]).double().numpy()


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", ["add.rn", "sub.rn", "mul.rn", "fma.rn", "min", "max", "neg", "abs"])
@pytest.mark.parametrize("packed", [False, True])
def test_half_precision(fmt, opcode, packed):
    bits = [half_bits(numbers(128, s, 3), fmt) for s in (6, 7, 8)]
    operands = {"fma.rn": "%a0, %a1, %a2", "neg": "%a0", "abs": "%a0"}.get(opcode, "%a0, %a1")
    x, y, z = ([Fraction(v) for v in half_values(b, fmt)] for b in bits)
    exact = {
        "add.rn": [a + b for a, b in zip(x, y, strict=True)],
        "sub.rn": [a - b for a, b in zip(x, y, strict=True)],
        "mul.rn": [a * b for a, b in zip(x, y, strict=True)],
        "fma.rn": [a * b + c for a, b, c in zip(x, y, z, strict=True)],
        "min": list(map(min, x, y)),
        "max": list(map(max, x, y)),
        "neg": [-a for a in x],
        "abs": [abs(a) for a in x],
    }[opcode]
    want = np.array([rounded(e, fmt, "rn") if e else 0.0 for e in exact])
    if packed:
        inputs = [np.ascontiguousarray(b).view(np.uint32) for b in bits]
        got = evaluate(f"{opcode}.{fmt}x2 %d, {operands};", inputs, target="sm_90").view(np.uint16)
    else:
        got = evaluate(f"{opcode}.{fmt} %d, {operands};", bits, "b16", into=np.uint16, target="sm_90")
    np.testing.assert_array_equal(half_values(got, fmt), want)


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("opcode", ["add", "sub", "fma"])
def test_narrow_operands_of_f32_arithmetic(opcode, mode, fmt):
    """add, sub and fma widen all operands but the last, exactly."""
    dtype = torch.float16 if fmt == "f16" else torch.bfloat16
    x, y = (torch.from_numpy(numbers(96, seed)).to(dtype) for seed in (3, 4))
    z = numbers(96, 5)
    given = [t.view(torch.int16).numpy().view(np.uint16) for t in (x, y)]
    if opcode == "fma":
        found = evaluate(
            f"fma.{mode}.f32.{fmt} %d, %a0, %a1, %a2;", [*given, z], "f32", into=np.float32, target="sm_100"
        )
    else:
        code = f"{opcode}.{mode}.f32.{fmt} %d, %a0, %a1;"
        found = evaluate(code, [given[0], z], "f32", into=np.float32, target="sm_100")
    for a, b, c, got in zip(x.double().tolist(), y.double().tolist(), z.tolist(), found.tolist(), strict=True):
        a, b, c = Fraction(a), Fraction(b), Fraction(c)
        exact = {"add": a + c, "sub": a - c, "fma": a * b + c}[opcode]
        assert got == rounded(exact, "f32", mode)


def test_pairs_of_f32():
    x, y = X[:64].view(np.uint64), Z[:64].view(np.uint64)
    got = evaluate("fma.rn.f32x2 %d, %a0, %a1, %a1;", [x, y], "b64", into=np.uint64, target="sm_100").view(np.float32)
    exact = (Fraction(float(a)) * Fraction(float(b)) + Fraction(float(b)) for a, b in zip(X[:64], Z[:64], strict=True))
    np.testing.assert_array_equal(got, np.array([rounded(e, "f32", "rn") for e in exact], np.float32))


# ---------------------------------------------------------------------- conversions
WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
FLOATS = np.array(
    [0.5, 1.5, 2.5, -0.5, -1.5, 3.7, -3.7, 1e20, -1e20, np.inf, -np.inf, np.nan, 2.0**31, -(2.0**31), 300.5, 1e-40],
    np.float32,
)


@pytest.mark.parametrize("mode", WHOLE)
@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u8"])
def test_float_to_integer_saturates(mode, to):
    bits = int(to[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, (1 << bits) - 1)
    wide = "b64" if bits == 64 else "b32"
    got = evaluate(f"cvt.{mode}.{to}.f32 %d, %a0;", [FLOATS], wide, into=np.uint64 if bits == 64 else np.uint32)
    want = []
    for x in FLOATS:
        if np.isnan(x):
            n = 1 << 63 if bits == 64 else 0
        elif np.isinf(x):
            n = high if x > 0 else low
        else:
            n = max(low, min(high, int(WHOLE[mode](np.float64(x)))))
        want.append(n & ((1 << max(bits, 32)) - 1))
    np.testing.assert_array_equal(got, np.array(want, got.dtype))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("source", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("to", ["f32", "f16", "f64"])
def test_integer_to_float(mode, source, to):
    bits = int(source[1:])
    rng = np.random.default_rng(9)
    values = np.r_[rng.integers(0, 2**bits, 60, np.uint64 if bits == 64 else np.uint32), [0, 1, 2**24 + 1, 2**bits - 1]]
    values = values.astype(np.uint64 if bits == 64 else np.uint32) >> rng.integers(0, bits - 1, 64).astype(
        f"u{bits // 8}"
    )
    typed = values.view(f"i{bits // 8}") if source[0] == "s" else values
    out, into = {"f32": ("f32", np.float32), "f16": ("b16", np.uint16), "f64": ("f64", np.float64)}[to]
    got = evaluate(f"cvt.{mode}.{to}.{source} %d, %a0;", [values], out, into=into)
    got = half_values(got, "f16") if to == "f16" else got
    want = [rounded(Fraction(int(v)), to, mode) if v else 0.0 for v in typed]
    np.testing.assert_array_equal(got, np.array(want).astype(got.dtype))


@pytest.mark.parametrize(("fmt", "mode"), [*(("f16", mode) for mode in MODES), ("bf16", "rn"), ("bf16", "rz")])
def test_float_to_half(fmt, mode):
    x = np.r_[numbers(120, 10, 12), np.array([65504, 65519, 65520, 1e6, -1e6, 6e-8, 1e-5, 3.4e38], np.float32)]
    got = evaluate(f"cvt.{mode}.{fmt}.f32 %d, %a0;", [x], "b16", into=np.uint16, target="sm_90")
    want = [rounded(Fraction(float(v)), fmt, mode) for v in x]
    np.testing.assert_array_equal(half_values(got, fmt), want)


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
@pytest.mark.parametrize("suffix", ["rn", "rz", "rn.relu"])
def test_two_floats_to_a_pair(fmt, suffix):
    x, y = numbers(64, 11), numbers(64, 12)
    got = evaluate(f"cvt.{suffix}.{fmt}x2.f32 %d, %a0, %a1;", [x, y], target="sm_90").view(np.uint16).reshape(-1, 2)
    mode = suffix[:2]
    for column, values in ((1, x), (0, y)):  # the first source is the upper half
        want = np.array([rounded(Fraction(float(v)), fmt, mode) for v in values])
        want = np.maximum(want, 0) if "relu" in suffix else want
        np.testing.assert_array_equal(half_values(np.ascontiguousarray(got[:, column]), fmt), want)


@pytest.mark.parametrize("fmt", ["f16", "bf16"])
def test_half_to_float_is_exact(fmt):
    every = np.arange(0, 2**16, 97, dtype=np.uint16)
    got = np.concatenate(
        [evaluate(f"cvt.f32.{fmt} %d, %a0;", [part], "f32", into=np.float32) for part in np.array_split(every, 2)]
    )
    np.testing.assert_array_equal(got, half_values(every, fmt).astype(np.float32))


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(mode):
    x = np.r_[numbers(62, 13), np.array([np.inf, 1 + 2.0**-11], np.float32)]
    got = evaluate(f"cvt.{mode}.tf32.f32 %d, %a0;", [x], target="sm_90").view(np.float32)
    want = [float(v) if np.isinf(v) else rounded(Fraction(float(v)), "tf32", mode) for v in x]
    np.testing.assert_array_equal(got, np.array(want, np.float32))


def test_f64_to_f32_and_whole_numbers():
    x = X.astype(np.float64) * (1 + 2.0**-30)
    for mode in MODES:
        got = evaluate(f"cvt.{mode}.f32.f64 %d, %a0;", [x], "f32", into=np.float32)
        np.testing.assert_array_equal(got, np.array([rounded(Fraction(v), "f32", mode) for v in x], np.float32))
    for mode, function in WHOLE.items():
        got = evaluate(f"cvt.{mode}.f32.f32 %d, %a0;", [X], "f32", into=np.float32)
        np.testing.assert_array_equal(got, function(X))


@pytest.mark.parametrize(
    ("form", "function"),
    [
        ("u8.u32", lambda a: a & 0xFF),
        ("s8.s32", lambda a: ((a & 0xFF) ^ 0x80) - 0x80),
        ("s32.s16", lambda a: ((a & 0xFFFF) ^ 0x8000) - 0x8000),
        ("u32.u16", lambda a: a & 0xFFFF),
        ("sat.s8.s32", lambda a: max(-128, min(127, (a ^ 2**31) - 2**31))),
        ("sat.u8.s32", lambda a: max(0, min(255, (a ^ 2**31) - 2**31))),
        ("sat.s32.u32", lambda a: min(2**31 - 1, a)),
    ],
)
def test_integer_to_integer(form, function):
    a = np.array([0, 1, 127, 128, 255, 256, 0x7FFF, 0x8000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFF7F], np.uint32)
    inputs = a.astype(np.uint16) if form.endswith("16") else a
    got = evaluate(f"cvt.{form} %d, %a0;", [inputs])
    np.testing.assert_array_equal(got, np.array([function(int(v)) & 0xFFFFFFFF for v in a], np.uint32))
