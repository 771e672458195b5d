"""Rows with their predictions -> a CSV, JSONL or Parquet file, in order and in bounded memory.

A row keeps its own columns and gets those of the prediction behind them:

    csv, parquet    predicted, and probability_NAME for each class
    jsonl           predicted, and probabilities: {NAME: p, ...}

The columns of a CSV or Parquet file are those of the first rows; a later row with another field is an error, since what
it holds would be lost. `predicted` of a multi-label task is a list, in CSV the names with a separator between them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hotloop.engine.data.rows import TABLES, Row
from hotloop.engine.errors import UserError
from hotloop.engine.files import whole_file
from hotloop.engine.report.scores import decide

PREDICTED, PROBABILITIES = "predicted", "probabilities"
DIGITS = 6
"""Decimals of a probability."""


class Writer(Protocol):
    def write(self, rows: Sequence[Row], probabilities: np.ndarray) -> None:
        """The next rows, and (len(rows), K) probabilities."""


class _Names:
    """Probabilities -> what is written about them."""

    def __init__(self, classes: Sequence[str], multi_label: bool, threshold: float, separator: str):
        self.classes, self.multi_label, self.threshold, self.separator = classes, multi_label, threshold, separator
        self.columns = [f"probability_{name}" for name in classes]

    def predicted(self, probabilities: np.ndarray) -> list[Any]:
        answers = decide(probabilities, self.multi_label, self.threshold)
        if not self.multi_label:
            return [self.classes[int(i)] for i in answers]
        return [[self.classes[int(i)] for i in np.flatnonzero(row)] for row in answers]


def check_output(path: Path) -> None:
    """Raises UserError for an output of another kind, or one that would be written over."""
    if path.suffix.lower() not in TABLES:
        raise UserError(f"--out {path}: files of kind {path.suffix!r} are not written; expected {' '.join(TABLES)}")
    if path.exists():
        raise UserError(f"--out {path} exists: remove it or name another file")
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: no such folder: {path.parent}")


@contextmanager
def prediction_writer(
    path: Path, classes: Sequence[str], multi_label: bool, threshold: float = 0.5, separator: str = ","
) -> Iterator[Writer]:
    """A writer by the suffix of `path`, which gets its name when the block ends."""
    names = _Names(classes, multi_label, threshold, separator)
    with whole_file(path) as aside:
        if path.suffix.lower() == ".parquet":
            parquet = _Parquet(aside, names)
            try:
                yield parquet
            finally:
                parquet.close()
        else:
            with open(aside, "x", encoding="utf-8", newline="") as file:
                yield _Csv(file, names) if path.suffix.lower() == ".csv" else _Jsonl(file, names)


def _own_columns(row: Row, added: Iterable[str]) -> list[str]:
    for name in added:
        if name in row.values:
            raise UserError(f"{row.where}: has a field {name!r} already, which the prediction would replace: rename it")
    return list(row.values)


def _check_columns(row: Row, columns: Sequence[str]) -> None:
    for name in row.values:
        if name not in columns:
            raise UserError(
                f"{row.where}: field {name!r} is not among the first row's ({', '.join(map(repr, columns))}); write "
                "JSONL, whose rows may differ"
            )


class _Csv:
    def __init__(self, file: Any, names: _Names):
        self.names = names
        self.writer = csv.writer(file, lineterminator="\n")
        self.columns: list[str] | None = None

    def write(self, rows: Sequence[Row], probabilities: np.ndarray) -> None:
        if self.columns is None and rows:
            self.columns = _own_columns(rows[0], [PREDICTED, *self.names.columns])
            self.writer.writerow([*self.columns, PREDICTED, *self.names.columns])
        for row, predicted, p in zip(rows, self.names.predicted(probabilities), probabilities, strict=True):
            assert self.columns is not None
            _check_columns(row, self.columns)
            given = self.names.separator.join(predicted) if self.names.multi_label else predicted
            own = [_cell(row.values.get(name)) for name in self.columns]
            self.writer.writerow([*own, given, *(f"{x:.{DIGITS}f}" for x in p)])


class _Jsonl:
    def __init__(self, file: Any, names: _Names):
        self.file, self.names = file, names

    def write(self, rows: Sequence[Row], probabilities: np.ndarray) -> None:
        for row, predicted, p in zip(rows, self.names.predicted(probabilities), probabilities, strict=True):
            _own_columns(row, [PREDICTED, PROBABILITIES])
            found = {name: round(float(x), DIGITS) for name, x in zip(self.names.classes, p, strict=True)}
            line = {**row.values, PREDICTED: predicted, PROBABILITIES: found}
            self.file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


class _Parquet:
    def __init__(self, path: Path, names: _Names):
        self.path, self.names = path, names
        self.columns: list[str] | None = None
        self.writer: pq.ParquetWriter | None = None
        self.schema: pa.Schema | None = None

    def write(self, rows: Sequence[Row], probabilities: np.ndarray) -> None:
        if not rows:
            return
        if self.columns is None:
            self.columns = _own_columns(rows[0], [PREDICTED, *self.names.columns])
        for row in rows:
            _check_columns(row, self.columns)
        columns: dict[str, Any] = {name: [row.values.get(name) for row in rows] for name in self.columns}
        columns[PREDICTED] = self.names.predicted(probabilities)
        columns |= dict(zip(self.names.columns, probabilities.astype(np.float32).T, strict=True))
        try:
            table = pa.table(columns, schema=self.schema)
        except (pa.ArrowException, TypeError) as error:
            first, last = rows[0].where, rows[-1].where
            raise UserError(
                f"{first} to {last}: a column changes its type ({' '.join(str(error).split())}); write JSONL, whose "
                "rows may differ"
            ) from error
        if self.writer is None:
            self.schema = table.schema
            self.writer = pq.ParquetWriter(self.path, table.schema)
        self.writer.write_table(table)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _cell(value: Any) -> Any:
    """What a CSV cell can hold: lists and objects as JSON."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value
