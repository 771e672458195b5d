"""Files and folders that are whole or absent: written aside, fsynced, renamed, and the folder fsynced.

After a kill or a power cut at any moment a final name shows the old content or the new one, never a part of either.
Names that start with ASIDE are never final: what a killed writer left under them may be deleted or written over.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ASIDE = ".aside-"
CHUNK = 1 << 24  # bytes hashed and written at a time, while they are in the cache

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True)
class FileRecord:
    """What a file must still be when it is read again."""

    size: int
    sha256: str


class HashingWriter:
    """Writes to a binary file and computes the SHA-256 of what passes through."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._hash = hashlib.sha256()
        self._size = 0

    def write(self, data: Bytes) -> int:
        view = memoryview(data)
        if view.nbytes == 0:  # cast refuses an empty view
            return 0
        view = view.cast("B")
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
            self._hash.update(part)
            self._file.write(part)
        self._size += len(view)
        return len(view)

    @property
    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())


def write_synced(path: Path, parts: Iterable[Bytes]) -> FileRecord:
    """Write a file and fsync it, under this very name: for files inside a folder that is itself still aside."""
    with open(path, "wb") as file:
        writer = HashingWriter(file)
        for part in parts:
            writer.write(part)
        file.flush()
        os.fsync(file.fileno())
    return writer.record


def aside_of(path: Path) -> Path:
    """A new name beside `path`, for what several processes may write at once: each under its own, then a rename."""
    return path.with_name(f"{ASIDE}{secrets.token_hex(4)}-{path.name}")


@contextmanager
def atomic_writer(path: Path) -> Iterator[HashingWriter]:
    """A writer whose file gets the name `path` when the block ends, and none when it raises.

    >>> with atomic_writer(path) as writer:
    ...     writer.write(b"...")
    """
    aside = path.with_name(ASIDE + path.name)
    try:
        with open(aside, "wb") as file:
            writer = HashingWriter(file)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path`, for writers that open files by themselves: synced and renamed when the block ends, removed
    when it raises."""
    aside = aside_of(path)
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_file(path: Path, data: Bytes | str) -> FileRecord:
    """Write a whole file, whole or not at all."""
    with atomic_writer(path) as writer:
        writer.write(data.encode() if isinstance(data, str) else data)
    return writer.record


def read_record(path: Path, *, from_disk: bool = False) -> FileRecord:
    """Size and SHA-256 of a file. `from_disk` asks the system to forget its cached pages first, so that what is read is
    what the disk holds (Linux; elsewhere the cache may answer)."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(CHUNK))
    with open(path, "rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileRecord(size, digest.hexdigest())


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a rename survives a power cut only after this."""
    descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


def delete_folder(folder: Path) -> None:
    """Delete a folder: its name goes at once, its content after, so that a kill never leaves a half-deleted folder."""
    aside = folder.with_name(ASIDE + "deleted-" + folder.name)
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    fsync_folder(folder.parent)
    shutil.rmtree(aside)


def delete_leftovers(folder: Path) -> list[str]:
    """Delete what killed writers left aside in a folder; only its one writer may call this. Returns the names."""
    leftovers = sorted(path for path in folder.iterdir() if path.name.startswith(ASIDE))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]
