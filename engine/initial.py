"""What a run starts from: a checkpoint of another library (a folder of `transformers`) or a run of hotloop.

>>> initial = read_initial("checkpoints/minilm", n_labels=3, pooling="mean", classifier_head="linear")
>>> initial = initial_of(recipe, n_labels=3)  # the same, as the section [initial] of a recipe says
>>> model = Transformer(initial.config).initialize(seed)
>>> model.load_initial(initial.state)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hotloop.engine.config import ModelConfig, Recipe
from hotloop.engine.data.extend import extends, new_tokens, pieces_of
from hotloop.engine.data.tokenizer import plain_tokenizer
from hotloop.engine.errors import UserError
from hotloop.engine.pretrained.files import CONFIG, TOKENIZER, fingerprint, read_json
from hotloop.engine.pretrained.names import head_of, shapes
from hotloop.engine.pretrained.read import ClassifierHead, HeadWish, Pooling, check_head, read_weights, wish
from hotloop.engine.pretrained.special_tokens import SpecialTokens, read_special_tokens, vocabulary
from hotloop.engine.recipe import from_dict, load_toml


@dataclass(frozen=True)
class Initial:
    config: ModelConfig
    state: dict[str, Tensor]
    """For `Transformer.load_initial`: what it lacks of a head is drawn anew."""
    tokenizer: str | None
    """Text of tokenizer.json, without truncation and padding; None: the folder has none."""
    special: SpecialTokens
    fingerprint: str
    """SHA-256 of settings, weights and tokenizer."""
    source: str
    dropped: tuple[str, ...] = ()
    """Tensors of heads that were not asked for, by the names of the checkpoint."""
    labels: tuple[str, ...] = ()
    """Names of the classes of a classifier that came with the checkpoint."""
    multi_label: bool = False
    """Whether any number of them fits a text."""


def read_initial(
    source: Path | str,
    *,
    n_labels: int | None = 0,
    head: HeadWish | None = None,
    classifier_head: ClassifierHead | None = None,
    pooling: Pooling | None = None,
    which: Literal["last", "best"] = "last",
) -> Initial:
    """Read a folder of `transformers` (config.json + safetensors) or of a run (config.toml + checkpoints).

    n_labels: a new classifier of so many classes, whose last layer is drawn anew; 0: none; None: the checkpoint's own.
    head: the language model's; one that the checkpoint lacks is drawn anew; None: the checkpoint's own, or none
    beside a classifier. classifier_head and pooling: the family's own unless given. which: of a run's checkpoints.

    Raises UserError, before any work, for what is not served, missing, misshapen or unknown, by name; for a head that
    the family cannot have; and for a tokenizer with more entries than the embedding has rows.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; expected one of `transformers` (config.json) or a run (config.toml)"
        )
    if (folder / "config.toml").exists():
        return _read_run(folder, n_labels, head, classifier_head, pooling, which)
    if not (folder / CONFIG).exists():
        raise UserError(
            f"{folder}: neither {CONFIG} nor config.toml is there: not a checkpoint of `transformers` nor a run"
        )
    weights = read_weights(folder, n_labels=n_labels, head=head, classifier_head=classifier_head, pooling=pooling)
    tokenizer = plain_tokenizer(folder / TOKENIZER) if (folder / TOKENIZER).exists() else None
    special = _special_tokens(folder, tokenizer, weights.config)
    return Initial(
        weights.config, weights.state, tokenizer, special, fingerprint(folder), str(folder), weights.dropped,
        weights.labels, weights.multi_label,
    )  # fmt: skip


def initial_of(recipe: Recipe, *, n_labels: int | None = 0, head: HeadWish | None = None) -> Initial | None:
    """What the section [initial] of a recipe asks for; None where it has no path. Raises UserError as `read_initial`,
    and for a recipe that describes a model of its own besides."""
    wanted = recipe.initial
    if not wanted.path:
        alone = [f"initial.{f.name}" for f in fields(wanted) if getattr(wanted, f.name) not in (None, "")]
        if alone:
            raise UserError(
                f"{', '.join(alone)}: of a checkpoint, and initial.path is empty: set it, or leave this out"
            )
        return None
    for field in fields(ModelConfig):
        if (value := getattr(recipe.model, field.name)) != field.default:
            raise UserError(
                f"model.{field.name} = {value}: with initial.path the model is the checkpoint's; leave [model] out "
                "(context, dropout, pooling and classifier_head may be set in [initial])"
            )
    initial = read_initial(
        wanted.path, n_labels=n_labels, head=head, classifier_head=wanted.classifier_head, pooling=wanted.pooling
    )
    if wanted.context is not None:
        initial = _shortened(initial, wanted.context)
    if wanted.dropout is not None:
        initial = replace(initial, config=replace(initial.config, dropout=wanted.dropout))
    return initial


def _shortened(initial: Initial, context: int) -> Initial:
    if context > initial.config.context:
        raise UserError(f"initial.context = {context}: longer than that of {initial.source} ({initial.config.context})")
    state, positions = dict(initial.state), "position_embedding.weight"
    if positions in state:
        state[positions] = state[positions][:context]
    return replace(initial, config=replace(initial.config, context=context), state=state)


def extended(initial: Initial, tokenizer_json: str) -> Initial:
    """For a corpus with this tokenizer: with more embeddings where it extends the checkpoint's, unchanged otherwise."""
    if initial.tokenizer is None or not extends(initial.tokenizer, tokenizer_json):
        return initial
    return extend_embeddings(initial, tokenizer_json)


def extend_embeddings(initial: Initial, tokenizer_json: str) -> Initial:
    """The same for a tokenizer with more tokens: the row of each is the mean of the rows of its pieces, in the
    embedding, in a head of its own, and in the head's bias.

    Raises UserError for a tokenizer that is not an extension of the checkpoint's.
    """
    if initial.tokenizer is None:
        raise UserError(f"{initial.source}: no tokenizer.json, so nothing says what its embeddings stand for")
    added = new_tokens(initial.tokenizer, tokenizer_json)
    old_size = initial.config.vocab_size or 0
    new_size = max(old_size, 1 + max(added.values(), default=-1))
    state = dict(initial.state)
    parts = pieces_of(initial.tokenizer, added)
    for name in ("embedding.weight", "head.weight", "masked_head.bias"):
        if name not in state:
            continue
        old = state[name]
        new = torch.cat((old, old.new_zeros(new_size - old_size, *old.shape[1:])))
        for token, number in added.items():
            if parts[token]:
                new[number] = old[parts[token]].float().mean(0)
        state[name] = new
    return replace(initial, config=replace(initial.config, vocab_size=new_size), state=state, tokenizer=tokenizer_json)


def _read_run(
    folder: Path,
    n_labels: int | None,
    head: HeadWish | None,
    classifier_head: ClassifierHead | None,
    pooling: Pooling | None,
    which: Literal["last", "best"],
) -> Initial:
    from hotloop.engine.checkpointed import find_weights

    recipe = from_dict(Recipe, load_toml(folder / "config.toml"), str(folder / "config.toml"))
    theirs = recipe.model
    check_head(folder, "this run", theirs.causal, head)
    has = head_of(theirs)
    if theirs.causal and not theirs.n_labels:  # as decoders have it: the last position has seen the text
        theirs = replace(theirs, pooling="last", classifier_bias=False)
    config = wish(
        theirs, has=has, there=theirs.n_labels, n_labels=n_labels, head=head, classifier_head=classifier_head,
        pooling=pooling,
    )  # fmt: skip
    found, weights, _ = find_weights(folder / "checkpoints", which)
    wanted = shapes(config)
    # The classes of another task are not those of this one: a classifier that is asked for begins anew.
    new = ("classifier.out.",) if n_labels is not None else ()
    state = {
        name: tensor[: wanted[name][0]]  # without the padding of the vocabulary
        for name, tensor in weights.items()
        if name in wanted and not name.startswith(new)
    }
    dropped = tuple(name for name in weights if name not in state)
    tokenizer = plain_tokenizer(folder / TOKENIZER)
    special = _special_tokens(folder, tokenizer, config)
    labels: tuple[str, ...] = ()
    multi_label = False
    if config.n_labels and n_labels is None:
        labels, multi_label = _classes(folder)
    digest = hashlib.sha256((folder / "config.toml").read_bytes())
    for record in found.files.values():
        digest.update(record.sha256.encode())
    return Initial(
        config, state, tokenizer, special, digest.hexdigest(), str(folder), dropped, labels, multi_label
    )  # fmt: skip


def _classes(folder: Path) -> tuple[tuple[str, ...], bool]:
    """(names of the classes, whether any number of them fits a text) of a run that classifies."""
    described = read_json(folder / "labels.json")
    return tuple(described["classes"]), bool(described["multi_label"])


def _special_tokens(folder: Path, tokenizer_json: str | None, config: ModelConfig) -> SpecialTokens:
    ids = {} if tokenizer_json is None else vocabulary(tokenizer_json)
    _check_size(folder, ids, config)
    return read_special_tokens(folder, ids, config.vocab_size or 0)


def _check_size(folder: Path, ids: Mapping[str, int], config: ModelConfig) -> None:
    largest = max(ids.values(), default=-1)
    if largest >= (config.vocab_size or 0):
        raise UserError(
            f"{folder}: {TOKENIZER} has {largest + 1} entries, but the embedding has {config.vocab_size} rows: "
            "they are not of one model (`hotloop prepare --extend-tokenizer` adds tokens and rows)"
        )
