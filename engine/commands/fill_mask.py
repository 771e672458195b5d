"""`hotloop fill-mask RUN TEXT`"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class FillMask:
    """Print what a masked model would put in the place of [MASK].

    Examples:
      hotloop fill-mask runs/bert "The loss [MASK] with every step."
      hotloop fill-mask checkpoints/bert-base-uncased "Paris is the [MASK] of [MASK]." --top 3 --json

    A text may have several masks; each is filled with all of them hidden. Special tokens are left out of the lists.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run with objective = "masked", or of a checkpoint of `transformers` with such a head."""
    text: Annotated[str, tyro.conf.Positional]
    """Text with the tokenizer's mask token in it, for most [MASK]."""
    top: int = 5
    """Tokens to print for each mask."""
    checkpoint: Literal["last", "best"] = "last"
    """Of a run: the newest one, or the one with the lowest held-out loss."""
    json: bool = False
    """Print one JSON list, of a list for each mask."""

    def __call__(self) -> int:
        from hotloop.engine.errors import UserError
        from hotloop.engine.fill_mask import MaskedModel

        if self.top < 1:
            raise UserError(f"--top {self.top}: must be at least 1")
        masked = MaskedModel.load(self.run, self.checkpoint)
        for note in masked.notes:
            print(f"hotloop: {note}", file=sys.stderr)
        masks = masked.fill(self.text, self.top)
        if self.json:
            print(json.dumps([[dataclasses.asdict(one) for one in mask] for mask in masks], ensure_ascii=False))
            return 0
        for number, mask in enumerate(masks, 1):
            if len(masks) > 1:
                print(f"--- {masked.mask_token} {number} of {len(masks)} ---")
            for one in mask:
                print(f"{one.probability:8.4f}  {one.token.strip() or repr(one.token)}")
        return 0
