"""Our model -> a folder that `transformers` loads to equal logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.files import aside_of, fsync_folder
from hotloop.engine.model import Transformer
from hotloop.engine.pretrained.families import FAMILIES, Family
from hotloop.engine.pretrained.files import CONFIG, WEIGHTS
from hotloop.engine.pretrained.names import entries, head_of
from hotloop.engine.pretrained.special_tokens import (
    SpecialTokens,
    named_special_tokens,
    settings_of,
    tokenizer_files,
    vocabulary,
)


@dataclass(frozen=True)
class Written:
    family: str
    architecture: str
    auto: str
    """The class of `transformers` that loads it."""
    n_parameters: int
    dtype: str


def save_pretrained(
    model: Transformer,
    folder: Path | str,
    *,
    tokenizer: Path | str | None = None,
    special: SpecialTokens | None = None,
    labels: Sequence[str] = (),
    multi_label: bool = False,
) -> Written:
    """Write config.json and model.safetensors that `transformers` loads to equal logits.

    tokenizer: a tokenizer.json to go beside them, by its path or as its text; special: its special tokens (by
    default those that have the usual names);
    labels: names of the classes, in order. The folder must not exist or be empty; it is assembled aside and renamed.
    Raises UserError for a configuration that no family covers, with each family's reason.
    """
    state = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
    text = tokenizer.read_text(encoding="utf-8") if isinstance(tokenizer, Path) else tokenizer
    return write_pretrained(
        model.config, state, Path(folder), tokenizer=text, special=special, labels=labels, multi_label=multi_label
    )


def write_pretrained(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    tokenizer: str | None = None,
    special: SpecialTokens | None = None,
    labels: Sequence[str] = (),
    multi_label: bool = False,
) -> Written:
    """As `save_pretrained`, from a configuration and the tensors of its model, with or without padding rows."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not empty: give another folder")
    if labels and len(labels) != config.n_labels:
        raise UserError(f"{len(labels)} labels are given, the model has {config.n_labels} classes")
    name, kind, values = family_of(config)
    head = FAMILIES[name].heads[kind]
    tensors = to_theirs(FAMILIES[name], kind, config, state)
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    special = special or named_special_tokens({} if tokenizer is None else vocabulary(tokenizer))
    values = {"architectures": [head.architectures[0]], **values, **settings_of(special, config.causal), "dtype": dtype}
    if config.n_labels:
        classes = list(labels) or [f"LABEL_{i}" for i in range(config.n_labels)]
        values["id2label"] = {str(i): label for i, label in enumerate(classes)}
        values["label2id"] = {label: i for i, label in enumerate(classes)}
        values["problem_type"] = f"{'multi' if multi_label else 'single'}_label_classification"
    files = (
        {} if tokenizer is None else tokenizer_files(tokenizer, special, context=config.context, causal=config.causal)
    )
    files[CONFIG] = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    aside = aside_of(folder)
    try:
        aside.mkdir(parents=True)
        for file, text in files.items():
            (aside / file).write_text(text, encoding="utf-8")
        save_file(tensors, aside / WEIGHTS, metadata={"format": "pt"})
        (aside / WEIGHTS).chmod((aside / CONFIG).stat().st_mode)  # the library leaves it to its owner alone
        fsync_folder(aside)
        aside.rename(folder)  # replaces an empty folder, fails on any other
    except OSError as error:
        raise UserError(f"{folder}: not written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    n_parameters = sum(tensor.numel() for tensor in tensors.values())
    return Written(name, head.architectures[0], head.auto, n_parameters, dtype)


def family_of(config: ModelConfig) -> tuple[str, str, dict[str, Any]]:
    """(name of the family, its head, config.json) of the first family that computes what this configuration says.

    Raises UserError with the reason of every family otherwise.
    """
    kind = head_of(config)
    if config.n_labels and (config.head == "masked" or not config.tied_head):
        raise UserError("the model has a classifier and a language model's head: no class of transformers has both")
    reasons = []
    for name, family in FAMILIES.items():
        try:
            values = family.from_model(config)
            if kind not in family.heads:
                raise UserError(f"it has no {kind} head")
            return name, kind, values
        except UserError as error:
            reasons.append(f"{name}: {error}")
    raise UserError("no family covers this model. " + ". ".join(reasons))


def to_theirs(family: Family, kind: str, config: ModelConfig, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors, each one storage of its own; a tied head is not written."""
    tensors = {}
    for name, entry in entries(family, config, kind).items():
        tensor = ours[name][: entry.shape[0]]
        for theirs, part in zip(entry.theirs, tensor.split(entry.rows), strict=True):
            tensors[theirs] = (part.T if entry.transposed else part).contiguous().clone()
    missing = set(ours) - set(entries(family, config, kind))
    assert not missing, missing
    return tensors
