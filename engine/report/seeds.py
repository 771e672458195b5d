"""The report of several seeds: means with their intervals, and the confusion matrix of all test splits together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hotloop.engine.files import write_file
from hotloop.engine.report.classification import BASELINES, confusion_matrix
from hotloop.engine.report.page import document, figure, prose, section
from hotloop.engine.report.summary import jsonable


def write_seeds_report(folder: Path, summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    """Write report.json and report.html beside the runs seed-0, seed-1, ...; summary is that of `summarize_seeds`."""
    runs = [{"run": f"seed-{i}", **result} for i, result in enumerate(results)]
    content = jsonable({"format": 1, "name": folder.resolve().name, **summary, "runs": runs})
    write_file(folder / "report.json", json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_file(folder / "report.html", _page(folder.resolve().name, summary, results))


def _page(name: str, summary: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> str:
    model, gain = summary["model"], summary["gain"]
    tiles = [("accuracy, test splits", _percent(model["accuracy"])), ("macro-F1", _number(model["macro_f1"]))]
    tiles += [(BASELINES[one], _percent(scores["accuracy"])) for one, scores in summary["baselines"].items()]
    if "tfidf" in gain:
        tiles.append(("points of accuracy over TF-IDF", _points(gain["tfidf"]["accuracy"])))
    cells = "".join(f"<div><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>" for label, value in tiles)
    sections = [
        section("Means and intervals", _means(summary)),
        section("Runs", _runs(results)),
        section("Confusion", _confusion(results)),
    ]
    status = f"{summary['seeds']} seeds, mean ± half of the 95 % t-interval"
    return document(
        name, "hotloop fine-tuning report", status, f'<dl class="headline">{cells}</dl>' + "".join(sections)
    )


def _means(summary: Mapping[str, Any]) -> str:
    rows = [("this model", summary["model"]), *((BASELINES[n], m) for n, m in summary["baselines"].items())]
    rows += [(f"over {BASELINES[n]}", m) for n, m in summary["gain"].items()]
    cells = [(escape(label), _number(m["accuracy"]), _number(m["macro_f1"])) for label, m in rows]
    body = "".join(f'<tr><th scope="row">{a}</th><td>{b}</td><td>{c}</td></tr>' for a, b, c in cells)
    head = "<tr><th></th><td>accuracy</td><td>macro-F1</td></tr>"
    text = (
        "Each seed decides the new weights, the order of the texts, dropout, and, where splits are drawn from the "
        "files, which texts are labelled; its baselines have the same split. Differences are taken seed by seed."
    )
    return f'<table class="numbers">{head}{body}</table>{prose(text)}'


def _runs(results: Sequence[Mapping[str, Any]]) -> str:
    names = [name for name in BASELINES if all(name in result["baselines"] for result in results)]
    head = "".join(
        f"<td>{escape(title)}</td>"
        for title in ("step", "validation loss", "accuracy", "macro-F1", *(BASELINES[name] for name in names))
    )
    body = "".join(
        f'<tr><th scope="row"><a href="seed-{i}/report.html">seed-{i}</a></th><td>{result["step"]:,}</td>'
        f"<td>{result['validation']['loss']:.4f}</td><td>{result['test']['accuracy']:.4f}</td>"
        f"<td>{result['test']['macro_f1']:.4f}</td>"
        + "".join(f"<td>{result['baselines'][name]['accuracy']:.4f}</td>" for name in names)
        + "</tr>"
        for i, result in enumerate(results)
    )
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'


def _confusion(results: Sequence[Mapping[str, Any]]) -> str:
    tables = [result["test"]["confusion"] for result in results]
    if any(table is None for table in tables):
        return ""
    total = np.sum([np.array(table) for table in tables], axis=0).tolist()
    return figure(confusion_matrix(total, results[0]["classes"])) + prose("Answers of all seeds, added up.")


def _percent(values: Mapping[str, Any]) -> str:
    half = values["half_width"]
    return f"{values['mean']:.1%}" + ("" if half is None else f" ± {half:.1%}")


def _points(values: Mapping[str, Any]) -> str:
    half = values["half_width"]
    return f"{100 * values['mean']:+.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def _number(values: Mapping[str, Any]) -> str:
    half = values["half_width"]
    return f"{values['mean']:.4f}" + ("" if half is None else f" ± {half:.4f}")
