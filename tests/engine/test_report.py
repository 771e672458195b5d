"""The report of a run: its numbers, its page, and runs that lack something."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from hotloop.engine.config import OptimizerConfig, Recipe, TrainConfig
from hotloop.engine.recipe import to_toml
from hotloop.engine.report import write_report
from hotloop.engine.report.curves import running_mean, short, thinned
from hotloop.engine.report.page import duration
from hotloop.engine.report.summary import read_run, summarize, time_split, verdict

VOID = {"meta", "br", "img", "link", "input", "hr"}


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "loss": 2.0 + 6.0 * math.exp(-step / 20), "loss_z": 0.1,
        "grad_norm": 1.0 + 1 / step, "lr": 1e-3, "ms": 100.0, "tokens": 1000, "supervised": 990,
        "tokens_per_second": 1e4, "supervised_per_second": 9.9e3, "padding_share": 0.01, "mfu": 0.5,
        "memory_mb": 500.0 + step, "data_wait_ms": 5.0, "forward_backward_ms": 70.0, "optimizer_ms": 15.0, "skipped": 0,
        "seconds": 0.1 * step, **changes,
    }  # fmt: skip


def eval_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "eval",
        "step": step,
        "loss": 2.5,
        "bits_per_byte": 2.2,
        "tokens": 400,
        "bytes": 1200,
        "seconds": 0.5,
    }
    return {**line, **changes}


def event_line(step: int, name: str, message: str) -> dict[str, Any]:
    return {"kind": "event", "step": step, "name": name, "message": message}


def write_run(folder: Path, lines: list[dict[str, Any]], steps: int | None = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if steps is not None:
        recipe = Recipe(train=TrainConfig(steps=steps), optimizer=OptimizerConfig(max_grad_norm=1.5))
        (folder / "config.toml").write_text(to_toml(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def whole_run(folder: Path) -> Path:
    lines: list[dict[str, Any]] = []
    for step in range(1, 101):
        lines.append(train_line(step))
        if step % 25 == 0:
            lines.append(eval_line(step, loss=4.0 - step / 50, bits_per_byte=3.0 - step / 100))
    lines.append(event_line(60, "skip", "loss is not finite"))
    return write_run(folder, lines)


EXTRA = {
    "samples": [
        {"prompt": "def f(", "text": "x):\n    return '<script>alert(1)</script> & more'"},
        "plain <i>text</i>",
    ],
    "evaluation": {"loss": 2.4, "bits_per_byte": 2.05, "perplexity": 11.0, "tokens": 44_000, "bytes": 128_123},
    "baseline": {2: 2.7, 3: 2.07, 4: 1.95, 6: 1.9},
    "timings": {"prepare": 12.0, "train": 75.0, "step": {"checkpoint_stall": 0.25}},
    "environment": {"torch": "2.13.0", "threads": 2, "backends": {"attention": "torch"}, "devices": []},
    "corpus": {"documents": 1234, "source": "<stdlib>"},
    "model": {"parameters": 5_000_000},
}


class Page(HTMLParser):
    """Checks that elements nest, and collects tags, attributes and visible text."""

    def __init__(self, html: str):
        super().__init__()
        self.stack: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.stack:
            self.text += data


def strict_json(path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_whole_run(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / "demo")
    returned = write_report(folder, EXTRA)
    report = strict_json(folder / "report.json")
    assert report == returned
    assert report["bits_per_byte"] == 2.05
    assert report["kneser_ney_bits_per_byte"] == {"2": 2.7, "3": 2.07, "4": 1.95, "6": 1.9}
    assert (report["kneser_ney_beaten"], report["kneser_ney_not_beaten"]) == ([2, 3], [4, 6])
    assert report["complete"]
    assert report["steps"] == report["planned_steps"] == 100
    assert report["tokens"] == 100_000
    assert report["supervised_tokens"] == 99_000
    assert report["best_evaluation"] == {"step": 100.0, "loss": 2.0, "bits_per_byte": 2.0}
    assert report["events"] == {"skip": 1}
    assert report["peak_memory_mb"] == 600.0
    assert report["train_loss"] == pytest.approx(2.0 + 6 * sum(math.exp(-s / 20) for s in range(96, 101)) / 5)
    assert report["config"]["optimizer"]["max_grad_norm"] == 1.5

    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags["svg"] == 5
    assert "beats the Kneser\u2011Ney models fitted on the same documents with 2 and 3 bytes of context" in page.text
    assert "does not beat those with 4 and 6 bytes of context (1.950, 1.900)" in page.text
    for shown in (
        "128,123 bytes",
        "checkpoint stall",
        "max_grad_norm = 1.5",
        "loss is not finite",
        "5,000,000",
        "<stdlib>",
    ):
        assert shown in page.text, shown
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "report.html",
        "report.json",
    ]


def test_page_is_self_contained_and_safe(tmp_path: Path) -> None:
    folder = whole_run(tmp_path / 'a"><script>b')
    write_report(folder, EXTRA)
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "i-text"} & page.tags.keys()
    assert "<script>alert(1)</script>" in page.text  # as text
    assert "plain <i>text</i>" in page.text
    outside = [(tag, name, value) for tag, name, value in page.attributes if name in ("href", "src", "xlink:href")]
    assert outside
    assert all(value.startswith("#") for _, _, value in outside)
    assert "http" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, _, value in outside} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert targets <= set(ids)
    # Every colour of the pictures comes from the style sheet, so that dark pages stay readable.
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.findall(r"#[0-9a-f]{6}\b", svgs)
    assert set(re.findall(r"var\((--\w+)\)", html)) <= set(re.findall(r"(--\w+):", html))


@pytest.mark.parametrize(
    ("lines", "steps", "shown"),
    [
        ([train_line(s) for s in range(1, 41)], 100, "40 of 100 steps in 4 s, stopped before its planned end"),
        ([train_line(1), event_line(1, "ended", "SIGTERM")], 100, "stopped before its planned end (SIGTERM)"),
        ([train_line(s) for s in range(1, 41)], None, "40 steps in 4 s"),
        ([train_line(1)], 1, "1 of 1 steps"),
        ([train_line(1, loss=None, grad_norm=None, mfu=None)], 1, "1 of 1 steps"),
        ([train_line(s, loss=math.nan, grad_norm=math.inf) for s in (1, 2)], 2, "2 of 2 steps"),
        ([], 100, "The run has no finished step."),
        ([{"kind": "train", "step": 1}, {"kind": "train", "step": 2}], 2, "2 of 2 steps"),
        ([train_line(1), eval_line(1)], 1, "last evaluation during the run"),
        ([event_line(0, "resume", "<b>")], 5, "<b>"),
    ],
    ids=[
        "interrupted",
        "signal",
        "no config",
        "one step",
        "nulls",
        "not finite",
        "no metrics",
        "bare lines",
        "one eval",
        "event",
    ],
)
def test_partial_runs(tmp_path: Path, lines: list[dict[str, Any]], steps: int | None, shown: str) -> None:
    folder = write_run(tmp_path / "run", lines, steps)
    write_report(folder)
    report = strict_json(folder / "report.json")
    assert report["kneser_ney_bits_per_byte"] is None
    assert report["bits_per_byte"] == (2.2 if any(line["kind"] == "eval" for line in lines) else None)
    assert shown in Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_baseline_without_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_line(1)])
    report = write_report(folder, {"baseline": {3: 2.07}, "evaluation": None})
    assert report["kneser_ney_bits_per_byte"] == {"3": 2.07}
    assert report["kneser_ney_beaten"] is None
    assert "no evaluation to compare" in Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_config_alone_and_no_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    assert write_report(folder)["steps"] == 0
    with pytest.raises(FileNotFoundError, match=r"neither config\.toml nor metrics\.jsonl"):
        write_report(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"unknown keys smaples.*allowed: samples, evaluation"):
        write_report(folder, {"smaples": []})


def test_samples_file_is_used_without_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_line(1)])
    (folder / "samples.txt").write_text("once & twice", encoding="utf-8")
    assert write_report(folder)["samples"] == ["once & twice"]
    assert "once & twice" in Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_resumed_run_counts_each_step_once(tmp_path: Path) -> None:
    """Killed at 30 after the checkpoint of 20, resumed, and interrupted before it was back at 30."""
    lines: list[dict[str, Any]] = []
    for step in range(1, 31):
        lines += [train_line(step, loss=1.0)] + ([eval_line(step, loss=9.0)] if step % 5 == 0 else [])
    lines.append(event_line(20, "resume", "from checkpoints/step-00000020"))
    lines += [train_line(step, loss=3.0) for step in range(21, 27)] + [eval_line(25, loss=8.0)]
    run = read_run(write_run(tmp_path / "run", lines))
    assert run.train["step"].tolist() == list(range(1, 27))
    assert run.train["loss"].tolist() == [1.0] * 20 + [3.0] * 6
    assert run.evaluations["step"].tolist() == [5, 10, 15, 20, 25]
    assert run.evaluations["loss"].tolist() == [9.0] * 4 + [8.0]
    assert summarize(run)["tokens"] == 26_000
    assert [event["name"] for event in run.events] == ["resume"]


def test_unreadable_lines_are_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_line(1), train_line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('[1]\n{"kind": "train", "step": 3, "lo')
    report = write_report(folder)
    assert (report["steps"], report["unreadable_metric_lines"]) == (2, 2)
    assert "2 unreadable lines" in Page((folder / "report.html").read_text(encoding="utf-8")).text


def test_time_split_adds_up(tmp_path: Path) -> None:
    lines = [train_line(step, seconds=0.12 * step) for step in range(1, 101)] + [eval_line(50), eval_line(100)]
    run = read_run(write_run(tmp_path / "run", lines))
    split = time_split(run, {"step": {"checkpoint_stall": 0.25}})
    expected = {
        "data wait": 0.5, "forward and backward": 7.0, "optimizer": 1.5, "evaluation": 1.0, "checkpoint stall": 0.25
    }  # fmt: skip
    assert {name: split[name] for name in expected} == pytest.approx(expected)
    assert sum(split.values()) == pytest.approx(run.seconds) == pytest.approx(12.0)
    assert next(iter(split)) == "data wait"
    assert list(split)[-1] == "other"


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (1.5, "beats every Kneser-Ney model fitted on the same documents, those with 2 and 3 bytes of context (2.7"),
        (2.07, "with 2 bytes of context (2.700), and does not beat those with 3 bytes of context (2.070)."),  # a tie
        (3.0, "does not beat any Kneser-Ney model fitted on the same documents, 2 and 3 bytes of context (2.700, 2"),
    ],
)
def test_verdict(tmp_path: Path, bits: float, words: str) -> None:
    run = read_run(write_run(tmp_path / "run", [train_line(1)]))
    summary = summarize(run, {"evaluation": {"bits_per_byte": bits}, "baseline": {3: 2.07, 2: 2.7}})
    assert words in (verdict(summary) or "")


def test_long_run_stays_small_and_fast(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [train_line(step) for step in range(1, 40_001)], 40_000)
    begin = time.perf_counter()
    write_report(folder, EXTRA)
    assert time.perf_counter() - begin < 10
    assert (folder / "report.html").stat().st_size < 600_000


def test_thinned_keeps_every_spike() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(100_003.0), rng.normal(size=100_003)
    y[[5, 54_321, 100_002]] = 50.0, -50.0, 70.0
    y[1000:3000] = np.nan
    fewer_x, fewer_y = thinned(x, y)
    assert len(fewer_x) < 1300
    assert (np.diff(fewer_x) >= 0).all()
    assert {50.0, -50.0, 70.0} <= set(fewer_y.tolist())
    assert np.isnan(fewer_y).any()  # the gap stays a gap
    np.testing.assert_array_equal(y[fewer_x.astype(int)], fewer_y)


def test_running_mean() -> None:
    values = np.random.default_rng(1).normal(size=300)
    values[[0, 40, 41]] = np.nan
    mean, window = running_mean(values)
    assert window == 7
    naive = [np.nanmean(values[max(i - 3, 0) : i + 4]) for i in range(300)]
    np.testing.assert_allclose(mean, naive, rtol=1e-9)
    assert running_mean(values[:20])[1] == 1


def test_formats() -> None:
    texts = [duration(s) for s in (0.0123, 3.456, 59.9, 231.4, 3599.9, 7320)]
    assert texts == ["0.0123 s", "3.46 s", "59.9 s", "3 min 51 s", "1 h 0 min", "2 h 2 min"]
    assert [short(x) for x in (0.5, 999, 20_488, 4.1e6, 2e9)] == ["0.5", "999", "20.5k", "4.1M", "2G"]


def test_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(whole_run(tmp_path / "run"))
    assert dict(matplotlib.rcParams) == before
    code = """if True:
        import sys
        from hotloop.engine.report import write_report
        write_report(sys.argv[1])
        sys.exit("matplotlib.pyplot" in sys.modules)
    """
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], check=True, cwd=tmp_path)
