"""Happens-before between warps.

There is one clock for the whole launch; it ticks at every synchronisation. An access is stamped with the clock. For
each resident warp `known` holds, for every warp of its CTA, the last time up to which that warp's accesses are
ordered before what it does next. A barrier makes the participants' knowledge the maximum of all and adds each other's
past.

Kernels that order CTAs (fences, acquire, release) get `world` as well: the same for every warp of the grid.
"""

from __future__ import annotations

import numpy as np

from hotloop.emulator.types import Array


class Clocks:
    def __init__(self, start: int, ctas: Array, warps: int, grid_ctas: int, *, world: bool) -> None:
        """ctas: index of each resident CTA in the grid; warps: per CTA."""
        count = len(ctas)
        self.now = start
        self.shape = (count, warps)
        self.known = np.zeros((count * warps, warps), np.int64)
        self.base = 0  # everything stamped up to here is ordered before everything to come, in every resident CTA
        self.own = np.arange(count * warps) % warps
        self.world_column = (ctas[:, None] * warps + np.arange(warps)).ravel()
        self.world = np.zeros((count * warps, grid_ctas * warps), np.int64) if world else None

    def barrier(self, warps: Array, arrived: Array | None = None) -> None:
        """CTA barrier over the warps of the mask; `arrived` ones contribute without waiting (bar.arrive)."""
        stamp = self.now
        self.now += 1
        count, width = self.shape
        if arrived is None and warps.all():
            if self.world is not None:
                self._barrier_world(warps, warps, stamp)
            self.known[:] = stamp
            self.base = stamp
            return
        giving = warps if arrived is None else warps | arrived
        give, take = giving.reshape(count, width), warps.reshape(count, width)
        known = self.known.reshape(count, width, width)
        merged = np.where(give[:, :, None], known, 0).max(1)
        merged = np.where(give, stamp, merged)
        known[:] = np.where(take[:, :, None], np.maximum(known, merged[:, None, :]), known)
        if self.world is not None:
            self._barrier_world(giving, warps, stamp)
        self.base = int(self.known.min())

    def _barrier_world(self, giving: Array, taking: Array, stamp: int) -> None:
        assert self.world is not None
        count, width = self.shape
        world = self.world.reshape(count, width, -1)
        give = giving.reshape(count, width)
        merged = np.where(give[:, :, None], world, 0).max(1)
        columns = self.world_column.reshape(count, width)
        for c in range(count):
            merged[c, columns[c][give[c]]] = stamp
        take = taking.reshape(count, width)
        world[:] = np.where(take[:, :, None], np.maximum(world, merged[:, None, :]), world)

    def warp_barrier(self, warps: Array) -> None:
        """bar.warp.sync: lanes of a warp become ordered among themselves."""
        stamp = self.now
        self.now += 1
        index = np.flatnonzero(warps)
        self.known[index, self.own[index]] = stamp
        if self.world is not None:
            self.world[index, self.world_column[index]] = stamp

    def snapshot(self, warp: int) -> Array:
        """What a release by this warp publishes: its knowledge, and its own past."""
        assert self.world is not None
        row = self.world[warp].copy()
        row[self.world_column[warp]] = self.now
        return row

    def learn(self, warp: int, row: Array) -> None:
        """An acquire."""
        assert self.world is not None
        np.maximum(self.world[warp], row, out=self.world[warp])
        width = self.shape[1]
        first = self.world_column[warp] - self.own[warp]
        np.maximum(self.known[warp], row[first : first + width], out=self.known[warp])
