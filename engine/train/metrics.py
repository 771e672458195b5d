"""Metrics of a run: from the device without waiting for it, to lines of JSON and to TensorBoard.

`metrics.jsonl` has one object per line: {"kind": "train" | "eval" | "event", "step": ..., ...}. `step` counts finished
optimizer steps, as checkpoints do: a checkpoint of step s holds what the lines up to s describe. JSON has no NaN and no
infinity; such a value is written as null.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hotloop.engine.files import write_file

SUPERSEDED_KINDS = ("train", "eval")


class MetricsLog:
    """Appends to `metrics.jsonl` in a run's folder, and to `tensorboard/`.

    resume_step None begins a log: a file that already has lines is an error (FileExistsError), nothing is written over.
    With a step s, train and eval lines of later steps are moved to `metrics.superseded.jsonl`, since they will be
    written again; events stay, as they did happen. A last line that a kill cut off goes there too. Rewrites are atomic.
    """

    def __init__(self, run_folder: Path | str, resume_step: int | None = None, tensorboard: bool = True):
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.jsonl"
        repaired, superseded = 0, 0
        if resume_step is not None:
            repaired, superseded = _supersede(self.path, resume_step)
        elif self.path.exists() and self.path.stat().st_size > 0:
            raise FileExistsError(f"{self.path} belongs to another run: choose another folder, or resume that run")
        self._file: IO[str] = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            purge = None if resume_step is None else resume_step + 1
            self._tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=purge)
        if repaired:
            self.event(resume_step or 0, "metrics_repaired", f"{repaired} unreadable line(s) set aside")
        if superseded:
            self.event(resume_step or 0, "metrics_superseded", f"{superseded} line(s) of later steps set aside")

    def train(self, step: int, **values: Any) -> dict[str, Any]:
        return self._write("train", step, values)

    def eval(self, step: int, **values: Any) -> dict[str, Any]:
        return self._write("eval", step, values)

    def event(self, step: int, name: str, message: str) -> dict[str, Any]:
        return self._write("event", step, {"name": name, "message": message})

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Write one line and return it as it reads back."""
        line = {"kind": kind, "step": step, **{name: _plain(value) for name, value in values.items()}}
        # One write per line: a kill leaves whole lines, but for a last one cut off, which the next start repairs.
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            if kind == "event":
                self._tensorboard.add_text(f"event/{values['name']}", str(values["message"]), step)
            else:
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        return line


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`, also one that is being written or whose run was killed; no unreadable ones."""
    return [line for _, line in _parse(Path(path)) if line is not None]


@dataclass
class _Pending:
    step: int
    host: dict[str, Any]
    names: tuple[str, ...]
    values: Tensor  # (len(names),) float64 in host memory
    copied: torch.cuda.Event | None


class DeviceMetrics:
    """Scalars of each step on their way from the device to the host; the loop never waits for them.

    Values pass through float64, which holds every float32 and every integer below 2^53 exactly. On CUDA each step costs
    one small concatenation and one asynchronous copy into pinned memory, and is drained when its event has passed.
    """

    def __init__(self) -> None:
        self._pending: deque[_Pending] = deque()

    @torch.no_grad()
    def push(self, step: int, scalars: Mapping[str, Tensor], **host: Any) -> None:
        """Take the values that the 0-dim (or one-element) tensors have at this point of the stream; they may change
        right after. All are on one device. `host` values come back with them."""
        names = tuple(scalars)
        values = torch.stack([scalars[name].detach().reshape(()).double() for name in names])
        copied = None
        if values.is_cuda:
            pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            values, device = pinned.copy_(values, non_blocking=True), values.device
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(device))
        self._pending.append(_Pending(step, host, names, values, copied))

    def drain(self, block: bool = False, keep: int = 0) -> list[dict[str, Any]]:
        """Steps whose values have arrived, in order: {"step", names of scalars (float), names of host values}.

        With `block` also those that have not: waits for the device. The newest `keep` steps stay, so that
        `drain(block=True, keep=2)` hands out every step exactly two steps late, whatever the device's speed.
        """
        drained: list[dict[str, Any]] = []
        while len(self._pending) > keep:
            copied = self._pending[0].copied
            if copied is not None and block:
                copied.synchronize()
            elif copied is not None and not copied.query():
                break
            done = self._pending.popleft()
            drained.append({"step": done.step, **dict(zip(done.names, done.values.tolist(), strict=True)), **done.host})
        return drained

    def __len__(self) -> int:
        return len(self._pending)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(path: Path) -> list[tuple[bytes, dict[str, Any] | None]]:
    """Each line with its newline, and what it says: None where it is cut off or no object."""
    if not path.exists():
        return []
    lines: list[tuple[bytes, dict[str, Any] | None]] = []
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw)
        except ValueError:
            line = None
        whole = raw.endswith(b"\n") and isinstance(line, dict) and isinstance(line.get("step"), int)
        lines.append((raw, line if whole else None))
    return lines


def _supersede(path: Path, step: int) -> tuple[int, int]:
    """Drop unreadable lines, and train and eval lines after `step`. Returns how many of each."""
    keep, aside, repaired = [], [], 0
    for raw, line in _parse(path):
        if line is None:
            repaired += 1
            aside.append(raw.rstrip(b"\n") + b"\n")
        elif line.get("kind") in SUPERSEDED_KINDS and line["step"] > step:
            aside.append(raw)
        else:
            keep.append(raw)
    if aside:
        # First kept elsewhere, then removed here: a kill in between repeats the first, which is then already there.
        block, history = b"".join(aside), path.with_name("metrics.superseded.jsonl")
        earlier = history.read_bytes() if history.exists() else b""
        if not earlier.endswith(block):
            write_file(history, earlier + block)
        write_file(path, b"".join(keep))
    return repaired, len(aside) - repaired
