"""What predicts a prompt's score without looking into the model: its length, its labels, its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from emprobe.studies.priors.features import Block, Matrix, fixed
from emprobe.studies.priors.folds import Rows

MOST_WORDS = 300


def length(tokens: Sequence[int]) -> Block:
    """Tokens of each prompt, and their logarithm."""
    counts = np.asarray(tokens, dtype=np.float64)
    return fixed(np.column_stack([counts, np.log1p(counts)]))


def one_hot(columns: Sequence[Sequence[Any]]) -> Block:
    """A column of 0 and 1 for every value of every label.

    >>> one_hot([["a", "b", "a"]])(np.arange(3)).tolist()
    [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    """
    parts = []
    for column in columns:
        names = [str(value) for value in column]
        parts.append(np.array([[name == value for value in dict.fromkeys(names)] for name in names], dtype=np.float64))
    return fixed(np.hstack(parts))


@dataclass(frozen=True)
class Words:
    """TF-IDF of the most frequent words; vocabulary and frequencies are those of training prompts."""

    texts: tuple[str, ...]

    def __call__(self, train: Rows) -> Matrix:
        """Features of all rows; none where training prompts have no words."""
        vectors = TfidfVectorizer(sublinear_tf=True, max_features=MOST_WORDS, token_pattern=r"(?u)\b\w+\b")
        try:
            vectors.fit([self.texts[row] for row in train])
        except ValueError:  # an empty vocabulary
            return np.zeros((len(self.texts), 0))
        return np.asarray(vectors.transform(self.texts).toarray(), dtype=np.float64)
