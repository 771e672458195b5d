"""What is written: rows in the columns of Liger's benchmark CSV and more, a Markdown table, one JSON."""

from __future__ import annotations

import csv
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hotloop.engine.train.environment import environment

from harness.case import OURS
from harness.measure import Measured, percentile

LIGER_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit", "x_name", "x_label",
    "x_value", "y_value_50", "y_value_20", "y_value_80", "extra_benchmark_config_str", "gpu_name", "timestamp",
    "liger_version",
)  # fmt: skip


def rows(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """One for each provider that passed its gate and metric: speed in ms, and memory in MB where it was measured."""
    where = environment()
    common = {
        "gpu_name": where["devices"][0] if where["devices"] else where["cpu"],
        "timestamp": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        "liger_version": installed("liger-kernel"), "hotloop_version": where["hotloop"],
        "torch_version": where["torch"],
    }  # fmt: skip
    found = []
    for m in measured:
        case = m.case
        x_name, x_label, x_value = case.x
        for name, milliseconds in m.times.items():
            row = {
                "kernel_name": case.kernel_name, "kernel_provider": name, "kernel_operation_mode": case.mode,
                "x_name": x_name, "x_label": x_label, "x_value": x_value,
                "extra_benchmark_config_str": json.dumps(dict(case.config)), **common,
                "error": m.verdicts[name].error, "error_allowed": m.verdicts[name].allowed,
            }  # fmt: skip
            median = statistics.median(milliseconds)
            rate = case.work / median * 1e3
            speed = {
                "metric_name": "speed", "metric_unit": "ms", "y_value_50": median,
                "y_value_20": percentile(milliseconds, 0.2), "y_value_80": percentile(milliseconds, 0.8),
                "minimum": min(milliseconds), "rounds": len(milliseconds), "samples": milliseconds,
                "rate": rate, "rate_unit": f"{case.unit}/s", "limit": m.limit.rate, "limit_workload": m.limit.workload,
                "share_of_limit": rate / m.limit.rate,
                "counted_per_second": {what: count / median * 1e3 for what, count in case.counted.items()},
                "times_faster": {r.peer: [r.value, r.low, r.high] for r in m.ratios if r.ours == name},
            }  # fmt: skip
            found.append(row | speed)
            if name in m.memory:
                peak = m.memory[name]
                memory = {"metric_name": "memory", "metric_unit": "MB"}
                found.append(row | memory | dict.fromkeys(("y_value_50", "y_value_20", "y_value_80"), peak))
    return found


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def refusals(measured: Sequence[Measured]) -> list[str]:
    """A line for each provider that the gate kept out."""
    return [
        f"not reported: {name} of {m.case.name}: its results are off by {v.error:.1e}, allowed are {v.allowed:.1e}"
        for m in measured
        for name, v in m.refused.items()
    ]


def markdown(measured: Sequence[Measured]) -> str:
    """A table of times and one of ratios for each case."""
    lines: list[str] = []
    for m in measured:
        case, memory = m.case, bool(m.memory)
        title = f"{case.kernel_name} {case.mode}, {case.x[1]} {case.x[2]:,}"
        what = ", ".join(f"{k} {v}" for k, v in case.config.items())
        peak, unit = f"{m.limit.rate / 1e9:,.0f}", f"G{case.unit}/s"
        lines += [f"### {title}", "", f"{what}. Measured limit: {peak} {unit} ({m.limit.workload}).", ""]
        columns = [*(f"{what}/s" for what in case.counted), *(["peak MB"] if memory else [])]
        lines.append("| provider | median ms | 20 to 80 % | share of limit |" + "".join(f" {c} |" for c in columns))
        lines.append("|---|---:|---:|---:|" + "---:|" * len(columns))
        for name, times in m.times.items():
            median = statistics.median(times)
            spread = f"{percentile(times, 0.2):.4g} to {percentile(times, 0.8):.4g}"
            share = f"{case.work / median * 1e3 / m.limit.rate:.0%}"
            shown = f"**{name}**" if name.startswith(OURS) else name
            end = "".join(f" {count / median * 1e3:,.0f} |" for count in case.counted.values())
            end += f" {m.memory[name]:.0f} |" if name in m.memory else " |" if memory else ""
            lines.append(f"| {shown} | {median:.4g} | {spread} | {share} |{end}")
        if m.ratios:
            lines += ["", "| ours | against | times faster | within rounds, 20 to 80 % |", "|---|---|---:|---:|"]
            for r in m.ratios:
                lines.append(f"| {r.ours} | {r.peer} | {r.value:.2f} | {r.low:.2f} to {r.high:.2f} |")
        lines.append("")
    return "\n".join([*lines, *(f"{line}\n" for line in refusals(measured))])


def contents(measured: Sequence[Measured]) -> dict[str, Any]:
    """What the JSON holds."""
    return {
        "command": command(), "environment": environment(), "rows": rows(measured), "refused": refusals(measured),
    }  # fmt: skip


def command() -> str:
    script = Path(sys.argv[0])
    root = Path(__file__).resolve().parents[2]
    shown = script.resolve().relative_to(root) if script.resolve().is_relative_to(root) else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def heading() -> str:
    where = environment()
    machine = f"{where['cpu']}, {where['threads']} threads, {where['instruction_set']}, torch {where['torch']}"
    devices = ", ".join(where["devices"]) or "no GPU"
    return (
        f"Made by `{command()}` on {machine}, {devices}, "
        f"{datetime.now(timezone.utc):%Y-%m-%d}. Providers took turns in one process, in shuffled order, behind an "
        "accuracy gate; medians. `times faster` is the ratio of medians; beside it, what single rounds say.\n\n"
    )


def write(path: Path, measured: Sequence[Measured]) -> None:
    """`path`.json and `path`.md; a suffix of `path` is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = contents(measured)
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(heading() + markdown(measured), encoding="utf-8")


def write_csv(path: Path, measured: Sequence[Measured]) -> None:
    """Liger's columns only, as its plots read them."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows(measured))


def device_name() -> str:
    """For file names."""
    return torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"
