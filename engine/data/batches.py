"""(seed, step, rank) -> tensors.

A document's stored tokens are its targets; its inputs are the same shifted right behind `end_id`:

    target[i] = stored[i]        input[i] = stored[i - 1]        input[0] = end_id

so every token, the document's end included, is predicted once, and no position predicts nothing but padding.
Letters: B micro-batch, T context.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hotloop.engine.data.order import Order, Source
from hotloop.engine.data.packing import BARE, Frame, Packs
from hotloop.engine.data.shards import Split
from hotloop.engine.errors import UserError

IGNORE_INDEX = -100
RELEASE_AFTER = 64
"""Packs read before mapped pages are given back; each may map 64 KiB around itself."""


@dataclass(frozen=True)
class Batch:
    """Packed sequences. A segment is one piece of a document, or the padding that ends a row."""

    tokens: Tensor  # (B, T) int64, inputs; end_id in padding
    targets: Tensor  # (B, T) int64, IGNORE_INDEX in padding
    positions: Tensor  # (B, T) int64, 0.. within each piece; 0 in padding
    document_ids: Tensor  # (B, T) int32, number of the segment within the micro-batch
    cu_seqlens: Tensor  # (capacity + 1,) int32, segments of the flattened B*T positions; past the last one: B*T
    n_supervised: int  # targets that are not IGNORE_INDEX
    n_tokens: int  # B*T without padding
    sum_squares: int  # over its pieces, of length^2: pairs of positions that see each other if nothing is masked

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copies do not block if the batch is pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            tokens=function(self.tokens),
            targets=function(self.targets),
            positions=function(self.positions),
            document_ids=function(self.document_ids),
            cu_seqlens=function(self.cu_seqlens),
        )


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents and the rows they go to; rows ascending, each row's pieces in order."""

    stored: np.ndarray  # (n_tokens,) int64, the pieces' tokens one after the other
    lengths: np.ndarray  # (n_pieces,) int64
    row: np.ndarray  # (n_pieces,) int64
    before: np.ndarray  # (n_pieces,) int64, the token before each piece; end_id where a document begins
    unscored: np.ndarray | None = None  # (n_pieces,) int64, leading targets that are context only


def assemble(pieces: Pieces, micro_batch: int, context: int, capacity: int, end_id: int) -> Batch:
    """Lay pieces out as one causal Batch of (micro_batch, context) with room for `capacity` segments."""
    n_tokens = len(pieces.stored)
    begin = np.cumsum(pieces.lengths) - pieces.lengths
    inputs = np.empty(n_tokens, dtype=np.int64)
    inputs[1:] = pieces.stored[:-1]
    inputs[begin] = pieces.before
    targets = pieces.stored
    if pieces.unscored is not None:
        within = np.arange(n_tokens) - np.repeat(begin, pieces.lengths)
        targets = np.where(within < np.repeat(pieces.unscored, pieces.lengths), IGNORE_INDEX, targets)
    return Layout(pieces.lengths, pieces.row, micro_batch, context).batch(inputs, targets, capacity, end_id)


class Layout:
    """Where the tokens of pieces stand in a batch; rows ascending, each row's pieces in order."""

    def __init__(self, lengths: np.ndarray, row: np.ndarray, micro_batch: int, context: int):
        self.lengths, self.micro_batch, self.context = lengths, micro_batch, context
        self.filled = np.bincount(row, weights=lengths, minlength=micro_batch).astype(np.int64)
        # Where pieces begin in the flattened batch: behind all earlier rows, padding included, and the row's earlier.
        compact = np.cumsum(lengths) - lengths
        self.begin = compact + row * context - (np.cumsum(self.filled) - self.filled)[row]
        self.within = np.arange(int(lengths.sum())) - np.repeat(compact, lengths)  # of each token in its piece
        self.at = np.repeat(self.begin, lengths) + self.within  # of each token in the flattened batch

    def batch(self, inputs: np.ndarray, targets: np.ndarray, capacity: int, fill: int) -> Batch:
        """inputs, targets (n_tokens,) int64; `fill` is the input of padding."""
        micro_batch, context = self.micro_batch, self.context
        size = micro_batch * context
        padding = np.arange(micro_batch) * context + self.filled
        segments = np.sort(np.concatenate([self.begin, padding[self.filled < context]]))
        if len(segments) > capacity:
            raise ValueError(f"{len(segments)} segments in a batch with room for {capacity}")
        segment_at = np.zeros(size, dtype=np.int32)
        segment_at[segments[1:]] = 1
        flat = [np.full(size, fill), np.full(size, IGNORE_INDEX), np.zeros(size, dtype=np.int64)]
        for out, values in zip(flat, (inputs, targets, self.within), strict=True):
            out[self.at] = values
        tokens, targets_, positions = (torch.from_numpy(out).view(micro_batch, context) for out in flat)
        cu_seqlens = np.full(capacity + 1, size, dtype=np.int32)
        cu_seqlens[: len(segments)] = segments
        return Batch(
            tokens=tokens,
            targets=targets_,
            positions=positions,
            document_ids=torch.from_numpy(np.cumsum(segment_at, dtype=np.int32)).view(micro_batch, context),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            n_supervised=int((targets != IGNORE_INDEX).sum()),
            n_tokens=len(inputs),
            sum_squares=int(np.square(self.lengths).sum()),
        )


class Batches(Protocol):
    """The global batches of a run: a pure function of (seed, step), whatever the ranks and micro-batches they are cut
    into."""

    def n_supervised(self, step: int) -> float:
        """What the summed loss of the whole global batch is divided by; 0 where it supervises nothing."""

    def n_tokens(self, step: int) -> int:
        """Tokens of the whole global batch, without padding."""

    def micro_batches(
        self, step: int, rank: int = 0, world_size: int = 1, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        """This rank's part of the global batch; micro_batch none: all of it at once."""


class BatchSource:
    """Packs of documents, cut into ranks and micro-batches.

    A global batch is `global_batch` packs, a pure function of (seed, step). Rank r of W takes the r-th contiguous part,
    micro-batches are contiguous parts of that: their union is the same global batch for every W and micro-batch.

    Parameters:
        splits: one, or several to mix; they must share a tokenizer
        weights: share of the packs drawn from each; none: in proportion to their packs, one pass over all alike
        index_folder: where the index of packs is kept; none: beside the shards
        frame: what sequences hold besides the text, for a source that assembles them otherwise
    Raises UserError for splits of different tokenizers and for a batch that cannot be divided.
    """

    def __init__(
        self,
        splits: Split | Sequence[Split],
        context: int,
        global_batch: int,
        seed: int = 0,
        *,
        weights: Sequence[float] | None = None,
        index_folder: Path | None = None,
        frame: Frame = BARE,
    ):
        self.splits = (splits,) if isinstance(splits, Split) else tuple(splits)
        if not self.splits:
            raise UserError("no source of data")
        first = self.splits[0]
        for split in self.splits[1:]:
            if split.tokenizer_hash != first.tokenizer_hash or split.end_id != first.end_id:
                raise UserError(f"{split.folder} and {first.folder} were prepared with different tokenizers")
        self.context, self.global_batch, self.end_id = context, global_batch, first.end_id
        self.packs = [Packs.of(split, context, index_folder, frame) for split in self.splits]
        if weights is None:
            weights = [packs.n_packs for packs in self.packs]
        if len(weights) != len(self.packs):
            raise UserError(f"{len(weights)} weights for {len(self.packs)} sources")
        sources = [Source(packs.n_packs, float(weight)) for packs, weight in zip(self.packs, weights, strict=True)]
        self.order = Order(sources, global_batch, seed)
        self._max_segments = max(packs.max_segments for packs in self.packs)
        self._unreleased = 0

    def capacity(self, micro_batch: int) -> int:
        """Segments that any micro-batch of this size may have."""
        return micro_batch * self._max_segments

    def epoch_of(self, step: int, source: int = 0) -> float:
        return self.order.epoch_of(step, source)

    def n_supervised(self, step: int) -> int:
        """Targets in the whole global batch: each token is one."""
        return self.n_tokens(step)

    def n_tokens(self, step: int) -> int:
        """Positions that hold a token in the whole global batch, from the index alone."""
        source, pack = self.order.samples(step)
        return sum(int(self.packs[s].tokens(pack[source == s]).sum()) for s in np.unique(source))

    def check(self, world_size: int, micro_batch: int) -> None:
        """Raises UserError if the global batch cannot be cut this way."""
        if world_size < 1 or micro_batch < 1 or self.global_batch % (world_size * micro_batch):
            raise UserError(
                f"global_batch = {self.global_batch}: must be a multiple of ranks x micro_batch = "
                f"{world_size} x {micro_batch}"
            )

    def micro_batches(
        self, step: int, rank: int = 0, world_size: int = 1, micro_batch: int | None = None
    ) -> Iterator[Batch]:
        """This rank's part of the global batch of a step; micro_batch none: all of it at once."""
        if micro_batch is None:
            micro_batch = max(self.global_batch // max(world_size, 1), 1)
        self.check(world_size, micro_batch)
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} of {world_size}")
        source, epoch, pack = self.order.draw(step)
        local = self.global_batch // world_size
        for start in range(rank * local, (rank + 1) * local, micro_batch):
            rows = slice(start, start + micro_batch)
            yield self._batch(source[rows], epoch[rows], pack[rows])

    def _batch(self, source: np.ndarray, epoch: np.ndarray, pack: np.ndarray) -> Batch:
        """One micro-batch from (B,) sources, their epochs and packs."""
        pieces = self._pieces(source, pack)
        return assemble(pieces, len(source), self.context, self.capacity(len(source)), self.end_id)

    def _pieces(self, source: np.ndarray, pack: np.ndarray) -> Pieces:
        parts = []
        for number in np.unique(source):
            split, rows = self.splits[number], np.flatnonzero(source == number)
            starts, lengths, row = self.packs[number].pieces(pack[rows])
            parts.append(Pieces(split.read(starts, lengths), lengths, rows[row], split.before(starts)))
        self._unreleased += len(pack)  # threads may miss each other's count: no harm
        if self._unreleased >= RELEASE_AFTER:
            self._unreleased = 0
            for split, packs in zip(self.splits, self.packs, strict=True):
                split.release()
                packs.map.release()
        return parts[0] if len(parts) == 1 else _interleave(parts)


def _interleave(parts: list[Pieces]) -> Pieces:
    """Pieces of several sources in the order of their rows."""
    lengths = np.concatenate([part.lengths for part in parts])
    row = np.concatenate([part.row for part in parts])
    order = np.argsort(row, kind="stable")
    begin = np.cumsum(lengths) - lengths
    lengths_sorted = lengths[order]
    compact = np.cumsum(lengths_sorted) - lengths_sorted
    at = np.arange(int(lengths.sum())) + np.repeat(begin[order] - compact, lengths_sorted)
    stored = np.concatenate([part.stored for part in parts])[at]
    before = np.concatenate([part.before for part in parts])[order]
    return Pieces(stored, lengths_sorted, row[order], before)


class Prefetcher:
    """Iterates over the micro-batches of steps `start_step`, `start_step + 1`, ... of one rank.

    `workers` threads assemble up to `ahead` steps in advance (numpy releases the interpreter while it gathers); with 0
    the loop assembles. What comes out is the same. An exception of a worker is raised by `next` at its step.
    `wait_seconds` is how long the last `next` took: the time that the step waited for data; `n_supervised` is that of
    its global batch.
    """

    def __init__(
        self,
        source: Batches,
        start_step: int = 0,
        *,
        workers: int = 1,
        rank: int = 0,
        world_size: int = 1,
        micro_batch: int | None = None,
        stop_step: int | None = None,
        ahead: int | None = None,
        pin_memory: bool = False,
    ):
        if workers < 0:
            raise ValueError(f"workers = {workers}: must not be negative")
        self._source, self._micro_batch = source, micro_batch
        self._rank, self._world_size, self._pin_memory = rank, world_size, pin_memory
        self._next_step, self._stop_step = start_step, stop_step
        self._ahead = ahead if ahead is not None else 2 * workers
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="hotloop-data") if workers else None
        self._pending: deque[Future[tuple[list[Batch], float]]] = deque()
        self._submitted = start_step
        self._closed = False
        self.n_supervised = 0.0
        self.wait_seconds = 0.0
        self.total_wait_seconds = 0.0
        self._fill()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._closed or self._next_step == self._stop_step:
            raise StopIteration
        started = time.perf_counter()
        try:
            if self._pool is None:
                batches, self.n_supervised = self._assemble(self._next_step)
            else:
                self._fill()
                batches, self.n_supervised = self._pending.popleft().result()
        except BaseException:
            self.close()
            raise
        self._next_step += 1
        self.wait_seconds = time.perf_counter() - started
        self.total_wait_seconds += self.wait_seconds
        self._fill()
        return batches

    def close(self) -> None:
        """Stop the threads; what they had assembled is dropped. Safe to call twice."""
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        while (
            self._pool is not None and len(self._pending) < max(self._ahead, 1) and self._submitted != self._stop_step
        ):
            self._pending.append(self._pool.submit(self._assemble, self._submitted))
            self._submitted += 1

    def _assemble(self, step: int) -> tuple[list[Batch], float]:
        batches = self._source.micro_batches(step, self._rank, self._world_size, self._micro_batch)
        pinned = [batch.pin_memory() if self._pin_memory else batch for batch in batches]
        return pinned, self._source.n_supervised(step)
