"""Our tensors and theirs, name by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hotloop.engine.config import ModelConfig
from hotloop.engine.model import Transformer, head_dimension
from hotloop.engine.pretrained.families import Family, Modules


@dataclass(frozen=True)
class Entry:
    """One of our tensors and those of theirs that make it up."""

    ours: str
    theirs: tuple[str, ...]
    shape: tuple[int, ...]
    """Ours, without the padding rows of the vocabulary."""
    rows: tuple[int, ...]
    """Of each of theirs."""
    transposed: bool


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of our model, without the padding rows of the vocabulary."""
    with torch.device("meta"):
        model = Transformer(config)
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for name in ("embedding.weight", "head.weight"):
        if name in found:
            found[name] = (model.vocab_size, config.d_model)
    return found


def head_of(config: ModelConfig) -> str:
    """Which head a configuration has, by the names of `Family.heads`."""
    if config.n_labels:
        return "classifier"
    return "masked" if config.head == "masked" else "linear" if config.causal else "none"


def entries(family: Family, config: ModelConfig, *heads: str) -> dict[str, Entry]:
    """Of the body and of the heads named, by our names, as far as our model has such a tensor."""
    ours = shapes(config)
    found = {}
    for name, theirs in [*_expanded(family.body, family.prefix, config.n_layers), *_of_heads(family, *heads)]:
        for kind in (".weight", ".bias"):
            shape = ours.get(name + kind)
            if shape is None:
                continue
            transposed = kind == ".weight" and theirs[0].endswith(family.transposed)
            parts = tuple(part + kind for part in theirs)
            found[name + kind] = Entry(name + kind, parts, shape, _rows(config, name, shape, len(parts)), transposed)
    return found


def head_names(family: Family) -> set[str]:
    """Every tensor of theirs that belongs to a head."""
    return {
        part + kind
        for _, theirs in _of_heads(family, *family.heads)
        for part in theirs
        for kind in (".weight", ".bias")
    }


def _of_heads(family: Family, *heads: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    for head in heads:
        if head in family.heads:
            yield from _expanded(family.heads[head].modules, "", 0)


def _expanded(modules: Modules, prefix: str, n_layers: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    for ours, theirs in modules.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        for i in range(n_layers) if "{i}" in ours else (0,):
            yield ours.format(i=i), tuple(prefix + part.format(i=i) for part in parts)


def _rows(config: ModelConfig, name: str, shape: tuple[int, ...], n_parts: int) -> tuple[int, ...]:
    if name.endswith(".qkv") and n_parts == 3:
        width = head_dimension(config)
        kv_width = (config.n_kv_heads or config.n_heads) * width
        return (config.n_heads * width, kv_width, kv_width)
    return (shape[0] // n_parts,) * n_parts
