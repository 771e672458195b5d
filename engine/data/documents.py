"""Files -> documents, in bounded memory, with every problem counted at its place.

A text file is one document; a row of a .jsonl, .csv or .parquet file is one document. A document comes as one segment,
or as several if it is a long text file, so that a file larger than memory can be read.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from hotloop.engine.data.files import File, Report, open_seekable, open_stream, walk
from hotloop.engine.errors import UserError

OnBadEncoding = Literal["replace", "skip", "error"]

CHUNK = 1 << 17
SEGMENT = 1 << 17
"""Characters after which a text file is cut, at the next place where no tokenizer of the field joins tokens."""
LONGEST_SEGMENT = 1 << 21
"""Characters after which it is cut anywhere."""
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class Segment:
    """A run of a document's text; documents follow each other, `last` marks the end of each."""

    text: str
    file: File
    row: int
    """Row of the document inside its file, from 1; 0 for a text file."""
    last: bool


class Documents:
    """All documents below `paths` as segments; each iteration reads the files again, in the same order.

    `on_bad_encoding` says what becomes of a document with invalid UTF-8: `replace` the bytes with U+FFFD and keep it,
    `skip` it, or `error`. All three name the file and the byte. A file that cannot be read raises UserError where the
    user named it; inside a folder it is counted in `report`.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        text_field: str = "text",
        on_bad_encoding: OnBadEncoding = "replace",
        exclude: Sequence[str] = (),
    ):
        self.paths = paths
        self.text_field = text_field
        self.on_bad_encoding = on_bad_encoding
        self.exclude = exclude

    def read(self, report: Report) -> Iterator[Segment]:
        for file in walk(self.paths, self.exclude, report):
            yield from _FileReader(file, self.text_field, self.on_bad_encoding, report).segments()


class _Unreadable(Exception):
    pass


class _FileReader:
    def __init__(self, file: File, text_field: str, on_bad_encoding: OnBadEncoding, report: Report):
        self.file = file
        self.text_field = text_field
        self.on_bad_encoding = on_bad_encoding
        self.report = report

    def segments(self) -> Iterator[Segment]:
        reader = {".jsonl": self._jsonl, ".csv": self._csv, ".parquet": self._parquet}.get(self.file.suffix, self._text)
        try:
            yield from reader()
        except (_Unreadable, OSError, pa.ArrowException, EOFError) as error:
            kind = "binary" if isinstance(error, _Unreadable) else "unreadable"
            reason = str(error) if isinstance(error, _Unreadable) else f"cannot be read: {_one_line(error)}"
            if self.file.explicit:
                raise UserError(f"{self.file.name}: {reason}") from error
            self.report.problem(kind, self.file.name, f"{reason}; documents before this place are kept")
        else:
            self.report.files += 1

    # Each format

    def _text(self) -> Iterator[Segment]:
        if self.on_bad_encoding == "skip" and self._skipped_for_encoding():
            return
        pending, n_bytes, n_bad, first_bad, empty = "", 0, 0, -1, True
        damage: Exception | None = None
        chunks = self._utf8_chunks()
        while True:
            try:
                offset, data = next(chunks)
            except StopIteration:
                break
            except OSError as error:
                if not n_bytes:
                    raise
                damage = error  # the text before the damage is a document
                break
            text, bad, where = _decode(data)
            if bad:
                n_bad, first_bad = n_bad + bad, offset + where if first_bad < 0 else first_bad
                if self.on_bad_encoding == "error":
                    raise UserError(f"{self.file.name}: invalid UTF-8 at byte {first_bad} ({_show(data, where)})")
            n_bytes += len(data)
            pending += text
            while len(pending) > SEGMENT and (cut := _cut(pending)):
                yield Segment(pending[:cut], self.file, 0, last=False)
                pending, empty = pending[cut:], False
        if empty and not pending:
            self.report.problem("empty document", self.file.name, "no text in the file")
        else:
            self._encoding_problem(n_bad, byte=first_bad)
            yield self._document(pending, n_bytes=n_bytes)
        if damage is not None:
            raise damage

    def _jsonl(self) -> Iterator[Segment]:
        names: set[str] | None = None
        for number, offset, data in self._lines():
            if not data.strip():
                continue
            line, n_bad, where = _decode(data)
            if n_bad and not self._keep_bad(n_bad, data, where, byte=offset + where, line=number):
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                self.report.problem("malformed JSON", self.file.name, _one_line(error), line=number, byte=offset)
                continue
            if not isinstance(row, dict):
                message = f"expected an object, got {type(row).__name__}"
                self.report.problem("malformed JSON", self.file.name, message, line=number, byte=offset)
                continue
            if names is None:
                names = set(row)
                self._require_field(list(row))
            yield from self._row(row.get(self.text_field), number, line=number, byte=offset)

    def _csv(self) -> Iterator[Segment]:
        bad: list[tuple[int, int, bytes, int]] = []  # of the lines that make the current row

        def lines() -> Iterator[str]:
            for _, offset, data in self._lines():
                line, n_bad, where = _decode(data)
                if n_bad:
                    bad.append((n_bad, offset + where, data, where))
                yield line

        limit = csv.field_size_limit(sys.maxsize)  # of the process; its default cuts documents off at 128 KiB
        try:
            rows = csv.reader(lines(), strict=True)
            header: list[str] | None = None
            number = 0
            while True:
                first_line = rows.line_num + 1
                bad.clear()
                try:
                    row = next(rows)
                except StopIteration:
                    break
                except csv.Error as error:
                    number += 1
                    self.report.problem("malformed row", self.file.name, str(error), line=first_line)
                    continue
                if not row:
                    continue
                if header is None:
                    header = row
                    self._require_field(header)
                    column = header.index(self.text_field)
                    continue
                number += 1
                if bad:
                    n_bad = sum(n for n, *_ in bad)
                    _, byte, data, where = bad[0]
                    if not self._keep_bad(n_bad, data, where, byte=byte, line=first_line):
                        continue
                if len(row) != len(header):
                    message = f"{len(row)} fields where the header has {len(header)}"
                    self.report.problem("malformed row", self.file.name, message, line=first_line)
                    continue
                yield from self._row(row[column], number, line=first_line)
        finally:
            csv.field_size_limit(limit)

    def _parquet(self) -> Iterator[Segment]:
        with open_seekable(self.file) as stream:
            table = pq.ParquetFile(stream, pre_buffer=False)
            self._require_field(table.schema_arrow.names)
            kind = table.schema_arrow.field(self.text_field).type
            value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(value_type) or pa.types.is_large_string(value_type)):
                raise UserError(f"{self.file.name}: column {self.text_field!r} holds {kind}, expected strings")
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[self.text_field], use_threads=False):
                # As bytes: Parquet's strings are not checked by the writer, and a bad one must not stop the batch.
                column = batch.column(0)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                for value in column.cast(pa.large_binary()).to_pylist():
                    number += 1
                    text = value
                    if value is not None:
                        text, n_bad, where = _decode(value)
                        if n_bad and not self._keep_bad(n_bad, value, where, row=number, byte=where):
                            continue
                    yield from self._row(text, number, row=number)

    # What they share

    def _utf8_chunks(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the file, never cut inside a character; without the byte-order mark."""
        with open_stream(self.file) as stream:
            offset, carry = 0, b""
            first = True
            while data := stream.read(CHUNK):
                if first:
                    first = False
                    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        raise _Unreadable("UTF-16 text (byte-order mark), expected UTF-8; convert it first")
                    if (at := data.find(0)) >= 0:
                        raise _Unreadable(f"binary file (NUL at byte {at}), expected UTF-8 text")
                    if data.startswith(b"\xef\xbb\xbf"):
                        self.report.problem("byte-order mark", self.file.name, "left out of the text", byte=0)
                        offset, data = 3, data[3:]
                data = carry + data
                end = _character_boundary(data)
                carry = data[end:]
                if end:
                    yield offset, data[:end]
                offset += end
            if carry:
                yield offset, carry

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, offset, bytes with the newline) of each line."""
        number, start = 1, 0
        parts: list[bytes] = []
        for offset, data in self._utf8_chunks():
            if number == 1 and not parts:
                start = offset
            lines = data.split(b"\n")
            parts.append(lines[0])
            for following in lines[1:]:
                line = b"".join([*parts, b"\n"])
                yield number, start, line
                number, start, parts = number + 1, start + len(line), [following]
        if any(parts):
            yield number, start, b"".join(parts)

    def _row(self, value: Any, number: int, **place: int) -> Iterator[Segment]:
        if not isinstance(value, str):
            got = "no value" if value is None else type(value).__name__
            self.report.problem(
                "no text", self.file.name, f"field {self.text_field!r}: {got}, expected a string", **place
            )
        elif not value:
            self.report.problem("empty document", self.file.name, f"field {self.text_field!r} is empty", **place)
        else:
            try:
                n_bytes = len(value.encode())
            except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
                n_bad = sum("\ud800" <= character <= "\udfff" for character in value)
                if not self._keep_bad(n_bad, f"\\u{ord(value[error.start]):04x}", error.start, **place):
                    return
                value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
                n_bytes = len(value.encode())
            yield self._document(value, number, n_bytes)

    def _document(self, text: str, row: int = 0, n_bytes: int = 0) -> Segment:
        self.report.documents += 1
        self.report.text_bytes += n_bytes
        return Segment(text, self.file, row, last=True)

    def _require_field(self, names: Sequence[str]) -> None:
        if self.text_field not in names:
            have = ", ".join(map(repr, names)) or "none"
            raise UserError(
                f"{self.file.name}: no field {self.text_field!r} (--text-field); the fields of its first row are {have}"
            )

    def _keep_bad(self, n_bad: int, data: bytes | str, where: int, **place: int) -> bool:
        """Account for a document with invalid UTF-8; whether it is kept."""
        if self.on_bad_encoding == "error":
            at = ", ".join(f"{name} {value}" for name, value in place.items())
            raise UserError(f"{self.file.name}: invalid UTF-8 at {at} ({_show(data, where)})")
        self._encoding_problem(n_bad, **place)
        return self.on_bad_encoding == "replace"

    def _encoding_problem(self, n_bad: int, **place: int) -> None:
        if n_bad:
            fate = "replaced with U+FFFD" if self.on_bad_encoding == "replace" else "document skipped"
            self.report.problem(
                "invalid UTF-8", self.file.name, f"{n_bad} invalid sequence{'s' * (n_bad > 1)}, {fate}", **place
            )

    def _skipped_for_encoding(self) -> bool:
        """Look through the whole text file before its first segment is passed on."""
        silent = _FileReader(self.file, self.text_field, self.on_bad_encoding, Report())
        for offset, data in silent._utf8_chunks():
            _, n_bad, where = _decode(data)
            if n_bad:
                self._encoding_problem(n_bad, byte=offset + where)
                return True
        return False


def _decode(data: bytes) -> tuple[str, int, int]:
    """(text, number of invalid sequences, offset of the first); each invalid sequence becomes one U+FFFD."""
    try:
        return data.decode(), 0, -1
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", "replace")
        return text, text.count(REPLACEMENT) - data.count(REPLACEMENT.encode()), error.start


def _character_boundary(data: bytes) -> int:
    """The longest prefix that does not end inside a UTF-8 character."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if back < length else len(data)
    return len(data)


def _cut(text: str) -> int:
    """Where a long text may be cut; 0: not yet.

    A pre-tokenizer that splits words from whitespace (byte-level BPE, BERT's, Metaspace) never joins across a lone
    newline between visible characters, nor a visible character to a lone space after it. A cut behind such a newline or
    before such a space gives the tokens of the uncut text.
    """
    for separator, width in (("\n", 1), (" ", 0)):
        at = len(text) - 1
        while (at := text.rfind(separator, 1, at)) > 0:
            if not text[at - 1].isspace() and not text[at + 1].isspace():
                return at + width
    return LONGEST_SEGMENT if len(text) > LONGEST_SEGMENT else 0


def _show(data: bytes | str, where: int) -> str:
    return data if isinstance(data, str) else f"0x{data[where]:02x}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
