"""The dtype policies, and torch.compile against eager, over real steps."""

from __future__ import annotations

import shutil

import pytest
import torch

from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.precision import resolve
from hotloop.engine.train.pretrain import pretrain


def losses(run) -> list[float]:
    return [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]


def test_each_policy_stores_what_it_says_and_learns(tmp_path, recipe):
    final = {}
    for name in ("fp32", "bf16", "bf16_stochastic"):
        run = tmp_path / name
        pretrain(recipe(train={"precision": name, "steps": 60, "micro_batch": 4}, evaluation={"every": 0}), run)
        saved = checkpoints.latest(run / "checkpoints").checkpoint
        expected = torch.float32 if name == "fp32" else torch.bfloat16
        assert all(tensor.dtype == expected for tensor in saved.tensors("model").values())
        names = {key.rsplit(".", 1)[-1] for key in saved.tensors("optimizer")}
        assert ("master" in names) == (name == "bf16")
        final[name] = losses(run)[-1]
        assert final[name] < losses(run)[0] - 0.5
    assert final["bf16"] == pytest.approx(final["fp32"], rel=0.02)
    assert final["bf16_stochastic"] == pytest.approx(final["fp32"], rel=0.05)


@pytest.mark.parametrize(("moments", "dtype"), [("bfloat16", torch.bfloat16), ("int8", torch.uint8)])
def test_narrow_moments_are_stored_learn_and_resume(tmp_path, recipe, moments, dtype):
    """Without its last checkpoint a run goes on from the one before, to the same bits."""
    run = tmp_path / "run"
    given = recipe(
        optimizer={"moments": moments}, train={"precision": "bf16", "steps": 40, "micro_batch": 4},
        evaluation={"every": 0}, checkpoint={"every": 20},
    )  # fmt: skip
    pretrain(given, run)
    curve = losses(run)
    assert curve[-1] < curve[0] - 0.3
    saved = checkpoints.latest(run / "checkpoints").checkpoint
    optimizer, model = saved.tensors("optimizer"), saved.tensors("model")
    assert dtype in {tensor.dtype for name, tensor in optimizer.items() if "exp_avg" in name}
    shutil.rmtree(saved.path)
    pretrain(given, run)
    again = checkpoints.latest(run / "checkpoints").checkpoint
    assert again.path == saved.path
    for kept, tensors in ((optimizer, again.tensors("optimizer")), (model, again.tensors("model"))):
        assert kept.keys() == tensors.keys()
        assert all(torch.equal(kept[name], tensors[name]) for name in kept)
    assert losses(run) == curve


def test_auto_is_resolved_once(tmp_path, recipe):
    run = tmp_path / "run"
    pretrain(recipe(train={"precision": "auto", "steps": 2}, evaluation={"every": 0}), run)
    name = resolve("auto", torch.device("cpu")).name
    assert f'precision = "{name}"' in (run / "config.toml").read_text()
    assert 'precision = "auto"' in (run / "recipe.toml").read_text()


def test_accumulation_is_in_fp32(tmp_path, recipe):
    """Eight micro-batches of one sequence against one of eight, in bf16: closer than bf16 sums would be."""
    curves = []
    for micro_batch in (8, 1):
        run = tmp_path / str(micro_batch)
        pretrain(recipe(train={"precision": "bf16", "micro_batch": micro_batch}, evaluation={"every": 0}), run)
        curves.append([x["grad_norm"] for x in read_metrics(run / "metrics.jsonl") if x["kind"] == "train"])
    assert curves[0][0] == pytest.approx(curves[1][0], rel=4e-3)


@pytest.mark.parametrize("changes", [{"compile": True}, {"activation_checkpointing": True}])
def test_compiled_and_checkpointed_equal_eager(tmp_path, recipe, changes):
    if changes.get("compile") and torch.__version__ < "2.13":
        pytest.skip("train.compile needs torch 2.13")
    for name, fields in (("plain", {}), ("changed", changes)):
        pretrain(recipe(train={"steps": 20, "micro_batch": 4, **fields}, evaluation={"every": 0}), tmp_path / name)
    for a, b in zip(losses(tmp_path / "changed"), losses(tmp_path / "plain"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
