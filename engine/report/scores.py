"""How well labels were told: accuracy, F1, the confusion matrix; and the mean of several runs with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

THRESHOLDS = np.linspace(0.02, 0.98, 97)


@dataclass(frozen=True)
class ClassScore:
    name: str
    precision: float
    """Share of the texts given this label that have it; 0 where none was given it."""
    recall: float
    """Share of the texts that have it that were given it; 0 where none has it."""
    f1: float
    support: int
    """Texts that have it."""


@dataclass(frozen=True)
class Scores:
    examples: int
    accuracy: float
    """Share of texts whose label, or whole set of labels, is right."""
    macro_f1: float
    """Mean F1 of the classes that occur among the labels or the answers."""
    micro_f1: float
    """F1 of all (text, label) pairs; of a single-label task it is the accuracy."""
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...] | None
    """Row: the label, column: the answer; None for a multi-label task."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def decide(probabilities: np.ndarray, multi_label: bool, threshold: float = 0.5) -> np.ndarray:
    """(n, K) -> the most probable class (n,), or 0 and 1 for each label (n, K)."""
    return (probabilities >= threshold).astype(np.int64) if multi_label else probabilities.argmax(1)


def score(labels: np.ndarray, answers: np.ndarray, classes: Sequence[str]) -> Scores:
    """labels and answers (n,) classes, or (n, K) of 0 and 1."""
    K = len(classes)
    confusion = None
    if labels.ndim == 1:
        table = np.bincount(labels * K + answers, minlength=K * K).reshape(K, K)
        confusion = tuple(tuple(int(n) for n in row) for row in table)
        hits, given, having = np.diag(table), table.sum(0), table.sum(1)
        accuracy = float((labels == answers).mean())
    else:
        has, gives = labels > 0.5, answers > 0.5
        hits, given, having = (has & gives).sum(0), gives.sum(0), has.sum(0)
        accuracy = float((has == gives).all(1).mean())
    f1 = 2 * hits / np.maximum(given + having, 1)
    occurs = given + having > 0
    return Scores(
        examples=len(labels),
        accuracy=accuracy,
        macro_f1=float(f1[occurs].mean()) if occurs.any() else 0.0,
        micro_f1=float(2 * hits.sum() / max(int(given.sum() + having.sum()), 1)),
        classes=tuple(
            ClassScore(name, float(hit / max(g, 1)), float(hit / max(h, 1)), float(f), int(h))
            for name, hit, g, h, f in zip(classes, hits, given, having, f1, strict=True)
        ),
        confusion=confusion,
    )


def negative_log_likelihood(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean nats a text, by the classes' weights; of a multi-label task the mean over its labels, unweighted."""
    p = np.clip(probabilities.astype(np.float64), 1e-12, 1.0)
    if labels.ndim == 2:
        q = np.clip(1 - probabilities.astype(np.float64), 1e-12, 1.0)
        return float(-np.where(labels > 0.5, np.log(p), np.log(q)).mean())
    weight = np.ones(len(labels)) if weights is None else weights[labels]
    return float(-(weight * np.log(p[np.arange(len(labels)), labels])).sum() / max(weight.sum(), 1e-12))


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The probability from which to give a label, of the highest micro-F1; ties take the one nearest to 0.5."""
    has = labels > 0.5

    def micro_f1(threshold: float) -> float:
        gives = probabilities >= threshold
        return 2 * float((has & gives).sum()) / max(float(gives.sum() + has.sum()), 1.0)

    return float(max(THRESHOLDS, key=lambda t: (micro_f1(t), -abs(t - 0.5))))


@dataclass(frozen=True)
class Interval:
    mean: float
    half_width: float | None
    """Of the 95 % t-interval of the mean; None for a single value."""
    values: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.mean:.4f}" if self.half_width is None else f"{self.mean:.4f} ± {self.half_width:.4f}"


def interval(values: Sequence[float]) -> Interval:
    from scipy.stats import t

    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return Interval(mean, None, tuple(values))
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n), tuple(values))
