"""`hotloop finetune`, `predict` and `eval` of labelled files on a tiny random encoder, and every refusal."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hotloop.engine.classifier import load_classifier
from hotloop.engine.commands.main import main
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.recipe import RecipeError, load_recipe, to_toml
from hotloop.engine.tasks.classification import ClassificationPlan
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train.finetune import finetune
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.parameter_groups import parameter_groups
from hotloop.engine.train.pretrain import pretrain


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints.latest(run / "checkpoints").checkpoint
    assert newest is not None
    return {**newest.tensors("model"), **{f"o.{n}": t for n, t in newest.tensors("optimizer").items()}}


def numbers(run: Path) -> list[tuple]:
    lines = read_metrics(run / "metrics.jsonl")
    train = [(x["step"], x["loss"], x["grad_norm"], x["lr"], x["skipped"]) for x in lines if x["kind"] == "train"]
    return train + [(x["step"], x["loss"], x["accuracy"], x["macro_f1"]) for x in lines if x["kind"] == "eval"]


# A run ----------------------------------------------------------------------------------------------------------------


def test_it_learns_and_is_judged_beside_baselines(trained):
    result = json.loads((trained / "result.json").read_text())
    assert result["test"]["examples"] == 140
    assert result["test"]["accuracy"] > 0.85 > result["baselines"]["majority"]["accuracy"]
    assert result["baselines"]["tfidf"]["accuracy"] > result["baselines"]["majority"]["accuracy"]
    assert sum(map(sum, result["test"]["confusion"])) == 140
    assert result["classes"] == ["negative", "neutral", "positive"]
    evaluations = [x for x in read_metrics(trained / "metrics.jsonl") if x["kind"] == "eval"]
    best = max(evaluations, key=lambda x: (x["macro_f1"], -x["loss"]))
    assert result["step"] == best["step"]
    assert result["validation"]["loss"] == pytest.approx(best["loss"], rel=1e-5)
    assert result["validation"]["accuracy"] == pytest.approx(best["accuracy"])


def test_the_same_command_reads_the_result_and_does_not_judge_again(make, trained):
    logs = ("log.txt", "metrics.jsonl")
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file() and path.name not in logs}
    recipe = load_recipe(trained / "recipe.toml")
    outcome, result = finetune(recipe, trained)
    assert outcome.reason == "finished"
    assert result == json.loads((trained / "result.json").read_text())
    assert {path: path.read_bytes() for path in before} == before


PROGRAM = """
import os, sys
from hotloop.engine.recipe import load_recipe
from hotloop.engine.train.finetune import finetune

seen = 0

def fault(name):
    global seen
    seen += name == sys.argv[3]
    if seen == int(sys.argv[4]):
        os._exit(9)

finetune(load_recipe(sys.argv[1]), sys.argv[2], fault=fault)
"""


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_killed_run_resumes_bit_for_bit(make, labelled_rows, write_rows, tmp_path, multi_label):
    """With dropout, windows drawn anew in each epoch, layer-wise rates and balanced classes."""
    rows = [dict(row) for row in labelled_rows[:80]]
    for i in range(0, 80, 9):
        rows[i]["text"] = " ".join(row["text"] for row in labelled_rows[i : i + 9])
    if multi_label:
        rows = [{**row, "label": [row["label"], "long"] if i % 3 else []} for i, row in enumerate(rows)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make(
        labels={"train": [str(data)], "budget": "none", "class_weights": "balanced", "on_long": "window",
                "multi_label": multi_label, "threshold": "validation", "baselines": False},
        finetune={"layer_decay": 0.8}, train={"micro_batch": 6},
    )  # fmt: skip
    finetune(recipe, tmp_path / "whole")
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "recipe.toml"), str(tmp_path / "killed"), "done", "2"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 9, done.stderr[-2000:]
    assert len(checkpoints.latest(tmp_path / "killed/checkpoints").checkpoint.files) > 0
    finetune(recipe, tmp_path / "killed")
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    whole, killed = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_layers_have_their_rates_and_frozen_ones_stay(make, tmp_path):
    recipe = make(finetune={"layer_decay": 0.5, "frozen_layers": 1}, labels={"baselines": False}, train={"steps": 4})
    finetune(recipe, tmp_path / "run")
    plan = ClassificationPlan(recipe)
    after = checkpoints.latest(tmp_path / "run/checkpoints").checkpoint.tensors("model")
    for name, tensor in plan.initial.state.items():
        stays = "embedding" in name or name.startswith("layers.0.")
        assert torch.equal(after[name][: len(tensor)], tensor) == stays, name

    model = Transformer(replace(plan.initial.config, vocab_size=200))
    scales = {
        name: group["lr_scale"]
        for group in parameter_groups(model, recipe.optimizer, recipe.finetune)
        for name, _ in group["params"]
    }
    assert scales["classifier.out.weight"] == 1
    assert scales["layers.1.attention.qkv.weight"] == scales["layers.1.feed_forward.up.bias"] == 0.5
    assert scales["layers.0.attention.qkv.weight"] == 0.25
    assert scales["embedding.weight"] == scales["embedding_norm.bias"] == 0.125
    assert len(set(scales)) == len(list(model.parameters()))


def test_a_group_moves_at_its_share_of_the_rate(make, tmp_path):
    """AdamW's first step is lr * sign(gradient) but for eps: its size shows each group's rate."""
    recipe = make(
        finetune={"layer_decay": 0.5}, labels={"baselines": False}, train={"steps": 1}, evaluation={"every": 0},
        optimizer={"lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": "none", "eps": 1e-12},
    )  # fmt: skip
    finetune(recipe, tmp_path / "run")
    after = checkpoints.latest(tmp_path / "run/checkpoints").checkpoint.tensors("model")
    before = ClassificationPlan(recipe).initial.state
    for name, scale in {"layers.1.attention.out.weight": 0.5, "layers.0.attention.out.weight": 0.25,
                        "embedding_norm.weight": 0.125}.items():  # fmt: skip
        moved = (after[name] - before[name]).abs().median().item()
        assert moved == pytest.approx(1e-3 * scale, rel=1e-2), name


def test_a_batch_with_nothing_supervised_changes_nothing_and_is_counted(make, labelled_rows, write_rows, tmp_path):
    rows = [row for row in labelled_rows if row["label"] != "neutral"][:60]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make(
        labels={"train": [str(data)], "budget": "none", "classes": ["negative", "positive"], "weights": [0.0, 1.0],
                "baselines": False},
        train={"steps": 40, "global_batch": 1, "micro_batch": 1}, evaluation={"every": 0}, initial={"dropout": 0.0},
    )  # fmt: skip
    finetune(recipe, tmp_path / "run")
    lines = [x for x in read_metrics(tmp_path / "run/metrics.jsonl") if x["kind"] == "train"]
    nothing = [x for x in lines if x["supervised"] == 0]
    assert 5 < len(nothing) < 35
    for line in lines:
        assert line["skipped"] == (line["supervised"] == 0)
        assert (line["loss"] == 0) == (line["supervised"] == 0)


def test_sets_of_labels_learn_and_choose_their_threshold(make, labelled_rows, write_rows, tmp_path):
    rows = [
        {
            **row,
            "label": ([] if row["label"] == "neutral" else [row["label"]]) + ["short"] * (row["text"].count(" ") < 6),
        }
        for row in labelled_rows
    ]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = make(
        labels={"train": [str(data)], "multi_label": True, "threshold": "validation"},
        train={"steps": 150}, evaluation={"every": 30}, checkpoint={"every": 30},
    )  # fmt: skip
    _, result = finetune(recipe, tmp_path / "run")
    assert result is not None
    assert result["classes"] == ["negative", "positive", "short"]
    assert result["test"]["confusion"] is None
    assert result["test"]["micro_f1"] > 0.8 > result["baselines"]["majority"]["micro_f1"]
    assert load_classifier(tmp_path / "run").threshold == result["threshold"]
    assert main(["predict", str(tmp_path / "run"), str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    line = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert set(line["predicted"]) == {name for name, p in line["probabilities"].items() if p >= result["threshold"]}


def test_several_seeds_have_an_interval_and_share_nothing(make, tmp_path, capsys):
    (tmp_path / "recipe.toml").write_text(to_toml(make(train={"steps": 6})))
    command = ["finetune", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "runs"), "--seeds", "3"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "mean and 95 % interval of 3 seeds" in printed
    assert " ± " in printed
    report = json.loads((tmp_path / "runs/report.json").read_text())
    assert report["seeds"] == 3
    values = report["model"]["accuracy"]["values"]
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
    assert report["model"]["accuracy"]["half_width"] == pytest.approx(half, rel=1e-5)
    digests = [run["data"]["splits"]["test"]["sha256"] for run in report["runs"]]
    assert len(set(digests)) == 3
    assert "Confusion matrix" in (tmp_path / "runs/report.html").read_text()
    assert "Confusion matrix" in (tmp_path / "runs/seed-1/report.html").read_text()
    assert main(command) == 0  # read again
    assert capsys.readouterr().out == printed
    best = max(report["runs"], key=lambda run: (run["validation"]["macro_f1"], -run["validation"]["loss"]))
    assert load_classifier(tmp_path / "runs").folder.name == best["run"]


# Refusals -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"initial": {"path": "", "pooling": "none", "classifier_head": "none", "dropout": "none"}},
            "initial.path is not set",
        ),
        ({"checkpoint": {"keep_best": 0}}, "checkpoint.keep_best = 0"),
        ({"model": {"n_layers": 3}}, "the model is the checkpoint's"),
        ({"data": {"path": "corpora/mine"}}, "texts are given by labels.train"),
        ({"initial": {"path": "no/such"}}, "no/such: no such folder"),
        ({"initial": {"context": 4096}}, "initial.context = 4096: "),
        ({"labels": {"train": []}}, "labels.train is not set"),
        ({"labels": {"train": ["no-such.csv"]}}, "no-such.csv: no such file"),
        ({"labels": {"label": "stars"}}, "line 1: no field 'stars'"),
        ({"labels": {"classes": ["negative", "neutral"]}}, "label 'positive' is outside the set"),
        ({"labels": {"classes": ["negative", "neutral", "positive", "mixed"]}}, "class 'mixed' is empty"),
        ({"finetune": {"frozen_layers": 3}}, "finetune.frozen_layers = 3: the checkpoint has 2 layers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_folder(make, tmp_path, sections, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(to_toml(make(**sections)))
    assert main(["finetune", "recipe.toml", "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_larger_than_the_embedding_is_refused(make, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    tokenizer = json.loads((tmp_path / "bert/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["unheard"] = 200
    (tmp_path / "bert/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"tokenizer.json has 201 entries, but the embedding has 200 rows"):
        finetune(make(initial={"path": str(tmp_path / "bert")}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_long_texts_are_refused_before_training(make, labelled_rows, write_rows, tmp_path):
    rows = [dict(row) for row in labelled_rows]
    rows[7]["text"] = " ".join(row["text"] for row in labelled_rows[:9])
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError, match=r"1 of 260 texts are longer .*rows.jsonl, line 8, has \d+\): set labels.on_long"
    ):
        finetune(make(labels={"train": [str(data)]}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_unlabelled_row_is_refused_and_nothing_is_written_over(make, labelled_rows, write_rows, tmp_path):
    run = tmp_path / "run"
    data = write_rows(tmp_path / "rows.jsonl", labelled_rows)
    recipe = make(labels={"train": [str(data)], "baselines": False}, train={"steps": 4})
    finetune(recipe, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    write_rows(data, [*labelled_rows, {"text": "one more", "label": None}])
    with pytest.raises(UserError, match=r"rows.jsonl, line 261: unlabelled row"):
        finetune(recipe, run)
    write_rows(data, labelled_rows[:200])
    with pytest.raises(UserError, match=r"labels.json of the data is not what"):
        finetune(recipe, run)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"labels": {"budget": 1}}, "labels.budget = 1"),
        ({"labels": {"validation_fraction": 1.0}}, "labels.validation_fraction = 1.0"),
        ({"labels": {"classes": ["a", "a"]}}, "'a' is there twice"),
        ({"labels": {"weights": [1.0, 2.0]}}, "labels.weights: needs labels.classes"),
        ({"labels": {"weights": [1.0, -2.0], "classes": ["a", "b"]}}, "must not be negative"),
        ({"labels": {"split_field": "part"}}, "labels.split_field: with it"),
        ({"labels": {"train": "a.csv"}}, "expected a list"),
        ({"finetune": {"layer_decay": 0.0}}, "finetune.layer_decay = 0.0"),
        ({"finetune": {"layer_decay": 1.5}}, "finetune.layer_decay = 1.5"),
        ({"finetune": {"epochs": 0.0}}, "finetune.epochs = 0.0"),
    ],
)
def test_recipes_that_cannot_be_run(make, sections, message):
    with pytest.raises(RecipeError, match=message):
        make(**sections)


def test_a_causal_run_is_a_checkpoint_to_begin_with(make, recipe, tmp_path):
    pretrain(recipe(train={"steps": 2}, evaluation={"every": 0}), tmp_path / "causal")
    initial = {"path": str(tmp_path / "causal"), "pooling": "none", "classifier_head": "none", "dropout": "none"}
    _, result = finetune(
        make(initial=initial, labels={"baselines": False, "on_long": "truncate"}, train={"steps": 4}), tmp_path / "run"
    )
    assert result is not None
    classifier = load_classifier(tmp_path / "run")
    assert classifier.model.config.causal
    assert classifier.model.config.pooling == "last"
    assert classifier.encode.frame.before == ()
    assert len(classifier.encode.frame.after) == 1


@pytest.mark.slow
def test_two_processes_train_what_one_does(make, tmp_path):
    recipe = make(
        initial={"dropout": 0.0}, labels={"baselines": False, "class_weights": "balanced"}, train={"micro_batch": 3}
    )
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "hotloop.engine",
    ]
    arguments = ["finetune", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "two")]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    finetune(recipe, tmp_path / "one")
    for one, two in zip(numbers(tmp_path / "one"), numbers(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-5)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "two")]
    assert results[0]["test"]["loss"] == pytest.approx(results[1]["test"]["loss"], rel=1e-3)
