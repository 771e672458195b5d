"""Masked pretraining: framed documents with hidden tokens, judged by how well those of held-out documents are found."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hotloop.engine.config import Recipe
from hotloop.engine.data.masked import MaskedSource
from hotloop.engine.data.masking import Masking, Vocabulary
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.masked import MaskedObjective
from hotloop.engine.tasks.corpora import CorpusPlan, describe_packs
from hotloop.engine.train.evaluate_masked import evaluate_masked
from hotloop.engine.train.task import HeldOut


class MaskedPlan(CorpusPlan):
    head = "masked"

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        try:
            self.vocabulary = Vocabulary.of(self.tokenizer_json)
        except UserError as error:
            raise UserError(f"{self.corpus.folder}: {error}") from error
        self.masking = Masking(recipe.masking, self.vocabulary, recipe.train.seed)

    def resolve(self, recipe: Recipe) -> Recipe:
        recipe = super().resolve(recipe)
        if recipe.model.causal:
            raise UserError(
                'model.causal = true: objective = "masked" needs a model that sees both sides; set model.causal = false'
            )
        return recipe

    def task(self, recipe: Recipe) -> MaskedTask:
        return MaskedTask(recipe, self)


class MaskedTask:
    def __init__(self, recipe: Recipe, plan: MaskedPlan):
        self.recipe, self.plan = recipe, plan
        self.initial = None if plan.initial is None else plan.initial.state
        self.judged_first = plan.initial is not None
        self.context = recipe.data.context or recipe.model.context
        self.source = MaskedSource(
            plan.splits(), self.context, recipe.train.global_batch, plan.masking, weights=plan.weights
        )

    def objective(self, model: Transformer) -> nn.Module:
        return MaskedObjective(model, self.source.max_valid(1))

    def evaluate(self, model: Transformer, poll: Callable[[], bool]) -> HeldOut | None:
        r, masking = self.recipe, self.plan.masking
        return self.plan.judge(
            lambda split: evaluate_masked(
                model, split, masking,
                context=self.context, max_bytes=r.evaluation.max_bytes, seed=r.train.seed, poll=poll,
            )
        )  # fmt: skip

    def describe(self) -> str:
        m = self.recipe.masking
        what = "of whole words" if m.whole_words else "of tokens"
        return f"{describe_packs(self.plan, self.source.packs)}; {m.rate:.0%} {what} hidden"
