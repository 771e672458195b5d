"""The folder of a run: one process at a time, one configuration for ever.

runs/NAME/recipe.toml     the recipe as it was given
          config.toml     the recipe as it was resolved: what this machine and corpus made of `auto` and `none`
          corpus.json, tokenizer.json, ...   what identifies its data (`Plan.files`)
          checkpoints/ metrics.jsonl tensorboard/ report.json report.html
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.files import ASIDE, write_file
from hotloop.engine.recipe import differences, from_dict, identity, load_toml, to_toml

RECIPE, CONFIG, LOCK = "recipe.toml", "config.toml", ".lock"


class RunFolder:
    """A run's folder, locked while open. Nothing in it is ever written over by another configuration."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self._lock: int | None = None
        self._made = False

    def open(self, recipe: Recipe, files: Mapping[str, bytes]) -> Recipe | None:
        """Lock the folder for `recipe`. Returns the resolved recipe of the run that is there, or None for a new run.

        Raises UserError for a folder that holds something else, another configuration, other data than what `files`
        identify, or a running process.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file: give the run another folder (--out)")
        names = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        entries = {name for name in names if name != LOCK and not name.startswith(ASIDE)}
        if entries and RECIPE not in entries:
            raise UserError(f"{self.path} is not empty and not a run of hotloop: give another folder (--out)")
        self._take_lock()
        if not entries:
            return None
        given = identity(from_dict(Recipe, load_toml(self.path / RECIPE), f"{self.path / RECIPE}"))
        changed = differences(given, identity(recipe))
        if changed:
            self.close()
            raise UserError(
                f"{self.path} is a run of another configuration ({'; '.join(changed)}): "
                "go on with its own recipe, or give this one another folder (--out)"
            )
        if not (self.path / CONFIG).exists():
            return None
        for name, content in files.items():
            if not (self.path / name).exists():
                raise UserError(f"{self.path / name} is missing: the run's folder is not whole")
            if (self.path / name).read_bytes() != content:
                self.close()
                raise UserError(
                    f"the {name} of the data is not what {self.path} began with: the data was prepared again; "
                    "give the run another folder (--out)"
                )
        return from_dict(Recipe, load_toml(self.path / CONFIG), f"{self.path / CONFIG}")

    def create(self, recipe: Recipe, resolved: Recipe, files: Mapping[str, bytes]) -> None:
        """Write what a new run starts from; `config.toml` last, as the sign that all of it is there."""
        write_file(self.path / RECIPE, to_toml(recipe))
        for name, content in files.items():
            write_file(self.path / name, content)
        write_file(self.path / CONFIG, to_toml(resolved))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._made and {entry.name for entry in self.path.iterdir()} <= {LOCK}:
            (self.path / LOCK).unlink(missing_ok=True)  # refused before it began: the folder goes as it came
            self.path.rmdir()
        self.close()

    def _take_lock(self) -> None:
        try:
            new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = new
            self._lock = os.open(self.path / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}): give the run another folder (--out)"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise UserError(f"{self.path} is in use by another process: wait for it or give another folder") from None
