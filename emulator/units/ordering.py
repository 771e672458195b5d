"""Fences and barriers that do not end a block: membar, fence, bar.warp.sync, bar.arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.generator import Emitter, Generator
from hotloop.emulator.syntax import Instruction
from hotloop.emulator.types import U32, Array
from hotloop.emulator.units.warp import require_members

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine


def fence_memory(X: Machine, P: Array) -> None:
    if X.clocks.world is not None:
        X.ordering.fence(np.logical_or.reduce(P.reshape(-1, 32), axis=1))


def synchronise_warp(X: Machine, k: int, members: Array, P: Array, F: bool) -> None:
    require_members(X, k, members, P, F, "bar.warp.sync")
    X.clocks.warp_barrier(np.logical_or.reduce(P.reshape(-1, 32), axis=1))


def fence(g: Generator, i: Instruction) -> list[str]:
    mask = g.mask(i)[0]
    if i.has("proxy"):
        if not i.has("async", "async.global", "async.shared::cta") or i.has("tensormap::generic"):
            raise i.unsupported("this proxy fence is not emulated")
        return [f"X.wgmma.proxy_fence({mask})"]
    if i.has("mbarrier_init") or "cluster" in i.modifiers:
        raise i.unsupported("mbarriers and clusters are not emulated")
    return [f"{g.use(fence_memory)}(X, {mask})"]


def barrier(g: Generator, i: Instruction) -> list[str]:
    """Barriers that block are handled by the scheduler."""
    if "cluster" in i.modifiers:
        raise i.unsupported("clusters are not emulated")
    mask, full = g.mask(i)
    if i.has("arrive"):
        return [f"X.barriers.arrive(X.program.body.instructions[{i.index}], {mask})"]
    if i.has("warp"):
        return [f"{g.use(synchronise_warp)}(X, {i.index}, {g.value(i.operands[0], U32)}, {mask}, {full})"]
    raise i.unsupported()


EMITTERS: dict[str, Emitter] = {"membar": fence, "fence": fence, "bar": barrier, "barrier": barrier}
