"""What a run trains on and how it is judged: the part of a run that differs from objective to objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from hotloop.engine.config import Recipe
from hotloop.engine.data.batches import Batches
from hotloop.engine.model import Transformer


class HeldOut(Protocol):
    """The result of an evaluation. The run keeps the checkpoint of the lowest `loss`; all of it is logged."""

    @property
    def loss(self) -> float: ...

    def to_dict(self) -> dict[str, float | int]: ...


class Task(Protocol):
    """Of a resolved recipe."""

    @property
    def source(self) -> Batches: ...

    @property
    def context(self) -> int:
        """Tokens of a row of its batches."""

    @property
    def initial(self) -> Mapping[str, Tensor] | None:
        """Weights that the model begins with; those that are not among them, or all where it is None, are drawn."""

    @property
    def judged_first(self) -> bool:
        """Whether the model is judged before its first step too: it has something to lose."""

    def objective(self, model: Transformer) -> nn.Module:
        """A module (tokens, targets, positions, cu_seqlens, normalizer) -> summed loss / normalizer, as one scalar."""

    def evaluate(self, model: Transformer, poll: Callable[[], bool]) -> HeldOut | None:
        """Judge the model on what is held out. None: nothing is, or `poll` asked to stop."""

    def describe(self) -> str:
        """The data, for the first line of the run's log."""


class Plan(Protocol):
    """The data of a recipe, opened and checked. Whoever opens it raises UserError for what cannot be trained on."""

    @property
    def files(self) -> Mapping[str, bytes]:
        """Name -> content of what identifies the data. A run's folder keeps them, and is resumed only with the same."""

    def resolve(self, recipe: Recipe) -> Recipe:
        """The recipe with everything that it leaves to its data. Raises UserError where the two disagree."""

    def task(self, recipe: Recipe) -> Task:
        """Of a resolved recipe."""
