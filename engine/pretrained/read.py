"""A folder of another library -> a configuration and the tensors of our model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hotloop.engine.config import ModelConfig
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer, head_dimension
from hotloop.engine.pretrained.families import FAMILIES, Family
from hotloop.engine.pretrained.files import CONFIG, read_json, read_tensors
from hotloop.engine.pretrained.names import Entry, entries, head_names, shapes

HeadWish = Literal["linear", "masked", "none"]
ClassifierHead = Literal["linear", "bert", "modernbert"]
Pooling = Literal["cls", "mean", "last"]


@dataclass(frozen=True)
class Weights:
    """What a folder holds of the model that was asked for."""

    config: ModelConfig
    state: dict[str, Tensor]
    """By our names, in the folder's dtype; what the folder lacks of a head that it does not have is absent."""
    labels: tuple[str, ...]
    """Names of the classes, where `state` has a classifier."""
    multi_label: bool
    """Whether any number of them fits a text."""
    dropped: tuple[str, ...]
    """Their names of the tensors of heads that were not asked for."""


def load_pretrained(folder: Path | str, *, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model of a folder with config.json and model.safetensors (or shards), with the heads that it has.

    Raises UserError for an unknown family or architecture, a setting that this model does not compute, or a tensor that
    is missing, misshapen or unknown, by name. Pickled weights are refused.
    """
    weights = read_weights(Path(folder), n_labels=None)
    model = Transformer(weights.config)
    model.load_initial(weights.state)
    return model.to(dtype)


def read_weights(
    folder: Path,
    *,
    n_labels: int | None,
    head: HeadWish | None = None,
    classifier_head: ClassifierHead | None = None,
    pooling: Pooling | None = None,
) -> Weights:
    """As `hotloop.engine.initial.read_initial`. Raises UserError."""
    values = read_json(folder / CONFIG)
    family = _family(folder, values)
    theirs = _renamed(family, read_tensors(folder))
    try:
        config = family.to_model(values)
    except KeyError as error:
        raise UserError(f"{folder / CONFIG}: field {error} is missing") from error
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    if head_dimension(config) % 8:
        raise UserError(f"{folder}: heads of {head_dimension(config)}: the attention kernels need a multiple of 8")
    check_head(folder, values["model_type"], config.causal, head)
    has = _head_of(folder, values, family, theirs)
    labels = _labels(values) if has == "classifier" else ()
    _settle_twins(folder, family, config, has, theirs)
    wanted = wish(
        config,
        has=has,
        there=len(labels),
        n_labels=n_labels,
        head=head,
        classifier_head=classifier_head,
        pooling=pooling,
    )
    # The classes of another task are not those of this one: a classifier that is asked for begins anew.
    keeps_classes = has == "classifier" and n_labels is None

    state: dict[str, Tensor] = {}
    used: set[str] = set()
    found = entries(family, wanted, "linear", "masked", "classifier")
    for name in shapes(wanted):
        entry = found.get(name)
        assert entry is not None, name
        absent = [part for part in entry.theirs if part not in theirs]
        if name.startswith("classifier.out.") and not keeps_classes:
            continue
        if absent and _is_of_a_head(name) and not _must_have(name, has):
            continue
        if absent:
            raise UserError(f"{folder}: tensor {absent[0]} is missing")
        state[name] = _ours(folder, entry, theirs)
        used.update(entry.theirs)

    unused = [name for name in theirs if name not in used and not name.endswith(family.buffers or ("\n",))]
    heads = head_names(family)
    dropped = tuple(n for n in unused if n in heads or n.startswith(family.other_heads or ("\n",)))
    unknown = sorted(set(unused) - set(dropped))
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} tensors are not of {values['model_type']} with these settings: {unknown[:5]}"
        )
    multi_label = keeps_classes and values.get("problem_type") == "multi_label_classification"
    return Weights(wanted, state, labels if keeps_classes else (), multi_label, dropped)


def wish(
    config: ModelConfig,
    *,
    has: str,
    there: int,
    n_labels: int | None,
    head: HeadWish | None,
    classifier_head: ClassifierHead | None,
    pooling: Pooling | None,
) -> ModelConfig:
    """The configuration with the heads that are asked for; None asks for what is there. `has` is the head of the
    checkpoint ("none", "linear", "masked" or "classifier"), `there` its number of classes."""
    n_labels = there if n_labels is None else n_labels
    if head is None:
        head = "none" if n_labels or has == "classifier" else has  # type: ignore[assignment]
    if n_labels:
        config = replace(
            config, n_labels=n_labels, classifier_head=classifier_head or config.classifier_head,
            pooling=pooling or config.pooling,
        )  # fmt: skip
    else:
        plain = ModelConfig()
        config = replace(
            config, n_labels=0, classifier_head=plain.classifier_head, pooling=plain.pooling,
            classifier_bias=plain.classifier_bias,
        )  # fmt: skip
    return replace(
        config, head="masked" if head == "masked" else "linear", tied_head=config.tied_head if head == has else True
    )


def _family(folder: Path, values: Mapping[str, Any]) -> Family:
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{folder}: model_type {kind!r} is not served (one of {', '.join(FAMILIES)})")
    return FAMILIES[kind]


def _head_of(folder: Path, values: Mapping[str, Any], family: Family, theirs: Mapping[str, Tensor]) -> str:
    """Which head the folder has, as its architecture says, or where it says nothing, its tensors."""
    named = (values.get("architectures") or [None])[0]
    for kind, head in family.heads.items():
        if named in head.architectures:
            return kind
    if named is not None:
        served = ", ".join(name for head in family.heads.values() for name in head.architectures)
        raise UserError(f"{folder}: architecture {named!r} is not served (one of {served})")
    if f"{family.heads['classifier'].modules['classifier.out']}.weight" in theirs:
        return "classifier"
    if "masked" in family.heads:
        return "masked" if f"{family.heads['masked'].modules['masked_head']}.bias" in theirs else "none"
    return "linear"


def check_head(source: Path, name: str, causal: bool, head: HeadWish | None) -> None:
    """Raises UserError for a language model's head that such a model cannot have."""
    if head == "masked" and causal:
        raise UserError(
            f"{source}: {name} is a causal model, without a head for masked language modelling: give an encoder "
            "(bert, modernbert), or train with another objective"
        )
    if head == "linear" and not causal:
        raise UserError(
            f"{source}: {name} is an encoder, it sees what a causal model should predict: give a decoder "
            "(gpt2, llama, qwen2, qwen3), or train with another objective"
        )


def _labels(values: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes in the order of their numbers; `transformers` writes none where they are its own two."""
    named = values.get("id2label")
    if named:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    return tuple(f"LABEL_{i}" for i in range(values.get("num_labels", 2)))


def _renamed(family: Family, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that a whole model has today: the prefix of the body, and no older ending."""
    body = tuple(module.split(".")[0] + "." for module in _their_modules(family))
    found = {}
    for name, tensor in theirs.items():
        for old, new in family.renamed:
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if name.startswith((*body, "pooler.")) and not name.startswith(family.prefix):
            name = family.prefix + name
        found[name] = tensor
    return found


def _their_modules(family: Family) -> list[str]:
    return [part for parts in family.body.values() for part in ((parts,) if isinstance(parts, str) else parts)]


def _settle_twins(folder: Path, family: Family, config: ModelConfig, has: str, theirs: dict[str, Tensor]) -> None:
    """Keep one of each pair of names that mean one tensor. Raises UserError where the two differ."""
    twins = dict(family.twins)
    head = family.heads[has].modules.get("head")
    if head is not None and config.tied_head:
        twins[f"{head}.weight"] = f"{family.prefix}{family.body['embedding']}.weight"
    for twin, name in twins.items():
        if twin not in theirs:
            continue
        tensor = theirs.pop(twin)
        if not torch.equal(theirs.setdefault(name, tensor), tensor):
            raise UserError(
                f"{folder}: tensor {twin} differs from {name}, which config.json ties to it: set tie_word_embeddings "
                "to false, or save the model again"
            )


def _is_of_a_head(name: str) -> bool:
    return name.startswith(("head.", "masked_head.", "classifier."))


def _must_have(name: str, has: str) -> bool:
    """Whether a folder with the head `has` is incomplete without our tensor of a head."""
    owner = {"head": ("linear", "masked"), "masked_head": ("masked",), "classifier": ("classifier",)}
    return has in owner[name.split(".")[0]]


def _ours(folder: Path, entry: Entry, theirs: Mapping[str, Tensor]) -> Tensor:
    parts = [theirs[name].T if entry.transposed else theirs[name] for name in entry.theirs]
    for name, part, rows in zip(entry.theirs, parts, entry.rows, strict=True):
        expected = (rows, *entry.shape[1:])
        if tuple(part.shape) != expected:
            stored = tuple(theirs[name].shape)
            expected = expected[::-1] if entry.transposed else expected
            raise UserError(f"{folder}: tensor {name}: shape {stored}, expected {expected} (as config.json says)")
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
