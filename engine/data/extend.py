"""More tokens for a tokenizer: those of the user's language, so that its texts become fewer tokens.

The old tokens keep their ids, and a text in which no new token applies its ids. New tokens are learnt where the old
tokenizer leaves a word in pieces: the pair of pieces that is most frequent becomes one, again and again, as byte-pair
encoding is trained.

- BPE: the new merges come after all the old ones, so that encoding ends where it ended and then goes on. Every merge is
  reached.
- WordPiece takes the longest entry that fits, Unigram the likeliest pieces: there an entry is enough, but the steps on
  the way to a long entry are not needed. Candidates are tried on the words, and those that save most are kept.

They are entries of the model and not `added_tokens`: those are cut out of the text before anything else, also inside
words that only happen to contain them.
"""

from __future__ import annotations

import heapq
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby, islice, pairwise
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from hotloop.engine.data.tokenizer import cut_long_words
from hotloop.engine.errors import UserError

MIN_COUNT = 2
"""A pair of pieces that occurs less often is chance."""
ROUNDS = 8
BYTE = re.compile("<0x[0-9A-F]{2}>")
MARGIN = 0.1
"""Nats by which a new unigram piece is likelier than the pieces it replaces."""


class Merge(NamedTuple):
    left: str
    right: str
    whole: str
    frequency: int


def extend_tokenizer(tokenizer_json: str, texts: Iterable[str], n: int) -> str:
    """The tokenizer with up to `n` more tokens, learnt from `texts`: fewer where too little repeats itself.

    Returns the content of a tokenizer.json. Raises UserError for a kind of model that cannot be extended.
    """
    described = json.loads(tokenizer_json)
    model = described["model"]
    kind = _check(described)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    words = _words(tokenizer, texts)
    known = set(tokenizer.get_vocab(with_added_tokens=True))
    prefix = model.get("continuing_subword_prefix") or "" if kind == "WordPiece" else ""
    unknown = model.get("unk_id") if kind == "Unigram" else tokenizer.token_to_id(model.get("unk_token") or "")
    merges = _learn(_in_pieces(tokenizer, words, unknown), prefix, known)
    if kind == "BPE":
        return _with_merges(described, list(islice(merges, n)))
    return _with_entries(described, words, list(islice(merges, 2 * n)), n)


def new_tokens(old_json: str, new_json: str) -> dict[str, int]:
    """The tokens that a tokenizer has and an older one lacks, with their ids.

    Raises UserError where the newer one is not an extension: a token of the older has another id, or is gone.
    """
    old, new = (Tokenizer.from_str(text).get_vocab(with_added_tokens=True) for text in (old_json, new_json))
    for token, number in sorted(old.items(), key=lambda item: item[1]):
        if new.get(token) != number:
            raise UserError(
                f"token {token!r} is {number} in the checkpoint's tokenizer and {new.get(token, 'absent')} in the "
                "corpus's: prepare the corpus with --tokenizer or --extend-tokenizer and the checkpoint's folder"
            )
    return {token: number for token, number in new.items() if token not in old}


def extends(old_json: str, new_json: str) -> bool:
    """Whether the newer tokenizer is the older one with more tokens."""
    old, new = json.loads(old_json), json.loads(new_json)
    if old.keys() != new.keys() or any(old[key] != new[key] for key in old.keys() - {"model"}):
        return False
    rest = {"vocab", "merges"}
    same = all(old["model"][key] == new["model"].get(key) for key in old["model"].keys() - rest)
    for name in rest:  # in the order of their ranks or ids; a dictionary is checked by new_tokens
        mine, longer = old["model"].get(name) or [], new["model"].get(name) or []
        same = same and (isinstance(mine, dict) or mine == longer[: len(mine)])
    if not same:
        return False
    try:
        return bool(new_tokens(old_json, new_json))
    except UserError:
        return False


def pieces_of(tokenizer_json: str, tokens: Iterable[str]) -> dict[str, list[int]]:
    """Token -> the ids that a tokenizer without it writes it with."""
    described = json.loads(tokenizer_json)
    tokenizer = Tokenizer.from_str(tokenizer_json)
    prefix = described["model"].get("continuing_subword_prefix") or ""
    found = {}
    for token in tokens:
        if described["model"]["type"] == "WordPiece" and token.startswith(prefix):
            found[token] = _continuing(described["model"]["vocab"], token, prefix)
        else:
            found[token] = [piece.id for piece in tokenizer.model.tokenize(token)]
    return found


def _continuing(vocab: dict[str, int], token: str, prefix: str) -> list[int]:
    """WordPiece in the middle of a word: from the left the longest entry that fits; nothing where none does."""
    rest, ids = token.removeprefix(prefix), []
    while rest:
        fits = next((end for end in range(len(rest), 0, -1) if prefix + rest[:end] in vocab), 0)
        if not fits:
            return []
        ids.append(vocab[prefix + rest[:fits]])
        rest = rest[fits:]
    return ids


# The words of a text, and the pairs of pieces in them


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Counter[str]:
    """Words as the tokenizer's model sees them, and how often."""
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    words: Counter[str] = Counter()
    for text in cut_long_words(texts):
        normal = text if normalizer is None else normalizer.normalize_str(text)
        if pre_tokenizer is not None:
            words.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normal))
        else:  # Llama 2: the model reads the whole text, ▁ for spaces; no token is learnt across them
            words.update(re.findall("▁*[^▁]+|▁+", normal))
    return words


def _in_pieces(tokenizer: Tokenizer, words: Counter[str], unknown: int | None) -> Counter[tuple[str, ...]]:
    """The pieces of each word that has several. What stands for an unknown character joins no other: decoders know
    <0x..> by itself only."""
    single = {i for token, i in tokenizer.get_vocab().items() if BYTE.fullmatch(token)} | {unknown}
    split: Counter[tuple[str, ...]] = Counter()
    for word, count in words.items():
        tokens = tokenizer.model.tokenize(word)
        for known, run in groupby(tokens, key=lambda token: token.id not in single):
            pieces = tuple(token.value for token in run)
            if known and len(pieces) > 1:
                split[pieces] += count
    return split


def _learn(words: Counter[tuple[str, ...]], prefix: str, known: set[str]) -> Iterator[Merge]:
    """Merges in the order of byte-pair encoding; ties by the pieces' text. What is known already is no new token."""
    parts = [list(word) for word in words]
    counts = list(words.values())
    pairs: Counter[tuple[str, str]] = Counter()
    where: dict[tuple[str, str], set[int]] = defaultdict(set)
    for number, word in enumerate(parts):
        for pair in pairwise(word):
            pairs[pair] += counts[number]
            where[pair].add(number)
    heap = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(heap)
    known = set(known)
    while heap:
        count, pair = heapq.heappop(heap)
        if pairs[pair] != -count:
            continue  # an older count
        if -count < MIN_COUNT:
            return
        left, right = pair
        whole = left + right.removeprefix(prefix)
        if whole in known:
            continue
        known.add(whole)
        yield Merge(left, right, whole, -count)
        changed: set[tuple[str, str]] = set()
        for number in where.pop(pair):
            word = parts[number]
            for old in pairwise(word):
                pairs[old] -= counts[number]
                changed.add(old)
            parts[number] = word = _merged(word, left, right, whole)
            for new in pairwise(word):
                pairs[new] += counts[number]
                where[new].add(number)
                changed.add(new)
        for pair in changed:
            if pairs[pair]:
                heapq.heappush(heap, (-pairs[pair], pair))


def _merged(word: list[str], left: str, right: str, whole: str) -> list[str]:
    merged, i = [], 0
    while i < len(word):
        if word[i : i + 2] == [left, right]:
            merged.append(whole)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


# What the kinds of models need


def _check(described: dict[str, Any]) -> str:
    model = described["model"]
    kind = model.get("type", "")
    reason = None
    if kind not in ("BPE", "WordPiece", "Unigram"):
        reason = f"a model of type {kind!r} (BPE, WordPiece and Unigram are)"
    elif kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        reason = "a BPE that marks pieces inside or at the end of words"
    elif kind == "Unigram" and any(token["id"] >= len(model["vocab"]) for token in described["added_tokens"]):
        reason = "a Unigram whose added tokens have the ids that its next pieces would have"
    if reason:
        raise UserError(f"--extend-tokenizer: {reason} cannot be extended")
    return kind


def _next_ids(described: dict[str, Any]) -> Iterator[int]:
    """Ids after all that are taken. Added tokens become entries of the model besides: the library would otherwise count
    on from the model's size and give them others."""
    vocab: dict[str, int] = described["model"]["vocab"]
    for token in described["added_tokens"]:
        vocab.setdefault(token["content"], token["id"])
    number = max(vocab.values(), default=-1)
    while True:
        number += 1
        yield number


def _with_merges(described: dict[str, Any], merges: list[Merge]) -> str:
    model = described["model"]
    ids = _next_ids(described)
    as_text = bool(model["merges"]) and isinstance(model["merges"][0], str)
    for merge in merges:
        model["vocab"][merge.whole] = next(ids)
        model["merges"].append(f"{merge.left} {merge.right}" if as_text else [merge.left, merge.right])
    return json.dumps(described, indent=2, ensure_ascii=False)


def _with_entries(described: dict[str, Any], words: Counter[str], candidates: list[Merge], n: int) -> str:
    """The `n` candidates that save most tokens over the words, each of them in use."""
    old = json.dumps(described)
    parts = pieces_of(old, [merge.whole for merge in candidates])
    counts = {merge.whole: merge.frequency for merge in candidates if parts[merge.whole]}
    used = _used(_added(old, parts, counts, list(counts)), words)
    saved = {token: used[token] * (len(parts[token]) - 1) for token in counts}
    kept: list[str] = []
    for _ in range(ROUNDS):
        # Most saved first; of those that longer candidates have left without a use, the most frequent.
        order = sorted(saved, key=lambda token: (-saved[token], -counts[token], token))
        kept = order[:n]
        used = _used(_added(old, parts, counts, kept), words)
        idle = [token for token in kept if not used[token]]
        if not idle:
            break
        saved.update({token: used[token] * (len(parts[token]) - 1) for token in kept})
        for token in idle:
            del saved[token]
    chosen = {token for token in kept if used[token]}
    return _added(old, parts, counts, [token for token in counts if token in chosen])


def _used(tokenizer_json: str, words: Counter[str]) -> Counter[str]:
    model = Tokenizer.from_str(tokenizer_json).model
    used: Counter[str] = Counter()
    for word, count in words.items():
        for token in model.tokenize(word):
            used[token.value] += count
    return used


def _added(old: str, parts: dict[str, list[int]], counts: dict[str, int], tokens: list[str]) -> str:
    """The tokenizer with entries more. A unigram piece has the logarithm of its share, as the old ones have, and never
    less than what it costs in parts: else it would never be taken."""
    described = json.loads(old)
    model = described["model"]
    if model["type"] == "WordPiece":
        model["vocab"].update(zip(tokens, _next_ids(described), strict=False))
    else:
        total = sum(counts.values())
        scores = [score for _, score in model["vocab"]]
        for token in tokens:
            in_parts = sum(scores[number] for number in parts[token])
            model["vocab"].append([token, max(math.log(counts[token] / total), in_parts + MARGIN)])
    return json.dumps(described, indent=2, ensure_ascii=False)
