"""`hotloop compare RECIPE`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

WIDTH = 120
"""Characters that the table needs, on whatever terminal."""


@dataclass(frozen=True)
class Compare:
    """What is one more point of accuracy worth? Four ways to a classifier on the same labels and equal budgets.

    Example:
      hotloop compare recipes/compare.toml --out runs/compare --set price_per_hour=2.5

    A general checkpoint fine-tuned; the same pretrained further on your documents, then fine-tuned; a new model
    pretrained on your documents for as many tokens, then fine-tuned; and TF-IDF. Each is gone once for every seed and
    number of labels. Printed, and drawn in report.html: accuracy with 95 % intervals, hours, costs, what was forgotten
    of general text. The same command again goes on where it stopped, run by run.

    The recipe is a TOML file that names three others:
      finetune = "sentiment.toml"         a classification; its [initial] is the general checkpoint
      continued = "continued.toml"        pretrains that checkpoint further ([initial] of the same path)
      scratch = "scratch.toml"            pretrains a model of its own, steps x global_batch x context as large
      labels = [100, 300, 1000]           labelled texts, training and validation together; left out: the recipe's
      seeds = 3
      price_per_hour = 2.5                of this machine, in any currency; left out: no costs
    """

    recipe: Annotated[Path, tyro.conf.Positional]
    """TOML file."""
    out: Path | None = None
    """Folder of the comparison; none: runs/NAME, with the name of the recipe's file."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="FIELD=VALUE")] = ()
    """Override one field of the recipe, e.g. --set seeds=5."""

    def __call__(self) -> int:
        from rich.console import Console
        from rich.table import Table

        from hotloop.engine.compare import compare, load_compare
        from hotloop.engine.files import write_file
        from hotloop.engine.report.comparison import COLUMNS, page, table
        from hotloop.engine.train.loop import RunFailed

        config, recipes = load_compare(self.recipe, self.set)
        folder = self.out or Path("runs") / self.recipe.stem
        try:
            stopped, content = compare(config, recipes, folder)
        except RunFailed as error:
            print(f"hotloop: {error}", file=sys.stderr)
            return 1
        if content is None:
            assert stopped is not None
            print(f"{stopped.reason}: saved at step {stopped.step}; the same command goes on")
            return 128 + stopped.signal if stopped.signal is not None else 0
        write_file(folder / "report.html", page(folder.resolve().name, content))
        console = Console(width=max(Console().width, WIDTH))
        for heading, rows in table(content["summary"]):
            shown = Table(heading, *COLUMNS, box=None, pad_edge=False)
            for column in shown.columns[1:]:
                column.justify = "right"
            for way, cells in rows:
                shown.add_row(way, *cells)
            console.print(shown)
        print(f"{folder}/report.html")
        return 0
