"""How a case is timed: providers take turns in one process, in shuffled order; medians and ratios are read from that.

A shared machine slows down and speeds up for seconds at a time. Whoever is timed alone gets what the machine gave him
then; within a round everyone gets nearly the same.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import torch

from hotloop.engine.train.throughput import Peak, measure_copy_bandwidth, measure_matmul_peak, measure_update_bandwidth

from harness.case import OURS, Case, Provider, Verdict

WIDE = 0.15
"""A ratio whose 20 to 80 % interval is wider than this share of it is measured on, up to MOST times the rounds."""
MOST = 3


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is: the median of the peer's times over that of ours, and what single rounds say."""

    ours: str
    peer: str
    value: float
    low: float
    """20th percentile of the ratio within a round."""
    high: float
    """80th"""

    @property
    def wide(self) -> bool:
        return self.high - self.low > WIDE * self.value


@dataclass(frozen=True)
class Measured:
    """A case's times in ms by provider; who didn't pass the gate is not among them."""

    case: Case
    times: dict[str, list[float]]
    verdicts: dict[str, Verdict]
    ratios: list[Ratio]
    limit: Peak
    memory: dict[str, float]
    """Peak MB by provider, where it was asked for."""

    @property
    def refused(self) -> dict[str, Verdict]:
        return {name: verdict for name, verdict in self.verdicts.items() if not verdict.passed}

    @property
    def ours_refused(self) -> bool:
        return any(name.startswith(OURS) for name in self.refused)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def limit(case: Case) -> Peak:
    """What this machine reaches in a plain matrix product, copy or update in place, measured once a process."""
    return _limit("update" if case.in_place else case.unit, case.dtype)


@cache
def _limit(kind: str, dtype: torch.dtype) -> Peak:
    if kind == "FLOP":
        return measure_matmul_peak(device(), dtype)
    return measure_update_bandwidth(device()) if kind == "update" else measure_copy_bandwidth(device())


def timed(provider: Provider) -> float:
    """Milliseconds of one run. The results are freed after the clock has stopped."""
    if provider.prepare is not None:
        provider.prepare()
    if torch.cuda.is_available():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        kept = provider.run()
        end.record()
        torch.cuda.synchronize()
        elapsed = begin.elapsed_time(end)
    else:
        began = time.perf_counter()
        kept = provider.run()
        elapsed = (time.perf_counter() - began) * 1e3
    del kept
    return elapsed


def percentile(values: Iterable[float], share: float) -> float:
    """Linear between the closest values."""
    found = sorted(values)
    place = share * (len(found) - 1)
    low = int(place)
    high = min(low + 1, len(found) - 1)
    return found[low] + (place - low) * (found[high] - found[low])


def ratio(times: Mapping[str, list[float]], ours: str, peer: str) -> Ratio:
    rounds = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
    value = statistics.median(times[peer]) / statistics.median(times[ours])
    return Ratio(ours, peer, value, percentile(rounds, 0.2), percentile(rounds, 0.8))


def interleave(
    providers: Mapping[str, Provider], rounds: int, pairs: Iterable[tuple[str, str]] = (), seed: int = 0
) -> dict[str, list[float]]:
    """Milliseconds of each run; in every round each provider runs once, in shuffled order.

    Goes on past `rounds`, to at most MOST times as many, while the ratio of one of `pairs` is wide. Warming up is the
    caller's.
    """
    pairs, order, draw = list(pairs), list(providers), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in providers}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        for done in range(MOST * rounds):
            if done >= rounds and not any(ratio(times, *pair).wide for pair in pairs):
                break
            draw.shuffle(order)
            for name in order:
                times[name].append(timed(providers[name]))
    finally:
        if collecting:
            gc.enable()
    return times


def checked(case: Case) -> tuple[dict[str, Provider], dict[str, Verdict]]:
    """The providers that passed the gate, warm, and the verdicts on all of them."""
    providers = {name: make() for name, make in case.providers().items()}
    verdicts = case.gate({name: provider.results() for name, provider in providers.items()})
    passed = {name: provider for name, provider in providers.items() if verdicts[name].passed}
    for provider in passed.values():
        timed(provider)
    return passed, verdicts


def measure(case: Case, rounds: int) -> Measured:
    providers, verdicts = checked(case)
    pairs = case.compared(list(providers))
    times = interleave(providers, rounds, pairs)
    ratios = [ratio(times, *pair) for pair in pairs]
    return Measured(case, times, verdicts, ratios, limit(case), {})


def peak_memory_mb(case: Case, name: str) -> float:
    """Peak MB (10^6 bytes) of one run: of torch's allocator on CUDA, elsewhere resident memory of this process.

    On a CPU meant for a process of its own that runs nothing else: the peak holds what earlier work left behind.
    """
    provider = case.providers()[name]()
    timed(provider)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        timed(provider)
        return torch.cuda.max_memory_allocated() / 1e6
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")  # VmHWM starts again from the memory that is resident now: compiling no longer counts
    timed(provider)
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
