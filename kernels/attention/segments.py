"""Which segments of a packed batch can be computed as one dense batch, from `cu_seqlens` that the host can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`count` segments of equal lengths at equal distances: a dense batch seen through strides, without a copy."""

    count: int
    start_q: int
    start_k: int
    step_q: int
    step_k: int
    length_q: int
    length_k: int

    def of_q(self, x: Tensor) -> Tensor:
        """(total, ...) -> (count, length_q, ...), a view."""
        return _strided(x, self.count, self.start_q, self.step_q, self.length_q)

    def of_k(self, x: Tensor) -> Tensor:
        """(total, ...) -> (count, length_k, ...), a view."""
        return _strided(x, self.count, self.start_k, self.step_k, self.length_k)

    def covers(self, total_q: int, total_k: int) -> bool:
        """Whether the run is the whole packed batch, in order."""
        return (
            self.count * self.length_q == total_q
            and self.count * self.length_k == total_k
            and self.start_q == self.start_k == 0
            and (self.count == 1 or (self.step_q, self.step_k) == (self.length_q, self.length_k))
        )


def _strided(x: Tensor, count: int, start: int, step: int, length: int) -> Tensor:
    row, *rest = x.stride()
    return x.as_strided((count, length, *x.shape[1:]), (step * row, row, *rest), x.storage_offset() + start * row)


@dataclass(frozen=True)
class Plan:
    """Runs that hold every segment with a query and a key, once; the others have no part in the computation.

    A plan depends on lengths alone, never on values, so that a document's result does not change with the content of
    another.
    """

    runs: tuple[Run, ...]
    written_q: int  # rows of q and of k that belong to a run
    written_k: int


@lru_cache(maxsize=32)
def plan(cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...]) -> Plan:
    """Segments grouped by their lengths, each group split where the distances change. Cached, for a model's layers."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    start_q, start_k = cu_seqlens_q[0], cu_seqlens_k[0]
    for stop_q, stop_k in zip(cu_seqlens_q[1:], cu_seqlens_k[1:], strict=True):
        if stop_q > start_q and stop_k > start_k:
            groups.setdefault((stop_q - start_q, stop_k - start_k), []).append((start_q, start_k))
        start_q, start_k = stop_q, stop_k
    runs = tuple(Run(*run, *lengths) for lengths, starts in groups.items() for run in _progressions(starts))
    written_q = sum(run.count * run.length_q for run in runs)
    written_k = sum(run.count * run.length_k for run in runs)
    return Plan(runs, written_q, written_k)


def _progressions(starts: list[tuple[int, int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """(count, start_q, start_k, step_q, step_k) of maximal arithmetic progressions, from the left."""
    first = 0
    while first < len(starts):
        (q, k), last = starts[first], first
        step_q = step_k = 0
        if first + 1 < len(starts):
            step_q, step_k = starts[first + 1][0] - q, starts[first + 1][1] - k
            while last + 1 < len(starts) and starts[last + 1] == (starts[last][0] + step_q, starts[last][1] + step_k):
                last += 1
        yield last - first + 1, q, k, step_q, step_k
        first = last + 1
