"""What a run leaves to read: report.json for machines, report.html for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotloop.engine.files import write_file
from hotloop.engine.report.page import page
from hotloop.engine.report.summary import jsonable, read_run, summarize

__all__ = ["write_report"]


def write_report(run_folder: Path | str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write report.json and report.html into a run folder from its config.toml, its metrics.jsonl and `extra`.

    `extra`, every key optional:
        samples      [{"prompt": str, "text": str}, ...] or [str, ...]; without it samples.txt of the folder, if any
        evaluation   the final evaluation: loss, bits_per_byte, perplexity, tokens, bytes, documents, ...
        baseline     {context length: bits per byte}, as from `kneser_ney_bits_per_byte` on the evaluation's documents
        timings      {stage of the command: seconds}; a nested "step" {part of the steps: seconds} joins what the
                     metrics say
        classification   result.json of a run of `hotloop finetune`
        model, corpus, environment      facts by name, shown as they are

    Whatever is missing is left out of the page: a run without evaluations, without a baseline, or interrupted. Both
    files are written aside and renamed. Returns the content of report.json. Raises FileNotFoundError if the folder is
    no run folder, ValueError for an unknown key of `extra`.
    """
    run = read_run(run_folder)
    summary = summarize(run, extra)
    samples = (extra or {}).get("samples")
    samples_file = run.folder / "samples.txt"
    if samples is None and samples_file.is_file():
        samples = [samples_file.read_text(encoding="utf-8", errors="replace")]
    html = page(run, summary, samples)
    report = {**summary, "samples": jsonable(samples)}
    write_file(run.folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(run.folder / "report.html", html)
    return report
