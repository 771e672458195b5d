"""Checkpoints that survive anything: a kill at any moment, a full disk, a flipped bit.

    checkpoints/step-00000100/model.safetensors       one file per group of tensors
                              optimizer.safetensors
                              state.json              what is not a tensor: counters, generator states, environment
                              manifest.json           step, metric, size and SHA-256 of each file; its own SHA-256

A checkpoint is assembled aside, each file fsynced and hashed while it is written, the manifest last; then the folder is
renamed and the parent fsynced. It is read back before any older one is deleted. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from hotloop.engine.files import (
    ASIDE,
    Bytes,
    FileRecord,
    delete_folder,
    delete_leftovers,
    fsync_folder,
    make_folder,
    read_record,
    write_synced,
)
from hotloop.engine.train.tensor_file import safetensors_parts

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"
REPLACED = ASIDE + "replaced-"

TensorGroups = Mapping[str, Mapping[str, Tensor]]


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, or that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been read. `metric` is the held-out loss at its step, if there was one."""

    path: Path
    step: int
    metric: float | None
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        return sum(record.size for record in self.files.values())

    def tensors(self, group: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of one group. Raises CheckpointError for a group that the checkpoint lacks."""
        name = f"{group}.safetensors"
        if name not in self.files:
            groups = ", ".join(file.removesuffix(".safetensors") for file in self.files if file != STATE)
            raise CheckpointError(f"{self.path} has no tensors {group!r} (it has {groups})")
        return load_file(self.path / name, device=str(device))

    def state(self) -> dict[str, Any]:
        return json.loads((self.path / STATE).read_text(encoding="utf-8"))


class Rejected(NamedTuple):
    path: Path
    reason: str


class Latest(NamedTuple):
    """The newest good checkpoint, and the newer ones that are not, each with the reason."""

    checkpoint: Checkpoint | None
    rejected: list[Rejected]


@dataclass(frozen=True)
class Written:
    """How a checkpoint was written."""

    checkpoint: Checkpoint
    write_seconds: float
    verify_seconds: float
    deleted: tuple[str, ...]


def read_manifest(path: Path) -> Checkpoint:
    """The manifest of a checkpoint folder; the files themselves are not looked at. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"half-written: no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"altered: {MANIFEST} cannot be read ({error})") from error
    digest = manifest.pop("sha256", None) if isinstance(manifest, dict) else None
    if digest != _digest(manifest):
        raise CheckpointError(f"altered: {MANIFEST} does not match its own SHA-256")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"format {manifest['format']}: this version reads format {FORMAT}")
    if path.name != folder_name(manifest["step"]):
        raise CheckpointError(f"altered: {MANIFEST} is of step {manifest['step']}")
    files = {name: FileRecord(**record) for name, record in manifest["files"].items()}
    return Checkpoint(path, manifest["step"], manifest["metric"], files)


def verify(path: Path, *, from_disk: bool = False) -> Checkpoint:
    """Read a whole checkpoint and compare it with its manifest. Raises CheckpointError with the first difference."""
    checkpoint = read_manifest(path)
    for name, expected in checkpoint.files.items():
        try:
            size = (path / name).stat().st_size
            if size != expected.size:
                kind = "truncated" if size < expected.size else "altered"
                raise CheckpointError(f"{kind}: {name} has {size} bytes, {expected.size} were written")
            if read_record(path / name, from_disk=from_disk) != expected:
                raise CheckpointError(f"altered: {name} does not match its SHA-256")
        except FileNotFoundError:
            raise CheckpointError(f"missing file: {name}") from None
        except OSError as error:
            raise CheckpointError(f"unreadable: {name} ({error.strerror})") from error
    return checkpoint


def latest(folder: Path, before: int | None = None) -> Latest:
    """The newest checkpoint in a folder that verifies, of a step below `before` if that is given. Reads only, so it is
    safe beside a running store.

    `checkpoint` is None where none verifies; if `rejected` then has entries, the run had checkpoints and lost them, and
    starting it again from nothing should be somebody's decision.
    """
    rejected: list[Rejected] = []
    for path in reversed(_folders(folder)):
        if before is not None and int(path.name.removeprefix("step-")) >= before:
            continue
        try:
            return Latest(verify(path), rejected)
        except CheckpointError as error:
            rejected.append(Rejected(path, str(error)))
    return Latest(None, rejected)


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the lowest metric that verifies; None where none has a metric. Reads only."""
    for checkpoint in _by_metric(_readable(folder)):
        try:
            return verify(checkpoint.path)
        except CheckpointError:
            continue
    return None


class CheckpointStore:
    """The one writer of a folder of checkpoints.

    Keeps the last `keep_last` and the `keep_best` with the lowest metric. A save at step s ends the time line of any
    checkpoint of a later step (the run was rewound, or resumed from an older one): those are deleted after it.
    At most one write is in flight. Opening deletes what killed writers left aside, so a folder has one store at a time.

    `fault` is called with the name of each point of a save as it is reached, for tests that kill the process or raise
    there. In order: "snapshot" (of `save_async`), "create", for every file "write FILE" before each piece of it and
    "fsync FILE", then "sync folder", "rename", "replace" (where the step has a checkpoint already, between its two
    renames), "sync parent", "verify", "delete" before each deletion, "done".
    """

    def __init__(
        self,
        folder: Path | str,
        keep_last: int = 2,
        keep_best: int = 1,
        *,
        fault: Callable[[str], None] | None = None,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last = {keep_last}, keep_best = {keep_best}: expected at least 1 and 0")
        self.folder = Path(folder)
        self.keep_last, self.keep_best = keep_last, keep_best
        self._fault = fault or (lambda point: None)
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._written: deque[Written] = deque()
        self._rejected: set[Path] = set()
        make_folder(self.folder)
        self._restore_replaced()
        delete_leftovers(self.folder)

    def latest(self) -> Latest:
        """As the function of this name, and a checkpoint rejected here is not counted among those to keep."""
        self.wait()
        found = latest(self.folder)
        self._rejected.update(rejected.path for rejected in found.rejected)
        return found

    def best(self) -> Checkpoint | None:
        self.wait()
        return best(self.folder)

    def save(self, step: int, tensors: TensorGroups, state: dict[str, Any], metric: float | None = None) -> Written:
        """Write a checkpoint now.

        tensors: group -> name -> tensor on any device; state: what JSON holds exactly (None, bool, int, float, str,
        lists, dictionaries with string keys). Raises CheckpointError naming the path, the bytes needed and free where
        the disk does not take it, with all older checkpoints as they were.
        """
        self.wait()
        text = _state_text(state)
        return self._write(step, tensors, text, metric)

    def save_async(self, step: int, tensors: TensorGroups, state: dict[str, Any], metric: float | None = None) -> float:
        """Copy everything to host memory, then write it in a thread. Returns the seconds the caller was held up.

        A write still in flight is waited for, and raises here what it failed with (nothing is saved then: call again).
        The host copies are kept for the next save: as much memory as the checkpoint is large, pinned where tensors are
        on a GPU.
        """
        start = time.perf_counter()
        self.wait()
        text = _state_text(state)
        snapshot = self._snapshot(tensors)
        self._fault("snapshot")
        self._thread = threading.Thread(
            target=self._write_in_background, args=(step, snapshot, text, metric), name=f"checkpoint-{step}"
        )
        self._thread.start()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the write in flight, if any. Raises what it failed with, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def finished(self) -> list[Written]:
        """What `save_async` has written since the last call, without waiting. Raises what a write failed with, once."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()
        return [self._written.popleft() for _ in range(len(self._written))]

    @torch.no_grad()
    def _snapshot(self, tensors: TensorGroups) -> dict[str, dict[str, Tensor]]:
        buffers: dict[tuple[str, str], Tensor] = {}
        devices = set()
        for group, members in tensors.items():
            for name, tensor in members.items():
                buffer = self._buffers.pop((group, name), None)
                if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                    buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                buffers[group, name] = buffer.copy_(tensor, non_blocking=True)
                if tensor.is_cuda:
                    devices.add(tensor.device)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        self._buffers = buffers
        return {group: {name: buffers[group, name] for name in members} for group, members in tensors.items()}

    def _write_in_background(self, step: int, tensors: TensorGroups, state: bytes, metric: float | None) -> None:
        try:
            self._written.append(self._write(step, tensors, state, metric))
        except BaseException as failure:  # raised again by the next call of the training thread
            self._failure = failure

    def _write(self, step: int, tensors: TensorGroups, state: bytes, metric: float | None) -> Written:
        start = time.perf_counter()
        aside, path = self.folder / (ASIDE + folder_name(step)), self.folder / folder_name(step)
        replaced = self.folder / (REPLACED + path.name)
        try:
            self._write_files(aside, step, tensors, state, metric)
            self._fault("rename")
            if path.exists():
                os.replace(path, replaced)
                self._fault("replace")
            os.replace(aside, path)
            self._fault("sync parent")
            fsync_folder(self.folder)
        except OSError as error:
            self._restore_replaced()
            needed = len(state) + sum(t.nbytes for group in tensors.values() for t in group.values())
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {path}: {error.strerror or error}; it needs "
                f"{needed} bytes, {shutil.disk_usage(self.folder).free} are free. Older checkpoints are as they were"
            ) from error
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        wrote = time.perf_counter()
        self._fault("verify")
        try:
            checkpoint = verify(path, from_disk=True)
        except CheckpointError as error:
            if not replaced.exists():
                self._rejected.add(path)
            self._restore_replaced()
            raise CheckpointError(f"{path} does not read back as written, {error}; older ones are kept") from error
        self._rejected.discard(path)
        verified = time.perf_counter()
        deleted = self._prune(checkpoint)
        return Written(checkpoint, wrote - start, verified - wrote, deleted)

    def _write_files(self, aside: Path, step: int, tensors: TensorGroups, state: bytes, metric: float | None) -> None:
        self._fault("create")
        if aside.exists():
            shutil.rmtree(aside)
        aside.mkdir()
        files = {}
        for group, members in tensors.items():
            name = f"{group}.safetensors"
            files[name] = write_synced(aside / name, self._with_faults(name, safetensors_parts(members)))
        files[STATE] = write_synced(aside / STATE, self._with_faults(STATE, iter([state])))
        manifest = {
            "format": FORMAT,
            "step": step,
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "files": {name: asdict(record) for name, record in files.items()},
        }
        text = json.dumps({**manifest, "sha256": _digest(manifest)}, indent=1).encode()
        write_synced(aside / MANIFEST, self._with_faults(MANIFEST, iter([text])))
        self._fault("sync folder")
        fsync_folder(aside)

    def _with_faults(self, name: str, parts: Iterator[Bytes]) -> Iterator[Bytes]:
        for part in parts:
            self._fault(f"write {name}")
            yield part
        self._fault(f"fsync {name}")

    def _prune(self, written: Checkpoint) -> tuple[str, ...]:
        """Delete what the good checkpoint just written makes superfluous."""
        found = _readable(self.folder)
        good = [c for c in found if c.path not in self._rejected and c.step <= written.step]
        keep = {c.path for c in [*good[-self.keep_last :], *_by_metric(good)[: self.keep_best], written]}
        superfluous = [c.path for c in found if c.path not in keep]
        try:
            for path in [*superfluous, *self.folder.glob(REPLACED + "*")]:
                self._fault("delete")
                delete_folder(path)
                self._rejected.discard(path)
            self._fault("done")
        except OSError as error:
            raise CheckpointError(
                f"{written.path} is written and good, but an older checkpoint cannot be deleted: {error}"
            ) from error
        return tuple(path.name for path in superfluous)

    def _restore_replaced(self) -> None:
        """A checkpoint set aside for another of the same step returns, unless the other is in its place and good."""
        for replaced in self.folder.glob(REPLACED + "*"):
            path = self.folder / replaced.name.removeprefix(REPLACED)
            if path.exists():
                try:
                    verify(path)
                    continue
                except CheckpointError:
                    delete_folder(path)
            os.replace(replaced, path)
            fsync_folder(self.folder)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Checkpoint folders, good or not, by step."""
    if not folder.is_dir():
        return []
    steps = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d{8,})", path.name))]
    return [path for _, path in sorted(steps)]


def _readable(folder: Path) -> list[Checkpoint]:
    """Checkpoints whose manifest reads, by step. The others (another format, say) are left alone by whoever prunes."""
    checkpoints = []
    for path in _folders(folder):
        try:
            checkpoints.append(read_manifest(path))
        except CheckpointError:
            continue
    return checkpoints


def _by_metric(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    return sorted((c for c in checkpoints if c.metric is not None), key=lambda c: (c.metric, c.step))


def _digest(manifest: Any) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _state_text(state: dict[str, Any]) -> bytes:
    """JSON in Python's dialect (NaN and infinities allowed); floats are written so that they read back exactly."""
    _check_exact(state, "state")
    return json.dumps(state, indent=1).encode()


def _check_exact(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, member in value.items():
            if type(key) is not str:
                raise TypeError(f"{where} has the key {key!r}: JSON keeps only strings as keys")
            _check_exact(member, f"{where}[{key!r}]")
    elif isinstance(value, list):
        for index, member in enumerate(value):
            _check_exact(member, f"{where}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(f"{where} is a {type(value).__name__}: expected None, bool, int, float, str, list or dict")
