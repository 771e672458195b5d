"""`hotloop export`: what it writes, loaded by `transformers` as anybody would, gives our logits and our ids."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from hotloop.engine.checkpointed import load_run
from hotloop.engine.classifier import load_classifier
from hotloop.engine.commands.main import BAD_INPUT, main
from hotloop.engine.config import Recipe
from hotloop.engine.data.tokenizer import train_tokenizer
from hotloop.engine.initial import read_initial
from hotloop.engine.model import Transformer
from hotloop.engine.recipe import from_dict
from hotloop.engine.train.finetune import finetune
from hotloop.engine.train.pretrain import pretrain


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "LlamaForCausalLM"),
        ({"n_kv_heads": 2, "tied_head": False}, "LlamaForCausalLM"),
        ({"qk_norm": True}, "Qwen3ForCausalLM"),
        ({"positions": "learned", "norm": "layer", "activation": "gelu_tanh", "bias": True}, "GPT2LMHeadModel"),
    ],
)
def test_a_run(recipe, tmp_path, capsys, fields, name):
    pretrain(recipe(train={"steps": 2}, model=fields), tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert f"{name} (" in capsys.readouterr().out
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(peer).__name__ == name
    trained = load_run(tmp_path / "run", device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = Tokenizer.from_str((tmp_path / "run" / "tokenizer.json").read_text())
    ids = ours.encode("the model adds a token", add_special_tokens=False).ids
    assert tokenizer("the model adds a token")["input_ids"] == ids
    assert tokenizer.decode(ids) == "the model adds a token"
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == trained.end_id == peer.config.eos_token_id
    tokens = torch.tensor([[trained.end_id, *ids]])
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, trained.model.logits(tokens), rtol=0, atol=1e-5)


def test_a_classifier_that_was_tuned_here(tiny_bert, labelled_rows, tmp_path):
    """Its classes by name, its texts framed as in training, its probabilities."""
    rows = "".join(json.dumps(row) + "\n" for row in labelled_rows)
    (tmp_path / "rows.jsonl").write_text(rows)
    recipe = from_dict(
        Recipe,
        {
            "objective": "classification",
            "initial": {"path": str(tiny_bert)},  # its own pooler and classifier, which transformers has too
            "labels": {"train": [str(tmp_path / "rows.jsonl")], "budget": 120, "baselines": False},
            "train": {"steps": 2, "global_batch": 12, "micro_batch": 12, "precision": "fp32", "device": "cpu"},
            "log": {"tensorboard": False},
        },
    )
    finetune(recipe, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert peer.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}
    texts = [row["text"] for row in labelled_rows[:5]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(texts, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        found = peer(**batch).logits.softmax(-1)
    expected = load_classifier(tmp_path / "run", device="cpu").probabilities(texts, texts)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-5)


def checkpoint(folder, name: str, **changes: object) -> transformers.PreTrainedModel:
    kind = transformers.BertConfig if name.startswith("Bert") else transformers.ModernBertConfig
    special = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    torch.manual_seed(0)
    config = kind(
        vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, **special, **changes,
    )  # fmt: skip
    peer = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    peer.save_pretrained(folder)
    words = ["the model adds a token", "or a loss falls and the gradient scales", "data learns"]
    (folder / "tokenizer.json").write_text(train_tokenizer(words, "wordpiece", 100, "masked"))
    return peer.eval()


@pytest.mark.parametrize(
    ("name", "auto", "changes"),
    [
        ("BertForMaskedLM", "AutoModelForMaskedLM", {}),
        ("ModernBertForMaskedLM", "AutoModelForMaskedLM", {"local_attention": 8}),
        (
            "BertForSequenceClassification",
            "AutoModelForSequenceClassification",
            {
                "id2label": {0: "so", 1: "la", 2: "ti"},
                "problem_type": "multi_label_classification",
            },
        ),
        ("BertModel", "AutoModel", {}),
    ],
)
@torch.no_grad()
def test_a_checkpoint_goes_through(tmp_path, capsys, name, auto, changes):
    peer = checkpoint(tmp_path / "in", name, **changes)
    assert main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert f"{auto}.from_pretrained" in out
    assert ("pooler" in out) == (name == "BertModel")  # left out, and said so
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.cls_token, tokenizer.mask_token, tokenizer.model_max_length) == ("[CLS]", "[MASK]", 32)
    batch = tokenizer(["the model adds a token", "a loss"], padding=True, return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id == peer.config.cls_token_id
    again = getattr(transformers, auto).from_pretrained(tmp_path / "out").eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    torch.testing.assert_close(again(**inputs)[0], peer(**inputs)[0], rtol=0, atol=1e-5)
    if "id2label" in changes:
        assert again.config.problem_type == changes["problem_type"]
        assert again.config.id2label == changes["id2label"]
        assert read_initial(tmp_path / "out", n_labels=None).labels == ("so", "la", "ti")


def test_the_dtype_is_kept(tmp_path):
    peer = checkpoint(tmp_path / "in", "BertForMaskedLM")
    peer.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    main(["export", str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = Transformer(read_initial(tmp_path / "out").config)
    assert model.load_initial(read_initial(tmp_path / "out").state) == ()


def test_a_mixed_model_is_refused_with_the_reason_of_each_family(recipe, tmp_path, capsys):
    pretrain(recipe(train={"steps": 1}, model={"positions": "learned", "bias": True}), tmp_path / "run")
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == BAD_INPUT
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for reason in (
        "gpt2: norm = 'rms' (it has 'layer'), activation = 'swiglu' (it has 'gelu' or 'gelu_tanh')",
        "llama: positions = 'learned' (it has 'rotary'), bias = True (it has False)",
        "qwen2: ", "qwen3: ", "bert: ", "modernbert: causal = True (it has False)",
    ):  # fmt: skip
        assert reason in message
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == BAD_INPUT
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "new")]) == BAD_INPUT
