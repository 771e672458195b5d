"""Labelled rows: every bad one is named, no text is in two splits, draws are stratified and repeatable."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hotloop.engine.config import LabelsConfig
from hotloop.engine.data.labelled import read_examples, read_labelled, stratified_order
from hotloop.engine.data.rows import read_rows
from hotloop.engine.errors import UserError


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(n: int, share: float = 0.25, prefix: str = "text") -> list[dict]:
    return [{"text": f"{prefix} {i}", "label": "rare" if i < share * n else "common"} for i in range(n)]


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl", "jsonl.zst", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path, kind):
    rows = [
        {"text": 'a "quoted"\nline', "label": "x"},
        {"text": "naïve, 二", "label": "y"},
        {"text": "c", "label": "x"},
    ]
    path = tmp_path / f"rows.{kind}"
    csv_text = 'text,label\n"a ""quoted""\nline",x\n"naïve, 二",y\nc,x\n'.encode("utf-8-sig")
    if kind == "csv":
        path.write_bytes(csv_text)
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(csv_text))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = "".join(json.dumps(row) + "\n\n" for row in rows).encode()
        path.write_bytes(pa.compress(data, codec="zstd", asbytes=True) if kind.endswith("zst") else data)
    found = list(read_rows([path]))
    assert [row.values for row in found] == rows
    places = {"csv": ["line 2", "line 4", "line 5"], "json": ["line 1", "line 3", "line 5"]}
    assert [row.place for row in found] == places.get(kind[:3], places.get(kind[:4], ["row 1", "row 2", "row 3"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": "b"}\n', "line 2: no field 'label'"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n', "line 2: unlabelled row"),
        ('{"text": "a", "label": "x"}\n{"text": "b", "label": ""}\n', "line 2: unlabelled row"),
        ('{"text": "a", "label": 0.5}\n', "line 1: field 'label' holds float"),
        ('{"text": "a", "label": ["x"]}\n', "line 1: .*multi_label"),
        ('{"text": " ", "label": "x"}\n', "line 1: empty text"),
        ('{"text": 3, "label": "x"}\n', "line 1: field 'text' holds int"),
        ('{"text": "a", "label": "x"}\n{"text": \n', "line 2: malformed JSON"),
        ('["a"]\n', "line 1: expected a JSON object, got list"),
        ("", "no row in the file"),
    ],
)
def test_a_bad_row_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_labelled(LabelsConfig(train=(str(path),)))
    assert "bad.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\na,x\nb\n", "line 3: 1 fields where the header has 2"),
        (b'text,label\n"a,x\n', "line 2: malformed row"),
        (b"text,text\na,x\n", "line 1: the header has 'text' twice"),
        (b"text,label\na\xff,x\n", "line 2: invalid UTF-8 at byte 1"),
        (b"text,label\na\0,x\n", "line 2: binary data"),
        (b"text,label\na,\n", "line 2: unlabelled row"),
        (b"body,label\na,x\n", "line 2: no field 'text'.*'body', 'label'"),
    ],
)
def test_a_bad_csv_row_is_named(tmp_path, content, message):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"bad.csv, {message}"):
        read_labelled(LabelsConfig(train=(str(path),)))


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(UserError, match=r"notes.txt: files of kind '.txt' have no fields"):
        list(read_rows([tmp_path / "notes.txt"]))
    with pytest.raises(UserError, match="no table to read"):
        list(read_rows([tmp_path]))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"broken.parquet: cannot be read"):
        list(read_rows([tmp_path / "broken.parquet"]))
    with pytest.raises(UserError, match="no such file"):
        list(read_rows([tmp_path / "absent.csv"]))


def test_label_names_are_kept_and_ordered(tmp_path):
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([10, 9, True, "z", 9, 10, True, "z"] * 4)]
    data = read_labelled(LabelsConfig(train=(jsonl(tmp_path / "a.jsonl", rows),)))
    assert data.classes == ("10", "9", "true", "z")
    numbers = [row for row in rows if row["label"] in (9, 10) and row["label"] is not True]
    data = read_labelled(LabelsConfig(train=(jsonl(tmp_path / "b.jsonl", numbers),)))
    assert data.classes == ("9", "10")  # as numbers, not as letters


def test_a_label_outside_the_set_is_named(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", numbered(20))
    test = jsonl(tmp_path / "test.jsonl", [{"text": "new", "label": "rare"}, {"text": "newer", "label": "Rare"}])
    with pytest.raises(UserError, match=r"test.jsonl, line 2: label 'Rare' is outside the set of the training rows"):
        read_labelled(LabelsConfig(train=(train,), test=(test,)))
    with pytest.raises(UserError, match=r"train.jsonl, line 1: label 'rare' is outside the set of labels.classes"):
        read_labelled(LabelsConfig(train=(train,), classes=("common", "other")))
    with pytest.raises(UserError, match="outside the model's set"):
        read_examples([Path(test)], LabelsConfig(), ("rare", "common"))


def test_an_empty_class_and_a_single_class_are_refused(tmp_path):
    train = jsonl(tmp_path / "train.jsonl", numbered(20))
    with pytest.raises(UserError, match="class 'other' is empty, it has no training example among"):
        read_labelled(LabelsConfig(train=(train,), classes=("common", "rare", "other")))
    one = jsonl(tmp_path / "one.jsonl", numbered(20, share=0))
    with pytest.raises(UserError, match=r"1 class in the training rows \('common'\)"):
        read_labelled(LabelsConfig(train=(one,)))


def test_duplicates_across_given_splits_are_removed_from_the_earlier_use(tmp_path):
    train = jsonl(
        tmp_path / "train.jsonl",
        [*numbered(20), {"text": "Shared  text", "label": "rare"}, {"text": "text 1", "label": "common"}],
    )
    validation = jsonl(
        tmp_path / "v.jsonl", [{"text": "held", "label": "rare"}, {"text": "shared text ", "label": "rare"}]
    )
    test = jsonl(tmp_path / "t.jsonl", [{"text": "shared text", "label": "common"}, {"text": "other", "label": "rare"}])
    data = read_labelled(LabelsConfig(train=(train,), validation=(validation,), test=(test,)))
    assert data.test.texts == ["shared text", "other"]  # a given test split is never thinned
    assert data.validation.texts == ["held"]
    assert len(data.train) == 21  # its own copy of "text 1" stays: no other split has it
    assert data.counts.duplicates_across == 2
    assert data.counts.conflicts == 3  # the two labels of "shared text" that differ from the test's, and "text 1"
    assert "2 duplicates across splits removed; 3 texts with conflicting labels" in data.describe()


def test_drawn_splits_share_no_text_and_keep_proportions(tmp_path):
    rows = numbered(400)
    path = jsonl(tmp_path / "all.jsonl", [*rows, *rows[:50]])
    data = read_labelled(LabelsConfig(train=(path,), validation_fraction=0.25, test_fraction=0.2))
    assert data.counts.duplicates_within == 50
    texts = [text for examples in data.splits().values() for text in examples.texts]
    assert len(texts) == len(set(texts)) == 400
    assert {name: len(examples) for name, examples in data.splits().items()} == {
        "train": 240, "validation": 80, "test": 80,
    }  # fmt: skip
    for split in data.splits():
        n = data.class_counts(split)
        assert abs(n["rare"] / sum(n.values()) - 0.25) < 0.02, split
    again = read_labelled(LabelsConfig(train=(path,), validation_fraction=0.25, test_fraction=0.2))
    assert again.to_dict() == data.to_dict()
    other = read_labelled(LabelsConfig(train=(path,), validation_fraction=0.25, test_fraction=0.2, split_seed=1))
    assert set(other.test.texts) != set(data.test.texts)


def test_a_budget_leaves_the_rest_for_testing_and_larger_ones_hold_smaller_ones(tmp_path):
    path = jsonl(tmp_path / "all.jsonl", numbered(400))
    labelled = {}
    for budget in (20, 40, 100):
        data = read_labelled(LabelsConfig(train=(path,), budget=budget, validation_fraction=0.2))
        assert (len(data.train), len(data.validation)) == (round(0.8 * budget), round(0.2 * budget))
        assert len(data.test) == 400 - budget
        labelled[budget] = set(data.train.texts) | set(data.validation.texts)
    assert labelled[20] < labelled[40] < labelled[100]
    fixed = read_labelled(LabelsConfig(train=(path,), budget=100, test_fraction=0.25))
    assert len(fixed.test) == 100
    assert fixed.counts.unused == 200
    smaller = read_labelled(LabelsConfig(train=(path,), budget=50, test_fraction=0.25))
    assert smaller.test.texts == fixed.test.texts  # a curve over budgets has one test split
    with pytest.raises(UserError, match=r"labels.budget = 401: the files have 400"):
        read_labelled(LabelsConfig(train=(path,), budget=401))
    with pytest.raises(UserError, match="more than the 400 that there are"):
        read_labelled(LabelsConfig(train=(path,), budget=390, test_fraction=0.25))


def test_a_column_may_name_the_split(tmp_path):
    rows = [{**row, "part": ("train", "validation", "test")[i % 3]} for i, row in enumerate(numbered(30))]
    data = read_labelled(LabelsConfig(train=(jsonl(tmp_path / "a.jsonl", rows),), split_field="part"))
    assert [len(examples) for examples in data.splits().values()] == [10, 10, 10]
    rows[4]["part"] = "dev"
    with pytest.raises(UserError, match=r"line 5: part = 'dev': expected one of 'train', 'validation', 'test'"):
        read_labelled(LabelsConfig(train=(jsonl(tmp_path / "b.jsonl", rows),), split_field="part"))


def test_sets_of_labels(tmp_path):
    sets = [["a"], ["a", "b"], [], ["b"], ["a", "a"]] * 8
    rows = [{"text": f"t{i}", "label": one} for i, one in enumerate(sets)]
    data = read_labelled(LabelsConfig(train=(jsonl(tmp_path / "a.jsonl", rows),), multi_label=True))
    assert data.classes == ("a", "b")
    assert data.train.labels.dtype == np.float32
    by_text = {
        text: [name for name, bit in zip(data.classes, row, strict=True) if bit]
        for examples in data.splits().values()
        for text, row in zip(examples.texts, examples.labels, strict=True)
    }
    assert by_text == {f"t{i}": sorted(set(one)) for i, one in enumerate(sets)}
    lines = "".join(f't{i},"{";".join(one)}"\n' for i, one in enumerate(sets))
    (tmp_path / "a.csv").write_text("text,label\n" + lines)
    same = read_labelled(LabelsConfig(train=(str(tmp_path / "a.csv"),), multi_label=True, separator=";"))
    assert same.to_dict() == data.to_dict()


def test_every_prefix_of_the_order_is_stratified():
    strata = [("a",)] * 700 + [("b",)] * 250 + [("c",)] * 50
    for seed in range(5):
        order = stratified_order(strata, seed)
        assert sorted(order) == list(range(1000))
        for n in (40, 100, 333, 900):
            found = Counter(strata[i][0] for i in order[:n])
            for name, share in {"a": 0.7, "b": 0.25, "c": 0.05}.items():
                assert abs(found[name] - share * n) <= 2, (seed, n, name)
    assert not np.array_equal(stratified_order(strata, 0), stratified_order(strata, 1))


def test_singletons_are_drawn_anywhere():
    """Sets of labels that occur once must not all fall to one end of the order."""
    strata = [(str(i),) for i in range(400)]
    places = np.concatenate([np.flatnonzero(stratified_order(strata, seed) == 0) for seed in range(200)])
    assert 120 < places.mean() < 280
    assert places.std() > 80


def test_the_sentiment_example_reads_the_archive_inside_the_archive(tmp_path):
    script = Path(__file__).resolve().parents[2] / "examples" / "sentiment.py"
    snippets = "1\t2.5\tGood.\n2\t-0.6\tEffective but too tepid biopic\n3\t0.5\tSo so.\n4\t-0.4\tMeh.\n"
    inner = tarball({"hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt": snippets.encode()})
    archive, out = tmp_path / "vader.tar.gz", tmp_path / "data" / "reviews.jsonl"
    archive.write_bytes(tarball({"vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    subprocess.run([sys.executable, str(script), str(archive), str(out)], check=True, capture_output=True)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [
        {"id": 1, "text": "Good.", "label": "positive"},
        {"id": 2, "text": "Effective but too tepid biopic", "label": "negative"},
    ]
    again = subprocess.run([sys.executable, str(script), str(archive), str(out)], check=False, capture_output=True)
    assert again.returncode == 1
    assert b"exists" in again.stderr


def tarball(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()
