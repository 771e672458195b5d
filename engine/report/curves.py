"""The pictures of a report: matplotlib figures as SVG text that takes its colours and fonts from the page.

Figures are made of objects, without pyplot's global state. Text stays text, and each colour of INKS becomes a variable
of the page's style sheet, so that one picture serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from hotloop.engine.report.summary import Column, Run

INKS = {
    "ink": "#1c2024", "muted": "#60646c", "rule": "#d9dbe0", "faint": "#a9bfe8", "model": "#1f4fb8", "held": "#c2410c",
    "part1": "#8b5cf6", "part2": "#1f4fb9", "part3": "#0f9d8a", "part4": "#d97706", "part5": "#be3a6b",
    "part6": "#84a317", "part7": "#9aa0aa", "count": "#b4b9c3",
}  # fmt: skip
"""Style-sheet variable -> the colour it has on a light page; every colour stands for one variable."""

PARTS = [f"part{i}" for i in range(1, 8)]
POINTS = 1200
"""Points of a line beyond which stretches of it are drawn as their lowest and highest point."""
STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "hotloop", "font.size": 10.0, "axes.linewidth": 0.8,
    "axes.edgecolor": INKS["rule"], "axes.labelcolor": INKS["muted"], "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": INKS["rule"], "grid.linewidth": 0.6, "text.color": INKS["ink"], "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"], "xtick.major.size": 3.0, "ytick.major.size": 0.0, "lines.solid_joinstyle": "round",
}  # fmt: skip

WIDE, NARROW = (7.0, 2.9), (4.5, 2.35)


@dataclass(frozen=True)
class Picture:
    """A picture without its words: title and legend belong to the page, where they wrap on a phone."""

    title: str
    svg: str
    legend: tuple[tuple[str, str], ...] = ()
    """(style-sheet variable, what is drawn in that colour)"""


def loss_curve(run: Run) -> Picture:
    """Loss of every step, its running mean, and the held-out evaluations."""
    step, loss, held = run.train["step"], run.train["loss"], run.evaluations
    mean, window = running_mean(loss)
    skipped = step[run.train["skipped"] > 0]
    legend = [("faint", "training, every step")]
    if window > 1:
        legend.append(("model", f"training, mean of {window} steps"))
    if "loss" in held:
        legend.append(("held", "held out"))
    if "general_loss" in held:
        legend.append(("part3", "general text, held out"))
    if len(skipped):
        legend.append(("held", "skipped step (tick at the bottom)"))

    def draw(axes: Axes) -> None:
        axes.plot(*thinned(step, loss), color=INKS["faint"], linewidth=0.8)
        if window > 1:
            axes.plot(*thinned(step, mean), color=INKS["model"], linewidth=1.6)
        if "loss" in held:
            marker = "o" if len(held) <= 60 else ""
            axes.plot(held["step"], held["loss"], marker, ls="-", color=INKS["held"], lw=1.2, ms=4.0, mew=0.0)
        if "general_loss" in held:
            axes.plot(held["step"], held["general_loss"], "o", ls="--", color=INKS["part3"], lw=1.2, ms=4.0, mew=0.0)
        axes.set_ylim(*robust_limits(loss, np.concatenate([held["loss"], held["general_loss"]])))
        low = np.full(len(skipped), axes.get_ylim()[0])
        axes.plot(skipped, low, "|", color=INKS["held"], markersize=9.0, clip_on=False)

    return Picture(f"Loss, nats per {unit(run)}", _over_steps("loss", draw, WIDE), tuple(legend))


def unit(run: Run) -> str:
    """What a loss is the mean over."""
    return "text" if run.config.get("objective") == "classification" else "token"


def learning_rate_curve(run: Run) -> Picture:
    def draw(axes: Axes) -> None:
        axes.plot(*thinned(run.train["step"], run.train["lr"]), color=INKS["model"], linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}".replace("e-0", "e-")))

    return Picture("Learning rate", _over_steps("learning-rate", draw, NARROW))


def grad_norm_curve(run: Run) -> Picture:
    """Gradient norm before clipping, logarithmic, with the clipping threshold."""
    norm = run.train["grad_norm"]
    norm[~(norm > 0)] = np.nan
    limit = run.config.get("optimizer", {}).get("max_grad_norm")
    limits = [limit] if isinstance(limit, int | float) else []  # "none" is no clipping
    low, high = min([np.nanmin(norm), *limits]) / 1.3, max([np.nanmax(norm), *limits]) * 1.3

    def draw(axes: Axes) -> None:
        axes.plot(*thinned(run.train["step"], norm), color=INKS["model"], linewidth=0.9)
        for value in limits:
            axes.axhline(value, color=INKS["held"], linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        if high / low < 100:  # powers of ten alone would leave the axis nearly bare
            ticks = [digit * 10.0**power for power in range(-9, 10) for digit in (1, 2, 5)]
            axes.set_yticks([tick for tick in ticks if low <= tick <= high])

    return Picture(
        "Gradient norm before clipping",
        _over_steps("grad-norm", draw, NARROW),
        tuple(("held", f"clipped to {x:g}") for x in limits),
    )


def throughput_curve(run: Run) -> Picture:
    """Tokens per second, all and supervised, as running means."""
    lines = (("tokens_per_second", "all tokens", "model"), ("supervised_per_second", "supervised", "part3"))
    drawn = [line for line in lines if line[0] in run.train]

    def draw(axes: Axes) -> None:
        for name, _, ink in drawn:
            speed, _ = running_mean(run.train[name])
            axes.plot(*thinned(run.train["step"], speed), color=INKS[ink], linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return Picture(
        "Tokens per second", _over_steps("throughput", draw, NARROW), tuple((ink, label) for _, label, ink in drawn)
    )


def memory_curve(run: Run) -> Picture:
    def draw(axes: Axes) -> None:
        axes.plot(*thinned(run.train["step"], run.train["memory_mb"]), color=INKS["model"], linewidth=1.4)
        axes.set_ylim(bottom=0, top=1.15 * float(np.nanmax(run.train["memory_mb"])))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    return Picture("Peak memory, MB", _over_steps("memory", draw, NARROW))


def part_inks(n: int) -> list[str]:
    """Style-sheet variables for n parts, the last of them the neutral one."""
    return [*(PARTS[i % (len(PARTS) - 1)] for i in range(n - 1)), PARTS[-1]]


def running_mean(values: Column) -> tuple[Column, int]:
    """(n,) -> the mean over a window around each value that leaves out NaN, and the window: a fiftieth of them."""
    window = len(values) // 50 | 1
    if window <= 1:
        return values, 1
    finite = np.isfinite(values)
    sums, counts = (
        np.concatenate(([0.0], np.cumsum(x, dtype=np.float64))) for x in (np.where(finite, values, 0.0), finite)
    )
    at = np.arange(len(values))
    low, high = np.maximum(at - window // 2, 0), np.minimum(at + window // 2 + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low]), window


def thinned(x: Column, y: Column) -> tuple[Column, Column]:
    """At most about POINTS points: of every stretch the lowest and the highest value, in their order."""
    if len(x) <= POINTS:
        return x, y
    stretch = -(-len(x) // (POINTS // 2))
    rows = -(-len(x) // stretch)
    padded = np.full((rows, stretch), np.nan)
    padded.reshape(-1)[: len(y)] = y
    low, high = np.where(np.isnan(padded), np.inf, padded), np.where(np.isnan(padded), -np.inf, padded)
    pair = np.sort(np.stack((low.argmin(1), high.argmax(1)), axis=1), axis=1)
    at = np.minimum((np.arange(rows)[:, None] * stretch + pair).reshape(-1), len(x) - 1)
    return x[at], y[at]


def robust_limits(*columns: Column) -> tuple[float, float]:
    """Limits of an axis that a few spikes do not stretch."""
    values = np.concatenate(columns)
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    low, usual, high = values.min(), np.quantile(values, 0.995), values.max()
    high = min(high, usual + 0.25 * (usual - low) + 1e-3)
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, high + margin


def short(value: float) -> str:
    """1500000 -> 1.5M"""
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{suffix}"
    return f"{value:.3g}"


def _over_steps(name: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    def with_steps(axes: Axes) -> None:
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.margins(x=0.01)

    return drawing(name, with_steps, size)


def drawing(name: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """An svg element; `name` sets its ids apart from those of the page's other pictures."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(out.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """The svg element alone, with the page's colours and fonts, and names that no other picture of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*|<style.*?</style>\s*", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r' (width|height|version|xmlns|xmlns:xlink)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font-(family|size): [^;\"]*; ?", "", svg)
    for ink, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{ink})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name.replace("-", " ")}"', 1).strip()
