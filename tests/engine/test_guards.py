"""Steps that must not happen, and what the run does about them: faults are injected into a real run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hotloop.engine.config import GuardConfig
from hotloop.engine.data.batches import IGNORE_INDEX, BatchSource
from hotloop.engine.data.shards import Corpus
from hotloop.engine.objectives.causal import CausalObjective
from hotloop.engine.tasks import causal
from hotloop.engine.train import checkpoint as checkpoints
from hotloop.engine.train import training
from hotloop.engine.train.guards import OutlierGuard, SkipBudget
from hotloop.engine.train.loop import RunFailed
from hotloop.engine.train.metrics import read_metrics
from hotloop.engine.train.pretrain import pretrain

CPU = torch.device("cpu")


def feed(guard: OutlierGuard, losses: list[float]) -> list[bool]:
    return [bool(guard(torch.tensor(loss))[0]) for loss in losses]


def test_an_outlier_is_skipped_and_leaves_no_trace():
    guard = OutlierGuard(GuardConfig(outlier_z=6.0, window=16), CPU)
    steady = [3.0 + 0.01 * (-1) ** i for i in range(40)]
    assert feed(guard, steady) == [False] * 40
    before = guard.state()
    assert feed(guard, [9.0, float("nan"), float("inf"), -float("inf")]) == [True] * 4
    assert guard.state() == before
    assert feed(guard, [3.0, 2.0]) == [False, False]  # falling is no fault


def test_nothing_is_an_outlier_before_there_is_a_mean():
    guard = OutlierGuard(GuardConfig(outlier_z=3.0, window=40), CPU)
    assert feed(guard, [10.0, 1.0, 50.0, 2.0]) == [False] * 4
    assert feed(guard, [float("nan")]) == [True]


def test_the_mean_and_variance_are_exponential():
    guard = OutlierGuard(GuardConfig(outlier_z=None, window=7), CPU)
    losses = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    feed(guard, losses.tolist())
    weight, mean, square = 2 / 8, 0.0, 0.0
    for i, loss in enumerate(losses.float().double().tolist()):
        w = max(weight, 1 / (i + 1))
        mean, square = mean + w * (loss - mean), square + w * (loss * loss - square)
    assert guard.mean.item() == pytest.approx(mean, rel=1e-9)
    assert guard.variance.item() == pytest.approx(square - mean * mean, rel=1e-9)


def test_a_guard_resumes():
    a, b = (OutlierGuard(GuardConfig(), CPU) for _ in range(2))
    feed(a, [1.0, 2.0, 1.5])
    b.load_state(a.state())
    assert a(torch.tensor(1.7)) == b(torch.tensor(1.7))
    assert a.state() == b.state()


def test_the_budget_counts_a_window():
    budget = SkipBudget(GuardConfig(skip_budget=2, budget_window=10))
    for step in (3, 5, 9):
        budget.record(step)
    assert not budget.exceeded(8)  # 9 is not looked at yet
    assert budget.exceeded(9)
    again = SkipBudget(budget.config)
    again.load_state(budget.state())
    assert again.exceeded(9)
    assert not budget.exceeded(13)  # 3 has left the window


def poison(monkeypatch: pytest.MonkeyPatch, recipe, data_steps: set[int], change: Callable) -> None:
    """Change the loss of the global batches of these data steps, wherever they turn up."""
    source = BatchSource(
        Corpus(recipe.data.path).split("train"), recipe.model.context, recipe.train.global_batch, recipe.train.seed
    )
    marked = {batch.tokens.numpy().tobytes() for step in data_steps for batch in source.micro_batches(step)}

    class Poisoned(CausalObjective):
        def forward(self, tokens, *arguments):
            loss = super().forward(tokens, *arguments)
            return change(loss) if tokens.numpy().tobytes() in marked else loss

    monkeypatch.setattr(causal, "CausalObjective", Poisoned)


def lines(run, kind: str) -> list[dict]:
    return [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == kind]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_step_changes_nothing_and_is_logged(tmp_path, recipe, monkeypatch, value):
    made = recipe()
    poison(monkeypatch, made, {5}, lambda loss: loss * value)
    assert pretrain(made, tmp_path / "run").reason == "finished"
    skipped = [line["step"] for line in lines(tmp_path / "run", "train") if line["skipped"]]
    assert skipped == [6]
    assert [line["step"] for line in lines(tmp_path / "run", "event") if line["name"] == "skipped"] == [6]
    losses = [line["loss"] for line in lines(tmp_path / "run", "train")]
    assert losses[5] is None
    assert losses[-1] < losses[0]


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path, recipe, monkeypatch):
    """Only the optimizer can see this one."""

    class Fault(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, dloss):
            return dloss * float("nan")

    made = recipe()
    poison(monkeypatch, made, {5}, Fault.apply)
    assert pretrain(made, tmp_path / "run").reason == "finished"
    train = lines(tmp_path / "run", "train")
    assert [line["step"] for line in train if line["skipped"]] == [6]
    assert [line["step"] for line in lines(tmp_path / "run", "event") if line["name"] == "skipped"] == [6]
    assert all(line["loss"] is not None for line in train)
    assert train[-1]["loss"] < train[0]["loss"]


def test_an_outlier_step_is_skipped(tmp_path, recipe, monkeypatch):
    made = recipe(train={"steps": 40}, guards={"window": 16, "outlier_z": 20.0})
    poison(monkeypatch, made, {30}, lambda loss: loss * 100)
    assert pretrain(made, tmp_path / "run").reason == "finished"
    assert [line["step"] for line in lines(tmp_path / "run", "train") if line["skipped"]] == [31]


def test_beyond_the_budget_the_run_rewinds_and_leaves_the_range_out(tmp_path, recipe, monkeypatch):
    made = recipe(train={"steps": 20}, guards={"skip_budget": 2, "budget_window": 10})
    poison(monkeypatch, made, {9, 10, 11, 12}, lambda loss: loss * float("nan"))
    run = tmp_path / "run"
    assert pretrain(made, run).reason == "finished"
    (event,) = (line for line in lines(run, "event") if line["name"] == "rewound")
    # Steps 10, 11 and 12 were skipped; the third is seen two steps later, at 14. The checkpoint before 10 is of step 8.
    assert event["step"] == 8
    assert "10 to 14" in event["message"]
    steps = [line["step"] for line in lines(run, "train")]
    assert steps == list(range(1, 21))
    assert not any(line["skipped"] for line in lines(run, "train"))
    state = checkpoints.latest(run / "checkpoints").checkpoint.state()
    assert (state["rewinds"], state["data_offset"]) == (1, 6)


def test_a_run_that_keeps_failing_stops_with_its_checkpoints(tmp_path, recipe, monkeypatch):
    made = recipe(train={"steps": 60}, guards={"skip_budget": 1, "budget_window": 10, "max_rewinds": 2})
    poison(monkeypatch, made, set(range(9, 60)), lambda loss: loss * float("nan"))
    with pytest.raises(RunFailed, match="after 2 rewinds"):
        pretrain(made, tmp_path / "run")
    # Skipped steps changed nothing, so what was saved among them is as good as what was saved before them.
    weights = checkpoints.latest(tmp_path / "run" / "checkpoints").checkpoint.tensors("model")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_a_rewind_before_the_first_checkpoint_starts_again(tmp_path, recipe, monkeypatch):
    made = recipe(guards={"skip_budget": 0}, checkpoint={"every": 100}, evaluation={"every": 0})
    poison(monkeypatch, made, {2}, lambda loss: loss * float("nan"))
    run = tmp_path / "run"
    assert pretrain(made, run).reason == "finished"
    assert [line["step"] for line in lines(run, "train")] == list(range(1, 13))
    assert [line["step"] for line in lines(run, "event") if line["name"] == "rewound"] == [0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batches(tmp_path, recipe, monkeypatch, error):
    made = recipe()
    pretrain(made, tmp_path / "plenty")

    class Tight(CausalObjective):
        def forward(self, tokens, *arguments):
            if tokens.shape[0] > 2:
                raise error
            return super().forward(tokens, *arguments)

    monkeypatch.setattr(causal, "CausalObjective", Tight)
    assert pretrain(made, tmp_path / "tight").reason == "finished"
    assert [line["name"] for line in lines(tmp_path / "tight", "event")].count("out_of_memory") == 2
    for a, b in zip(lines(tmp_path / "tight", "train"), lines(tmp_path / "plenty", "train"), strict=True):
        assert (a["step"], a["supervised"]) == (b["step"], b["supervised"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_another_error_is_not_taken_for_a_full_memory(tmp_path, recipe, monkeypatch):
    class Broken(CausalObjective):
        def forward(self, *arguments):
            raise RuntimeError("shapes do not match")

    monkeypatch.setattr(causal, "CausalObjective", Broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        pretrain(recipe(), tmp_path / "run")


def test_no_run_trains_on_a_kernel_that_is_wrong_here(monkeypatch):
    from dataclasses import replace

    from hotloop.engine.errors import UserError
    from hotloop.engine.train import pretrain as module
    from hotloop.kernels.attention.op import TABLE

    module.check_backends(CPU, torch.float32)
    for name in ("cpu", "torch"):  # whichever serves here
        right = TABLE[name]
        wrong = replace(right, forward=lambda *arguments, right=right: [2 * x for x in right.forward(*arguments)])
        monkeypatch.setitem(TABLE._by_name, name, wrong)
    with pytest.raises(UserError, match=r"attention .* on backend (cpu|torch).*HOTLOOP_BACKEND=reference"):
        module.check_backends(CPU, torch.float32)


def test_early_stopping_keeps_the_best_and_stays_stopped(tmp_path, recipe):
    made = recipe(
        train={"steps": 200}, optimizer={"lr": 0.5}, evaluation={"every": 3, "patience": 2}, checkpoint={"every": 50}
    )
    run = tmp_path / "run"
    first = pretrain(made, run)
    assert first.reason == "stopped early"
    assert first.step < 200
    evaluations = lines(run, "eval")
    best = min(evaluations, key=lambda line: line["loss"])
    assert evaluations.index(best) == len(evaluations) - 3
    assert checkpoints.best(run / "checkpoints").step == best["step"]
    again = pretrain(made, run)
    assert (again.reason, again.step) == ("stopped early", first.step)
    assert lines(run, "eval") == evaluations


def test_a_batch_without_supervision_changes_nothing(corpus, recipe):
    from dataclasses import replace

    from hotloop.engine.train.distributed import Ranks

    made = recipe()
    made = replace(made, model=replace(made.model, vocab_size=Corpus(corpus).vocab_size))
    t = training.Training(made, Ranks(0, 1, CPU), CausalObjective)
    (batch,) = BatchSource(Corpus(corpus).split("train"), 32, 8, 0).micro_batches(0)
    t.take_step([batch], batch.n_supervised, 1e-3)
    before = {name: tensor.clone() for name, tensor in t.tensors()["model"].items()}
    empty = replace(batch, targets=torch.full_like(batch.targets, IGNORE_INDEX), n_supervised=0)
    result = t.take_step([empty], 0, 1e-3)
    assert result.loss.item() == 0
    assert result.skipped.item() == 1
    for name, tensor in t.tensors()["model"].items():
        assert torch.equal(tensor, before[name])
