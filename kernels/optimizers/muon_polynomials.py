"""The odd quintics a x + b x^3 + c x^5 that Newton-Schulz applies to the singular values, one after the other.

Keller Jordan's triple (3.4445, -4.775, 2.0315) is steep at zero and wanders: it leaves singular values between 0.68 and
1.13 for ever. `polar_express` makes a sequence that converges to 1, each polynomial the best for where its predecessors
have brought the values (Amsel, Persson, Musco and Gower, arXiv:2505.16932).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import TypeAlias

import torch

Triple: TypeAlias = tuple[float, float, float]
KELLER_JORDAN: Triple = (3.4445, -4.775, 2.0315)
# On [1 - 1e-4, 1] the best quintic is off by 1e-13 and its equations are singular to working precision: the limit is
# (15 x - 10 x^3 + 3 x^5) / 8, which touches 1 at 1 three times.
_NARROW = 1 - 1e-4
_LIMIT: Triple = (15 / 8, -10 / 8, 3 / 8)
_EXCHANGES = 50


def per_step(ns_coefficients: Sequence[float] | Sequence[Sequence[float]], ns_steps: int) -> list[Triple]:
    """The triple of each step: the one given for all, or the first `ns_steps` of a sequence, whose last one repeats.

    Raises ValueError on anything else.
    """
    triples = [ns_coefficients] if _is_number(next(iter(ns_coefficients), None)) else list(ns_coefficients)
    if not triples or not all(isinstance(t, Sequence) and len(t) == 3 and all(map(_is_number, t)) for t in triples):
        raise ValueError(
            f"ns_coefficients = {ns_coefficients}: expected a triple (a, b, c) of numbers, or a sequence of "
            "triples, one for each step, as `polar_express` makes it"
        )
    checked: list[Triple] = [(float(t[0]), float(t[1]), float(t[2])) for t in triples if isinstance(t, Sequence)]
    return (checked + list(repeat(checked[-1], max(0, ns_steps - len(checked)))))[:ns_steps]


def _is_number(x: object) -> bool:
    return isinstance(x, float | int) and math.isfinite(x)


def polar_express(
    steps: int = 5, *, lower: float = 1e-3, cushion: float = 0.024, safety: float = 1.01
) -> tuple[Triple, ...]:
    """Triples for `ns_coefficients` that bring singular values from [lower, 1] as close to 1 as `steps` quintics can.

    Greedy is optimal: with the values in [l, u], the next polynomial is the one of least max |1 - p(x)| there, which
    leaves them in [1 - E, 1 + E]. Two allowances for bf16, both the paper's:

        cushion: where l < cushion * u, the polynomial is the best on [cushion * u, u], and then scaled so that the
            image of [l, u] is centred on 1. The best on all of [l, u] swings down to nearly 0 inside it, where rounding
            would make singular values negative.
        safety: p(x / safety) is applied for p(x), for values that rounding has pushed past u.
    """
    if steps < 1 or not 0 < lower < 1 or not 0 <= cushion < 1 or not safety >= 1:
        raise ValueError(
            f"steps = {steps}, lower = {lower}, cushion = {cushion}, safety = {safety}: expected at least 1, "
            "between 0 and 1, at least 0 and below 1, at least 1"
        )
    low, high = lower, 1.0
    triples = []
    for _ in range(steps):
        triple, error = best_quintic(max(low, cushion * high), high)
        bottom, top = min(evaluate(triple, low), 1 - error), 1 + error
        centre = (bottom + top) / 2
        a, b, c = (x / centre for x in triple)
        low, high = bottom / centre, top / centre
        triples.append((a / safety, b / safety**3, c / safety**5))
    return tuple(triples)


def evaluate(triple: Triple, x: float) -> float:
    """a x + b x^3 + c x^5."""
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def best_quintic(low: float, high: float) -> tuple[Triple, float]:
    """The odd quintic of least E = max |1 - p(x)| on [low, high], and E; 0 < low <= high.

    By Chebyshev it is the one whose error takes the values +E, -E, +E, -E at four points low < q < r < high, of which
    q and r are roots of p'. Remez' exchange: solve for (a, b, c, E) at four points, move q and r to the roots, repeat.
    """
    ratio = low / high
    if ratio > _NARROW:
        a, b, c = _LIMIT
        return (a / high, b / high**3, c / high**5), (1 - ratio) ** 3 / 8
    q, r = (3 * ratio + 1) / 4, (ratio + 3) / 4
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    for _ in range(_EXCHANGES):
        x = torch.tensor([ratio, q, r, 1.0], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, signs], dim=1)
        a, b, c, error = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)
        moved = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        if max(abs(moved[0] - q), abs(moved[1] - r)) < 1e-13:
            break
        q, r = moved
    return (a / high, b / high**3, c / high**5), error
