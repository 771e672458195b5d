"""How well a general tokenizer fits one's documents, beside one that was trained on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from hotloop.engine.data.tokenizer import Encoder, Kind, train_tokenizer
from hotloop.engine.errors import UserError

KINDS: Mapping[str, Kind] = {"BPE": "bpe", "WordPiece": "wordpiece", "Unigram": "unigram"}


def own_tokenizer(general: Encoder, texts: Iterable[str]) -> Encoder | None:
    """A tokenizer of the same kind and size, trained on `texts`; None where their characters alone are more than that,
    or where the library knows kinds that it does not train."""
    kind = KINDS.get(json.loads(general.json)["model"]["type"])
    if kind is None:
        return None
    try:
        return Encoder(train_tokenizer(texts, kind, general.vocab_size))
    except UserError:
        return None


def bytes_per_token(encoder: Encoder, texts: list[str]) -> float:
    n_tokens = sum(map(len, encoder.encode(texts)))
    return sum(len(text.encode()) for text in texts) / max(n_tokens, 1)
