"""cp.async: global to shared memory without passing registers. See hotloop.emulator.copies for when it lands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.memory import GLOBAL_BASE
from hotloop.emulator.syntax import Address, Immediate, Instruction, Register
from hotloop.emulator.types import PRED, U32, Array
from hotloop.emulator.units.load_store import address_check, fetch, locate

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine


def copy_async(
    X: Machine, k: int, target: Array, source: Array, P: Array, F: bool, size: int, given: Array | None
) -> None:
    """given: bytes to read per lane, the rest is filled with zeros; None: all."""
    lanes = None if F else np.flatnonzero(P)
    if lanes is not None and not len(lanes):
        return
    plan = X.shared.plan(k, target if lanes is None else target[lanes], lanes, size)
    count = len(plan.lanes)
    X.changes += 1
    wanted = np.full(count, size) if given is None else given[plan.lanes].astype(np.int64)
    if given is None or int(wanted.min()) == size:
        data = _read(X, k, source, plan.lanes, size)
    else:
        data = np.zeros((count, size), np.uint8)
        for n in np.unique(wanted[wanted > 0]):
            at = np.flatnonzero(wanted == n)
            if n == size:
                data[at] = _read(X, k, source, plan.lanes[at], size)
                continue
            for byte in range(int(min(n, size))):
                data[at, byte] = _read(X, k, source + np.uint64(byte), plan.lanes[at], 1)[:, 0]
    X.copies.issue(k, plan, data)


def _read(X: Machine, k: int, source: Array, lanes: Array, size: int) -> Array:
    offset, drop, undefined = locate(X, k, source[lanes].view(np.int64) - GLOBAL_BASE, size, lanes, store=False)
    X.counters.memory(k, X.warp_of[lanes], offset, size, store=False)
    if X.races is not None:
        X.races.on_read(k, lanes, offset, size)
    if undefined is not None:
        X.report("uninitialised", k, lanes[undefined], "a cp.async of undefined global memory")
    raw = fetch(X.arena.data, offset, size)
    if drop is not None:
        raw[drop] = 0
    return raw


def copy(g: Generator, i: Instruction) -> list[str]:
    if i.modifiers[0] != "async" or i.has("bulk", "mbarrier"):
        raise i.unsupported("bulk copies and mbarriers are not emulated")
    mask, full = g.mask(i)
    if i.has("commit_group"):
        return [f"X.copies.commit({mask})"]
    if i.has("wait_all"):
        return [f"P = {mask}", "X.copies.commit(P)", f"X.copies.wait(P, {full}, 0)"]
    if i.has("wait_group"):
        pending = i.operands[0]
        assert isinstance(pending, Immediate)
        return [f"X.copies.wait({mask}, {full}, {pending.value})"]
    target, source, size, *rest = i.operands
    assert isinstance(target, Address)
    assert isinstance(source, Address)
    if not isinstance(size, Immediate):
        raise i.unsupported()
    if i.has("L2::cache_hint"):
        rest = rest[:-1]
    given = "None"
    if rest:
        register = rest[0]
        if isinstance(register, Register) and g.body.registers[register.index].kind == "pred":
            # The predicate says that the source is ignored.
            given = f"np.where({g.value(register, PRED)}, U32(0), U32({size.value}))"
        else:
            given = g.wide(register, U32)
    arguments = f"X, {i.index}, {g.address(target)}, {g.address(source)}, P, {full}, {size.value}, {given}"
    return [
        f"P = {mask}",
        address_check(i, target),
        address_check(i, source),
        f"{g.use(copy_async)}({arguments})",
    ]


EMITTERS: dict[str, Emitter] = {"cp": copy}
