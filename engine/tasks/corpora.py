"""What pretraining of either kind begins with: corpora to train on and to be judged by, and weights, drawn or given."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

from hotloop.engine.config import Recipe, SourceConfig
from hotloop.engine.data.evaluation import evaluation_documents
from hotloop.engine.data.packing import Packs
from hotloop.engine.data.shards import Corpus, Split
from hotloop.engine.data.tokenizer import tokenizer_hash
from hotloop.engine.errors import UserError
from hotloop.engine.initial import extended, initial_of
from hotloop.engine.train.task import HeldOut

VALIDATION = "validation"


@dataclass(frozen=True)
class Judged:
    """Held-out documents of one's own, and of the general corpus where there is one."""

    own: HeldOut
    general: HeldOut

    @property
    def loss(self) -> float:
        return self.own.loss

    def to_dict(self) -> dict[str, float | int]:
        own, general = self.own.to_dict(), self.general.to_dict()
        seconds = own["seconds"] + (0 if self.general is self.own else general["seconds"])
        named = {f"general_{name}": value for name, value in general.items() if name != "seconds"}
        return {**own, **named, "seconds": seconds}


class CorpusPlan:
    """The corpora of a recipe, and the checkpoint it begins with. Raises UserError for what does not fit together."""

    head: ClassVar[Literal["linear", "masked"]]
    """Of the language model; a checkpoint that lacks it gets it drawn anew."""

    def __init__(self, recipe: Recipe):
        data = recipe.data
        self.initial = initial_of(recipe, head=self.head)
        sources = data.sources or (SourceConfig(data.path),)
        own = data.path or sources[0].path
        opened = {path: Corpus(path) for path in dict.fromkeys([own, *(s.path for s in sources), data.general]) if path}
        self.corpus = opened[own]
        self.train = [opened[source.path] for source in sources]
        self.weights = [source.weight for source in sources] if data.sources else None
        self.general = opened[data.general] if data.general else None
        if self.initial is not None and self.initial.tokenizer is not None:
            self.initial = extended(self.initial, self.tokenizer_json)
        for corpus in opened.values():
            self._check_tokenizer(corpus)
        others = [corpus.identity()["corpus.json"] for path, corpus in opened.items() if path != own]
        self.files: dict[str, bytes] = {
            **self.corpus.identity(),
            **{f"corpus-{i}.json": content for i, content in enumerate(others, 2)},
        }
        if self.initial is not None:
            named = {"path": self.initial.source, "fingerprint": self.initial.fingerprint}
            self.files["initial.json"] = json.dumps(named, indent=2).encode()

    @cached_property
    def tokenizer_json(self) -> str:
        return self.corpus.tokenizer_path.read_text(encoding="utf-8")

    def resolve(self, recipe: Recipe) -> Recipe:
        recipe = self._with_model(recipe)
        self._check_evaluation(recipe)
        return recipe

    def splits(self) -> list[Split]:
        return [corpus.split("train") for corpus in self.train]

    def judge(self, score: Callable[[Split], HeldOut | None]) -> HeldOut | None:
        """`score` on held-out documents, and on those of the general corpus; None where it is, or nothing is."""
        if VALIDATION not in self.corpus.splits:
            return None
        own = score(self.corpus.split(VALIDATION))
        if own is None or self.general is None:
            return own
        if self.general is self.corpus:
            return Judged(own, own)
        general = score(self.general.split(VALIDATION))
        return None if general is None else Judged(own, general)

    def _with_model(self, recipe: Recipe) -> Recipe:
        data, model, size = recipe.data, recipe.model, self.corpus.vocab_size
        if self.initial is None:
            if model.vocab_size is not None and model.vocab_size != size:
                raise UserError(
                    f"model.vocab_size = {model.vocab_size}, but the tokenizer of {self.corpus.folder} has {size} "
                    "entries: leave it out"
                )
            model, context = replace(model, vocab_size=size), data.context or model.context
        else:
            model = self.initial.config
            context = data.context or model.context
            if context > model.context:
                raise UserError(
                    f"data.context = {context}: longer than that of {self.initial.source} ({model.context})"
                )
        return replace(recipe, data=replace(data, path=str(self.corpus.folder), context=context), model=model)

    def _check_tokenizer(self, corpus: Corpus) -> None:
        if self.initial is not None:
            if self.initial.tokenizer is None:
                raise UserError(
                    f"{self.initial.source}: no tokenizer.json, so nothing says whether {corpus.folder} was prepared "
                    "for it: put the checkpoint's own there"
                )
            if tokenizer_hash(self.initial.tokenizer) != corpus.tokenizer_hash:
                raise _other_tokenizer(corpus, f"the checkpoint {self.initial.source}", self.initial.source)
        elif corpus.tokenizer_hash != self.corpus.tokenizer_hash:
            raise _other_tokenizer(corpus, str(self.corpus.folder), str(self.corpus.folder))

    def _check_evaluation(self, recipe: Recipe) -> None:
        """What the first evaluation would find wrong, steps later."""
        if self.general is not None:
            for corpus in (self.corpus, self.general):
                if VALIDATION not in corpus.splits:
                    raise UserError(
                        f"data.general: {corpus.folder} has no validation split to judge by: prepare it with "
                        "--validation-fraction"
                    )
            if not recipe.evaluation.every:
                raise UserError("data.general: needs evaluation.every > 0, it is 0 (never)")
        if VALIDATION not in self.corpus.splits:
            if recipe.evaluation.patience is not None:
                raise UserError(
                    f"evaluation.patience = {recipe.evaluation.patience}, but {self.corpus.folder} has no validation "
                    "split: prepare it with --validation-fraction, or leave it out"
                )
            return
        judging = [self.corpus] if self.general is None else [self.corpus, self.general]
        for corpus in judging if recipe.evaluation.every else ():
            try:
                evaluation_documents(corpus.split(VALIDATION), recipe.evaluation.max_bytes, recipe.train.seed)
            except UserError as error:
                raise UserError(f"evaluation.max_bytes = {recipe.evaluation.max_bytes}: {error}") from error


def describe_packs(plan: CorpusPlan, packs: list[Packs]) -> str:
    total = sum(one.n_packs for one in packs)
    n_split = sum(one.n_split_documents for one in packs)
    efficiency = sum(one.n_tokens for one in packs) / sum(one.n_packs * one.context for one in packs)
    text = f"{total:,} packs, {efficiency:.2%} full, {n_split:,} documents longer than a pack"
    if plan.weights is not None:
        shares = (
            f"{corpus.folder} {weight / sum(plan.weights):.0%}"
            for corpus, weight in zip(plan.train, plan.weights, strict=True)
        )
        text += f", mixed of {', '.join(shares)}"
    return text if plan.initial is None else f"{text}; begins with {plan.initial.source}"


def _other_tokenizer(corpus: Corpus, than: str, tokenizer: str) -> UserError:
    paths = corpus.manifest.get("options", {}).get("paths", ["DOCUMENTS"])
    return UserError(
        f"{corpus.folder} was prepared with another tokenizer than {than}: prepare it again, "
        f"hotloop prepare {' '.join(paths)} --tokenizer {tokenizer} --out {corpus.folder}-again"
    )
