"""`hotloop finetune RECIPE`"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a checkpoint to classify texts, and judge it on a test split. The same command again resumes the run.

    Examples:
      hotloop finetune recipes/sentiment.toml --out runs/sentiment --seeds 5
      hotloop finetune recipes/mine.toml --set initial.path=checkpoints/minilm --set labels.train='["reviews.csv"]'

    Labelled texts are rows of CSV, JSONL or Parquet files. Without files of their own, validation and test are drawn
    from the training files. Every choice (checkpoint, early stopping, threshold) is made on validation; the test split
    is judged once, at the end, beside the majority class and a TF-IDF baseline. The run's folder gets what
    `hotloop pretrain` writes, and labels.json and result.json.

    With --seeds N the folder gets N runs, seed-0 and so on, of seeds that count up from train.seed (and, where splits
    are drawn, from labels.split_seed), and a report of their means with 95 % intervals.

    The recipe's sections [initial], [labels] and [finetune] are listed with all others by: hotloop pretrain --help
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """TOML file with objective = "classification"; what it leaves out has the default."""
    out: Path | None = None
    """Folder of the run; none: runs/NAME, with the name of the recipe's file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SECTION.FIELD=VALUE")] = ()
    """Override one field of the recipe, e.g. --set finetune.epochs=3. The value none unsets an optional field."""
    seeds: int = 1
    """Runs of different seeds."""

    def __call__(self) -> int:
        from hotloop.engine.errors import UserError
        from hotloop.engine.recipe import load_recipe
        from hotloop.engine.train.finetune import finetune, finetune_seeds, summarize_seeds
        from hotloop.engine.train.loop import RunFailed

        recipe = load_recipe(self.recipe, self.set)
        folder = self.out or Path("runs") / self.recipe.stem
        if self.seeds < 1:
            raise UserError(f"--seeds {self.seeds}: must be at least 1")
        try:
            if self.seeds == 1:
                outcome, result = finetune(recipe, folder)
                results = [] if result is None else [result]
            else:
                outcomes, results = finetune_seeds(recipe, folder, self.seeds)
                outcome = outcomes[-1]
        except RunFailed as error:
            print(f"hotloop: {error}", file=sys.stderr)
            return 1
        if outcome.signal is not None:
            print(f"{outcome.reason}: saved at step {outcome.step}; the same command resumes")
            return 128 + outcome.signal
        if outcome.is_main:
            summary = summarize_seeds(results)
            report(folder, results, summary)
            for line in table(summary):
                print(line)
            print(f"{folder}/report.html")
        return 0


def report(folder: Path, results: list[dict[str, Any]], summary: Mapping[str, Any]) -> None:
    from hotloop.engine.report import write_report
    from hotloop.engine.report.seeds import write_seeds_report
    from hotloop.engine.train.environment import environment

    extra = {"environment": environment()}
    seeds = summary["seeds"]
    runs = [folder] if seeds == 1 else [folder / f"seed-{i}" for i in range(seeds)]
    for run, result in zip(runs, results, strict=True):
        write_report(run, {**extra, "classification": result})
    if seeds > 1:
        write_seeds_report(folder, summary, results)


def table(summary: Mapping[str, Any]) -> list[str]:
    """Accuracy and macro-F1 of the model and its baselines on the test split, a line each."""
    from hotloop.engine.train.finetune import as_interval

    names = {"majority": "majority class", "tfidf": "TF-IDF"}
    rows = [("this model", summary["model"]), *((names[n], m) for n, m in summary["baselines"].items())]
    lines = [
        f"{name:<15} accuracy {as_interval(measured['accuracy'])}  macro-F1 {as_interval(measured['macro_f1'])}"
        for name, measured in rows
    ]
    if "tfidf" in summary["gain"]:
        lines.append(f"{'over TF-IDF':<15} accuracy {as_interval(summary['gain']['tfidf']['accuracy'])}")
    examples = summary["test_examples"]
    of = f"{min(examples):,}" if min(examples) == max(examples) else f"{min(examples):,} to {max(examples):,}"
    seeds = f", mean and 95 % interval of {summary['seeds']} seeds" if summary["seeds"] > 1 else ""
    return [f"test split of {of} texts{seeds}:", *lines]
