"""Tokenised texts -> batches of whole examples: nothing lost, the same global batches however they are cut."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from hotloop.engine.data.batches import IGNORE_INDEX, Prefetcher
from hotloop.engine.data.examples import ExampleSource, Frame, TextEncoder, framing, in_order, lay_out, row_length
from hotloop.engine.data.tokenizer import train_tokenizer
from hotloop.engine.errors import UserError

WORDS = ["good", "bad", "film", "plot", "slow", "bright", "dull", "warm", "actor", "scene"]


def words(n: int, seed: int = 0) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, n))


TEXTS = [words(1 + i % 9, i) for i in range(50)]
WHERE = [f"row {i}" for i in range(len(TEXTS))]
LABELS = np.arange(len(TEXTS)) % 3


@pytest.fixture(scope="module")
def tokenizer() -> str:
    return train_tokenizer([words(200, seed) for seed in range(20)], "wordpiece", 200)


def encoder(tokenizer: str, context: int = 16, on_long: str = "error") -> TextEncoder:
    return TextEncoder(tokenizer, Frame((2,), (3,)), context, on_long)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return encoder(tokenizer)(TEXTS, WHERE)


def segments(batch) -> list[tuple[int, ...]]:
    flat, bounds = batch.tokens.flatten().tolist(), batch.cu_seqlens.tolist()
    return [tuple(flat[a:b]) for a, b in itertools.pairwise(bounds) if b > a]


def test_a_piece_is_framed_and_holds_the_whole_text(tokenizer, pieces):
    encode = encoder(tokenizer)
    for i, text in enumerate(TEXTS):
        ids = pieces.tokens[pieces.bounds[i] : pieces.bounds[i + 1]]
        assert (ids[0], ids[-1]) == (2, 3)
        assert encode.tokenizer.decode(ids[1:-1].tolist()) == text
    assert Frame.of(None, None, 7) == Frame((), (7,))
    with pytest.raises(UserError, match="neither"):
        Frame.of(None, 3, None)


def test_the_text_of_a_special_token_is_ordinary_text(tokenizer):
    pieces = encoder(tokenizer)(["good [SEP] [CLS] film"], ["row 1"])
    assert (pieces.tokens == 3).sum() == 1
    assert (pieces.tokens == 2).sum() == 1


def test_long_texts_are_refused_cut_or_windowed(tokenizer):
    texts, where = [words(5), words(40), words(14), words(15)], ["a.csv, line 2", "b.csv, line 9", "c", "d"]
    with pytest.raises(UserError, match=r"2 of 4 texts .* 14 tokens .*b.csv, line 9, has 40\): set labels.on_long"):
        encoder(tokenizer)(texts, where)
    cut = encoder(tokenizer, on_long="truncate")(texts, where)
    assert cut.lengths.tolist() == [7, 16, 16, 16]
    encode = encoder(tokenizer, on_long="window")
    windows = encode(texts, where)
    assert np.diff(windows.first).tolist() == [1, 5, 1, 2]
    ids = encode.tokenizer.encode(texts[1], add_special_tokens=False).ids
    covered = []
    for piece in range(windows.first[1], windows.first[2]):
        window = windows.tokens[windows.bounds[piece] : windows.bounds[piece + 1]]
        assert len(window) == 16
        start = [0, 7, 14, 21, 26][piece - windows.first[1]]
        assert window[1:-1].tolist() == ids[start : start + 14]
        covered += range(start, start + 14)
    assert set(covered) == set(range(40))
    part = windows.texts(1, 3)
    assert part.first.tolist() == [0, 5, 6]
    assert part.lengths.tolist() == [16] * 6


def test_a_batch_lays_pieces_behind_each_other(pieces):
    which, labels = np.array([3, 0, 40]), np.array([2, 1, 0])
    length = row_length(pieces.lengths, 16)
    batch = lay_out(pieces, which, labels, 3, length, capacity=5, pad_id=0)
    found = segments(batch)
    assert found == [tuple(pieces.tokens[pieces.bounds[i] : pieces.bounds[i + 1]]) for i in which]
    n = sum(map(len, found))
    assert batch.n_tokens == n == batch.cu_seqlens[3] == batch.cu_seqlens[5]
    assert batch.targets.tolist() == [2, 1, 0, IGNORE_INDEX, IGNORE_INDEX]
    assert batch.positions.flatten()[:n].tolist() == [i for piece in found for i in range(len(piece))]
    assert (batch.tokens.flatten()[n:] == 0).all()
    assert batch.sum_squares == sum(len(piece) ** 2 for piece in found)
    many = lay_out(pieces, which, np.eye(4, dtype=np.float32)[:3], 3, length, capacity=5, pad_id=0)
    assert many.targets.shape == (5, 4)
    assert (many.targets[3:] == IGNORE_INDEX).all()
    with pytest.raises(ValueError, match="3 pieces"):
        lay_out(pieces, which, labels, 3, length, capacity=2, pad_id=0)


def test_an_epoch_sees_each_text_once_and_orders_differ(pieces):
    source = ExampleSource(pieces, LABELS, 16, global_batch=10, seed=4)
    epochs = []
    for epoch in range(3):
        seen = [s for step in range(5 * epoch, 5 * epoch + 5) for b in source.micro_batches(step) for s in segments(b)]
        assert Counter(seen) == Counter(
            s for s in (tuple(pieces.tokens[a:b]) for a, b in zip(pieces.bounds, pieces.bounds[1:], strict=False))
        )
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert source.epoch_of(10) == 2.0
    assert source.n_supervised(3) == 10


@pytest.mark.parametrize("steps", [None, 12])
def test_the_same_global_batch_however_it_is_cut(pieces, steps):
    source = ExampleSource(pieces, LABELS, 16, global_batch=12, seed=1, steps=steps)
    shapes = set()
    for step in (0, 3, 11):
        whole = [
            (s, t) for b in source.micro_batches(step) for s, t in zip(segments(b), b.targets.tolist(), strict=True)
        ]
        assert len(whole) == 12
        for world_size, micro_batch in ((1, 4), (2, 3), (3, 2), (4, 3), (12, 1)):
            parts = []
            for rank in range(world_size):
                for batch in source.micro_batches(step, rank, world_size, micro_batch):
                    assert batch.targets.shape == (micro_batch,)
                    parts += list(zip(segments(batch), batch.targets.tolist(), strict=True))
                    if micro_batch == 3:
                        shapes.add(tuple(batch.tokens.shape))
            assert parts == whole
        assert source.n_tokens(step) == sum(len(s) for s, _ in whole)
    assert len(shapes) == 1 if steps else len(shapes) > 1
    with pytest.raises(UserError, match="multiple of ranks x micro_batch"):
        list(source.micro_batches(0, 0, 5, 1))


def test_weights_of_the_classes_make_the_normalizer(pieces):
    weights = np.array([2.0, 0.5, 0.0])
    source = ExampleSource(pieces, LABELS, 16, global_batch=5, seed=1, weights=weights)
    for step in range(6):
        (batch,) = source.micro_batches(step)
        assert source.n_supervised(step) == weights[batch.targets.numpy()].sum()
    only = ExampleSource(pieces, np.full(len(TEXTS), 2), 16, global_batch=5, seed=1, weights=weights)
    assert only.n_supervised(0) == 0


def test_each_epoch_draws_one_window_of_a_text(tokenizer):
    texts = [words(40, 7), words(3, 1)]
    pieces = encoder(tokenizer, on_long="window")(texts, ["a", "b"])
    source = ExampleSource(pieces, np.array([0, 1]), 16, global_batch=2, seed=3)
    drawn: Counter[int] = Counter()
    for step in range(500):
        _, piece = source.samples(step * 2 + np.arange(2))
        assert sorted(pieces.first[1:].searchsorted(piece, side="right")) == [0, 1]
        drawn.update(p for p in piece.tolist() if p < 5)
    assert set(drawn) == set(range(5))
    assert max(abs(n - 100) for n in drawn.values()) < 40  # 100 +- 9
    again = ExampleSource(pieces, np.array([0, 1]), 16, global_batch=1, seed=3)
    assert [int(again.samples(np.array([i]))[1][0]) for i in range(40)] == [
        int(p) for step in range(20) for p in source.samples(step * 2 + np.arange(2))[1]
    ]


def test_prediction_batches_hold_all_in_order(pieces):
    for tokens in (16, 40, 10_000):
        found, at = [], 0
        for which, batch in in_order(pieces, 16, tokens):
            assert which.start == at
            at = which.stop
            assert batch.tokens.numel() <= max(tokens, 16)
            found += segments(batch)
        assert found == [tuple(pieces.tokens[a:b]) for a, b in zip(pieces.bounds, pieces.bounds[1:], strict=False)]


def test_the_prefetcher_serves_them(pieces):
    source = ExampleSource(pieces, LABELS, 16, global_batch=8, seed=1)
    with Prefetcher(source, 2, workers=2, micro_batch=4, stop_step=5) as prefetched:
        for step, batches in enumerate(prefetched, 2):
            for ahead, direct in zip(batches, source.micro_batches(step, micro_batch=4), strict=True):
                assert torch.equal(ahead.tokens, direct.tokens)
                assert torch.equal(ahead.targets, direct.targets)


def test_a_tokenizer_made_to_frame_texts(tokenizer):
    from tokenizers import Tokenizer

    framed = Tokenizer.from_str(framing(tokenizer, Frame((2,), (3,))))
    plain = Tokenizer.from_str(tokenizer)
    text = TEXTS[5]
    assert framed.encode(text).ids == [2, *plain.encode(text).ids, 3]
    assert framed.encode(text, add_special_tokens=False).ids == plain.encode(text).ids
    assert framing(framed.to_str(), Frame((2,), (3,))) == framed.to_str()
    assert Tokenizer.from_str(framing(tokenizer, Frame((), (5,)))).encode(text).ids == [*plain.encode(text).ids, 5]
