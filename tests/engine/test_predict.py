"""`hotloop predict` and `eval` of labelled files with a tuned classifier, and what the verbs refuse."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from hotloop.engine.classifier import load_classifier
from hotloop.engine.commands.main import main
from hotloop.engine.errors import UserError
from hotloop.engine.recipe import to_toml
from hotloop.engine.train.finetune import finetune
from hotloop.engine.train.pretrain import pretrain


def test_predictions_keep_order_and_columns_in_every_format(trained, labelled_rows, write_rows, tmp_path, capsys):
    data = write_rows(tmp_path / "in.jsonl", labelled_rows)
    outputs = {}
    for kind in ("csv", "jsonl", "parquet"):
        out = tmp_path / f"out.{kind}"
        assert main(["predict", str(trained), str(data), "--out", str(out)]) == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8") as file:
        outputs["csv"] = list(csv.DictReader(file))
    outputs["parquet"] = pq.read_table(tmp_path / "out.parquet").to_pylist()
    outputs["jsonl"] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for kind, rows in outputs.items():
        assert [str(row["id"]) for row in rows] == [str(row["id"]) for row in labelled_rows], kind
        assert [row["label"] for row in rows] == [row["label"] for row in labelled_rows]
        assert [row["text"] for row in rows] == [row["text"] for row in labelled_rows]
        assert [row["predicted"] for row in rows] == [row["predicted"] for row in outputs["jsonl"]]
        for row, other in zip(rows, outputs["jsonl"], strict=True):
            p = other["probabilities"]
            found = p if kind == "jsonl" else {name: float(row[f"probability_{name}"]) for name in p}
            assert found == pytest.approx(p, abs=1e-6)
            assert sum(p.values()) == pytest.approx(1, abs=3e-6)
            assert max(p, key=p.__getitem__) == row["predicted"]
    hits = sum(row["predicted"] == row["label"] for row in outputs["jsonl"])
    capsys.readouterr()
    assert main(["eval", str(trained), "--labelled", str(data), "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert measured["accuracy"] == pytest.approx(hits / len(labelled_rows))
    assert measured["examples"] == len(labelled_rows)
    assert main(["eval", str(trained), "--labelled", str(data)]) == 0
    table = capsys.readouterr().out
    assert f"accuracy {measured['accuracy']:.4f}" in table
    assert [line.split()[0] for line in table.splitlines()[2:]] == ["negative", "neutral", "positive"]


def test_a_prediction_does_not_depend_on_its_neighbours(trained, labelled_rows):
    classifier = load_classifier(trained)
    texts = [row["text"] for row in labelled_rows[:40]]
    together = classifier.probabilities(texts, texts)
    alone = np.concatenate([classifier.probabilities([text], [text]) for text in texts])
    assert np.abs(together - alone).max() < 1e-5


def test_windows_are_averaged(trained, labelled_rows):
    long = " ".join(row["text"] for row in labelled_rows[:6])
    with pytest.raises(UserError, match="longer than the model"):
        load_classifier(trained).probabilities([long], ["here"])
    windowed = load_classifier(trained, on_long="window")
    ids = windowed.encode([long], ["here"])
    assert ids.first[1] > 2
    decode = windowed.encode.tokenizer.decode
    windows = [decode(ids.tokens[a + 1 : b - 1].tolist()) for a, b in zip(ids.bounds, ids.bounds[1:], strict=False)]
    by_hand = windowed.probabilities(windows, windows).mean(0)
    assert windowed.probabilities([long], ["here"])[0] == pytest.approx(by_hand, abs=1e-5)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(trained, labelled_rows, tmp_path):
    """8,000 rows of 4 KB each: the peak is that of 2,000."""
    program = (
        "import resource, sys; from hotloop.engine.commands.main import main; "
        "assert main(sys.argv[1:]) == 0; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )

    def peak(n: int) -> int:
        data, out = tmp_path / f"{n}.csv", tmp_path / f"{n}-out.csv"
        with open(data, "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "note"])
            for i in range(n):
                rows.writerow([labelled_rows[i % 50]["text"], "x" * 4000])
        command = [sys.executable, "-c", program, "predict", str(trained), str(data), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert out.read_text().count("\n") == n + 1
        return int(done.stdout.splitlines()[-1])  # KiB

    assert peak(8_000) - peak(2_000) < 12 * 1024


def test_verbs_refuse_runs_of_another_kind(make, trained, corpus, recipe, write_rows, tmp_path, capsys):
    (tmp_path / "labels.toml").write_text(to_toml(make()))
    (tmp_path / "causal.toml").write_text(to_toml(recipe()))
    pretrain(recipe(train={"steps": 1}, evaluation={"every": 0}), tmp_path / "causal")
    table = write_rows(tmp_path / "rows.jsonl", [{"text": "good", "label": "positive"}])
    (tmp_path / "exists.csv").write_text("mine")
    capsys.readouterr()
    for arguments, message in (
        (["pretrain", "labels.toml", "--out", "new"], "use `hotloop finetune`"),
        (["finetune", "causal.toml", "--out", "new"], "finetune takes a recipe of objective 'classification'"),
        (["predict", "causal", str(table), "--out", "o.csv"], "is not a classifier"),
        (["eval", "causal", "--labelled", str(table)], "is not a classifier"),
        (["generate", str(trained), "--prompt", "x"], "is a classifier: use `hotloop predict`"),
        (["eval", str(trained)], "is a classifier: give files of labelled texts with --labelled"),
        (["predict", str(trained), str(table), "--out", "exists.csv"], "exists.csv exists"),
        (["predict", str(trained), str(table), "--out", "o.txt"], "files of kind '.txt' are not written"),
        (["predict", str(trained), str(table), "--out", "no/o.csv"], "no such folder"),
        (
            ["predict", str(trained), str(table), "--out", "o.csv", "--text-field", "body"],
            "no field 'body' (--text-field)",
        ),
        (["predict", str(trained), "absent.csv", "--out", "o.csv"], "absent.csv: no such file"),
    ):
        done = run_in(tmp_path, arguments, capsys)
        assert done[0] == 2, arguments
        assert message in done[1], arguments
        assert done[1].count("\n") == 1
    assert (tmp_path / "exists.csv").read_text() == "mine"
    assert not list(tmp_path.glob("*o.csv"))
    assert not (tmp_path / "new").exists()


def run_in(folder: Path, arguments: list[str], capsys) -> tuple[int, str]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        return main(arguments), capsys.readouterr().err
    finally:
        os.chdir(before)


def test_an_output_is_whole_or_absent(trained, write_rows, tmp_path):
    rows = [{"text": "good", "n": 1}] * 1500 + [{"text": "bad", "n": 1, "extra": 2}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError, match=r"line 1501: field 'extra' is not among the first row's"):
        raise_from_main(["predict", str(trained), str(data), "--out", str(tmp_path / "out.csv")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert main(["predict", str(trained), str(data), "--out", str(tmp_path / "out.jsonl")]) == 0
    data.write_text('{"text": "good", "predicted": "x"}\n')
    with pytest.raises(UserError, match="has a field 'predicted' already"):
        raise_from_main(["predict", str(trained), str(data), "--out", str(tmp_path / "new.jsonl")])


def raise_from_main(arguments: list[str]) -> None:
    from hotloop.engine.commands.main import run

    run(arguments)


def test_the_judged_checkpoint_serves_and_is_exported(make, labelled_rows, tmp_path):
    """By default: the best on validation; the last of a run that was never validated."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    finetune(make(evaluation={"every": 0}, train={"steps": 3}, labels={"baselines": False}), tmp_path / "unjudged")
    assert load_classifier(tmp_path / "unjudged").step == 3
    bert = {"pooling": "cls", "classifier_head": "bert"}  # as `transformers` has a classifier of this family
    worse = {"kind": "constant", "warmup_steps": 24}  # up to a rate at which nothing is learnt
    _, result = finetune(
        make(
            initial=bert,
            train={"steps": 24},
            optimizer={"lr": 0.2},
            schedule=worse,
            labels={"baselines": False, "best": "loss"},
        ),
        tmp_path / "run",
    )
    assert result is not None
    assert result["step"] < 24
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]) == 0
    classifier = load_classifier(tmp_path / "run")
    assert classifier.step == result["step"]
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert [theirs.config.id2label[i] for i in range(3)] == list(classifier.classes)
    texts = [row["text"] for row in labelled_rows[:10]]
    with torch.no_grad():
        found = theirs(**tokenizer(texts, return_tensors="pt", padding=True)).logits.softmax(-1).numpy()
    assert np.abs(found - classifier.probabilities(texts, texts)).max() < 1e-5
