"""Counted work. An ideal model, not time: instructions issued, sectors and wavefronts moved, tensor-core operations.

A warp instruction is counted when any lane of the warp runs its block; a guarded instruction counts for lanes whose
guard is false, as it is issued for them too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from hotloop.emulator.types import Array

NAMES = (
    "warp_instructions",
    "thread_instructions",
    "integer",
    "floating",
    "conversion",
    "move",
    "control",
    "synchronisation",
    "shuffle",
    "tensor",
    "global_memory",
    "shared_memory",
    "local_memory",
    "atomic",
    "global_load_requests",
    "global_load_sectors",
    "global_load_bytes",
    "global_store_requests",
    "global_store_sectors",
    "global_store_bytes",
    "shared_phases",
    "shared_wavefronts",
    "shared_bytes",
    "shared_bank_conflicts",
    "tensor_operations",
    "mma_m16n8k16",
)


class Counters(Mapping[str, float]):
    """Read like a mapping; `a + b` adds two launches; `by_line()` and `table()` tell them apart by source line."""

    def __init__(self, lines: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self._lines: dict[str, dict[str, float]] = {k: dict(v) for k, v in (lines or {}).items()}
        self._total: dict[str, float] = dict.fromkeys(NAMES, 0)
        for counts in self._lines.values():
            for name, n in counts.items():
                self._total[name] += n

    def __getitem__(self, name: str) -> float:
        if name == "simt_efficiency":
            return self["thread_instructions"] / max(1, 32 * self["warp_instructions"])
        return self._total[name]

    def __iter__(self) -> Iterator[str]:
        return iter((*NAMES, "simt_efficiency"))

    def __len__(self) -> int:
        return len(NAMES) + 1

    def __add__(self, other: Counters) -> Counters:
        if not isinstance(other, Counters):
            return NotImplemented
        lines = {k: dict(v) for k, v in self._lines.items()}
        for k, counts in other._lines.items():
            mine = lines.setdefault(k, dict.fromkeys(NAMES, 0))
            for name, n in counts.items():
                mine[name] = mine.get(name, 0) + n
        return Counters(lines)

    def by_line(self) -> dict[str, Counters]:
        return {k: Counters({k: v}) for k, v in sorted(self._lines.items(), key=lambda kv: _natural(kv[0]))}

    def table(self) -> str:
        """Source lines with what they cost, the most issued first."""
        head = ("line", "warp instr", "SIMT", "ld sect/req", "st sect/req", "conflicts", "tensor ops")
        rows = [head]
        for line, c in sorted(self.by_line().items(), key=lambda kv: -kv[1]["warp_instructions"]):
            rows.append(
                (
                    line or "(no line)",
                    f"{c['warp_instructions']:.0f}",
                    f"{c['simt_efficiency']:.2f}",
                    _ratio(c["global_load_sectors"], c["global_load_requests"]),
                    _ratio(c["global_store_sectors"], c["global_store_requests"]),
                    f"{c['shared_bank_conflicts']:.0f}" if c["shared_phases"] else "",
                    f"{c['tensor_operations']:.0f}" if c["tensor_operations"] else "",
                )
            )
        widths = [max(len(r[j]) for r in rows) for j in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if j == 0 else cell.rjust(w) for j, (cell, w) in enumerate(zip(r, widths, strict=True))
            )
            for r in rows
        )


def _natural(line: str) -> tuple[str, int]:
    name, _, number = line.rpartition(":")
    return name, int(number) if number.isdigit() else 0


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.2f}" if b else ""


class Tally:
    """The counters while a launch runs: per instruction and per block."""

    def __init__(self, instructions: int, blocks: int) -> None:
        self.block_warps = np.zeros(blocks, np.int64)
        self.block_threads = np.zeros(blocks, np.int64)
        self.loads = np.zeros((instructions, 3), np.int64)
        self.stores = np.zeros((instructions, 3), np.int64)
        self.banks = np.zeros((instructions, 3), np.int64)
        self.tensor: dict[int, list[float]] = defaultdict(lambda: [0, 0])

    def memory(self, index: int, warps: Array, offset: Array, size: int, *, store: bool) -> None:
        """Requests are warps, sectors their distinct aligned 32 bytes."""
        key = (warps << 40) + (offset >> 5)
        steps = key[1:] - key[:-1]
        if len(steps) and int(steps.min()) < 0:
            key = np.sort(key)
            steps = key[1:] - key[:-1]
        sectors = 1 + int(np.count_nonzero(steps))
        requests = 1 + int(np.count_nonzero(warps[1:] != warps[:-1]))
        row = (self.stores if store else self.loads)[index]
        row += (requests, sectors, len(offset) * size)

    def shared(self, index: int, phases: int, wavefronts: int, size: int) -> None:
        self.banks[index] += (phases, wavefronts, size)

    def tensor_operations(self, index: int, operations: int, multiply_adds: int) -> None:
        """operations: instructions per warp; multiply_adds: of each."""
        row = self.tensor[index]
        row[0] += operations
        row[1] += operations * multiply_adds / (16 * 8 * 16)
