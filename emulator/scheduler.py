"""Runs the blocks of a program for the resident CTAs: which threads go next, barriers, and what ends or never ends.

lockstep   The first block in reconvergence order that holds threads runs, for all of them. Who has waited very long
           goes first all the same, so that a thread that spins on a lock cannot starve the one that holds it.
random     A random set of warps (warpgroups in kernels with wgmma) runs alone for a random number of blocks, then
           another.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from hotloop.emulator.flow import EXIT, Block, End
from hotloop.emulator.machine import Machine
from hotloop.emulator.syntax import Immediate, Instruction, Operand, Register
from hotloop.emulator.types import Array

# Steps without a visible change (a store, a changing atomic, a barrier passed, threads that ended) after which
PATIENCE = 64  # whole warps that wait are run out of order,
STALLED_STEPS = 1024  # parts of warps are,
QUIET_STEPS = 4096  # a repeated state is a livelock,
HOPELESS_STEPS = 1 << 20  # any state is one.


class Barriers:
    """Threads at CTA barriers, by (id, next block, instruction)."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.waiting: dict[tuple[int, int, int], Array] = {}
        self.arrived: dict[int, Array] = {}  # warps that passed bar.arrive, by id

    def _scalar(self, operand: Operand, mask: Array, index: int) -> int:
        if isinstance(operand, Immediate):
            return operand.value
        assert isinstance(operand, Register)
        values = self.m.registers[operand.index]
        assert values is not None
        seen = np.unique(values[mask])
        if len(seen) != 1:
            raise self.m.unsupported(index, "a barrier whose operands differ between threads")
        return int(seen[0])

    def operands(self, i: Instruction, mask: Array) -> tuple[int, int | None]:
        """(id, number of threads or None for the whole CTA)"""
        given = list(i.operands)
        if i.has("red"):
            given = given[1:-1]
        ident = self._scalar(given[0], mask, i.index) if given else 0
        return ident, self._scalar(given[1], mask, i.index) if len(given) > 1 else None

    def arrive(self, i: Instruction, mask: Array) -> None:
        ident, _ = self.operands(i, mask)
        warps: Array = np.logical_or.reduce(mask.reshape(-1, 32), axis=1)
        old = self.arrived.get(ident)
        self.arrived[ident] = warps if old is None else old | warps

    def enter(self, end: End, mask: Array) -> None:
        i = end.instruction
        assert i is not None
        m = self.m
        lanes = mask.reshape(-1, 32)
        part = lanes.any(1) & ~(lanes | m.exited.reshape(-1, 32)).all(1)
        if part.any() and (i.opcode == "bar" or i.has("aligned")):
            m.report(
                "divergent-barrier",
                i.index,
                np.flatnonzero(np.repeat(part, 32) & mask),
                "a barrier met by part of a warp",
            )
        ident, _ = self.operands(i, mask)
        key = (ident, end.targets[0], i.index)
        old = self.waiting.get(key)
        self.waiting[key] = mask if old is None else old | mask

    def release(self) -> list[tuple[int, Array]]:
        """Groups that may go on, as (block, mask)."""
        free: list[tuple[int, Array]] = []
        for ident in {key[0] for key in self.waiting}:
            keys = [key for key in self.waiting if key[0] == ident]
            free += self._release(ident, keys)
        return free

    def _release(self, ident: int, keys: list[tuple[int, int, int]]) -> list[tuple[int, Array]]:
        m = self.m
        masks = [self.waiting[key] for key in keys]
        together = masks[0] if len(masks) == 1 else np.logical_or.reduce(masks)
        first = m.program.body.instructions[keys[0][2]]
        wanted = self.operands(first, masks[0])[1]
        arrived = self.arrived.get(ident)
        shape = (m.cta_count, -1)
        if wanted is None:
            missing = ~(together | m.exited)
            if arrived is not None:
                missing &= ~np.repeat(arrived, 32)
            ready = ~missing.reshape(shape).any(1) & together.reshape(shape).any(1)
        else:
            warps = together.reshape(-1, 32).any(1)
            if arrived is not None:
                warps = warps | arrived
            ready = (warps.reshape(shape).sum(1) * 32 >= wanted) & together.reshape(shape).any(1)
        if not ready.any():
            return []
        lanes = np.repeat(ready, m.lanes // m.cta_count)
        everyone = bool(ready.all())
        going = together if everyone else together & lanes
        if len(keys) > 1 and wanted is None:
            places = sum(mask.reshape(shape).any(1).astype(int) for mask in masks)
            split = (places > 1) & ready
            if split.any():
                m.report(
                    "divergent-barrier",
                    keys[0][2],
                    np.flatnonzero(np.repeat(split, m.lanes // m.cta_count) & masks[0]),
                    "warps of one CTA meet one barrier at different places",
                )
        part = None
        if arrived is not None:
            warps_ready = np.repeat(ready, m.warps_per_cta)
            part = arrived & warps_ready
            rest = arrived & ~warps_ready
            if rest.any():
                self.arrived[ident] = rest
            else:
                del self.arrived[ident]
        m.clocks.barrier(np.logical_or.reduce(going.reshape(-1, 32), axis=1), part)
        free = []
        for key, mask in zip(keys, masks, strict=True):
            now = mask if everyone else mask & lanes
            if not now.any():
                continue
            self._reduce(m.program.body.instructions[key[2]], now)
            free.append((key[1], now))
            if everyone:
                del self.waiting[key]
            else:
                left = mask & ~lanes
                if left.any():
                    self.waiting[key] = left
                else:
                    del self.waiting[key]
        m.changes += 1
        return free

    def _reduce(self, i: Instruction, mask: Array) -> None:
        """bar.red: every thread gets the count, conjunction or disjunction of the CTA's predicates."""
        if not i.has("red"):
            return
        m = self.m
        d, source = i.operands[0], i.operands[-1]
        assert isinstance(d, Register)
        predicate = source if isinstance(source, Register) else getattr(source, "register", None)
        if predicate is None:
            raise m.unsupported(i.index, "a reduction of a constant")
        values = m.registers[predicate.index]
        assert values is not None
        values = values if isinstance(source, Register) else ~values
        shape = (m.cta_count, -1)
        votes, there = (values & mask).reshape(shape).sum(1), mask.reshape(shape).sum(1)
        out = {"popc": votes.astype(np.uint32), "and": votes == there, "or": votes > 0}[
            i.one_of("popc", "and", "or") or ""
        ]
        new = np.repeat(out, m.lanes // m.cta_count)
        old = m.registers[d.index]
        m.registers[d.index] = new if old is None else np.where(mask, new, old)

    def deadlock(self) -> None:
        for (ident, _, index), mask in self.waiting.items():
            m = self.m
            m.report(
                "barrier-deadlock",
                index,
                np.flatnonzero(mask),
                f"{int(mask.sum())} threads wait at barrier {ident} and no thread is left that could come",
            )


class Scheduler:
    def __init__(self, machine: Machine, random: np.random.Generator | None) -> None:
        self.m = machine
        self.random = random
        self.blocks: list[Block] = machine.program.blocks
        self.all = machine.everyone
        self.barriers = machine.barriers = Barriers(machine)
        self.work: dict[int, Array] = {}
        self.since: dict[int, int] = {}
        self.step = 0
        self.unit = 128 if machine.program.has_wgmma else 32
        self.chosen: Array | None = None
        self.left_of_turn = 0
        self.quiet_since = 0
        self.changes = -1
        self.snapshot: tuple[int, int, dict[int, Array], list[Any]] | None = None

    def push(self, block: int, mask: Array) -> None:
        if block == EXIT:
            self.m.exited = self.m.exited | mask
            self.m.changes += 1
            return
        old = self.work.get(block)
        if old is not None:
            mask = old | mask
        else:
            self.since[block] = self.step
        if mask is not self.all and np.array_equal(mask, self.all):
            mask = self.all
        self.work[block] = mask

    def run(self) -> None:
        m, work = self.m, self.work
        functions, tally = m.program.functions, m.counters
        registers = m.registers
        whole = not m.padded
        self.push(0, self.all)
        while True:
            if not work:
                for block, mask in self.barriers.release():
                    self.push(block, mask)
                if not work:
                    break
            k, mask = self._next()
            while True:
                self.step += 1
                full = whole and mask is self.all
                if mask is self.all:
                    tally.block_warps[k] += m.warps
                    tally.block_threads[k] += m.cta_count * m.threads
                else:
                    tally.block_warps[k] += int(np.count_nonzero(mask.reshape(-1, 32).any(1)))
                    tally.block_threads[k] += int(np.count_nonzero(mask))
                functions[k](m, registers, mask, full)
                follow = self._end(k, self.blocks[k].end, mask)
                if follow is None or follow == EXIT:
                    if follow == EXIT:
                        self.push(EXIT, mask)
                    break
                if self.random is not None or self.step & 0xFF == 0 or (work and min(work) <= follow):
                    self.push(follow, mask)
                    break
                k = follow
            if self.barriers.waiting:
                for block, freed in self.barriers.release():
                    self.push(block, freed)
            if m.changes != self.changes or self.step - self.quiet_since > QUIET_STEPS:
                stuck = self._stuck(k)
                if stuck:
                    return
        if self.barriers.waiting:
            self.barriers.deadlock()
        m.copies.finish()
        m.wgmma.finish()

    # ------------------------------------------------------------------ who goes next
    def _next(self) -> tuple[int, Array]:
        if self.random is not None:
            return self._next_random()
        work = self.work
        if len(work) > 1 and self.step - self.quiet_since > PATIENCE:
            late = self._impatient()
            if late is not None:
                return late
        k = min(work)
        return k, work.pop(k)

    def _impatient(self) -> tuple[int, Array] | None:
        """Nothing has changed for a while: the first block whose warps have waited long and have no lane further back.
        If nothing has changed for very long (a lock in a warp), parts of warps will do, but not to meet a barrier."""
        blocks = sorted(self.work)
        behind = np.zeros(self.m.warps, bool)
        stalled = self.step - self.quiet_since > STALLED_STEPS
        for before, block in pairwise(blocks):
            behind |= self.work[before].reshape(-1, 32).any(1)
            if self.step - self.since[block] <= PATIENCE:
                continue
            mask = self.work[block]
            any_lane = stalled and self.blocks[block].end.kind != "barrier"
            ready = mask if any_lane else mask & ~np.repeat(behind, 32)
            if ready.any():
                self._take(block, ready)
                return block, ready
        return None

    def _take(self, block: int, part: Array) -> None:
        rest = self.work[block] & ~part
        if rest.any():
            self.work[block] = rest
            self.since[block] = self.step
        else:
            del self.work[block]

    def _next_random(self) -> tuple[int, Array]:
        work, rng = self.work, self.random
        assert rng is not None
        while True:
            if self.chosen is None or self.left_of_turn <= 0:
                present = np.logical_or.reduce(list(work.values())).reshape(-1, self.unit).any(1)
                units = np.flatnonzero(present)
                share = rng.choice((0.0, 0.25, 0.5, 1.0))
                pick = rng.random(len(units)) < share
                pick[rng.integers(len(units))] = True
                chosen = np.zeros(len(present), bool)
                chosen[units[pick]] = True
                self.chosen = np.repeat(chosen, self.unit)
                self.left_of_turn = int(rng.geometric(1 / 6))
            for k in sorted(work):
                part = work[k] & self.chosen
                if part.any():
                    self.left_of_turn -= 1
                    if np.array_equal(part, work[k]):
                        return k, work.pop(k)
                    self.work[k] = work[k] & ~part
                    return k, part
            self.chosen = None

    # ------------------------------------------------------------------ how a block ends
    def _end(self, k: int, end: End, mask: Array) -> int | None:
        """The block that all threads go to, or None where they part (then they have been put to work)."""
        m = self.m
        if end.kind == "jump":
            return end.targets[0]
        i = end.instruction
        assert i is not None
        if end.kind == "barrier":
            self.barriers.enter(end, mask)
            return None
        if end.predicate >= 0 and m.taint.any:
            m.require_defined("a branch condition", i.index, (end.predicate,), mask)
        if end.kind == "table":
            selector = m.registers[end.predicate]
            assert selector is not None
            values = selector.view(np.uint32)
            for value in np.unique(values[mask]):
                if value >= len(end.targets):
                    raise m.unsupported(i.index, f"index {value} of a branch table of {len(end.targets)}")
                self.push(end.targets[int(value)], mask & (values == value))
            return None
        if end.predicate < 0:  # an unconditional trap
            self._trap(i, mask)
            return None
        predicate = m.registers[end.predicate]
        assert predicate is not None
        taken = mask & (~predicate if end.negated else predicate)
        if end.kind == "trap":
            if taken.any():
                self._trap(i, taken)
            rest = mask & ~taken
            if rest.any():
                self.push(end.targets[0], rest)
            return None
        if not taken.any():
            return end.targets[1]
        if np.array_equal(taken, mask):
            return end.targets[0]
        self.push(end.targets[0], taken)
        self.push(end.targets[1], mask & ~taken)
        return None

    def _trap(self, i: Instruction, mask: Array) -> None:
        what = "an assertion failed" if i.has("assert") else "the kernel trapped"
        self.m.report("trap", i.index, np.flatnonzero(mask), what)
        self.push(EXIT, mask)

    # ------------------------------------------------------------------ livelock
    def _stuck(self, k: int) -> bool:
        m = self.m
        if m.changes != self.changes:
            self.changes, self.quiet_since, self.snapshot = m.changes, self.step, None
            return False
        quiet = self.step - self.quiet_since
        if quiet < QUIET_STEPS:
            return False
        if quiet > HOPELESS_STEPS:
            self._livelock("for a million steps")
            return True
        if self.snapshot is None or self.step - self.snapshot[0] > 16 * QUIET_STEPS:
            self.snapshot = (self.step, k, dict(self.work), list(m.registers))
            return False
        at, block, work, registers = self.snapshot
        if self.step - at < QUIET_STEPS or block != k or work.keys() != self.work.keys():
            return False
        same = all(np.array_equal(work[b], self.work[b]) for b in work) and all(
            a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
            for a, b in zip(registers, m.registers, strict=True)
        )
        if same:
            self._livelock("and their state repeats")
        return same

    def _livelock(self, how: str) -> None:
        m = self.m
        spinning = np.logical_or.reduce(list(self.work.values()))
        block = min(self.work)
        code = self.blocks[block]
        i = code.instructions[0] if code.instructions else code.end.instruction
        rest = m.launch.grid_size - m.cta_count
        hint = f"; {rest} CTAs of the grid are not resident" if rest else ""
        m.report(
            "livelock",
            i.index if i else 0,
            np.flatnonzero(spinning),
            f"{int(spinning.sum())} threads spin, nothing they can see changes {how}{hint}",
        )
