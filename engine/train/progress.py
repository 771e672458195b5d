"""One line per step: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hotloop.engine.config import Recipe

RECENT = 50  # steps whose median time makes the ETA


class Progress:
    """Shows the train, eval and event lines of `metrics.jsonl` as they come; `enabled` is false but on rank 0.

    On a terminal: a bar that every step moves, with a line above it every `log.every` steps. Elsewhere: those lines
    alone. The file `log` gets the lines too, whatever `stream` (standard error) is. The first and the last step always
    have a line.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        enabled: bool = True,
        start_step: int = 0,
        log: Path | None = None,
        stream: IO[str] | None = None,
    ):
        self.total_steps, self.every, self.enabled = recipe.train.steps, recipe.log.every, enabled
        self._first: int | None = None
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._stream = sys.stderr if stream is None else stream
        self._log = open(log, "a", encoding="utf-8") if enabled and log is not None else None  # noqa: SIM115 (closed by `close`)
        self._bar: Bar | None = None
        if enabled and self._stream.isatty():
            self._bar = Bar(
                BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("{task.description}", markup=False),
                console=Console(file=self._stream), transient=True,
            )  # fmt: skip
            self._task = self._bar.add_task("", total=self.total_steps, completed=start_step)
            self._bar.start()

    def train(self, line: Mapping[str, Any]) -> None:
        """A train line; its fields are listed with `format_train`."""
        step = line["step"]
        if line.get("ms") is not None:
            self._recent.append(line["ms"] / 1000)
        if self._first is None:
            self._first = step
        eta = self.seconds_left(step)
        if self._bar is not None:
            loss = _number(line.get("loss"), ".4f")
            self._bar.update(self._task, completed=step, description=f"loss {loss}  ETA {format_seconds(eta)}")
        if step % self.every == 0 or step in (self._first, self.total_steps):
            self.say(format_train(line, self.total_steps, eta))

    def eval(self, line: Mapping[str, Any]) -> None:
        parts = [f"held out: loss {_number(line.get('loss'), '.4f')}"]
        if line.get("bits_per_byte") is not None:
            parts.append(f"{line['bits_per_byte']:.4f} bits/byte")
        if line.get("accuracy") is not None:
            parts.append(f"accuracy {_percent(line['accuracy'])}")
        if line.get("pseudo_perplexity") is not None:
            parts.append(f"pseudo-perplexity {line['pseudo_perplexity']:.2f}")
        if line.get("general_loss") is not None:
            parts.append(f"general text: loss {line['general_loss']:.4f}")
        parts.append(f"{line['tokens']:,} tokens in {format_seconds(line['seconds'])}")
        self.say(f"step {line['step']}/{self.total_steps}  " + "  ".join(parts))

    def event(self, line: Mapping[str, Any]) -> None:
        self.say(f"step {line['step']}/{self.total_steps}  {line['name']}: {line['message']}")

    def say(self, text: str) -> None:
        """One line, above the bar."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=self._stream, flush=True)
        if self._log is not None:
            self._log.write(text + "\n")
            self._log.flush()

    def seconds_left(self, step: int) -> float | None:
        """The median of the recent steps' times, times the steps left: one slow step doesn't move it."""
        return statistics.median(self._recent) * (self.total_steps - step) if self._recent else None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def format_train(line: Mapping[str, Any], total_steps: int, eta: float | None = None) -> str:
    """One step in one line.

    Fields: loss (nats per supervised token) and loss_z, grad_norm, lr, ms, tokens_per_second, supervised_per_second,
    padding_share, mfu, memory_mb, data_wait_ms, skipped; what is missing or None is left out or shown as nan.
    """
    z = line.get("loss_z")
    parts = [
        f"step {line['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {_number(line.get('loss'), '.4f')}" + (f" (z {z:+.2f})" if z is not None else ""),
        f"grad {_number(line.get('grad_norm'), '.3f')}",
        f"lr {_number(line.get('lr'), '.2e')}",
        f"{_number(line.get('ms'), '.1f')} ms",
        f"{_large(line.get('tokens_per_second'))} tok/s ({_large(line.get('supervised_per_second'))} supervised)",
        f"pad {_percent(line.get('padding_share'))}",
    ]
    if line.get("mfu") is not None:
        parts.append(f"MFU {_percent(line['mfu'])}")
    if line.get("memory_mb") is not None:
        parts.append(f"mem {line['memory_mb']:,.0f} MB")
    if line.get("data_wait_ms") is not None and line.get("ms"):
        parts.append(f"data {_percent(line['data_wait_ms'] / line['ms'])}")
    if eta is not None:
        parts.append(f"ETA {format_seconds(eta)}")
    if line.get("skipped"):
        parts.append("SKIPPED")
    return "  ".join(parts)


def format_seconds(seconds: float | None) -> str:
    if seconds is None or not math.isfinite(seconds):
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _number(value: float | None, form: str) -> str:
    return "nan" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.1f}%"


def _large(value: float | None) -> str:
    if value is None:
        return "?"
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.0f}"
