"""The benchmarks' harness: providers take turns, and nothing is timed behind a red gate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import Row, gate, interleave, markdown, ratio, write

ROOT = Path(__file__).resolve().parents[1]


def test_providers_take_turns():
    calls: list[str] = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=20)
    assert {name: len(found) for name, found in times.items()} == {"a": 20, "b": 20}
    rounds = [tuple(calls[i : i + 2]) for i in range(0, 40, 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_a_wrong_provider_is_not_timed():
    right = torch.tensor([1.0, 2.0])
    gate({"peer": right, "ours": right * (1 + 1e-7)}, "peer", 1e-5)
    with pytest.raises(AssertionError, match="ours: differs from peer"):
        gate({"peer": right, "ours": right * 1.001}, "peer", 1e-5)
    with pytest.raises(AssertionError, match="ours: differs from peer"):
        gate({"peer": right, "ours": right * float("nan")}, "peer", 1e-5)


def test_results_hold_medians_and_the_command(tmp_path):
    row = Row("op", "ours", "full", "N", "rows", 8, [1.0, 2.0, 9.0], work=4e6, limit=8e9)
    assert row.median == 2.0
    assert row.to_dict()["share_of_limit"] == pytest.approx(0.25)
    assert ratio({"peer": [4.0, 4.0, 100.0], "ours": row.milliseconds}, "peer", "ours") == 2.0
    write(tmp_path / "result", [row], markdown([row], [("op", 2.0)]))
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["command"].startswith("python ")
    assert saved["rows"][0]["y_value_50"] == 2.0
    assert "| op | 2.00 |" in (tmp_path / "result.md").read_text()


def test_gpu_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: make gpu would run")
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "benchmarks" / "gpu.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stderr
