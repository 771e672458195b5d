"""The report as one HTML page without any outside resource: readable on a screen, a phone and paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import tomli_w

from hotloop.engine.report import classification, curves, held_out
from hotloop.engine.report.style import STYLE
from hotloop.engine.report.summary import Run, verdict

EVENTS_SHOWN = 200


def page(run: Run, summary: Mapping[str, Any], samples: Sequence[Mapping[str, str] | str] | None) -> str:
    """The whole page from a run, its `summarize` and the samples."""
    result = summary["classification"]
    sections = [
        section("Classification", classification.section(result, figure) if result else ""),
        section("Hidden tokens of held-out text", held_out.masked(summary)),
        section("What is forgotten", held_out.forgetting(summary)),
        section("Held-out text against counting", _bits(summary)),
        section("Loss", _loss(run, summary)),
        section("Learning rate and gradient", _schedule(run)),
        section("Speed and memory", _speed(run, summary)),
        section("Where the time went", _time(summary)),
        section("Samples", _samples(samples)),
        section("Events", _events(run)),
        section("Model", _table(summary["model"])),
        section("Corpus", _table(summary["corpus"])),
        section("Environment", _table(summary["environment"])),
        section("Resolved configuration", _config(run)),
    ]
    return document(
        summary["name"], "hotloop training report", _status(summary), f"{_headline(summary)}\n{''.join(sections)}"
    )


def document(name: str, kind: str, status: str, body: str) -> str:
    """A page around its sections; `body` is HTML."""
    name = escape(name)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{name}: training report</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<p class="kind">{escape(kind)}</p>
<h1>{name}</h1>
<p class="status">{escape(status)}</p>
</header>
<main>
{body}</main>
</body>
</html>
"""


def duration(seconds: float) -> str:
    """231.4 -> 3 min 51 s"""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _status(summary: Mapping[str, Any]) -> str:
    steps, planned = summary["steps"], summary["planned_steps"]
    done = f"{steps:,} steps" if planned is None else f"{steps:,} of {planned:,} steps"
    if summary["complete"]:
        state = "complete"
    else:
        state = "stopped before its planned end" if planned else "unknown plan"
        state += f" ({summary['end']})" if summary["end"] else ""
    return f"{done} in {duration(summary['seconds'])}, {state}"


def _headline(summary: Mapping[str, Any]) -> str:
    evaluation = summary["evaluation"] or {}
    if summary["classification"]:
        tiles = classification.headline(summary["classification"])
        return _tiles(tiles)
    tiles = [
        ("bits per byte, held out", summary["bits_per_byte"], "{:.3f}"),
        ("held-out loss, nats per token", evaluation.get("loss"), "{:.3f}"),
        ("of the hidden tokens found", evaluation.get("accuracy"), "{:.1%}"),
        ("pseudo-perplexity, held out", evaluation.get("pseudo_perplexity"), "{:.2f}"),
        ("forgotten, nats per token of general text", (summary["forgetting"] or {}).get("difference"), "{:+.3f}"),
        ("training loss, last 5 % of steps", summary["train_loss"], "{:.3f}"),
        ("tokens seen", summary["tokens"] or None, curves.short),
        ("tokens per second", summary["tokens_per_second"], "{:,.0f}"),
        ("of the measured matmul peak", summary["mfu"], "{:.0%}"),
    ]
    return _tiles(tiles)


def _tiles(tiles: Sequence[tuple[str, Any, str | Callable[[float], str]]]) -> str:
    cells = [
        f"<div><dt>{escape(label)}</dt><dd>{form.format(value) if isinstance(form, str) else form(value)}</dd></div>"
        for label, value, form in tiles
        if value is not None
    ]
    return f'<dl class="headline">{"".join(cells)}</dl>' if cells else ""


def _bits(summary: Mapping[str, Any]) -> str:
    baseline = {int(context): value for context, value in (summary["kneser_ney_bits_per_byte"] or {}).items()}
    if not baseline and summary["bits_per_byte"] is None:
        return ""
    evaluation = summary["evaluation"] or {}
    where = []
    if evaluation.get("bytes"):
        held = f"{int(evaluation['bytes']):,} bytes of held-out text"
        where.append(f"Measured on {held}, every token and every end of a document counted.")
    if summary["bits_per_byte_from"] not in (None, "evaluation"):
        where.append(f"The number is that of the {summary['bits_per_byte_from']}, not of a final one.")
    if not baseline:
        where.append("No counting model was fitted in this run, so there is nothing to compare with.")
        return prose(f"{summary['bits_per_byte']:.3f} bits per byte. " + " ".join(where))
    sentence = verdict(summary) or "The run has no evaluation to compare with the counting models."
    where.append("Lower is better; each grey bar is an interpolated Kneser-Ney model of bytes.")
    bars = _bars(summary["bits_per_byte"], baseline)
    sentence = escape(sentence).replace("Kneser-Ney", "Kneser\u2011Ney")  # a hyphen that never ends a line
    return f'<p class="verdict">{sentence}</p>{bars}{prose(" ".join(where))}'


def _bars(bits: float | None, baseline: Mapping[int, float]) -> str:
    rows = [(f"{context} bytes of context", value, "count") for context, value in baseline.items()]
    if bits is not None:
        rows.append(("this model", bits, "model"))
    longest = max(value for _, value, _ in rows)
    cells = [
        f'<tr class="{ink}"><th scope="row">{escape(name)}</th>'
        f'<td><i style="width: {value / longest:.2%}; background: var(--{ink})"></i></td><td>{value:.3f}</td></tr>'
        for name, value, ink in rows
    ]
    return f'<table class="bars">{"".join(cells)}</table>'


def _loss(run: Run, summary: Mapping[str, Any]) -> str:
    if "loss" not in run.train:
        return prose("The run has no finished step.")
    best = summary["best_evaluation"]
    if best:
        unit = curves.unit(run)
        text = f"Best evaluation during the run: {best['loss']:.3f} nats per {unit} at step {int(best['step']):,}."
    else:
        text = "The run was not evaluated on held-out documents while it trained."
    return figure(curves.loss_curve(run)) + prose(text)


def _schedule(run: Run) -> str:
    figures = []
    if "lr" in run.train:
        figures.append(figure(curves.learning_rate_curve(run)))
    if (run.train["grad_norm"] > 0).any():
        figures.append(figure(curves.grad_norm_curve(run)))
    return _pair(figures)


def _speed(run: Run, summary: Mapping[str, Any]) -> str:
    figures = []
    if "tokens_per_second" in run.train or "supervised_per_second" in run.train:
        figures.append(figure(curves.throughput_curve(run)))
    if "memory_mb" in run.train:
        figures.append(figure(curves.memory_curve(run)))
    facts = {
        "median step": summary["step_ms"] and f"{summary['step_ms']:,.1f} ms",
        "supervised tokens per second": summary["supervised_per_second"] and f"{summary['supervised_per_second']:,.0f}",
        "padding": summary["padding_share"] is not None and f"{summary['padding_share']:.2%} of the positions",
        "peak memory": summary["peak_memory_mb"] and f"{summary['peak_memory_mb']:,.0f} MB",
    }
    text = "; ".join(f"{name} {value}" for name, value in facts.items() if value)
    return _pair(figures) + (prose(text[0].upper() + text[1:] + ".") if text else "")


def _time(summary: Mapping[str, Any]) -> str:
    parts = []
    split = {name: seconds for name, seconds in summary["time_split_seconds"].items() if seconds > 0 or name == "other"}
    if sum(split.values()) > 0:
        total = sum(split.values())
        rows = [
            f'<tr><th scope="row"><i style="background: var(--{ink})"></i>{escape(name)}</th>'
            f"<td>{escape(duration(seconds))}</td><td>{seconds / total:.1%}</td></tr>"
            for ink, (name, seconds) in zip(curves.part_inks(len(split)), split.items(), strict=True)
        ]
        rows.append(f'<tr class="sum"><th scope="row">the run</th><td>{escape(duration(total))}</td><td></td></tr>')
        bar = [
            f'<i style="width: {seconds / total:.3%}; background: var(--{ink})"></i>'
            for ink, seconds in zip(curves.part_inks(len(split)), split.values(), strict=True)
        ]
        parts.append(f'<div class="stack">{"".join(bar)}</div><table class="numbers">{"".join(rows)}</table>')
    if summary["timings"]:
        rows = [
            f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td>{escape(duration(float(seconds)))}</td></tr>'
            for name, seconds in summary["timings"].items()
        ]
        parts.append(f'<h3>Stages of the command</h3><table class="numbers">{"".join(rows)}</table>')
    return "".join(parts)


def _samples(samples: Sequence[Mapping[str, str] | str] | None) -> str:
    blocks = []
    for sample in samples or ():
        prompt, text = ("", sample) if isinstance(sample, str) else (sample.get("prompt", ""), sample["text"])
        blocks.append(f"<pre><b>{escape(prompt)}</b>{escape(text)}</pre>")
    if not blocks:
        return ""
    note = prose("The prompt is bold; the rest is the model's.") if any("<b></b>" not in b for b in blocks) else ""
    return note + "".join(blocks)


def _events(run: Run) -> str:
    if not run.events and not run.unreadable_lines:
        return prose("None: no step was skipped, nothing was rewound or resumed.")
    rows = [
        f"<tr><td>{escape(str(event.get('step', '')))}</td><td>{escape(str(event.get('name', '')))}</td>"
        f"<td>{escape(str(event.get('message', '')))}</td></tr>"
        for event in run.events[:EVENTS_SHOWN]
    ]
    head = "<thead><tr><th>step</th><th>event</th><th>what happened</th></tr></thead>"
    table = f'<div class="scroll"><table class="events">{head}<tbody>{"".join(rows)}</tbody></table></div>'
    notes = []
    if len(run.events) > EVENTS_SHOWN:
        notes.append(f"{len(run.events) - EVENTS_SHOWN:,} further events are in metrics.jsonl.")
    if run.unreadable_lines:
        notes.append(f"{run.unreadable_lines:,} unreadable lines of metrics.jsonl (cut off by a kill) are left out.")
    return (table if rows else "") + (prose(" ".join(notes)) if notes else "")


def _table(values: Mapping[str, Any] | None) -> str:
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>' for name, text in _flat(values or {}, "")
    ]
    return f'<table class="facts">{"".join(rows)}</table>' if rows else ""


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flat(value, f"{name}, ")
        elif isinstance(value, list):
            rows.append((name, ", ".join(map(_text, value)) or "none"))
        else:
            rows.append((name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def _config(run: Run) -> str:
    return f"<pre>{escape(tomli_w.dumps(run.config))}</pre>" if run.config else ""


def section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def prose(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def figure(picture: curves.Picture) -> str:
    keys = [f'<span><i style="background: var(--{ink})"></i>{escape(label)}</span>' for ink, label in picture.legend]
    legend = f"<figcaption>{''.join(keys)}</figcaption>" if keys else ""
    return f"<figure><h3>{escape(picture.title)}</h3>{picture.svg}{legend}</figure>"


def _pair(figures: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(figures)}</div>' if figures else ""
