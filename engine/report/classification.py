"""The report's section on a classification: accuracy beside baselines, the confusion matrix, a table of the classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from hotloop.engine.report.curves import INKS, Picture, drawing

NUMBERED = 20
"""Classes up to which the cells of a confusion matrix show their numbers."""
STRONGEST = 0.6
"""Opacity of a full cell: dark and light text stay readable on it."""
BEST = {"macro_f1": "macro-F1", "accuracy": "accuracy", "loss": "loss"}
BASELINES = {"majority": "majority class", "tfidf": "TF-IDF, logistic regression"}


def headline(result: Mapping[str, Any]) -> list[tuple[str, Any, str | Callable[[float], str]]]:
    """(label, value, format) of the tiles."""
    test, baselines = result["test"], result["baselines"]
    right = "sets of labels right" if result["multi_label"] else "accuracy"
    tiles: list[tuple[str, Any, str | Callable[[float], str]]] = [
        (f"{right}, test split", test["accuracy"], "{:.1%}"),
        ("macro-F1, test split", test["macro_f1"], "{:.3f}"),
    ]
    if result["multi_label"]:
        tiles.append(("micro-F1, test split", test["micro_f1"], "{:.3f}"))
    tiles += [(BASELINES[name], scores["accuracy"], "{:.1%}") for name, scores in baselines.items()]
    return [*tiles, ("validation loss of that checkpoint", result["validation"]["loss"], "{:.3f}")]


def section(result: Mapping[str, Any], figure: Callable[[Picture], str]) -> str:
    """`figure` shows a picture as the page does."""
    test = result["test"]
    rows = [("this model", test), *((BASELINES[name], scores) for name, scores in result["baselines"].items())]
    parts = [_compared(rows, result["multi_label"]), _prose(_how(result))]
    if test["confusion"] is not None:
        parts.append(figure(confusion_matrix(test["confusion"], result["classes"])))
    parts.append("<h3>Classes</h3>" + _classes(test["classes"]))
    return "".join(parts)


def confusion_matrix(table: Sequence[Sequence[int]], classes: Sequence[str], name: str = "confusion") -> Picture:
    """Rows are labels, columns answers; a cell is as dark as its share of the row."""
    K = len(classes)
    short = [one if len(one) <= 18 else one[:17] + "…" for one in classes]

    def draw(axes: Axes) -> None:
        for i, row in enumerate(table):
            total = max(sum(row), 1)
            for j, count in enumerate(row):
                cell = Rectangle((j, i), 1, 1, facecolor=INKS["model"], alpha=STRONGEST * count / total, linewidth=0)
                axes.add_patch(cell)
                if K <= NUMBERED:
                    text = f"{count:,}\n{count / total:.0%}" if K <= 8 else f"{count:,}"
                    axes.text(j + 0.5, i + 0.5, text, ha="center", va="center", color=INKS["ink"])
        axes.set_xlim(0, K)
        axes.set_ylim(K, 0)
        axes.grid(False)
        every = max(K // NUMBERED, 1)
        at = range(0, K, every)
        slant, end = (0, "center") if K <= 4 else (45, "right")
        axes.set_xticks([i + 0.5 for i in at], [short[i] for i in at], rotation=slant, ha=end)
        axes.set_yticks([i + 0.5 for i in at], [short[i] for i in at])
        axes.set_xlabel("answer")
        axes.set_ylabel("label")

    side = min(1.6 + 0.75 * K, 7.0)
    return Picture("Confusion matrix of the test split", drawing(name, draw, (max(side, 4.5), max(side * 0.72, 2.4))))


def _how(result: Mapping[str, Any]) -> str:
    data, counts = result["data"]["splits"], result["data"]["counts"]
    sizes = ", ".join(f"{split['examples']:,} for {name}" for name, split in data.items())
    text = (
        f"Texts: {sizes}. The checkpoint of step {result['step']:,} was best on validation, by {BEST[result['best']]}"
    )
    text += f", and the threshold {result['threshold']:.2f} was chosen on validation." if result["multi_label"] else "."
    removed = counts["duplicates_across"] + counts["duplicates_within"]
    text += f" {removed:,} duplicates were removed, {counts['conflicts']:,} texts have conflicting labels."
    tfidf = result["baselines"].get("tfidf")
    if tfidf:
        text += (
            " The baselines saw training and validation texts; TF-IDF counts words and pairs of words, with C = "
            f"{tfidf['C']:g} of {tfidf['folds']} folds."
        )
    return text


def _compared(rows: Sequence[tuple[str, Mapping[str, Any]]], multi_label: bool) -> str:
    names = ["accuracy", "macro_f1", *(["micro_f1"] if multi_label else [])]
    titles = {
        "accuracy": "all labels right" if multi_label else "accuracy",
        "macro_f1": "macro-F1",
        "micro_f1": "micro-F1",
    }
    head = "".join(f"<td>{titles[name]}</td>" for name in names)
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th>'
        + "".join(f"<td>{scores[name]:.4f}</td>" for name in names)
        + "</tr>"
        for label, scores in rows
    )
    return f'<table class="numbers"><tr><th></th>{head}</tr>{body}</table>'


def _classes(classes: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<td>{name}</td>" for name in ("precision", "recall", "F1", "texts"))
    body = "".join(
        f'<tr><th scope="row">{escape(one["name"])}</th><td>{one["precision"]:.3f}</td><td>{one["recall"]:.3f}</td>'
        f"<td>{one['f1']:.3f}</td><td>{one['support']:,}</td></tr>"
        for one in classes
    )
    return f'<div class="scroll"><table class="numbers"><tr><th></th>{head}</tr>{body}</table></div>'


def _prose(text: str) -> str:
    return f"<p>{escape(text)}</p>"
