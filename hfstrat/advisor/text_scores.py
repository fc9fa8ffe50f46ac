"""How hard texts are for the simplest models: cross-validated TF-IDF for labels, a character n-gram model for prose. No torch.

Both take about a second, and are the features by which data sets are compared in `hfstrat.advisor.measured_runs`.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from functools import lru_cache

import numpy as np

ROWS = 600  # examples that TF-IDF is cross-validated on, as many as for the probe
FOLDS = 3
TRAINED, TESTED = 60_000, 6_000  # characters
ORDER = 5  # characters of context


@lru_cache(maxsize=8)
def tf_idf(texts: tuple[str, ...], labels: tuple[str, ...]) -> float | None:
    """Accuracy of a linear SVM on words and pairs of words, cross-validated on up to 600 examples; None: too few."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.svm import LinearSVC

    places = np.random.default_rng(0).permutation(len(texts))[:ROWS]
    words, wanted = [texts[place] for place in places], np.asarray([labels[place] for place in places])
    if len(words) < 4 * FOLDS or len(set(wanted)) < 2:
        return None
    folds, right = np.arange(len(words)) % FOLDS, 0
    for fold in range(FOLDS):
        train, test = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(set(wanted[train])) < 2:
            return None
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
        try:
            features = vectorizer.fit_transform([words[place] for place in train])
        except ValueError:  # texts without a word
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a limit of iterations
            model = LinearSVC(random_state=0).fit(features, wanted[train])
        right += int((model.predict(vectorizer.transform([words[place] for place in test])) == wanted[test]).sum())
    return right / len(words)


@lru_cache(maxsize=8)
def ngram_bits(texts: tuple[str, ...]) -> float | None:
    """Bits per byte of an n-gram model of characters (Witten-Bell smoothing) on texts that it has not seen; None: too few.

    It is fitted on 60,000 characters and measured on 6,000, so the number depends little on the amount of data.
    """
    order = np.random.default_rng(0).permutation(len(texts))
    test, place = "", 0
    while place < len(order) // 2 and len(test) < TESTED:
        test, place = test + texts[order[place]] + "\n", place + 1
    train = "\n".join(texts[each] for each in order[place:][:20_000])[:TRAINED]
    if len(train) < 2000 or len(test) < 200:
        return None
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for end in range(ORDER, len(train)):
        for length in range(ORDER + 1):
            counts[train[end - length : end]][train[end]] += 1
    totals = {context: (sum(found.values()), len(found)) for context, found in counts.items()}
    text, nats = test[: TESTED + ORDER], 0.0
    for end in range(ORDER, len(text)):
        probability = 1 / 256
        for length in range(ORDER + 1):
            context = text[end - length : end]
            if context not in totals:
                break
            total, kinds = totals[context]
            probability = (counts[context].get(text[end], 0) + kinds * probability) / (total + kinds)
        nats -= math.log(probability)
    return nats / math.log(2) / len(text[ORDER:].encode())
