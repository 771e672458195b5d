"""cp.async in flight: when it lands and who may look. `late` copies land when they are waited for, `early` at issue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hotloop.emulator.shared import Plan
from hotloop.emulator.types import UINT, Array

if TYPE_CHECKING:
    from hotloop.emulator.machine import Machine


@dataclass
class Copy:
    """One cp.async instruction of a set of lanes."""

    index: int
    plan: Plan
    data: Array  # as granules
    group: Array  # the commit group of each access
    left: Array  # accesses that have not landed


class Copies:
    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.early = machine.launch.options.async_copies == "early"
        self.flying: list[Copy] = []
        self.committed = np.zeros(machine.lanes, np.int64)

    def issue(self, index: int, plan: Plan, data: Array) -> None:
        """data: bytes, (accesses, size)."""
        shared = self.machine.shared
        new = np.ascontiguousarray(data).reshape(-1).view(UINT[8 * shared.granule])
        shared.check_write(index, plan, None)
        if self.early:
            shared.put(index, plan, new, 0)
        shared.mark_copying(plan)
        count = len(plan.lanes)
        self.flying.append(Copy(index, plan, new, self.committed[plan.lanes], np.ones(count, bool)))

    def commit(self, mask: Array) -> None:
        self.committed = self.committed + mask

    def wait(self, mask: Array, everyone: bool, pending: int) -> None:
        """Land all groups but the last `pending` ones of each lane."""
        limit = self.committed - pending
        still = []
        for copy in self.flying:
            lanes = copy.plan.lanes
            done = copy.left & (copy.group < limit[lanes])
            if not everyone:
                done &= mask[lanes]
            if done.any():
                self._land(copy, None if done.all() else done)
                copy.left = copy.left & ~done
            if copy.left.any():
                still.append(copy)
        self.flying = still

    def _land(self, copy: Copy, part: Array | None) -> None:
        shared, plan = self.machine.shared, copy.plan
        granules, marks, data = plan.granules, plan.marks, copy.data
        if part is not None:
            deep = np.repeat(part, len(granules) // len(part))
            granules, marks, data = granules[deep], marks[deep], data[deep]
        if not self.early:
            shared.data.view(UINT[8 * shared.granule])[granules] = data
        shared.state[granules] = marks | shared.landed_flags()

    def finish(self) -> None:
        """At the end of the kernel nothing may be in flight, unless that has been reported already."""
        if self.machine.launch.reported("copy-in-flight"):
            return
        for copy in self.flying:
            if copy.left.any():
                self.machine.report(
                    "copy-unfinished",
                    copy.index,
                    copy.plan.lanes[copy.left],
                    "the kernel ended before this cp.async was waited for",
                    "shared",
                    int(copy.plan.byte[copy.left][0] % self.machine.shared.stride),
                )
