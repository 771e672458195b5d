"""How benchmarks are started: as a script that prints and writes a table, and by pytest-benchmark."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.case import OURS, Case, Provider
from harness.measure import Measured, checked, limit, measure, peak_memory_mb, ratio, timed
from harness.table import markdown, write, write_csv

Cases = Callable[[bool], Iterable[Case]]
"""Whether all are wanted, or the small set that `make bench` runs -> cases"""

finished: list[Measured] = []
"""What pytest has measured so far; conftest.py prints it at the end."""


def main(doc: str | None, cases: Cases) -> int:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write FILE.json and FILE.md")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows in the columns of Liger's benchmarks")
    parser.add_argument("--all", action="store_true", help="larger shapes too, and the reference backends")
    parser.add_argument("--only", metavar="TEXT", nargs="+", help="cases whose name contains each of these")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--rounds", type=int, default=9, help="at least this many (default: 9), more where times vary")
    parser.add_argument(
        "--memory", action="store_true", help="also peak memory, where it tells: each provider in a fresh process"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "PROVIDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds {options.rounds}: give at least 2")
    chosen = [case for case in cases(options.all) if all(text in case.name for text in options.only or ())]
    if options.memory_of:
        name, provider = options.memory_of
        (case,) = (case for case in cases(True) if case.name == name)
        print(json.dumps(peak_memory_mb(case, provider)))
        return 0
    if options.list or not chosen:
        print("\n".join(case.name for case in chosen or cases(options.all)))
        return 0 if chosen else 2
    measured = run(chosen, options.rounds, options.memory)
    if options.out:
        write(options.out, measured)
    if options.csv:
        write_csv(options.csv, measured)
    return 1 if any(m.ours_refused for m in measured) else 0


def run(cases: Iterable[Case], rounds: int, memory: bool = False) -> list[Measured]:
    """Measure and print each case. Nothing compiled is kept from one to the next."""
    measured = []
    for case in cases:
        found = measure(case, rounds)
        if memory and case.memory:
            found = replace(found, memory={name: memory_of(case.name, name) for name in found.times})
        measured.append(found)
        print(markdown([found]), flush=True)
        torch.compiler.reset()
    return measured


def memory_of(case: str, provider: str) -> float:
    """`peak_memory_mb` in a fresh process of the same script."""
    script = [sys.executable, sys.argv[0], "--memory-of", case, provider]
    done = subprocess.run(script, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def bench(benchmark: Any, case: Case, rounds: int = 5) -> None:
    """pytest-benchmark's fixture times our first provider; the untimed set-up of each of its rounds runs the others
    once each, in shuffled order. Their medians and ratios go into `extra_info`."""
    providers, verdicts = checked(case)
    wrong = {name: v for name, v in verdicts.items() if not v.passed and name.startswith(OURS)}
    assert not wrong, f"{case.name}: not timed, results are wrong: {wrong}"
    ours = next(name for name in providers if name.startswith(OURS))
    others, draw = [name for name in providers if name != ours], random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in providers}

    def setup() -> None:
        draw.shuffle(others)
        for name in others:
            times[name].append(timed(providers[name]))
        if providers[ours].prepare is not None:
            providers[ours].prepare()

    benchmark.group = case.kernel_name
    benchmark.pedantic(synchronized(providers[ours]), setup=setup, rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return
    times[ours] = [seconds * 1e3 for seconds in benchmark.stats.stats.data]
    for name, found in times.items():
        benchmark.extra_info[f"{name} ms"] = statistics.median(found)
    ratios = [ratio(times, *pair) for pair in case.compared(list(times))]
    for r in ratios:
        benchmark.extra_info[f"{r.ours} times faster than {r.peer}"] = r.value
    finished.append(Measured(case, times, verdicts, ratios, limit(case), {}))
    rate = case.work / statistics.median(times[ours]) * 1e3
    benchmark.extra_info["share of measured limit"] = rate / finished[-1].limit.rate
    torch.compiler.reset()


def synchronized(provider: Provider) -> Callable[[], object]:
    if not torch.cuda.is_available():
        return provider.run

    def run() -> object:
        result = provider.run()
        torch.cuda.synchronize()
        return result

    return run


def ids(cases: Sequence[Case]) -> list[str]:
    return [case.name for case in cases]
