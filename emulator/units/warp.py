"""Exchange within a warp: shfl, vote, match, redux, activemask, elect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Immediate, Instruction, Pair, Register, registers_of
from hotloop.emulator.types import PRED, U32, Array, Type

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

_BITS = np.uint32(1) << np.arange(32, dtype=np.uint32)
_FULL = np.uint32(0xFFFFFFFF)


# ---------------------------------------------------------------------- what the emitted code calls
def ballot(P: Array) -> Array:
    """Per lane the mask of the lanes of its warp that are set."""
    packed = np.packbits(P.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).ravel()
    return np.repeat(packed, 32)


def require_members(X: Machine, k: int, members: Array, M: Array, F: bool, what: str) -> None:
    """`.sync` with a member mask: every named lane must be there, and each lane must name itself."""
    if F and np.ndim(members) == 0 and int(members) == _FULL:
        return
    members = np.broadcast_to(members, X.lanes)
    there = ballot(M | X.exited)
    absent = M & ((members & ~there) != 0)
    if absent.any():
        X.report("divergent-warp", k, np.flatnonzero(absent), f"{what} names lanes that are not there")
    alone = M & ((members & _BITS[np.arange(X.lanes) & 31]) == 0)
    if alone.any():
        X.report("divergent-warp", k, np.flatnonzero(alone), f"{what} by a lane that its member mask does not name")


def shuffle(
    X: Machine,
    k: int,
    mode: str,
    a: Array,
    b: Array,
    c: Array,
    members: Array,
    M: Array,
    F: bool,
    source: int,
    into: int,
) -> tuple[Array, Array]:
    require_members(X, k, members, M, F, f"shfl.{mode}")
    lane = np.arange(X.lanes) & 31
    b = np.asarray(b).astype(np.int64) & 31
    c = np.asarray(c).astype(np.int64)
    clamp, segment = c & 31, (c >> 8) & 31
    limit = (lane & segment) | (clamp & ~segment)
    if mode == "up":
        j = lane - b
        valid = j >= limit
    elif mode == "down":
        j = lane + b
        valid = j <= limit
    elif mode == "bfly":
        j = lane ^ b
        valid = j <= limit
    else:
        j = (lane & segment) | (b & ~segment)
        valid = j <= limit
    j = np.where(valid, j, lane)
    at = (np.arange(X.lanes) & ~31) + j
    if not F:
        silent = M & ~M[at]
        if silent.any():
            X.report("divergent-warp", k, np.flatnonzero(silent), f"shfl.{mode} reads a lane that does not take part")
    if X.taint.any:
        tainted = X.taint.any.get(source)
        X.taint.put((into,), None if tainted is None else tainted[at], M)
    return np.broadcast_to(a, X.lanes)[at], np.broadcast_to(valid, X.lanes)


def vote_result(X: Machine, k: int, mode: str, p: Array, members: Array, M: Array, F: bool) -> Array:
    require_members(X, k, members, M, F, f"vote.{mode}")
    yes, there = ballot(M & p) & members, ballot(M) & members
    if mode == "ballot":
        return yes
    if mode == "any":
        return yes != 0
    if mode == "all":
        return yes == there
    return (yes == there) | (yes == 0)


def match_result(
    X: Machine, k: int, everyone: bool, a: Array, members: Array, M: Array, F: bool
) -> tuple[Array, Array]:
    """(lanes with the same value, whether all members have it)"""
    require_members(X, k, members, M, F, "match")
    rows = np.broadcast_to(a, X.lanes).reshape(-1, 32)
    present = M.reshape(-1, 32)
    same = (rows[:, :, None] == rows[:, None, :]) & present[:, None, :]
    mask = (same * _BITS).sum(2, dtype=np.uint32).ravel() & members
    if not everyone:
        return mask, mask
    agreed = mask == (ballot(M) & members)
    return np.where(agreed, mask, np.uint32(0)), agreed


def reduce_warp(X: Machine, k: int, operation: str, v: Array, members: Array, M: Array, F: bool) -> Array:
    require_members(X, k, members, M, F, f"redux.{operation}")
    v = np.broadcast_to(v, X.lanes)
    members = np.broadcast_to(members, X.lanes)
    ufunc = {
        "add": np.add,
        "min": np.fmin if v.dtype.kind == "f" else np.minimum,
        "max": np.fmax if v.dtype.kind == "f" else np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[operation]
    out = v.copy()
    # Subsets of a warp may reduce apart from each other: one round for each different mask.
    left = M.copy()
    while left.any():
        first = np.argmax(left.reshape(-1, 32), axis=1)
        chosen = np.repeat(members.reshape(-1, 32)[np.arange(X.warps), first], 32)
        group = left & (members == chosen)
        neutral = _neutral(operation, v.dtype)
        values = np.where(group, v, neutral).reshape(-1, 32)
        total = np.repeat(ufunc.reduce(values, axis=1).astype(v.dtype), 32)
        out = np.where(group, total, out)
        left &= ~group
    return out


def _neutral(operation: str, dtype: Any) -> Any:
    if operation in ("add", "or", "xor"):
        return dtype.type(0)
    if operation == "and":
        return ~dtype.type(0)
    if dtype.kind == "f":
        return dtype.type(np.nan)
    info = np.iinfo(dtype)
    return dtype.type(info.max if operation == "min" else info.min)


def elect_leader(X: Machine, k: int, members: Array, M: Array, F: bool) -> tuple[Array, Array]:
    """elect.sync: the lowest member is the leader."""
    require_members(X, k, members, M, F, "elect")
    there = ballot(M) & members
    lowest = there & (~there + np.uint32(1))
    index = np.bitwise_count(lowest - np.uint32(1)) if hasattr(np, "bitwise_count") else np.log2(np.maximum(lowest, 1))
    index = index.astype(np.uint32)
    return index, index == (np.arange(X.lanes) & 31)


# ---------------------------------------------------------------------- emitters
def shuffle_sync(g: Generator, i: Instruction) -> list[str]:
    target, a, b, c, *members = i.operands
    mode = i.one_of("bfly", "up", "down", "idx")
    if mode is None or not i.has("sync") or not members:
        raise i.unsupported("shfl without .sync is not emulated")
    d = target.first if isinstance(target, Pair) else target
    bits = Type("b", 32)
    source = a.index if isinstance(a, Register) else -1
    into = d.index if isinstance(d, Register) else -1
    mask, full = g.mask(i)
    values = ", ".join((g.value(a, bits), g.value(b, U32), g.value(c, U32), g.value(members[0], U32)))
    lines = [
        f"P = {mask}",
        f"v, p = {g.use(shuffle)}(X, {i.index}, {mode!r}, {values}, P, {full}, {source}, {into})",
    ]
    for o, name, t in ((d, "v", bits), (target.second if isinstance(target, Pair) else None, "p", PRED)):
        if isinstance(o, Register):
            e = g.stored(name, t, o.index)
            lines.append(f"R[{o.index}] = {e} if {full} else merge(P, {e}, R[{o.index}])")
    return lines


def vote(g: Generator, i: Instruction) -> list[str]:
    d, p, *members = i.operands
    mode = i.one_of("ballot", "any", "all", "uni")
    if mode is None or not members:
        raise i.unsupported("vote without .sync is not emulated")
    mask, full = g.mask(i)
    predicate = f"np.full(X.lanes, {bool(p.value)})" if isinstance(p, Immediate) else g.value(p, PRED)
    call = f"{g.use(vote_result)}(X, {i.index}, {mode!r}, {predicate}, {g.value(members[0], U32)}, {mask}, {full})"
    return g.assign(i, [(d, call, U32 if mode == "ballot" else PRED)], uniform=False, warp=True)


def match(g: Generator, i: Instruction) -> list[str]:
    target, a, members = i.operands
    mask, full = g.mask(i)
    bits = Type("b", i.type.bits)
    values = f"{g.value(a, bits)}, {g.value(members, U32)}"
    call = f"{g.use(match_result)}(X, {i.index}, {i.has('all')}, {values}, {mask}, {full})"
    first = target.first if isinstance(target, Pair) else target
    results = [(first, "v[0]", U32)]
    if isinstance(target, Pair):
        results.append((target.second, "v[1]", PRED))
    return [f"v = {call}", *g.assign(i, results, uniform=False, warp=True)]


def redux(g: Generator, i: Instruction) -> list[str]:
    d, a, members = i.operands
    operation = i.one_of("add", "min", "max", "and", "or", "xor")
    if i.has("abs", "NaN"):
        raise i.unsupported()
    mask, full = g.mask(i)
    arguments = f"{operation!r}, {g.value(a, i.type)}, {g.value(members, U32)}, {mask}, {full}"
    return g.assign(i, [(d, f"{g.use(reduce_warp)}(X, {i.index}, {arguments})", i.type)], uniform=False, warp=True)


def active_mask(g: Generator, i: Instruction) -> list[str]:
    return g.assign(i, [(i.operands[0], f"{g.use(ballot)}({g.mask(i)[0]})", U32)], uniform=False)


def elect(g: Generator, i: Instruction) -> list[str]:
    target, members = i.operands
    mask, full = g.mask(i)
    assert isinstance(target, Pair)
    lines = [f"v = {g.use(elect_leader)}(X, {i.index}, {g.value(members, U32)}, {mask}, {full})"]
    results = [
        (o, e, t) for o, e, t in ((target.first, "v[0]", U32), (target.second, "v[1]", PRED)) if list(registers_of(o))
    ]
    return lines + g.assign(i, results, uniform=False, warp=True)


EMITTERS: dict[str, Emitter] = {
    "shfl": shuffle_sync,
    "vote": vote,
    "match": match,
    "redux": redux,
    "activemask": active_mask,
    "elect": elect,
}
