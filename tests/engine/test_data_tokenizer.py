"""Tokenizers: lossless where they claim it, repeatable, and no document can write a special token."""

import json
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from hotloop.engine.data.documents import _cut
from hotloop.engine.data.tokenizer import (
    BERT_TOKENS,
    END_TOKEN,
    LONGEST_WORD,
    Encoder,
    cut_long_words,
    dtype_of,
    load_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from hotloop.engine.errors import UserError

TEXTS = [
    f"def function_{i}(argument):\n    return argument + {i}  # the {i}th of them, isn't it?\n\n" for i in range(200)
] + [
    "Über allen Gipfeln ist Ruh",
    "日本語の文章です。" * 5,
    f"literal {END_TOKEN} text " * 30,
    "[MASK], [CLS] and [SEP] by way of x, y " * 30,
]


@pytest.fixture(scope="module")
def encoders():
    return {kind: Encoder(train_tokenizer(TEXTS, kind, 400)) for kind in ("bpe", "wordpiece", "unigram")}


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_byte_level_bpe_is_lossless(encoders, text):
    encoder = encoders["bpe"]
    (tokens,) = encoder.encode([text])
    assert encoder.tokenizer.decode(tokens.tolist(), skip_special_tokens=False) == text
    assert encoder.unknown_id is None


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize(
    "text", [END_TOKEN, f"a{END_TOKEN}b", f"{END_TOKEN}{END_TOKEN}", f"x {END_TOKEN}\n y", "[MASK] [CLS]"]
)
def test_special_tokens_in_the_text_are_ordinary_text(encoders, kind, text):
    encoder = encoders[kind]
    (tokens,) = encoder.encode([text])
    special = {i for i, token in encoder.tokenizer.get_added_tokens_decoder().items() if token.special}
    assert encoder.end_id in special
    assert not special & set(tokens.tolist())
    decoded = encoder.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert decoded.replace(" ", "") == text.replace(" ", "").replace("\n", "" if kind == "wordpiece" else "\n")


def test_the_guard_is_needed(encoders):
    """A unigram model has its special tokens as pieces: encoded in one go the text would end the document."""
    encoder = encoders["unigram"]
    plain = encoder.tokenizer.encode(f"a{END_TOKEN}b", add_special_tokens=False).ids
    assert encoder.end_id in plain


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_training_repeats_itself_in_another_process(encoders, kind):
    """Hash maps are seeded anew in each process; neither ids nor merges may follow them."""
    code = (
        "import json, sys\n"
        "from hotloop.engine.data.tokenizer import Encoder, train_tokenizer\n"
        "print(Encoder(train_tokenizer(json.load(sys.stdin), sys.argv[1], 400)).hash)"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code, kind],
        input=json.dumps(TEXTS), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout.strip() == encoders[kind].hash


def test_special_tokens_have_the_first_ids(encoders):
    assert encoders["bpe"].end_id == 0
    assert [encoders["wordpiece"].tokenizer.token_to_id(token) for token in (*BERT_TOKENS, END_TOKEN)] == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]
    assert encoders["wordpiece"].unknown_id == 1
    spelt = Encoder(train_tokenizer([f'say "{END_TOKEN}" {END_TOKEN}{i}\n' for i in range(100)], "unigram", 60))
    for encoder in (encoders["unigram"], spelt):
        assert (encoder.unknown_id, encoder.end_id) == (0, 1)
        pieces = [piece for piece, _ in json.loads(encoder.json)["model"]["vocab"]]
        assert len(set(pieces)) == len(pieces) == encoder.vocab_size
    added = encoders["wordpiece"].tokenizer.get_added_tokens_decoder()
    assert sorted(token.content for token in added.values()) == sorted((*BERT_TOKENS, END_TOKEN))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_segments_encode_like_the_whole(encoders, kind):
    """A long text is cut where the pre-tokenizer cuts too."""
    text = "".join(TEXTS)
    whole, parts = encoders[kind].encode([text])[0], []
    while len(text) > 3000:
        cut = _cut(text[:2000])
        parts, text = [*parts, text[:cut]], text[cut:]
    assert len(parts) > 5
    joined = np.concatenate(encoders[kind].encode([*parts, text]))
    np.testing.assert_array_equal(joined, whole)


def test_a_saved_tokenizer_is_loaded_without_truncation(tmp_path, encoders):
    path = tmp_path / "tokenizer.json"
    saved = Tokenizer.from_str(encoders["bpe"].json)
    saved.enable_truncation(4)
    saved.enable_padding(length=64)
    saved.save(str(path))
    encoder = Encoder(load_tokenizer(tmp_path))
    assert encoder.hash == encoders["bpe"].hash
    texts = ["a", "b c d e f g h i j"]
    lengths = [len(tokens) for tokens in encoder.encode(texts)]
    assert lengths == [len(tokens) for tokens in encoders["bpe"].encode(texts)]
    assert lengths[0] == 1
    assert lengths[1] > 4


def test_a_tokenizer_without_the_end_token(tmp_path, encoders):
    path = tmp_path / "tokenizer.json"
    path.write_text(encoders["bpe"].json)
    with pytest.raises(UserError, match=r"no token '</s>'.*--end-token.*'<\|endoftext\|>'"):
        load_tokenizer(path, "</s>")
    assert Encoder(load_tokenizer(path, "def"), "def").end_id == encoders["bpe"].tokenizer.token_to_id("def")


def test_text_that_would_be_the_end_token_is_refused(tmp_path, encoders):
    path = tmp_path / "tokenizer.json"
    path.write_text(encoders["bpe"].json)
    encoder = Encoder(load_tokenizer(path, "a"), "a")
    with pytest.raises(UserError, match="ordinary text encodes to the special token 'a'"):
        encoder.encode(["a b"])


@pytest.mark.parametrize(("content", "message"), [("{", "not a tokenizer.json"), ('{"a": 1}', "not a tokenizer.json")])
def test_a_file_that_is_no_tokenizer(tmp_path, content, message):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(tmp_path / "missing.json")


def test_the_dtype_counts_added_tokens():
    assert [dtype_of(n).name for n in (256, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]
    tokenizer = Tokenizer.from_str(train_tokenizer(["a"], "bpe", 257))
    tokenizer.add_tokens([AddedToken(f"<added {i}>") for i in range(65_536 - 257)])
    assert Encoder(tokenizer.to_str()).dtype.name == "uint16"
    tokenizer.add_tokens([AddedToken("<one more>")])
    encoder = Encoder(tokenizer.to_str())
    assert encoder.dtype.name == "uint32"
    assert encoder.encode(["<one more>"])[0].tolist() == [65_536]


def test_the_hash_ignores_layout_only(encoders):
    text = encoders["bpe"].json
    shuffled = json.dumps(dict(reversed(json.loads(text).items())), indent=7)
    assert tokenizer_hash(shuffled) == tokenizer_hash(text)
    changed = json.loads(text)
    changed["model"]["merges"] = changed["model"]["merges"][:-1]
    assert tokenizer_hash(json.dumps(changed)) != tokenizer_hash(text)


@pytest.mark.parametrize(("kind", "vocab_size"), [("bpe", 256), ("wordpiece", 8), ("unigram", 4)])
def test_a_vocabulary_too_small(kind, vocab_size):
    with pytest.raises(UserError):
        train_tokenizer(TEXTS, kind, vocab_size)


def test_long_words_are_cut_for_training_and_nothing_else_is():
    texts = ["", "some words", "a" * 5000 + " b", " " * 3000, "c" * LONGEST_WORD, "x" * (LONGEST_WORD - 1) + " y"]
    pieces = list(cut_long_words(texts))
    assert "".join(pieces) == "".join(texts)
    assert max(len(run) for piece in pieces for run in re.findall(r"\S+|\s+", piece)) <= LONGEST_WORD
    assert [piece for piece in pieces if "a" not in piece and piece.strip() != ""] == [texts[1], texts[4], texts[5]]


@pytest.mark.parametrize(("kind", "n"), [("bpe", 1_000_000), ("wordpiece", 1_000_000), ("unigram", 100_000)])
def test_long_texts_without_a_space(kind, n):
    """Uncut, training is quadratic in the word: 1.4 s (bpe) for 64,000 characters."""
    letters = "".join(random.Random(0).choices("abcdefgh", k=n))
    encoder = Encoder(train_tokenizer([*TEXTS, letters, "x" * n], kind, 400))
    if kind == "bpe":
        (tokens,) = encoder.encode([letters])
        assert encoder.tokenizer.decode(tokens.tolist()) == letters
