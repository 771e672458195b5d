"""The trained model of a run's folder, for everything that comes after training."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from hotloop.engine.config import Recipe, from_dict, load_toml
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train import precision


@dataclass(frozen=True)
class TrainedModel:
    model: Transformer
    tokenizer: Tokenizer
    recipe: Recipe
    step: int
    end_id: int


def load_run(folder: Path | str, which: Literal["last", "best"] = "last", device: str = "auto") -> TrainedModel:
    """The newest whole checkpoint of a run, or the one with the lowest held-out loss. Raises UserError."""
    folder = Path(folder)
    if not (folder / "config.toml").exists():
        raise UserError(f"{folder} is not a run of hotloop (no config.toml): give the folder that pretrain wrote")
    recipe = from_dict(Recipe, load_toml(folder / "config.toml"), f"{folder / 'config.toml'}")
    store = folder / "checkpoints"
    found = checkpoints.best(store) if which == "best" else checkpoints.latest(store).checkpoint
    if found is None:
        raise UserError(f"{folder} has no whole checkpoint{' with a held-out loss' if which == 'best' else ''} yet")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer(recipe.model).to(precision.resolve(recipe.train.precision, torch.device(device)).dtype)
    model.load_state_dict(found.tensors("model"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    end_id = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))["end_id"]
    return TrainedModel(model.to(device).eval(), tokenizer, recipe, found.step, end_id)
