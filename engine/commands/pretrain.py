"""`hotloop pretrain RECIPE`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from hotloop.engine.commands.recipe_help import recipe_help


@dataclass(frozen=True)
class Pretrain:
    __doc__ = f"""Pretrain a model as a recipe says. The same command again resumes the run.

    Example:
      hotloop pretrain recipes/mine.toml --out runs/mine --set train.steps=2000 --set optimizer.lr=3e-3

    Ctrl-C and SIGTERM save a checkpoint and leave (a second Ctrl-C leaves at once). The run's folder gets checkpoints,
    metrics.jsonl, log.txt, tensorboard/, report.json and report.html. Several processes:
      torchrun --nproc-per-node 2 -m hotloop.engine pretrain recipes/mine.toml --out runs/mine

    A recipe is a TOML file. Its fields with their defaults (* may change when a run is resumed):

    {recipe_help().replace(chr(10), chr(10) + "    ")}
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """TOML file; what it leaves out has the default."""
    out: Path | None = None
    """Folder of the run; none: runs/NAME, with the name of the recipe's file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SECTION.FIELD=VALUE")] = ()
    """Override one field of the recipe, e.g. --set train.steps=100. The value none unsets an optional field."""

    def __call__(self) -> int:
        from hotloop.engine.errors import UserError
        from hotloop.engine.recipe import load_recipe
        from hotloop.engine.report import write_report
        from hotloop.engine.train.environment import environment
        from hotloop.engine.train.loop import RunFailed
        from hotloop.engine.train.pretrain import pretrain

        recipe = load_recipe(self.recipe, self.set)
        # `pretrain` refuses a classification by its name.
        if not recipe.data.path and not recipe.data.sources and recipe.objective != "classification":
            raise UserError(f"recipe {self.recipe}: data.path is not set; give the folder that `hotloop prepare` wrote")
        folder = self.out or Path("runs") / self.recipe.stem
        try:
            outcome = pretrain(recipe, folder)
        except RunFailed as error:
            print(f"hotloop: {error}", file=sys.stderr)
            return 1
        if outcome.is_main:
            write_report(folder, {"environment": environment()})
            print(f"{outcome.reason} at step {outcome.step}: {folder}/report.html")
        return 0 if outcome.signal is None else 128 + outcome.signal
