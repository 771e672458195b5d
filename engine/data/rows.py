"""CSV, JSONL and Parquet files -> rows with all their fields, in order and in bounded memory.

Unlike documents, of which a few may be passed over and counted, every row counts here: what cannot be read is an error
that names its file and place.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from hotloop.engine.data.files import COMPRESSIONS, File, open_seekable, open_stream, walk
from hotloop.engine.errors import UserError

TABLES = (".csv", ".jsonl", ".parquet")
READABLE = f"{' '.join(TABLES)}, also with {' or '.join(COMPRESSIONS)}"
CHUNK = 1 << 17
PARQUET_ROWS = 256


@dataclass(frozen=True)
class Row:
    values: dict[str, Any]
    file: str
    place: str
    """`line 7` of a CSV (where the row begins) or JSONL file, `row 7` of a Parquet file; both count from 1."""

    @property
    def where(self) -> str:
        return f"{self.file}, {self.place}"


def read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    """The rows of all tables among `paths`; in a folder other kinds of files are passed over.

    Raises UserError for a file that is missing, of another kind or without a row, and for a row that cannot be read.
    """
    found = False
    for file in walk(paths):
        if file.suffix in TABLES:
            found = True
            yield from _rows(file)
        elif file.explicit:
            raise UserError(f"{file.name}: files of kind {file.suffix!r} have no fields; expected {READABLE}")
    if not found:
        raise UserError(f"{', '.join(map(str, paths)) or 'no file'}: no table to read (looked for {READABLE})")


def require_fields(row: Row, names: Sequence[str], option: str) -> None:
    """Raises UserError naming the first of `names` that the row lacks, and the `option` that names it."""
    for name in names:
        if name not in row.values:
            have = ", ".join(map(repr, row.values)) or "none"
            raise UserError(f"{row.where}: no field {name!r} ({option}); it has {have}")


def _rows(file: File) -> Iterator[Row]:
    reader = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}[file.suffix]
    empty = True
    try:
        for row in reader(file):
            empty = False
            yield row
    except (OSError, pa.ArrowException, EOFError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file.name}: cannot be read: {reason}") from error
    if empty:
        raise UserError(f"{file.name}: no row in the file")


def _csv(file: File) -> Iterator[Row]:
    limit = csv.field_size_limit(sys.maxsize)  # of the process; its default refuses fields beyond 128 KiB
    try:
        with open_stream(file) as stream:
            lines = csv.reader((line for _, line in _lines(file, stream)), strict=True)
            header: list[str] | None = None
            while True:
                place = f"line {lines.line_num + 1}"
                try:
                    row = next(lines)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise UserError(f"{file.name}, {place}: malformed row: {error}") from error
                if not row:
                    continue
                if header is None:
                    header = row
                    twice = {name for name in header if header.count(name) > 1}
                    if twice:
                        raise UserError(f"{file.name}, {place}: the header has {sorted(twice)[0]!r} twice")
                elif len(row) != len(header):
                    raise UserError(f"{file.name}, {place}: {len(row)} fields where the header has {len(header)}")
                else:
                    yield Row(dict(zip(header, row, strict=True)), file.name, place)
    finally:
        csv.field_size_limit(limit)


def _jsonl(file: File) -> Iterator[Row]:
    with open_stream(file) as stream:
        for number, line in _lines(file, stream):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file.name}, {place}: malformed JSON: {error}") from error
            if not isinstance(values, dict):
                raise UserError(f"{file.name}, {place}: expected a JSON object, got {type(values).__name__}")
            yield Row(values, file.name, place)


def _parquet(file: File) -> Iterator[Row]:
    with open_seekable(file) as stream:
        number = 0
        for batch in pq.ParquetFile(stream, pre_buffer=False).iter_batches(batch_size=PARQUET_ROWS, use_threads=False):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError as error:  # Parquet's strings are not checked by the writer
                place = f"rows {number + 1} to {number + batch.num_rows}"
                raise UserError(f"{file.name}, {place}: invalid UTF-8 ({error.reason})") from error
            for values in rows:
                number += 1
                yield Row(values, file.name, f"row {number}")


def _lines(file: File, stream: IO[bytes]) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its newline), without the byte-order mark."""
    number = 1
    parts: list[bytes] = []  # of the line that is not whole yet
    while data := stream.read(CHUNK):
        first, *following = data.split(b"\n")
        parts.append(first)
        for start in following:
            yield number, _decode(file, number, b"".join([*parts, b"\n"]))
            number, parts = number + 1, [start]
    if any(parts):
        yield number, _decode(file, number, b"".join(parts))


def _decode(file: File, number: int, line: bytes) -> str:
    if b"\0" in line:
        raise UserError(f"{file.name}, line {number}: binary data (a NUL byte), expected UTF-8 text")
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.name}, line {number}: invalid UTF-8 at byte {error.start} of the line (0x{line[error.start]:02x}); "
            "convert the file to UTF-8"
        ) from error
