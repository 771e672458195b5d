"""wgmma in flight: registers and shared memory that must be left alone until wgmma.wait_group, and the fences it needs.

The product is computed when wgmma.mma_async is issued; a program without reports cannot see the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.shared import GENERIC, READ_BY_WGMMA
from hotloop.emulator.types import Array

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine


@dataclass
class Flight:
    """One wgmma.mma_async."""

    index: int
    mask: Array
    group: Array  # commit group per lane
    accumulators: frozenset[int]
    inputs: frozenset[int]  # registers of A
    granules: Array
    owners: Array  # lane per granule


class Warpgroups:
    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.flying: list[Flight] = []
        self.committed = np.zeros(machine.lanes, np.int64)
        # Registers that were written since the last wgmma.fence. At first all are: the first wgmma needs a fence.
        self.unfenced: dict[int, Array] = dict.fromkeys(machine.program.generator.wgmma_registers, machine.everyone)

    # ------------------------------------------------------------------ other instructions
    def touch(self, index: int, registers: tuple[int, ...], mask: Array) -> None:
        written = set(self.m.program.body.instructions[index].destinations)
        for flight in self.flying:
            for r in registers:
                if r in flight.accumulators or (r in flight.inputs and r in written):
                    lanes = flight.mask & mask
                    if lanes.any():
                        what = "written" if r in written else "read"
                        self.m.report(
                            "wgmma-in-flight",
                            index,
                            np.flatnonzero(lanes),
                            f"a register of the wgmma at PTX line {self._line(flight)} is {what} before its wait_group",
                        )
                        return

    def _line(self, flight: Flight) -> int:
        return self.m.program.body.instructions[flight.index].line

    def wrote(self, registers: tuple[int, ...], mask: Array) -> None:
        for r in registers:
            old = self.unfenced.get(r)
            self.unfenced[r] = mask if old is None else old | mask

    # ------------------------------------------------------------------ wgmma itself
    def fence(self, index: int, mask: Array, everyone: bool) -> None:
        self.require(index, mask, everyone, "wgmma.fence")
        if everyone:
            self.unfenced.clear()
            return
        for r in list(self.unfenced):
            left = self.unfenced[r] & ~mask
            if left.any():
                self.unfenced[r] = left
            else:
                del self.unfenced[r]

    def require(self, index: int, mask: Array, everyone: bool, what: str) -> None:
        if not everyone:
            groups = mask.reshape(-1, 128)
            part = groups.any(1) & ~groups.all(1)
            if part.any():
                lanes = np.flatnonzero(np.repeat(part, 128) & mask)
                self.m.report("divergent-warp", index, lanes, f"{what} by part of a warpgroup")

    def check_registers(self, index: int, accumulators: tuple[int, ...], inputs: tuple[int, ...], mask: Array) -> None:
        for r in (*accumulators, *inputs):
            late = self.unfenced.get(r)
            if late is not None and (late := late & mask).any():
                self.m.report(
                    "wgmma-fence", index, np.flatnonzero(late), "registers were written after the last wgmma.fence"
                )
                break
        for flight in self.flying:
            # Accumulating into the same registers is ordered; anything else of a wgmma in flight is not.
            mixed = (flight.accumulators & set(inputs)) or (
                flight.accumulators & set(accumulators) and flight.accumulators != set(accumulators)
            )
            if mixed and (flight.mask & mask).any():
                self.m.report(
                    "wgmma-in-flight",
                    index,
                    np.flatnonzero(flight.mask & mask),
                    f"registers of the wgmma at PTX line {self._line(flight)}, still in flight, are used otherwise",
                )
                break

    def launch(
        self,
        index: int,
        mask: Array,
        accumulators: tuple[int, ...],
        inputs: tuple[int, ...],
        granules: Array,
        owners: Array,
    ) -> None:
        self.m.shared.state[granules] |= READ_BY_WGMMA
        self.flying.append(
            Flight(index, mask, self.committed.copy(), frozenset(accumulators), frozenset(inputs), granules, owners)
        )

    def commit(self, mask: Array) -> None:
        self.committed = self.committed + mask

    def wait(self, mask: Array, pending: int) -> None:
        limit = self.committed - pending
        still = []
        for flight in self.flying:
            left = flight.mask & ~(mask & (flight.group < limit))
            done = ~left[flight.owners]
            self.m.shared.state[flight.granules[done]] &= ~READ_BY_WGMMA
            if left.any():
                flight.mask = left
                flight.granules, flight.owners = flight.granules[~done], flight.owners[~done]
                still.append(flight)
        # Several may read the same place: what is still in flight stays marked.
        for flight in still:
            self.m.shared.state[flight.granules] |= READ_BY_WGMMA
        self.flying = still

    def proxy_fence(self, mask: Array) -> None:
        """Generic writes that are ordered before the fence become visible to the asynchronous proxy."""
        m, shared = self.m, self.m.shared
        if not m.program.has_wgmma:
            return
        state = shared.state
        pending = np.flatnonzero(state & GENERIC)
        if not len(pending):
            return
        word = state[pending]
        cta = pending * shared.granule // shared.stride
        writer = np.maximum(((word >> 8) & 0xFFFF) - 1, 0)
        warps = mask.reshape(-1, 32).any(1).reshape(m.cta_count, -1)
        known = m.clocks.known.reshape(m.cta_count, m.warps_per_cta, m.warps_per_cta)
        # The writes of a warp are fenced if any fencing warp knows them, or is that warp.
        best = np.where(warps[:, :, None], known, -1).max(1)
        seen = ((word >> 24) <= best[cta, writer >> 5]) | warps[cta, writer >> 5]
        state[pending[seen]] &= ~GENERIC

    def finish(self) -> None:
        for flight in self.flying:
            self.m.report(
                "wgmma-in-flight",
                flight.index,
                np.flatnonzero(flight.mask),
                "the kernel ended before this wgmma was waited for",
            )
