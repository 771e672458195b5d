"""Continued pretraining: from a checkpoint, on several corpora by weight, and what it forgets of general text."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hotloop.engine.checkpointed import load_run
from hotloop.engine.config import Recipe
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.errors import UserError
from hotloop.engine.recipe import check, from_dict, load_recipe, to_toml
from hotloop.engine.report import write_report
from hotloop.engine.tasks.causal import CausalPlan
from hotloop.engine.tasks.masked import MaskedPlan
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.pretrain import pretrain

PLANS = {"causal": CausalPlan, "masked": MaskedPlan}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, make_documents) -> Path:
    """Corpora `general` and `own` of one tokenizer, and `other` of another."""
    root = tmp_path_factory.mktemp("corpora")
    make_documents(root / "documents", 40)
    own = root / "own-documents"
    own.mkdir()
    for i in range(30):
        (own / f"{i}.txt").write_text(f"falls scales adds learns {i} " * (i + 4))
    settings = {"validation_fraction": 0.2, "vocab_size": 300}
    prepare([root / "documents"], root / "general", PrepareConfig(special="masked", **settings))
    prepare([own], root / "own", PrepareConfig(tokenizer=root / "general", validation_fraction=0.2))
    prepare([own], root / "other", PrepareConfig(special="masked", **settings))
    return root


def make(corpora: Path, objective: str, **sections) -> Recipe:
    values = {
        "objective": objective,
        "data": {"path": str(corpora / "general"), "workers": 0},
        "train": {"steps": 12, "global_batch": 8, "micro_batch": 8, "precision": "fp32", "device": "cpu"},
        "optimizer": {"lr": 5e-3},
        "schedule": {"warmup_steps": 2},
        "evaluation": {"every": 6, "max_bytes": 4000},
        "checkpoint": {"every": 6},
        "log": {"every": 6, "tensorboard": False},
    }
    for name, fields in sections.items():
        values[name] = {**values.get(name, {}), **fields}
    recipe = from_dict(Recipe, values)
    check(recipe)
    return recipe


@pytest.fixture(scope="module", params=["causal", "masked"])
def first(request, corpora, tmp_path_factory) -> tuple[str, Path]:
    """(objective, a run on general text)"""
    folder = tmp_path_factory.mktemp("first") / "run"
    model = {"context": 32, "n_layers": 2, "d_model": 32, "n_heads": 4, "causal": request.param == "causal"}
    if request.param == "masked":
        model["head"] = "masked"
    pretrain(make(corpora, request.param, model=model, train={"steps": 60}, evaluation={"every": 60}), folder)
    return request.param, folder


def continued(corpora: Path, first: tuple[str, Path], **sections) -> Recipe:
    objective, run = first
    own, general = str(corpora / "own"), str(corpora / "general")
    data = {"path": own, "general": general, **sections.pop("data", {})}
    initial = {"path": str(run), **sections.pop("initial", {})}
    return make(corpora, objective, data=data, initial=initial, **sections)


def mixed(corpora: Path, share: float) -> list[dict]:
    return [
        {"path": str(corpora / "own"), "weight": 1 - share},
        {"path": str(corpora / "general"), "weight": share},
    ]


def test_what_is_forgotten_is_in_metrics_and_report(corpora, first, tmp_path):
    recipe = continued(corpora, first, train={"steps": 18})
    assert pretrain(recipe, tmp_path / "run").reason == "finished"
    judged = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "eval"]
    assert [line["step"] for line in judged] == [0, 6, 12, 18]
    own, general = ([line[name] for line in judged] for name in ("loss", "general_loss"))
    assert own[-1] < own[0], "it learns its own documents"
    assert general[-1] > general[0], "and, without replay, forgets the general text"
    before = [line for line in read_metrics(first[1] / "metrics.jsonl") if line["kind"] == "eval"][-1]
    assert general[0] == pytest.approx(before["loss"], rel=1e-6), "it begins with the checkpoint's weights"

    report = write_report(tmp_path / "run")
    assert report["forgetting"]["before"] == general[0]
    assert report["forgetting"]["difference"] == pytest.approx(general[-1] - general[0])
    assert report["forgetting"]["steps"] == [0, 6, 12, 18]
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What is forgotten" in page
    assert f"{general[-1]:.3f}" in page
    assert ("Hidden tokens of held-out text" in page) == (first[0] == "masked")


def test_replayed_general_text_is_forgotten_less(corpora, first, tmp_path):
    lost = []
    for share in (None, 0.5):
        data = {} if share is None else {"sources": mixed(corpora, share)}
        pretrain(continued(corpora, first, data=data, train={"steps": 48}), tmp_path / str(share))
        lines = read_metrics(tmp_path / str(share) / "metrics.jsonl")
        general = [line["general_loss"] for line in lines if line["kind"] == "eval"]
        lost.append(general[-1] - general[0])
    assert lost[1] < lost[0]


def test_sources_are_mixed_by_weight(corpora, first):
    recipe = continued(corpora, first, data={"path": "", "sources": mixed(corpora, 0.25)})
    plan = PLANS[first[0]](recipe)
    resolved = plan.resolve(recipe)
    assert resolved.data.path == str(corpora / "own"), "the first source's held-out documents judge"
    source = plan.task(resolved).source
    share = np.mean(np.concatenate([source.order.samples(step)[0] for step in range(100)]))
    assert abs(share - 0.25) < 0.01
    assert "own 75%" in plan.task(resolved).describe()
    assert "general 25%" in plan.task(resolved).describe()
    assert len([name for name in plan.files if name.startswith("corpus")]) == 2
    assert "initial.json" in plan.files


def test_sources_in_a_recipe(tmp_path, corpora, first):
    recipe = continued(corpora, first, data={"sources": mixed(corpora, 0.25)})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "r.toml") == recipe
    for text, words in (
        ('[[data.sources]]\npath = "x"\nweight = 0\n', "data.sources[0].weight = 0.0: must be greater than 0"),
        ("[[data.sources]]\nweight = 1\n", "data.sources[0].path is not set"),
        ('[data]\nsources = "x"\n', "expected a list"),
        ('[[data.sources]]\nfolder = "x"\n', "unknown field 'folder'"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(UserError) as refused:
            load_recipe(tmp_path / "bad.toml")
        assert words in str(refused.value)


def test_a_mixed_run_resumes_bit_for_bit(corpora, first, tmp_path):
    recipe = continued(corpora, first, data={"sources": mixed(corpora, 0.5)}, initial={"dropout": 0.1})
    pretrain(recipe, tmp_path / "whole")
    calls = 0

    class Killed(BaseException):
        pass

    def fault(point: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise Killed

    with pytest.raises(Killed):
        pretrain(recipe, tmp_path / "cut", fault=fault)
    pretrain(recipe, tmp_path / "cut")
    a, b = (load_run(tmp_path / name, device="cpu").model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_changed_checkpoint_is_not_resumed_from(corpora, first, tmp_path):
    recipe = continued(corpora, first)
    pretrain(recipe, tmp_path / "run")
    named = tmp_path / "run" / "initial.json"
    named.write_text(json.dumps({**json.loads(named.read_text()), "fingerprint": "0"}))
    with pytest.raises(UserError, match=r"initial\.json of the data is not what"):
        pretrain(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"data": {"path": "OTHER"}},
            [r"other was prepared with another tokenizer than the checkpoint", "hotloop prepare .*--tokenizer .*run"],
        ),
        ({"data": {"general": "OTHER"}}, [r"other was prepared with another tokenizer"]),
        ({"model": {"d_model": 48}}, ["model.d_model = 48: with initial.path the model is the checkpoint's"]),
        ({"data": {"context": 64}}, ["data.context = 64: longer than that of .*32"]),
        ({"initial": {"path": "nowhere"}}, ["nowhere"]),
        ({"evaluation": {"every": 0}}, ["data.general: needs evaluation.every > 0"]),
    ],
)
def test_what_cannot_be_continued_is_refused(corpora, first, tmp_path, sections, words):
    sections = {
        name: {k: str(corpora / "other") if v == "OTHER" else v for k, v in fields.items()}
        for name, fields in sections.items()
    }
    recipe = continued(corpora, first, **sections)
    for word in words:
        with pytest.raises(UserError, match=word):
            pretrain(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_other_objective_is_refused(corpora, first, tmp_path):
    objective, _ = first
    other = replace(continued(corpora, first), objective="masked" if objective == "causal" else "causal")
    with pytest.raises(UserError, match="causal"):
        pretrain(other, tmp_path / "run")


def test_a_general_corpus_that_holds_nothing_out_is_refused(corpora, first, tmp_path):
    documents = corpora / "own-documents"
    prepare([documents], tmp_path / "all", PrepareConfig(tokenizer=corpora / "general", validation_fraction=0))
    with pytest.raises(UserError, match=r"data.general: .*all has no validation split.*--validation-fraction"):
        pretrain(continued(corpora, first, data={"general": str(tmp_path / "all")}), tmp_path / "run")
