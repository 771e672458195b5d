"""What a run starts from: which heads, which special tokens, how a recipe asks for it, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from hotloop.engine.checkpointed import load_run
from hotloop.engine.config import InitialConfig, ModelConfig, Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.initial import initial_of, read_initial
from hotloop.engine.model import Transformer
from hotloop.engine.pretrained.special_tokens import SpecialTokens
from hotloop.engine.train.pretrain import pretrain

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "a", "b"]
SIZES = {
    "vocab_size": 70, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72,
    "max_position_embeddings": 32, "num_labels": 3, "pad_token_id": 0,
}  # fmt: skip


def tokenizer(words: list[str] = WORDS) -> Tokenizer:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens([word for word in words if word.startswith("[")])
    made.enable_truncation(2)
    return made


def folder_of(path: Path, name: str, **changes: object) -> Path:
    config = {
        "Bert": transformers.BertConfig,
        "Llama": transformers.LlamaConfig,
        "Modern": transformers.ModernBertConfig,
    }
    kind = next(kind for kind in config if name.startswith(kind))
    ids = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    getattr(transformers, name)(config[kind](**{**SIZES, **ids, **changes})).save_pretrained(path)
    tokenizer().save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    names = ("BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForPreTraining", "LlamaForCausalLM",
             "ModernBertForMaskedLM", "LlamaForSequenceClassification")  # fmt: skip
    return {name: folder_of(tmp_path_factory.mktemp(name), name) for name in names}


MASKED = {"masked_head.dense.weight", "masked_head.dense.bias", "masked_head.norm.weight", "masked_head.norm.bias",
          "masked_head.bias"}  # fmt: skip
OUT = {"classifier.out.weight", "classifier.out.bias"}
POOLER = {"classifier.dense.weight", "classifier.dense.bias"}


@pytest.mark.parametrize(
    ("name", "wish", "new", "dropped"),
    [
        ("BertModel", {}, set(), 2),  # the pooler
        ("BertModel", {"head": "masked"}, MASKED, 2),
        ("BertModel", {"n_labels": 5}, OUT, 0),
        ("BertModel", {"n_labels": 5, "classifier_head": "linear", "pooling": "mean"}, OUT, 2),
        ("BertForMaskedLM", {}, set(), 0),
        ("BertForMaskedLM", {"head": "none"}, set(), 5),
        ("BertForMaskedLM", {"n_labels": 5}, OUT | POOLER, 5),
        ("BertForPreTraining", {}, set(), 4),  # the pooler and the head of sentence pairs
        ("BertForSequenceClassification", {}, set(), 4),
        ("BertForSequenceClassification", {"n_labels": None}, set(), 0),
        ("BertForSequenceClassification", {"n_labels": 3}, OUT, 2),  # classes of the same number are other classes
        ("BertForSequenceClassification", {"head": "masked"}, MASKED, 4),
        ("ModernBertForMaskedLM", {"n_labels": 2}, OUT, 1),  # dense and norm serve the classifier
        ("LlamaForCausalLM", {}, set(), 0),
        ("LlamaForCausalLM", {"n_labels": 2}, {"classifier.out.weight"}, 1),
        ("LlamaForSequenceClassification", {"head": "linear"}, set(), 1),
    ],
)
def test_the_heads_that_are_asked_for(folders, name, wish, new, dropped):
    initial = read_initial(folders[name], **wish)
    model = Transformer(initial.config).initialize(0)
    assert set(model.load_initial(initial.state)) == new
    assert len(initial.dropped) == dropped, initial.dropped
    assert initial.config.n_labels == {None: 3}.get(wish.get("n_labels", 0), wish.get("n_labels", 0))
    assert initial.labels == (("LABEL_0", "LABEL_1", "LABEL_2") if wish.get("n_labels", 0) is None else ())


def test_a_head_that_the_family_cannot_have_is_refused(folders):
    with pytest.raises(UserError, match=r"llama is a causal model, without a head for masked language modelling"):
        read_initial(folders["LlamaForCausalLM"], head="masked")
    with pytest.raises(UserError, match=r"bert is an encoder.*give a decoder"):
        read_initial(folders["BertForMaskedLM"], head="linear")


def test_special_tokens_and_tokenizer(folders, tmp_path):
    initial = read_initial(folders["BertModel"])
    assert initial.special == SpecialTokens(cls=1, sep=2, mask=4, pad=0, unk=3, end=2, bos=1)
    assert json.loads(initial.tokenizer)["truncation"] is None
    assert read_initial(folders["BertModel"]).fingerprint == initial.fingerprint
    assert read_initial(folders["BertForMaskedLM"]).fingerprint != initial.fingerprint
    # Files say it before names do, and without a tokenizer config.json does.
    folder = folder_of(tmp_path / "named", "BertModel")
    (folder / "tokenizer_config.json").write_text(json.dumps({"cls_token": "a", "mask_token": {"content": "b"}}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": "[MASK]", "pad_token": None}))
    assert read_initial(folder).special == SpecialTokens(cls=5, sep=2, mask=4, pad=0, unk=3, end=2, bos=1)
    (folder / "tokenizer.json").unlink()
    plain = read_initial(folder)
    assert plain.tokenizer is None
    assert (plain.special.cls, plain.special.end, plain.special.mask) == (1, 2, None)


def test_a_tokenizer_that_disagrees_with_the_embedding_is_refused(tmp_path):
    folder = folder_of(tmp_path / "bert", "BertModel", vocab_size=6)
    with pytest.raises(UserError, match=r"tokenizer.json has 7 entries, but the embedding has 6 rows"):
        read_initial(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json: not a tokenizer.json"):
        read_initial(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read_initial(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"neither config.json nor config.toml"):
        read_initial(tmp_path)


def test_a_recipe_asks_for_it(folders):
    recipe = replace(Recipe(), initial=InitialConfig(path=str(folders["BertModel"]), context=20, dropout=0.25))
    initial = initial_of(recipe, n_labels=4)
    assert (initial.config.context, initial.config.dropout) == (20, 0.25)
    assert initial.config.classifier_head == "bert"
    short, whole = Transformer(initial.config).initialize(0).eval(), read_initial(folders["BertModel"], n_labels=4)
    short.load_initial(initial.state)
    long = Transformer(whole.config).initialize(0).eval()
    long.load_initial(whole.state)
    tokens = torch.randint(0, 70, (2, 20))
    assert torch.equal(short.hidden_states(tokens), long.hidden_states(tokens))
    assert initial_of(Recipe()) is None

    def refused(words: str, initial: InitialConfig, model: ModelConfig | None = None) -> None:
        with pytest.raises(UserError, match=words):
            initial_of(replace(Recipe(), initial=initial, model=model or ModelConfig()))

    refused("initial.context = 64: .* no more than 32", replace(recipe.initial, context=64))
    refused("initial.dropout: of a checkpoint, and initial.path is empty", InitialConfig(dropout=0.1))
    refused(r"model.d_model: 384 -> 32.*leave \[model\] out", recipe.initial, ModelConfig(d_model=32))


def test_a_run_is_a_checkpoint_too(recipe, tmp_path):
    run = tmp_path / "causal"
    pretrain(recipe(train={"steps": 2}), run)
    initial = read_initial(run)
    trained = load_run(run, device="cpu")
    model = Transformer(initial.config).initialize(9)
    assert model.load_initial(initial.state) == ()
    tokens = torch.randint(0, model.vocab_size, (2, 8))
    assert torch.equal(model.eval().logits(tokens), trained.model.logits(tokens))
    assert initial.special.end == trained.end_id
    assert initial.state["embedding.weight"].shape[0] == model.vocab_size
    classes = read_initial(run, n_labels=3)
    assert (classes.config.pooling, classes.config.classifier_bias) == ("last", False)
    assert Transformer(classes.config).load_initial(classes.state) == ("classifier.out.weight",)
    with pytest.raises(UserError, match="causal"):
        read_initial(run, head="masked")
