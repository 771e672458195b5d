"""Causal pretraining: packed documents of a corpus, judged by the loss on its held-out documents."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import BatchSource
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.engine.tasks.corpora import CorpusPlan, describe_packs
from hotloop.engine.train.evaluate import evaluate
from hotloop.engine.train.task import HeldOut


class CausalPlan(CorpusPlan):
    head = "linear"

    def resolve(self, recipe: Recipe) -> Recipe:
        recipe = super().resolve(recipe)
        if not recipe.model.causal:
            what = "model.causal = false" if self.initial is None else f"{self.initial.source} sees both sides"
            raise UserError(f'{what}: objective = "causal" needs a causal model; train it with objective = "masked"')
        return recipe

    def task(self, recipe: Recipe) -> CausalTask:
        return CausalTask(recipe, self)


class CausalTask:
    def __init__(self, recipe: Recipe, plan: CausalPlan):
        self.recipe, self.plan = recipe, plan
        self.initial = None if plan.initial is None else plan.initial.state
        self.judged_first = plan.initial is not None
        self.context = recipe.data.context or recipe.model.context
        self.source = BatchSource(
            plan.splits(), self.context, recipe.train.global_batch, recipe.train.seed, weights=plan.weights
        )

    def objective(self, model: Transformer) -> nn.Module:
        return CausalObjective(model)

    def evaluate(self, model: Transformer, poll: Callable[[], bool]) -> HeldOut | None:
        r = self.recipe
        return self.plan.judge(
            lambda split: evaluate(
                model, split, context=self.context, max_bytes=r.evaluation.max_bytes, seed=r.train.seed, poll=poll
            )
        )

    def describe(self) -> str:
        return describe_packs(self.plan, self.source.packs)
