"""The baselines of a task with a head, compared with slow references."""

from __future__ import annotations

import random

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.svm import LinearSVC

from hfstrat.evaluation import simple_models


def examples(count: int, seed: int = 0) -> tuple[list[list[int]], torch.Tensor]:
    """Token ids of which one in each example tells its class of three, and the classes."""
    draw = random.Random(seed)
    labels = [draw.randrange(3) for _ in range(count)]
    rows = []
    for label in labels:
        row = [draw.randrange(10, 40) for _ in range(draw.randrange(3, 9))] + [label]
        draw.shuffle(row)
        rows.append(row)
    return rows, torch.tensor(labels)


def test_tf_idf_is_that_of_scikit_learn_on_texts() -> None:
    (train, labels), (test, wanted) = examples(90), examples(60, seed=1)
    found = simple_models.tf_idf(train, labels, test, 3).argmax(1)
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\S+", sublinear_tf=True)
    texts, tests = ([" ".join(map(str, row)) for row in rows] for rows in (train, test))
    reference = LinearSVC(random_state=0).fit(vectorizer.fit_transform(texts), labels.numpy())
    assert found.tolist() == reference.predict(vectorizer.transform(tests)).tolist()
    assert (found == wanted.numpy()).mean() > 0.9


def test_two_classes_and_a_class_without_training_examples() -> None:
    rows, labels = examples(90)
    two = labels.clamp(max=1) * 2  # classes 0 and 2 of three
    found = simple_models.tf_idf(rows, two, rows, 3)
    assert (found.argmax(1) == two.numpy()).mean() > 0.9
    assert (found[:, 1] == simple_models.NEVER).all()
    assert simple_models.tf_idf(rows, torch.ones(90, dtype=torch.long), rows, 3).argmax(1).tolist() == [1] * 90


def test_several_labels_of_which_one_is_on_all_examples_and_one_on_none() -> None:
    rows, labels = examples(90)
    marks = torch.stack([labels == 0, labels >= 0, labels < 0, labels != 1], dim=1).float()
    found = simple_models.tf_idf(rows, marks, rows, 4) > 0
    assert found[:, 1].all()
    assert not found[:, 2].any()
    assert (found == (marks.numpy() > 0)).mean() > 0.95


def test_numbers_are_predicted_in_standardized_units() -> None:
    rows, labels = examples(90)
    targets = torch.stack([labels.double(), -labels.double()], dim=1)
    targets = (targets - targets.mean(0)) / targets.std(0, correction=0)
    found = simple_models.tf_idf_of_numbers(rows, targets, rows)
    assert found.shape == (90, 2)
    assert np.corrcoef(found[:, 0], targets[:, 0])[0, 1] > 0.9


def test_the_constant_prediction_is_the_most_frequent() -> None:
    assert simple_models.constant(torch.tensor([2, 1, 2, 0]), 4).argmax() == 2
    marks = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert (simple_models.constant(marks, 2) > 0).tolist() == [True, False]
