"""cvt: between integers and floats of all widths, in every rounding mode PTX gives them."""

from __future__ import annotations

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Instruction
from hotloop.emulator.types import SINT, UINT, Array, Type

WHOLE = {"rni": "rint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}


# ---------------------------------------------------------------------- what the emitted code calls
def float_to_int(x: Array, kind: str, bits: int, mode: str) -> Array:
    """Saturating. NaN gives 0, but 2^(bits-1) as a bit pattern where the source or the result has 64 bits."""
    wide = x.astype(np.float64)
    y = getattr(np, WHOLE[mode])(wide)
    t = (SINT if kind == "s" else UINT)[bits]
    info = np.iinfo(t)
    nan = np.isnan(wide)
    y = np.where(nan, 0.0, y)
    # The largest 64-bit integers are no float64 numbers: compare first, convert what fits.
    above, below = y >= float(info.max), y <= float(info.min)
    fits = np.where(above | below, 0.0, y).astype(t)
    out = np.where(above, t(info.max), np.where(below, t(info.min), fits))
    if nan.any() and (bits == 64 or x.dtype == np.float64):
        out = np.where(nan, UINT[bits](1 << (bits - 1)).view(t), out)
    return out


def int_to_float(x: Array, fmt: str, mode: str) -> Array:
    """64-bit integers are rounded to odd in float64 first."""
    if x.dtype.itemsize < 8:
        return numeric.round_to(x.astype(np.float64), fmt, mode) if fmt != "f64" else x.astype(np.float64)
    if fmt == "f64":
        if mode == "rn":
            return x.astype(np.float64)
        high_part = (x >> 32).astype(np.float64) * 4294967296.0
        low_part = (x & x.dtype.type(0xFFFFFFFF)).astype(np.float64)
        nearest = high_part + low_part
        error = (high_part - nearest) + low_part
        up = np.nextafter(nearest, np.inf)
        down = np.nextafter(nearest, -np.inf)
        toward = {"rm": -np.inf, "rp": np.inf}.get(mode)
        if toward is None:
            wrong = (error != 0) & ((error < 0) == (nearest > 0))
            return np.where(wrong, np.where(nearest > 0, down, up), nearest)
        wrong = error < 0 if toward < 0 else error > 0
        return np.where(wrong, down if toward < 0 else up, nearest)
    high_part = (x >> 32).astype(np.float64) * 4294967296.0
    low_part = (x & x.dtype.type(0xFFFFFFFF)).astype(np.float64)
    return numeric.round_to(numeric.odd_sum(high_part, low_part), fmt, mode)


def narrow(x: Array, fmt: str, mode: str) -> Array:
    """A float to a narrower format, as float64."""
    return numeric.round_to(x.astype(np.float64), fmt, mode)


def to_tf32(x: Array, mode: str) -> Array:
    """float32 -> tf32, kept as float32 bits whose low 13 are zero."""
    return numeric.round_to(x.astype(np.float64), "tf32", mode).astype(np.float32).view(np.uint32)


def saturate_int(x: Array, kind: str, bits: int) -> Array:
    info = np.iinfo((SINT if kind == "s" else UINT)[bits])
    low, high = info.min, info.max
    if x.dtype.kind == "u":
        return np.minimum(x, x.dtype.type(min(high, np.iinfo(x.dtype).max))).astype(info.dtype)
    own = np.iinfo(x.dtype)
    return np.clip(x, max(low, own.min), min(high, own.max)).astype(info.dtype)


def infinite_to_largest(x: Array, fmt: str) -> Array:
    """.satfinite: overflow gives the largest finite number."""
    return np.clip(x, -numeric.LARGEST[fmt], numeric.LARGEST[fmt])


# ---------------------------------------------------------------------- emitters
def convert(g: Generator, i: Instruction) -> list[str]:
    if len(i.types) < 2:
        raise i.unsupported("a conversion the emulator does not know")
    to, source = i.types[0], i.types[1]
    if to.is_packed:
        return _packed(g, i, to, source)
    if "tf32" in i.modifiers:
        mode = i.one_of("rn", "rna", "rz")
        if i.modifiers.index("tf32") > i.modifiers.index("f32") or mode is None:
            raise i.unsupported()
        x = g.value(i.operands[1], source)
        x = f"{_relu(i, x)}"
        return g.assign(i, [(i.operands[0], f"{g.use(to_tf32)}({x}, {mode!r})", Type("u", 32))])
    if source.is_packed or any(m.startswith(("e4m3", "e5m2", "e2m", "e3m2", "ue8")) for m in i.modifiers):
        raise i.unsupported("8-bit and smaller floats are not emulated")
    d, a = i.operands
    x = g.value(a, source)
    if to.is_float and source.is_float:
        return g.assign(i, [(d, _float_to_float(g, i, x, to, source), to)])
    if to.is_float:
        return g.assign(i, [(d, _int_to_float(g, i, x, to, source), to)])
    if source.is_float:
        mode = i.one_of(*WHOLE)
        if mode is None:
            raise i.unsupported("a conversion to an integer without its rounding")
        if i.has("ftz"):
            x = f"{g.use(numeric.flush)}({x})"
        return g.assign(i, [(d, f"{g.use(float_to_int)}({x}, {to.kind!r}, {to.bits}, {mode!r})", to)])
    if i.has("sat"):
        return g.assign(i, [(d, f"{g.use(saturate_int)}({x}, {to.kind!r}, {to.bits})", to)])
    cast = f"{'I' if source.kind == 's' else 'U'}{to.bits}"
    expression = x if to.bits == source.bits else f"{x}.astype({cast})"
    return g.assign(i, [(d, f"({expression}).view({'I' if to.kind == 's' else 'U'}{to.bits})", to)])


def _name(t: Type) -> str:
    return "bf16" if t.kind == "bf" else f"f{t.bits}"


def _relu(i: Instruction, x: str) -> str:
    return f"np.where({x} <= 0, F32(0), {x})" if i.has("relu") else x


def _float_to_float(g: Generator, i: Instruction, x: str, to: Type, source: Type) -> str:
    """bf16 values are held as float32, and rounded to nearest when stored."""
    whole = i.one_of(*WHOLE)
    if i.has("ftz") and source == Type("f", 32):
        x = f"{g.use(numeric.flush)}({x})"
    x = _relu(i, x)
    if whole:
        x = f"np.{WHOLE[whole]}({x})"
    mode = i.one_of("rn", "rz", "rm", "rp", "rna") or "rn"
    held = "F32" if to.kind == "bf" else f"F{to.bits}"
    if to.bits < source.bits and (mode != "rn" or i.has("satfinite") or (to.kind == "bf" and source.bits == 64)):
        x = f"{g.use(narrow)}({x}, {_name(to)!r}, {mode!r})"
        if i.has("satfinite"):
            x = f"{g.use(infinite_to_largest)}({x}, {_name(to)!r})"
    if to != source:
        x = f"{x}.astype({held})"
    if i.has("ftz") and to == Type("f", 32):
        x = f"{g.use(numeric.flush)}({x})"
    return f"{g.use(numeric.saturate)}({x})" if i.has("sat") else x


def _int_to_float(g: Generator, i: Instruction, x: str, to: Type, source: Type) -> str:
    mode = i.one_of("rn", "rz", "rm", "rp") or "rn"
    held = "F32" if to.kind == "bf" else f"F{to.bits}"
    # numpy rounds once, to nearest even, but float16 and bf16 take the way over float32.
    if mode == "rn" and to.kind == "f" and to.bits >= 32:
        x = f"{x}.astype({held})"
    else:
        x = f"{g.use(int_to_float)}({x}, {_name(to)!r}, {mode!r}).astype({held})"
    return f"{g.use(numeric.saturate)}({x})" if i.has("sat") else x


def _packed(g: Generator, i: Instruction, to: Type, source: Type) -> list[str]:
    """cvt.bf16x2.f32 d, a, b: a becomes the upper half."""
    if len(i.operands) != 3 or source != Type("f", 32) or to.kind == "f32x2" or i.has("rs"):
        raise i.unsupported("a packed conversion the emulator does not know")
    d, upper, lower = i.operands
    mode = i.one_of("rn", "rz") or "rn"
    fmt = "bf16" if to.kind == "bf16x2" else "f16"

    def half(x: str) -> str:
        x = _relu(i, x)
        if mode != "rn" or i.has("satfinite"):
            x = f"{g.use(narrow)}({x}, {fmt!r}, {mode!r})"
            if i.has("satfinite"):
                x = f"{g.use(infinite_to_largest)}({x}, {fmt!r})"
            x = f"{x}.astype(F32)"
        return f"{g.use(numeric.to_bf16)}({x})" if fmt == "bf16" else f"({x}).astype(F16).view(U16)"

    pair = f"{g.use(numeric.pack)}({half(g.value(lower, source))}, {half(g.value(upper, source))})"
    return g.assign(i, [(d, pair, Type("b", 32))])


EMITTERS: dict[str, Emitter] = {"cvt": convert}
