"""One launch of a kernel: its memory, its options, its reports and counters, and the batches of CTAs it is run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from hotloop.emulator.arguments import Binding
from hotloop.emulator.counters import Counters, Tally
from hotloop.emulator.errors import EmulatorError, Report
from hotloop.emulator.machine import RESIDENT_LANES, RESIDENT_LANES_COMMUNICATING, Machine
from hotloop.emulator.memory import ALLOCATED, CONSTANT, DEFINED, Arena
from hotloop.emulator.program import Program
from hotloop.emulator.races import GlobalRaces
from hotloop.emulator.scheduler import Scheduler

Schedule = Literal["lockstep", "random"]
AsyncCopies = Literal["late", "early"]
Shape = int | Sequence[int]


@dataclass(frozen=True)
class Options:
    schedule: Schedule = "lockstep"
    seed: int = 0
    async_copies: AsyncCopies = "late"
    checks: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in ("lockstep", "random"):
            raise EmulatorError(f"schedule={self.schedule!r}: expected 'lockstep' or 'random'")
        if self.async_copies not in ("late", "early"):
            raise EmulatorError(f"async_copies={self.async_copies!r}: expected 'late' or 'early'")


@dataclass(frozen=True)
class Launch:
    """What a launch left behind, besides what it wrote."""

    reports: list[Report]
    counters: Counters


def three(shape: Shape, what: str) -> tuple[int, int, int]:
    sizes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if not 1 <= len(sizes) <= 3 or any(int(n) != n or n < 1 for n in sizes):
        raise EmulatorError(f"{what}={shape!r}: expected an int or one to three positive ints")
    x, y, z = (*(int(n) for n in sizes), 1, 1)[:3]
    return x, y, z


class LaunchState:
    def __init__(
        self,
        program: Program,
        grid: Shape,
        block: Shape,
        dynamic_shared: int,
        args: Sequence[Any] | Mapping[str, Any],
        options: Options,
        global_data: dict[str, bytes],
        memory: Mapping[str, Any],
    ) -> None:
        body = program.body
        self.program = program
        self.options = options
        self.grid = three(grid, "grid")
        self.block = three(block, "block")
        self.grid_size = int(np.prod(self.grid))
        self._check_block()
        if dynamic_shared < 0:
            raise EmulatorError(f"shared={dynamic_shared}: expected the bytes of dynamic shared memory")
        self.dynamic_shared = dynamic_shared
        self.shared_offsets, self.shared_bytes = self._shared_layout(dynamic_shared)
        self.arena = Arena()
        self.global_offsets: dict[str, int] = {}
        for v in body.globals:
            data = global_data[v.name]
            offset = self.arena.reserve(v.name, len(data), 0)
            self.global_offsets[v.name] = offset
            self.arena.data[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
            flags = ALLOCATED | DEFINED | (CONSTANT if v.space == "const" else 0)
            self.arena.shadow[offset : offset + len(data)] = flags
        self.binding = Binding(body.parameters, args, self.arena, memory)
        self.parameters = self.binding.block
        self.counters = Tally(len(body.instructions), len(program.blocks))
        self.found: dict[tuple[str, int], Report] = {}
        self.clock = 1
        self.published: dict[int, np.ndarray] = {}  # by releases, see hotloop.emulator.ordering
        self.races = GlobalRaces(len(self.arena.data), program.global_granule) if options.checks else None

    def _check_block(self) -> None:
        body, threads = self.program.body, int(np.prod(self.block))
        if body.reqntid and self.block != body.reqntid:
            raise EmulatorError(f"block={self.block}: {body.name} requires {body.reqntid}")
        if body.maxntid and threads > int(np.prod(body.maxntid)):
            raise EmulatorError(f"block={self.block}: {body.name} allows at most {int(np.prod(body.maxntid))} threads")
        if threads > 1024:
            raise EmulatorError(f"block={self.block}: {threads} threads, at most 1024 are allowed")

    def _shared_layout(self, dynamic: int) -> tuple[dict[str, int], int]:
        offsets, top = {}, 0
        for v in self.program.body.shared:
            if v.size is not None:
                top = -(-top // v.align) * v.align
                offsets[v.name] = top
                top += v.size
        external = [v for v in self.program.body.shared if v.size is None]
        if external and dynamic:
            align = max([16, *(v.align for v in external)])
            top = -(-top // align) * align
        offsets |= {v.name: top for v in external}
        return offsets, top + dynamic

    def report(
        self,
        kind: Any,
        index: int,
        message: str,
        buffer: str,
        offset: int | None,
        cta: tuple[int, int, int],
        thread: int,
        count: int,
    ) -> None:
        """Reports of one kind at one instruction are one."""
        old = self.found.get((kind, index))
        if old is not None:
            self.found[kind, index] = replace(old, count=old.count + count)
            return
        i = self.program.body.instructions[index]
        source = str(i.source) if i.source else ""
        text = f"{i.line}: {i.text}"
        self.found[kind, index] = Report(kind, message, source, text, buffer, offset, cta, thread, count)

    def reported(self, kind: str) -> bool:
        return any(key[0] == kind for key in self.found)

    def run(self) -> Launch:
        width = -(-int(np.prod(self.block)) // 32) * 32
        together = self.program.has_strong and self.grid_size * width <= RESIDENT_LANES_COMMUNICATING
        batch = self.grid_size if together else max(1, min(self.grid_size, RESIDENT_LANES // width))
        order = np.arange(self.grid_size)
        rng = np.random.default_rng(self.options.seed) if self.options.schedule == "random" else None
        if rng is not None:
            order = rng.permutation(order)
        with np.errstate(all="ignore"):
            for first in range(0, self.grid_size, batch):
                machine = Machine(self, order[first : first + batch])
                Scheduler(machine, rng).run()
                self.clock = machine.clocks.now + 1
        self.binding.copy_back()
        return Launch(list(self.found.values()), self.program.counters(self.counters))
