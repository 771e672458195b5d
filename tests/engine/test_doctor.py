"""The self-check finds planted errors and nothing else; the doctor says what it found."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import tyro

from hotloop.engine.commands import doctor
from hotloop.engine.commands.doctor import Doctor
from hotloop.kernels import selfcheck
from hotloop.kernels.attention import reference
from hotloop.kernels.attention.op import TABLE as ATTENTION
from hotloop.kernels.attention.options import Call
from hotloop.kernels.cross_entropy.contract import Options
from hotloop.kernels.cross_entropy.linear import RECOMPUTE
from hotloop.kernels.cross_entropy.op import CROSS_ENTROPY
from hotloop.kernels.dispatch import Backend, Table, use_backend
from hotloop.kernels.optimizers import reference as optimizer_reference
from hotloop.kernels.optimizers.adamw import ADAMW
from hotloop.kernels.optimizers.clipping import GRAD_NORM
from hotloop.kernels.selfcheck import CASES, Draw, Outcome, check, self_check, worst

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
ATTENTION_CASES = [case for case in CASES if case.table is ATTENTION]


def plant(monkeypatch: pytest.MonkeyPatch, table: Table, backend: Backend) -> None:
    """Put a backend first in an op's table."""
    monkeypatch.setattr(table, "backends", (backend, *table.backends))
    monkeypatch.setitem(table._by_name, backend.name, backend)


def planted_attention(
    forward: Callable[..., Any] = reference.forward, backward: Callable[..., Any] = reference.backward
) -> Backend:
    return Backend("planted", lambda *_: None, forward, backward)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return self_check("cpu")


def test_every_backend_is_right_here(outcomes: list[Outcome]) -> None:
    assert [o for o in outcomes if not o.fine] == []
    optimizers = {"AdamW", "Lion", "SGD", "Muon"}
    assert {o.op for o in outcomes} == {"attention", "linear_cross_entropy", "cross_entropy"} | optimizers
    for o in outcomes:
        assert (o.status == "ok") == (o.error is not None and o.error <= o.tolerance)
    calls = defaultdict(list)
    for o in outcomes:
        calls[o.op, o.call, o.dtype].append(o)
    assert len(calls) == 2 * len(CASES)
    for tried in calls.values():
        assert sum(o.chosen for o in tried) == 1
        assert next(o for o in tried if o.backend == "reference").status == "ok"
    # The tolerance is neither a rubber stamp nor about to fail.
    for o in outcomes:
        if o.error is not None:
            assert o.error < 0.6 * o.tolerance, o


def test_chosen_is_what_the_table_chooses(outcomes: list[Outcome]) -> None:
    with use_backend("reference"):
        forced = list(check(CASES[0], torch.float32, CPU))
    assert [o.backend for o in forced if o.chosen] == ["reference"]
    assert next(o.backend for o in outcomes if o.chosen) == ATTENTION.backends[0].name
    not_served = [o for o in outcomes if o.status == "not served"]
    assert any(o.backend == "torch" and o.detail == "PyTorch's kernels have no softcap" for o in not_served)


def with_options(call: Call, **changes: Any) -> Call:
    return call._replace(options=dataclasses.replace(call.options, **changes))


# Each is a way in which kernels go wrong, small enough to pass a glance at the numbers.


def one_key_too_far(call: Call) -> Any:
    return reference.forward(with_options(call, window_right=call.options.window_right + 1))


def last_row_lost(call: Call) -> Any:
    o, lse = reference.forward(call)
    o.reshape(-1, o.shape[-1])[-1] = 0
    return o, lse


def scale_off_by_a_tenth(call: Call) -> Any:
    return reference.forward(with_options(call, scale=call.options.scale * 1.1))


def one_nan(call: Call) -> Any:
    o, lse = reference.forward(call)
    o.view(-1)[7] = float("nan")
    return o, lse


def half_of_one_key_lost(*arguments: Any) -> Any:
    dq, dk, *rest = reference.backward(*arguments)
    rows = dk.view(-1, dk.shape[-1])
    rows[len(rows) // 2] *= 0.5
    return (dq, dk, *rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.call)
@pytest.mark.parametrize(
    ("backend", "where"),
    [
        (planted_attention(forward=one_key_too_far), None),
        (planted_attention(forward=last_row_lost), "o"),
        (planted_attention(forward=scale_off_by_a_tenth), None),
        (planted_attention(forward=one_nan), "o"),
        (planted_attention(backward=half_of_one_key_lost), "dk"),
    ],
    ids=["one key too far", "last row lost", "scale off", "one NaN", "part of dk lost"],
)
def test_planted_errors_are_found(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, where: str | None, case: selfcheck.Case, dtype: torch.dtype
) -> None:
    plant(monkeypatch, ATTENTION, backend)
    planted, *others = check(case, dtype, CPU)
    assert (planted.backend, planted.status, planted.chosen) == ("planted", "mismatch", True)
    assert planted.error is not None
    assert planted.error > planted.tolerance
    if where == "dk":
        assert planted.detail == where
    assert all(o.fine for o in others)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [CROSS_ENTROPY, RECOMPUTE], ids=lambda table: table.op)
def test_planted_cross_entropy_error_is_found(
    monkeypatch: pytest.MonkeyPatch, table: Table, dtype: torch.dtype
) -> None:
    """Label smoothing is forgotten, in the forward pass or in the backward pass alone."""
    right = table["reference"]

    def forgetful(function: Callable[..., Any] | None) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            assert function is not None
            forgotten = [a._replace(label_smoothing=0.0) if isinstance(a, Options) else a for a in arguments]
            assert forgotten != list(arguments)
            return function(*forgotten, **keywords)

        return call

    case = next(case for case in CASES if case.table is table)
    for forward, backward in ((forgetful(right.forward), right.backward), (right.forward, forgetful(right.backward))):
        with monkeypatch.context() as patch:
            plant(patch, table, Backend("planted", lambda *_, **__: None, forward, backward))
            planted = next(check(case, dtype, CPU))
        assert (planted.backend, planted.status) == ("planted", "mismatch")
        assert planted.detail.startswith("d" if forward is right.forward else "loss")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_planted_optimizer_error_is_found(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def decay_forgotten(update: Any, factor: Any, skip: Any) -> None:
        group = {**update.group, "weight_decay": 0.0}
        optimizer_reference.adamw(dataclasses.replace(update, group=group), factor, skip)

    plant(monkeypatch, ADAMW, Backend("planted", lambda *_: None, decay_forgotten))
    # Both tables of an optimizer take the forced name; the norm is not what is planted here.
    plant(monkeypatch, GRAD_NORM, Backend("planted", lambda *_: None, optimizer_reference.sum_of_squares))
    case = next(case for case in CASES if case.table is ADAMW)
    planted = next(check(case, dtype, CPU))
    assert planted.backend == "planted"
    if dtype == torch.float32:
        assert planted.status == "mismatch"
        assert planted.detail.startswith(("param", "stored"))
    else:
        assert planted.error is not None
        assert planted.error > 0.01  # the master shows it, below bf16's own rounding of the gradients' moments


def test_refusal_and_failure_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("ptxas: out of registers\nlong log")

    plant(monkeypatch, ATTENTION, Backend("shy", lambda *_: "no GPU: needs sm_90", broken, broken))
    plant(monkeypatch, ATTENTION, Backend("broken", lambda *_: None, broken, broken))
    first, second, *_ = check(CASES[0], torch.float32, CPU)
    assert (first.status, first.detail, first.fine) == ("failed", "RuntimeError: ptxas: out of registers", False)
    assert (second.status, second.detail, second.fine) == ("not served", "no GPU: needs sm_90", True)
    assert not second.chosen


def test_error_is_relative_to_each_element_and_to_the_whole() -> None:
    truth = {"a": torch.tensor([3.0, 4.0, 0.0], dtype=torch.float64), "b": torch.zeros(2, dtype=torch.float64)}
    rms = (25 / 3) ** 0.5
    near = {"a": torch.tensor([3.0, 4.0, 0.01]), "b": torch.zeros(2)}
    name, error = worst(near, truth)
    assert name == "a"
    assert error == pytest.approx(0.01 / rms)
    assert worst({**near, "b": torch.tensor([0.0, 1e-30])}, truth)[0] == "b"  # where nothing is right, nothing is near
    assert worst({**near, "a": torch.tensor([3.0, float("inf"), 0.0])}, truth) == ("a", float("inf"))
    with pytest.raises(ValueError, match=r"a: shape \(2,\), expected \(3,\)"):
        worst({"a": torch.zeros(2), "b": torch.zeros(2)}, truth)
    with pytest.raises(ValueError, match="results a: expected a, b"):
        worst({"a": near["a"]}, truth)


def test_draws_are_the_same_values_in_every_dtype() -> None:
    low = Draw(torch.bfloat16, torch.bfloat16, CPU, seed=3)
    high = Draw(torch.bfloat16, torch.float64, CPU, seed=3)
    for _ in range(2):
        assert torch.equal(low.normal(5, 7).double(), high.normal(5, 7))
    assert torch.equal(low.integers(9, 40), high.integers(9, 40))


# The command


def test_doctor_prints_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert Doctor()() == 0
    text = capsys.readouterr().out
    for part in ("Python 3.", f"torch {torch.__version__}", "compiler", "hotloop.kernels._C", "cores usable", "GB"):
        assert part in text, part
    assert re.search(r"matmul float32 +[\d.]+ [GT]FLOP/s", text)
    assert re.search(r"matmul bfloat16 +[\d.]+ [GT]FLOP/s", text)
    assert re.search(r"copy +[\d.]+ [GT]B/s", text)
    assert re.search(r"\* \w+ +float32 +ok: error \d\.\de-\d\d", text)
    assert "does not serve it: PyTorch's kernels have no softcap" in text
    assert re.search(r"All \d+ checks are fine\.", text)
    assert max(map(len, text.splitlines())) < 160


def test_doctor_json(capsys: pytest.CaptureFixture[str], outcomes: list[Outcome]) -> None:
    assert tyro.cli(Doctor, args=["--json", "--no-measure"])() == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["machine"]["packages"]["torch"] == torch.__version__
    assert found["machine"]["cpu"]["torch threads"] == torch.get_num_threads()
    assert "peaks" not in found
    assert [c["backend"] for c in found["checks"]][: len(outcomes)] == [o.backend for o in outcomes]


def test_doctor_fails_loudly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, ATTENTION, planted_attention(forward=last_row_lost))
    assert Doctor(measure=False)() == 1
    text = capsys.readouterr().out
    assert re.search(r"\* planted +float32 +MISMATCH: error \S+ in o, tolerance 3e-05", text)
    assert "8 of" in text.splitlines()[-1]
    assert "checks FAILED (attention by planted on cpu): do not train with these backends." in text
    assert Doctor(measure=False, json=True)() == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_missing_extension_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import hotloop.kernels

    monkeypatch.delattr(hotloop.kernels, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "hotloop.kernels._C", None)
    monkeypatch.setattr(doctor, "_tool", lambda *names: None)
    found = doctor.machine()
    assert "install a C++ compiler, then hotloop again" in found["extension"]["missing"]
    text = doctor._machine_text(found)
    assert "hotloop.kernels._C is missing: " in text
    assert "no C++ compiler on PATH" in text


def test_machine_text_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = doctor.machine()
    found["gpus"] = [{"index": 0, "name": "NVIDIA H100", "memory_gb": 85.0, "capability": "9.0", "processors": 132}]
    found["HOTLOOP_BACKEND"] = "triton"
    text = doctor._machine_text(found)
    assert "GPU 0      NVIDIA H100, 85 GB, compute capability 9.0, 132 SMs" in text
    assert "HOTLOOP_BACKEND=triton: every op takes that backend or refuses" in text
    assert json.loads(json.dumps(found)) == found


def test_tools_and_memory() -> None:
    assert doctor._tool("no-such-program", None) is None
    assert re.fullmatch(r".*python.* \(Python 3\..*\)", doctor._tool(None, "no-such-program", sys.executable) or "")
    memory = doctor.memory_gb()
    assert memory is not None
    assert 0.2 < memory < 1e5
