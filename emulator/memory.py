"""Global memory: one arena that holds every buffer of a launch between guard zones, with a shadow byte for every byte.

Generic addresses: shared and local memory appear in windows of their own, everything else is global.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hotloop.emulator.types import UINT, Array

SHARED_WINDOW = 1 << 40
LOCAL_WINDOW = 2 << 40
GLOBAL_BASE = 0x7F0000000000
# Guard zones must exceed a tile, or an access that misses its buffer lands in the next one.
GUARD = 1 << 18

ALLOCATED, DEFINED, CONSTANT = 1, 2, 4
_GOOD = {n: UINT[8 * n](int("03" * n, 16)) for n in (1, 2, 4, 8)}
_ANY = {n: UINT[8 * n](int("ff" * n, 16)) for n in (1, 2, 4, 8)}


def space_of(address: Array) -> Array:
    """0 global, 1 shared, 2 local."""
    high = np.asarray(address) >> np.uint64(40)
    return np.where(high > 2, np.uint64(0), high)


@dataclass(frozen=True)
class Buffer:
    name: str
    start: int  # in the arena
    size: int


@dataclass(frozen=True)
class Place:
    """Where an address lies, in a reader's terms."""

    buffer: str
    offset: int
    text: str


class Arena:
    def __init__(self, capacity: int = 1 << 20) -> None:
        self.data = np.zeros(capacity, np.uint8)
        self.shadow = np.zeros(capacity, np.uint8)
        self.top = GUARD
        self.buffers: list[Buffer] = []

    def reserve(self, name: str, size: int, alignment_offset: int = 0) -> int:
        """Room for `size` bytes; the address is `alignment_offset` modulo 256."""
        start = -(-self.top // 256) * 256 + alignment_offset % 256
        self.top = start + size + GUARD
        if self.top > len(self.data):
            capacity = -(-max(self.top, 2 * len(self.data)) // 64) * 64
            for field in ("data", "shadow"):
                grown = np.zeros(capacity, np.uint8)
                grown[: len(getattr(self, field))] = getattr(self, field)
                setattr(self, field, grown)
        self.buffers.append(Buffer(name, start, size))
        return start

    def place(self, offset: int) -> Place:
        best, distance = None, 1 << 62
        for b in self.buffers:
            if b.start <= offset < b.start + b.size:
                return Place(b.name, offset - b.start, f"inside the span of {b.name} ({b.size} bytes)")
            away = offset - (b.start + b.size) if offset >= b.start else b.start - offset
            if away < distance:
                best, distance = b, away
        if best is None:
            return Place("", offset, "outside every buffer")
        if distance > 2 * GUARD:
            return Place("", offset, f"address {offset + GLOBAL_BASE:#x}, outside every buffer")
        side = "past the end of" if offset >= best.start else "before"
        return Place(best.name, offset - best.start, f"{distance} bytes {side} {best.name} ({best.size} bytes)")

    # ------------------------------------------------------------------ vectorised access, one element per lane
    def view(self, size: int) -> Array:
        """The arena as elements of 1 to 16 bytes: 16-byte ones are complex128, which numpy moves in one piece."""
        return self.data.view(np.complex128 if size == 16 else UINT[8 * size])

    def good(self, offsets: Array, size: int) -> bool:
        """Whether all bytes of all accesses are allocated, defined and writable."""
        if size == 16:
            found = self.shadow.view(np.complex128).take(offsets >> 4).view(np.uint64)
            return bool((found == _GOOD[8]).all())
        found = self.shadow.view(UINT[8 * size]).take(offsets // size)
        return bool((found == _GOOD[size]).all())

    def flags(self, offsets: Array, size: int) -> tuple[Array, Array, Array]:
        """(not allocated, not defined, constant) per access."""
        bytes_ = self.shadow[offsets[:, None] + np.arange(size)]
        return (
            ~(bytes_ & ALLOCATED).all(1).astype(bool),
            ((bytes_ & DEFINED) == 0).any(1),
            ((bytes_ & CONSTANT) != 0).any(1),
        )
