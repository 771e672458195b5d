"""Launch arguments: tensors are copied into the arena and back, scalars into the parameter block.

Arrays that share memory share it in the arena as well. Only bytes that belong to an element of some argument are
allocated: the gap between two rows of a slice is as much out of bounds as what lies past its end.

What a kernel reaches through a table of addresses is no argument: the caller names it as `memory`. 64-bit integers in
arguments that are addresses inside of it become addresses of the arena, and the caller's again afterwards.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hotloop.emulator.errors import EmulatorError
from hotloop.emulator.memory import ALLOCATED, DEFINED, GLOBAL_BASE, Arena
from hotloop.emulator.syntax import Parameter
from hotloop.emulator.types import FLOAT, TYPES, UINT, Array


class Uninitialised:
    """Wraps a tensor whose contents the kernel must not use before it has written them."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


@dataclass(frozen=True)
class HostArray:
    """A tensor of the caller as memory: address of the first element, byte strides."""

    name: str
    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    alignment: int  # of the first byte, relative to its allocation, modulo 256
    defined: bool
    writable: bool
    integers: bool

    @property
    def span(self) -> tuple[int, int]:
        if 0 in self.shape:
            return self.pointer, self.pointer
        reach = [(n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)]
        return (
            self.pointer + sum(r for r in reach if r < 0),
            self.pointer + sum(r for r in reach if r > 0) + self.itemsize,
        )


@dataclass(frozen=True)
class Region:
    """Host memory [start, end) that lies at `offset` of the arena."""

    start: int
    end: int
    offset: int
    writable: bool
    name: str


def host_array(name: str, value: Any) -> HostArray | None:
    """None for what is no tensor."""
    defined = True
    if isinstance(value, Uninitialised):
        defined, value = False, value.tensor
    if hasattr(value, "data_ptr"):
        if value.device.type != "cpu":
            raise EmulatorError(f"{name}: a tensor on {value.device}; the emulator runs on CPU tensors")
        size = value.element_size()
        strides = tuple(s * size for s in value.stride())
        pointer = value.data_ptr()
        base = value.untyped_storage().data_ptr()
        return HostArray(
            name,
            pointer,
            tuple(value.shape),
            strides,
            size,
            (pointer - base) % 256,
            defined,
            True,
            not (value.is_floating_point() or value.is_complex()),
        )
    if isinstance(value, np.ndarray):
        pointer = value.__array_interface__["data"][0]
        owner: Any = value
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        base = owner.__array_interface__["data"][0]
        return HostArray(
            name,
            pointer,
            value.shape,
            value.strides,
            value.itemsize,
            (pointer - base) % 256,
            defined,
            bool(value.flags.writeable),
            value.dtype.kind in "iu",
        )
    if not defined:
        raise EmulatorError(f"{name}: Uninitialised wraps a tensor, not {type(value).__name__}")
    return None


def host_bytes(start: int, end: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * (end - start)).from_address(start))


class Binding:
    """The arguments of one launch."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        args: Sequence[Any] | Mapping[str, Any],
        arena: Arena,
        memory: Mapping[str, Any],
    ) -> None:
        self.arena = arena
        names = list(args) if isinstance(args, Mapping) else [p.name for p in parameters]
        values = list(args.values()) if isinstance(args, Mapping) else list(args)
        if len(values) != len(parameters):
            expected = ", ".join(f"{p.name}: {p.type}" for p in parameters)
            raise EmulatorError(f"the kernel takes {len(parameters)} arguments ({expected}), {len(values)} were given")
        arrays = [host_array(n, v) for n, v in zip(names, values, strict=True)]
        reached = [self._reached(name, value) for name, value in memory.items()]
        given = [a for a in arrays if a is not None]
        self.regions = self._regions([*given, *reached])
        self.tables = [t for a in given for t in self._tables(a, reached)]
        size = max([p.offset + p.size for p in parameters], default=0)
        self.block = np.zeros(max(16, -(-size // 16) * 16), np.uint8)
        for p, value, array in zip(parameters, values, arrays, strict=True):
            self.block[p.offset : p.offset + p.size] = np.frombuffer(self._encode(p, value, array), np.uint8)

    def _regions(self, arrays: list[HostArray]) -> list[Region]:
        """Overlapping arrays are one region; shared storage without overlap is several."""
        regions: list[Region] = []
        for a in sorted(arrays, key=lambda a: a.span):
            start, end = a.span
            if regions and start < regions[-1].end:
                last = regions[-1]
                name = last.name if a.name in last.name.split("|") else f"{last.name}|{a.name}"
                regions[-1] = Region(last.start, max(end, last.end), 0, last.writable and a.writable, name)
            else:
                regions.append(Region(start, end, 0, a.writable, a.name))
        alignment = {a.span[0]: a.alignment + a.span[0] - a.pointer for a in reversed(arrays)}
        placed = []
        for r in regions:
            size = r.end - r.start
            offset = self.arena.reserve(r.name, size, alignment[r.start])
            if size:
                self.arena.data[offset : offset + size] = host_bytes(r.start, r.end)
            placed.append(Region(r.start, r.end, offset, r.writable, r.name))
        for a in arrays:
            if 0 in a.shape:
                continue
            offset = self._offset(a, placed)
            shadow = (
                np.lib.stride_tricks.as_strided(
                    self.arena.shadow[offset:], (*a.shape, a.itemsize), (*a.strides, 1), writeable=True
                )
                if all(s >= 0 for s in a.strides)
                else self._reversed(a, offset)
            )
            shadow |= np.uint8(ALLOCATED | (DEFINED if a.defined else 0))
        return placed

    @staticmethod
    def _reached(name: str, value: Any) -> HostArray:
        array = host_array(name, value)
        if array is None:
            raise EmulatorError(
                f"memory[{name!r}]: {type(value).__name__} was given; pass a CPU tensor or a numpy array"
            )
        return array

    def _tables(self, a: HostArray, reached: Sequence[HostArray]) -> Iterator[tuple[Array, Array, Array]]:
        """Translates addresses in the arena's copy of a dense array of integers: (copy, its elements before, after)."""
        start, end = a.span
        if not a.integers or a.itemsize != 8 or not reached or end - start != 8 * int(np.prod(a.shape)):
            return
        offset = self._offset(a, self.regions)
        copy = self.arena.data[offset : offset + end - start].view(np.uint64)
        before, after = copy.copy(), copy.copy()
        for r in (r for b in reached for r in self.regions if r.start <= b.span[0] and b.span[1] <= r.end):
            inside = (before >= r.start) & (before < r.end)
            after[inside] = before[inside] + np.uint64(GLOBAL_BASE + r.offset) - np.uint64(r.start)
        copy[:] = after
        yield copy, before, after

    def _reversed(self, a: HostArray, offset: int) -> Array:
        """Negative strides: the same elements, walked upwards."""
        low = offset + a.span[0] - a.pointer
        strides = tuple(abs(s) for s in a.strides)
        return np.lib.stride_tricks.as_strided(self.arena.shadow[low:], (*a.shape, a.itemsize), (*strides, 1))

    @staticmethod
    def _offset(a: HostArray, regions: list[Region]) -> int:
        for r in regions:
            if r.start <= a.span[0] and a.span[1] <= r.end:
                return r.offset + a.pointer - r.start
        raise AssertionError("an array without a region")

    def _encode(self, p: Parameter, value: Any, array: HostArray | None) -> bytes:
        if array is not None:
            if p.size != 8 or TYPES[p.type].is_float:
                raise EmulatorError(f"{p.name}: a tensor was given for a parameter of type {p.type} ({p.size} bytes)")
            return (GLOBAL_BASE + self._offset(array, self.regions)).to_bytes(8, "little")
        if isinstance(value, (bytes, bytearray, memoryview)):
            if len(value) != p.size:
                raise EmulatorError(f"{p.name}: {len(value)} bytes were given, the parameter has {p.size}")
            return bytes(value)
        if not isinstance(value, (int, float, np.integer, np.floating, np.bool_)):
            raise EmulatorError(
                f"{p.name}: {type(value).__name__} was given; pass a CPU tensor, a numpy array, int, float or bytes"
            )
        kind = TYPES[p.type]
        if kind.kind == "f":
            return np.array([value], FLOAT[kind.bits]).tobytes()
        if isinstance(value, (float, np.floating)):
            # Untyped parameters: Triton declares floats as .b32 at times.
            if kind.kind != "b" or kind.bits not in (32, 64):
                raise EmulatorError(f"{p.name}: a float was given for a parameter of type {p.type}")
            return np.array([value], FLOAT[kind.bits]).tobytes()
        if p.size > 8:
            raise EmulatorError(
                f"{p.name}: a structure of {p.size} bytes is passed as bytes, not {type(value).__name__}"
            )
        whole = int(value)
        if not -(1 << (8 * p.size - 1)) <= whole < 1 << (8 * p.size):
            raise EmulatorError(f"{p.name}: {whole} does not fit a parameter of type {p.type}")
        return np.array([whole & ((1 << 8 * p.size) - 1)], UINT[8 * p.size]).tobytes()

    def copy_back(self) -> None:
        for copy, before, after in self.tables:
            copy[:] = np.where(copy == after, before, copy)
        for r in self.regions:
            if r.end == r.start:
                continue
            host = host_bytes(r.start, r.end)
            new = self.arena.data[r.offset : r.offset + r.end - r.start]
            if np.array_equal(host, new):
                continue
            if not r.writable:
                raise EmulatorError(f"{r.name}: the kernel wrote to an array that is read-only here")
            host[:] = new
