"""Train or load a tokenizer; documents -> token ids. The algorithms are those of the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hotloop.engine.errors import UserError

Kind = Literal["bpe", "wordpiece", "unigram"]
Special = Literal["causal", "masked"]

END_TOKEN = "<|endoftext|>"
ENDS = (END_TOKEN, "[SEP]", "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")
"""What ends a text in the tokenizers of others, in the order in which it is looked for."""
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNIGRAM_UNKNOWN = "<unk>"
LONGEST_WORD = 1024
"""Characters of a word (or of a run of spaces) in training."""
_LONG_RUN = re.compile(rf"\S{{{LONGEST_WORD}}}|\s{{{LONGEST_WORD}}}")


def train_tokenizer(
    texts: Iterable[str], kind: Kind = "bpe", vocab_size: int = 16_384, special: Special = "causal"
) -> str:
    """Train on `texts`; special tokens come first, `<|endoftext|>` among them.

    Returns the content of a tokenizer.json. With special = "masked" every kind has [PAD] [UNK] [CLS] [SEP] [MASK], and
    says (to libraries that ask it to add special tokens) that a text is [CLS] text [SEP].

    - bpe: byte-level with GPT-2's pre-tokenizer. Lossless: every text decodes to itself, no token is unknown.
    - wordpiece: BERT's normalizer (case kept) and pre-tokenizer, with [PAD] [UNK] [CLS] [SEP] [MASK].
    - unigram: NFKC, spaces as part of the following word, newlines apart; characters never seen in training are <unk>.

    The same texts give the same bpe and wordpiece tokenizer in every run; the library's unigram training does not
    repeat itself (it sums probabilities in the order its threads finish).

    Raises UserError if `vocab_size` cannot hold the special tokens and the alphabet.
    """
    named = BERT_TOKENS if special == "masked" else ()
    if kind == "bpe":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        least = len(alphabet) + 1 + len(named)
        if vocab_size < least:
            raise UserError(f"vocab_size = {vocab_size}: byte-level BPE needs at least {least}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[*named, END_TOKEN], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        # The library numbers continuing characters in the order of a hash map, which changes from run to run, and ties
        # between merges follow the numbers. Named as special tokens they are numbered first, in our order.
        texts = list(texts)
        alphabet = _frequent_characters(texts, tokenizer)
        continuing = ["##" + c for c in alphabet if len(tokenizer.pre_tokenizer.pre_tokenize_str("a" + c)) == 1]
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            special_tokens=[*BERT_TOKENS, END_TOKEN, *continuing],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\n"), "isolated"),
                pre_tokenizers.Metaspace(prepend_scheme="never"),
            ]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=[UNIGRAM_UNKNOWN, END_TOKEN, *named],
            unk_token=UNIGRAM_UNKNOWN,
            show_progress=False,
        )
    else:
        raise UserError(f"tokenizer kind {kind!r}: expected bpe, wordpiece or unigram")
    try:
        tokenizer.train_from_iterator(cut_long_words(texts), trainer)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the {kind} tokenizer could not be trained: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise UserError(f"vocab_size = {vocab_size}: the characters and special tokens of {kind} alone are {size}")
    described = json.loads(tokenizer.to_str())
    if kind == "wordpiece":
        described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in continuing]
    if kind == "unigram":
        # Text that spells the end token may be learnt as a piece once more, and the library then takes that one.
        first = [UNIGRAM_UNKNOWN, END_TOKEN, *named]
        pieces = described["model"]["vocab"]
        learnt = [piece for piece in pieces[len(first) :] if piece[0] not in first]
        described["model"]["vocab"] = [*pieces[: len(first)], *learnt]
        for token in described["added_tokens"]:
            token["id"] = first.index(token["content"])
    if special == "masked":
        ids = {token["content"]: token["id"] for token in described["added_tokens"]}
        frame = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
        )
        tokenizer = Tokenizer.from_str(json.dumps(described))
        tokenizer.post_processor = frame
        described["post_processor"] = json.loads(tokenizer.to_str())["post_processor"]
    return json.dumps(described, indent=2, ensure_ascii=False)


def cut_long_words(texts: Iterable[str]) -> Iterator[str]:
    """The texts, cut so that no word is longer than `LONGEST_WORD`.

    The library's training takes time quadratic in the length of a word: 1.4 s for one of 64,000 characters, hours for
    some megabytes of base64 or of a language in one line. Encoding is linear, and needs no cuts.
    """
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.end()]
            start = run.end()
        if start < len(text) or not text:
            yield text[start:]


def _frequent_characters(texts: Iterable[str], tokenizer: Tokenizer, limit: int = 1000) -> list[str]:
    """The `limit` most frequent visible characters after normalization, in code-point order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    visible = [character for character in counts if not character.isspace()]
    return sorted(sorted(visible, key=lambda c: (-counts[c], c))[:limit])


def load_tokenizer(path: Path, end_token: str | None = None) -> str:
    """The JSON of a tokenizer.json (or of the folder that holds it), without what it truncates or pads to.

    Raises UserError if it is none, or lacks `end_token` (none: any of `ENDS`).
    """
    path = path / "tokenizer.json" if path.is_dir() else path
    text = plain_tokenizer(path)
    tokenizer = Tokenizer.from_str(text)
    if find_end(tokenizer, end_token) is None:
        names = ENDS if end_token is None else (end_token,)
        special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        raise UserError(
            f"{path}: no token {' or '.join(map(repr, names))} to end documents with; name one with --end-token "
            f"(special tokens: {', '.join(map(repr, special)) or 'none'})"
        )
    return text


def plain_tokenizer(path: Path) -> str:
    """The JSON of a tokenizer.json without what it truncates or pads to. Raises UserError if it is none."""
    try:
        text = path.read_text(encoding="utf-8")
        Tokenizer.from_str(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
    # Edited here and not by the library, whose reader rounds a unigram model's scores anew each time.
    # A truncation would crop documents.
    return json.dumps({**json.loads(text), "truncation": None, "padding": None}, indent=2, ensure_ascii=False)


def find_end(tokenizer: Tokenizer, end_token: str | None = None) -> str | None:
    """The token to end documents with: `end_token`, by default the first of `ENDS`, where the tokenizer has it."""
    names = ENDS if end_token is None else (end_token,)
    return next((name for name in names if tokenizer.token_to_id(name) is not None), None)


def canonical_json(tokenizer_json: str) -> str:
    return json.dumps(json.loads(tokenizer_json), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def tokenizer_hash(tokenizer_json: str) -> str:
    """SHA-256 of the canonical JSON: whitespace and the order of keys do not matter."""
    return hashlib.sha256(canonical_json(tokenizer_json).encode()).hexdigest()


class Encoder:
    """Documents -> token ids, on all cores.

    The text of a special token inside a document is ordinary text: it never becomes the special token, so no document
    can end another. Nothing is added around a document.
    """

    def __init__(self, tokenizer_json: str, end_token: str | None = None):
        """`end_token` none: the first of `ENDS` that the tokenizer has."""
        self.json = tokenizer_json
        self.tokenizer = Tokenizer.from_str(self.json)
        found = find_end(self.tokenizer, end_token)
        if found is None:
            raise ValueError(f"the tokenizer has no token {end_token!r} to end documents with")
        self.tokenizer.encode_special_tokens = True  # the library's name for "as ordinary text"
        self.hash = tokenizer_hash(self.json)
        # Not get_vocab_size: ids may have holes, and what is stored must hold the largest.
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token = found
        self.end_id: int = self.tokenizer.get_vocab(with_added_tokens=True)[found]
        self.dtype = dtype_of(self.vocab_size)
        model = json.loads(self.json)["model"]
        self.unknown_id: int | None = model.get("unk_id")
        if self.unknown_id is None and model.get("unk_token") is not None:
            self.unknown_id = self.tokenizer.token_to_id(model["unk_token"])

        special = {i: token.content for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        special = {**special, self.end_id: found}
        if self.unknown_id is not None:
            special.pop(self.unknown_id, None)
        self._is_special = np.zeros(self.vocab_size, dtype=bool)
        self._is_special[list(special)] = True
        # Between the first character of a special token's text and the rest.
        inside = (f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})" for text in special.values() if len(text) > 1)
        self._inside_special = re.compile("|".join(inside) or "(?!)")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids per text, in `dtype`. Raises UserError for a text that cannot be kept from being special."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # without offsets: 1.6x
        out = [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]
        for number, tokens in enumerate(out):
            if self._is_special[tokens].any():
                out[number] = self._encode_apart(texts[number])
        return out

    def _encode_apart(self, text: str) -> np.ndarray:
        """Encode a text that holds what the model's own vocabulary has as a special token (unigram): cut inside it."""
        encodings = self.tokenizer.encode_batch_fast(self._inside_special.split(text), add_special_tokens=False)
        tokens = np.array([i for encoding in encodings for i in encoding.ids], dtype=self.dtype)
        special = tokens[self._is_special[tokens]]
        if len(special):
            name = self.tokenizer.id_to_token(int(special[0]))
            raise UserError(
                f"ordinary text encodes to the special token {name!r}; choose another --end-token or tokenizer"
            )
        return tokens


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id of a vocabulary: uint16 up to 65,536 entries, else uint32."""
    if vocab_size > 1 << 32:
        raise UserError(f"vocabulary of {vocab_size} entries: at most 2^32 can be stored")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
