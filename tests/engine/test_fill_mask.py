"""`hotloop fill-mask`, and `hotloop eval` of masked runs: what they print and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hotloop.engine.commands.main import BAD_INPUT, main
from hotloop.engine.config import Recipe
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.errors import UserError
from hotloop.engine.fill_mask import MaskedModel
from hotloop.engine.recipe import from_dict
from hotloop.engine.train.pretrain import pretrain

SENTENCES = ["the loss falls with every step", "the model learns from the data", "a batch scales with the model"]


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def run(request, tmp_path_factory) -> Path:
    """A masked run that has learnt three sentences."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "documents").mkdir()
    for i in range(60):
        (folder / "documents" / f"{i}.txt").write_text(SENTENCES[i % 3] + f" {i}")
    prepare(
        [folder / "documents"], folder / "corpus",
        PrepareConfig(kind=request.param, vocab_size=330, special="masked", validation_fraction=0.1),
    )  # fmt: skip
    values = {
        "objective": "masked",
        "data": {"path": str(folder / "corpus"), "workers": 0},
        "model": {
            "context": 16, "n_layers": 2, "d_model": 64, "n_heads": 4, "norm": "layer", "activation": "geglu",
            "embedding_norm": True, "head": "masked", "causal": False,
        },
        "masking": {"rate": 0.3},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.0},
        "schedule": {"warmup_steps": 20},
        "train": {"steps": 250, "global_batch": 16, "micro_batch": 16, "precision": "fp32", "device": "cpu"},
        "evaluation": {"every": 250},
        "log": {"every": 60, "tensorboard": False},
    }  # fmt: skip
    pretrain(from_dict(Recipe, values), folder / "run")
    torch.set_num_threads(threads)
    return folder / "run"


def test_masks_are_filled_with_what_was_learnt(run):
    masked = MaskedModel.load(run)
    first, second = masked.fill("the loss [MASK] with every [MASK] 7", top=3)
    assert [first[0].token.strip(), second[0].token.strip()] == ["falls", "step"]
    assert len(first) == 3
    assert first[0].probability > 0.5
    assert first[0].probability > first[1].probability > first[2].probability
    (everything,) = masked.fill("the loss [MASK] with every step 7", top=10_000)
    assert len(everything) == len(masked.vocabulary.ordinary), "special tokens are left out"
    assert 0.99 < sum(one.probability for one in everything) <= 1.0001


def test_the_probabilities_are_those_of_the_framed_text(run):
    """Against tokens put together by hand."""
    masked = MaskedModel.load(run)
    vocabulary, tokenizer = masked.vocabulary, masked.tokenizer
    whole = tokenizer.encode("the model learns from the data", add_special_tokens=False)
    at = next(i for i, token in enumerate(whole.tokens) if "learns" in token)
    tokens = [vocabulary.first, *whole.ids, vocabulary.last]
    tokens[at + 1] = vocabulary.mask
    expected = masked.model.logits(torch.tensor([tokens]))[0, at + 1].softmax(-1)
    (found,) = masked.fill("the model [MASK] from the data")
    assert all(one.probability == pytest.approx(expected[one.id].item(), rel=1e-5) for one in found)


def test_fill_mask_prints_a_line_a_token(run, capsys):
    assert main(["fill-mask", str(run), "the [MASK] falls with [MASK] step", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "--- [MASK] 1 of 2 ---"
    assert lines[1].split()[1] == "loss"
    assert len(lines) == 6
    assert main(["fill-mask", str(run), "the [MASK] falls with every step 7", "--json"]) == 0
    ((best, *rest),) = json.loads(capsys.readouterr().out)
    assert best["token"].strip() == "loss"
    assert len(rest) == 4


def test_eval_of_a_masked_run(run, capsys):
    assert main(["eval", str(run)]) == 0
    assert "pseudo-perplexity" in capsys.readouterr().out
    assert main(["eval", str(run), "--exact", "--max-bytes", "200", "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert exact["exact"] is True
    assert exact["bytes"] <= 200
    assert main(["eval", str(run), "--json"]) == 0
    sampled = json.loads(capsys.readouterr().out)
    assert sampled["tokens"] < sampled["bytes"]
    assert main(["eval", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**sampled, "seconds": 0}


def test_an_exported_model_fills_masks_as_its_run_does(run, tmp_path):
    assert main(["export", str(run), "--out", str(tmp_path / "exported")]) == 0
    text = "the [MASK] falls with every [MASK]"
    for here, there in zip(
        MaskedModel.load(run).fill(text), MaskedModel.load(tmp_path / "exported").fill(text), strict=True
    ):
        assert [one.id for one in here] == [one.id for one in there]
        assert [one.probability for one in here] == pytest.approx([one.probability for one in there], rel=1e-5)
    encoder = json.loads((tmp_path / "exported" / "config.json").read_text())
    encoder["architectures"] = ["ModernBertModel"]
    (tmp_path / "exported" / "config.json").write_text(json.dumps(encoder))
    with pytest.raises(UserError, match="no head for masked language modelling"):
        MaskedModel.load(tmp_path / "exported")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["fill-mask", "RUN", "no gap in it"], "has no [MASK]"),
        (["fill-mask", "RUN", "[MASK] " + "the loss " * 20], "the model reads 16: shorten it"),
        (["fill-mask", "RUN", "[MASK]", "--top", "0"], "--top 0: must be at least 1"),
        (["generate", "RUN"], "objective 'masked', not to continue text; use `hotloop fill-mask`"),
        (["eval", "RUN", "--stride", "4"], "--stride 4: not for a masked run"),
        (["fill-mask", "nowhere", "[MASK]"], "nowhere is not a run of hotloop"),
    ],
)
def test_what_is_refused(run, capsys, command, words):
    assert main([str(run) if part == "RUN" else part for part in command]) == BAD_INPUT
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1
    assert not said.out


def test_a_causal_run_fills_no_masks(corpus, recipe, tmp_path, capsys):
    pretrain(recipe(train={"steps": 1}, evaluation={"every": 0}), tmp_path / "run")
    assert main(["fill-mask", str(tmp_path / "run"), "[MASK]"]) == BAD_INPUT
    assert "objective 'causal', not to fill masks; use `hotloop generate`" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), "--exact"]) == BAD_INPUT
    assert "--exact: only for a masked run" in capsys.readouterr().err
