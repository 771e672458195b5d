"""The quintics of Newton-Schulz: optimal, the paper's, and what they do to singular values."""

import itertools
import math

import pytest
import torch

from hotloop.kernels.optimizers.muon_polynomials import (
    KELLER_JORDAN,
    Triple,
    best_quintic,
    evaluate,
    per_step,
    polar_express,
)

# The first, the middle and the last triple of Algorithm 1 in arXiv:2505.16932, before its safety factor.
PUBLISHED = {
    0: (8.28721201814563, -23.595886519098837, 17.300387312530933),
    1: (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    3: (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    5: (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    7: (1.875, -1.25, 0.375),
}
PUBLISHED_CUSHION = 0.02407327424182761


def image(triples: list[Triple] | tuple[Triple, ...], x: torch.Tensor) -> torch.Tensor:
    for a, b, c in triples:
        x = x * (a + x**2 * (b + x**2 * c))
    return x


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (0.024, 1.0), (0.2, 1.3), (0.9, 1.1), (0.999, 1.001)])
def test_best_quintic_is_optimal(low: float, high: float) -> None:
    """Chebyshev: an error with four extremes of equal size and alternating sign cannot be improved by three
    coefficients. E = 1e-13 at the narrowest: compared on the scale of a rounding of 1."""
    (a, b, c), error = best_quintic(low, high)
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    found = 1 - image([(a, b, c)], x)
    assert found.abs().max().item() == pytest.approx(error, rel=1e-6, abs=2e-15)
    extremes = found[found.abs() > error * (1 - 1e-6) - 2e-15].sign()
    if error > 1e-12:
        assert [sign for sign, _ in itertools.groupby(extremes.tolist())] == [1, -1, 1, -1]
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        moved = torch.tensor([a, b, c], dtype=torch.float64) * (1 + 1e-3 * torch.randn(3, generator=draw))
        assert (1 - image([tuple(moved.tolist())], x)).abs().max().item() > error


def test_with_the_papers_constants_it_is_the_papers_list() -> None:
    """It was found by another program to some 1e-14; the last by its limit."""
    made = polar_express(8, cushion=PUBLISHED_CUSHION, safety=1.0)
    for i, triple in PUBLISHED.items():
        assert made[i] == pytest.approx(triple, rel=1e-12 if i < 6 else 1e-8), f"step {i}"


def test_singular_values_converge() -> None:
    x = torch.logspace(-3, 0, 100_001, dtype=torch.float64)
    errors = [(1 - image(polar_express(steps, safety=1.0), x)).abs().max().item() for steps in range(1, 10)]
    assert errors[8] < 1e-9
    assert all(later < sooner for sooner, later in itertools.pairwise(errors[:8]))
    # Each step at the end is of third order, as the limit polynomial is.
    assert errors[6] < errors[5] ** 2.5
    # The default allows for rounding: values 1 % past the interval stay near 1, and values below it grow.
    with_safety = image(polar_express(5), torch.logspace(-3, math.log10(1.01), 10_001, dtype=torch.float64))
    assert 0.84 < with_safety.min().item() < with_safety.max().item() < 1.13
    assert evaluate(polar_express(1)[0], 1e-5) > 7 * 1e-5


def test_keller_jordans_triple_does_not_converge() -> None:
    """What the docstring says of it: between 0.68 and 1.13 at any number of steps."""
    x = torch.logspace(-2, 0, 10_001, dtype=torch.float64)
    for steps in (5, 9, 30):
        end = image([KELLER_JORDAN] * steps, x)
        assert 0.67 < end.min().item() < 0.72
        assert 1.12 < end.max().item() < 1.21


def test_triples_of_steps() -> None:
    assert per_step(KELLER_JORDAN, 3) == [KELLER_JORDAN] * 3
    assert per_step(list(KELLER_JORDAN), 1) == [KELLER_JORDAN]
    triples = polar_express(3)
    assert per_step(triples, 5) == [*triples, triples[-1], triples[-1]]
    assert per_step(triples, 2) == list(triples[:2])
    assert per_step([list(t) for t in triples], 0) == []


@pytest.mark.parametrize("given", [(), (1.0, 2.0), (1.0, 2.0, 3.0, 4.0), [(1.0, 2.0)], [KELLER_JORDAN, 1.0],
                                   (1.0, math.nan, 2.0), ("a", "b", "c")])  # fmt: skip
def test_what_is_no_triple_is_refused(given: object) -> None:
    with pytest.raises(ValueError, match="expected a triple"):
        per_step(given, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lower": 0.0}, {"lower": 1.0}, {"cushion": 1.0}, {"safety": 0.9}])
def test_bad_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected at least 1"):
        polar_express(**wrong)  # type: ignore[arg-type]
