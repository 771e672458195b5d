"""The gallery agrees with PyTorch on every target, ragged shape and schedule, without a report.

By default each target meets each shape, and each schedule meets each target and each shape (pairwise); the slow tests
run everything, under more random schedules.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import pytest
import torch

from gallery import adamw, attention, liger, matmul, reduction, softmax
from gallery.case import CUDA_TARGETS, SCHEDULES, TRITON_TARGETS, Case, Machine, Tensors

CASES = {case.name: case for case in (m.CASE for m in (softmax, matmul, attention, reduction, adamw, liger))}
PROGRAMS = [(name, "triton", TRITON_TARGETS) for name in CASES]
PROGRAMS += [(name, "cuda", CUDA_TARGETS) for name, case in CASES.items() if case.launch_cuda]

Schedules = Mapping[str, Machine]
MORE_SCHEDULES: Schedules = SCHEDULES | {
    f"random {seed}, {copies} copies": {"schedule": "random", "seed": seed, "async_copies": copies}
    for seed in range(3, 7)
    for copies in ("early", "late")
}

EVERYTHING = [
    (name, language, target, shape)
    for name, language, targets in PROGRAMS
    for target, shape in product(targets, CASES[name].shapes)
]
PAIRWISE = [
    (name, language, target, shape, list(SCHEDULES)[(i + j) % len(SCHEDULES)])
    for name, language, targets in PROGRAMS
    for (i, target), (j, shape) in product(enumerate(targets), enumerate(CASES[name].shapes))
]
# One target each, a different one from program to program; a shape with several CTAs where there is one.
REPEATED = [
    (name, language, targets[i % len(targets)], CASES[name].shapes[1])
    for i, (name, language, targets) in enumerate(PROGRAMS)
]


def outputs(case: Case, language: str, target: str, shape: tuple[int, ...], machine: Machine) -> Tensors:
    tensors = case.tensors(shape)
    case.run(language, target, tensors, machine)
    return tensors


def agree_under_all(schedules: Schedules, name: str, language: str, target: str, shape: tuple[int, ...]) -> None:
    case = CASES[name]
    results = {label: outputs(case, language, target, shape, machine) for label, machine in schedules.items()}
    first = next(iter(results.values()))
    for schedule, got in results.items():
        case.check(case.tensors(shape), got)
        for output in got.keys() - case.unordered:
            assert torch.equal(bits(got[output]), bits(first[output])), f"{output} has other bits under {schedule!r}"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("name", "language", "target", "shape", "schedule"), PAIRWISE)
def test_agrees_with_pytorch(name, language, target, shape, schedule):
    case = CASES[name]
    case.check(case.tensors(shape), outputs(case, language, target, shape, SCHEDULES[schedule]))


@pytest.mark.parametrize(("name", "language", "target", "shape"), REPEATED)
def test_the_bits_do_not_depend_on_the_schedule(name, language, target, shape):
    agree_under_all(SCHEDULES, name, language, target, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "language", "target", "shape"), EVERYTHING)
def test_everything_agrees_with_pytorch_and_with_itself(name, language, target, shape):
    agree_under_all(MORE_SCHEDULES, name, language, target, shape)


def test_the_pairs_are_covered():
    """The choice above, checked against what it promises."""
    for name, language, targets in PROGRAMS:
        chosen = [row[2:] for row in PAIRWISE if row[:2] == (name, language)]
        assert {(target, shape) for target, shape, _ in chosen} == set(product(targets, CASES[name].shapes))
        assert {(target, schedule) for target, _, schedule in chosen} == set(product(targets, SCHEDULES))
        assert {(shape, schedule) for _, shape, schedule in chosen} == set(product(CASES[name].shapes, SCHEDULES))
