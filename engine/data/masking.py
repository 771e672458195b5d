"""Which tokens a masked model has to find, and what it sees in their place (Devlin et al., arXiv:1810.04805).

Of the maskable tokens of a row, the share `rate` is hidden: most become [MASK], some a random token, the rest stay, and
all of them are targets. Every draw is a hash of (key of the row, position in the row), and a row's key one of (seed,
source, epoch, pack): neither batches, ranks nor workers change it, and each epoch draws anew.

The count is exact, not binomial: a row of n maskable tokens hides floor(rate n + u) of them, u uniform in [0, 1), which
is rate n in the mean and never more than ceil(rate n). So the loader knows a bound, and shapes stay static.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from hotloop.engine.config import MaskingConfig
from hotloop.engine.data.order import derive_key, mix
from hotloop.engine.errors import UserError

FIRST = ("[CLS]", "<s>", "<cls>")
LAST = ("[SEP]", "</s>", "<sep>")
MASK = ("[MASK]", "<mask>")
BYTE_LEVEL_SPACES = "ĠĊĉč"  # how byte-level BPE writes a space, a newline, a tab and a carriage return
METASPACE = "▁"

_PURPOSE = 0x6D61736B
"""Keeps these draws apart from those of other purposes that derive keys from the same seed."""
_ROW, _UNIT, _KIND, _TOKEN = range(4)
"""What a draw decides: the rounding of a row's count, the order of its tokens or words, what replaces one, by which."""


class Words(NamedTuple):
    """How tokens make words. Tables have an entry for each id."""

    continues: np.ndarray  # (V,) bool, belongs to the word of the token before it
    closes: np.ndarray  # (V,) bool, what comes after it does not belong to its word


@dataclass(frozen=True)
class Vocabulary:
    """What masking has to know of a tokenizer. Tables have an entry for each id."""

    mask: int
    first: int | None  # begins a sequence: [CLS]
    last: int | None  # ends it: [SEP]
    special: np.ndarray  # (V,) bool, never masked and never drawn
    ordinary: np.ndarray  # (n,) int64, the other ids that stand for something
    words: Words | None  # none: the tokenizer does not tell
    spaces_lead: bool  # a space is part of the token after it

    @classmethod
    def of(cls, tokenizer_json: str) -> Vocabulary:
        """Raises UserError for a tokenizer without a mask token."""
        tokenizer = Tokenizer.from_str(tokenizer_json)
        described = json.loads(tokenizer_json)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        mask = _first_of(MASK, added)
        if mask is None:
            raise UserError(
                f"the tokenizer has no mask token ({' or '.join(MASK)}): prepare the corpus with "
                "`hotloop prepare ... --special masked`, or with --tokenizer and the tokenizer.json of a masked model"
            )
        texts = [""] * (max(vocabulary.values()) + 1)
        for text, i in vocabulary.items():
            texts[i] = text
        special = np.zeros(len(texts), dtype=bool)
        special[list(added.values())] = True
        unknown = described["model"].get("unk_id")
        if unknown is None and described["model"].get("unk_token") is not None:
            unknown = vocabulary.get(described["model"]["unk_token"])
        if unknown is not None:
            special[unknown] = True
        exists = np.zeros(len(texts), dtype=bool)
        exists[list(vocabulary.values())] = True
        words = _words(described, texts)
        return cls(
            mask=mask,
            first=_first_of(FIRST, added),
            last=_first_of(LAST, added),
            special=special,
            ordinary=np.flatnonzero(exists & ~special),
            words=words,
            spaces_lead=words is not None and described["model"]["type"] != "WordPiece",
        )


@dataclass(frozen=True)
class Masked:
    inputs: np.ndarray  # (n,) int64
    hidden: np.ndarray  # (n,) bool, the targets


class Masking:
    """Hides tokens of rows. Raises UserError for whole words with a tokenizer that does not tell words."""

    def __init__(self, config: MaskingConfig, vocabulary: Vocabulary, seed: int):
        if config.whole_words and vocabulary.words is None:
            raise UserError(
                "masking.whole_words: this tokenizer does not tell where words begin (neither WordPiece, byte-level "
                "nor with spaces as part of tokens); set it to false"
            )
        self.config, self.vocabulary, self.seed = config, vocabulary, seed

    def keys(self, source: np.ndarray, epoch: np.ndarray, pack: np.ndarray) -> np.ndarray:
        """(rows,) uint64, one for each row from three of (rows,)."""
        return derive_key(self.seed, np.full(len(pack), _PURPOSE), source, epoch, pack)

    def most(self, n: int) -> int:
        """Tokens that are hidden at most in a row that holds n."""
        return math.ceil(self.config.rate * n)

    def counts(self, tokens: np.ndarray, row: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """(rows,) int64: how many tokens of each row are to be hidden. Whole words may leave some of it over."""
        n = np.bincount(row[~self.vocabulary.special[tokens]], minlength=len(keys))
        wanted = self.config.rate * n
        rows = np.arange(len(keys))
        rounded = np.floor(wanted + _uniform(_draw(keys, rows, np.zeros_like(rows), _ROW)))
        return np.minimum(rounded, np.ceil(wanted)).astype(np.int64)  # the sum may round up to the next integer

    def __call__(
        self,
        tokens: np.ndarray,  # (n,) int64
        row: np.ndarray,  # (n,) int64, ascending
        position: np.ndarray,  # (n,) int64, of each token in its row
        begins: np.ndarray,  # (n,) bool, the first token of a piece
        keys: np.ndarray,  # (rows,) uint64
    ) -> Masked:
        config, vocabulary = self.config, self.vocabulary
        maskable = ~vocabulary.special[tokens]
        candidate = np.flatnonzero(maskable)
        order = _draw(keys, row[candidate], position[candidate], _UNIT)
        budget = self.counts(tokens, row, keys)
        if config.whole_words:
            word = np.cumsum(~self.continues(tokens, begins))[candidate]
            _, first, unit, size = np.unique(word, return_index=True, return_inverse=True, return_counts=True)
            chosen = _fill(row[candidate][first], order[first], size, budget)[unit.reshape(-1)]
        else:
            chosen = _fill_ones(row[candidate], order, budget)
        at = candidate[chosen]
        hidden = np.zeros(len(tokens), dtype=bool)
        hidden[at] = True

        kind = _uniform(_draw(keys, row[at], position[at], _KIND))
        drawn = _uniform(_draw(keys, row[at], position[at], _TOKEN)) * len(vocabulary.ordinary)
        other = vocabulary.ordinary[drawn.astype(np.int64)]
        inputs = tokens.copy()
        inputs[at] = np.where(
            kind < config.mask_share,
            vocabulary.mask,
            np.where(kind < config.mask_share + config.random_share, other, tokens[at]),
        )
        return Masked(inputs, hidden)

    def continues(self, tokens: np.ndarray, begins: np.ndarray) -> np.ndarray:
        """(n,) bool: belongs to the word of the token before it."""
        special, words = self.vocabulary.special, self.vocabulary.words
        assert words is not None
        out = words.continues[tokens] & ~special[tokens] & ~begins
        out[1:] &= ~(words.closes | special)[tokens[:-1]]
        return out


def _fill_ones(row: np.ndarray, order: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """(n,) bool: in each row the `budget[row]` items with the smallest `order`."""
    by_order = np.lexsort((order, row))
    ranked = row[by_order]
    rank = np.arange(len(row)) - np.searchsorted(ranked, ranked)
    chosen = np.zeros(len(row), dtype=bool)
    chosen[by_order[rank < budget[ranked]]] = True
    return chosen


def _fill(row: np.ndarray, order: np.ndarray, size: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """(n,) bool: each row takes its items in `order`, passing over those larger than what its budget still holds.

    Each pass takes all items up to the first that is too large; what is left of the budget halves or so each time.
    """
    chosen = np.zeros(len(row), dtype=bool)
    left = budget.copy()
    waiting = np.lexsort((order, row))
    while len(waiting := waiting[size[waiting] <= left[row[waiting]]]):
        r, s = row[waiting], size[waiting]
        begin = np.searchsorted(r, r)
        total = np.cumsum(s)
        within = total - (total[begin] - s[begin])  # tokens of the row's items up to and with this one
        # Where one is too large all behind it are too: sums grow.
        fits = within <= left[r]
        taken = waiting[fits]
        chosen[taken] = True
        left -= np.bincount(row[taken], weights=size[taken], minlength=len(left)).astype(np.int64)
        waiting = waiting[~fits]
    return chosen


def _draw(keys: np.ndarray, row: np.ndarray, position: np.ndarray, purpose: int) -> np.ndarray:
    """uint64 for each (row, position)."""
    counter = position.astype(np.uint64) * np.uint64(4) + np.uint64(purpose)
    return mix(keys[row] ^ mix(counter + np.uint64(0x9E3779B97F4A7C15)))


def _uniform(draws: np.ndarray) -> np.ndarray:
    """Of [0, 1), multiples of 2^-53."""
    return (draws >> np.uint64(11)) * 2.0**-53


def _first_of(names: tuple[str, ...], ids: dict[str, int]) -> int | None:
    return next((ids[name] for name in names if name in ids), None)


def _words(described: dict[str, Any], texts: list[str]) -> Words | None:
    """WordPiece marks what continues a word. Elsewhere a space (byte-level: any white space) is part of the token that
    follows it, and a word is what stands between two of them, punctuation included.
    """
    if described["model"]["type"] == "WordPiece":
        prefix = described["model"].get("continuing_subword_prefix", "##")
        return Words(np.array([text.startswith(prefix) for text in texts]), np.zeros(len(texts), dtype=bool))
    steps = _types(described.get("pre_tokenizer")) | _types(described.get("decoder")) | _types(described["normalizer"])
    if "ByteLevel" in steps:
        spaces = tuple(BYTE_LEVEL_SPACES)
    elif "Metaspace" in steps or any(text.startswith(METASPACE) for text in texts):
        spaces = (METASPACE, "\n")
    else:
        return None
    begins = np.array([text.startswith(spaces) for text in texts])
    return Words(~begins, np.array([text.endswith(spaces) for text in texts]))


def _types(step: Any) -> set[str]:
    """Kinds of a tokenizer.json's step and of those it is made of."""
    if isinstance(step, list):
        return {kind for part in step for kind in _types(part)}
    if not isinstance(step, dict):
        return set()
    nested = (part for value in step.values() if isinstance(value, list) for part in value)
    return {str(step.get("type"))} | {kind for part in nested for kind in _types(part)}
