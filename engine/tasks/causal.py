"""Causal pretraining: packed documents of a corpus, judged by the loss on its held-out documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import BatchSource
from hotloop.engine.data.evaluation import evaluation_documents
from hotloop.engine.data.shards import Corpus
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.engine.train.evaluate import Evaluation, evaluate


class CausalPlan:
    def __init__(self, recipe: Recipe):
        self.corpus = Corpus(recipe.data.path)
        self.files = self.corpus.identity()

    def resolve(self, recipe: Recipe) -> Recipe:
        corpus, data, model = self.corpus, recipe.data, recipe.model
        if model.vocab_size is not None and model.vocab_size != corpus.vocab_size:
            raise UserError(
                f"model.vocab_size = {model.vocab_size}, but the tokenizer of {data.path} has {corpus.vocab_size} "
                "entries: leave it out"
            )
        _check_evaluation(recipe, corpus)
        return replace(
            recipe,
            data=replace(data, context=data.context or model.context),
            model=replace(model, vocab_size=corpus.vocab_size),
        )

    def task(self, recipe: Recipe) -> CausalTask:
        return CausalTask(recipe, self.corpus)


class CausalTask:
    initial = None

    def __init__(self, recipe: Recipe, corpus: Corpus):
        self.recipe, self.corpus = recipe, corpus
        self.context = recipe.data.context or recipe.model.context
        self.source = BatchSource(corpus.split("train"), self.context, recipe.train.global_batch, recipe.train.seed)

    def objective(self, model: Transformer) -> nn.Module:
        return CausalObjective(model)

    def evaluate(self, model: Transformer, poll: Callable[[], bool]) -> Evaluation | None:
        if "validation" not in self.corpus.splits:
            return None
        return evaluate(
            model, self.corpus.split("validation"), context=self.context,
            max_bytes=self.recipe.evaluation.max_bytes, seed=self.recipe.train.seed, poll=poll,
        )  # fmt: skip

    def describe(self) -> str:
        packs = self.source.packs[0]
        return (
            f"{packs.n_packs:,} packs, {packs.efficiency:.2%} full, {packs.n_split_documents:,} documents longer than "
            "a pack"
        )


def _check_evaluation(recipe: Recipe, corpus: Corpus) -> None:
    """What the first evaluation would find wrong, steps later."""
    if "validation" not in corpus.splits:
        if recipe.evaluation.patience is not None:
            raise UserError(
                f"evaluation.patience = {recipe.evaluation.patience}, but {corpus.folder} has no validation split: "
                "prepare it with --validation-fraction, or leave it out"
            )
    elif recipe.evaluation.every:
        try:
            evaluation_documents(corpus.split("validation"), recipe.evaluation.max_bytes, recipe.train.seed)
        except UserError as error:
            raise UserError(f"evaluation.max_bytes = {recipe.evaluation.max_bytes}: {error}") from error
