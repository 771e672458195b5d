"""ld and st in every state space."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.generator import Emitter, Generator, items
from hotloop.emulator.memory import DEFINED, GLOBAL_BASE, LOCAL_WINDOW, SHARED_WINDOW, space_of
from hotloop.emulator.syntax import Address, Discard, Immediate, Instruction, Register, Symbol, registers_of
from hotloop.emulator.types import UINT, Array, Type

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

_WINDOW = {1: SHARED_WINDOW, 2: LOCAL_WINDOW}


# ---------------------------------------------------------------------- global memory
def locate(
    X: Machine, k: int, offset: Array, size: int, lanes: Array | None, *, store: bool
) -> tuple[Array, Array | None, Array | None]:
    """(offsets made harmless, accesses that must be dropped, accesses with undefined bytes); None: none of them."""
    arena = X.arena
    who = lambda bad: np.flatnonzero(bad) if lanes is None else lanes[bad]
    odd = (offset & (size - 1)) != 0
    if odd.any():
        place = arena.place(int(offset[odd][0]))
        X.report("misaligned", k, who(odd), f"a {size}-byte access to global memory", place.buffer, place.offset)
    given = offset
    harmful = odd | (offset.view(np.uint64) > len(arena.data) - size)
    if harmful.any():
        offset = np.where(harmful, 0, offset)  # the arena begins with a guard zone
    if arena.good(offset, size):
        return offset, None, None
    absent, undefined, constant = arena.flags(offset, size)
    outside = absent & ~odd
    if outside.any():
        place = arena.place(int(given[outside][0]))
        X.report("out-of-bounds", k, who(outside), f"{size} bytes {place.text}", place.buffer, place.offset)
    drop = absent
    if store and constant.any():
        place = arena.place(int(given[constant][0]))
        X.report("out-of-bounds", k, who(constant), "a write to constant memory", place.buffer, place.offset)
        drop = absent | constant
    undefined &= ~absent
    return offset, drop if drop.any() else None, undefined if undefined.any() else None


def fetch(data: Array, offset: Array, size: int) -> Array:
    """Bytes of `size`-byte accesses, (accesses, size)."""
    if size <= 8:
        return data.view(UINT[8 * size]).take(offset // size).view(np.uint8).reshape(-1, size)
    wide = data.view(np.complex128)
    if size == 16:
        return wide.take(offset >> 4).view(np.uint8).reshape(-1, 16)
    return wide[(offset >> 4)[:, None] + np.arange(size // 16)].view(np.uint8).reshape(-1, size)


def spread(X: Machine, raw: Array, bits: int, count: int, lanes: Array | None) -> list[Array]:
    """Bytes per access -> `count` arrays over all lanes."""
    parts = raw.view(UINT[bits]).reshape(-1, count).T
    if lanes is None:
        return list(np.ascontiguousarray(parts))
    out = np.zeros((count, X.lanes), UINT[bits])
    out[:, lanes] = parts
    return list(out)


def nothing_loaded(X: Machine, bits: int, count: int) -> list[Array]:
    return [np.zeros(X.lanes, UINT[bits])] * count


def taint_loaded(
    X: Machine, destinations: tuple[int, ...], undefined: Array | None, lanes: Array | None, P: Array
) -> None:
    if undefined is None and not X.taint.any:
        return
    found = None
    if undefined is not None:
        found = np.zeros(X.lanes, bool)
        found[slice(None) if lanes is None else lanes] = undefined
    X.taint.put(destinations, found, P)


def load_global(
    X: Machine, k: int, address: Array, P: Array, F: bool, bits: int, count: int, into: tuple[int, ...], order: str
) -> list[Array]:
    size = bits // 8 * count
    lanes = None if F else np.flatnonzero(P)
    if lanes is not None:
        if not len(lanes):
            return nothing_loaded(X, bits, count)
        address = address[lanes]
    offset, drop, undefined = locate(X, k, address.view(np.int64) - GLOBAL_BASE, size, lanes, store=False)
    X.counters.memory(k, X.warp_of if lanes is None else X.warp_of[lanes], offset, size, store=False)
    if undefined is not None:
        X.saw_undefined = True
    if X.races is not None:
        raced = X.races.on_read(k, lanes, offset, size, strong=bool(order))
        if raced is not None:
            X.racy_reads.add(k)
            undefined = raced if undefined is None else undefined | raced
    if order and X.clocks.world is not None:
        X.ordering.read(X.warp_of if lanes is None else X.warp_of[lanes], offset, acquire=order == "acquire")
    raw = fetch(X.arena.data, offset, size)
    if drop is not None:
        raw[drop] = 0
    taint_loaded(X, into, undefined, lanes, P)
    return spread(X, raw, bits, count, lanes)


def store_global(
    X: Machine, k: int, address: Array, P: Array, F: bool, values: list[Array], sources: tuple[int, ...], order: str
) -> None:
    lanes = None if F else np.flatnonzero(P)
    if lanes is not None and not len(lanes):
        return
    X.require_defined("data stored to global memory", k, sources, P)
    raw = gather_values(values, lanes)
    size = raw.shape[1]
    if lanes is not None:
        address = address[lanes]
    offset, drop, undefined = locate(X, k, address.view(np.int64) - GLOBAL_BASE, size, lanes, store=True)
    X.counters.memory(k, X.warp_of if lanes is None else X.warp_of[lanes], offset, size, store=True)
    X.changes += 1
    if drop is not None:
        lanes = np.flatnonzero(~drop) if lanes is None else lanes[~drop]
        offset, raw = offset[~drop], raw[~drop]
        if not len(lanes):
            return
    if X.races is not None:
        X.races.on_write(k, lanes, offset, size, raw, strong=bool(order))
    if order and X.clocks.world is not None:
        X.ordering.write(X.warp_of if lanes is None else X.warp_of[lanes], offset, release=order == "release")
    put(X.arena.data, offset, raw)
    if undefined is not None or drop is not None:
        X.arena.shadow[offset[:, None] + np.arange(size)] |= np.uint8(DEFINED)
    if not order:
        found = fetch(X.arena.data, offset, size)
        wrong = (found != raw).any(1)
        if wrong.any() and size in (4, 8):
            words = UINT[8 * size]
            wrong &= ~X.both_nan(k, np.ascontiguousarray(found).view(words)[:, 0], raw.view(words)[:, 0])
        if wrong.any():
            X.report_conflict(k, lanes, offset, wrong)


def put(data: Array, offset: Array, raw: Array) -> None:
    size = raw.shape[1]
    if size <= 8:
        data.view(UINT[8 * size])[offset // size] = raw.view(UINT[8 * size]).ravel()
    elif size == 16:
        data.view(np.complex128)[offset >> 4] = raw.view(np.complex128).ravel()
    else:
        data.view(np.complex128)[(offset >> 4)[:, None] + np.arange(size // 16)] = raw.view(np.complex128)


def gather_values(values: list[Array], lanes: Array | None) -> Array:
    """Bytes of the accesses, (accesses, size)."""
    if lanes is not None:
        values = [v[lanes] for v in values]
    packed = values[0] if len(values) == 1 else np.stack(values, 1)
    return np.ascontiguousarray(packed).view(np.uint8).reshape(len(values[0]), -1)


# ---------------------------------------------------------------------- shared memory
def load_shared(
    X: Machine, k: int, address: Array, P: Array, F: bool, bits: int, count: int, into: tuple[int, ...], order: str
) -> list[Array]:
    size = bits // 8 * count
    lanes = None if F else np.flatnonzero(P)
    if lanes is not None:
        if not len(lanes):
            return nothing_loaded(X, bits, count)
        address = address[lanes]
    plan = X.shared.plan(k, address, lanes, size)
    raw, undefined = X.shared.load(k, plan, size, strong=bool(order))
    taint_loaded(X, into, undefined, lanes, P)
    return spread(X, raw, bits, count, lanes)


def store_shared(
    X: Machine, k: int, address: Array, P: Array, F: bool, values: list[Array], sources: tuple[int, ...], order: str
) -> None:
    lanes = None if F else np.flatnonzero(P)
    if lanes is not None:
        if not len(lanes):
            return
        address = address[lanes]
    raw = gather_values(values, lanes)
    plan = X.shared.plan(k, address, lanes, raw.shape[1])
    X.changes += 1
    X.shared.store(k, plan, raw, atomic=bool(order))
    if X.taint.any:
        tainted = X.taint.of(sources)
        if tainted is not None:
            X.shared.undefine(plan, tainted[plan.owners])


# ---------------------------------------------------------------------- local memory, of each thread its own
def _local(X: Machine, k: int, address: Array, size: int, lanes: Array) -> tuple[Array, Array]:
    """(offsets in the batch's local memory, accesses inside it)"""
    offset = address.view(np.int64)
    bad = (offset < 0) | (offset + size > X.program.body.local_bytes)
    if bad.any():
        X.report(
            "out-of-bounds",
            k,
            lanes[bad],
            f"{size} bytes at offset {int(offset[bad][0])} of {X.program.body.local_bytes} bytes of local memory",
            "local",
            int(offset[bad][0]),
        )
    odd = (offset & (size - 1)) != 0
    if odd.any():
        X.report("misaligned", k, lanes[odd], f"a {size}-byte access to local memory", "local", int(offset[odd][0]))
        offset = offset & ~(size - 1)
    return np.where(bad, 0, offset) + lanes * X.local.shape[1], ~bad


def load_local(
    X: Machine, k: int, address: Array, P: Array, F: bool, bits: int, count: int, into: tuple[int, ...], order: str
) -> list[Array]:
    lanes = np.flatnonzero(P)
    if not len(lanes):
        return nothing_loaded(X, bits, count)
    size = bits // 8 * count
    offset, inside = _local(X, k, address[lanes], size, lanes)
    every = offset[:, None] + np.arange(size)
    undefined = ~X.local_defined.reshape(-1)[every].all(1) & inside if X.program.body.local_bytes else ~inside & False
    taint_loaded(X, into, undefined if undefined.any() else None, lanes, P)
    return spread(X, X.local.reshape(-1)[every] * inside[:, None], bits, count, lanes)


def store_local(
    X: Machine, k: int, address: Array, P: Array, F: bool, values: list[Array], sources: tuple[int, ...], order: str
) -> None:
    lanes = np.flatnonzero(P)
    if not len(lanes):
        return
    raw = gather_values(values, lanes)
    offset, inside = _local(X, k, address[lanes], raw.shape[1], lanes)
    every = (offset[:, None] + np.arange(raw.shape[1]))[inside]
    X.local.reshape(-1)[every] = raw[inside]
    tainted = X.taint.of(sources)
    defined = np.ones(len(lanes), bool) if tainted is None else ~tainted[lanes]
    X.local_defined.reshape(-1)[every] = defined[inside][:, None]


# ---------------------------------------------------------------------- generic addresses
def _by_space(X: Machine, address: Array, P: Array, F: bool) -> list[tuple[int, Array, Array, bool]]:
    """(space, address in it, mask, every lane) for each space that a generic access touches."""
    space = space_of(address)
    present = np.unique(space if F else space[P])
    found = []
    for s in present:
        inner = address if s == 0 else address - np.uint64(_WINDOW[int(s)])
        found.append((int(s), inner, P if len(present) == 1 else P & (space == s), F and len(present) == 1))
    return found


def load_generic(
    X: Machine, k: int, address: Array, P: Array, F: bool, bits: int, count: int, into: tuple[int, ...], order: str
) -> list[Array]:
    out = nothing_loaded(X, bits, count)
    for space, inner, mask, full in _by_space(X, address, P, F):
        load = (load_global, load_shared, load_local)[space]
        part = load(X, k, inner, mask, full, bits, count, into, order)
        out = part if full else [np.where(mask, new, old) for new, old in zip(part, out, strict=True)]
    return out


def store_generic(
    X: Machine, k: int, address: Array, P: Array, F: bool, values: list[Array], sources: tuple[int, ...], order: str
) -> None:
    for space, inner, mask, full in _by_space(X, address, P, F):
        (store_global, store_shared, store_local)[space](X, k, inner, mask, full, values, sources, order)


# ---------------------------------------------------------------------- emitters
LOADS = {"global": load_global, "shared": load_shared, "local": load_local, "generic": load_generic}
STORES = {"global": store_global, "shared": store_shared, "local": store_local, "generic": store_generic}
ORDERS = {"relaxed": "relaxed", "volatile": "relaxed", "mmio": "relaxed", "acquire": "acquire", "release": "release"}


def space(i: Instruction) -> str:
    if i.has("shared::cluster"):
        raise i.unsupported("shared memory of other CTAs is not emulated")
    found = i.one_of("global", "const", "shared", "shared::cta", "local")
    return {"const": "global", "shared::cta": "shared", None: "generic"}.get(found, found or "generic")


def address_check(i: Instruction, operand: Address, mask: str = "P") -> str:
    registers = tuple(registers_of(operand))
    return f"if X.taint.any: X.require_defined('an address', {i.index}, {registers}, {mask})"


def load(g: Generator, i: Instruction) -> list[str]:
    target, source = i.operands[:2]
    assert isinstance(source, Address)
    t = i.type
    if t.bits == 128:
        raise i.unsupported("128-bit registers are not emulated")
    destinations = items(target)
    bits = Type("b", t.bits)
    where = space(i)
    if i.has("param"):
        base = source.base
        if isinstance(base, Symbol) and base.space == "param":
            value = f"X.parameter({base.name!r}, {source.offset}, U{t.bits}, {len(destinations)})"
            results = []
            for j, d in enumerate(destinations):
                if not isinstance(d, Discard):
                    results.append(
                        (
                            d,
                            f"{value}[{j}]" + (f".view(I{t.bits})" if t.kind == "s" else ""),
                            t if t.kind == "s" else bits,
                        )
                    )
            return g.assign(i, results, uniform=False)
        if not isinstance(base, Symbol):
            raise i.unsupported("parameters are read by name")
        where = "local"
    into = tuple(d.index for d in destinations if isinstance(d, Register))
    mask, full = g.mask(i)
    order = next((ORDERS[m] for m in i.modifiers if m in ORDERS), "")
    lines = [f"P = {mask}"]
    if into and any(True for _ in registers_of(source)):
        lines.append(address_check(i, source))
    arguments = f"X, {i.index}, {g.address(source)}, P, {full}, {t.bits}, {len(destinations)}, {into}, {order!r}"
    lines.append(f"v = {g.use(LOADS[where])}({arguments})")
    for j, d in enumerate(destinations):
        if isinstance(d, Discard):
            continue
        assert isinstance(d, Register)
        if t.kind == "f":
            g.float_votes[d.index] += 1
        e = g.stored(f"v[{j}].view(I{t.bits})", t, d.index) if t.kind == "s" else g.stored(f"v[{j}]", bits, d.index)
        lines.append(f"R[{d.index}] = {e} if {full} else merge(P, {e}, R[{d.index}])")
    return lines


def store(g: Generator, i: Instruction) -> list[str]:
    target, source = i.operands[:2]
    assert isinstance(target, Address)
    t = i.type
    if t.bits == 128:
        raise i.unsupported("128-bit registers are not emulated")
    where = "local" if i.has("param") else space(i)
    values = []
    for o in items(source):
        if isinstance(o, Immediate) and t.kind == "f":
            values.append(f"X.full({g.value(o, t)}.view(U{t.bits}))")
        else:
            values.append(g.wide(o, Type("b", t.bits)))
            if t.kind == "f" and isinstance(o, Register):
                g.float_votes[o.index] += 1
    mask, full = g.mask(i)
    order = next((ORDERS[m] for m in i.modifiers if m in ORDERS), "")
    sources = tuple(registers_of(source))
    lines = [f"P = {mask}"]
    if any(True for _ in registers_of(target)):
        lines.append(address_check(i, target))
    arguments = f"X, {i.index}, {g.address(target)}, P, {full}, [{', '.join(values)}], {sources}, {order!r}"
    return [*lines, f"{g.use(STORES[where])}({arguments})"]


EMITTERS: dict[str, Emitter] = {"ld": load, "ldu": load, "st": store}
