"""`hotloop pretrain RECIPE`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Pretrain:
    """Pretrain a model as a recipe says. Run the same command again to resume.

    Ctrl-C and SIGTERM save a checkpoint and leave. With several processes:
    torchrun --nproc-per-node N -m hotloop.engine pretrain RECIPE.
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """TOML file with the sections data, model, optimizer, schedule, train, evaluation, checkpoint, guards, log."""
    out: Path | None = None
    """Folder of the run. [default: runs/NAME of the recipe]"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Override one field of the recipe, e.g. --set train.steps=100; may be repeated."""

    def __call__(self) -> int:
        from hotloop.engine.config import load_recipe
        from hotloop.engine.report import write_report
        from hotloop.engine.train.environment import environment
        from hotloop.engine.train.loop import RunFailed
        from hotloop.engine.train.pretrain import pretrain

        recipe = load_recipe(self.recipe, self.set)
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
