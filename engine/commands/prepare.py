"""`hotloop prepare PATHS --out DIR`: documents in, shards out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from hotloop.engine.data.prepare import PrepareConfig, Prepared, prepare
from hotloop.engine.data.prepare import Progress as OnProgress


@dataclass(frozen=True, kw_only=True)
class Prepare(PrepareConfig):
    """Turn folders or files of documents into a tokenized corpus for training.

    Examples:
      hotloop prepare my_documents/ --out corpora/mine
      hotloop prepare notes.jsonl.zst more/ --text-field body --out corpora/mine --vocab-size 4096
      hotloop prepare other/ --out corpora/other --tokenizer runs/mine/tokenizer.json --validation-fraction 0
      hotloop prepare notes/ --out corpora/notes --extend-tokenizer checkpoints/bert --add-tokens 2000

    Reads .txt .md .py (a file is a document), .jsonl .csv .parquet (a row is a document), also .gz and .zst of these.
    Drops exact duplicates, holds documents out for validation, trains a tokenizer on the rest or reuses one, and writes
    shards. Beside a reused tokenizer it says how well one of one's own would fit; --extend-tokenizer adds tokens of
    these documents to it, and a run that begins with its checkpoint has embeddings for them. A corpus larger than
    memory works. What cannot be read is counted, and listed in problems.log.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Folders or files of documents."""
    out: Path
    """Folder to write; must not exist, or be empty."""

    def __call__(self) -> int:
        """Raises UserError for bad input."""
        console = Console()
        config = PrepareConfig(**{f.name: getattr(self, f.name) for f in fields(PrepareConfig)})
        with _progress(console) as on_progress:
            prepared = prepare(self.paths, self.out, config, on_progress)
        show(prepared, console)
        return 0


def show(prepared: Prepared, console: Console) -> None:
    """Counts, problems and times, as a table on a terminal and as plain lines elsewhere."""
    manifest, report = prepared.manifest, prepared.manifest["report"]
    table = Table("split", "documents", "tokens", "bytes", "bytes/token", "shards", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, split in manifest["splits"].items():
        numbers = [f"{split[key]:,}" for key in ("documents", "tokens", "bytes")]
        table.add_row(name, *numbers, f"{split['bytes'] / split['tokens']:.2f}", str(len(split["shards"])))
    console.print(table)
    lines = [
        f"{report['files']:,} files, {report['documents']:,} documents, "
        f"{report['duplicate_documents']:,} exact duplicates dropped"
    ]
    if report["held_out_folders"]:
        lines.append(f"held out: {', '.join(report['held_out_folders'])}")
    if report["skipped"]:
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items())
        lines.append(f"not read: {skipped}")
    for kind, count in report["problems"].items():
        lines.append(f"{kind}: {count:,}, e.g. {report['examples'][kind][0]}")
    if report["problems"]:
        lines.append(f"every problem with its place: {prepared.folder / 'problems.log'}")
    if report["unknown_tokens"]:
        lines.append(f"unknown tokens: {report['unknown_tokens']:,} (this tokenizer does not cover all of the text)")
    lines.append(
        f"vocabulary {manifest['vocab_size']:,}, stored as {manifest['dtype']}, end of document {manifest['end_id']}"
    )
    if report["bytes_per_token"]:
        rates = ", ".join(f"{name} {rate:.2f}" for name, rate in report["bytes_per_token"].items())
        lines.append(f"bytes per token of held-out text, by tokenizer: {rates}")
    if manifest["options"]["extend_tokenizer"] is not None:
        lines.append(
            f"{report['added_tokens']:,} tokens added to {manifest['options']['extend_tokenizer']}: a run whose "
            "initial.path is that checkpoint begins with their embeddings as the mean of their pieces'"
        )
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in prepared.seconds.items())
    lines.append(f"{prepared.folder}: {sum(prepared.seconds.values()):.1f} s ({phases})")
    for line in lines:
        console.print(escape(line), highlight=False, soft_wrap=True)


@contextmanager
def _progress(console: Console) -> Iterator[OnProgress | None]:
    if not console.is_terminal:
        yield None
        return
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("scan")

        def on_progress(phase: str, done: int, total: int) -> None:
            progress.update(task, description=phase, completed=done, total=total or None)

        yield on_progress
