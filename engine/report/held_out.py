"""Sections of a report: how well a masked model finds hidden tokens, and what a run forgets of general text."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

ROWS = 20
"""Evaluations that a table shows, evenly drawn."""


def masked(summary: Mapping[str, Any]) -> str:
    evaluation = summary["evaluation"] or {}
    if evaluation.get("pseudo_perplexity") is None:
        return ""
    rate = summary["config"].get("masking", {}).get("rate")
    hidden = "of" if rate is None else f"with {rate:.0%} of it hidden, of"
    return (
        f'<p class="verdict">The model finds {evaluation["accuracy"]:.1%} of the hidden tokens of held-out text; its '
        f"pseudo-perplexity is {evaluation['pseudo_perplexity']:.2f}.</p>"
        f"<p>Measured on {int(evaluation['bytes']):,} bytes of text, {hidden} which {int(evaluation['tokens']):,} "
        "tokens were scored; the noise is the same in every evaluation. The perplexity is of tokens behind [MASK] "
        "alone, the accuracy of all that were hidden. <code>hotloop eval RUN --exact</code> masks one token at a "
        "time.</p>"
    )


def forgetting(summary: Mapping[str, Any]) -> str:
    found = summary["forgetting"]
    if not found:
        return ""
    before, after, difference = found["before"], found["after"], found["difference"]
    if difference is None:
        verdict = f"Loss on held-out general text: {after:.3f} nats per token; it was not measured before the run."
    else:
        verb = "rose" if difference > 0 else "fell"
        verdict = (
            f"The loss on held-out general text {verb} from {before:.3f} nats per token before the run to {after:.3f}: "
            f"{difference:+.3f}."
        )
    every = -(-len(found["steps"]) // ROWS)
    points = list(zip(found["steps"], found["losses"], strict=True))
    points = sorted({*points[::every], points[-1]})
    rows = "".join(f'<tr><th scope="row">{step:,}</th><td>{loss:.4f}</td></tr>' for step, loss in points)
    head = "<thead><tr><th>step</th><th>loss on general text</th></tr></thead>"
    return f'<p class="verdict">{escape(verdict)}</p><table class="numbers">{head}<tbody>{rows}</tbody></table>'
