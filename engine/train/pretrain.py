"""A recipe and a folder in, a trained model in that folder out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from hotloop.engine.config import Recipe
from hotloop.engine.errors import UserError
from hotloop.engine.tasks.causal import CausalPlan
from hotloop.engine.tasks.masked import MaskedPlan
from hotloop.engine.train import distributed, precision
from hotloop.engine.train.distributed import Ranks
from hotloop.engine.train.folder import RunFolder
from hotloop.engine.train.loop import Outcome, Run
from hotloop.engine.train.signals import StopSignal
from hotloop.engine.train.task import Plan
from hotloop.kernels.selfcheck import self_check

PLANS: dict[str, Callable[[Recipe], Plan]] = {"causal": CausalPlan, "masked": MaskedPlan}


def pretrain(recipe: Recipe, path: Path | str, *, fault: Callable[[str], None] | None = None) -> Outcome:
    """Run a recipe in the folder `path`, or resume it there.

    `fault` is called with the name of every point of a checkpoint's write, so that tests can fail there.
    Raises UserError before any work for what cannot be run, RunFailed when the run cannot go on.
    """
    if recipe.objective not in PLANS:
        raise UserError(f"objective = {recipe.objective!r} is not pretraining: use `hotloop finetune`")
    return run_plan(recipe, path, PLANS[recipe.objective], fault=fault)


def run_plan(
    recipe: Recipe,
    path: Path | str,
    open_plan: Callable[[Recipe], Plan],
    *,
    fault: Callable[[str], None] | None = None,
) -> Outcome:
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    with StopSignal() as stop, RunFolder(path) as folder:
        ranks = distributed.start(recipe.train.device)
        try:
            plan = open_plan(recipe)
            saved = ranks.from_main(lambda: folder.open(recipe, plan.files))
            resolved = resolve(plan.resolve(recipe), saved, ranks)
            if ranks.device.type == "cuda":
                check_backends(ranks.device, precision.POLICIES[resolved.train.precision].dtype)
            if saved is None and ranks.is_main:
                folder.create(recipe, resolved, plan.files)
            run = Run(resolved, folder, plan.task(resolved), ranks, stop, fault)
            try:
                return run.train()
            finally:
                run.close()
        finally:
            ranks.stop()


def check_backends(device: torch.device, dtype: torch.dtype) -> None:
    """No run trains on a kernel that is wrong on this device: compare those that would serve it with the formula.

    Raises UserError naming each one that differs.
    """
    wrong = [o for o in self_check(device, [dtype]) if o.chosen and not o.fine]
    if wrong:
        lines = "; ".join(f"{o.op} ({o.call}) on backend {o.backend}: {o.detail}" for o in wrong)
        raise UserError(
            f"{device} computes wrong results: {lines}. Force another backend with HOTLOOP_BACKEND=reference and "
            "report the output of `hotloop doctor`"
        )


def resolve(recipe: Recipe, saved: Recipe | None, ranks: Ranks) -> Recipe:
    """Fill in what the recipe leaves to the machine; a resumed run keeps what it resolved first."""
    train = recipe.train
    if train.global_batch % (train.micro_batch * ranks.world_size):
        raise UserError(
            f"train.global_batch = {train.global_batch}: must be a multiple of train.micro_batch x ranks = "
            f"{train.micro_batch} x {ranks.world_size}"
        )
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if train.compile and version < (2, 13):
        raise UserError(f"train.compile needs torch 2.13 (this is {torch.__version__}): set it to false")
    name = saved.train.precision if saved else precision.resolve(train.precision, ranks.device).name
    return replace(recipe, train=replace(train, precision=name))  # type: ignore[arg-type]
