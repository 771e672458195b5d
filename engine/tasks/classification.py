"""Classification: labelled texts, judged by the loss on the validation split."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from torch import nn

from hotloop.engine.checkpointed import LABELS
from hotloop.engine.classifier import predict
from hotloop.engine.config import Recipe
from hotloop.engine.data.examples import ExampleSource, Frame, Pieces, TextEncoder
from hotloop.engine.data.labelled import LabelledData, read_labelled
from hotloop.engine.data.tokenizer import tokenizer_hash
from hotloop.engine.errors import UserError
from hotloop.engine.initial import Initial, initial_of
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.classification import ClassificationObjective
from hotloop.engine.report.scores import decide, negative_log_likelihood, score
from hotloop.engine.train.parameter_groups import freeze

TIE = 1e-6
"""Weight of a nat beside a score: less than one text of any validation split decides."""


@dataclass(frozen=True)
class ClassificationEvaluation:
    nats: float
    """A text, weighted as in training; of a multi-label task the mean over its labels."""
    accuracy: float
    macro_f1: float
    examples: int
    tokens: int
    seconds: float
    best: Literal["macro_f1", "accuracy", "loss"]

    @property
    def loss(self) -> float:
        """What the best checkpoint has the least of: nats; or 1 - the score, and of equal scores the fewer nats."""
        if self.best == "loss":
            return self.nats
        return 1 - getattr(self, self.best) + TIE * min(self.nats, 10.0)

    def to_dict(self) -> dict[str, float | int]:
        return {
            "loss": self.nats, "accuracy": self.accuracy, "macro_f1": self.macro_f1, "examples": self.examples,
            "tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip


class ClassificationPlan:
    """Labelled files and the checkpoint to begin with, opened and checked."""

    def __init__(self, recipe: Recipe):
        if not recipe.labels.train:
            raise UserError("labels.train is not set: give the files of labelled texts")
        if recipe.data.path or recipe.data.sources or recipe.data.context is not None:
            raise UserError(
                "data.path, data.sources and data.context are of documents: texts are given by labels.train, their "
                "longest by initial.context"
            )
        if recipe.evaluation.every and recipe.checkpoint.keep_best < 1:
            raise UserError("checkpoint.keep_best = 0: the best checkpoint is the one that is judged, keep 1")
        self.data: LabelledData = read_labelled(recipe.labels)
        self.weights = class_weights(recipe, self.data)
        initial = initial_of(recipe, n_labels=len(self.data.classes), head="none")
        if initial is None:
            raise UserError("initial.path is not set: give the folder of the checkpoint to fine-tune")
        if initial.tokenizer is None:
            raise UserError(f"{initial.source}: no tokenizer.json, without which texts cannot be read")
        self.initial: Initial = initial
        self.tokenizer = initial.tokenizer
        special = self.initial.special
        self.frame = Frame.of(special.cls, special.sep, special.end)
        self.pad_id = next(i for i in (special.pad, special.end, special.sep, 0) if i is not None)
        self.context = initial.config.context
        self.pieces = self._encode(TextEncoder(self.tokenizer, self.frame, self.context, recipe.labels.on_long))
        self.files = {
            LABELS: json.dumps(self.describe(), indent=2, ensure_ascii=False).encode() + b"\n",
            "tokenizer.json": self.tokenizer.encode(),
        }

    def _encode(self, encode: TextEncoder) -> dict[str, Pieces]:
        """Of all splits together, so that too long texts are counted together, and before any training."""
        splits = self.data.splits()
        pieces = encode(
            [text for examples in splits.values() for text in examples.texts],
            [where for examples in splits.values() for where in examples.where],
        )
        cut, start = {}, 0
        for name, examples in splits.items():
            cut[name] = pieces.texts(start, start + len(examples))
            start += len(examples)
        return cut

    def describe(self) -> dict[str, object]:
        return {
            **self.data.to_dict(),
            "class_weights": None if self.weights is None else self.weights.tolist(),
            "initial": self.initial.fingerprint,
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "before": self.frame.before,
            "after": self.frame.after,
            "pad_id": self.pad_id,
        }

    def resolve(self, recipe: Recipe) -> Recipe:
        config = self.initial.config
        if recipe.finetune.frozen_layers > config.n_layers:
            raise UserError(
                f"finetune.frozen_layers = {recipe.finetune.frozen_layers}: the checkpoint has {config.n_layers} layers"
            )
        steps = recipe.train.steps
        if recipe.finetune.epochs is not None:
            steps = max(math.ceil(recipe.finetune.epochs * len(self.data.train) / recipe.train.global_batch), 1)
        return replace(
            recipe,
            data=replace(recipe.data, context=self.context),
            model=config,
            train=replace(recipe.train, steps=steps),
        )

    def task(self, recipe: Recipe) -> ClassificationTask:
        return ClassificationTask(recipe, self)


class ClassificationTask:
    judged_first = False

    def __init__(self, recipe: Recipe, plan: ClassificationPlan):
        self.recipe, self.plan = recipe, plan
        self.initial = plan.initial.state
        train = recipe.train
        self.source = ExampleSource(
            plan.pieces["train"], plan.data.train.labels, plan.context, train.global_batch, train.seed,
            weights=None if plan.data.multi_label else plan.weights, pad_id=plan.pad_id,
            steps=train.steps if train.compile else None,
        )  # fmt: skip
        self.context = self.source.row_length

    def objective(self, model: Transformer) -> nn.Module:
        freeze(model, self.recipe.finetune)
        weights = self.plan.weights
        return ClassificationObjective(model, None if weights is None else weights.tolist())

    def evaluate(self, model: Transformer, poll: Callable[[], bool]) -> ClassificationEvaluation | None:
        began = time.perf_counter()
        data, pieces = self.plan.data, self.plan.pieces["validation"]
        probabilities = predict(model, pieces, data.multi_label, self.plan.pad_id, poll=poll)
        if probabilities is None:
            return None
        labels = data.validation.labels
        found = score(labels, decide(probabilities, data.multi_label), data.classes)
        return ClassificationEvaluation(
            nats=negative_log_likelihood(labels, probabilities, self.plan.weights),
            accuracy=found.accuracy,
            macro_f1=found.macro_f1,
            examples=len(labels),
            tokens=int(pieces.bounds[-1]),
            seconds=time.perf_counter() - began,
            best=self.recipe.labels.best,
        )

    def describe(self) -> str:
        source, text = self.source, self.plan.data.describe()
        return f"{text}; texts of {source.pieces.lengths.mean():.0f} tokens on average, {self.context} at most"


def class_weights(recipe: Recipe, data: LabelledData) -> np.ndarray | None:
    """(K,) weights of the classes (of the positives, where labels are many), or None."""
    labels = recipe.labels
    if labels.weights:
        if len(labels.weights) != len(data.classes):
            raise UserError(f"labels.weights has {len(labels.weights)} numbers for {len(data.classes)} classes")
        return np.array(labels.weights)
    if labels.class_weights == "none":
        return None
    counts, n = np.array(list(data.class_counts("train").values())), len(data.train)
    return (n - counts) / counts if data.multi_label else n / (len(counts) * counts)
