"""The resident CTAs of a launch: what a block's code sees as X.

Lanes are the threads of all resident CTAs, each CTA padded to whole warps; lanes of the padding never run. Residency:
as many CTAs as fit `RESIDENT_LANES` run together, in order of their index (random schedules permute it), and the next
ones start when all of them have ended. A kernel that may wait for other CTAs (atomics or strong accesses) is resident
as a whole up to `RESIDENT_LANES_COMMUNICATING`; where resident CTAs wait for others that are not, the launch is
reported as a livelock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hotloop.emulator.clocks import Clocks
from hotloop.emulator.copies import Copies
from hotloop.emulator.errors import EmulatorError
from hotloop.emulator.memory import GLOBAL_BASE
from hotloop.emulator.ordering import Ordering
from hotloop.emulator.shared import Shared
from hotloop.emulator.taint import Taint
from hotloop.emulator.types import Array
from hotloop.emulator.warpgroups import Warpgroups

if TYPE_CHECKING:
    from hotloop.emulator.launch import LaunchState
    from hotloop.emulator.scheduler import Barriers

RESIDENT_LANES = 4096
RESIDENT_LANES_COMMUNICATING = 32768


class Machine:
    barriers: Barriers  # set by the scheduler

    def __init__(self, launch: LaunchState, ctas: Array) -> None:
        """ctas: indices in the grid."""
        self.launch = launch
        self.program = launch.program
        self.arena = launch.arena
        self.counters = launch.counters
        self.checks = launch.options.checks
        self.ctas = ctas
        self.cta_count = len(ctas)
        self.threads = int(np.prod(launch.block))
        self.warps_per_cta = -(-self.threads // 32)
        width = 32 * self.warps_per_cta
        self.lanes = self.cta_count * width
        lane = np.arange(self.lanes)
        self.cta_of = lane // width
        self.thread_of = lane % width
        self.warp_of = lane // 32
        self.warp_in_cta = self.thread_of // 32
        self.warps = self.lanes // 32
        self.exited = self.thread_of >= self.threads
        self.padded = bool(self.exited.any())
        self.everyone = ~self.exited
        self.registers: list[Array | None] = [None] * len(self.program.body.registers)
        self.special = self._special()
        self.constants: dict[Any, Array] = {}
        self.parameters: dict[Any, list[Array]] = {}
        self.taint = Taint(self.lanes)
        self.has_strong = self.program.has_strong
        self.clocks = Clocks(
            launch.clock, ctas, self.warps_per_cta, launch.grid_size, world=self.program.orders_ctas and self.checks
        )
        self.shared = Shared(self, launch.shared_bytes, self.program.shared_granule)
        self.copies = Copies(self)
        self.wgmma = Warpgroups(self)
        self.ordering = Ordering(self, launch.published)
        self.races = launch.races
        if self.races is not None:
            self.races.attach(self)
        self.local = np.zeros((self.lanes, max(16, -(-self.program.body.local_bytes // 16) * 16)), np.uint8)
        self.local_defined = np.zeros(self.local.shape if self.program.body.local_bytes else (1, 1), bool)
        self.saw_undefined = bool(self.program.maybe_undefined)
        self.racy_reads: set[int] = set()
        self.changes = 0  # stores and atomics that may have changed what others see
        for r in self.program.maybe_undefined:
            kind = self.program.register_dtype(r)
            self.registers[r] = np.zeros(self.lanes, kind)
        self.taint.start(self.program.maybe_undefined)

    def _special(self) -> dict[str, Array]:
        grid, block = self.launch.grid, self.launch.block
        t, c = self.thread_of, self.ctas[self.cta_of]
        found = {
            "tid.x": t % block[0],
            "tid.y": t // block[0] % block[1],
            "tid.z": t // (block[0] * block[1]),
            "ctaid.x": c % grid[0],
            "ctaid.y": c // grid[0] % grid[1],
            "ctaid.z": c // (grid[0] * grid[1]),
            "laneid": t & 31,
            "warpid": t >> 5,
            "nwarpid": np.full(self.lanes, 64),
            "smid": self.cta_of % 132,
            "nsmid": np.full(self.lanes, 132),
            "dynamic_smem_size": np.full(self.lanes, self.launch.dynamic_shared),
            "total_smem_size": np.full(self.lanes, self.launch.shared_bytes),
        }
        for axis, n, m in zip("xyz", block, grid, strict=True):
            found[f"ntid.{axis}"] = np.full(self.lanes, n)
            found[f"nctaid.{axis}"] = np.full(self.lanes, m)
            # Without clusters every CTA is a cluster of its own.
            found[f"clusterid.{axis}"] = found[f"ctaid.{axis}"]
            found[f"nclusterid.{axis}"] = found[f"nctaid.{axis}"]
            found[f"cluster_ctaid.{axis}"] = np.zeros(self.lanes)
            found[f"cluster_nctaid.{axis}"] = np.ones(self.lanes)
        found["cluster_ctarank"] = np.zeros(self.lanes)
        found["cluster_nctarank"] = np.ones(self.lanes)
        found["is_explicit_cluster"] = np.zeros(self.lanes, bool)
        zero = np.zeros(self.lanes, np.uint32)
        for name in ("clock", "clock_hi", "gridid", "globaltimer_lo", "globaltimer_hi"):
            found[name] = zero
        one = np.uint64(1)
        bit = one << (t & 31).astype(np.uint64)
        full = np.uint64(0xFFFFFFFF)
        found |= {
            "lanemask_eq": bit,
            "lanemask_lt": bit - one,
            "lanemask_le": (bit << one) - one,
            "lanemask_gt": full & ~((bit << one) - one),
            "lanemask_ge": full & ~(bit - one),
        }
        typed = {name: v if name == "is_explicit_cluster" else v.astype(np.uint32) for name, v in found.items()}
        return typed | {name: np.zeros(self.lanes, np.uint64) for name in ("clock64", "globaltimer")}

    # ------------------------------------------------------------------ what the emitted code calls
    def full(self, value: Any) -> Array:
        """A scalar as an array over the lanes; arrays pass."""
        if isinstance(value, np.ndarray) and value.ndim:
            return value
        return np.full(self.lanes, value)

    def constant(self, value: Any) -> Array:
        key = (value.dtype, value.tobytes())
        found = self.constants.get(key)
        if found is None:
            found = self.constants[key] = np.full(self.lanes, value)
        return found

    def symbol(self, name: str, space: str, dtype: Any) -> Any:
        if space == "shared":
            return dtype(self.launch.shared_offsets[name])
        if space == "local":
            return dtype(self.program.body.local_offsets[name])
        if space in ("global", "const"):
            return dtype(GLOBAL_BASE + self.launch.global_offsets[name])
        return dtype(next(p.offset for p in self.program.body.parameters if p.name == name))

    def parameter(self, name: str, offset: int, dtype: Any, count: int) -> list[Array]:
        key = (name, offset, dtype, count)
        found = self.parameters.get(key)
        if found is None:
            p = next(p for p in self.program.body.parameters if p.name == name)
            size = np.dtype(dtype).itemsize * count
            if offset < 0 or offset + size > p.size:
                raise EmulatorError(f"{size} bytes at offset {offset} of parameter {name}, which has {p.size} bytes")
            start = p.offset + offset
            values = self.launch.parameters[start : start + size].view(dtype)
            found = self.parameters[key] = [np.full(self.lanes, v) for v in values]
        return found

    # ------------------------------------------------------------------ reports
    def report(
        self, kind: str, index: int, lanes: Array, message: str, buffer: str = "", offset: int | None = None
    ) -> None:
        if not self.checks and kind not in ("barrier-deadlock", "livelock", "trap", "out-of-bounds"):
            return
        lane = int(lanes[0]) if len(lanes) else 0
        cta = self.cta_coordinates(int(self.ctas[self.cta_of[lane]]))
        self.launch.report(kind, index, message, buffer, offset, cta, int(self.thread_of[lane]), max(1, len(lanes)))

    def cta_coordinates(self, index: int) -> tuple[int, int, int]:
        x, y, _ = self.launch.grid
        return (int(index % x), int(index // x % y), int(index // (x * y)))

    def both_nan(self, index: int, a: Array, b: Array) -> Array:
        """Where a store of floats writes NaN over NaN: a GPU's arithmetic has one NaN, numpy's that of an operand."""
        kind = self.program.stored_float(index)
        if kind is None or np.dtype(kind).itemsize != a.dtype.itemsize:
            return np.zeros(len(a), bool)
        return np.isnan(a.view(kind)) & np.isnan(b.view(kind))

    def report_conflict(self, index: int, lanes: Array | None, offset: Array, wrong: Array) -> None:
        """Lanes of one store that find another lane's value at their address."""
        at = int(np.flatnonzero(wrong)[0])
        place = self.arena.place(int(offset[at]))
        who = np.flatnonzero(wrong) if lanes is None else lanes[wrong]
        lane = int(who[0])
        if self.races is not None and self.races.foreign(lane, int(offset[at])):
            self.report(
                "global-race", index, who, "two warps write different values to one address", place.buffer, place.offset
            )
            return
        self.report(
            "conflicting-stores",
            index,
            who,
            "lanes of one instruction store different values to one address",
            place.buffer,
            place.offset,
        )

    def require_defined(self, what: str, index: int, registers: tuple[int, ...], mask: Array) -> None:
        """Report undefined data that is about to matter."""
        if not self.taint.any:
            return
        tainted = self.taint.of(registers)
        if tainted is not None and (tainted := tainted & mask).any():
            lanes = np.flatnonzero(tainted)
            if self.racy_reads and not self.saw_undefined:
                line = self.program.body.instructions[min(self.racy_reads)].line
                message = f"what PTX line {line} read while another warp of the CTA wrote it is used as {what}"
                self.report("global-race", index, lanes, message)
            else:
                self.report("uninitialised", index, lanes, f"undefined data is used as {what}")

    def require_warp(self, index: int, mask: Array, what: str) -> None:
        """`.aligned` instructions need every living lane of the warp."""
        lanes = mask.reshape(-1, 32)
        part = lanes.any(1) & ~(lanes | self.exited.reshape(-1, 32)).all(1)
        if part.any():
            self.report(
                "divergent-warp", index, np.flatnonzero(np.repeat(part, 32) & mask), f"{what} by part of a warp"
            )

    def unsupported(self, index: int, reason: str) -> EmulatorError:
        return self.program.body.instructions[index].unsupported(reason)
