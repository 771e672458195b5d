"""The pictures of a report: matplotlib figures as SVG text that takes its colours and fonts from the page.

Figures are made of objects, without pyplot's global state. Text stays text, and each colour of INKS becomes a variable
of the page's style sheet, so that one picture serves light, dark and print.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hotloop.engine.report.summary import Column, Run

INKS = {
    "ink": "#1c2024", "muted": "#60646c", "rule": "#d9dbe0", "faint": "#a9bfe8", "model": "#1f4fb8", "held": "#c2410c",
    "part1": "#8b5cf6", "part2": "#1f4fb9", "part3": "#0f9d8a", "part4": "#d97706", "part5": "#be3a6b",
    "part6": "#84a317", "part7": "#9aa0aa", "count": "#b4b9c3",
}  # fmt: skip
"""Style-sheet variable -> the colour it has on a light page; every colour stands for one variable."""

PARTS = [f"part{i}" for i in range(1, 8)]
POINTS = 1500
"""Points of a line beyond which stretches of it are drawn as their lowest and highest point."""
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "hotloop", "font.size": 10.0, "axes.linewidth": 0.8,
    "axes.edgecolor": INKS["rule"], "axes.labelcolor": INKS["muted"], "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "grid.color": INKS["rule"], "grid.linewidth": 0.6, "text.color": INKS["ink"], "xtick.color": INKS["muted"],
    "ytick.color": INKS["muted"], "xtick.major.size": 3.0, "ytick.major.size": 0.0, "legend.frameon": False,
    "legend.handlelength": 1.4, "lines.solid_joinstyle": "round",
}  # fmt: skip

WIDE, NARROW = (7.0, 2.9), (4.5, 2.35)


def loss_curve(run: Run) -> str:
    """Loss of every step, its running mean, and the held-out evaluations."""

    def draw(axes: Axes) -> None:
        step, loss = run.train["step"], run.train["loss"]
        axes.plot(*thinned(step, loss), color=INKS["faint"], linewidth=0.8, label="training, every step")
        mean, window = running_mean(loss)
        if window > 1:
            label = f"training, mean of {window} steps"
            axes.plot(*thinned(step, mean), color=INKS["model"], linewidth=1.6, label=label)
        held = run.evaluations
        if "loss" in held:
            marks = {"marker": "o", "markersize": 4.0, "markeredgewidth": 0.0} if len(held) <= 60 else {}
            axes.plot(held["step"], held["loss"], color=INKS["held"], linewidth=1.2, label="held out", **marks)
        axes.set_ylim(*robust_limits(loss, held["loss"]))
        skipped = step[run.train["skipped"] > 0]
        if len(skipped):
            low = axes.get_ylim()[0]
            spot = {"marker": "|", "markersize": 9.0, "linestyle": "none", "clip_on": False}
            axes.plot(skipped, np.full(len(skipped), low), color=INKS["held"], label="skipped", **spot)
        axes.set_ylabel("nats per token")
        axes.legend(loc="upper right")

    return _over_steps("loss", draw, WIDE)


def learning_rate_curve(run: Run) -> str:
    def draw(axes: Axes) -> None:
        axes.plot(*thinned(run.train["step"], run.train["lr"]), color=INKS["model"], linewidth=1.6)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("learning rate")
        axes.ticklabel_format(axis="y", scilimits=(-2, 3), useMathText=False)

    return _over_steps("learning-rate", draw, NARROW)


def grad_norm_curve(run: Run) -> str:
    """Gradient norm before clipping, logarithmic, with the clipping threshold."""
    limit = run.config.get("optimizer", {}).get("max_grad_norm")

    def draw(axes: Axes) -> None:
        norm = run.train["grad_norm"]
        norm[~(norm > 0)] = np.nan
        axes.plot(*thinned(run.train["step"], norm), color=INKS["model"], linewidth=0.9)
        if limit is not None:
            axes.axhline(limit, color=INKS["held"], linewidth=1.0, linestyle=(0, (4, 3)))
            spot = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points", "ha": "right"}
            axes.annotate(f"clipped above {limit:g}", (1.0, limit), (0, 3), color=INKS["held"], **spot)
        axes.set_yscale("log")
        low, high = np.nanmin([np.nanmin(norm), limit or np.inf]), np.nanmax([np.nanmax(norm), limit or 0])
        axes.set_ylim(low / 1.3, high * 1.5)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        axes.tick_params(which="minor", length=0)
        if high / low < 30:  # less than a decade and a half: powers of ten alone would leave the axis bare
            ticks = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
            axes.set_yticks([tick for tick in ticks if low / 1.3 <= tick <= high * 1.5])
        axes.set_ylabel("gradient norm")

    return _over_steps("grad-norm", draw, NARROW)


def throughput_curve(run: Run) -> str:
    """Tokens per second of every step (all and supervised), running means."""

    def draw(axes: Axes) -> None:
        for name, label, ink in (
            ("tokens_per_second", "all tokens", "model"),
            ("supervised_per_second", "supervised", "part3"),
        ):
            if name in run.train:
                speed = running_mean(run.train[name])[0]
                axes.plot(*thinned(run.train["step"], speed), color=INKS[ink], linewidth=1.4, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("tokens per second")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axes.legend(loc="lower right")

    return _over_steps("throughput", draw, NARROW)


def memory_curve(run: Run) -> str:
    def draw(axes: Axes) -> None:
        axes.plot(*thinned(run.train["step"], run.train["memory_mb"]), color=INKS["model"], linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("memory, MB")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return _over_steps("memory", draw, NARROW)


def time_bar(split: Mapping[str, float]) -> str:
    """One bar of all the seconds; the page's table beside it names the colours."""

    def draw(axes: Axes) -> None:
        total, left = sum(split.values()), 0.0
        for ink, seconds in zip(part_inks(len(split)), split.values(), strict=True):
            axes.barh(0, seconds / total, left=left, color=INKS[ink], height=1.0, linewidth=0)
            left += seconds / total
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, 0.5)
        axes.set_axis_off()

    return _svg("time", draw, (7.0, 0.36))


def bits_bars(bits: float | None, baseline: Mapping[int, float]) -> str:
    """Bits per byte of counting models by context length, and of the model, with a line down from the model's."""

    def draw(axes: Axes) -> None:
        rows = [(f"{context} bytes of context", value, "count") for context, value in baseline.items()]
        if bits is not None:
            rows.append(("this model", bits, "model"))
        for y, (_, value, ink) in enumerate(rows):
            axes.barh(y, value, color=INKS[ink], height=0.62, linewidth=0)
            bold = "bold" if ink == "model" else "normal"
            axes.annotate(f"{value:.3f}", (value, y), (5, 0), textcoords="offset points", va="center", fontweight=bold)
        if bits is not None:
            axes.axvline(bits, color=INKS["model"], linewidth=0.9, linestyle=(0, (3, 3)), zorder=3)
        axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
        axes.tick_params(axis="y", labelcolor=INKS["ink"])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.16 * max(value for _, value, _ in rows))
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(False)

    return _svg("bits-per-byte", draw, (7.0, 0.34 * (len(baseline) + 1) + 0.15))


def part_inks(n: int) -> list[str]:
    """Style-sheet variables for n parts, the last of them the neutral one."""
    return [*(PARTS[i % (len(PARTS) - 1)] for i in range(n - 1)), PARTS[-1]]


def running_mean(values: Column) -> tuple[Column, int]:
    """(n,) -> the mean over a window around each value that leaves out NaN, and the window: a fiftieth of them."""
    window = len(values) // 50 * 2 // 2 | 1
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
    padded = np.full(rows * stretch, np.nan)
    padded[: len(y)] = y
    padded = padded.reshape(rows, stretch)
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

    return _svg(name, with_steps, size)


def _svg(name: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(out.getvalue(), name)


def _for_page(svg: str, name: str) -> str:
    """The svg element alone, with the page's colours and fonts, and names that no other picture of the page has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"|(<svg[^>]*?) height="[^"]*"', r"\1\2", svg, count=1)
    svg = re.sub(r' width="[^"]*pt"| xmlns:xlink="[^"]*"| xmlns="[^"]*"', "", svg, count=3)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"font-family: [^;\"]*;?|font-size: [^;\"]*;?", "", svg)
    svg = re.sub(r"font: (bold )?[0-9.]+px [^;\"]*", lambda bold: "font-weight: bold" if bold[1] else "", svg)
    for ink, colour in INKS.items():
        svg = svg.replace(colour, f"var(--{ink})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{name.replace("-", " ")}"', 1).strip()
