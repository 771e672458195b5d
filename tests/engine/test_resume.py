"""A killed run resumes to the same numbers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.recipe import to_toml
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train.loop import RunFailed
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.pretrain import pretrain

PROGRAM = """
import os, sys
from hotloop.engine.recipe import load_recipe
from hotloop.engine.train.pretrain import pretrain

point, occurrence = sys.argv[3], int(sys.argv[4])
seen = 0

def fault(name):
    global seen
    if name == point:
        seen += 1
        if seen == occurrence:
            os._exit(9)

outcome = pretrain(load_recipe(sys.argv[1]), sys.argv[2], fault=fault)
print(outcome.reason)
"""


def start(tmp_path: Path, recipe: Recipe, run: Path, point: str = "", occurrence: int = 0) -> subprocess.Popen[str]:
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.toml"), str(run), point, str(occurrence)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)


def numbers(run: Path) -> list[tuple]:
    """What must not depend on interruptions: of every step and evaluation, in order."""
    lines = read_metrics(run / "metrics.jsonl")
    train = [
        (x["step"], x["loss"], x["loss_z"], x["grad_norm"], x["lr"], x["skipped"])
        for x in lines
        if x["kind"] == "train"
    ]
    return [train, [(x["step"], x["loss"]) for x in lines if x["kind"] == "eval"]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoints.latest(run / "checkpoints").checkpoint
    assert found is not None
    tensors = {}
    for name in ("model", "optimizer"):
        tensors.update({f"{name}/{key}": value for key, value in load_file(found.path / f"{name}.safetensors").items()})
    return tensors


def assert_same(run: Path, expected: Path) -> None:
    assert numbers(run) == numbers(expected)
    a, b = weights(run), weights(expected)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, request):
    """Runs by precision, made once."""
    made = {}

    def get(recipe: Recipe) -> Path:
        key = to_toml(recipe)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            assert pretrain(recipe, made[key]).reason == "finished"
        return made[key]

    return get


FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
POINTS = [
    "snapshot", "create", *(f"{what} {name}" for name in FILES for what in ("write", "fsync")), "sync folder", "rename",
    "sync parent", "verify", "delete", "done",
]  # fmt: skip


def test_these_are_all_points_of_a_write(tmp_path, recipe):
    """But "replace", which only a step that is saved again has; test_checkpoint.py kills a store there."""
    seen: list[str] = []
    pretrain(recipe(), tmp_path / "run", fault=seen.append)
    assert set(seen) == set(POINTS)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_the_write(tmp_path, recipe, uninterrupted, point):
    made = recipe(model={"dropout": 0.1})
    run = tmp_path / "run"
    process = start(tmp_path, made, run, point, occurrence=2)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 9, errors
    assert pretrain(made, run).reason == "finished"
    assert_same(run, uninterrupted(made))


@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic"])
def test_killed_in_other_precisions(tmp_path, recipe, uninterrupted, precision):
    made = recipe(train={"precision": precision, "micro_batch": 4})
    run = tmp_path / "run"
    process = start(tmp_path, made, run, "done", occurrence=2)
    process.communicate(timeout=120)
    assert process.returncode == 9
    assert pretrain(made, run).reason == "finished"
    assert_same(run, uninterrupted(made))


def kill_at_random(tmp_path: Path, recipe: Recipe, run: Path, kills: int, seed: int) -> list[float]:
    """SIGKILL after random times from the first step on, until it has been killed that often; then let it finish."""
    draw, moments = random.Random(seed), []
    while len(moments) < kills:
        process = start(tmp_path, recipe, run)
        before = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
        while process.poll() is None and not (
            (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size > before
        ):
            time.sleep(0.01)
        moment = draw.uniform(0, 0.4)
        time.sleep(moment)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.communicate()
        moments.append(moment)
    process = start(tmp_path, recipe, run)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return moments


def long_recipe(recipe, steps: int) -> Recipe:
    return recipe(train={"steps": steps, "micro_batch": 4}, evaluation={"every": 25}, checkpoint={"every": 7})


def test_killed_at_random_moments(tmp_path, recipe, uninterrupted):
    made = long_recipe(recipe, 500)
    moments = kill_at_random(tmp_path, made, tmp_path / "run", kills=5, seed=0)
    print("killed at (s after the first line of each start):", [round(m, 3) for m in moments])
    assert len(moments) == 5
    assert_same(tmp_path / "run", uninterrupted(made))


@pytest.mark.slow
def test_killed_at_fifty_random_moments(tmp_path, recipe, uninterrupted):
    made = long_recipe(recipe, 4000)
    moments = kill_at_random(tmp_path, made, tmp_path / "run", kills=50, seed=1)
    print("killed at (s after the first line of each start):", [round(m, 3) for m in moments])
    assert len(moments) == 50
    assert_same(tmp_path / "run", uninterrupted(made))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop(tmp_path, recipe, uninterrupted, number):
    made = long_recipe(recipe, 250)
    run = tmp_path / "run"
    process = start(tmp_path, made, run)
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert out.strip() == signal.Signals(number).name
    saved = checkpoints.latest(run / "checkpoints").checkpoint
    assert saved.step == read_metrics(run / "metrics.jsonl")[-1]["step"]
    assert pretrain(made, run).reason == "finished"
    assert_same(run, uninterrupted(made))


def test_an_altered_checkpoint_is_passed_over(tmp_path, recipe, uninterrupted):
    made, run = recipe(), tmp_path / "run"
    process = start(tmp_path, made, run, "done", occurrence=3)
    process.communicate(timeout=120)
    newest = checkpoints.latest(run / "checkpoints").checkpoint.path
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert pretrain(made, run).reason == "finished"
    events = [x for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "event"]
    assert any(x["name"] == "checkpoint_rejected" and "truncated" in x["message"] for x in events)
    assert_same(run, uninterrupted(made))


@pytest.mark.parametrize("point", ["write model.safetensors", "fsync state.json", "rename"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, recipe, uninterrupted, point):
    made, run = recipe(), tmp_path / "run"
    steps = []

    def full(name: str) -> None:
        steps.append(name)
        if name == point and steps.count("create") >= 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(RunFailed, match="No space left"):
        pretrain(made, run, fault=full)
    saved = checkpoints.latest(run / "checkpoints")
    assert saved.checkpoint.step == 4
    assert not saved.rejected
    assert pretrain(made, run).reason == "finished"
    assert_same(run, uninterrupted(made))


def test_outside_the_domain_the_run_says_what_is_lost(tmp_path, recipe, uninterrupted):
    made, run = recipe(), tmp_path / "run"
    process = start(tmp_path, made, run, "done", occurrence=1)
    process.communicate(timeout=120)
    changed = replace(made, train=replace(made.train, micro_batch=2))
    assert pretrain(changed, run).reason == "finished"
    lost = [x["message"] for x in read_metrics(run / "metrics.jsonl") if x.get("name") == "guarantee_lost"]
    assert len(lost) == 1
    assert "micro_batch: 8 -> 2" in lost[0]
    assert "the global batches are the same" in lost[0]
    ours, theirs = numbers(run)[0], numbers(uninterrupted(made))[0]
    for a, b in zip(ours, theirs, strict=True):
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], rel=1e-5)


def test_another_configuration_is_refused(tmp_path, recipe):
    made, run = recipe(), tmp_path / "run"
    process = start(tmp_path, made, run, "done", occurrence=1)
    process.communicate(timeout=120)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"another configuration \(train.seed: 0 -> 1\)"):
        pretrain(recipe(train={"seed": 1}), run)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_refused(tmp_path, recipe):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="not a run of hotloop"):
        pretrain(recipe(), tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_run_in_use_is_refused(tmp_path, recipe):
    run = tmp_path / "run"
    process = start(tmp_path, long_recipe(recipe, 100_000), run)
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.01)
    with pytest.raises(UserError, match="in use by another process"):
        pretrain(long_recipe(recipe, 100_000), run)
    process.kill()
    process.communicate()


def test_resuming_a_finished_run_changes_nothing(tmp_path, recipe):
    made, run = recipe(), tmp_path / "run"
    pretrain(made, run)
    before = numbers(run)
    assert pretrain(made, run).reason == "finished"
    assert numbers(run) == before


def torchrun(tmp_path: Path, run: Path, *settings: str, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`hotloop pretrain` of the recipe that `start` wrote, in several processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launch, "-m", "hotloop.engine", "pretrain", str(tmp_path / "recipe.toml"), "--out", str(run)]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_what_rank_0_refuses_is_said_and_not_drowned(tmp_path, recipe):
    """The other ranks leave with the same line, not with the traceback of a lost connection."""
    run = tmp_path / "run"
    start(tmp_path, recipe(train={"micro_batch": 4}), run, "done", occurrence=1).communicate(timeout=120)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = torchrun(tmp_path, run, "train.seed=1")
    assert done.returncode == 1  # torchrun's own; each rank left with 2
    assert done.stderr.count(f"hotloop: {run} is a run of another configuration (train.seed: 0 -> 1)") >= 1
    assert "RuntimeError" not in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("world_size", [2])
def test_another_world_size_reads_the_same_batches(tmp_path, recipe, uninterrupted, world_size):
    made, run = recipe(train={"micro_batch": 4}), tmp_path / "run"
    process = start(tmp_path, made, run, "done", occurrence=1)
    process.communicate(timeout=120)
    done = torchrun(tmp_path, run, ranks=world_size)
    assert done.returncode == 0, done.stderr[-3000:]
    lost = [x["message"] for x in read_metrics(run / "metrics.jsonl") if x.get("name") == "guarantee_lost"]
    assert any("world_size: 1 -> 2" in message for message in lost)
    ours, theirs = (
        [x for x in read_metrics(r / "metrics.jsonl") if x["kind"] == "train"] for r in (run, uninterrupted(made))
    )
    for name in ("tokens", "supervised", "padding_share"):  # of the global batch, not of one rank's part
        assert [x[name] for x in ours] == [x[name] for x in theirs]
    for a, b in zip(numbers(run)[0], numbers(uninterrupted(made))[0], strict=True):
        assert a[0] == b[0]
        assert a[1] == pytest.approx(b[1], rel=1e-5)
    assert json.loads((run / "report.json").read_text())["complete"]
