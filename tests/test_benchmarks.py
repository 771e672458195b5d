"""The benchmarks' harness: providers take turns, nothing is timed behind a red gate, and what is written adds up."""

from __future__ import annotations

import csv
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench_attention
import bench_cross_entropy
import bench_optimizers
import bench_train_step
import pytest
import suite
import torch

from harness.case import Case, Provider, Verdict, agrees_with, distance, no_worse_than, simple
from harness.measure import MOST, Measured, checked, interleave, measure, peak_memory_mb, percentile, ratio
from harness.table import LIGER_COLUMNS, markdown, rows, write, write_csv

ROOT = Path(__file__).resolve().parents[1]


def case_of(**calls) -> Case:
    """Providers that double a vector; calls: name -> what it returns instead."""
    x = torch.arange(1.0, 9.0)

    def providers():
        return {name: simple(lambda call=call: (call(x),)) for name, call in calls.items()}

    return Case(
        "double", "forward", ("N", "elements", 8), {"dtype": "float32"}, providers,
        agrees_with("peer", 1e-6), work=64, unit="B", dtype=torch.float32,
    )  # fmt: skip


# --- turns ---


def recorder(calls: list[str], name: str) -> Provider:
    return Provider(lambda: calls.append(name), tuple, lambda: calls.append(f"prepare {name}"))


def test_providers_take_turns():
    calls: list[str] = []
    times = interleave({name: recorder(calls, name) for name in "ab"}, rounds=20)
    assert {name: len(found) for name, found in times.items()} == {"a": 20, "b": 20}
    assert all(calls[i] == f"prepare {calls[i + 1]}" for i in range(0, 80, 2))
    runs = calls[1::2]
    assert {tuple(runs[i : i + 2]) for i in range(0, 40, 2)} == {("a", "b"), ("b", "a")}


def test_a_wide_ratio_is_measured_longer(monkeypatch):
    def clock(durations):
        found = iter(durations)
        monkeypatch.setattr("harness.measure.timed", lambda provider: next(found))

    both = {"a": Provider(list, tuple), "b": Provider(list, tuple)}
    clock([1.0] * 100)
    assert len(interleave(both, 5, [("a", "b")])["a"]) == 5
    clock([1.0, 1.0, 1.0, 9.0] * 100)
    assert len(interleave(both, 5, [("a", "b")])["a"]) == 5 * MOST


def test_preparing_is_not_timed():
    slow = Provider(lambda: None, tuple, lambda: sum(range(2_000_000)))
    (took,) = interleave({"slow": slow}, 1)["slow"]
    assert took < 2.0


def test_ratio_and_percentiles():
    found = ratio({"peer": [4.0, 4.0, 100.0], "ours": [1.0, 2.0, 9.0]}, "ours", "peer")
    assert found.value == 2.0
    assert (found.low, found.high) == pytest.approx((percentile([4.0, 2.0, 100 / 9], 0.2), 4.0 + 0.6 * (100 / 9 - 4.0)))
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([5.0], 0.2) == 5.0


# --- the gate ---


def test_a_wrong_provider_is_neither_timed_nor_reported(tmp_path):
    case = case_of(hotloop=lambda x: 2.0001 * x, peer=lambda x: 2 * x, other=lambda x: x + x)
    found = measure(case, rounds=2)
    assert list(found.times) == ["peer", "other"]
    assert list(found.refused) == ["hotloop"]
    assert found.ours_refused
    assert found.ratios == []
    assert {row["kernel_provider"] for row in rows([found])} == {"peer", "other"}
    assert "not reported: hotloop of double-forward-N=8-dtype=float32" in markdown([found])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_that_are_not_finite_are_wrong(value):
    passed, verdicts = checked(case_of(hotloop=lambda x: torch.full_like(x, value), peer=lambda x: 2 * x))
    assert list(passed) == ["peer"]
    assert verdicts["hotloop"].error == float("inf")


def test_no_worse_than_the_peer():
    truth = torch.linspace(1.0, 2.0, 100, dtype=torch.float64)

    def off(by: float) -> tuple[torch.Tensor]:
        return (truth * (1 + by),)

    gate = no_worse_than("peer", lambda: (truth,), torch.float32)
    verdicts = gate({"peer": off(1e-4), "near": off(-1.9e-4), "far": off(2.1e-4)})
    assert [name for name, verdict in verdicts.items() if verdict.passed] == ["peer", "near"]
    assert gate({"peer": off(0.0), "near": off(1e-7), "far": off(2e-7)})["near"].passed
    assert not gate({"peer": off(0.0), "near": off(1e-7), "far": off(2e-7)})["far"].passed


def test_the_worst_of_several_results_counts():
    right, wrong = torch.ones(3), torch.ones(3) * 1.1
    verdicts = agrees_with("peer", 1e-3)({"peer": (right, right), "ours": (right, wrong)})
    assert verdicts["ours"].error == pytest.approx(0.1, rel=1e-5)
    with pytest.raises(ValueError, match="shape"):
        distance(torch.ones(3), torch.ones(4))


# --- what is written ---


def test_results_hold_medians_ratios_and_the_command(tmp_path):
    times = {"hotloop": [1.0, 2.0, 9.0], "peer": [4.0, 4.0, 4.0]}
    case = case_of(hotloop=None, peer=None)
    verdicts = dict.fromkeys(times, Verdict(0.0, 1.0))
    found = measure(case_of(peer=lambda x: 2 * x), rounds=2)
    limit = replace(found.limit, rate=64e3)
    measured = [Measured(case, times, verdicts, [ratio(times, "hotloop", "peer")], limit, {"hotloop": 77.0})]
    write(tmp_path / "result", measured)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["command"].startswith("python ")
    assert saved["environment"]["torch"] == torch.__version__
    speed, memory, peer = saved["rows"]
    assert speed["y_value_50"] == 2.0
    assert speed["share_of_limit"] == pytest.approx(0.5)  # 64 bytes in 2 ms
    assert speed["times_faster"]["peer"][0] == 2.0
    assert speed["samples"] == times["hotloop"]
    assert (memory["metric_name"], memory["metric_unit"], memory["y_value_50"]) == ("memory", "MB", 77.0)
    assert peer["kernel_provider"] == "peer"
    assert all(column in row for row in saved["rows"] for column in LIGER_COLUMNS)
    table = (tmp_path / "result.md").read_text()
    assert "| **hotloop** | 2 | 1.4 to 6.2 | 50% | 77 |" in table
    assert "| hotloop | peer | 2.00 |" in table
    write_csv(tmp_path / "result.csv", measured)
    with open(tmp_path / "result.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert tuple(written[0]) == LIGER_COLUMNS
    assert [row["y_value_50"] for row in written] == ["2.0", "77.0", "4.0"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_that_of_the_run():
    def case(elements: int) -> Case:
        return case_of(hotloop=lambda x: torch.ones(elements).sum(), peer=lambda x: x)

    small, large = (peak_memory_mb(case(n), "hotloop") for n in (1, 100_000_000))
    assert large - small == pytest.approx(400, rel=0.2)


# --- the benchmarks themselves, on shapes that take no time ---


def test_names_of_cases_are_unique():
    names = [case.name for case in suite.cases(True)]
    assert len(names) == len(set(names))
    assert {case.name for case in suite.cases(False)} <= set(names)


def without_compiled(case: Case) -> Case:
    return replace(case, providers=lambda: {k: v for k, v in case.providers().items() if "compile" not in k})


def all_pass(case: Case) -> list[str]:
    passed, verdicts = checked(without_compiled(case))
    assert list(passed) == list(verdicts), verdicts
    return list(passed)


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_cases(dtype, mode):
    dense = all_pass(bench_attention.dense_case(2, 48, dtype, mode, True, causal=dtype == torch.float32))
    packed = all_pass(bench_attention.packed_case((5, 1, 26), dtype, mode, True))
    assert {"hotloop cpu", "hotloop torch", "hotloop reference", "torch SDPA"} <= set(dense)
    assert {"hotloop cpu", "hotloop torch", "torch SDPA, dense mask", "torch SDPA, document by document"} <= set(packed)


@pytest.mark.parametrize("mode", ["forward", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_cases(monkeypatch, dtype, mode):
    monkeypatch.setattr(bench_cross_entropy, "N", 64)
    logits = all_pass(bench_cross_entropy.logits_case(200, dtype, mode, True))
    assert ("hotloop, overwrites logits" in logits) == (mode == "full")
    heads = {
        bench_cross_entropy.Head(200, 32): "torch eager",
        bench_cross_entropy.Head(200, 32, supervised=0.15): "torch rows first",
        bench_cross_entropy.Head(200, 32, frozen=True): "its own trainable head",
    }
    for head, peer in heads.items():
        assert {"hotloop torch", peer} <= set(all_pass(bench_cross_entropy.linear_case(head, dtype, mode, True)))


OPTIMIZERS = list(bench_optimizers.kinds())


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=[f"{k.name}-{i}" for i, k in enumerate(OPTIMIZERS)])
def test_optimizer_cases(monkeypatch, kind):
    small = bench_optimizers.PlainGPT
    monkeypatch.setattr(bench_optimizers, "PlainGPT", lambda vocab, **_: small(vocab, 64, 2, 64, 2))
    monkeypatch.setattr(bench_optimizers, "eight_bit", lambda kind: ())
    found = all_pass(bench_optimizers.case_of(kind, 80, True))
    assert {"hotloop cpu", "hotloop reference"} <= set(found)
    assert bench_optimizers.FUSED in found or kind.name == "lion" or "master" in kind.options


def test_gate_of_the_optimizers_sees_a_lost_update(monkeypatch):
    small = bench_optimizers.PlainGPT
    monkeypatch.setattr(bench_optimizers, "PlainGPT", lambda vocab, **_: small(vocab, 8, 1, 16, 2))
    case = bench_optimizers.case_of(OPTIMIZERS[0], 40, True)
    make = case.providers

    def tampered():
        found = make()
        ours = found["hotloop torch"]()

        def results():
            *rest, last = ours.results()
            return (*rest, last * (1 + 1e-3))

        return {**found, "hotloop torch": lambda: replace(ours, results=results)}

    passed, _ = checked(without_compiled(replace(case, providers=tampered)))
    assert "hotloop torch" not in passed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_train_step_cases(monkeypatch, precision):
    for name, value in {"B": 2, "T": 16, "LAYERS": 2, "D": 32, "HEADS": 2}.items():
        monkeypatch.setattr(bench_train_step, name, value)
    case = bench_train_step.case_of(128, precision, ("eager",))
    found = measure(case, rounds=2)
    assert not found.refused
    assert list(found.times)[:2] == ["hotloop eager", "plain eager"]
    assert next((r.ours, r.peer) for r in found.ratios) == ("hotloop eager", "plain eager")
    assert all(statistics.median(t) > 0 for t in found.times.values())


def test_gate_of_the_train_step_sees_another_weight(monkeypatch):
    for name, value in {"B": 2, "T": 16, "LAYERS": 2, "D": 32, "HEADS": 2}.items():
        monkeypatch.setattr(bench_train_step, name, value)
    right = bench_train_step.our_names

    def one_weight_off(plain):
        weights = right(plain)
        weights["final_norm.weight"] = weights["final_norm.weight"] * 1.01
        return weights

    monkeypatch.setattr(bench_train_step, "our_names", one_weight_off)
    passed, _ = checked(bench_train_step.case_of(128, "fp32", ("eager",)))
    assert list(passed) == ["plain eager"]


# --- as commands ---


def script(name: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def test_scripts_run_from_anywhere(tmp_path):
    done = script(
        "bench_attention.py", "--only", "varlen-forward", "float32", "--rounds", "2", "--out", "r.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "r.json").read_text())
    assert (
        saved["command"] == "python benchmarks/bench_attention.py --only varlen-forward float32 --rounds 2 --out r.json"
    )
    assert (tmp_path / "r.md").read_text().endswith("\n")
    assert {row["kernel_provider"] for row in saved["rows"]} >= {"hotloop torch", "torch SDPA, dense mask"}


def test_bad_options_say_so():
    none = script("bench_attention.py", "--only", "nothing like that")
    assert none.returncode == 2
    assert "attention-forward-T=256" in none.stdout
    assert "give at least 2" in script("bench_attention.py", "--rounds", "1").stderr


def test_gpu_without_a_gpu_says_so():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU: make gpu would run")
    done = script("gpu.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs a CUDA device" in done.stderr
