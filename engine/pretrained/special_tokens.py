"""The special tokens of a checkpoint: which ids they have, and how `transformers` is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, processors

from hotloop.engine.pretrained.files import CONFIG, SPECIAL_TOKENS, TOKENIZER, TOKENIZER_CONFIG, read_json

ROLES: Mapping[str, tuple[str, ...]] = {
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "bos": (),
    "end": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"),
}
"""What each special token is called where no file says."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids; None where there is no such token. `end` ends a document: the end-of-sequence token, or [SEP]; `bos` begins
    one, where a file says so."""

    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    pad: int | None = None
    unk: int | None = None
    end: int | None = None
    bos: int | None = None


def vocabulary(tokenizer_json: str) -> dict[str, int]:
    return Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)


def read_special_tokens(folder: Path, ids: Mapping[str, int], vocab_size: int) -> SpecialTokens:
    """From special_tokens_map.json, tokenizer_config.json and config.json, in this order; then by name. `ids` is the
    vocabulary, empty where the folder has no tokenizer. corpus.json of a run names the end of a document."""
    described = {
        name: read_json(folder / name) if (folder / name).exists() else {}
        for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG, CONFIG, "corpus.json")
    }

    def find(role: str, field: str) -> int | None:
        for name in (SPECIAL_TOKENS, TOKENIZER_CONFIG):
            token = described[name].get(f"{field}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in ids:
                return ids[token]
        number = described[CONFIG].get(f"{field}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        # transformers writes defaults of a class (BERT: pad 0) whatever the vocabulary: believed where it is unknown.
        if isinstance(number, int) and 0 <= number < vocab_size and (not ids or field in ("eos", "bos")):
            return number
        return next((ids[token] for token in ROLES[role] if token in ids), None)

    found = {role: find(role, role) for role in ("cls", "sep", "mask", "pad", "unk", "bos")}
    end = described["corpus.json"].get("end_id", find("end", "eos"))
    return SpecialTokens(**found, end=found["sep"] if end is None else end)


def named_special_tokens(ids: Mapping[str, int]) -> SpecialTokens:
    """Those of a vocabulary that have the usual names."""
    found = {role: next((ids[name] for name in names if name in ids), None) for role, names in ROLES.items()}
    return SpecialTokens(**{**found, "end": found["sep"] if found["end"] is None else found["end"]})


def settings_of(special: SpecialTokens, causal: bool) -> dict[str, Any]:
    """The fields of config.json."""
    return {
        "pad_token_id": special.pad, "bos_token_id": _first(special, causal), "eos_token_id": special.end,
        "cls_token_id": special.cls, "sep_token_id": special.sep,
    }  # fmt: skip


def tokenizer_files(tokenizer_json: str, special: SpecialTokens, *, context: int, causal: bool) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the ids that the model has seen.

    An encoder's texts stand between [CLS] and [SEP]: where its tokenizer leaves that to others, it does it from now on.
    """
    described = json.loads(tokenizer_json)
    if not causal and special.cls is not None and special.sep is not None and described.get("post_processor") is None:
        described["post_processor"] = _frame(Tokenizer.from_str(tokenizer_json), special.cls, special.sep)
    names = {number: token for token, number in vocabulary(tokenizer_json).items()}
    roles = {
        "cls": special.cls, "sep": special.sep, "mask": special.mask, "pad": special.pad, "unk": special.unk,
        "bos": _first(special, causal), "eos": special.end,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{f"{role}_token": names[number] for role, number in roles.items() if number in names},
    }  # fmt: skip
    return {
        TOKENIZER: json.dumps(described, indent=2, ensure_ascii=False),
        TOKENIZER_CONFIG: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _frame(tokenizer: Tokenizer, cls: int, sep: int) -> dict[str, Any]:
    begin, end = tokenizer.id_to_token(cls), tokenizer.id_to_token(sep)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[begin, "$A", end],
        pair=[begin, "$A", end, "$B:1", f"{end}:1"],
        special_tokens=[(begin, cls), (end, sep)],
    )
    return json.loads(tokenizer.to_str())["post_processor"]


def _first(special: SpecialTokens, causal: bool) -> int | None:
    """What a text begins with: in our runs the token that ended the one before."""
    if special.bos is not None:
        return special.bos
    return special.end if causal else special.cls
