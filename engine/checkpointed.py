"""The trained model of a run's folder, for everything that comes after training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hotloop.engine.config import Recipe
from hotloop.engine.data.tokenizer import tokenizer_hash
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.recipe import from_dict, load_toml
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train import precision
from hotloop.engine.train.checkpoint import Checkpoint

LABELS = "labels.json"
"""What the folder of a classifier has instead of a corpus.json."""


@dataclass(frozen=True)
class TrainedModel:
    model: Transformer
    tokenizer: Tokenizer
    tokenizer_hash: str
    recipe: Recipe
    step: int
    end_id: int
    notes: tuple[str, ...] = ()
    """What the user should know: newer checkpoints that are damaged."""


def load_run(folder: Path | str, which: Literal["last", "best"] = "last", device: str = "auto") -> TrainedModel:
    """The newest whole checkpoint of a run, or the one with the lowest held-out loss. Raises UserError."""
    folder = Path(folder)
    config = folder / "config.toml"
    if not config.exists():
        raise UserError(f"{folder} is not a run of hotloop (no config.toml): give the folder that pretrain wrote")
    if (folder / LABELS).exists():
        raise UserError(f"{folder} is a classifier: use `hotloop predict`, or `hotloop eval --labelled`")
    recipe = from_dict(Recipe, load_toml(config), str(config))
    found, weights, notes = find_weights(folder / "checkpoints", which)
    tokenizer, hash_, end_id = _tokenizer(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = precision.resolve(recipe.train.precision, torch.device(device))
    try:
        model = Transformer(recipe.model).to(policy.dtype)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{found.path} is not of the model that {config} describes ({reason})") from error
    return TrainedModel(model.to(device).eval(), tokenizer, hash_, recipe, found.step, end_id, notes)


def find_weights(store: Path, which: Literal["last", "best"]) -> tuple[Checkpoint, dict[str, Tensor], tuple[str, ...]]:
    """(the checkpoint, its model's tensors, notes for the user). Raises UserError."""
    while True:
        found, notes = _find(store, which)
        try:
            return found, found.tensors("model"), notes
        except FileNotFoundError:  # the run that is going on has deleted it for a newer one: look again
            continue


def _find(store: Path, which: Literal["last", "best"]) -> tuple[Checkpoint, tuple[str, ...]]:
    if not store.is_dir():
        raise UserError(f"{store.parent} has no checkpoint yet")
    if which == "best":
        best = checkpoints.best(store)
        if best is None:
            raise UserError(f"{store.parent} has no whole checkpoint with a held-out loss")
        return best, ()
    latest = checkpoints.latest(store)
    damaged = tuple(f"{path.name} is not used: {reason}" for path, reason in latest.rejected)
    if latest.checkpoint is None:
        raise UserError(f"{store.parent} has no whole checkpoint{': ' if damaged else ' yet'}{'; '.join(damaged)}")
    return latest.checkpoint, damaged


def _tokenizer(folder: Path) -> tuple[Tokenizer, str, int]:
    """(tokenizer, its hash, the id that ends documents)"""
    path, corpus = folder / "tokenizer.json", folder / "corpus.json"
    try:
        text = path.read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_str(text)
        tokenizer.encode_special_tokens = True  # as in training: the text of a special token is ordinary text
        manifest = json.loads(corpus.read_text(encoding="utf-8"))
        expected, end_id = manifest["tokenizer_hash"], manifest["end_id"]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path} or {corpus}: altered ({error})") from error
    if tokenizer_hash(text) != expected:
        raise UserError(f"{path}: altered (it is not the tokenizer that {corpus} names)")
    return tokenizer, expected, end_id
