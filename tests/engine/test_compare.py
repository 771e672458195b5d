"""The comparison runs everything, on equal budgets, and counts it; what would not compare is refused at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w
import torch

from hotloop.engine.commands.compare import Compare
from hotloop.engine.compare import WAYS, compare, load_compare, summarize
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.errors import UserError

COMMON = {
    "train": {"steps": 2, "global_batch": 4, "micro_batch": 4, "precision": "fp32", "device": "cpu"},
    "evaluation": {"every": 2, "max_bytes": 2000},
    "checkpoint": {"every": 2},
    "log": {"every": 1, "tensorboard": False},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, tiny_bert, labelled_rows, make_documents):
    """recipes(**changes of a recipe by name) -> the path of a comparison's recipe."""
    folder = tmp_path_factory.mktemp("compare")
    prepare(
        [make_documents(folder / "documents", 20)], folder / "c",
        PrepareConfig(tokenizer=tiny_bert / "tokenizer.json", validation_fraction=0.2),
    )  # fmt: skip
    rows = "".join(json.dumps(row) + "\n" for row in labelled_rows)
    (folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    data, initial = {"path": str(folder / "c"), "workers": 0}, {"path": str(tiny_bert)}
    values = {
        "finetune": {
            "objective": "classification", "initial": {**initial, "pooling": "mean", "classifier_head": "linear"},
            "labels": {"train": [str(folder / "rows.jsonl")]}, **COMMON,
        },
        "continued": {
            "objective": "masked", "data": {**data, "general": str(folder / "c")}, "initial": initial, **COMMON,
        },
        "scratch": {
            "objective": "masked", "data": data,
            "model": {"context": 32, "n_layers": 1, "d_model": 32, "n_heads": 4, "causal": False, "head": "masked"},
            **COMMON,
        },
    }  # fmt: skip
    made = 0

    def write(top: dict | None = None, **changes: dict) -> Path:
        nonlocal made
        made += 1
        place = folder / f"recipes-{made}"
        place.mkdir()
        for name, recipe in values.items():
            changed = {section: {**recipe.get(section, {}), **fields} if isinstance(fields, dict) else fields
                       for section, fields in changes.get(name, {}).items()}  # fmt: skip
            (place / f"{name}.toml").write_text(tomli_w.dumps({**recipe, **changed}), encoding="utf-8")
        names = {name: f"{name}.toml" for name in values}
        comparison = {**names, "labels": [60, 120], "seeds": 3, "price_per_hour": 2.0, **(top or {})}
        (place / "compare.toml").write_text(tomli_w.dumps(comparison), encoding="utf-8")
        return place / "compare.toml"

    return write


def test_every_way_is_gone_and_counted(recipes, tmp_path, capsys):
    recipe, out = recipes(), tmp_path / "out"
    assert Compare(recipe, out)() == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    runs, summary = content["runs"], content["summary"]
    assert {(r["way"], r["seed"], r["labels"]) for r in runs} == {
        (way, seed, n) for way in WAYS for seed in range(3) for n in (60, 120)
    }
    assert [(line["labels"], line["way"]) for line in summary] == [(n, way) for n in (60, 120) for way in WAYS]
    for line in summary:
        own = [r for r in runs if (r["labels"], r["way"]) == (line["labels"], line["way"])]
        assert line["accuracy"]["mean"] == pytest.approx(sum(r["accuracy"] for r in own) / 3)
        assert line["cost"] == pytest.approx(2.0 * sum(r["hours"] for r in own) / 3)
        assert (line["points_over_general"] is None) == (line["way"] == "general")
        assert (line["forgetting"] is not None) == (line["way"] == "continued")
    for run in runs:
        assert (run["pretraining_hours"] > 0) == (run["way"] in ("continued", "scratch"))
        assert run["hours"] > run["pretraining_hours"]
        if run["folder"]:
            result = json.loads((out / run["folder"] / "result.json").read_text(encoding="utf-8"))
            assert result["test"]["accuracy"] == run["accuracy"]
    # The same splits on every way: the baseline of a seed is one, and so is its test split.
    for seed in range(3):
        tests = {
            json.dumps(json.loads((out / r["folder"] / "labels.json").read_text(encoding="utf-8"))["splits"])
            for r in runs
            if r["seed"] == seed and r["labels"] == 60 and r["folder"]
        }
        assert len(tests) == 1
    assert "60 labels" in printed
    assert all(way in printed.split("120 labels")[1] for way in WAYS)
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "Accuracy over labels" in html
    assert html.count("<svg") == 1
    # Again: everything is there already.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    assert Compare(recipe, out)() == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before
    assert json.loads((out / "compare.json").read_text(encoding="utf-8"))["runs"] == runs


def test_a_point_has_a_price_only_where_it_was_gained():
    def run(way: str, seed: int, accuracy: float, hours: float) -> dict:
        return {"way": way, "seed": seed, "labels": 100, "accuracy": accuracy, "macro_f1": accuracy, "hours": hours,
                "forgetting": None}  # fmt: skip

    accuracies = {"general": 0.70, "continued": 0.75, "scratch": 0.70, "tfidf": 0.60}
    noise = {"general": 0.0, "continued": 0.001, "scratch": 0.02, "tfidf": 0.001}
    hours = {"general": 1.0, "continued": 3.0, "scratch": 4.0, "tfidf": 0.0}
    runs = [run(way, seed, accuracies[way] + (seed - 1) * noise[way], hours[way]) for way in WAYS for seed in range(3)]
    from hotloop.engine.compare import CompareConfig

    found = {line["way"]: line for line in summarize(CompareConfig(price_per_hour=10.0), runs)}
    assert found["continued"]["points_over_general"]["mean"] == pytest.approx(5.0)
    assert found["continued"]["cost_per_point"] == pytest.approx((3.0 - 1.0) * 10.0 / 5.0)
    assert found["continued"]["cost"] == pytest.approx(30.0)
    assert [found[way]["cost_per_point"] for way in ("general", "scratch", "tfidf")] == [None] * 3


@pytest.mark.parametrize(
    ("top", "changes", "words"),
    [
        ({"seeds": 2}, {}, ["seeds = 2", "at least 3"]),
        ({"labels": [100, 50]}, {}, ["labels = [100, 50]", "ascend"]),
        ({"labels": [1000]}, {}, ["labels.budget = 1000"]),
        ({"scratch": ""}, {}, ["scratch is not set"]),
        ({"price": 1}, {}, ["unknown field 'price'", "price_per_hour"]),
        ({}, {"finetune": {"objective": "masked"}}, ["'masked'", "must be 'classification'"]),
        ({}, {"continued": {"initial": {"path": "elsewhere"}}}, ["elsewhere", "the general checkpoint"]),
        ({}, {"scratch": {"train": {"steps": 3}}}, ["256 tokens", "384", "budgets must be equal"]),
        ({}, {"scratch": {"model": {"context": 8}, "train": {"steps": 8}}}, ["longer than", "labels.on_long"]),
        ({}, {"scratch": {"objective": "classification"}}, ["scratch: objective = 'classification'"]),
        ({}, {"finetune": {"labels": {"baselines": False}}}, ["labels.baselines = false"]),
    ],
)  # fmt: skip
def test_what_would_not_compare_is_refused(recipes, top, changes, words):
    with pytest.raises(UserError) as refused:
        load_compare(recipes(top, **changes))
    assert all(word in str(refused.value) for word in words), refused.value


def test_a_folder_of_something_else_is_refused(recipes, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    config, loaded = load_compare(recipes())
    with pytest.raises(UserError, match="something else than a comparison"):
        compare(config, loaded, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}


def test_several_processes_are_refused(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config, loaded = load_compare(recipes())
    with pytest.raises(UserError, match="one process"):
        compare(config, loaded, tmp_path / "out")
