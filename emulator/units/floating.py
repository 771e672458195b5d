"""Floating-point arithmetic in f16, bf16, f32 and f64, also packed in pairs.

The approximate functions (ex2, lg2, rcp, rsqrt, sqrt, sin, cos, tanh, div with .approx or .full) are computed in
float64 and rounded once: hardware differs from that by a few units in the last place, in a way that is not published.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Instruction, Operand
from hotloop.emulator.types import F32, FLOAT, PRED, Array, Type
from hotloop.emulator.units import integer

HALVES = {"f16x2": Type("f", 16), "bf16x2": Type("bf", 16), "f32x2": Type("f", 32)}
ROUNDINGS = ("rn", "rz", "rm", "rp")


# ---------------------------------------------------------------------- what the emitted code calls
def minimum(a: Array, b: Array) -> Array:
    """The number if the other is NaN; -0 is less than +0."""
    r = np.fmin(a, b)
    zero = r == 0
    return np.where(zero & (a == b), np.where(np.signbit(a), a, b), r) if zero.any() else r


def maximum(a: Array, b: Array) -> Array:
    r = np.fmax(a, b)
    zero = r == 0
    return np.where(zero & (a == b), np.where(np.signbit(a), b, a), r) if zero.any() else r


def minimum_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), minimum(a, b))


def maximum_nan(a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), maximum(a, b))


def fused_half(a: Array, b: Array, c: Array) -> Array:
    return numeric.odd_fma(a.astype(np.float64), b, c).astype(np.float16)


def fused_bf16(a: Array, b: Array, c: Array) -> Array:
    """bf16 values are held as float32."""
    return numeric.round_to(numeric.odd_fma(a, b, c), "bf16", "rn").astype(np.float32)


def directed(operation: str, mode: str, *arguments: Array) -> Array:
    """float32 arithmetic in a rounding mode of PTX, from exact (or rounded to odd) float64."""
    x = [np.asarray(a, np.float64) for a in arguments]
    if operation == "fma":
        exact = numeric.odd_fma(x[0], x[1], x[2])
    elif operation in ("add", "sub"):
        exact = numeric.odd_sum(x[0], x[1] if operation == "add" else -x[1])
    elif operation == "mul":
        exact = x[0] * x[1]
    elif operation == "div":
        # A quotient or root of 24-bit numbers is no closer than 2^-49 to a rounding boundary, unless it lies on it.
        exact = x[0] / x[1]
    elif operation == "rcp":
        exact = 1.0 / x[0]
    else:
        exact = np.sqrt(x[0])
    r = numeric.round_to(exact, "f32", mode).astype(np.float32)
    if mode == "rm" and operation in ("add", "sub", "fma"):
        # An exact cancellation is -0 when rounding down.
        r = np.where((r == 0) & (exact == 0) & ~_same_sign_zeros(operation, x), np.float32(-0.0), r)
    return r


def _same_sign_zeros(operation: str, x: list[Array]) -> Array:
    a = x[0] * x[1] if operation == "fma" else x[0]
    b = x[2] if operation == "fma" else (x[1] if operation == "add" else -x[1])
    return (a == 0) & (b == 0) & ~np.signbit(a) & ~np.signbit(b)


def approximate(function: str, x: Array) -> Array:
    """One of the functions of the special unit, rounded once to x's type."""
    wide = x.astype(np.float64)
    if function == "ex2":
        y = np.exp2(wide)
    elif function == "lg2":
        y = np.log2(wide)
    elif function == "rsqrt":
        y = 1.0 / np.sqrt(wide)
    elif function == "rcp":
        y = 1.0 / wide
    elif function == "sqrt":
        y = np.sqrt(wide)
    else:
        y = {"sin": np.sin, "cos": np.cos, "tanh": np.tanh}[function](wide)
    return y.astype(x.dtype)


def classify(x: Array, test: str) -> Array:
    finite, tiny = np.isfinite(x), np.finfo(x.dtype).tiny
    if test == "subnormal":
        return finite & (x != 0) & (np.abs(x) < tiny)
    if test == "normal":
        return finite & (np.abs(x) >= tiny)
    return {"finite": finite, "infinite": np.isinf(x), "number": ~np.isnan(x), "notanumber": np.isnan(x)}[test]


# ---------------------------------------------------------------------- emitters
def halves(g: Generator, operand: Operand, t: Type) -> tuple[list[str], str, Type]:
    """The two values of a packed operand, the pattern that packs results, and the type of each."""
    x = g.value(operand, t)
    if t.kind == "f32x2":
        pair = f"np.ascontiguousarray(X.full({x})).view(F32)"
        return [f"{pair}[0::2]", f"{pair}[1::2]"], f"{g.use(pack_f32)}({{}}, {{}})", HALVES[t.kind]
    parts = [f"{g.use(numeric.low)}({x})", f"{g.use(numeric.high)}({x})"]
    pack = g.use(numeric.pack)
    if t.kind == "bf16x2":
        back = g.use(numeric.to_bf16)
        parts = [f"{g.use(numeric.from_bf16)}({p})" for p in parts]
        return parts, f"{pack}({back}({{}}), {back}({{}}))", HALVES[t.kind]
    return [f"{p}.view(F16)" for p in parts], f"{pack}(({{}}).view(U16), ({{}}).view(U16))", HALVES[t.kind]


def pack_f32(lo: Array, hi: Array) -> Array:
    return np.stack([lo, hi], axis=-1).astype(np.float32).view(np.uint64).reshape(lo.shape)


def arithmetic(g: Generator, i: Instruction, formula: Callable[[list[str], Type], str]) -> list[str]:
    """Emit `formula` on the operands, once, or on each half of packed ones."""
    d, *sources = i.operands
    if len({(t.kind, t.bits) for t in i.types}) > 1:
        return g.assign(i, [(d, formula(widened(g, i, sources), F32), F32)])
    t = i.type
    if not t.is_packed:
        return g.assign(i, [(d, formula([g.value(o, t) for o in sources], t), t)])
    split = [halves(g, o, t) for o in sources]
    pattern, half = split[0][1], split[0][2]
    results = [formula([parts[j] for parts, _, _ in split], half) for j in (0, 1)]
    return g.assign(i, [(d, pattern.format(*results), Type("b", t.bits))])


def widened(g: Generator, i: Instruction, sources: Sequence[Operand]) -> list[str]:
    """add, sub and fma of .f32.f16 or .f32.bf16 (sm_100): all operands but the last are narrow, and widened first."""
    if i.opcode not in ("add", "sub", "fma") or i.types[0] != F32 or i.type.bits != 16 or not i.type.is_float:
        raise i.unsupported("mixed types are not emulated here")
    *narrow, last = sources
    return [*(f"{g.value(o, i.type)}.astype(F32)" for o in narrow), g.value(last, F32)]


def _finish(g: Generator, i: Instruction, t: Type, expression: str) -> str:
    if i.has("ftz") and t == Type("f", 32):
        expression = f"{g.use(numeric.flush)}({expression})"
    if i.has("sat"):
        expression = f"{g.use(numeric.saturate)}({expression})"
    if i.has("relu"):
        expression = f"{g.use(maximum)}({expression}, {'F16' if t.bits == 16 and t.kind == 'f' else 'F32'}(0))"
    return expression


def _inputs(g: Generator, i: Instruction, t: Type, arguments: list[str]) -> list[str]:
    """Subnormal inputs are zeros under .ftz."""
    if i.has("ftz") and t == Type("f", 32):
        return [f"{g.use(numeric.flush)}({a})" for a in arguments]
    return arguments


def basic(g: Generator, i: Instruction) -> list[str]:
    """add, sub, mul, fma, mad, div, rcp, sqrt with a rounding mode."""
    operation = "fma" if i.opcode == "mad" else i.opcode
    mode = i.one_of(*ROUNDINGS) or "rn"

    def formula(arguments: list[str], t: Type) -> str:
        arguments = _inputs(g, i, t, arguments)
        if mode != "rn":
            if t != Type("f", 32):
                raise i.unsupported("directed rounding is emulated for f32 only")
            return _finish(g, i, t, f"{g.use(directed)}({operation!r}, {mode!r}, {', '.join(arguments)})")
        if operation == "fma":
            fused = {"bf": fused_bf16, "f": {16: fused_half, 32: numeric.fma32, 64: numeric.fma64}[t.bits]}[t.kind]
            return _finish(g, i, t, f"{g.use(fused)}({', '.join(arguments)})")
        if operation == "sqrt":
            return _finish(g, i, t, f"np.sqrt({arguments[0]})")
        if operation == "rcp":
            return _finish(g, i, t, f"F{t.bits}(1) / {arguments[0]}")
        sign = {"add": "+", "sub": "-", "mul": "*", "div": "/"}[operation]
        return _finish(g, i, t, f"({arguments[0]} {sign} {arguments[1]})")

    return arithmetic(g, i, formula)


def special(g: Generator, i: Instruction) -> list[str]:
    """The approximate functions; rcp, sqrt and div have exact forms too."""
    if i.opcode in ("rcp", "sqrt") and i.has(*ROUNDINGS):
        return basic(g, i)

    def formula(arguments: list[str], t: Type) -> str:
        if i.opcode not in ("ex2", "sin", "cos", "tanh"):  # there a subnormal input acts as zero anyway
            arguments = _inputs(g, i, t, arguments)
        return _finish(g, i, t, f"{g.use(approximate)}({i.opcode!r}, {arguments[0]})")

    return arithmetic(g, i, formula)


def extremum(g: Generator, i: Instruction) -> list[str]:
    nan = i.has("NaN")
    function = (minimum_nan if nan else minimum) if i.opcode == "min" else (maximum_nan if nan else maximum)
    if i.has("xorsign", "abs"):
        raise i.unsupported("min and max with .xorsign.abs are not emulated")

    def formula(arguments: list[str], t: Type) -> str:
        first, *rest = _inputs(g, i, t, arguments)
        for a in rest:
            first = f"{g.use(function)}({first}, {a})"
        return first

    return arithmetic(g, i, formula)


def sign(g: Generator, i: Instruction) -> list[str]:
    function = "np.negative" if i.opcode == "neg" else "np.abs"
    return arithmetic(g, i, lambda a, t: f"{function}({_inputs(g, i, t, a)[0]})")


def copy_sign(g: Generator, i: Instruction) -> list[str]:
    return arithmetic(g, i, lambda a, t: f"np.copysign({a[1]}, {a[0]})")


def test_property(g: Generator, i: Instruction) -> list[str]:
    test = i.modifiers[0]
    if i.type.bits not in FLOAT:
        raise i.unsupported()
    return g.assign(i, [(i.operands[0], f"{g.use(classify)}({g.value(i.operands[1], i.type)}, {test!r})", PRED)])


def _either(floating: Emitter, opcode: str) -> Emitter:
    """By the type: this file's emitter or the integer unit's."""
    whole = integer.INTEGER[opcode]

    def emit(g: Generator, i: Instruction) -> list[str]:
        t = i.type
        return floating(g, i) if t.is_float or t.is_packed else whole(g, i)

    return emit


EMITTERS: dict[str, Emitter] = {
    **{o: _either(basic, o) for o in ("add", "sub", "mul", "mad", "div")},
    **{o: _either(extremum, o) for o in ("min", "max")},
    **{o: _either(sign, o) for o in ("neg", "abs")},
    **dict.fromkeys(("rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"), special),
    "fma": basic,
    "copysign": copy_sign,
    "testp": test_property,
}
