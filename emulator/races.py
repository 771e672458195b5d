"""Races in global memory: who wrote each granule last, who read it last, and whether that is ordered before now.

Warps are the unit. Where nothing orders CTAs, two CTAs are always unordered; where fences or acquire and release do,
the clocks decide. Equal values written twice are no race, nor are atomics and other strong accesses among themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.types import Array

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine

_SEVERAL = -1  # reader: warps of more than one CTA


class GlobalRaces:
    """Lives as long as the launch; `attach` for every batch of CTAs."""

    def __init__(self, size: int, granule: int) -> None:
        count = size // granule + 64
        self.granule = granule
        self.writer = np.zeros(count, np.int32)  # warp of the grid + 1
        self.written = np.zeros(count, np.int32)  # clock
        self.reader = np.zeros(count, np.int32)
        self.read = np.zeros(count, np.int32)
        self.strong = np.zeros(count, bool)

    def attach(self, machine: Machine) -> None:
        self.machine = machine
        self.me = (machine.clocks.world_column[machine.warp_of] + 1).astype(np.int32)
        self.repeated: dict[int, Array] = {}

    def _expand(self, lanes: Array | None, offset: Array, size: int) -> tuple[Array, Array, int]:
        """(granules, warp + 1 per granule, granules per access)"""
        per = max(1, size // self.granule)
        granules = offset // self.granule
        if per == 1:
            return granules, self.me if lanes is None else self.me[lanes], 1
        granules = (granules[:, None] + np.arange(per)).ravel()
        if lanes is None:
            if per not in self.repeated:
                self.repeated[per] = np.repeat(self.me, per)
            return granules, self.repeated[per], per
        return granules, np.repeat(self.me[lanes], per), per

    def on_read(
        self, index: int, lanes: Array | None, offset: Array, size: int, *, strong: bool = False
    ) -> Array | None:
        """Reports races between CTAs. Reads that race within the CTA are returned: compilers replicate loads whose
        results most lanes drop, so that such a read is undefined data, a fault only where it matters."""
        granules, me, per = self._expand(lanes, offset, size)
        raced = None
        writer = self.writer.take(granules)
        foreign = (writer != 0) & (writer != me)
        if foreign.any():
            at = np.flatnonzero(foreign)
            if strong:
                at = at[~self.strong[granules[at]]]
            bad = at[self._unordered(me[at], writer[at], self.written[granules[at]], self._row(lanes, at, per))]
            inside = self._cta(me[bad]) == self._cta(writer[bad])
            if inside.any():
                raced = np.zeros(len(offset), bool)
                raced[bad[inside] // per] = True
            bad = bad[~inside]
            if len(bad):
                name = self._name(writer[bad[0]], me[bad[0]])
                self._report(index, lanes, offset, per, bad, f"a read of what {name} wrote")
        old = self.reader.take(granules)
        new = me
        other = (old != me) & (old != 0)
        if other.any():
            new = self._merge_readers(me, old, granules)
        self.reader[granules] = new
        self.read[granules] = self.machine.clocks.now
        left = self.reader.take(granules)
        lost = left != new
        if lost.any() and self.machine.clocks.world is None:
            mixed = lost & (self._cta(left) != self._cta(new))
            self.reader[granules[mixed]] = _SEVERAL
        return raced

    def _merge_readers(self, me: Array, old: Array, granules: Array) -> Array:
        if self.machine.clocks.world is not None:
            return me
        mixed = (old != 0) & ((old == _SEVERAL) | (self._cta(old) != self._cta(me)))
        return np.where(mixed, np.int32(_SEVERAL), me)

    def _cta(self, warp: Array) -> Array:
        return (warp - 1) // self.machine.warps_per_cta

    def on_write(
        self, index: int, lanes: Array | None, offset: Array, size: int, new: Array | None, *, strong: bool = False
    ) -> None:
        """new: the bytes to be written, (accesses, size); None where equal values are no excuse."""
        granules, me, per = self._expand(lanes, offset, size)
        writer = self.writer.take(granules)
        foreign = (writer != 0) & (writer != me)
        if foreign.any():
            at = np.flatnonzero(foreign)
            if strong:
                at = at[~self.strong[granules[at]]]
            bad = at[self._unordered(me[at], writer[at], self.written[granules[at]], self._row(lanes, at, per))]
            if new is not None and len(bad):
                bad = bad[self._differs(granules[bad], new.reshape(len(granules), -1)[bad])]
            if len(bad):
                name = self._name(writer[bad[0]], me[bad[0]])
                self._report(index, lanes, offset, per, bad, f"a write over what {name} wrote")
        reader = self.reader.take(granules)
        foreign = (reader != 0) & (reader != me)
        if foreign.any():
            at = np.flatnonzero(foreign)
            if strong:
                at = at[~self.strong[granules[at]]]
            several = reader[at] == _SEVERAL
            late = several.copy()
            # A write over what the CTA's other warps read is seen as a read of it under another schedule.
            several |= self._cta(reader[at]) == self._cta(me[at])
            one = np.flatnonzero(~several)
            which = at[one]
            late[one] = self._unordered(
                me[which], reader[which], self.read[granules[which]], self._row(lanes, which, per)
            )
            bad = at[late]
            if len(bad):
                self._report(
                    index, lanes, offset, per, bad, f"a write over what {self._name(reader[bad[0]], me[bad[0]])} reads"
                )
        self.writer[granules] = me
        self.written[granules] = self.machine.clocks.now
        self.reader[granules] = 0
        if strong or self.machine.has_strong:
            self.strong[granules] = strong

    def foreign(self, lane: int, offset: int) -> bool:
        """Whether another warp than the lane's wrote there last."""
        return bool(self.writer[offset // self.granule] != self.me[lane])

    def _row(self, lanes: Array | None, at: Array, per: int) -> Array:
        """The resident warp of the granules at `at`."""
        access = at // per
        return self.machine.warp_of[access if lanes is None else lanes[access]]

    def _unordered(self, me: Array, other: Array, stamp: Array, row: Array) -> Array:
        clocks = self.machine.clocks
        same = self._cta(me) == self._cta(other)
        known = np.zeros(len(me), np.int64)
        known[same] = clocks.known[row[same], (other[same] - 1) % self.machine.warps_per_cta]
        if clocks.world is not None:
            known[~same] = clocks.world[row[~same], other[~same] - 1]
        return stamp > known

    def _differs(self, granules: Array, new: Array) -> Array:
        data = self.machine.arena.data[granules[:, None] * self.granule + np.arange(self.granule)]
        if new.shape[1] != self.granule:  # an access narrower than a granule
            return np.ones(len(granules), bool)
        return (data != new).any(1)

    def _name(self, other: int, me: int) -> str:
        if other == _SEVERAL:
            return "several CTAs"
        width = self.machine.warps_per_cta
        if (other - 1) // width == (me - 1) // width:
            return f"warp {(other - 1) % width} of the same CTA"
        return f"CTA {self.machine.cta_coordinates((other - 1) // width)}"

    def _report(self, index: int, lanes: Array | None, offset: Array, per: int, bad: Array, message: str) -> None:
        access = np.unique(bad // per)
        place = self.machine.arena.place(int(offset[bad[0] // per]) + int(bad[0] % per) * self.granule)
        self.machine.report(
            "global-race",
            index,
            access if lanes is None else lanes[access],
            f"{message}, with nothing that orders them",
            place.buffer,
            place.offset,
        )
