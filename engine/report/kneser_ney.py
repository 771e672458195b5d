"""Interpolated Kneser-Ney models of bytes: what counting alone reaches on the same held-out text.

A model with k bytes of context predicts a symbol w (256 bytes and the end of a document, 257 in all) after the symbols
h, the last k of them:

    p_k(w | h) = max(c(h w) - D, 0) / c(h) + D * types(h) / c(h) * q_{k-1}(w | h without its oldest symbol)
    q_m(w | h) = the same, with continuation counts: c(h w) is the number of distinct symbols seen before h w
    q_{-1}(w)  = 1 / 257
    D          = n_1 / (n_1 + 2 n_2) for each order, n_i the number of n-grams counted i times

with c(h) = sum_w c(h w) and types(h) the number of w with c(h w) > 0; a context never seen passes its whole mass on, so
every p_k sums to 1 and gives nothing probability 0. Before its first byte a document has k start symbols, which share
the code of the end of a document: it is never a context otherwise. An n-gram that begins with a start symbol has only
that symbol before it, so in the lower orders it keeps its number of occurrences.

Kneser and Ney, "Improved backing-off for m-gram language modeling", 1995; Chen and Goodman, "An empirical study of
smoothing techniques for language modeling", 1999, section 2.7.

Seven symbols of 9 bits fit one uint64 key, the oldest symbol on top, so counting is sorting keys, an n-gram's context
is `key >> 9` and its suffix a bit mask. One count of the longest n-grams gives all lower orders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BOUNDARY = 256
"""Predicted: the end of a document. In a context: before its first byte."""
SYMBOLS = 257
BITS = 9
LONGEST_CONTEXT = 6
BLOCK = 1 << 24
"""Symbols that are packed and sorted at a time: bounds the memory of fitting."""

Keys = npt.NDArray[np.uint64]
Counts = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Order:
    """The n-grams of one length: m symbols, the last of them predicted from the m - 1 before it."""

    ngrams: Keys  # (N,) sorted
    counts: Counts  # (N,)
    contexts: Keys  # (C,) sorted
    totals: Counts  # (C,) sum of the context's counts
    types: Counts  # (C,) number of the context's n-grams
    discount: float

    @classmethod
    def count(cls, ngrams: Keys, counts: Counts) -> Order:
        """From sorted n-grams and how often each counts."""
        context = ngrams >> np.uint64(BITS)
        first = np.flatnonzero(np.concatenate(([True], context[1:] != context[:-1])))
        types = np.diff(np.append(first, len(context)))
        n_1, n_2 = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
        # Without n-grams counted once the estimate is 0 (or 0 / 0) and unseen symbols would get nothing.
        discount = n_1 / (n_1 + 2 * n_2) if n_1 else 0.5
        return cls(ngrams, counts, context[first], np.add.reduceat(counts, first), types, discount)

    def probability(self, ngrams: Keys, lower: Probabilities) -> Probabilities:
        """Probability of each n-gram's last symbol after the others; `lower` is that of the next lower order."""
        seen, at = _find(self.contexts, ngrams >> np.uint64(BITS))
        total = np.where(seen, self.totals[at], 1)
        kept = np.where(seen, self.discount * self.types[at] / total, 1.0)
        known, of = _find(self.ngrams, ngrams)
        return np.where(known, (self.counts[of] - self.discount) / total, 0.0) + kept * lower


@dataclass(frozen=True)
class KneserNey:
    """Models of every context length up to the longest, fitted together."""

    occurrences: dict[int, Order]
    """By context length: the counts of the model whose context has that length."""
    continuations: dict[int, Order]
    """By context length: the counts that longer models fall back on."""

    @classmethod
    def fit(cls, documents: Iterable[bytes], contexts: Sequence[int]) -> KneserNey:
        """Count the n-grams of `documents`. Raises ValueError without documents or with a context beyond 6 bytes."""
        longest = _longest(contexts)
        blocks = [np.unique(keys, return_counts=True) for keys in _blocks(documents, longest)]
        if not blocks:
            raise ValueError("Kneser-Ney: no training documents")
        ngrams, raw = _sum_by_key(np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks]))
        occurrences, continuations = {longest: Order.count(ngrams, raw)}, {}
        for context in range(longest - 1, -1, -1):
            suffixes = ngrams & _mask(context + 1)
            _, types = np.unique(suffixes, return_counts=True)
            ngrams, raw = _sum_by_key(suffixes, raw)
            starts = ngrams >> np.uint64(BITS * context) == BOUNDARY if context else np.zeros(len(ngrams), bool)
            continuations[context] = Order.count(ngrams, np.where(starts, raw, types))
            if context in contexts:
                occurrences[context] = Order.count(ngrams, raw)
        return cls(occurrences, continuations)

    def probabilities(self, ngrams: Keys) -> dict[int, Probabilities]:
        """For each fitted context length: probability of each n-gram's last symbol after the others.

        ngrams (N,) as from `pack`, with at least as many symbols as the longest model's.
        """
        result = {}
        lower = np.full(len(ngrams), 1.0 / SYMBOLS)
        for context in range(max(self.occurrences) + 1):
            suffixes = ngrams & _mask(context + 1)
            if context in self.occurrences:
                result[context] = self.occurrences[context].probability(suffixes, lower)
            if context in self.continuations:
                lower = self.continuations[context].probability(suffixes, lower)
        return result


def kneser_ney_bits_per_byte(
    train: Iterable[bytes], held_out: Sequence[bytes], contexts: Sequence[int] = (2, 3, 4, 6)
) -> dict[int, float]:
    """Bits per byte of `held_out` under the models fitted on `train`, by context length in bytes.

    `-sum(log2(p(w))) / n_bytes`, the sum over every byte and one end of document per document: the same count that a
    language model over tokens is charged with. Raises ValueError without training documents or held-out bytes, or with
    a context outside 0..6.
    """
    n_bytes = sum(map(len, held_out))
    if n_bytes == 0:
        raise ValueError(f"Kneser-Ney: the {len(held_out)} held-out documents have no bytes")
    model = KneserNey.fit(train, contexts)
    bits = dict.fromkeys(sorted(set(contexts)), 0.0)
    for ngrams in _blocks(held_out, _longest(contexts)):
        for context, p in model.probabilities(ngrams).items():
            if context in bits:
                bits[context] -= float(np.log2(p).sum())
    return {context: total / n_bytes for context, total in bits.items()}


def pack(document: bytes, context: int) -> Keys:
    """The n-grams of one document, one for each byte and its end: (len + 1,), each of `context + 1` symbols."""
    return _pack([document], context)


def _pack(documents: Sequence[bytes], context: int) -> Keys:
    # Start symbols, bytes and the end of every document in one row; the keys that predict a start symbol are dropped.
    size = sum(map(len, documents)) + len(documents) * (context + 1)
    symbols = np.full(size, BOUNDARY, np.uint64)
    predicted = np.ones(size, bool)
    at = 0
    for document in documents:
        predicted[at : at + context] = False
        at += context
        symbols[at : at + len(document)] = np.frombuffer(document, np.uint8)
        at += len(document) + 1
    keys = symbols.copy()
    for distance in range(1, context + 1):
        keys[distance:] |= symbols[:-distance] << np.uint64(BITS * distance)
    return keys[predicted]


def _blocks(documents: Iterable[bytes], context: int) -> Iterator[Keys]:
    block: list[bytes] = []
    size = 0
    for document in documents:
        block.append(document)
        size += len(document) + context + 1
        if size >= BLOCK:
            yield _pack(block, context)
            block, size = [], 0
    if block:
        yield _pack(block, context)


def _longest(contexts: Sequence[int]) -> int:
    if not contexts or min(contexts) < 0 or max(contexts) > LONGEST_CONTEXT:
        raise ValueError(
            f"Kneser-Ney: contexts {tuple(contexts)}: expected lengths between 0 and {LONGEST_CONTEXT} bytes"
        )
    return max(contexts)


def _mask(symbols: int) -> np.uint64:
    return np.uint64((1 << (BITS * symbols)) - 1)


def _sum_by_key(keys: Keys, values: Counts) -> tuple[Keys, Counts]:
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    first = np.flatnonzero(np.concatenate(([True], keys[1:] != keys[:-1])))
    return keys[first], np.add.reduceat(values[order], first)


def _find(table: Keys, keys: Keys) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.intp]]:
    """Whether each key is in the sorted table, and where (a valid index in any case)."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return table[at] == keys, at
