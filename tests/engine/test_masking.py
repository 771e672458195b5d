"""Masking: the shares it promises, whole words, and noise that nothing but (seed, epoch, sample, position) changes."""

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hotloop.engine.config import MaskingConfig
from hotloop.engine.data.batches import IGNORE_INDEX, Prefetcher
from hotloop.engine.data.masked import MaskedSource, frame_of, framed, hide
from hotloop.engine.data.masking import Masking, Vocabulary
from hotloop.engine.data.packing import Packs
from hotloop.engine.data.prepare import PrepareConfig, prepare
from hotloop.engine.data.shards import Corpus
from hotloop.engine.data.tokenizer import Encoder, load_tokenizer, train_tokenizer
from hotloop.engine.errors import UserError

TEXTS = [
    "the a loss token model step gradient batch data learns adds scales falls",
    "unbelievably reconsidered, tokenization: a word-piece",
] * 5
DEVIATIONS = 5
"""Of a binomial count from its mean, beyond which a share is taken to be wrong."""


@pytest.fixture(scope="module")
def wordpiece() -> Vocabulary:
    return Vocabulary.of(train_tokenizer(TEXTS, "wordpiece", 80))


def rows_of(vocabulary: Vocabulary, n_rows: int, length: int, seed: int = 0):
    """(tokens, row, position, begins) of rows of [CLS], drawn tokens (one in ten of them special) and [SEP]."""
    rng = np.random.default_rng(seed)
    tokens = rng.choice(vocabulary.ordinary, (n_rows, length))
    special = np.flatnonzero(vocabulary.special)
    tokens = np.where(rng.random(tokens.shape) < 0.1, rng.choice(special, tokens.shape), tokens)
    tokens[:, 0], tokens[:, -1] = vocabulary.first, vocabulary.last
    row, position = np.divmod(np.arange(tokens.size), length)
    return tokens.reshape(-1), row, position, position == 0


def within(count: int, n: int, share: float) -> bool:
    return abs(count - share * n) <= DEVIATIONS * np.sqrt(n * share * (1 - share)) + 1e-9


@pytest.mark.parametrize("rate", [0.15, 0.3])
@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.3), (1.0, 0.0)])
def test_rates_are_those_that_were_asked_for(wordpiece, rate, shares):
    masking = Masking(MaskingConfig(rate, mask_share=shares[0], random_share=shares[1]), wordpiece, seed=3)
    tokens, row, position, begins = rows_of(wordpiece, 400, 200)
    keys = masking.keys(np.zeros(400, int), np.zeros(400, int), np.arange(400))
    masked = masking(tokens, row, position, begins, keys)
    hidden = masked.hidden
    maskable = ~wordpiece.special[tokens]
    assert not hidden[~maskable].any()
    per_row = np.bincount(row[hidden], minlength=400)
    n = np.bincount(row[maskable], minlength=400)
    assert (np.abs(per_row - rate * n) < 1).all(), "exact up to rounding, in every row"
    assert abs((per_row - rate * n).mean()) <= DEVIATIONS * 0.5 / np.sqrt(400), "and rounded without a bias"
    assert (per_row <= masking.most(200)).all()

    n_hidden = int(hidden.sum())
    as_mask = masked.inputs[hidden] == wordpiece.mask
    changed = (masked.inputs[hidden] != tokens[hidden]) & ~as_mask
    # A random token may be the one that was there.
    expected = shares[1] * (1 - 1 / len(wordpiece.ordinary))
    assert within(int(as_mask.sum()), n_hidden, shares[0])
    assert within(int(changed.sum()), n_hidden, expected)
    assert (masked.inputs[~hidden] == tokens[~hidden]).all()
    assert not wordpiece.special[masked.inputs[hidden][changed]].any(), "no special token is drawn"
    # Each planted share is found out by the same measure.
    assert not within(int(as_mask.sum()), n_hidden, shares[0] - 0.05)
    assert not within(int(changed.sum()), n_hidden, expected + 0.05)


def test_every_position_and_every_replacement_is_as_likely_as_any_other(wordpiece):
    masking = Masking(MaskingConfig(0.2, mask_share=0.0, random_share=1.0), wordpiece, seed=0)
    n_rows, length = 3000, 40
    tokens = np.full(n_rows * length, wordpiece.ordinary[0])
    row, position = np.divmod(np.arange(tokens.size), length)
    keys = masking.keys(np.zeros(n_rows, int), np.zeros(n_rows, int), np.arange(n_rows))
    masked = masking(tokens, row, position, position == 0, keys)
    by_position = np.bincount(position[masked.hidden], minlength=length)
    assert all(within(int(count), n_rows, 0.2) for count in by_position)
    drawn = np.bincount(masked.inputs[masked.hidden], minlength=len(wordpiece.special))
    n, share = int(masked.hidden.sum()), 1 / len(wordpiece.ordinary)
    assert all(within(int(count), n, share) for count in drawn[wordpiece.ordinary])
    assert drawn[wordpiece.special].sum() == 0
    # Neighbours are drawn independently: pairs are as frequent as the share squared, but for the count being exact.
    pairs = masked.hidden.reshape(n_rows, length)
    together = int((pairs[:, 1:] & pairs[:, :-1]).sum())
    assert within(together, n_rows * (length - 1), 0.2 * (0.2 * length - 1) / (length - 1))


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6), rate=st.floats(0.01, 0.99), seed=st.integers(0, 99)
)
def test_whole_words_are_hidden_whole_and_within_the_budget(wordpiece, lengths, rate, seed):
    masking = Masking(MaskingConfig(rate, whole_words=True), wordpiece, seed)
    tokens, row, position, begins = (
        np.concatenate(parts)
        for parts in zip(*(rows_of(wordpiece, 1, n + 2, seed + i) for i, n in enumerate(lengths)), strict=True)
    )
    row = np.repeat(np.arange(len(lengths)), np.array(lengths) + 2)
    keys = masking.keys(np.zeros(len(lengths), int), np.zeros(len(lengths), int), np.arange(len(lengths)))
    hidden = masking(tokens, row, position, begins, keys).hidden
    word = np.cumsum(~masking.continues(tokens, begins))
    for one in np.unique(word):
        mine = word == one
        assert hidden[mine].all() or not hidden[mine].any()
    budget = masking.counts(tokens, row, keys)
    assert (np.bincount(row[hidden], minlength=len(lengths)) <= budget).all()
    assert not hidden[wordpiece.special[tokens]].any()
    for r in range(len(lengths)):  # nothing that is left would have fitted
        left = budget[r] - hidden[row == r].sum()
        sizes = [int((word == one).sum()) for one in np.unique(word[(row == r) & ~hidden & ~wordpiece.special[tokens]])]
        assert all(size > left for size in sizes)


def test_whole_words_reach_the_rate(wordpiece):
    masking = Masking(MaskingConfig(0.15, whole_words=True), wordpiece, seed=0)
    tokens, row, position, begins = rows_of(wordpiece, 300, 256)
    keys = masking.keys(np.zeros(300, int), np.zeros(300, int), np.arange(300))
    hidden = masking(tokens, row, position, begins, keys).hidden
    share = hidden.sum() / (~wordpiece.special[tokens]).sum()
    assert 0.148 <= share <= 0.1505
    assert masking.continues(tokens, begins).mean() > 0.2, "words of several tokens were there"


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("wordpiece", "unbelievable tokens", ["unbelievable", "tokens"]),
        ("bpe", "unbelievable tokens\nagain", ["unbelievable", " tokens", "\n", "again"]),
        ("unigram", "unbelievable tokens\nagain", ["unbelievable", "▁tokens", "<unk>", "again"]),
    ],
)
def test_what_a_word_is(kind, text, words):
    tokenizer = train_tokenizer(TEXTS, kind, 300 if kind == "bpe" else 80, "masked")
    vocabulary, encoder = Vocabulary.of(tokenizer), Encoder(tokenizer)
    (tokens,) = encoder.encode([text])
    begins = np.arange(len(tokens)) == 0
    word = np.cumsum(~Masking(MaskingConfig(), vocabulary, 0).continues(tokens.astype(np.int64), begins))
    texts = [encoder.tokenizer.id_to_token(int(i)) for i in tokens]
    joined = ["".join(t for t, w in zip(texts, word, strict=True) if w == one) for one in range(1, word.max() + 1)]
    found = [t.replace("##", "").replace("Ġ", " ").replace("Ċ", "\n") for t in joined]
    assert found[: len(words)] == words
    assert len(tokens) > len(words), "words of several tokens were there"


def test_a_tokenizer_that_does_not_tell_words_is_refused():
    plain = json.loads(train_tokenizer(TEXTS, "wordpiece", 80))
    plain["model"] = {"type": "WordLevel", "vocab": plain["model"]["vocab"], "unk_token": "[UNK]"}
    plain["decoder"] = None
    vocabulary = Vocabulary.of(json.dumps(plain))
    assert vocabulary.words is None
    Masking(MaskingConfig(), vocabulary, 0)
    with pytest.raises(UserError, match=r"whole_words.*does not tell where words begin"):
        Masking(MaskingConfig(whole_words=True), vocabulary, 0)


def test_a_tokenizer_without_a_mask_is_refused_with_the_command():
    with pytest.raises(UserError, match=r"no mask token.*--special masked"):
        Vocabulary.of(train_tokenizer(TEXTS, "bpe", 300))


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_a_tokenizer_trained_for_masking(kind, tmp_path):
    tokenizer = train_tokenizer(TEXTS, kind, 300 if kind == "bpe" else 80, "masked")
    vocabulary, encoder = Vocabulary.of(tokenizer), Encoder(tokenizer)
    named = encoder.tokenizer.get_vocab()
    assert (vocabulary.first, vocabulary.last, vocabulary.mask) == (named["[CLS]"], named["[SEP]"], named["[MASK]"])
    assert vocabulary.special[[named[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]].all()
    framed_text = encoder.tokenizer.encode("a loss").tokens
    assert (framed_text[0], framed_text[-1]) == ("[CLS]", "[SEP]")
    assert not vocabulary.special[encoder.encode(["the [MASK] of [CLS]"])[0]].any() or kind != "bpe"

    (tmp_path / "tokenizer.json").write_text(tokenizer)
    assert Encoder(load_tokenizer(tmp_path)).hash == encoder.hash


def test_a_tokenizer_of_bert_ends_documents_with_sep(tmp_path, make_documents):
    bert = json.loads(train_tokenizer(TEXTS, "wordpiece", 80))
    bert["added_tokens"] = [t for t in bert["added_tokens"] if t["content"] != "<|endoftext|>"]
    bert["model"]["vocab"] = {k: v for k, v in bert["model"]["vocab"].items() if k != "<|endoftext|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(bert))
    documents = make_documents(tmp_path / "documents", 12)
    manifest = prepare([documents], tmp_path / "c", PrepareConfig(tokenizer=tmp_path)).manifest
    assert manifest["end_token"] == "[SEP]"
    assert manifest["end_id"] == Vocabulary.of(json.dumps(bert)).last
    with pytest.raises(UserError, match=r"no token '</s>'.*--end-token.*\[SEP\]"):
        prepare([documents], tmp_path / "d", PrepareConfig(tokenizer=tmp_path, end_token="</s>"))
    with pytest.raises(UserError, match="--special masked: only for a tokenizer that is trained"):
        prepare([documents], tmp_path / "d", PrepareConfig(tokenizer=tmp_path, special="masked"))


# Batches


@pytest.fixture(scope="module", params=["wordpiece", "bpe"])
def corpus(request, tmp_path_factory, make_documents):
    folder = tmp_path_factory.mktemp("masked")
    documents = make_documents(folder / "documents", 40)
    prepare(
        [documents], folder / "c",
        PrepareConfig(kind=request.param, vocab_size=290, special="masked", validation_fraction=0.2),
    )  # fmt: skip
    return Corpus(folder / "c")


def source_of(corpus, context=32, global_batch=8, seed=0, **config) -> MaskedSource:
    vocabulary = Vocabulary.of(corpus.tokenizer_path.read_text(encoding="utf-8"))
    return MaskedSource(
        corpus.split("train"), context, global_batch, Masking(MaskingConfig(**config), vocabulary, seed)
    )


@pytest.mark.parametrize("context", [7, 32])
def test_every_stored_token_is_in_one_framed_piece(corpus, context):
    split = corpus.split("train")
    source = source_of(corpus, context)
    vocabulary = source.masking.vocabulary
    packs = Packs.of(split, context, frame=frame_of(vocabulary))
    starts, lengths, row = packs.pieces(np.arange(packs.n_packs))
    seen = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
    ends = np.cumsum(split.lengths) - 1
    assert sorted(seen.tolist()) == sorted(set(range(split.n_tokens)) - set(ends.tolist()))
    filled = np.bincount(row, weights=lengths + 2)
    assert filled.max() <= context
    assert (packs.tokens(np.arange(packs.n_packs)) == filled).all()
    assert packs.n_split_documents == (split.lengths - 1 > context - 2).sum()
    assert packs.efficiency > 0.9
    packs.verify()


def test_a_batch_is_frames_around_text_with_some_of_it_hidden(corpus):
    source = source_of(corpus, rate=0.3)
    vocabulary = source.masking.vocabulary
    (batch,) = source.micro_batches(2)
    tokens, targets = batch.tokens.flatten().numpy(), batch.targets.flatten().numpy()
    original = np.where(targets == IGNORE_INDEX, tokens, targets)
    bounds = batch.cu_seqlens.numpy()
    texts = set()
    for start, end in pairwise(bounds):
        piece = original[start:end]
        if not len(piece) or piece[0] != vocabulary.first:
            assert (targets[start:end] == IGNORE_INDEX).all(), "padding"
            continue
        assert piece[-1] == vocabulary.last
        assert not vocabulary.special[piece[1:-1]].any()
        assert (batch.positions.flatten()[start:end].numpy() == np.arange(end - start)).all()
        texts.add(piece[1:-1].tobytes())
    split = corpus.split("train")
    stored = b"".join(split.document(i)[:-1].astype(np.int64).tobytes() + b"\xff" * 8 for i in range(split.n_documents))
    assert len(texts) >= 8
    assert all(text in stored for text in texts)
    assert batch.n_supervised == (targets != IGNORE_INDEX).sum() == source.n_supervised(2)
    assert batch.n_tokens == source.n_tokens(2)
    assert batch.n_supervised <= source.max_valid(8)


@pytest.mark.parametrize("whole_words", [False, True])
def test_noise_does_not_depend_on_how_a_batch_is_cut(corpus, whole_words):
    source = source_of(corpus, whole_words=whole_words)
    for step in (0, 5, 1000):
        (whole,) = source.micro_batches(step)
        assert source.n_supervised(step) == whole.n_supervised
        for world_size, micro_batch in ((1, 1), (2, 2), (4, 1), (2, 4)):
            parts = [b for r in range(world_size) for b in source.micro_batches(step, r, world_size, micro_batch)]
            for name in ("tokens", "targets", "positions"):
                joined = np.concatenate([getattr(part, name).numpy() for part in parts])
                assert (joined == getattr(whole, name).numpy()).all()
            assert all(part.n_supervised <= source.max_valid(micro_batch) for part in parts)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loop_gets_the_count_with_the_batches(corpus, workers):
    source = source_of(corpus, whole_words=True)
    with Prefetcher(source, 3, workers=workers, rank=1, world_size=2, micro_batch=2, stop_step=9) as prefetcher:
        for step, batches in enumerate(prefetcher, 3):
            assert prefetcher.n_supervised == source.n_supervised(step) > sum(b.n_supervised for b in batches)


def test_each_epoch_and_each_seed_draws_anew(corpus):
    source, again, other = source_of(corpus), source_of(corpus), source_of(corpus, seed=1)
    n_packs = source.packs[0].n_packs
    noise: dict[int, list[bytes]] = {}
    for step in range(3 * -(-n_packs // 8)):
        _, _, pack = source.order.draw(step)
        (batch,), (same,) = source.micro_batches(step), again.micro_batches(step)
        assert (batch.tokens == same.tokens).all()
        assert (batch.targets == same.targets).all()
        for targets, p in zip(batch.targets.numpy(), pack, strict=True):
            noise.setdefault(int(p), []).append((targets != IGNORE_INDEX).tobytes())
    seen_twice = [masks for masks in noise.values() if len(masks) > 1]
    assert sum(len(set(masks)) == len(masks) for masks in seen_twice) > 0.9 * len(seen_twice)
    (a,), (b,) = source.micro_batches(0), other.micro_batches(0)
    assert not (a.targets == b.targets).all()


def test_documents_of_one_row_are_masked_independently(wordpiece):
    """Draws are by the position in the row, not in the document."""
    masking = Masking(MaskingConfig(rate=0.25), wordpiece, seed=0)
    n_rows, n_pieces, length = 200, 4, 14
    stored = np.full(n_rows * n_pieces * length, wordpiece.ordinary[0])
    row = np.repeat(np.arange(n_rows), n_pieces)
    keys = masking.keys(np.zeros(n_rows, int), np.zeros(n_rows, int), np.arange(n_rows))
    _, _, masked = hide(stored, np.full(len(row), length), row, keys, masking, n_pieces * (length + 2))
    hidden = masked.hidden.reshape(n_rows, n_pieces, length + 2)[:, :, 1:-1]
    together = int((hidden[:, 0] & hidden[:, 1]).sum())
    assert within(together, n_rows * length, 0.25**2)


def test_text_without_any_maskable_token_supervises_nothing(tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "a.txt").write_text("the loss falls the loss falls")
    for i in range(12):
        (documents / f"{i}.txt").write_text("✂ " * (i + 1))
    bert = tmp_path / "tokenizer.json"
    bert.write_text(train_tokenizer(TEXTS, "wordpiece", 80))
    prepare([documents], tmp_path / "c", PrepareConfig(tokenizer=bert, validation_fraction=0))
    source = source_of(Corpus(tmp_path / "c"), context=8, global_batch=1)
    counts = [source.n_supervised(step) for step in range(40)]
    assert 0 in counts
    for step, count in enumerate(counts):
        (batch,) = source.micro_batches(step)
        assert batch.n_supervised == count == int((batch.targets != IGNORE_INDEX).sum())


def test_pieces_without_frames_stay_bare(wordpiece):
    bare = replace(wordpiece, first=None, last=None)
    stored, lengths = np.arange(5), np.array([2, 3])
    tokens, whole, begins = framed(stored, lengths, bare)
    assert tokens.tolist() == stored.tolist()
    assert whole.tolist() == [2, 3]
    assert begins.tolist() == [True, False, True, False, False]
    tokens, whole, begins = framed(stored, lengths, replace(bare, first=9))
    assert tokens.tolist() == [9, 0, 1, 9, 2, 3, 4]
    assert begins.tolist() == [True, False, False, True, False, False, False]
