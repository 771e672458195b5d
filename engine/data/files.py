"""Paths -> files, in sorted order, with an account of everything that is passed over."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from hotloop.engine.errors import UserError
from hotloop.engine.files import ASIDE

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
READABLE = f"{' '.join(SUFFIXES)}, also with {' or '.join(COMPRESSIONS)}"
MAX_EXAMPLES = 20


@dataclass
class Report:
    """What was read and what was not: kept counts, the first places of each kind of problem, all of them in `sink`."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of all documents read, duplicates included."""
    skipped: dict[str, int] = field(default_factory=dict)
    """Entries of folders that are not read, by suffix or reason."""
    problems: dict[str, int] = field(default_factory=dict)
    """Kind of problem -> how often."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """Kind of problem -> its first places."""
    sink: IO[str] | None = field(default=None, repr=False, compare=False)
    """Gets one JSON line per problem."""

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def problem(self, kind: str, file: str, message: str, **place: int) -> None:
        """`place`: byte=, line= or row= inside the file."""
        self.problems[kind] = self.problems.get(kind, 0) + 1
        examples = self.examples.setdefault(kind, [])
        if len(examples) < MAX_EXAMPLES:
            where = ", ".join(f"{name} {value}" for name, value in place.items())
            examples.append(f"{file}{': ' + where if where else ''}: {message}")
        if self.sink is not None:
            self.sink.write(json.dumps({"kind": kind, "file": file, **place, "message": message}) + "\n")

    def first_problem(self) -> str:
        """Its place and message, and how many more there are."""
        if not self.problems:
            return "no problem was found"
        more = sum(self.problems.values()) - 1
        first = next(iter(self.examples.values()))[0]
        return f"{first}; and {more:,} more" if more else first

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": self.files,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "skipped": dict(sorted(self.skipped.items())),
            "problems": dict(sorted(self.problems.items())),
            "examples": dict(sorted(self.examples.items())),
        }


@dataclass(frozen=True)
class File:
    path: Path
    group: str
    """First component below the path that was given; the file's own name where it has no folder."""
    suffix: str
    compression: str | None
    explicit: bool
    """Named by the user, not found in a folder: what cannot be read is then an error, not a line of the report."""
    size: int

    @property
    def name(self) -> str:
        return printable(self.path)


def printable(path: Path | str) -> str:
    """A path that can be printed and stored as UTF-8, whatever bytes the file system holds."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def walk(paths: Sequence[Path], exclude: Iterable[str] = (), report: Report | None = None) -> Iterator[File]:
    """All files to read: paths in the given order, folders depth first, names in byte order.

    `exclude`: glob patterns; an entry of a folder is left out when its name or its path below the folder matches.
    Raises UserError for a path that is missing or of no readable kind, and for a folder without a readable file.
    """
    report = Report() if report is None else report
    patterns = tuple(exclude)
    for path in paths:
        if path.is_dir():
            before = dict(report.skipped)
            found = False
            for file in _walk_folder(path, path, patterns, report):
                found = True
                yield file
            if not found:
                passed = {name: n - before.get(name, 0) for name, n in report.skipped.items()}
                seen = ", ".join(f"{n} {name}" for name, n in sorted(passed.items()) if n) or "it is empty"
                raise UserError(
                    f"{printable(path)}: no file to read in this folder (looked for {READABLE}; found {seen})"
                )
        elif path.is_file():
            suffix, compression = kind_of(path.name)
            if suffix not in SUFFIXES:
                raise UserError(f"{printable(path)}: files of kind {suffix!r} cannot be read; expected {READABLE}")
            yield File(path, path.name, suffix, compression, True, path.stat().st_size)
        elif os.path.lexists(path):
            raise UserError(f"{printable(path)}: neither a file nor a folder")
        else:
            raise UserError(f"{printable(path)}: no such file or folder")


def kind_of(name: str) -> tuple[str, str | None]:
    """`notes.txt.gz` -> (".txt", "gzip")."""
    stem, suffix = os.path.splitext(name.lower())
    compression = COMPRESSIONS.get(suffix)
    return (os.path.splitext(stem)[1] if compression else suffix), compression


def _walk_folder(folder: Path, top: Path, exclude: tuple[str, ...], report: Report) -> Iterator[File]:
    try:
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        if folder == top:
            raise UserError(f"{printable(folder)}: cannot be read ({error.strerror})") from error
        report.problem("unreadable", printable(folder), f"folder cannot be read ({error.strerror})")
        return
    for entry in ordered:
        path = folder / entry.name
        below = path.relative_to(top)
        if entry.name.startswith(ASIDE):
            report.skip("unfinished corpus")  # perhaps the one being written from these very files
        elif any(fnmatchcase(entry.name, pattern) or fnmatchcase(below.as_posix(), pattern) for pattern in exclude):
            report.skip("excluded")
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk_folder(path, top, exclude, report)
        elif entry.is_dir():
            report.skip("link to a folder")  # following it could read a tree twice, or forever
        elif not entry.is_file():
            report.skip("not a regular file")
        else:
            suffix, compression = kind_of(entry.name)
            if suffix in SUFFIXES:
                yield File(path, below.parts[0], suffix, compression, False, entry.stat().st_size)
            else:
                report.skip(suffix or "no suffix")


@contextmanager
def open_stream(file: File) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed, read forward. Concatenated gzip and zstd members are one stream."""
    with open(file.path, "rb") as raw:
        if file.compression is None:
            yield raw
        else:
            with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), file.compression) as stream:
                yield stream


@contextmanager
def open_seekable(file: File) -> Iterator[IO[bytes]]:
    """Like `open_stream`, with random access: a compressed file is first unpacked into a temporary one."""
    with open_stream(file) as stream:
        if file.compression is None:
            yield stream
        else:
            with tempfile.TemporaryFile() as unpacked:
                while data := stream.read(1 << 20):
                    unpacked.write(data)
                unpacked.seek(0)
                yield unpacked
