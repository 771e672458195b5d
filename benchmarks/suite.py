"""Every benchmark in one table.

    python benchmarks/suite.py --out benchmarks/results/cpu

prints a table for each case and writes them beside the JSON of their rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import bench_attention
import bench_cross_entropy
import bench_optimizers
import bench_train_step

from harness.case import Case
from harness.command import main


def cases(everything: bool) -> Iterator[Case]:
    for module in (bench_train_step, bench_cross_entropy, bench_attention, bench_optimizers):
        yield from module.cases(everything)


if __name__ == "__main__":
    raise SystemExit(main(__doc__, cases))
