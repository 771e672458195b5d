"""Scores against scikit-learn's, intervals against tables, the TF-IDF baseline against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline

from hotloop.engine.report.scores import best_threshold, decide, interval, negative_log_likelihood, score
from hotloop.engine.report.tfidf import GRID, fit_tfidf, majority

WORDS = [f"w{i}" for i in range(60)]


def reviews(n: int, n_classes: int = 2, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts whose class shifts the odds of some words."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, n_classes, n)
    odds = np.ones((n_classes, 60))
    for k in range(n_classes):
        odds[k, 5 * k : 5 * k + 5] = 4
    texts = [" ".join(draw.choice(WORDS, 8, p=odds[k] / odds[k].sum())) for k in labels]
    return texts, labels


def test_scores_equal_scikit_learn():
    draw = np.random.default_rng(0)
    labels, answers = draw.integers(0, 4, 300), draw.integers(0, 3, 300)
    names = ["a", "b", "c", "d", "never"]
    found = score(labels, answers, names)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found.micro_f1 == pytest.approx(found.accuracy)
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, answers, average="macro", zero_division=0))
    assert np.array_equal(found.confusion, metrics.confusion_matrix(labels, answers, labels=range(5)))
    p, r, f, n = metrics.precision_recall_fscore_support(labels, answers, labels=range(5), zero_division=0)
    assert [(c.precision, c.recall, c.f1, c.support) for c in found.classes] == [
        pytest.approx(row) for row in zip(p, r, f, n, strict=True)
    ]


def test_scores_of_sets_equal_scikit_learn():
    draw = np.random.default_rng(1)
    labels = (draw.random((200, 5)) < 0.3).astype(np.float32)
    probabilities = np.clip(0.5 * labels + 0.6 * draw.random((200, 5)), 0, 1)
    answers = decide(probabilities, True, 0.7)
    found = score(labels, answers, list("abcde"))
    assert found.confusion is None
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, answers))
    assert found.micro_f1 == pytest.approx(metrics.f1_score(labels, answers, average="micro"))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(labels, answers, average="macro"))
    assert negative_log_likelihood(labels, probabilities) == pytest.approx(
        np.mean([metrics.log_loss(labels[:, k], probabilities[:, k], labels=[0, 1]) for k in range(5)]), rel=1e-4
    )
    chosen = best_threshold(labels, probabilities)
    by_threshold = {
        t: score(labels, decide(probabilities, True, t), list("abcde")).micro_f1 for t in (chosen, 0.5, 0.9)
    }
    assert by_threshold[chosen] == max(by_threshold.values()) > by_threshold[0.5]


def test_the_loss_takes_the_classes_weights():
    labels, probabilities = np.array([0, 1, 1]), np.array([[0.5, 0.5], [0.75, 0.25], [0.1, 0.9]])
    nll = -np.log([0.5, 0.25, 0.9])
    assert negative_log_likelihood(labels, probabilities) == pytest.approx(nll.mean())
    weighted = negative_log_likelihood(labels, probabilities, np.array([2.0, 0.5]))
    assert weighted == pytest.approx((2 * nll[0] + 0.5 * nll[1] + 0.5 * nll[2]) / 3)


def test_intervals():
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    assert found.half_width == pytest.approx(2.776445 * np.sqrt(2.5) / np.sqrt(5), rel=1e-6)  # t of 4 degrees, table
    assert interval([0.5]).half_width is None
    assert str(interval([0.5, 0.5])) == "0.5000 ± 0.0000"


def test_tfidf_is_what_it_says():
    texts, labels = reviews(240)
    fitted = fit_tfidf(texts, labels, 2)
    grid = GridSearchCV(
        make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": list(GRID)}, cv=StratifiedKFold(5, shuffle=True, random_state=0), scoring="accuracy",
    ).fit(texts, labels)  # fmt: skip
    assert fitted.folds == 5
    assert [fitted.scores[C] for C in GRID] == pytest.approx(list(grid.cv_results_["mean_test_score"]), abs=1e-9)
    assert grid.best_params_["logisticregression__C"] == fitted.C
    new, truth = reviews(200, seed=9)
    assert np.allclose(fitted.probabilities(new), grid.predict_proba(new), atol=1e-6)
    assert (fitted.probabilities(new).argmax(1) == truth).mean() > 0.65 > (majority(labels, 200) == truth).mean()


def test_tfidf_of_sets_and_of_rare_classes():
    texts, labels = reviews(150, 3)
    sets = np.eye(3, dtype=np.float32)[labels]
    sets[:, 0] = np.maximum(sets[:, 0], sets[:, 1])
    fitted = fit_tfidf(texts, sets, 3, weights="balanced")
    new, truth = reviews(150, 3, seed=5)
    found = score(np.eye(3)[truth], decide(fitted.probabilities(new), True), list("abc"))
    assert fitted.probabilities(new).shape == (150, 3)
    assert found.micro_f1 > 0.5
    assert majority(sets, 2).tolist() == [[1, 0, 0]] * 2
    few = np.concatenate([np.flatnonzero(labels < 2), np.flatnonzero(labels == 2)[:3]])
    assert fit_tfidf([texts[i] for i in few], labels[few], 3).folds == 3
    alone = few[: len(few) - 2]
    single = fit_tfidf([texts[i] for i in alone], labels[alone], 3)
    assert (single.folds, single.C) == (0, 1.0)
