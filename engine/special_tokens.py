"""The special tokens of a checkpoint: which ids they have, and how `transformers` is told."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hotloop.engine.pretrained.files import CONFIG, SPECIAL_TOKENS, TOKENIZER_CONFIG, read_json

ROLES: Mapping[str, tuple[str, ...]] = {
    "cls": ("[CLS]", "<cls>"),
    "sep": ("[SEP]", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "unk": ("[UNK]", "<unk>"),
    "end": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>"),
}
"""What each special token is called where no file says."""


@dataclass(frozen=True)
class SpecialTokens:
    """Ids; None where there is no such token. `end` ends a document: the end-of-sequence token, or [SEP]."""

    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    pad: int | None = None
    unk: int | None = None
    end: int | None = None


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
        if isinstance(number, int) and 0 <= number < vocab_size and (not ids or role == "end"):
            return number
        return next((ids[token] for token in ROLES[role] if token in ids), None)

    found = {role: find(role, role) for role in ("cls", "sep", "mask", "pad", "unk")}
    end = described["corpus.json"].get("end_id", find("end", "eos"))
    return SpecialTokens(**found, end=found["sep"] if end is None else end)


def settings_of(special: SpecialTokens) -> dict[str, Any]:
    """The fields of config.json."""
    return {
        "pad_token_id": special.pad, "bos_token_id": special.end if special.cls is None else special.cls,
        "eos_token_id": special.end, "cls_token_id": special.cls, "sep_token_id": special.sep,
    }  # fmt: skip


def tokenizer_files(tokenizer_json: str, special: SpecialTokens, context: int) -> dict[str, str]:
    """tokenizer.json and tokenizer_config.json, with which AutoTokenizer gives the ids that the model was trained on.

    Where there are [CLS] and [SEP] and the tokenizer puts nothing around a text, it does from now on: the engine adds
    them itself.
    """
    described = json.loads(tokenizer_json)
    names = {number: token for token, number in vocabulary(tokenizer_json).items()}
    tokens = {
        f"{role}_token": names[number]
        for role, number in (
            ("cls", special.cls), ("sep", special.sep), ("mask", special.mask), ("pad", special.pad),
            ("unk", special.unk), ("eos", special.end),
        )
        if number is not None and number in names
    }  # fmt: skip
    if special.cls is not None and special.sep is not None and described.get("post_processor") is None:
        described["post_processor"] = _around(names[special.cls], special.cls, names[special.sep], special.sep)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": context,
        "clean_up_tokenization_spaces": False, **tokens,
    }  # fmt: skip
    return {
        "tokenizer.json": json.dumps(described, indent=2, ensure_ascii=False),
        TOKENIZER_CONFIG: json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
    }


def _around(cls: str, cls_id: int, sep: str, sep_id: int) -> dict[str, Any]:
    """`cls text sep`, and `cls text sep pair sep`."""
    begin, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (cls, sep))
    text, pair = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    last = {"SpecialToken": {"id": sep, "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, text, end],
        "pair": [begin, text, end, pair, last],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in ((cls, cls_id), (sep, sep_id))
        },
    }
