"""A tuned classifier: texts in, a probability for each class out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from hotloop.engine.checkpointed import LABELS, find_weights
from hotloop.engine.config import LabelsConfig, Recipe
from hotloop.engine.data.examples import Frame, OnLong, Pieces, TextEncoder, in_order
from hotloop.engine.data.tokenizer import tokenizer_hash
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.recipe import from_dict, load_toml
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train import precision

RESULT = "result.json"
Which = Literal["last", "best"]
TOKENS = 8192
"""Of a forward pass."""


@dataclass(frozen=True)
class Classifier:
    model: Transformer
    encode: TextEncoder
    classes: tuple[str, ...]
    multi_label: bool
    pad_id: int
    threshold: float
    """Multi-label: the probability from which a label is given."""
    recipe: Recipe
    folder: Path
    step: int
    notes: tuple[str, ...]
    """What the user should know: newer checkpoints that are damaged."""

    @property
    def labels(self) -> LabelsConfig:
        """How its files of labelled texts are read."""
        return replace(self.recipe.labels, classes=self.classes)

    def probabilities(self, texts: Sequence[str], where: Sequence[str]) -> np.ndarray:
        """(n, K) fp32. Raises UserError for texts that are too long, by their `where`."""
        found = predict(self.model, self.encode(texts, where), self.multi_label, self.pad_id)
        assert found is not None  # nothing polls for a stop here
        return found


@torch.no_grad()
def predict(
    model: Transformer,
    pieces: Pieces,
    multi_label: bool,
    pad_id: int,
    *,
    tokens: int = TOKENS,
    poll: Callable[[], bool] = lambda: False,
) -> np.ndarray | None:
    """(n_texts, K) fp32 probabilities, of a text's windows the mean. None if `poll` asked to stop."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = []
    try:
        for _, batch in in_order(pieces, model.config.context, tokens, pad_id):
            if poll():
                return None
            batch = batch.to(device)
            h = model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens, positions=batch.positions)
            logits = model.classify(h, batch.cu_seqlens).float()
            found.append((logits.sigmoid() if multi_label else logits.softmax(-1)).cpu().numpy())
    finally:
        model.train(was_training)
    if not found:
        return np.zeros((0, model.config.n_labels), dtype=np.float32)
    windows = np.concatenate(found)
    sums = np.add.reduceat(windows, pieces.first[:-1], axis=0)
    return sums / np.diff(pieces.first)[:, None].astype(np.float32)


def load_classifier(
    run: Path | str,
    which: Which | None = None,
    *,
    on_long: OnLong | None = None,
    device: str = "auto",
) -> Classifier:
    """A checkpoint of a run of `hotloop finetune`; which none: the one that was judged, the best on validation.

    Of a folder of several seeds, the run that is best on validation. on_long none: as the run was trained. Raises
    UserError.
    """
    folder = best_seed(Path(run))
    config = folder / "config.toml"
    if not config.exists():
        raise UserError(f"{folder} is not a run of hotloop (no config.toml): give the folder that finetune wrote")
    if not (folder / LABELS).exists():
        raise UserError(f"{folder} is not a classifier (no {LABELS}): give the folder that `hotloop finetune` wrote")
    recipe = from_dict(Recipe, load_toml(config), str(config))
    found, weights, notes = find_weights(folder / "checkpoints", which or judged(folder))
    described = read_described(folder)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = precision.resolve(recipe.train.precision, torch.device(device))
    try:
        model = Transformer(recipe.model).to(policy.dtype)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{found.path} is not of the model that {config} describes ({reason})") from error
    context = recipe.data.context or recipe.model.context
    return Classifier(
        model=model.to(device).eval(),
        encode=TextEncoder(
            described["tokenizer"], Frame(tuple(described["before"]), tuple(described["after"])), context,
            on_long or recipe.labels.on_long,
        ),
        classes=tuple(described["classes"]),
        multi_label=described["multi_label"],
        pad_id=described["pad_id"],
        threshold=described["threshold"],
        recipe=recipe,
        folder=folder,
        step=found.step,
        notes=notes,
    )  # fmt: skip


def read_described(folder: Path) -> dict[str, Any]:
    """labels.json of a run, the text of its tokenizer, and the threshold that it chose."""
    try:
        described = json.loads((folder / LABELS).read_text(encoding="utf-8"))
        tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
        result = json.loads((folder / RESULT).read_text(encoding="utf-8")) if (folder / RESULT).exists() else {}
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{folder}: {LABELS} or {RESULT} is altered ({error})") from error
    if tokenizer_hash(tokenizer) != described["tokenizer_hash"]:
        raise UserError(f"{folder / 'tokenizer.json'}: altered (it is not the tokenizer that {LABELS} names)")
    return {**described, "tokenizer": tokenizer, "threshold": result.get("threshold", 0.5)}


def best_seed(folder: Path) -> Path:
    """`folder`, or of the runs seed-0, seed-1, ... in it the one that is best on validation."""
    if (folder / "config.toml").exists() or not folder.is_dir():
        return folder

    def rank(result: dict[str, Any]) -> tuple[float, float]:
        held = result["validation"]
        return (held["loss"] if result["best"] == "loss" else -held[result["best"]], held["loss"])

    ranks = {
        path.parent: rank(json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob(f"seed-*/{RESULT}"))
    }
    return min(ranks, key=lambda run: ranks[run]) if ranks else folder


def judged(run: Path) -> Which:
    """Which of a classifier's checkpoints result.json is about; before there is one, the best where there is a best."""
    if (run / RESULT).exists():
        return json.loads((run / RESULT).read_text(encoding="utf-8"))["checkpoint"]
    return "last" if checkpoints.best(run / "checkpoints") is None else "best"
