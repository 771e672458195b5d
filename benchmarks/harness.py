"""Timing that survives a shared machine: providers take turns in one process, in shuffled order; medians and ratios."""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from hotloop.engine.train.environment import environment


@dataclass
class Row:
    """One provider of one case. Columns are a superset of Liger's benchmark CSV."""

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str  # forward | backward | full
    x_name: str
    x_label: str
    x_value: float
    milliseconds: list[float]
    work: float = 0.0  # FLOPs or bytes of one call
    work_unit: str = "FLOP"
    limit: float = 0.0  # measured FLOP/s or bytes/s of this machine
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.milliseconds)

    def to_dict(self) -> dict[str, Any]:
        q = statistics.quantiles(self.milliseconds, n=5) if len(self.milliseconds) > 1 else self.milliseconds * 4
        rate = self.work / self.median * 1e3
        return {
            "kernel_name": self.kernel_name, "kernel_provider": self.kernel_provider,
            "kernel_operation_mode": self.kernel_operation_mode, "metric_name": "speed", "metric_unit": "ms",
            "x_name": self.x_name, "x_label": self.x_label, "x_value": self.x_value, "y_value_50": self.median,
            "y_value_20": q[0], "y_value_80": q[3], "extra_benchmark_config_str": json.dumps(self.extra),
            "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
            "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "rounds": len(self.milliseconds), "rate": rate, "rate_unit": f"{self.work_unit}/s",
            "share_of_limit": rate / self.limit if self.limit else None,
        }  # fmt: skip


def interleave(providers: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Milliseconds of each call; in every round each provider runs once, in shuffled order. Warm-up is the caller's."""
    order, draw = list(providers), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in providers}
    cuda = torch.cuda.is_available()
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            providers[name]()
            if cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - began) * 1e3)
    return times


def gate(values: Mapping[str, float | torch.Tensor], reference: str, tolerance: float) -> None:
    """Raises AssertionError unless every provider's value agrees with the reference's: no row without it."""
    expected = torch.as_tensor(values[reference]).double()
    for name, value in values.items():
        error = (torch.as_tensor(value).double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error <= tolerance, (
            f"{name}: differs from {reference} by {error:.2e} (allowed {tolerance:.0e}): no timing"
        )


def ratio(rows: Mapping[str, list[float]], peer: str, ours: str) -> float:
    """How many times faster ours is: medians."""
    return statistics.median(rows[peer]) / statistics.median(rows[ours])


def markdown(rows: list[Row], bars: list[tuple[str, float]]) -> str:
    """Rows as a table, then the ratios."""
    lines = ["| case | provider | median ms | 20 % to 80 % | share of measured limit |", "|---|---|---:|---:|---:|"]
    for row in rows:
        columns = row.to_dict()
        share = f"{columns['share_of_limit']:.0%}" if columns["share_of_limit"] else ""
        spread = f"{columns['y_value_20']:.1f} to {columns['y_value_80']:.1f}"
        case = f"{row.kernel_name} {row.kernel_operation_mode}, {row.x_name} {row.x_value:,}"
        lines.append(f"| {case} | {row.kernel_provider} | {row.median:.1f} | {spread} | {share} |")
    lines += ["", "| ours against the peer of the same kind | times faster |", "|---|---:|"]
    return "\n".join([*lines, *(f"| {name} | {value:.2f} |" for name, value in bars)]) + "\n"


def write(path: Path, rows: list[Row], table: str) -> None:
    """`path`.json with every row, the environment and the command; `path`.md with the table."""
    command = "python " + " ".join(sys.argv)
    where = environment()
    content = {"command": command, "environment": where, "rows": [row.to_dict() for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    machine = f"{where['cpu']}, {where['threads']} threads, {where['instruction_set']}, torch {where['torch']}"
    devices = ", ".join(where["devices"]) or "no GPU"
    head = f"Made by `{command}` on {machine}, {devices}. Providers took turns in one process; medians.\n\n"
    path.with_suffix(".md").write_text(head + table, encoding="utf-8")
