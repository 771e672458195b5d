"""A run folder read back, and the numbers of its report."""

from __future__ import annotations

import bisect
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Column = npt.NDArray[np.float64]

EXTRA = ("samples", "evaluation", "baseline", "timings", "environment", "corpus", "model", "classification")


class Columns:
    """Numbers by name and row, one row per line of metrics; NaN where a line has no finite number for it."""

    def __init__(self) -> None:
        self._columns: dict[str, list[float]] = {"step": []}

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> Column:
        """(rows,) a copy."""
        return np.array(self._columns.get(name, [math.nan] * len(self)), dtype=np.float64)

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def append(self, line: Mapping[str, Any]) -> None:
        rows = len(self)
        numbers = {name: x for name, x in line.items() if isinstance(x, (int, float)) and math.isfinite(x)}
        for name in numbers:
            if name not in self._columns:
                self._columns[name] = [math.nan] * rows
        for name, column in self._columns.items():
            column.append(float(numbers.get(name, math.nan)))

    def drop_from(self, step: int) -> None:
        """Drop the rows of `step` and later ones: they are superseded."""
        rows = bisect.bisect_left(self._columns["step"], step)
        for column in self._columns.values():
            del column[rows:]

    def last(self, name: str) -> float | None:
        """The last finite number, if any."""
        return next((x for x in reversed(self._columns.get(name, ())) if not math.isnan(x)), None)


@dataclass(frozen=True)
class Run:
    """What a run folder holds, however far the run came."""

    folder: Path
    config: dict[str, Any]
    train: Columns
    evaluations: Columns
    events: list[dict[str, Any]]
    unreadable_lines: int

    @property
    def steps(self) -> int:
        return int(self.train.last("step") or 0)

    @property
    def planned_steps(self) -> int | None:
        return self.config.get("train", {}).get("steps")

    @property
    def seconds(self) -> float:
        """Wall time of the run, resumptions included."""
        stepping = float(np.nansum(self.train["ms"]) + np.nansum(self.train["checkpoint_stall_ms"])) / 1e3
        return max(self.train.last("seconds") or 0.0, stepping + float(np.nansum(self.evaluations["seconds"])))

    @property
    def end(self) -> str | None:
        """Why the run ended, in its own words."""
        return next((str(e.get("message")) for e in reversed(self.events) if e.get("name") == "ended"), None)


def read_run(folder: Path | str) -> Run:
    """Read config.toml and metrics.jsonl of a run folder.

    A line of training that repeats a step, or goes back to an earlier one, supersedes the lines from that step on
    (the run was resumed from a checkpoint, or rewound). A last line cut off by a kill is left out and counted. Raises
    FileNotFoundError if the folder holds neither file.
    """
    folder = Path(folder)
    config_file, metrics_file = folder / "config.toml", folder / "metrics.jsonl"
    if not config_file.is_file() and not metrics_file.is_file():
        raise FileNotFoundError(
            f"run folder {folder}: holds neither config.toml nor metrics.jsonl; expected a folder that "
            "`hotloop pretrain` wrote"
        )
    config = tomllib.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    train, evaluations, events, unreadable = Columns(), Columns(), [], 0
    last_step = -1
    for text in metrics_file.open(encoding="utf-8", errors="replace") if metrics_file.is_file() else ():
        try:
            line = json.loads(text)
            kind, step = line["kind"], int(line["step"])
        except (ValueError, KeyError, TypeError):
            unreadable += 1
            continue
        if kind == "train":
            if step <= last_step:
                train.drop_from(step)
                evaluations.drop_from(step)
            last_step = step
            train.append(line)
        elif kind == "eval":
            evaluations.drop_from(step)
            evaluations.append(line)
        elif kind == "event":
            events.append(line)
    return Run(folder, config, train, evaluations, events, unreadable)


def time_split(run: Run, timings: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Seconds of the run by what they went into; the rest, up to the wall time, is "other".

    From the metrics: every column of the steps that ends in `_ms`, and the seconds of the evaluations.
    `timings["step"]`, name -> seconds, adds to them or replaces one.
    """
    names = {"data_wait_ms": "data wait", "forward_backward_ms": "forward and backward"}
    split = {}
    for column in ["data_wait_ms", *(name for name in run.train.names if name.endswith("_ms"))]:
        if column in run.train:
            name = names.get(column, column[: -len("_ms")].replace("_", " "))
            split[name] = float(np.nansum(run.train[column])) / 1e3
    if "seconds" in run.evaluations:
        split["evaluation"] = float(np.nansum(run.evaluations["seconds"]))
    split |= {name.replace("_", " "): float(seconds) for name, seconds in ((timings or {}).get("step") or {}).items()}
    if split:
        split["other"] = max(run.seconds - sum(split.values()), 0.0)
    return split


def summarize(run: Run, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of report.json. Raises ValueError for a key of `extra` that is not in EXTRA."""
    extra = {name: value for name, value in (extra or {}).items() if value is not None}
    unknown = sorted(extra.keys() - set(EXTRA))
    if unknown:
        raise ValueError(f"report: unknown keys {', '.join(unknown)} in extra (allowed: {', '.join(EXTRA)})")
    evaluation, during = extra.get("evaluation"), run.evaluations
    final = dict(evaluation) if evaluation else None
    if final is None and len(during):
        columns = ("step", "loss", "bits_per_byte", "perplexity", "accuracy", "pseudo_perplexity", "general_loss",
                   "tokens", "bytes")  # fmt: skip
        final = {name: value for name in columns if (value := during.last(name)) is not None}
    bits = final.get("bits_per_byte") if final else None
    baseline = {
        int(context): float(value) for context, value in sorted((extra.get("baseline") or {}).items(), key=_int)
    }
    beaten = [context for context, value in baseline.items() if bits is not None and bits < value]
    timings = {name: value for name, value in extra.get("timings", {}).items() if name != "step"}
    train, warm = run.train, slice(len(run.train) // 10, None)  # the first steps warm up caches and clocks
    summary = {
        "format": 1,
        "name": run.folder.resolve().name,
        "complete": run.planned_steps is not None and run.steps >= run.planned_steps,
        "end": run.end,
        "steps": run.steps,
        "planned_steps": run.planned_steps,
        "seconds": run.seconds,
        "bits_per_byte": bits,
        "bits_per_byte_from": None
        if bits is None
        else "evaluation"
        if evaluation
        else "last evaluation during the run",
        "kneser_ney_bits_per_byte": {str(context): value for context, value in baseline.items()} or None,
        "kneser_ney_beaten": beaten if baseline and bits is not None else None,
        "kneser_ney_not_beaten": [c for c in baseline if c not in beaten] if baseline and bits is not None else None,
        "evaluation": final,
        "best_evaluation": _best(during),
        "forgetting": forgetting(during),
        "train_loss": _tail_mean(train["loss"]),
        "tokens": float(np.nansum(train["tokens"])),
        "supervised_tokens": float(np.nansum(train["supervised"])),
        "tokens_per_second": _median(train["tokens_per_second"][warm]),
        "supervised_per_second": _median(train["supervised_per_second"][warm]),
        "step_ms": _median(train["ms"][warm]),
        "padding_share": _median(train["padding_share"]),
        "mfu": _median(train["mfu"][warm]),
        "peak_memory_mb": float(np.nanmax(train["memory_mb"])) if "memory_mb" in train else None,
        "skipped_steps": int(np.nansum(train["skipped"])),
        "time_split_seconds": time_split(run, extra.get("timings")),
        "timings": timings,
        "events": dict(Counter(str(event.get("name")) for event in run.events)),
        "unreadable_metric_lines": run.unreadable_lines,
        "classification": extra.get("classification"),
        "model": extra.get("model"),
        "corpus": extra.get("corpus"),
        "environment": extra.get("environment"),
        "config": run.config,
    }
    return jsonable(summary)


def verdict(summary: Mapping[str, Any]) -> str | None:
    """Which counting models the run beats and which not, in a sentence; None without both numbers."""
    bits, baseline = summary["bits_per_byte"], summary["kneser_ney_bits_per_byte"]
    if bits is None or not baseline:
        return None

    def listed(contexts: list[int]) -> str:
        words = [str(context) for context in contexts]
        numbers = ", ".join(f"{baseline[word]:.3f}" for word in words)
        return f"{' and '.join([', '.join(words[:-1])] * (len(words) > 1) + words[-1:])} bytes of context ({numbers})"

    beaten, not_beaten = summary["kneser_ney_beaten"], summary["kneser_ney_not_beaten"]
    sentence = f"The model spends {bits:.3f} bits per byte on held-out text: "
    if not not_beaten:
        return sentence + f"it beats every Kneser-Ney model fitted on the same documents, those with {listed(beaten)}."
    if not beaten:
        return sentence + f"it does not beat any Kneser-Ney model fitted on the same documents, {listed(not_beaten)}."
    return (
        sentence + f"it beats the Kneser-Ney models fitted on the same documents with {listed(beaten)}, "
        f"and does not beat those with {listed(not_beaten)}."
    )


def forgetting(evaluations: Columns) -> dict[str, Any] | None:
    """Held-out loss on general text, before the run's first step, during it and after; None where it was not judged."""
    if "general_loss" not in evaluations:
        return None
    steps, losses = evaluations["step"], evaluations["general_loss"]
    known = np.isfinite(losses)
    steps, losses = steps[known].astype(int).tolist(), losses[known].tolist()
    before = losses[0] if steps[0] == 0 else None
    return {
        "before": before,
        "after": losses[-1],
        "difference": None if before is None else losses[-1] - before,
        "steps": steps,
        "losses": losses,
    }


def jsonable(value: Any) -> Any:
    """The value with string keys, and null for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _best(evaluations: Columns) -> dict[str, float] | None:
    if "loss" not in evaluations:
        return None
    row = int(np.nanargmin(evaluations["loss"]))
    return {name: evaluations[name][row] for name in ("step", "loss", "bits_per_byte")}


def _median(column: Column) -> float | None:
    finite = column[np.isfinite(column)]
    return float(np.median(finite)) if len(finite) else None


def _tail_mean(column: Column) -> float | None:
    finite = column[np.isfinite(column)]
    return float(finite[-max(len(finite) // 20, 1) :].mean()) if len(finite) else None


def _int(item: tuple[Any, Any]) -> int:
    return int(item[0])
