"""Undefined data is followed until it matters: a store to global memory, an address, a branch, an atomic.

A register is tainted as a whole, but for what `mov` packs and unpacks: compilers pack an undefined half beside a
defined one and take the defined one out again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from hotloop.emulator.types import Array


class Taint:
    """For each tainted register a mask of the lanes in which it is undefined. Usually there is none."""

    def __init__(self, lanes: int) -> None:
        self.any: dict[int, Array] = {}
        self.parts: dict[int, list[Array]] = {}  # of tainted registers that were packed: the same for each part
        self.lanes = lanes

    def start(self, registers: Iterable[int]) -> None:
        for r in registers:
            self.any[r] = np.ones(self.lanes, bool)

    def of(self, registers: Iterable[int]) -> Array | None:
        found = None
        for r in registers:
            mask = self.any.get(r)
            if mask is not None:
                found = mask if found is None else found | mask
        return found

    def spread(self, destinations: Iterable[int], sources: Iterable[int], mask: Array) -> None:
        self.put(destinations, self.of(sources), mask)

    def spread_warp(self, destinations: Iterable[int], sources: Iterable[int], mask: Array) -> None:
        """One tainted lane taints its warp."""
        found = self.of(sources)
        if found is not None:
            found = np.repeat((found & mask).reshape(-1, 32).any(1), 32)
        self.put(destinations, found, mask)

    def pack(self, destination: int, sources: Sequence[int], mask: Array) -> None:
        """sources: registers, or -1 for a constant."""
        none = np.zeros(self.lanes, bool)
        old = self.parts.get(destination, [self.any.get(destination, none)] * len(sources))
        if len(old) != len(sources):
            old = [np.logical_or.reduce(old)] * len(sources)
        parts = [(self.any.get(s, none) & mask) | (o & ~mask) for s, o in zip(sources, old, strict=True)]
        self.put((destination,), self.of(sources), mask)
        if destination in self.any:
            self.parts[destination] = parts

    def unpack(self, destinations: Sequence[int], source: int, mask: Array) -> None:
        """destinations: registers, or -1 for a part that is dropped."""
        parts = self.parts.get(source)
        if parts is None or len(parts) != len(destinations):
            self.spread([d for d in destinations if d >= 0], (source,), mask)
            return
        for d, part in zip(destinations, parts, strict=True):
            if d >= 0:
                self.put((d,), part, mask)

    def put(self, destinations: Iterable[int], tainted: Array | None, mask: Array) -> None:
        for d in destinations:
            old = self.any.get(d)
            if tainted is None and old is None:
                continue
            self.parts.pop(d, None)
            new = np.zeros(self.lanes, bool) if tainted is None else tainted & mask
            if old is not None:
                new = new | (old & ~mask)
            if new.any():
                self.any[d] = new
            else:
                self.any.pop(d, None)
