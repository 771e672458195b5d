"""A recipe of labelled texts in; tuned models, judged once on the test split beside simple baselines, out."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from hotloop.engine.classifier import RESULT, judged, load_classifier, predict
from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.files import ASIDE, write_file
from hotloop.engine.report.scores import (
    Interval,
    best_threshold,
    decide,
    interval,
    negative_log_likelihood,
    score,
)
from hotloop.engine.report.tfidf import fit_tfidf, majority
from hotloop.engine.tasks.classification import ClassificationPlan
from hotloop.engine.train.loop import Outcome
from hotloop.engine.train.pretrain import run_plan

BASELINES = ("majority", "tfidf")
MEASURES = ("accuracy", "macro_f1")


def finetune(
    recipe: Recipe,
    folder: Path | str,
    *,
    known: dict[str, dict[str, Any]] | None = None,
    fault: Callable[[str], None] | None = None,
) -> tuple[Outcome, dict[str, Any] | None]:
    """Run a recipe in a folder, or resume it there; then judge its best checkpoint on the test split.

    known: split (by digest) -> its baselines, for runs of one split; what is missing is added. Returns how the run
    ended and the content of its result.json: None where a signal ended it or another process writes. Raises UserError
    before any work for what cannot be run.
    """
    if recipe.objective != "classification":
        raise UserError(f"objective = {recipe.objective!r}: finetune takes a recipe of objective 'classification'")
    plan = ClassificationPlan(recipe)
    outcome = run_plan(recipe, folder, lambda _: plan, fault=fault)
    if outcome.signal is not None or not outcome.is_main:
        return outcome, None
    return outcome, judge(recipe, plan, Path(folder), {} if known is None else known)


def judge(recipe: Recipe, plan: ClassificationPlan, folder: Path, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """result.json of a run that has ended: written by the first call, read by later ones.

    The checkpoint that is best on validation, and the threshold of a multi-label task, are chosen before the test split
    is looked at.
    """
    path = folder / RESULT
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    began = time.perf_counter()
    which = judged(folder)
    trained = load_classifier(folder, which)
    data, classes, multi_label = plan.data, plan.data.classes, plan.data.multi_label

    def probabilities(split: str) -> np.ndarray:
        found = predict(trained.model, plan.pieces[split], multi_label, plan.pad_id)
        assert found is not None  # nothing polls for a stop here
        return found

    held = probabilities("validation")
    chosen = multi_label and recipe.labels.threshold == "validation"
    threshold = best_threshold(data.validation.labels, held) if chosen else 0.5
    found = {"validation": held, "test": probabilities("test")}
    scored = {
        split: {
            "loss": negative_log_likelihood(labels, found[split], plan.weights),
            **score(labels, decide(found[split], multi_label, threshold), classes).to_dict(),
        }
        for split, labels in (("validation", data.validation.labels), ("test", data.test.labels))
    }
    result = {
        "format": 1,
        "step": trained.step,
        "checkpoint": which,
        "best": recipe.labels.best,
        "classes": list(classes),
        "multi_label": multi_label,
        "threshold": threshold,
        **scored,
        "baselines": baselines(recipe, plan, known) if recipe.labels.baselines else {},
        "data": data.to_dict(),
        "seconds_judging": time.perf_counter() - began,
    }
    write_file(path, json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    return result


def baselines(recipe: Recipe, plan: ClassificationPlan, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Majority and TF-IDF on the same split. Neither needs validation, so both get its texts to train on as well."""
    data = plan.data
    key = "".join(examples.digest() for examples in data.splits().values())
    if key not in known:
        texts = data.train.texts + data.validation.texts
        labels = np.concatenate([data.train.labels, data.validation.labels])
        weights = recipe.labels.weights or recipe.labels.class_weights
        began = time.perf_counter()
        fitted = fit_tfidf(texts, labels, len(data.classes), weights=weights)
        answers = decide(fitted.probabilities(data.test.texts), data.multi_label)
        seconds = time.perf_counter() - began
        common = majority(labels, len(data.test))
        known[key] = {
            "majority": score(data.test.labels, common, data.classes).to_dict(),
            "tfidf": {
                **score(data.test.labels, answers, data.classes).to_dict(),
                "C": fitted.C, "folds": fitted.folds, "scores": {str(C): s for C, s in fitted.scores.items()},
                "seconds": seconds,
            },
        }  # fmt: skip
    return known[key]


# Several seeds --------------------------------------------------------------------------------------------------------


def seed_recipes(recipe: Recipe, n: int) -> list[Recipe]:
    """The recipe n times, with seeds that count up from its own: of the training, and of what is drawn from the files,
    so that an interval over them holds the chance of both."""
    return [
        replace(
            recipe,
            train=replace(recipe.train, seed=recipe.train.seed + i),
            labels=replace(recipe.labels, split_seed=recipe.labels.split_seed + i),
        )
        for i in range(n)
    ]


def finetune_seeds(recipe: Recipe, folder: Path, n: int) -> tuple[list[Outcome], list[dict[str, Any]]]:
    """Runs folder/seed-0, folder/seed-1, ...; each is resumed or, where it has ended, read. Ends early on a signal."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several seeds run one after the other in one process: start them without torchrun")
    if folder.is_dir() and any(not entry.name.startswith(("seed-", "report.", ASIDE)) for entry in folder.iterdir()):
        raise UserError(f"{folder} holds something else than runs of several seeds: give another folder (--out)")
    outcomes: list[Outcome] = []
    results: list[dict[str, Any]] = []
    known: dict[str, dict[str, Any]] = {}
    for i, one in enumerate(seed_recipes(recipe, n)):
        outcome, result = finetune(one, folder / f"seed-{i}", known=known)
        outcomes.append(outcome)
        if result is None:
            break
        results.append(result)
    return outcomes, results


def summarize_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with their 95 % t-intervals, of the model and of the baselines, on the test splits."""
    names = [name for name in BASELINES if all(name in result["baselines"] for result in results)]
    model = {m: np.array([result["test"][m] for result in results]) for m in MEASURES}
    simple = {
        name: {m: np.array([result["baselines"][name][m] for result in results]) for m in MEASURES} for name in names
    }
    return {
        "seeds": len(results),
        "test_examples": [result["test"]["examples"] for result in results],
        "model": _intervals(model),
        "baselines": {name: _intervals(values) for name, values in simple.items()},
        "gain": {name: _intervals({m: model[m] - values[m] for m in MEASURES}) for name, values in simple.items()},
    }


def _intervals(values: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {measure: asdict(interval(of_seeds.tolist())) for measure, of_seeds in values.items()}


def as_interval(values: Mapping[str, Any]) -> Interval:
    return Interval(values["mean"], values["half_width"], tuple(values["values"]))
