"""Moving, comparing and selecting: mov, cvta, setp, set, selp, slct, isspacep, and what needs no work."""

from __future__ import annotations

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.memory import LOCAL_WINDOW, SHARED_WINDOW, space_of
from hotloop.emulator.syntax import Discard, Immediate, Instruction, Operand, Pair, Register, Symbol, Vector
from hotloop.emulator.types import FLOAT, PRED, UINT, Type

_WINDOWS = {"shared": SHARED_WINDOW, "shared::cta": SHARED_WINDOW, "local": LOCAL_WINDOW}
_ORDERED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}


def compare(g: Generator, i: Instruction, a: Operand, b: Operand, t: Type) -> str:
    """The comparison named by the first modifier. On floats the plain ones are false for NaN, the ...u ones true."""
    x, y = g.value(a, t), g.value(b, t)
    if i.has("ftz") and t == Type("f", 32):
        x, y = f"{g.use(numeric.flush)}({x})", f"{g.use(numeric.flush)}({y})"
    name = i.modifiers[0]
    if name == "ne":
        return f"(({x} < {y}) | ({x} > {y}))" if t.is_float else f"({x} != {y})"
    if name in _ORDERED:
        return f"({x} {_ORDERED[name]} {y})"
    if name in _UNORDERED:
        return f"~({x} {_UNORDERED[name]} {y})"
    if name == "equ":
        return f"~(({x} < {y}) | ({x} > {y}))"
    if name == "neu":
        return f"({x} != {y})"
    if name in ("num", "nan"):
        unordered = f"(np.isnan({x}) | np.isnan({y}))"
        return unordered if name == "nan" else f"~{unordered}"
    raise i.unsupported("a comparison the emulator does not know")


def _combined(g: Generator, i: Instruction, condition: str) -> str:
    """`setp.lt.and p, a, b, c` combines with a predicate."""
    operator = i.one_of("and", "or", "xor")
    if operator is None:
        return condition
    return f"({condition} {({'and': '&', 'or': '|', 'xor': '^'})[operator]} {g.value(i.operands[3], PRED)})"


def set_predicate(g: Generator, i: Instruction) -> list[str]:
    d, a, b, *_ = i.operands
    t = i.type
    if t.is_packed:
        raise i.unsupported("comparisons of packed pairs are not emulated")
    condition = compare(g, i, a, b, t)
    if isinstance(d, Pair):
        both = [(d.first, _combined(g, i, condition), PRED), (d.second, _combined(g, i, f"~{condition}"), PRED)]
        return g.assign(i, both)
    return g.assign(i, [(d, _combined(g, i, condition), PRED)])


def set_value(g: Generator, i: Instruction) -> list[str]:
    d, a, b, *_ = i.operands
    out, t = i.types
    condition = _combined(g, i, compare(g, i, a, b, t))
    if out.kind == "f" and out.bits == 32:
        return g.assign(i, [(d, f"np.where({condition}, F32(1), F32(0))", out)])
    if out.is_float or out.is_packed:
        raise i.unsupported()
    ones = g.constant(UINT[out.bits](2**out.bits - 1))
    return g.assign(i, [(d, f"np.where({condition}, {ones}, U{out.bits}(0))", Type("u", out.bits))])


def select(g: Generator, i: Instruction) -> list[str]:
    d, a, b, p = i.operands
    # Bits are selected, so that a register keeps the form it has.
    t = i.type if i.type.kind == "f" else Type("b", i.type.bits)
    return g.assign(i, [(d, f"np.where({g.value(p, PRED)}, {g.value(a, t)}, {g.value(b, t)})", t)])


def select_by_sign(g: Generator, i: Instruction) -> list[str]:
    d, a, b, c = i.operands
    t, tc = i.types
    bits = Type("b", t.bits)
    return g.assign(i, [(d, f"np.where({g.value(c, tc)} >= 0, {g.value(a, bits)}, {g.value(b, bits)})", bits)])


def _index(operand: Operand) -> int:
    return operand.index if isinstance(operand, Register) else -1


def _with_taint(i: Instruction, lines: list[str], call: str) -> list[str]:
    """The lines of `assign` with its last one, which spreads taint, replaced."""
    return [*lines[:-1], f"if X.taint.any: X.taint.{call}{'M' if i.guard is None else 'P'})"]


def move(g: Generator, i: Instruction) -> list[str]:
    d, a = i.operands
    t = i.type
    if t.bits == 128:
        raise i.unsupported("128-bit registers are not emulated")
    if isinstance(d, Vector):
        width = t.bits // len(d.items)
        part, x = Type("u", width), g.value(a, Type("b", t.bits))
        mask = g.constant(UINT[t.bits](2**width - 1))
        pieces = [
            (o, f"(({x} >> U{t.bits}({width * j})) & {mask}).astype(U{width})", part)
            for j, o in enumerate(d.items)
            if not isinstance(o, Discard)
        ]
        return _with_taint(i, g.assign(i, pieces), f"unpack({tuple(map(_index, d.items))}, {_index(a)}, ")
    if isinstance(a, Vector):
        width = t.bits // len(a.items)
        parts = [
            f"({g.value(o, Type('b', width))}.astype(U{t.bits}) << U{t.bits}({width * j}))"
            for j, o in enumerate(a.items)
        ]
        lines = g.assign(i, [(d, " | ".join(parts), Type("u", t.bits))])
        return _with_taint(i, lines, f"pack({_index(d)}, {tuple(map(_index, a.items))}, ")
    if isinstance(a, Immediate) and t.kind != "pred":
        assert isinstance(d, Register)
        home = Type("f" if g.float_home[d.index] else "b", t.bits)
        if a.float_bits == 64 and t.bits == 32:
            bits = np.uint64(a.value).view(np.float64).astype(np.float32).view(np.uint32)
            a = Immediate(int(bits))
        constant = UINT[t.bits](a.value & (2**t.bits - 1))
        typed = constant.view(FLOAT[t.bits]) if home.kind == "f" else constant
        return g.assign(i, [(d, f"X.constant({g.constant(typed)})", home)], uniform=False)
    if isinstance(a, Register) and t.kind != "pred" and g.float_home[a.index]:
        return g.assign(i, [(d, g.value(a, Type("f", t.bits)), Type("f", t.bits))])
    plain = t if t.kind == "pred" or t.is_float else Type("b", t.bits)
    if plain.kind == "f" and isinstance(a, Register):
        plain = Type("b", t.bits)
    return g.assign(i, [(d, g.value(a, plain), plain)])


def convert_address(g: Generator, i: Instruction) -> list[str]:
    d, a = i.operands
    t = i.type
    space = i.one_of("global", "const", "param", "shared", "shared::cta", "local")
    if space is None or i.has("shared::cluster"):
        raise i.unsupported("addresses of clusters are not emulated")
    x = g.value(a, t)
    window = _WINDOWS.get(space, 0)
    if window and not (isinstance(a, Symbol) and i.has("to")):
        x = f"({x} {'-' if i.has('to') else '+'} {g.constant(UINT[t.bits](window))})"
    return g.assign(i, [(d, x, t)])


def is_space(g: Generator, i: Instruction) -> list[str]:
    d, a = i.operands
    space = i.one_of("global", "const", "param", "shared", "shared::cta", "local")
    if space is None:
        raise i.unsupported()
    number = {"shared": 1, "shared::cta": 1, "local": 2}.get(space, 0)
    return g.assign(i, [(d, f"({g.use(space_of)}({g.value(a, Type('u', 64))}) == {number})", PRED)])


def nothing(g: Generator, i: Instruction) -> list[str]:
    """Hints to caches, schedulers and profilers. Not `discard`, which leaves memory undefined: that is refused."""
    return []


EMITTERS: dict[str, Emitter] = {
    "setp": set_predicate,
    "set": set_value,
    "selp": select,
    "slct": select_by_sign,
    "mov": move,
    "cvta": convert_address,
    "isspacep": is_space,
    **dict.fromkeys(("prefetch", "prefetchu", "nanosleep", "griddepcontrol", "applypriority", "pmevent"), nothing),
}
