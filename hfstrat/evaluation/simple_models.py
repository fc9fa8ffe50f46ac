"""What a head has to beat: a constant prediction, and a linear model of TF-IDF, on the evaluation examples of a run.

TF-IDF is of single tokens and pairs of tokens of the run's own tokenizer, which needs no rules for any language. A linear SVM
with its default `C` follows: with SmolLM2's tokenizer it reaches 0.894 on banking77, 0.910 on trec6 and 0.824 on sst2 (words
and logistic regression: 0.894, 0.886, 0.813), and takes a second where logistic regression takes thirty.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from hfstrat.evaluation.intervals import Measurement

MOST_ROWS = 20_000  # training examples; more would resolve differences too small to matter
NEVER = -1e4  # the output for a label that no training example has


class SimpleModel(NamedTuple):
    """A baseline: its name, how many training examples it was fitted on, its metrics, and the seconds that it took."""

    name: str
    rows: int
    found: Measurement
    seconds: float
    columns: dict[str, np.ndarray]  # of `Metrics.columns`


def constant(labels: torch.Tensor, classes: int) -> np.ndarray:
    """The outputs `[K]` that are best without looking at the text.

    Args:
        labels: as in a batch: classes `[n]`, marks of 0 and 1 `[n, K]`, or standardized numbers `[n, K]`, whose mean is 0.
    """
    found = labels.double().mean(0) - 0.5 if labels.dim() == 2 else labels.bincount(minlength=classes)
    return np.asarray(found, dtype=np.float64)


def tf_idf(train: Sequence[Sequence[int]], labels: torch.Tensor, test: Sequence[Sequence[int]], classes: int) -> np.ndarray:
    """Outputs `[len(test), K]` of a linear model on TF-IDF; positive for yes, or the largest for the predicted class.

    Args:
        train: token ids of the training examples.
        labels: of these, as in a batch: classes `[n]`, or marks of 0 and 1 `[n, K]`.
        test: token ids of the examples to predict.
        classes: K.
    """
    features, wanted = _vectors(train, test)
    return _svm(features, labels.numpy(), wanted, classes)


def tf_idf_of_numbers(train: Sequence[Sequence[int]], targets: torch.Tensor, test: Sequence[Sequence[int]]) -> np.ndarray:
    """The same by ridge regression, for standardized numbers `[n, K]`."""
    from sklearn.linear_model import Ridge

    features, wanted = _vectors(train, test)
    predicted: np.ndarray = Ridge(solver="lsqr").fit(features, targets.numpy()).predict(wanted)
    return predicted.reshape(len(test), -1)


def _vectors(train: Sequence[Sequence[int]], test: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    """TF-IDF of both, with the terms and weights of `train`; sparse `[n, terms]`."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=_terms, sublinear_tf=True)
    return vectorizer.fit_transform(train), vectorizer.transform(test)


def _terms(ids: Sequence[int]) -> list[str]:
    return [*map(str, ids), *(f"{one} {other}" for one, other in pairwise(ids))]


def _svm(features: Any, labels: np.ndarray, wanted: Any, classes: int) -> np.ndarray:
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.svm import LinearSVC

    found = np.full((wanted.shape[0], classes), NEVER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of labels that all examples have, or none, and of a limit of iterations
        if labels.ndim == 2:
            varied = np.flatnonzero((labels.min(0) == 0) & (labels.max(0) == 1))
            found[:, labels.min(0) == 1] = -NEVER
            if len(varied):
                model = OneVsRestClassifier(LinearSVC(random_state=0)).fit(features, labels[:, varied].astype(int))
                found[:, varied] = model.decision_function(wanted).reshape(len(found), -1)
            return found
        seen = np.unique(labels)
        if len(seen) == 1:
            found[:, seen[0]] = 0.0
            return found
        decided = LinearSVC(random_state=0).fit(features, labels).decision_function(wanted)
        found[:, seen] = decided if decided.ndim == 2 else np.stack([-decided, decided], axis=1)
    return found
