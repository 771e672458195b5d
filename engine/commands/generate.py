"""`hotloop generate RUN`"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Generate:
    """Print text that a run's model continues from a prompt."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run."""
    prompt: str = ""
    """What the text begins with; empty: the beginning of a document."""
    samples: int = 1
    max_tokens: int = 200
    temperature: float = 0.8
    """0 takes the most likely token each time."""
    top_k: int | None = None
    """Draw among the k most likely tokens only."""
    top_p: float | None = None
    """Draw among the most likely tokens that together have this probability."""
    seed: int = 0
    checkpoint: Literal["last", "best"] = "last"

    def __call__(self) -> int:
        from hotloop.engine.checkpointed import load_run
        from hotloop.engine.errors import UserError
        from hotloop.engine.generate import Sampling, complete

        for name, ok in {
            "temperature": self.temperature >= 0, "max_tokens": self.max_tokens > 0, "samples": self.samples > 0,
            "top_k": self.top_k is None or self.top_k > 0, "top_p": self.top_p is None or 0 < self.top_p <= 1,
        }.items():  # fmt: skip
            if not ok:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: out of range (see --help)")
        trained = load_run(self.run, self.checkpoint)
        for i in range(self.samples):
            sampling = Sampling(self.temperature, self.top_k, self.top_p, self.max_tokens, self.seed + i)
            if i:
                print(f"--- {i + 1} ---")
            sys.stdout.write(self.prompt)
            for piece in complete(trained, self.prompt, sampling):
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
        return 0
