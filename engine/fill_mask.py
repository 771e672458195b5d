"""What a masked model would put in the place of [MASK]."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer

from hotloop.engine.checkpointed import load_run
from hotloop.engine.data.masking import Vocabulary
from hotloop.engine.errors import UserError
from hotloop.engine.initial import read_initial
from hotloop.engine.model import Transformer


@dataclass(frozen=True)
class Candidate:
    token: str
    id: int
    probability: float


@dataclass(frozen=True)
class MaskedModel:
    model: Transformer
    tokenizer: Tokenizer
    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path | str, which: Literal["last", "best"] = "last") -> MaskedModel:
        """Of a run, or of a folder of `transformers`. Raises UserError for a model without a head to fill masks."""
        folder = Path(folder)
        if (folder / "config.json").exists() and not (folder / "config.toml").exists():
            initial = read_initial(folder)
            if initial.config.head != "masked":
                raise UserError(f"{folder}: the checkpoint has no head for masked language modelling")
            if initial.tokenizer is None:
                raise UserError(f"{folder}: no tokenizer.json")
            model = Transformer(initial.config)
            model.load_initial(initial.state)
            tokenizer = Tokenizer.from_str(initial.tokenizer)
            tokenizer.encode_special_tokens = True
            return cls(model.eval(), tokenizer, Vocabulary.of(initial.tokenizer))
        trained = load_run(folder, which)
        if trained.recipe.objective != "masked":
            hint = "; use `hotloop generate`" if trained.recipe.objective == "causal" else ""
            raise UserError(
                f"{folder} was trained with objective {trained.recipe.objective!r}, not to fill masks{hint}"
            )
        return cls(trained.model, trained.tokenizer, Vocabulary.of(trained.tokenizer.to_str()), trained.notes)

    @property
    def mask_token(self) -> str:
        return str(self.tokenizer.id_to_token(self.vocabulary.mask))

    @torch.no_grad()
    def fill(self, text: str, top: int = 5) -> list[list[Candidate]]:
        """For each mask token in the text the `top` likeliest tokens, special ones left out. Raises UserError."""
        tokens = self._encode(text)
        at = [i for i, token in enumerate(tokens) if token == self.vocabulary.mask]
        device = next(self.model.parameters()).device
        logits = self.model.logits(torch.tensor([tokens], device=device))[0, at].float()
        size = min(logits.shape[1], len(self.vocabulary.special))
        probabilities = logits.softmax(-1)[:, :size]
        probabilities[:, torch.from_numpy(self.vocabulary.special[:size]).to(device)] = -1.0
        best = probabilities.topk(min(top, len(self.vocabulary.ordinary)))
        return [
            [Candidate(self._text(i), i, p) for p, i in zip(row.tolist(), ids.tolist(), strict=True)]
            for row, ids in zip(best.values, best.indices, strict=True)
        ]

    def _encode(self, text: str) -> list[int]:
        parts = text.split(self.mask_token)
        if len(parts) == 1:
            raise UserError(f"the text has no {self.mask_token}: put it where a word is to be found")
        vocabulary = self.vocabulary
        tokens = [] if vocabulary.first is None else [vocabulary.first]
        for number, part in enumerate(parts):
            if number:
                tokens.append(vocabulary.mask)
            if vocabulary.spaces_lead and number < len(parts) - 1:
                part = part.removesuffix(" ")  # it belongs to the token that is looked for
            tokens += self.tokenizer.encode(part, add_special_tokens=False).ids
        tokens += [] if vocabulary.last is None else [vocabulary.last]
        context = self.model.config.context
        if len(tokens) > context:
            raise UserError(f"the text has {len(tokens)} tokens, the model reads {context}: shorten it")
        return tokens

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token], skip_special_tokens=False) or str(self.tokenizer.id_to_token(token))
