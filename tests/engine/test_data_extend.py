"""More tokens for a tokenizer: they are used, the old ones are as they were, and embeddings grow from their pieces."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hotloop.engine.commands.main import BAD_INPUT, main
from hotloop.engine.config import ModelConfig
from hotloop.engine.data.extend import extend_tokenizer, extends, new_tokens, pieces_of
from hotloop.engine.data.tokenizer import train_tokenizer
from hotloop.engine.errors import UserError
from hotloop.engine.initial import Initial, extend_embeddings, read_initial
from hotloop.engine.model import Transformer
from hotloop.engine.pretrained.special_tokens import SpecialTokens

GENERAL = [
    "the cat sat on the mat and the dog ran to the door of the house",
    "a bird in the hand; two in the bush. ",
] * 4
PARTS = ["proteo", "glyco", "phospho", "lipo", "kin", "synth", "lig", "hydrol"], ["ase", "ases", "ome", "omics", "some"]


def jargon(n: int, seed: int = 0) -> list[str]:
    """Texts of a language that the general tokenizer has never seen, in characters that it has."""
    draw = random.Random(seed)
    words = [a + b + c for a in PARTS[0] for b in PARTS[0] for c in PARTS[1]]
    alphabet = "the cat sat on mat and dog ran to door of house bird in hand two bush a"
    words = [word for word in words if set(word) <= set(alphabet) | set("pglycokmxfz")]
    return [" ".join(draw.choice(["the", "of", "a", *words]) for _ in range(40)) for _ in range(n)]


def general(kind: str) -> str:
    texts = [*GENERAL, "abcdefghijklmnopqrstuvwxyz", " ".join("abcdefghijklmnopqrstuvwxyz")]
    return train_tokenizer(texts, kind, {"bpe": 300, "wordpiece": 120, "unigram": 90}[kind])


KINDS = ("bpe", "wordpiece", "unigram")


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_are_used_and_the_old_ones_stay(kind):
    old_json, texts = general(kind), jargon(60)
    new_json = extend_tokenizer(old_json, texts, 64)
    added = new_tokens(old_json, new_json)
    old, new = Tokenizer.from_str(old_json), Tokenizer.from_str(new_json)
    assert len(added) == 64
    assert set(added.values()) == set(range(len(old.get_vocab()), len(old.get_vocab()) + 64))
    assert len(old.get_added_tokens_decoder()) == len(new.get_added_tokens_decoder())  # entries of the model
    used = {i for text in texts for i in new.encode(text, add_special_tokens=False).ids}
    # A BPE reaches a long token by way of shorter ones, which may have no other use.
    assert len(used & set(added.values())) >= (40 if kind == "bpe" else 64)
    n_old, n_new = (sum(len(t.encode(x, add_special_tokens=False).ids) for x in jargon(20, 1)) for t in (old, new))
    assert n_new < 0.75 * n_old
    unchanged = 0
    for text in [*GENERAL, *jargon(20, 1), "unknowable Ω zebra", ""]:
        a, b = (t.encode(text, add_special_tokens=False).ids for t in (old, new))
        assert new.decode(b) == old.decode(a)
        if not set(b) & set(added.values()):
            assert b == a
            unchanged += 1
    assert unchanged > len(GENERAL) // 2
    assert extends(old_json, new_json)
    assert not extends(new_json, old_json)
    assert not extends(old_json, old_json)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_same_texts_give_the_same_tokens(kind):
    old = general(kind)
    assert extend_tokenizer(old, jargon(30), 20) == extend_tokenizer(old, iter(jargon(30)), 20)


def test_bpe_goes_on_where_it_ended():
    """Every text is a coarsening of what it was: each new token stands for whole old ones."""
    old_json = general("bpe")
    new_json = extend_tokenizer(old_json, jargon(60), 64)
    old, new = Tokenizer.from_str(old_json), Tokenizer.from_str(new_json)
    parts = pieces_of(old_json, new_tokens(old_json, new_json))
    names = {i: token for token, i in new.get_vocab().items()}
    for text in [*jargon(10, 2), *GENERAL]:
        again = [piece for i in new.encode(text).ids for piece in parts.get(names[i], [i])]
        assert again == old.encode(text).ids


def test_a_bpe_whose_special_tokens_are_not_in_the_model_keeps_their_ids():
    """As Qwen's: the library numbers added tokens on from the size of the model, which grows."""
    described = json.loads(general("bpe"))
    end = described["added_tokens"][0]
    described["model"]["vocab"] = {
        token: i for i, token in enumerate(t for t in described["model"]["vocab"] if t != end["content"])
    }
    end["id"] = len(described["model"]["vocab"])
    old_json = json.dumps(described)
    assert Tokenizer.from_str(old_json).token_to_id(end["content"]) == end["id"]
    new_json = extend_tokenizer(old_json, jargon(30), 10)
    added = new_tokens(old_json, new_json)  # raises where an old one moved
    assert min(added.values()) == end["id"] + 1
    assert Tokenizer.from_str(new_json).id_to_token(end["id"]) == end["content"]


def like_llama_2() -> str:
    """Characters, not bytes; spaces are ▁, no pre-tokenizer; what is unknown falls back to bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", "</s>", *bytes_], show_progress=False)
    made.train_from_iterator(GENERAL, trainer)
    described = json.loads(made.to_str())
    described["added_tokens"] = described["added_tokens"][:2]
    described["pre_tokenizer"] = None
    made = Tokenizer.from_str(json.dumps(described))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made.to_str()


def like_qwen() -> str:
    described = json.loads(general("bpe"))
    split = {"type": "Split", "pattern": {"Regex": r" ?[a-z]+|\s+|[^\sa-z]"}, "behavior": "Isolated", "invert": False}
    bytes_ = {**described["pre_tokenizer"], "use_regex": False}
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, bytes_]}
    return json.dumps(described)


@pytest.mark.parametrize("old_json", [like_llama_2(), like_qwen()], ids=["llama 2", "qwen"])
def test_tokenizers_of_the_families(old_json):
    strange = ["日本語 日本語 日本語", "naïve Ωmega — ω" * 3]
    texts = [*jargon(60), *strange * 5]
    new_json = extend_tokenizer(old_json, texts, 40)
    old, new = Tokenizer.from_str(old_json), Tokenizer.from_str(new_json)
    assert len(new_tokens(old_json, new_json)) == 40
    for text in [*jargon(10, 3), *strange, *GENERAL]:
        a, b = (t.encode(text, add_special_tokens=False).ids for t in (old, new))
        assert new.decode(b) == old.decode(a)
        assert len(b) <= len(a)
    n_old, n_new = (sum(len(t.encode(x, add_special_tokens=False).ids) for x in jargon(20, 1)) for t in (old, new))
    assert n_new < 0.75 * n_old


def test_too_little_text_gives_fewer_tokens():
    old = general("bpe")
    added = new_tokens(old, extend_tokenizer(old, ["zyxw", "zyxw", "v"], 100))
    assert [len(token) for token in sorted(added, key=added.__getitem__)] == [2, 3, 4]  # two letters, three, the word
    assert extend_tokenizer(old, [], 100) == json.dumps(json.loads(old), indent=2, ensure_ascii=False)


def test_what_cannot_be_extended_is_named():
    described = json.loads(general("bpe"))
    described["model"]["end_of_word_suffix"] = "</w>"
    with pytest.raises(UserError, match="marks pieces inside or at the end of words"):
        extend_tokenizer(json.dumps(described), [], 4)
    described["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    with pytest.raises(UserError, match="type 'WordLevel'"):
        extend_tokenizer(json.dumps(described), [], 4)
    described = json.loads(general("unigram"))
    described["added_tokens"].append({**described["added_tokens"][0], "id": 500, "content": "<more>"})
    with pytest.raises(UserError, match="Unigram whose added tokens"):
        extend_tokenizer(json.dumps(described), [], 4)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_grow_from_the_mean_of_the_pieces(kind):
    old_json = general(kind)
    new_json = extend_tokenizer(old_json, jargon(60), 30)
    added = new_tokens(old_json, new_json)
    size = len(Tokenizer.from_str(old_json).get_vocab())
    config = ModelConfig(
        context=16, vocab_size=size, n_layers=1, d_model=32, n_heads=4, causal=False, head="masked", tied_head=False
    )
    model = Transformer(config).initialize(0)
    with torch.no_grad():
        model.masked_head.bias.normal_()
    state = {name: p.detach()[: size if name in ("embedding.weight", "head.weight") else None]
             for name, p in model.named_parameters()}  # fmt: skip
    initial = Initial(config, state, old_json, SpecialTokens(), "", "here")
    grown = extend_embeddings(initial, new_json)
    assert grown.config == replace(config, vocab_size=size + 30)
    larger = Transformer(grown.config)
    assert larger.load_initial(grown.state) == ()
    old, names = Tokenizer.from_str(old_json), {i: token for token, i in added.items()}
    for name in ("embedding.weight", "head.weight", "masked_head.bias"):
        assert torch.equal(grown.state[name][:size], state[name])
        for number, token in names.items():
            if kind == "wordpiece" and token.startswith("##"):
                pieces = pieces_of(old_json, [token])[token]
                joined = "".join(old.id_to_token(i).removeprefix("##") for i in pieces)
                assert joined == token.removeprefix("##")
            else:
                pieces = [piece.id for piece in old.model.tokenize(token)]
            assert len(pieces) > 1
            torch.testing.assert_close(grown.state[name][number], state[name][pieces].mean(0))
    assert extend_embeddings(initial, old_json).config == config
    other = general("bpe" if kind == "wordpiece" else "wordpiece")
    with pytest.raises(UserError, match=r"token .* in the checkpoint's tokenizer"):
        extend_embeddings(initial, other)


def test_rows_that_a_padded_embedding_has_already_are_given_their_mean():
    """Checkpoints often have more rows than tokens: the new tokens come to the first of those."""
    old_json = general("bpe")
    new_json = extend_tokenizer(old_json, jargon(60), 30)
    config = ModelConfig(context=16, vocab_size=320, n_layers=1, d_model=32, n_heads=4)
    state = {"embedding.weight": torch.randn(320, 32)}
    grown = extend_embeddings(Initial(config, state, old_json, SpecialTokens(), "", "here"), new_json)
    assert grown.config.vocab_size == 330
    number = min(new_tokens(old_json, new_json).values())
    assert number == 300
    pieces = Tokenizer.from_str(old_json).model.tokenize(Tokenizer.from_str(new_json).id_to_token(number))
    expected = state["embedding.weight"][[piece.id for piece in pieces]].mean(0)
    torch.testing.assert_close(grown.state["embedding.weight"][number], expected)


@pytest.fixture
def documents(tmp_path):
    folder = tmp_path / "documents"
    folder.mkdir()
    for i, text in enumerate(jargon(60)):
        (folder / f"{i}.txt").write_text(text)
    return folder


def test_prepare_extends_and_compares(tmp_path, documents, capsys):
    (tmp_path / "tokenizer.json").write_text(general("bpe"))
    arguments = ["prepare", str(documents), "--extend-tokenizer", str(tmp_path / "tokenizer.json")]
    assert main([*arguments, "--add-tokens", "40", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    manifest = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert (manifest["vocab_size"], manifest["report"]["added_tokens"]) == (340, 40)
    rates = manifest["report"]["bytes_per_token"]
    assert list(rates) == ["general", "extended", "own"]
    assert rates["general"] < rates["extended"] <= rates["own"] * 1.2
    # By hand, on the held-out documents: those are what the manifest counts.
    held_out = manifest["splits"]["validation"]
    n_tokens = held_out["tokens"] - held_out["documents"]
    assert math.isclose(rates["extended"], held_out["bytes"] / n_tokens)
    line = ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items())
    assert f"bytes per token of held-out text, by tokenizer: {line}" in out
    assert "40 tokens added to" in out
    assert extends(general("bpe"), (tmp_path / "out" / "tokenizer.json").read_text())

    reused = ["prepare", str(documents), "--tokenizer", str(tmp_path / "tokenizer.json"), "--out"]
    assert main([*reused, str(tmp_path / "reused")]) == 0
    assert "by tokenizer: general" in capsys.readouterr().out
    assert main([*reused, str(tmp_path / "quiet"), "--no-compare-tokenizers"]) == 0
    assert "by tokenizer" not in capsys.readouterr().out


def test_prepare_refuses_what_does_not_fit(tmp_path, documents, capsys):
    (tmp_path / "tokenizer.json").write_text(general("bpe"))
    extend = ["prepare", str(documents), "--out", str(tmp_path / "out"), "--extend-tokenizer", str(tmp_path)]
    for more, words in (
        (["--tokenizer", str(tmp_path)], "are both given"),
        (["--add-tokens", "0"], "--add-tokens 0"),
        (["--special", "masked"], "not for a reused one"),
        (["--end-token", "<none>"], "'<none>'"),
    ):
        assert main([*extend, *more]) == BAD_INPUT
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_continued_training_begins_with_grown_embeddings(recipe, tmp_path, documents):
    """A run, its tokenizer extended by other documents, and a run that begins with it on those."""
    from hotloop.engine.config import InitialConfig
    from hotloop.engine.train.pretrain import pretrain

    pretrain(recipe(train={"steps": 2}), tmp_path / "first")
    arguments = ["--extend-tokenizer", str(tmp_path / "first"), "--add-tokens", "25", "--out", str(tmp_path / "corpus")]
    assert main(["prepare", str(documents), *arguments]) == 0
    made = recipe(data={"path": str(tmp_path / "corpus")}, train={"steps": 1})
    made = replace(made, model=ModelConfig(), initial=InitialConfig(path=str(tmp_path / "first")))
    pretrain(made, tmp_path / "second")
    first, second = read_initial(tmp_path / "first"), read_initial(tmp_path / "second")
    assert second.config.vocab_size == first.config.vocab_size + 25
    expected = extend_embeddings(first, (tmp_path / "corpus" / "tokenizer.json").read_text())
    moved = (second.state["embedding.weight"] - expected.state["embedding.weight"]).abs().max()
    assert 0 < moved < 0.01  # one step of training away
