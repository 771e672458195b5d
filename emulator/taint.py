"""Undefined data is followed until it matters: a store to global memory, an address, a branch, an atomic."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hotloop.emulator.types import Array


class Taint:
    """For each tainted register a mask of the lanes in which it is undefined. Usually there is none."""

    def __init__(self, lanes: int) -> None:
        self.any: dict[int, Array] = {}
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

    def put(self, destinations: Iterable[int], tainted: Array | None, mask: Array) -> None:
        for d in destinations:
            old = self.any.get(d)
            if tainted is None and old is None:
                continue
            new = np.zeros(self.lanes, bool) if tainted is None else tainted & mask
            if old is not None:
                new = new | (old & ~mask)
            if new.any():
                self.any[d] = new
            else:
                self.any.pop(d, None)
