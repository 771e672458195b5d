"""Train or load a tokenizer; documents -> token ids. The algorithms are those of the `tokenizers` library."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hotloop.engine.errors import UserError

Kind = Literal["bpe", "wordpiece", "unigram"]

END_TOKEN = "<|endoftext|>"
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
UNIGRAM_UNKNOWN = "<unk>"


def train_tokenizer(texts: Iterable[str], kind: Kind = "bpe", vocab_size: int = 16_384) -> Tokenizer:
    """Train on `texts`; special tokens come first, `<|endoftext|>` among them.

    - bpe: byte-level with GPT-2's pre-tokenizer. Lossless: every text decodes to itself, no token is unknown.
    - wordpiece: BERT's normalizer (case kept) and pre-tokenizer, with [PAD] [UNK] [CLS] [SEP] [MASK].
    - unigram: NFKC, spaces as part of the following word, newlines apart; characters never seen in training are <unk>.

    Raises UserError if `vocab_size` cannot hold the special tokens and the alphabet.
    """
    if kind == "bpe":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < len(alphabet) + 1:
            raise UserError(f"vocab_size = {vocab_size}: byte-level BPE needs at least {len(alphabet) + 1}")
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END_TOKEN], initial_alphabet=alphabet, show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=[*BERT_TOKENS, END_TOKEN], show_progress=False
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
            special_tokens=[UNIGRAM_UNKNOWN, END_TOKEN],
            unk_token=UNIGRAM_UNKNOWN,
            show_progress=False,
        )
    else:
        raise UserError(f"tokenizer kind {kind!r}: expected bpe, wordpiece or unigram")
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"the {kind} tokenizer could not be trained: {error}") from error
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > vocab_size:
        raise UserError(f"vocab_size = {vocab_size}: the characters and special tokens of {kind} alone are {size}")
    return tokenizer


def load_tokenizer(path: Path, end_token: str = END_TOKEN) -> Tokenizer:
    """Read a tokenizer.json (or the folder that holds it). Raises UserError if it lacks `end_token`."""
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error})") from error
    # What a saved tokenizer truncates or pads to would crop documents.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if tokenizer.token_to_id(end_token) is None:
        special = sorted(token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special)
        raise UserError(
            f"{path}: no token {end_token!r} to end documents with; name one with --end-token "
            f"(special tokens: {', '.join(map(repr, special)) or 'none'})"
        )
    return tokenizer


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

    def __init__(self, tokenizer: Tokenizer, end_token: str = END_TOKEN):
        self.json = tokenizer.to_str(pretty=True)
        self.tokenizer = Tokenizer.from_str(self.json)
        self.tokenizer.encode_special_tokens = True  # the library's name for "as ordinary text"
        self.hash = tokenizer_hash(self.json)
        # Not get_vocab_size: ids may have holes, and what is stored must hold the largest.
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.end_token = end_token
        self.end_id: int = self.tokenizer.get_vocab(with_added_tokens=True)[end_token]
        self.dtype = dtype_of(self.vocab_size)
        model = json.loads(self.json)["model"]
        self.unknown_id: int | None = model.get("unk_id")
        if self.unknown_id is None and model.get("unk_token") is not None:
            self.unknown_id = self.tokenizer.token_to_id(model["unk_token"])

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids per text, in `dtype`."""
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)  # without offsets: 1.6x
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]


def dtype_of(vocab_size: int) -> np.dtype:
    """The smallest dtype that holds every id of a vocabulary: uint16 up to 65,536 entries, else uint32."""
    if vocab_size > 1 << 32:
        raise UserError(f"vocabulary of {vocab_size} entries: at most 2^32 can be stored")
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
