"""`hotloop predict RUN FILES --out FILE`"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from hotloop.engine.data.rows import Row

ROWS_TOGETHER = 1024
CHARACTERS_TOGETHER = 1 << 23


@dataclass(frozen=True)
class Predict:
    """Label texts with a model that `hotloop finetune` made: the label, and a probability for each class.

    Examples:
      hotloop predict runs/sentiment reviews.csv --out labelled.csv
      hotloop predict runs/sentiment inbox/*.jsonl.zst --out labelled.parquet --on-long window

    Rows of CSV, JSONL or Parquet files (or of those in a folder) keep their order and their columns, and get
    `predicted` and the probabilities behind them: probability_NAME for each class, in JSONL an object `probabilities`.
    Files are read and written in pieces, so they may be larger than memory; the output appears when it is whole. A row
    without text is an error that names it.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, as `hotloop finetune --out` wrote it; of several seeds, the best on validation serves."""
    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """CSV, JSONL or Parquet files, also .gz or .zst, or folders of them."""
    out: Path
    """File to write: .csv, .jsonl or .parquet."""
    text_field: str | None = None
    """Field that holds the text; none: as in training."""
    on_long: Literal["error", "truncate", "window"] | None = None
    """What becomes of texts longer than the model; none: as in training."""
    checkpoint: Literal["last", "best"] | None = None
    """The newest one, or the one that is best on validation; none: best, and last where nothing was validated."""

    def __call__(self) -> int:
        from hotloop.engine.classifier import load_classifier
        from hotloop.engine.data.labelled import row_text
        from hotloop.engine.data.predictions import check_output, prediction_writer
        from hotloop.engine.data.rows import read_rows
        from hotloop.engine.errors import UserError

        if not self.files:
            raise UserError("no file to read: give CSV, JSONL or Parquet files")
        check_output(self.out)
        trained = load_classifier(self.run, self.checkpoint, on_long=self.on_long)
        for note in trained.notes:
            print(f"hotloop: {note}", file=sys.stderr)
        field = self.text_field or trained.labels.text
        count = 0
        with prediction_writer(
            self.out, trained.classes, trained.multi_label, trained.threshold, trained.labels.separator
        ) as writer:
            for rows, texts in chunks((row, row_text(row, field, "--text-field")) for row in read_rows(self.files)):
                writer.write(rows, trained.probabilities(texts, [row.where for row in rows]))
                count += len(rows)
        print(f"{self.out}: {count:,} rows, labelled by step {trained.step} of {trained.folder}")
        return 0


def chunks(rows: Iterable[tuple[Row, str]]) -> Iterator[tuple[list[Row], list[str]]]:
    """(rows, their texts), as many together as memory is meant for."""
    together: list[Row] = []
    texts: list[str] = []
    characters = 0
    for row, text in rows:
        together.append(row)
        texts.append(text)
        characters += len(text)
        if len(together) == ROWS_TOGETHER or characters >= CHARACTERS_TOGETHER:
            yield together, texts
            together, texts, characters = [], [], 0
    if together:
        yield together, texts
