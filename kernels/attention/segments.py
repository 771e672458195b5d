"""Which segments of a packed batch can be computed as one dense batch, from `cu_seqlens` that the host can read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

PADDED_TO = 16
"""Lengths are padded to a multiple of this. Eight pieces of 8 to 255 tokens, forward and backward, bf16: 34 ms as they
are, 22 ms padded to 8, 20 ms to 16, 22 ms to 32 (fp32: 15, 13, 11, 16; one Zen 4 thread, H = 6, D = 64)."""


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
class Padded:
    """Segments copied into a buffer of their own, each followed by rows of zeros up to its padded length."""

    runs: tuple[Run, ...]  # in the buffer
    rows: Tensor  # (n,) int64: the rows of the packed batch that are copied, in the order of the buffer
    slots: Tensor  # (n,) int64: where in the buffer
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """(total, ...) -> (size, ...)."""
        return x.new_zeros((self.size, *x.shape[1:])).index_copy_(0, self.slots, x.index_select(0, self.rows))

    def scatter(self, target: Tensor, x: Tensor) -> None:
        """The inverse of `gather`, into target (total, ...)."""
        target.index_copy_(0, self.rows, x.index_select(0, self.slots))

    def hidden_keys(self, run: Run) -> Tensor:
        """(count, 1, 1, length_k) bool: the rows of zeros."""
        hidden = torch.ones(self.size, dtype=torch.bool)
        hidden[self.slots] = False
        return run.of_k(hidden)[:, None, None]


@dataclass(frozen=True)
class Plan:
    """Every segment that has a query and a key, once; the others have no part in the computation.

    A plan depends on lengths alone, never on values, so that a document's result does not change with the content of
    another.
    """

    runs: tuple[Run, ...]
    padded: Padded | None
    written_q: int  # rows of q and of k that belong to a segment of the plan
    written_k: int


@lru_cache(maxsize=32)
def plan(cu_seqlens_q: tuple[int, ...], cu_seqlens_k: tuple[int, ...], pad: bool) -> Plan:
    """`pad` allows padding; it takes segments with the same boundaries in q and k. Cached, for the layers of a model."""
    groups: dict[tuple[int, int], list[tuple[int, int]]] = {}
    ragged: dict[int, list[tuple[int, int]]] = {}
    written_q = written_k = 0
    start_q, start_k = cu_seqlens_q[0], cu_seqlens_k[0]
    for stop_q, stop_k in zip(cu_seqlens_q[1:], cu_seqlens_k[1:], strict=True):
        length_q, length_k = stop_q - start_q, stop_k - start_k
        if length_q > 0 and length_k > 0:
            written_q, written_k = written_q + length_q, written_k + length_k
            if pad and length_q % PADDED_TO != 0 and (start_q, stop_q) == (start_k, stop_k):
                ragged.setdefault(-(-length_q // PADDED_TO) * PADDED_TO, []).append((start_q, length_q))
            else:
                groups.setdefault((length_q, length_k), []).append((start_q, start_k))
        start_q, start_k = stop_q, stop_k
    runs = tuple(Run(*run, *lengths) for lengths, starts in groups.items() for run in _progressions(starts))
    return Plan(runs, _padded(ragged) if ragged else None, written_q, written_k)


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


def _padded(
    ragged: dict[int, list[tuple[int, int]]],  # padded length -> (start, length) of its segments
) -> Padded:
    runs, rows, slots, at = [], [], [], 0
    for padded, members in ragged.items():
        runs.append(Run(len(members), at, at, padded, padded, padded, padded))
        for start, length in members:
            rows.append(torch.arange(start, start + length))
            slots.append(torch.arange(at, at + length))
            at += padded
    return Padded(tuple(runs), torch.cat(rows), torch.cat(slots), at)
