"""The vectorised Kneser-Ney models against dictionaries and loops, and as probability distributions."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hotloop.engine.report import kneser_ney
from hotloop.engine.report.kneser_ney import BITS, SYMBOLS, KneserNey, kneser_ney_bits_per_byte, pack

START, END = "start", "end"


class Slow:
    """The formula over dictionaries. Start and end of a document are two symbols here, not one code."""

    def __init__(self, documents: list[bytes], context: int):
        occurrences: Counter[tuple] = Counter()
        for document in documents:
            symbols = [START] * context + list(document) + [END]
            occurrences.update(tuple(symbols[i - context : i + 1]) for i in range(context, len(symbols)))
        self.counts: dict[int, dict[tuple, int]] = {context: occurrences}
        for m in range(context - 1, -1, -1):
            before: dict[tuple, set] = defaultdict(set)
            total: Counter[tuple] = Counter()
            for ngram, n in occurrences.items():
                before[ngram[context - m :]].add(ngram[context - m - 1])
                total[ngram[context - m :]] += n
            self.counts[m] = {g: total[g] if m and g[0] == START else len(before[g]) for g in before}
        self.context = context

    def probability(self, symbol: object, history: tuple, m: int | None = None) -> float:
        m = self.context if m is None else m
        if m < 0:
            return 1 / 257
        history = history[len(history) - m :]
        counts = self.counts[m]
        once, twice = (sum(n == i for n in counts.values()) for i in (1, 2))
        d = once / (once + 2 * twice) if once else 0.5
        follow = {g[-1]: n for g, n in counts.items() if g[:-1] == history}
        lower = self.probability(symbol, history, m - 1)
        if not follow:
            return lower
        total = sum(follow.values())
        return (max(follow.get(symbol, 0) - d, 0) + d * len(follow) * lower) / total

    def bits(self, documents: list[bytes]) -> float:
        bits = 0.0
        for document in documents:
            symbols = [START] * self.context + list(document) + [END]
            for i in range(self.context, len(symbols)):
                bits -= math.log2(self.probability(symbols[i], tuple(symbols[i - self.context : i])))
        return bits / sum(map(len, documents))


texts = st.lists(st.text("abc\n\xff", max_size=12).map(lambda s: s.encode("latin-1")), min_size=1, max_size=5)


@given(train=texts, held_out=texts.filter(any), contexts=st.sets(st.integers(0, 6), min_size=1, max_size=3))
@example(train=[b""], held_out=[b"a"], contexts={0, 3})
@example(train=[b"aaaa", b"aaaa"], held_out=[b"aaaa", b""], contexts={2, 6})
@example(train=[b"\x00\x00\x00"], held_out=[b"\x00\x00\xff"], contexts={1, 2})
@settings(max_examples=60, deadline=None)
def test_agrees_with_dictionaries(train: list[bytes], held_out: list[bytes], contexts: set[int]) -> None:
    bits = kneser_ney_bits_per_byte(iter(train), held_out, tuple(contexts))
    assert list(bits) == sorted(contexts)
    for context in contexts:
        assert bits[context] == pytest.approx(Slow(train, context).bits(held_out), rel=1e-10)


@given(train=texts, history=st.binary(max_size=6), seen=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_probabilities_sum_to_one(train: list[bytes], history: bytes, seen: bool, data: st.DataObject) -> None:
    """Over all 257 symbols, after contexts of the training text, of a document's start, and never seen."""
    model = KneserNey.fit(train, (0, 2, 3, 4, 6))
    if seen:
        document = data.draw(st.sampled_from(train))
        history = document[: data.draw(st.integers(0, len(document)))][-6:]
    ngram = pack(history, 6)[-1]  # the symbols before it, then the end
    every = (ngram >> np.uint64(BITS) << np.uint64(BITS)) + np.arange(SYMBOLS, dtype=np.uint64)
    for context, p in model.probabilities(every).items():
        assert p.min() > 0, context
        assert p.sum() == pytest.approx(1.0, abs=1e-12), context


def test_known_numbers() -> None:
    """By hand: text "ab" twice, one byte of context. Every n-gram of two symbols occurs twice, so n_1 = 0 and D = 1/2;
    the continuation counts of a, b and the end are 2 (after a start symbol it keeps its occurrences), 1 and 1."""
    p = KneserNey.fit([b"ab", b"ab"], (1,)).probabilities(pack(b"ab", 1))[1]
    # Order 0: a follows only the start symbol, one type; all three counts are 1, n_2 = 0, so D = 1 and all mass passes
    # on: q(w) = 1/257. Order 1: (2 - 1/2) / 2 + (1/2 * 1 / 2) / 257.
    assert p == pytest.approx([0.75 + 0.25 / 257] * 3, abs=1e-15)


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    documents = [bytes(rng.choices(b"abcdef \n", k=rng.randrange(60))) for _ in range(40)]
    whole = kneser_ney_bits_per_byte(documents[:30], documents[30:])
    monkeypatch.setattr(kneser_ney, "BLOCK", 100)
    assert kneser_ney_bits_per_byte(documents[:30], documents[30:]) == pytest.approx(whole, rel=1e-12)


def test_longer_contexts_do_better_on_regular_text() -> None:
    """Words in pairs that part after 2, 3 and 5 shared bytes, so that each longer model resolves one more pair."""
    rng = random.Random(1)
    words = [b"1uv!", b"2uv?", b"3xyz#", b"4xyz%", b"5abcde+", b"6abcde="]
    documents = [b"".join(rng.choices(words, k=200)) for _ in range(40)]
    bits = kneser_ney_bits_per_byte(documents[:36], documents[36:])
    assert list(bits) == [2, 3, 4, 6]
    entropy = math.log2(len(words)) * 800 / sum(map(len, documents[36:]))  # of the words drawn, spread over their bytes
    pair = 800 / 3 / sum(map(len, documents[36:]))  # one bit for each word of a pair that is not resolved
    assert bits[2] == pytest.approx(entropy + 3 * pair, rel=0.05)
    assert bits[3] == pytest.approx(entropy + 2 * pair, rel=0.05)
    assert bits[4] == pytest.approx(entropy + pair, rel=0.05)
    assert bits[6] == pytest.approx(entropy, rel=0.05)


@pytest.mark.parametrize(
    ("train", "held_out", "contexts", "message"),
    [
        ([], [b"a"], (2,), "no training documents"),
        ([b"a"], [b"", b""], (2,), "2 held-out documents have no bytes"),
        ([b"a"], [b"a"], (2, 7), r"\(2, 7\).*between 0 and 6"),
        ([b"a"], [b"a"], (), "between 0 and 6"),
    ],
)
def test_bad_input(train: list[bytes], held_out: list[bytes], contexts: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kneser_ney_bits_per_byte(train, held_out, contexts)
