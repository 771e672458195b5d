"""Acquire and release: what a warp that writes a location publishes, and what a warp that reads it learns.

A release publishes the warp's knowledge at the location, a relaxed write what the warp knew at its last fence. A
read-modify-write keeps what was published there before (a release sequence). An acquire learns what is published, a
relaxed read learns it at the warp's next fence. Scopes narrower than the GPU are treated as the GPU's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.types import Array

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine


class Ordering:
    def __init__(self, machine: Machine, published: dict[int, Array]) -> None:
        self.m = machine
        self.published = published  # by address in the arena; lives as long as the launch
        self.fenced: dict[int, Array] = {}
        self.heard: dict[int, Array] = {}

    @staticmethod
    def _pairs(warps: Array, offsets: Array) -> list[tuple[int, list[int]]]:
        """The addresses of each warp, in order of the lanes."""
        starts = np.flatnonzero(np.r_[True, warps[1:] != warps[:-1]])
        stops = np.r_[starts[1:], len(warps)]
        return [(int(warps[a]), list(dict.fromkeys(offsets[a:b].tolist()))) for a, b in zip(starts, stops, strict=True)]

    def read(self, warps: Array, offsets: Array, *, acquire: bool) -> None:
        for warp, addresses in self._pairs(warps, offsets):
            self._listen(warp, addresses, acquire)

    def _listen(self, warp: int, addresses: list[int], acquire: bool) -> None:
        rows = {id(r): r for r in (self.published.get(a) for a in addresses) if r is not None}
        for row in rows.values():
            if acquire:
                self.m.clocks.learn(warp, row)
            else:
                old = self.heard.get(warp)
                self.heard[warp] = row if old is None else np.maximum(old, row)

    def write(self, warps: Array, offsets: Array, *, release: bool) -> None:
        for warp, addresses in self._pairs(warps, offsets):
            row = self._voice(warp, release)
            for a in addresses:
                if row is None:
                    self.published.pop(a, None)
                else:
                    self.published[a] = row
        if release:
            self.m.clocks.now += 1

    def _voice(self, warp: int, release: bool) -> Array | None:
        return self.m.clocks.snapshot(warp) if release else self.fenced.get(warp)

    def update(self, warps: Array, offsets: Array, *, acquire: bool, release: bool) -> None:
        """Atomics, one warp after the other."""
        for warp, addresses in self._pairs(warps, offsets):
            self._listen(warp, addresses, acquire)
            row = self._voice(warp, release)
            if row is None:
                continue
            merged: dict[int, Array] = {}
            for a in addresses:
                old = self.published.get(a)
                if old is None:
                    self.published[a] = row
                    continue
                if id(old) not in merged:
                    merged[id(old)] = np.maximum(old, row)
                self.published[a] = merged[id(old)]
            if release:
                self.m.clocks.now += 1

    def fence(self, warps: Array) -> None:
        for warp in np.flatnonzero(warps).tolist():
            heard = self.heard.pop(warp, None)
            if heard is not None:
                self.m.clocks.learn(warp, heard)
            self.fenced[warp] = self.m.clocks.snapshot(warp)
        self.m.clocks.now += 1
