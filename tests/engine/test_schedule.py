"""Learning rates at their exact ends, and which parameters are decayed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hotloop.engine.config import OptimizerConfig, ScheduleConfig
from hotloop.engine.train.parameter_groups import parameter_groups
from hotloop.engine.train.schedule import learning_rate
from hotloop.kernels.optimizers import AdamW

KINDS = ("cosine", "trapezoid", "linear", "constant")


def rates(lr: float, total: int, **schedule: object) -> list[float]:
    config = ScheduleConfig(**schedule)
    return [learning_rate(OptimizerConfig(lr=lr), config, step, total) for step in range(total)]


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_rises_in_equal_parts_to_exactly_the_peak(kind: str) -> None:
    values = rates(3e-4, 50, kind=kind, warmup_steps=7)
    assert values[:7] == [3e-4 * ((i + 1) / 7) for i in range(7)]
    assert values[6] == 3e-4
    assert values[0] > 0


@given(
    kind=st.sampled_from(KINDS),
    lr=st.floats(1e-8, 10),
    ratio=st.floats(0, 1),
    warmup=st.integers(0, 50),
    after=st.integers(2, 200),
    fraction=st.floats(0, 1),
)
def test_ends_are_exact_and_nothing_rises_after_the_warm_up(
    kind: str, lr: float, ratio: float, warmup: int, after: int, fraction: float
) -> None:
    total = warmup + after
    values = rates(lr, total, kind=kind, warmup_steps=warmup, final_lr_ratio=ratio, decay_fraction=fraction)
    start = max(warmup - 1, 0)
    assert values[start] == lr
    falls = kind in ("cosine", "linear") or (kind == "trapezoid" and round(fraction * total) > 0)
    assert values[-1] == (lr * ratio if falls else lr)
    slack = 4 * math.ulp(lr)
    assert all(b <= a + slack for a, b in zip(values[start:], values[start + 1 :], strict=False))
    assert all(lr * ratio - slack <= v <= lr + slack for v in values[start:])


def test_cosine_passes_the_middle_and_follows_the_formula() -> None:
    values = rates(1.0, 101, kind="cosine", final_lr_ratio=0.1)
    assert values[50] == pytest.approx(0.55, abs=1e-15)
    for step in (1, 20, 77):
        assert values[step] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / 100)), abs=1e-15)


def test_linear_is_a_straight_line() -> None:
    values = rates(1.0, 11, kind="linear", final_lr_ratio=0.5)
    assert values == pytest.approx([1 - 0.05 * i for i in range(11)], abs=1e-15)


def test_trapezoid_is_flat_and_then_straight() -> None:
    values = rates(2.0, 100, kind="trapezoid", warmup_steps=10, decay_fraction=0.2)
    assert values[9:80] == [2.0] * 71
    assert values[80:] == pytest.approx([2.0 * (1 - i / 20) for i in range(1, 21)], abs=1e-15)
    assert values[-1] == 0.0


def test_trapezoid_that_should_fall_before_the_warm_up_ends_falls_after_it() -> None:
    values = rates(1.0, 20, kind="trapezoid", warmup_steps=15, decay_fraction=0.9)
    assert values[14] == 1.0
    assert values[15:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0], abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_short_runs(kind: str) -> None:
    assert rates(1.0, 1, kind=kind) == [1.0]
    assert rates(1.0, 3, kind=kind, warmup_steps=10) == [0.1, 0.2, 0.3]
    assert rates(1.0, 4, kind=kind, warmup_steps=4)[-1] == 1.0


def test_steps_after_the_end_keep_the_final_rate() -> None:
    for kind in ("cosine", "linear", "trapezoid"):
        schedule = ScheduleConfig(kind=kind, final_lr_ratio=0.3)
        assert learning_rate(OptimizerConfig(lr=0.7), schedule, 1000, 10) == 0.7 * 0.3


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="step = -1"):
        learning_rate(OptimizerConfig(), ScheduleConfig(), -1, 10)
    with pytest.raises(ValueError, match="total_steps = 0"):
        learning_rate(OptimizerConfig(), ScheduleConfig(), 0, 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4, bias=False).requires_grad_(False)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_only_matrices_are_decayed(decay_embeddings: bool) -> None:
    model = Tied()
    decayed, others = parameter_groups(model, OptimizerConfig(weight_decay=0.3, decay_embeddings=decay_embeddings))
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    names = [name for name, _ in decayed["params"]]
    assert names == (["embedding.weight"] if decay_embeddings else []) + ["linear.weight"]
    rest = ["norm.weight", "norm.bias", "linear.bias"]
    assert [name for name, _ in others["params"]] == ([] if decay_embeddings else ["embedding.weight"]) + rest
    assert decayed["params"][-1][1] is model.linear.weight


def test_groups_go_into_the_optimizer_and_name_its_parameters() -> None:
    optimizer = AdamW(parameter_groups(Tied(), OptimizerConfig(weight_decay=0.3)), lr=0.1)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    assert optimizer.param_groups[0]["param_names"] == ["linear.weight"]


def test_a_group_without_parameters_is_left_out() -> None:
    (group,) = parameter_groups(nn.Linear(3, 3, bias=False), OptimizerConfig())
    assert group["weight_decay"] == OptimizerConfig().weight_decay
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(nn.Linear(3, 3).requires_grad_(False), OptimizerConfig())
