"""`hotloop generate RUN`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Generate:
    """Print text that a run's model continues from a prompt.

    Examples:
      hotloop generate runs/mine --prompt "Once upon" --samples 3
      hotloop generate runs/mine --temperature 0 --max-tokens 50
      hotloop generate runs/mine --checkpoint best --top-p 0.95 --seed 7

    Works while the run is still training. Text is printed as it is drawn; the same arguments give the same text. A
    sample ends where the model ends the document, or after --max-tokens.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run, as `hotloop pretrain --out` wrote it."""
    prompt: str = ""
    """What the text begins with; empty: the beginning of a document."""
    samples: int = 1
    """Texts to draw; sample i (from 0) has the seed --seed + i."""
    max_tokens: int = 200
    """Tokens after which a sample ends. Beyond the model's context the oldest text is forgotten."""
    temperature: float = 0.8
    """Below 1 the likely tokens become likelier; 0 takes the most likely one each time."""
    top_k: int | None = None
    """Draw among the k most likely tokens only; none: among all."""
    top_p: float | None = None
    """Draw among the most likely tokens that together have this probability; none: among all."""
    seed: int = 0
    """Decides what is drawn."""
    checkpoint: Literal["last", "best"] = "last"
    """The newest one, or the one with the lowest held-out loss."""

    def __call__(self) -> int:
        self._check()
        from hotloop.engine.checkpointed import load_run
        from hotloop.engine.errors import UserError
        from hotloop.engine.generate import Sampling, complete

        trained = load_run(self.run, self.checkpoint)
        for note in trained.notes:
            print(f"hotloop: {note}", file=sys.stderr)
        if not trained.model.config.causal:
            raise UserError(
                f"{self.run} was trained with objective {trained.recipe.objective!r}, not to continue text"
                + ("; use `hotloop fill-mask`" if trained.recipe.objective == "masked" else "")
            )
        for i in range(self.samples):
            sampling = Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens, self.seed + i)
            pieces = complete(trained, self.prompt, sampling)
            if self.samples > 1:
                print(f"--- sample {i + 1}, seed {self.seed + i} ---")
            sys.stdout.write(self.prompt)
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
        return 0

    def _check(self) -> None:
        from hotloop.engine.errors import UserError

        for name, ok, allowed in (
            ("samples", self.samples > 0, "at least 1"),
            ("max_tokens", self.max_tokens > 0, "at least 1"),
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k is None or self.top_k > 0, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", 0 <= self.seed < 1 << 63, "at least 0 and below 2^63"),
        ):
            if not ok:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {allowed}")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are no text
            raise UserError(f"--prompt: not valid UTF-8 at character {error.start}") from error
