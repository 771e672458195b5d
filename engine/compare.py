"""What is one more point of accuracy worth? The same labels, four ways to a classifier, on budgets that are equal.

    general      fine-tune the general checkpoint
    continued    pretrain it further on one's own documents, then fine-tune
    scratch      pretrain a new model on one's own documents for as many tokens, then fine-tune
    tfidf        no network: TF-IDF and logistic regression

Every way is gone once for each seed, pretraining included, and fine-tunes once for each number of labels: intervals
hold the chance of all of it. A seed has the same splits on every way, so differences are taken seed by seed.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hotloop.engine.config import Recipe
from hotloop.engine.data.examples import Frame, TextEncoder
from hotloop.engine.errors import UserError
from hotloop.engine.files import write_file
from hotloop.engine.pretrained.special_tokens import read_special_tokens, vocabulary
from hotloop.engine.recipe import RecipeError, from_dict, load_recipe, load_toml
from hotloop.engine.report import write_report
from hotloop.engine.report.scores import interval
from hotloop.engine.report.summary import read_run
from hotloop.engine.tasks.classification import ClassificationPlan
from hotloop.engine.tasks.corpora import CorpusPlan
from hotloop.engine.train.environment import environment
from hotloop.engine.train.finetune import finetune
from hotloop.engine.train.loop import Outcome
from hotloop.engine.train.pretrain import PLANS, pretrain

NETWORKS = ("general", "continued", "scratch")
WAYS = (*NETWORKS, "tfidf")
RESULT = "compare.json"


@dataclass(frozen=True)
class CompareConfig:
    finetune: str = ""
    """Recipe of the classification; its [initial] is the general checkpoint. Paths of recipes start at this file."""
    continued: str = ""
    """Recipe that pretrains the same checkpoint further (objective causal or masked)."""
    scratch: str = ""
    """Recipe that pretrains a model of its own, for as many tokens."""
    labels: tuple[int, ...] = ()
    """Numbers of labelled texts (training and validation together), ascending; none: that of the recipe."""
    seeds: int = 3
    """Times that every way is gone; at least 3, for intervals."""
    price_per_hour: float = 0.0
    """Of this machine, in any currency; 0: no costs are shown."""


@dataclass(frozen=True)
class Recipes:
    """The recipes of a comparison, read and found to be comparable."""

    finetune: Recipe
    continued: Recipe
    scratch: Recipe
    labels: tuple[int | None, ...]

    def pretraining(self, way: str) -> Recipe | None:
        return {"continued": self.continued, "scratch": self.scratch}.get(way)


def load_compare(path: Path, overrides: Sequence[str] = ()) -> tuple[CompareConfig, Recipes]:
    """Raises UserError for recipes that cannot be run, or that would not compare like with like."""
    config = from_dict(CompareConfig, load_toml(path, overrides), where=f"recipe {path}")
    for name in ("finetune", "continued", "scratch"):
        if not getattr(config, name):
            raise RecipeError(f"recipe {path}: {name} is not set: give the path of a recipe")
    if config.seeds < 3:
        raise RecipeError(f"recipe {path}: seeds = {config.seeds}: must be at least 3, or there is no interval")
    if config.price_per_hour < 0:
        raise RecipeError(f"recipe {path}: price_per_hour = {config.price_per_hour}: must not be negative")
    if list(config.labels) != sorted(set(config.labels)) or any(n < 1 for n in config.labels):
        raise RecipeError(f"recipe {path}: labels = {list(config.labels)}: must ascend from at least 1")
    tuned, continued, scratch = (
        load_recipe(path.parent / getattr(config, name)) for name in ("finetune", "continued", "scratch")
    )
    recipes = Recipes(tuned, continued, scratch, config.labels or (tuned.labels.budget,))
    _check(recipes)
    return config, recipes


def _check(recipes: Recipes) -> None:
    tuned, continued, scratch = recipes.finetune, recipes.continued, recipes.scratch
    if tuned.objective != "classification":
        raise RecipeError(f"finetune: objective = {tuned.objective!r}: must be 'classification'")
    if not tuned.labels.baselines:
        raise RecipeError("finetune: labels.baselines = false: TF-IDF is one of the ways that are compared")
    for name, recipe in (("continued", continued), ("scratch", scratch)):
        if recipe.objective not in PLANS:
            raise RecipeError(f"{name}: objective = {recipe.objective!r}: must be one of {', '.join(PLANS)}")
    if not tuned.initial.path or continued.initial.path != tuned.initial.path:
        raise RecipeError(
            f"continued: initial.path = {continued.initial.path!r}: must be the general checkpoint that finetune "
            f"begins with, {tuned.initial.path!r}"
        )
    if scratch.initial.path:
        raise RecipeError(f"scratch: initial.path = {scratch.initial.path!r}: from scratch there is none")
    (tokens, _), (as_many, plan) = _opened(continued), _opened(scratch)
    if tokens != as_many:
        raise RecipeError(
            f"continued pretrains on {tokens:,} tokens, scratch on {as_many:,} (steps x global_batch x context): "
            "budgets must be equal"
        )
    for budget in recipes.labels:
        labelled = ClassificationPlan(with_labels(tuned, budget, 0))
    # Every text must fit the new model, too, whose tokenizer may be another: better known now than after pretraining.
    context = min(plan.resolve(scratch).model.context, tuned.initial.context or sys.maxsize)
    special = read_special_tokens(plan.corpus.folder, vocabulary(plan.tokenizer_json), plan.corpus.vocab_size)
    frame = Frame.of(special.cls, special.sep, special.end)
    encode = TextEncoder(plan.tokenizer_json, frame, context, tuned.labels.on_long)
    for examples in labelled.data.splits().values():
        encode(examples.texts, examples.where)


def _opened(recipe: Recipe) -> tuple[int, CorpusPlan]:
    """Tokens of its whole pretraining, padding included, and its data."""
    plan = PLANS[recipe.objective](recipe)
    assert isinstance(plan, CorpusPlan)
    resolved = plan.resolve(recipe)
    context = resolved.data.context or resolved.model.context
    return resolved.train.steps * resolved.train.global_batch * context, plan


def with_labels(recipe: Recipe, budget: int | None, seed: int) -> Recipe:
    """Fine-tuning with so many labels; the seed draws them, and the test split, too."""
    return replace(
        recipe,
        train=replace(recipe.train, seed=recipe.train.seed + seed),
        labels=replace(recipe.labels, budget=budget, split_seed=recipe.labels.split_seed + seed),
    )


def compare(
    config: CompareConfig, recipes: Recipes, folder: Path, say: Callable[[str], None] = print
) -> tuple[Outcome | None, dict[str, Any] | None]:
    """Run, or go on with, everything that a comparison needs in `folder`, a run a folder.

    Returns (None, the content of compare.json), or (how a run was stopped by a signal, None). Raises UserError, before
    any work, for a folder that holds something else, and for several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("hotloop compare runs in one process: start it without torchrun")
    if folder.exists() and not {entry.name for entry in folder.iterdir()} <= {*NETWORKS, RESULT, "report.html"}:
        raise UserError(f"{folder} holds something else than a comparison: give another folder (--out)")
    known: dict[str, dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        for way in NETWORKS:
            pretrained: dict[str, Any] = {"hours": 0.0}
            recipe = recipes.finetune
            if (first := recipes.pretraining(way)) is not None:
                place = folder / way / f"seed-{seed}" / "pretraining"
                say(f"{way}, seed {seed}: pretraining in {place}")
                outcome = pretrain(replace(first, train=replace(first.train, seed=first.train.seed + seed)), place)
                if outcome.signal is not None:
                    return outcome, None
                report = write_report(place, {"environment": environment()})
                pretrained = {"hours": read_run(place).seconds / 3600, "forgetting": report["forgetting"]}
                recipe = replace(recipe, initial=replace(recipe.initial, path=str(place)))
            for budget in recipes.labels:
                place = folder / way / f"seed-{seed}" / f"labels-{'all' if budget is None else budget}"
                say(f"{way}, seed {seed}: fine-tuning in {place}")
                outcome, result = finetune(with_labels(recipe, budget, seed), place, known=known)
                if result is None:
                    return outcome, None
                hours = (read_run(place).seconds + result["seconds_judging"]) / 3600
                runs.append({
                    "way": way, "seed": seed, "labels": budget, "accuracy": result["test"]["accuracy"],
                    "macro_f1": result["test"]["macro_f1"], "hours": pretrained["hours"] + hours,
                    "pretraining_hours": pretrained["hours"], "forgetting": pretrained.get("forgetting"),
                    "folder": str(place.relative_to(folder)),
                })  # fmt: skip
                if way == "general":
                    tfidf = result["baselines"]["tfidf"]
                    runs.append({
                        "way": "tfidf", "seed": seed, "labels": budget, "accuracy": tfidf["accuracy"],
                        "macro_f1": tfidf["macro_f1"], "hours": tfidf["seconds"] / 3600, "pretraining_hours": 0.0,
                        "forgetting": None, "folder": None,
                    })  # fmt: skip
    content = {"format": 1, "config": asdict(config), "summary": list(summarize(config, runs)), "runs": runs}
    write_file(folder / RESULT, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return None, content


def summarize(config: CompareConfig, runs: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A line for each number of labels and way: means with 95 % t-intervals over seeds, what it took, and against the
    general checkpoint: points of accuracy gained, and the price of each."""
    for labels in dict.fromkeys(run["labels"] for run in runs):
        here = {way: [r for r in runs if r["way"] == way and r["labels"] == labels] for way in WAYS}
        base = here["general"]
        for way in WAYS:
            own = here[way]
            hours = sum(run["hours"] for run in own) / len(own)
            extra = hours - sum(run["hours"] for run in base) / len(base)
            gain = interval([100 * (a["accuracy"] - b["accuracy"]) for a, b in zip(own, base, strict=True)])
            judged = [run["forgetting"]["difference"] for run in own if run["forgetting"] is not None]
            lost = [difference for difference in judged if difference is not None]
            price = config.price_per_hour
            yield {
                "labels": labels, "way": way,
                "accuracy": asdict(interval([run["accuracy"] for run in own])),
                "macro_f1": asdict(interval([run["macro_f1"] for run in own])),
                "hours": hours, "cost": hours * price if price else None,
                "points_over_general": None if way == "general" else asdict(gain),
                # Only where the gain is one: its interval lies above zero.
                "cost_per_point": extra * price / gain.mean if price and _is_gain(gain.mean, gain.half_width) else None,
                "forgetting": asdict(interval(lost)) if lost else None,
            }  # fmt: skip


def _is_gain(mean: float, half_width: float | None) -> bool:
    return half_width is not None and mean - half_width > 0
