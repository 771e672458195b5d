"""A small corpus and a small recipe for the tests that train."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from hotloop.engine.config import Recipe
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.recipe import check, from_dict

WORDS = ["the", "a", "loss", "token", "model", "step", "gradient", "batch", "data", "learns", "adds", "scales", "falls"]


@pytest.fixture(scope="session", autouse=True)
def threads_at_first() -> int:
    import torch

    return torch.get_num_threads()


@pytest.fixture(scope="module", autouse=True)
def threads(threads_at_first: int):
    """`train.threads` is of the whole process: every module begins with what the first one had."""
    import torch

    torch.set_num_threads(threads_at_first)
    yield
    torch.set_num_threads(threads_at_first)


def write_documents(folder: Path, n: int, seed: int = 0) -> Path:
    """Sentences of few words, unlike each other: every other document is of a line, the rest of up to 400 words."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    for i in range(n):
        words = [draw.choice(WORDS) for _ in range(draw.randint(3, 12 if i % 2 else 400))]
        (folder / f"{i:03}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus of 60 documents with a vocabulary of 300."""
    root = tmp_path_factory.mktemp("corpus")
    prepare(
        [write_documents(root / "documents", 60)],
        root / "shards",
        PrepareConfig(vocab_size=300, validation_fraction=0.2),
    )
    return root / "shards"


@pytest.fixture(scope="session")
def make_documents():
    return write_documents


@pytest.fixture
def recipe(corpus: Path):
    """recipe(**sections) -> a tiny fp32 run; sections override fields."""

    def make(**sections: dict) -> Recipe:
        values: dict = {
            "data": {"path": str(corpus), "workers": 0},
            "model": {"context": 32, "n_layers": 2, "d_model": 32, "n_heads": 4},
            "train": {"steps": 12, "global_batch": 8, "micro_batch": 8, "precision": "fp32", "device": "cpu"},
            "schedule": {"warmup_steps": 2},
            "evaluation": {"every": 6, "max_bytes": 4000},
            "checkpoint": {"every": 4},
            "log": {"every": 1, "tensorboard": False},
        }
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        made = from_dict(Recipe, values)
        check(made)
        return made

    return make


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `transformers` folder of a random encoder of 2 layers x 32 and a vocabulary of about 200."""
    import torch
    from transformers import BertConfig, BertModel

    from hotloop.engine.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny-bert")
    draw = random.Random(0)
    texts = [" ".join(draw.choice(WORDS + SENTIMENTS) for _ in range(50)) for _ in range(20)]
    (folder / "tokenizer.json").write_text(train_tokenizer(texts, "wordpiece", 200), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


SENTIMENTS = ["good", "fine", "bright", "bad", "poor", "dull", "red", "blue"]


@pytest.fixture(scope="session")
def labelled_rows() -> list[dict]:
    """260 texts of up to 12 words, two of them telling: positive, negative, or neither (neutral); no text twice."""
    draw = random.Random(0)
    telling = {"positive": SENTIMENTS[:3], "negative": SENTIMENTS[3:6], "neutral": SENTIMENTS[6:]}
    rows: dict[str, dict] = {}
    while len(rows) < 260:
        label = draw.choice(sorted(telling))
        words = [draw.choice(WORDS) for _ in range(draw.randint(2, 10))] + draw.choices(telling[label], k=2)
        draw.shuffle(words)
        rows.setdefault(" ".join(words), {"id": len(rows), "text": " ".join(words), "label": label})
    return list(rows.values())


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict]], Path]:
    """write_rows(path, rows): a JSONL file."""

    def write(path: Path, rows: list[dict]) -> Path:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def make(tiny_bert, labelled_rows, write_rows, tmp_path_factory) -> Callable[..., Recipe]:
    """make(**sections) -> a run of 12 steps; sections override fields."""
    data = write_rows(tmp_path_factory.mktemp("labelled") / "rows.jsonl", labelled_rows)

    def make(**sections: dict) -> Recipe:
        values: dict = {
            "objective": "classification",
            "initial": {"path": str(tiny_bert), "pooling": "mean", "classifier_head": "linear", "dropout": 0.1},
            "labels": {"train": [str(data)], "budget": 120, "validation_fraction": 0.2},
            "data": {"workers": 0},
            "optimizer": {"lr": 3e-3, "beta2": 0.98},
            "train": {
                "steps": 12,
                "global_batch": 12,
                "micro_batch": 12,
                "precision": "fp32",
                "device": "cpu",
                "threads": 1,
            },
            "evaluation": {"every": 4},
            "checkpoint": {"every": 4},
            "log": {"every": 100, "tensorboard": False},
        }
        for name, fields in sections.items():
            values[name] = {**values.get(name, {}), **fields}
        made = from_dict(Recipe, values)
        check(made)
        return made

    return make


@pytest.fixture(scope="session")
def trained(make, tmp_path_factory) -> Path:
    """A run that has learnt the words that tell."""
    from hotloop.engine.train.finetune import finetune

    folder = tmp_path_factory.mktemp("runs") / "trained"
    outcome, result = finetune(make(train={"steps": 120}, evaluation={"every": 20}, checkpoint={"every": 20}), folder)
    assert outcome.reason == "finished"
    assert result is not None
    return folder
