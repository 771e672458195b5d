"""The report of a comparison: accuracy over the number of labels, and what each way takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes

from hotloop.engine.report.curves import INKS, Picture, drawing
from hotloop.engine.report.page import document, figure, prose, section

NAMES = {
    "general": "general checkpoint, fine-tuned", "continued": "pretrained further, fine-tuned",
    "scratch": "pretrained from scratch, fine-tuned", "tfidf": "TF-IDF, logistic regression",
}  # fmt: skip
INK = {"general": "model", "continued": "held", "scratch": "part3", "tfidf": "part7"}
COLUMNS = ("accuracy", "macro-F1", "points over general", "hours", "cost", "cost per point", "forgotten")


def table(summary: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """(heading, [(way, its cells in the order of COLUMNS)]) for each number of labels."""
    for labels in dict.fromkeys(line["labels"] for line in summary):
        heading = "all labels" if labels is None else f"{labels:,} labels"
        yield heading, [(line["way"], _cells(line)) for line in summary if line["labels"] == labels]


def page(name: str, content: Mapping[str, Any]) -> str:
    summary, seeds = content["summary"], content["config"]["seeds"]
    tables = "".join(section(heading, _table(rows)) for heading, rows in table(summary))
    text = (
        "Mean and half of the 95 % t-interval over seeds. A seed pretrains and fine-tunes anew on every way, on the "
        "same splits; differences are taken seed by seed. Points are percentage points of accuracy on the test split. "
        "Hours are of one seed, pretraining included; TF-IDF's include the search for C. The cost per point is shown "
        "where the gain's interval lies above zero. Forgotten: rise of the loss on held-out general text, nats a token."
    )
    curve = section("Accuracy over labels", figure(_curve(summary)) + prose(text))
    return document(name, "hotloop comparison", f"{seeds} seeds", curve + tables)


def _curve(summary: Sequence[Mapping[str, Any]]) -> Picture:
    labels = list(dict.fromkeys(line["labels"] for line in summary))
    at = {n: i if n is None else n for i, n in enumerate(labels)}

    def draw(axes: Axes) -> None:
        for way, ink in INK.items():
            lines = [line for line in summary if line["way"] == way]
            axes.errorbar(
                [at[line["labels"]] for line in lines], [100 * line["accuracy"]["mean"] for line in lines],
                yerr=[100 * (line["accuracy"]["half_width"] or 0) for line in lines], fmt="o-", color=INKS[ink],
                lw=1.4, ms=4.0, capsize=3.0,
            )  # fmt: skip
        if len(labels) > 1:
            axes.set_xscale("log")
        axes.set_xticks(list(at.values()), ["all" if n is None else f"{n:,}" for n in labels])
        axes.minorticks_off()
        axes.set_xlabel("labelled texts")

    legend = tuple((ink, NAMES[way]) for way, ink in INK.items())
    return Picture("accuracy on the test split, %", drawing("labels", draw, (7.0, 2.9)), legend)


def _table(rows: Sequence[tuple[str, list[str]]]) -> str:
    head = "".join(f"<td>{escape(column)}</td>" for column in COLUMNS)
    body = "".join(
        f'<tr><th scope="row">{escape(NAMES[way])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        + "</tr>"
        for way, cells in rows
    )
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'


def _cells(line: Mapping[str, Any]) -> list[str]:
    return [
        _interval(line["accuracy"], 100, "{:.1f}", " %"), _interval(line["macro_f1"], 1, "{:.3f}"),
        _interval(line["points_over_general"], 1, "{:+.1f}"), f"{line['hours']:.3g}", _number(line["cost"]),
        _number(line["cost_per_point"]), _interval(line["forgetting"], 1, "{:+.3f}"),
    ]  # fmt: skip


def _interval(values: Mapping[str, Any] | None, scale: float, form: str, unit: str = "") -> str:
    if values is None:
        return ""
    half = values["half_width"]
    mean = form.format(scale * values["mean"])
    return f"{mean}{unit}" if half is None else f"{mean} ± {form.replace('+', '').format(scale * half)}{unit}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
