"""atom and red, in global and shared memory.

The lanes of one instruction act one after the other, in order of the lanes: each round takes every address at most
once.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator import numeric
from hotloop.emulator.generator import Emitter, Generator, items
from hotloop.emulator.memory import GLOBAL_BASE, SHARED_WINDOW, space_of
from hotloop.emulator.syntax import Address, Immediate, Instruction, Register, registers_of
from hotloop.emulator.types import FLOAT, SINT, UINT, Array, Type
from hotloop.emulator.units.floating import maximum, minimum
from hotloop.emulator.units.load_store import address_check, locate, space

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

OPERATIONS = ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")


# ---------------------------------------------------------------------- what the emitted code calls
def combine(operation: str, kind: str, bits: int, old: Array, x: Array, y: Array | None) -> Array:
    """The new value, as bits like the old one."""
    if operation == "exch":
        return x
    if operation == "cas":
        assert y is not None
        return np.where(old == x, y, old)
    if operation in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[operation](old, x)
    if operation == "inc":
        return np.where(old >= x, old.dtype.type(0), old + old.dtype.type(1))
    if operation == "dec":
        return np.where((old == 0) | (old > x), x, old - old.dtype.type(1))
    if kind in ("f16x2", "bf16x2"):
        half = "f" if kind == "f16x2" else "bf"
        parts = [combine(operation, half, 16, f(old), f(x), None) for f in (numeric.low, numeric.high)]
        return numeric.pack(*parts)
    if kind == "bf":
        return numeric.to_bf16(_arithmetic(operation, numeric.from_bf16(old), numeric.from_bf16(x)))
    typed = {"f": FLOAT, "s": SINT}.get(kind, UINT)[bits]
    return np.ascontiguousarray(_arithmetic(operation, old.view(typed), x.view(typed))).view(UINT[bits])


def _arithmetic(operation: str, a: Array, b: Array) -> Array:
    if operation == "add":
        return a + b
    if a.dtype.kind == "f":
        return minimum(a, b) if operation == "min" else maximum(a, b)
    return np.minimum(a, b) if operation == "min" else np.maximum(a, b)


def perform(
    memory: Array, at: Array, operation: str, kind: str, bits: int, x: Array, y: Array | None
) -> tuple[Array, bool]:
    """Update memory[at] in order; the old values, and whether anything changed."""
    old = np.empty(len(at), UINT[bits])
    order = np.argsort(at, kind="stable")
    turn = np.empty(len(at), np.int64)
    starts = np.flatnonzero(np.r_[True, at[order[1:]] != at[order[:-1]]])
    turn[order] = np.arange(len(at)) - np.repeat(starts, np.diff(np.r_[starts, len(at)]))
    changed = False
    by_turn = np.argsort(turn, kind="stable")
    bounds = np.flatnonzero(np.r_[True, turn[by_turn[1:]] != turn[by_turn[:-1]], True])
    for a, b in pairwise(bounds):
        now = by_turn[a:b]
        where = at[now]
        old[now] = memory[where]
        new = combine(operation, kind, bits, old[now], x[now], None if y is None else y[now])
        changed = changed or not np.array_equal(new, old[now])
        memory[where] = new
    return old, changed


def atomic(
    X: Machine,
    k: int,
    where: str,
    address: Array,
    P: Array,
    operation: str,
    kind: str,
    bits: int,
    values: list[Array],
    count: int,
    sources: tuple[int, ...],
    order: str,
) -> list[Array]:
    """count: elements of a vector form. Old values as arrays over all lanes."""
    out = [np.zeros(X.lanes, UINT[bits]) for _ in range(count)]
    lanes = np.flatnonzero(P)
    if not len(lanes):
        return out
    X.require_defined("an operand of an atomic", k, sources, P)
    if where == "generic":
        spaces = space_of(address)[lanes]
        if (spaces == 1).all():
            where, address = "shared", address - np.uint64(SHARED_WINDOW)
        elif (spaces == 0).all():
            where = "global"
        else:
            raise X.unsupported(k, "an atomic over several spaces, or on local memory")
    run = _global if where == "global" else _shared
    inputs = [np.ascontiguousarray(v).view(UINT[bits]) for v in values]
    for j in range(count):
        x = inputs[j][lanes]
        y = inputs[count + j][lanes] if operation == "cas" else None
        step = np.uint64(j * bits // 8)
        kept, old = run(X, k, address[lanes] + step, lanes, operation, kind, bits, x, y, order)
        out[j][kept] = old
    return out


def _global(
    X: Machine,
    k: int,
    address: Array,
    lanes: Array,
    operation: str,
    kind: str,
    bits: int,
    x: Array,
    y: Array | None,
    order: str,
) -> tuple[Array, Array]:
    size = bits // 8
    offset, drop, undefined = locate(X, k, address.view(np.int64) - GLOBAL_BASE, size, lanes, store=True)
    if undefined is not None:
        X.report("uninitialised", k, lanes[undefined], "an atomic on undefined memory")
    X.counters.memory(k, X.warp_of[lanes], offset, size, store=True)
    if drop is not None:
        lanes, offset, x, y = lanes[~drop], offset[~drop], x[~drop], None if y is None else y[~drop]
        if not len(lanes):
            return lanes, np.zeros(0, UINT[bits])
    if X.races is not None:
        X.races.on_write(k, lanes, offset, size, None, strong=True)
    if X.clocks.world is not None:
        X.ordering.update(
            X.warp_of[lanes], offset, acquire=order in ("acquire", "acq_rel"), release=order in ("release", "acq_rel")
        )
    old, changed = perform(X.arena.data.view(UINT[bits]), offset // size, operation, kind, bits, x, y)
    X.changes += changed
    return lanes, old


def _shared(
    X: Machine,
    k: int,
    address: Array,
    lanes: Array,
    operation: str,
    kind: str,
    bits: int,
    x: Array,
    y: Array | None,
    order: str,
) -> tuple[Array, Array]:
    size = bits // 8
    plan = X.shared.plan(k, np.ascontiguousarray(address), lanes, size)
    undefined = X.shared.begin_atomic(k, plan)
    if undefined is not None:
        X.report("uninitialised", k, lanes[undefined], "an atomic on undefined shared memory", "shared")
    old, changed = perform(X.shared.data.view(UINT[bits]), plan.byte // size, operation, kind, bits, x, y)
    X.shared.end_atomic(plan)
    X.changes += changed
    return lanes, old


# ---------------------------------------------------------------------- emitters
def emit(g: Generator, i: Instruction) -> list[str]:
    returns = i.opcode == "atom"
    operation = i.one_of(*OPERATIONS)
    if operation is None or i.has("async", "shared::cluster") or i.type.bits == 128:
        raise i.unsupported()
    target = i.operands[0] if returns else None
    where, *sources = i.operands[1 if returns else 0 :]
    assert isinstance(where, Address)
    if i.has("L2::cache_hint"):
        sources = sources[:-1]
    t = i.type
    raw = Type("b", t.bits)
    count = len(items(sources[0]))
    values = []
    for source in sources:
        for o in items(source):
            if isinstance(o, Immediate) and t.kind == "f":
                values.append(f"X.full({g.value(o, t)})")
            else:
                values.append(g.wide(o, raw))
    order = i.one_of("relaxed", "acquire", "release", "acq_rel") or "relaxed"
    read = tuple(r for s in sources for r in registers_of(s))
    mask, _ = g.mask(i)
    arguments = (
        f"X, {i.index}, {space(i)!r}, {g.address(where)}, P, {operation!r}, {t.kind!r}, {t.bits}, "
        f"[{', '.join(values)}], {count}, {read}, {order!r}"
    )
    lines = [f"P = {mask}", address_check(i, where), f"v = {g.use(atomic)}({arguments})"]
    for j, d in enumerate(items(target) if target is not None else ()):
        if isinstance(d, Register):
            lines.append(f"R[{d.index}] = merge(P, {g.stored(f'v[{j}]', raw, d.index)}, R[{d.index}])")
            lines.append(f"if X.taint.any: X.taint.put(({d.index},), None, P)")
    return lines


EMITTERS: dict[str, Emitter] = {"atom": emit, "red": emit}
