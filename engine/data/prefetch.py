"""Batches assembled ahead of the step by background threads, in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from hotloop.engine.data.batches import Batch, BatchSource


class Prefetcher:
    """Iterates over the micro-batches of steps `start_step`, `start_step + 1`, ... of one rank.

    `workers` threads assemble up to `ahead` steps in advance (numpy releases the interpreter while it gathers); with 0
    the loop assembles. What comes out is the same. An exception of a worker is raised by `next` at its step.
    `wait_seconds` is how long the last `next` took: the time that the step waited for data.
    """

    def __init__(
        self,
        source: BatchSource,
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
        self._pending: deque[Future[list[Batch]]] = deque()
        self._submitted = start_step
        self._closed = False
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
                batches = self._assemble(self._next_step)
            else:
                self._fill()
                batches = self._pending.popleft().result()
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

    def _assemble(self, step: int) -> list[Batch]:
        batches = self._source.micro_batches(step, self._rank, self._world_size, self._micro_batch)
        return [batch.pin_memory() if self._pin_memory else batch for batch in batches]
