"""What a step changes: model, optimizer, guards and the position in the data; and how all of it is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.model import Transformer
from hotloop.engine.train import precision
from hotloop.engine.train.checkpoint import Checkpoint
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.guards import OutlierGuard, SkipBudget
from hotloop.engine.train.parameter_groups import parameter_groups
from hotloop.engine.train.step import TrainStep
from hotloop.kernels.dispatch import used
from hotloop.kernels.optimizers import AdamW


class Training:
    """A run's changing state, for a resolved recipe.

    `step` counts optimizer steps. The data of step s is that of global batch s + data_offset: a rewind goes back in
    steps, but not in data.
    """

    def __init__(
        self,
        recipe: Recipe,
        ranks: Ranks,
        make_objective: Callable[[Transformer], nn.Module],
        initial: Mapping[str, Tensor] | None = None,
    ):
        self.recipe, self.ranks, self.initial = recipe, ranks, initial
        policy = precision.resolve(recipe.train.precision, ranks.device)
        self.model = Transformer(recipe.model, activation_checkpointing=recipe.train.activation_checkpointing)
        self.model.to(policy.dtype).to(ranks.device)
        if recipe.train.global_batch > recipe.train.micro_batch:
            self.accumulate()
        self.objective: Callable[..., Tensor] = make_objective(self.model)
        if recipe.train.compile:
            self.objective = torch.compile(self.objective, fullgraph=True, dynamic=False)
        self.policy = policy
        self.start()

    def start(self) -> None:
        """To the state before the first step."""
        recipe, o = self.recipe, self.recipe.optimizer
        self.model.initialize(recipe.train.seed)
        if self.initial is not None:
            self.model.load_initial(self.initial)
        self.optimizer = AdamW(
            parameter_groups(self.model, o, recipe.finetune),
            lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay, max_grad_norm=o.max_grad_norm,
            master=self.policy.master, state_dtype=o.moments, seed=recipe.train.seed,
            rounding=self.policy.rounding if o.moments == "float32" else "stochastic",
        )  # fmt: skip
        self.guard = OutlierGuard(recipe.guards, self.ranks.device)
        self.budget = SkipBudget(recipe.guards)
        self.take_step = TrainStep(
            self.objective, list(self.model.parameters()), self.optimizer, self.guard, self.ranks
        )
        self.step = 0
        self.data_offset = 0
        self.rewinds = 0
        self.seconds = 0.0
        self.best_loss: float | None = None
        self.evaluations_since_best = 0
        self.ended: str | None = None

    def accumulate(self) -> None:
        """Gradients are now summed over micro-batches or ranks: in fp32."""
        precision.accumulate_in_fp32(self.model)

    @property
    def backends(self) -> dict[str, str]:
        """Op -> the backend that has run it."""
        return {**used(), **self.optimizer.backends}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        optimizer, _ = flatten(self.optimizer.state_dict())
        return {"model": self.model.state_dict(), "optimizer": optimizer}

    def state(self, environment: dict[str, Any]) -> dict[str, Any]:
        _, optimizer = flatten(self.optimizer.state_dict())
        return {
            "step": self.step,
            "data_offset": self.data_offset,
            "rewinds": self.rewinds,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "evaluations_since_best": self.evaluations_since_best,
            "ended": self.ended,
            "guard": self.guard.state(),
            "budget": self.budget.state(),
            "optimizer": optimizer,
            "environment": environment,
        }

    def load(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take the state of a checkpoint. Returns the environment it was made in."""
        state = checkpoint.state()
        try:
            self.model.load_state_dict(checkpoint.tensors("model"))
        except RuntimeError as error:
            raise UserError(f"{checkpoint.path} does not fit this model: {error}") from error
        self.optimizer.load_state_dict(unflatten(checkpoint.tensors("optimizer"), state["optimizer"]))
        self.guard.load_state(state["guard"])
        self.budget.load_state(state["budget"])
        for name in ("step", "data_offset", "rewinds", "seconds", "best_loss", "evaluations_since_best", "ended"):
            setattr(self, name, state[name])
        return state["environment"]


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """(tensors by path, the tree as JSON holds it: each node says its kind, a tensor its path)."""
    if isinstance(tree, Tensor):
        return {prefix: tree}, {"tensor": prefix}
    if isinstance(tree, dict):
        items = [(str(key), *flatten(value, f"{prefix}.{key}" if prefix else str(key))) for key, value in tree.items()]
        tensors = {name: tensor for _, found, _ in items for name, tensor in found.items()}
        integer = bool(tree) and all(isinstance(key, int) for key in tree)
        rest = {key: value for key, _, value in items}
        return tensors, {"integer_keys": rest} if integer else {"keys": rest}
    if isinstance(tree, list | tuple):
        parts = [flatten(value, f"{prefix}.{i}") for i, value in enumerate(tree)]
        tensors = {name: tensor for found, _ in parts for name, tensor in found.items()}
        return tensors, {"tuple" if isinstance(tree, tuple) else "list": [value for _, value in parts]}
    return {}, {"value": tree}


def unflatten(tensors: dict[str, Tensor], tree: Any) -> Any:
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind in ("keys", "integer_keys"):
        return {int(k) if kind == "integer_keys" else k: unflatten(tensors, v) for k, v in value.items()}
    if kind in ("list", "tuple"):
        return (tuple if kind == "tuple" else list)(unflatten(tensors, v) for v in value)
    return value
