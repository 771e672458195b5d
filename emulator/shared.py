"""Shared memory of the resident CTAs, and its checks.

Every granule (4 bytes, or the narrowest access of the kernel) has a state word and a row of read marks:

    state  clock << 24 | (thread + 1) << 8 | flags       of the last write
    reads  clock << 6 | lane (32: several lanes)         of the last read by each warp

Synchronised code passes with three comparisons per access: everything that it touches is defined, not in flight, and
no younger than the last barrier of all. Only otherwise is it looked at lane by lane. Since kernels touch the same
addresses again and again, what depends on addresses alone (bounds, alignment, granules, bank conflicts) is kept as a
plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.types import UINT, Array

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

DEFINED, COPYING, GENERIC, READ_BY_WGMMA, ATOMIC = 1, 2, 4, 8, 16
_CLOCK, _THREAD = 24, 8
_PLAN_BYTES = 96 << 20


@dataclass(frozen=True)
class Plan:
    """One access of a set of lanes, as far as addresses decide it."""

    lanes: Array  # the lanes that access, one entry per access
    byte: Array  # where in the batch's shared memory
    granules: Array  # flat, in order of accesses
    owners: Array  # lane per granule
    marks: Array  # (thread + 1) << 8 per granule
    read_columns: Array  # granule * warps + warp
    read_codes: Array  # lane, or 32 where lanes of a warp share the granule
    outside: Array  # accesses whose address is out of bounds, before it was made harmless
    misaligned: Array
    requested: Array  # the addresses as given
    phases: int
    wavefronts: int


class Shared:
    def __init__(self, machine: Machine, size: int, granule: int) -> None:
        self.machine = machine
        self.size = size
        self.granule = granule
        self.stride = max(128, -(-size // 128) * 128)
        count = machine.cta_count * self.stride
        self.data = np.zeros(count, np.uint8)
        self.state = np.zeros(count // granule, np.int64)
        self.reads = np.zeros((count // granule, machine.warps_per_cta), np.int64)
        self.plans: dict[tuple[int, bytes, bytes], Plan] = {}
        self.plan_bytes = 0

    # ------------------------------------------------------------------ addresses
    def plan(self, index: int, address: Array, lanes: Array | None, size: int, lanes_per_phase: int = 0) -> Plan:
        key = (index, address.tobytes(), b"" if lanes is None else lanes.tobytes())
        found = self.plans.get(key)
        if found is None:
            found = self._make_plan(address, lanes, size, lanes_per_phase)
            self.plan_bytes += 40 * len(found.granules) + len(key[1]) + 1000
            if self.plan_bytes > _PLAN_BYTES:
                self.plans.clear()
                self.plan_bytes = 0
            self.plans[key] = found
        m = self.machine
        if len(found.misaligned):
            at = found.misaligned
            m.report(
                "misaligned",
                index,
                found.lanes[at],
                f"a {size}-byte access to shared memory",
                "shared",
                int(found.requested[at[0]]),
            )
        if len(found.outside):
            at = found.outside
            offset = int(found.requested[at[0]])
            m.report(
                "out-of-bounds",
                index,
                found.lanes[at],
                f"{size} bytes at offset {offset} of {self.size} bytes of shared memory",
                "shared",
                offset,
            )
        m.counters.shared(index, found.phases, found.wavefronts, len(found.lanes) * size)
        return found

    def _make_plan(self, address: Array, lanes: Array | None, size: int, lanes_per_phase: int) -> Plan:
        m = self.machine
        if lanes is None:
            lanes = np.arange(m.lanes)
        requested = address.view(np.int64)
        offset = requested
        misaligned = np.flatnonzero(offset & (size - 1))
        if len(misaligned):
            offset = offset & ~(size - 1)
        outside = np.flatnonzero((offset < 0) | (offset + size > self.size))
        if len(outside):
            offset = offset.copy()
            offset[outside] = 0
        byte = offset + m.cta_of[lanes] * self.stride
        per = max(1, size // self.granule)
        granules = byte // self.granule
        owners = lanes
        if per > 1:
            granules = (granules[:, None] + np.arange(per)).ravel()
            owners = np.repeat(lanes, per)
        columns = granules * m.warps_per_cta + m.warp_in_cta[owners]
        order = np.argsort(columns, kind="stable")
        same = columns[order[1:]] == columns[order[:-1]]
        codes = (owners & 31).astype(np.int64)
        if same.any():
            repeated = np.zeros(len(columns), bool)
            repeated[order[1:]] |= same
            repeated[order[:-1]] |= same
            codes = np.where(repeated, 32, codes)
        marks = (m.thread_of[owners] + 1).astype(np.int64) << _THREAD
        phases, wavefronts = bank_wavefronts(lanes, offset, size, lanes_per_phase)
        return Plan(
            lanes, byte, granules, owners, marks, columns, codes, outside, misaligned, requested, phases, wavefronts
        )

    # ------------------------------------------------------------------ checked access
    def load(self, index: int, plan: Plan, size: int, *, strong: bool = False) -> tuple[Array, Array | None]:
        """Bytes per access, (accesses, size), and which accesses read undefined ones (None: none)."""
        undefined = self.check_read(index, plan, strong=strong)
        raw: Array
        if size == 16:
            raw = self.data.view(np.complex128).take(plan.byte >> 4)
        elif size <= 8:
            raw = self.data.view(UINT[8 * size]).take(plan.byte // size)
        else:
            raw = self.data[plan.byte[:, None] + np.arange(size)]
        return raw.view(np.uint8).reshape(-1, size), undefined

    def plain_plan(self, granules: Array, owners: Array) -> Plan:
        """Reads of single granules by whole warps."""
        m, empty = self.machine, np.zeros(0, np.int64)
        columns = granules * m.warps_per_cta + m.warp_in_cta[owners]
        codes = np.full(len(granules), 32)
        return Plan(owners, granules * self.granule, granules, owners, empty, columns, codes, empty, empty, empty, 0, 0)

    def check_read(self, index: int, plan: Plan, *, strong: bool = False) -> Array | None:
        state = self.state.take(plan.granules)
        clocks = self.machine.clocks
        undefined = None
        if len(state):
            clean = int(np.bitwise_and.reduce(state)) & DEFINED and not int(np.bitwise_or.reduce(state)) & COPYING
            if not clean or int(state.max()) >> _CLOCK > clocks.base:
                undefined = self._check_read_slowly(index, plan, state, strong)
        reads = self.reads.reshape(-1)
        codes = plan.read_codes
        old = reads.take(plan.read_columns)
        if len(old) and int(old.max()) >> 6 > clocks.base:
            warps = self.machine.warp_of[plan.owners]
            recent = (old >> 6) > clocks.known[warps, clocks.own[warps]]
            codes = np.where(recent & ((old & 63) != codes), 32, codes)
        reads[plan.read_columns] = codes | (clocks.now << 6)
        if len(plan.outside) and undefined is not None:
            undefined[plan.outside] = False
        return undefined

    def _check_read_slowly(self, index: int, plan: Plan, state: Array, strong: bool) -> Array | None:
        flying = (state & COPYING) != 0
        if flying.any():
            self._report("copy-in-flight", index, plan, flying, "read before its cp.async has been waited for")
        bad = self._unordered_write(plan, state)
        if strong:
            bad &= (state & ATOMIC) == 0
        if bad.any():
            self._report_race(index, plan, bad, state, "a read of what {} wrote, with no barrier between them")
        # What is in flight has been reported; that it is undefined too says nothing new.
        undefined = (state & (DEFINED | COPYING)) == 0
        if not undefined.any():
            return None
        return undefined.reshape(len(plan.lanes), -1).any(1)

    def _unordered_write(self, plan: Plan, state: Array) -> Array:
        m = self.machine
        writer = ((state >> _THREAD) & 0xFFFF) - 1
        known = m.clocks.known[m.warp_of[plan.owners], np.maximum(writer, 0) >> 5]
        return (writer >= 0) & (writer != m.thread_of[plan.owners]) & ((state >> _CLOCK) > known)

    def store(self, index: int, plan: Plan, values: Array, *, atomic: bool = False, flags: int = 0) -> None:
        """values: bytes, (accesses, size)."""
        if len(plan.outside):
            values, plan = self._without(plan, plan.outside, values)
        new = np.ascontiguousarray(values).reshape(-1).view(UINT[8 * self.granule])
        self.check_write(index, plan, new, atomic=atomic)
        self.put(index, plan, new, flags | (ATOMIC if atomic else 0))

    def _without(self, plan: Plan, gone: Array, values: Array) -> tuple[Array, Plan]:
        """A store outside shared memory is dropped after it has been reported."""
        keep = np.ones(len(plan.lanes), bool)
        keep[gone] = False
        per = len(plan.granules) // len(plan.lanes)
        deep = np.repeat(keep, per)
        empty = np.zeros(0, np.int64)
        kept = Plan(
            plan.lanes[keep],
            plan.byte[keep],
            plan.granules[deep],
            plan.owners[deep],
            plan.marks[deep],
            plan.read_columns[deep],
            plan.read_codes[deep],
            empty,
            empty,
            plan.requested[keep],
            0,
            0,
        )
        return values[keep], kept

    def check_write(self, index: int, plan: Plan, new: Array | None, *, atomic: bool = False) -> None:
        state = self.state.take(plan.granules)
        reads = self.reads.take(plan.granules, axis=0)
        base = self.machine.clocks.base
        if not len(state) or (
            int(state.max()) >> _CLOCK <= base
            and int(reads.max()) >> 6 <= base
            and not int(np.bitwise_or.reduce(state)) & (COPYING | READ_BY_WGMMA)
        ):
            return
        m = self.machine
        for flag, kind, what in (
            (COPYING, "copy-in-flight", "written while a cp.async to it is in flight"),
            (READ_BY_WGMMA, "wgmma-in-flight", "written while a wgmma in flight reads it"),
        ):
            hit = (state & flag) != 0
            if hit.any():
                self._report(kind, index, plan, hit, what)
        free = (state & READ_BY_WGMMA) == 0  # else the race is reported already
        bad = self._unordered_write(plan, state) & free
        if atomic:
            bad &= (state & ATOMIC) == 0
        if new is not None and bad.any():
            # Writing what is there already is harmless, and what compilers do.
            bad &= self.data.view(UINT[8 * self.granule]).take(plan.granules) != new
        if bad.any():
            self._report_race(index, plan, bad, state, "a write over what {} wrote, with no barrier between them")
        warps = m.warp_of[plan.owners]
        late = (reads >> 6) > m.clocks.known[warps]
        rows = np.arange(len(warps))
        own = m.clocks.own[warps]
        late[rows, own] &= (reads[rows, own] & 63) != (plan.owners & 31)
        if atomic:
            late[(state & ATOMIC) != 0] = False
        hit = np.logical_or.reduce(late, axis=1) & free
        if hit.any():
            at = int(np.flatnonzero(hit)[0])
            reader = int(np.flatnonzero(late[at])[0])
            self._report(
                "shared-race", index, plan, hit, f"a write over what warp {reader} reads, with no barrier between them"
            )

    def put(self, index: int, plan: Plan, new: Array, flags: int) -> None:
        data = self.data.view(UINT[8 * self.granule])
        data[plan.granules] = new
        self.state[plan.granules] = plan.marks | ((self.machine.clocks.now << _CLOCK) | flags | DEFINED | GENERIC)
        wrong = data.take(plan.granules) != new
        if wrong.any():
            wrong &= ~self.machine.both_nan(index, data.take(plan.granules), new)
        if wrong.any():
            self._report(
                "conflicting-stores",
                index,
                plan,
                wrong,
                "lanes of one instruction store different values to one address",
            )

    def undefine(self, plan: Plan, tainted: Array) -> None:
        """Undefined data has been stored: whoever loads it is tainted."""
        if tainted.any():
            self.state[plan.granules[tainted]] &= ~DEFINED

    def begin_atomic(self, index: int, plan: Plan) -> Array | None:
        """Checks an atomic; the accesses whose memory is undefined."""
        self.check_write(index, plan, None, atomic=True)
        undefined = (self.state.take(plan.granules) & DEFINED) == 0
        return undefined.reshape(len(plan.lanes), -1).any(1) if undefined.any() else None

    def end_atomic(self, plan: Plan) -> None:
        self.state[plan.granules] = plan.marks | (self.landed_flags() | ATOMIC)

    def landed_flags(self) -> int:
        return (self.machine.clocks.now << _CLOCK) | DEFINED | GENERIC

    def mark_copying(self, plan: Plan) -> None:
        self.state[plan.granules] |= COPYING

    # ------------------------------------------------------------------ reports
    def _report(self, kind: str, index: int, plan: Plan, bad: Array, message: str) -> None:
        offset = int(plan.granules[bad][0] * self.granule % self.stride)
        self.machine.report(kind, index, np.unique(plan.owners[bad]), message, "shared", offset)

    def _report_race(self, index: int, plan: Plan, bad: Array, state: Array, message: str) -> None:
        writer = int(((state[bad][0] >> _THREAD) & 0xFFFF) - 1)
        m = self.machine
        same = writer >> 5 == int(m.warp_in_cta[plan.owners[bad][0]])
        name = f"thread {writer}, of the same warp," if same else f"warp {writer >> 5}"
        message = message.format(name)
        if same:
            message = message.replace("no barrier", "no bar.warp.sync")
        self._report("shared-race", index, plan, bad, message)


def bank_wavefronts(lanes: Array, offset: Array, size: int, lanes_per_phase: int) -> tuple[int, int]:
    """(phases, wavefronts). A phase moves at most 128 bytes: 32 lanes of 4 bytes, 16 of 8, 8 of 16. It takes as many
    wavefronts as different words lie in its most loaded bank."""
    unit = max(4, min(size, 16))
    per = lanes_per_phase or 128 // unit
    banks = 128 // unit
    phase = lanes // per
    key = np.unique(phase * (1 << 40) + offset // unit)
    phases, which = np.unique(key >> 40, return_inverse=True)
    bank = (key & ((1 << 40) - 1)) % banks
    load = np.bincount(which * banks + bank, minlength=len(phases) * banks)
    return len(phases), int(load.reshape(-1, banks).max(1).sum()) if len(phases) else 0
