"""Integer arithmetic, logic, shifts and bit fields."""

from __future__ import annotations

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Immediate, Instruction
from hotloop.emulator.types import SINT, U32, UINT, Array, Type

_WORD = np.uint64(0xFFFFFFFFFFFFFFFF)


# ---------------------------------------------------------------------- what the emitted code calls
def shift_left(x: Array, n: Array, bits: int) -> Array:
    """Amounts beyond the width give 0."""
    t = x.dtype.type
    return np.where(n < bits, x << np.minimum(n, np.uint32(bits - 1)).astype(t), t(0))


def shift_right(x: Array, n: Array, bits: int) -> Array:
    """Amounts beyond the width give 0, or copies of the sign."""
    t = x.dtype.type
    shifted = x >> np.minimum(n, np.uint32(bits - 1)).astype(t)
    return shifted if x.dtype.kind == "i" else np.where(n < bits, shifted, t(0))


def divide(a: Array, b: Array) -> Array:
    """Truncating division. Division by zero, which PTX leaves open, gives all ones as on current hardware."""
    a, b = np.broadcast_arrays(a, b)
    zero = b == 0
    t = a.dtype.type
    if a.dtype.kind == "u":
        return np.where(zero, t(np.iinfo(t).max), a // np.where(zero, t(1), b))
    unsigned = UINT[a.dtype.itemsize * 8]
    ua, ub = np.abs(a).view(unsigned), np.abs(np.where(zero, t(1), b)).view(unsigned)
    q = (ua // ub).view(t)
    return np.where(zero, t(-1), np.where((a < 0) != (b < 0), np.negative(q), q))


def remainder(a: Array, b: Array) -> Array:
    return a - divide(a, b) * b


def extract(x: Array, position: Array, length: Array, signed: bool, bits: int) -> Array:
    """bfe: bits [position, position + length); positions beyond the width read the sign or 0."""
    position = np.asarray(position).astype(np.uint64) & np.uint64(255)
    length = np.asarray(length).astype(np.uint64) & np.uint64(255)
    wide = x.astype(np.uint64)
    mask = _mask(length)
    field = np.where(position < bits, wide >> np.minimum(position, np.uint64(63)), np.uint64(0)) & mask
    if signed:
        # The sign is bit min(position + length - 1, width - 1) of x.
        last = np.minimum(position + length - np.uint64(1), np.uint64(bits - 1))
        sign = (length > 0) & (((wide >> np.minimum(last, np.uint64(63))) & np.uint64(1)) == 1)
        kept = np.minimum(
            length, np.where(position < bits, np.uint64(bits) - np.minimum(position, np.uint64(bits)), np.uint64(0))
        )
        field = np.where(sign, field | ~_mask(kept), field)
    return field.astype(UINT[bits])


def insert(a: Array, b: Array, position: Array, length: Array, bits: int) -> Array:
    """bfi: the low bits of a replace bits [position, position + length) of b."""
    position = np.asarray(position).astype(np.uint64) & np.uint64(255)
    length = np.asarray(length).astype(np.uint64) & np.uint64(255)
    amount = np.minimum(position, np.uint64(63))
    mask = np.where(position < bits, _mask(length) << amount, np.uint64(0))
    a, b = np.asarray(a).astype(np.uint64), np.asarray(b).astype(np.uint64)
    return ((b & ~mask) | ((a << amount) & mask)).astype(UINT[bits])


def _mask(length: Array) -> Array:
    return np.where(length >= 64, _WORD, (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1))


def permute(a: Array, b: Array, selector: Array, mode: str | None) -> Array:
    """prmt: four bytes of the eight of {b, a}, each chosen by four bits of the selector; bit 3 spreads the sign."""
    pair = np.asarray(a).astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    selector = np.asarray(selector).astype(np.uint64)
    out = np.zeros(np.broadcast(pair, selector).shape, np.uint64)
    base = selector & np.uint64(3)
    for j in range(4):
        n = np.uint64(j)
        if mode is None:
            pick = (selector >> np.uint64(4 * j)) & np.uint64(15)
        elif mode == "f4e":
            pick = base + n
        elif mode == "b4e":
            pick = (base - n) & np.uint64(7)
        elif mode == "rc8":
            pick = base
        elif mode == "ecl":
            pick = np.maximum(base, n)
        elif mode == "ecr":
            pick = np.minimum(base, n)
        else:
            pick = ((selector & np.uint64(1)) << np.uint64(1)) + np.uint64(j & 1)
        byte = (pair >> ((pick & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
        spread = (byte >> np.uint64(7)) * np.uint64(255)
        out |= np.where(pick & np.uint64(8) != 0, spread, byte) << np.uint64(8 * j)
    return out.astype(np.uint32)


def funnel(a: Array, b: Array, n: Array, left: bool, wrap: bool) -> Array:
    """shf: 32 bits of {b, a} shifted."""
    n = (n & np.uint32(31)) if wrap else np.minimum(n, np.uint32(32))
    both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
    n = np.asarray(n).astype(np.uint64)
    return ((both << n) >> np.uint64(32)).astype(np.uint32) if left else (both >> n).astype(np.uint32)


def logic3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits, as its truth table."""
    out = a ^ a
    for j in range(8):
        if table >> j & 1:
            out = out | ((a if j & 4 else ~a) & (b if j & 2 else ~b) & (c if j & 1 else ~c))
    return out


def count_ones(x: Array) -> Array:
    x = np.asarray(x).astype(np.uint64)
    for amount, mask in ((1, 0x5555555555555555), (2, 0x3333333333333333), (4, 0x0F0F0F0F0F0F0F0F)):
        x = (x & np.uint64(mask)) + ((x >> np.uint64(amount)) & np.uint64(mask))
    return ((x * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint32)


def highest_bit(x: Array) -> Array:
    """The position of the highest set bit, -1 for 0."""
    x = np.asarray(x).astype(np.uint64)
    out = np.full(x.shape, -1, np.int64)
    for amount in (32, 16, 8, 4, 2, 1):
        up = x >> np.uint64(amount)
        out = np.where(up > 0, out + amount, out)
        x = np.where(up > 0, up, x)
    return np.where(x > 0, out + 1, out)


def leading_zeros(x: Array, bits: int) -> Array:
    return (bits - 1 - highest_bit(x)).astype(np.uint32)


def find_leading(x: Array, bits: int, signed: bool, as_shift: bool) -> Array:
    """bfind: the highest bit that differs from the sign; all ones where there is none."""
    u = np.where(x < 0, ~x, x).view(UINT[bits]) if signed else x
    top = highest_bit(u)
    return np.where(top < 0, -1, bits - 1 - top if as_shift else top).astype(np.int32).view(np.uint32)


def reverse_bits(x: Array, bits: int) -> Array:
    x = np.asarray(x).astype(np.uint64)
    for amount, mask in (
        (1, 0x5555555555555555),
        (2, 0x3333333333333333),
        (4, 0x0F0F0F0F0F0F0F0F),
        (8, 0x00FF00FF00FF00FF),
    ):
        m = np.uint64(mask)
        x = ((x & m) << np.uint64(amount)) | ((x >> np.uint64(amount)) & m)
    x = ((x & np.uint64(0x0000FFFF0000FFFF)) << np.uint64(16)) | ((x >> np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF))
    if bits == 32:
        return (x & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    return (x << np.uint64(32)) | (x >> np.uint64(32))


def dot(a: Array, b: Array, c: Array, a_signed: bool, b_signed: bool) -> Array:
    """dp4a: the sum of four products of bytes."""

    def lanes(x: Array, signed: bool) -> list[Array]:
        parts = [
            ((np.asarray(x).view(np.uint32) >> np.uint32(8 * j)) & np.uint32(255)).astype(np.uint8) for j in range(4)
        ]
        return [(p.view(np.int8) if signed else p).astype(np.int64) for p in parts]

    total = sum(p * q for p, q in zip(lanes(a, a_signed), lanes(b, b_signed), strict=True))
    return (np.asarray(c).astype(np.int64) + total).astype(np.uint64).astype(np.uint32)


def clamp_signed(x: Array, bits: int) -> Array:
    """Saturation of exact 64-bit results (`.sat`)."""
    info = np.iinfo(SINT[bits])
    return np.clip(x, info.min, info.max).astype(SINT[bits])


def add_pairs(a: Array, b: Array, signed: bool) -> Array:
    return _as_pairs(np.add, a, b, signed)


def smaller_of_pairs(a: Array, b: Array, signed: bool) -> Array:
    return _as_pairs(np.minimum, a, b, signed)


def larger_of_pairs(a: Array, b: Array, signed: bool) -> Array:
    return _as_pairs(np.maximum, a, b, signed)


def _as_pairs(function: np.ufunc, a: Array, b: Array, signed: bool) -> Array:
    half = np.int16 if signed else np.uint16
    found: Array = function(np.ascontiguousarray(a).view(half), np.ascontiguousarray(b).view(half))
    return found.view(np.uint32)


# ---------------------------------------------------------------------- emitters
def pairs(g: Generator, i: Instruction) -> list[str]:
    """add, min and max of two 16-bit integers in each register (sm_90)."""
    if i.has("sat", "relu"):
        raise i.unsupported("saturation and .relu of pairs are not emulated")
    function = {"add": add_pairs, "min": smaller_of_pairs, "max": larger_of_pairs}.get(i.opcode)
    if function is None:
        raise i.unsupported()
    d, a, b = i.operands
    return g.assign(i, [(d, f"{g.use(function)}({g.wide(a, U32)}, {g.wide(b, U32)}, {i.has('s16x2')})", U32)])


def add_or_subtract(g: Generator, i: Instruction) -> list[str]:
    if i.has("u16x2", "s16x2"):
        return pairs(g, i)
    t, sign = i.type, "+" if i.opcode == "add" else "-"
    d, a, b = i.operands
    if i.has("cc"):
        raise i.unsupported("carry chains are not emulated")
    if i.has("sat"):
        wide = f"{g.value(a, t)}.astype(I64) {sign} {g.value(b, t)}.astype(I64)"
        return g.assign(i, [(d, f"{g.use(clamp_signed)}({wide}, {t.bits})", t)])
    bits = Type("u", t.bits)  # the same bits, signed or not
    return g.assign(i, [(d, f"{g.value(a, bits)} {sign} {g.value(b, bits)}", bits)])


def multiply(g: Generator, i: Instruction) -> list[str]:
    """mul and mad: the low, high or whole product, plus c."""
    t = i.type
    d, a, b, *rest = i.operands
    if i.has("cc", "sat"):
        raise i.unsupported("carry chains and saturation of products are not emulated")
    if i.has("wide"):
        out = Type(t.kind, 2 * t.bits)
        cast = f"{'I' if t.kind == 's' else 'U'}{out.bits}"
        product = f"{g.value(a, t)}.astype({cast}) * {g.value(b, t)}.astype({cast})"
    elif i.has("hi"):
        out = t
        x, y = g.value(a, t), g.value(b, t)
        if t.bits == 64:
            high = numeric.multiply_high64_signed if t.kind == "s" else numeric.multiply_high64
            product = f"{g.use(high)}({x}, {y})"
        else:
            wide, narrow = ("I64", f"I{t.bits}") if t.kind == "s" else ("U64", f"U{t.bits}")
            product = f"(({x}.astype({wide}) * {y}.astype({wide})) >> {wide}({t.bits})).astype({narrow})"
    else:
        out = Type("u", t.bits)
        product = f"{g.value(a, out)} * {g.value(b, out)}"
    return g.assign(i, [(d, f"{product} + {g.value(rest[0], out)}" if rest else product, out)])


def multiply24(g: Generator, i: Instruction) -> list[str]:
    t = i.type
    sign = "I" if t.kind == "s" else "U"
    wide = f"{sign}64"
    low = [f"(({g.value(o, t)} << {sign}32(8)) >> {sign}32(8)).astype({wide})" for o in i.operands[1:3]]
    product = f"({low[0]} * {low[1]})"
    part = f"({product} >> {wide}(16))" if i.has("hi") else product
    expression = f"{part}.astype({'I' if t.kind == 's' else 'U'}32)"
    if i.opcode == "mad24":
        expression = f"{expression} + {g.value(i.operands[3], t)}"
    return g.assign(i, [(i.operands[0], expression, t)])


def difference(g: Generator, i: Instruction) -> list[str]:
    t = i.type
    d, a, b, c = i.operands
    x, y = g.value(a, t), g.value(b, t)
    bits = Type("u", t.bits)
    distance = f"np.where({x} < {y}, {g.value(b, bits)} - {g.value(a, bits)}, {g.value(a, bits)} - {g.value(b, bits)})"
    return g.assign(i, [(d, f"{g.value(c, bits)} + {distance}", bits)])


def quotient(g: Generator, i: Instruction) -> list[str]:
    function = divide if i.opcode == "div" else remainder
    d, a, b = i.operands
    return g.assign(i, [(d, f"{g.use(function)}({g.value(a, i.type)}, {g.value(b, i.type)})", i.type)])


def extremum(g: Generator, i: Instruction) -> list[str]:
    if i.has("u16x2", "s16x2"):
        return pairs(g, i)
    function = "np.minimum" if i.opcode == "min" else "np.maximum"
    d, a, b = i.operands
    expression = f"{function}({g.value(a, i.type)}, {g.value(b, i.type)})"
    if i.has("relu"):
        expression = f"np.maximum({expression}, {g.constant(SINT[i.type.bits](0))})"
    return g.assign(i, [(d, expression, i.type)])


def negate(g: Generator, i: Instruction) -> list[str]:
    function = "np.negative" if i.opcode == "neg" else "np.abs"
    return g.assign(i, [(i.operands[0], f"{function}({g.value(i.operands[1], i.type)})", i.type)])


def logic(g: Generator, i: Instruction) -> list[str]:
    sign = {"and": "&", "or": "|", "xor": "^"}[i.opcode]
    d, a, b = i.operands
    return g.assign(i, [(d, f"{g.value(a, i.type)} {sign} {g.value(b, i.type)}", i.type)])


def complement(g: Generator, i: Instruction) -> list[str]:
    a = g.value(i.operands[1], i.type)
    expression = f"~{a}" if i.opcode == "not" else f"({a} == 0).astype(U{i.type.bits})"
    return g.assign(i, [(i.operands[0], expression, i.type)])


def shift(g: Generator, i: Instruction) -> list[str]:
    t = i.type
    d, a, n = i.operands
    if isinstance(n, Immediate) and n.value < t.bits:
        amount = g.constant((SINT if t.kind == "s" else UINT)[t.bits](n.value))
        return g.assign(i, [(d, f"{g.value(a, t)} {'<<' if i.opcode == 'shl' else '>>'} {amount}", t)])
    function = shift_left if i.opcode == "shl" else shift_right
    return g.assign(i, [(d, f"{g.use(function)}({g.value(a, t)}, {g.value(n, U32)}, {t.bits})", t)])


def funnel_shift(g: Generator, i: Instruction) -> list[str]:
    d, a, b, n = i.operands
    arguments = ", ".join(g.value(o, U32) for o in (a, b, n))
    return g.assign(i, [(d, f"{g.use(funnel)}({arguments}, {i.has('l')}, {i.has('wrap')})", U32)])


def field_extract(g: Generator, i: Instruction) -> list[str]:
    bits = Type("u", i.type.bits)
    d, a, position, length = i.operands
    arguments = f"{g.value(a, bits)}, {g.value(position, U32)}, {g.value(length, U32)}"
    return g.assign(i, [(d, f"{g.use(extract)}({arguments}, {i.type.kind == 's'}, {bits.bits})", bits)])


def field_insert(g: Generator, i: Instruction) -> list[str]:
    bits = Type("u", i.type.bits)
    d, a, b, position, length = i.operands
    arguments = f"{g.value(a, bits)}, {g.value(b, bits)}, {g.value(position, U32)}, {g.value(length, U32)}"
    return g.assign(i, [(d, f"{g.use(insert)}({arguments}, {bits.bits})", bits)])


def byte_permute(g: Generator, i: Instruction) -> list[str]:
    d, *abc = i.operands
    mode = i.one_of("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")
    return g.assign(i, [(d, f"{g.use(permute)}({', '.join(g.value(o, U32) for o in abc)}, {mode!r})", U32)])


def three_input_logic(g: Generator, i: Instruction) -> list[str]:
    d, a, b, c, table = i.operands
    if not isinstance(table, Immediate) or i.has("BoolOp", "or", "and"):
        raise i.unsupported()
    arguments = ", ".join(g.value(o, i.type) for o in (a, b, c))
    return g.assign(i, [(d, f"{g.use(logic3)}({arguments}, {table.value})", i.type)])


def counting(g: Generator, i: Instruction) -> list[str]:
    d, a = i.operands
    t = i.type
    x = g.value(a, t)
    if i.opcode == "popc":
        return g.assign(i, [(d, f"{g.use(count_ones)}({x})", U32)])
    if i.opcode == "clz":
        return g.assign(i, [(d, f"{g.use(leading_zeros)}({x}, {t.bits})", U32)])
    if i.opcode == "brev":
        return g.assign(i, [(d, f"{g.use(reverse_bits)}({x}, {t.bits})", t)])
    expression = f"{g.use(find_leading)}({x}, {t.bits}, {t.kind == 's'}, {i.has('shiftamt')})"
    return g.assign(i, [(d, expression, U32)])


def byte_dot(g: Generator, i: Instruction) -> list[str]:
    ta, tb = i.types
    d, a, b, c = i.operands
    arguments = ", ".join(g.value(o, U32) for o in (a, b))
    signed = Type("s" if "s" in (ta.kind, tb.kind) else "u", 32)
    expression = f"{g.use(dot)}({arguments}, {g.value(c, signed)}, {ta.kind == 's'}, {tb.kind == 's'})"
    return g.assign(i, [(d, expression, U32)])


EMITTERS: dict[str, Emitter] = {
    **dict.fromkeys(("and", "or", "xor"), logic),
    **dict.fromkeys(("not", "cnot"), complement),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("mul24", "mad24"), multiply24),
    **dict.fromkeys(("popc", "clz", "brev", "bfind"), counting),
    "shf": funnel_shift,
    "bfe": field_extract,
    "bfi": field_insert,
    "prmt": byte_permute,
    "lop3": three_input_logic,
    "sad": difference,
    "rem": quotient,
    "dp4a": byte_dot,
}
# Opcodes that serve integers and floats; units/floating.py chooses.
INTEGER: dict[str, Emitter] = {
    **dict.fromkeys(("add", "sub"), add_or_subtract),
    **dict.fromkeys(("mul", "mad"), multiply),
    **dict.fromkeys(("min", "max"), extremum),
    **dict.fromkeys(("neg", "abs"), negate),
    "div": quotient,
}
