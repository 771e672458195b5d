"""What counting words reaches on the same split: the majority class, and logistic regression on TF-IDF.

The features are those of `TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)`: words and pairs of words, lower
case, weighted (1 + ln tf) * idf, rows of length 1. The strength C of the regression is the best of `GRID` in a
stratified cross-validation; ties take the smaller C. Labels of a multi-label task have a regression each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

GRID = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FOLDS = 5
ITERATIONS = 2000


@dataclass(frozen=True)
class TfidfBaseline:
    """A fitted baseline."""

    vectorizer: Any
    classifier: Any
    n_labels: int
    multi_label: bool
    C: float
    folds: int
    """Of the cross-validation; fewer than 5 where a class has fewer examples, 0 where C could not be chosen (1.0)."""
    scores: dict[float, float]
    """C -> mean accuracy (multi-label: micro-F1) over the folds."""

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, K)"""
        return _probabilities(self.classifier, self.vectorizer.transform(texts), self.n_labels, self.multi_label)


def majority(labels: np.ndarray, n: int) -> np.ndarray:
    """The commonest class of `labels` (n,) for each of n texts; multi-label (n, K): those of more than half."""
    if labels.ndim == 2:
        return np.tile((labels.mean(0) > 0.5).astype(np.int64), (n, 1))
    return np.full(n, np.bincount(labels).argmax())


def fit_tfidf(
    texts: Sequence[str],
    labels: np.ndarray,  # (n,) int64 or (n, K) of 0 and 1
    n_labels: int,
    *,
    weights: Sequence[float] | Literal["none", "balanced"] = "none",
    seed: int = 0,
) -> TfidfBaseline:
    """Fit on all of `texts`, C chosen by cross-validation on them. `weights` are those of the model's classes."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # on rows this sparse the threads of BLAS cost more than they give: 0.03 s against 1.4
        return _fit_tfidf(texts, labels, n_labels, weights, seed)


def _fit_tfidf(
    texts: Sequence[str], labels: np.ndarray, n_labels: int, weights: Sequence[float] | str, seed: int
) -> TfidfBaseline:
    multi_label = labels.ndim == 2
    class_weight = _class_weight(weights, multi_label)
    folds = _folds(labels, seed)
    scores = dict.fromkeys(GRID, 0.0)
    for fit, held in folds:
        vectorizer = _vectorizer()
        x = vectorizer.fit_transform([texts[i] for i in fit])
        x_held = vectorizer.transform([texts[i] for i in held])
        for C in GRID:
            classifier = _classifier(C, class_weight, multi_label).fit(x, labels[fit])
            found = _probabilities(classifier, x_held, n_labels, multi_label)
            scores[C] += _score(found, labels[held]) / len(folds)
    C = max(GRID, key=lambda C: (scores[C], -C)) if folds else 1.0
    vectorizer = _vectorizer()
    x = vectorizer.fit_transform(texts)
    classifier = _classifier(C, class_weight, multi_label).fit(x, labels)
    return TfidfBaseline(vectorizer, classifier, n_labels, multi_label, C, len(folds), scores if folds else {})


def _vectorizer() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # sklearn takes a second to import

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)


def _classifier(C: float, class_weight: Any, multi_label: bool) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    regression = LogisticRegression(C=C, class_weight=class_weight, max_iter=ITERATIONS)
    return OneVsRestClassifier(regression) if multi_label else regression


def _class_weight(weights: Sequence[float] | str, multi_label: bool) -> Any:
    if weights == "none":
        return None
    if isinstance(weights, str) or multi_label:  # a regression for each label has two classes: balance is what fits
        return "balanced"
    return {number: float(weight) for number, weight in enumerate(weights)}


def _probabilities(classifier: Any, x: Any, n_labels: int, multi_label: bool) -> np.ndarray:
    found = classifier.predict_proba(x)
    if multi_label and n_labels == 1:
        return found[:, -1:]
    full = np.zeros((x.shape[0], n_labels))
    full[:, np.asarray(classifier.classes_)] = found  # a class may be missing in a fold
    return full


def _folds(labels: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import KFold, StratifiedKFold

    smallest = len(labels) if labels.ndim == 2 else int(np.bincount(labels)[np.unique(labels)].min())
    n = min(FOLDS, smallest)
    if n < 2:
        return []
    kind = KFold if labels.ndim == 2 else StratifiedKFold
    return list(kind(n, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels))


def _score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    if labels.ndim == 1:
        return float((probabilities.argmax(1) == labels).mean())
    given = probabilities >= 0.5
    hits = float((given & (labels == 1)).sum())
    return 2 * hits / max(float(given.sum() + (labels == 1).sum()), 1.0)
