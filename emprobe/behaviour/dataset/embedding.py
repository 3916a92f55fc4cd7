"""Texts as unit vectors whose cosine says how near they are: sentence encoders, or n-grams of characters where none is at hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from scipy import sparse

from emprobe.behaviour.dataset.near import Rows
from emprobe.errors import EmprobeError, MissingExtraError

TFIDF = "tfidf"


@dataclass(frozen=True)
class Embedder:
    """What makes vectors of texts, and what it is in words.

    A cosine of .9 says another thing for each embedder: thresholds of one do not hold for another.
    """

    name: str
    encode: Callable[[Sequence[str]], Rows]

    def __call__(self, texts: Sequence[str]) -> Rows:
        """Unit rows `[n, d]`, dense or sparse; a text without anything to go by is a row of zeros.

        Raises:
            EmprobeError: If there are no texts, or a vector is not finite.
        """
        if not texts:
            raise EmprobeError("Vectors of no texts were asked for. Give at least one.")
        rows = self.encode(texts)
        if sparse.issparse(rows):
            return rows
        rows = np.asarray(rows, dtype=np.float32)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        broken = np.flatnonzero(~np.isfinite(norms[:, 0]))
        if len(broken):
            raise EmprobeError(f"{self.name} made vectors that are no numbers for {len(broken)} of {len(texts)} texts. Take another one.")
        return rows / np.maximum(norms, np.finfo(np.float32).tiny)


def embedder(name: str) -> Embedder:
    """`tfidf`, or a sentence-transformers model by its directory or hub id.

    TF-IDF counts runs of three to five characters within words, weighted by how rare they are among the texts given: it finds rows of
    almost the same wording, and no paraphrases. The weights depend on the texts, so that among fewer of them the same two rows have
    another cosine.

    Raises:
        MissingExtraError: If a model is named and `sentence-transformers` is not installed.
        EmprobeError: If the model cannot be loaded.

    Example:
        >>> rows = embedder("tfidf")(["water the rose", "water the rose!", "pump both tyres"])
        >>> near = (rows @ rows.T).toarray().astype(float).round(1)
        >>> near[0].tolist()
        [1.0, 0.8, 0.0]
    """
    return _tfidf() if name == TFIDF else _sentence_encoder(name)


def _tfidf() -> Embedder:
    def encode(texts: Sequence[str]) -> Rows:
        from sklearn.feature_extraction.text import TfidfVectorizer

        vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True, dtype=np.float32)
        try:
            return vectorizer.fit_transform(texts).tocsr()
        except ValueError as error:
            raise EmprobeError(f"TF-IDF found nothing to count in {len(texts)} texts: {error}.") from error

    return Embedder("TF-IDF of runs of 3 to 5 characters within words", encode)


def _sentence_encoder(name: str) -> Embedder:
    try:
        library: Any = import_module("sentence_transformers")
    except ImportError as error:
        raise MissingExtraError("sentence-transformers", "embeddings", f"Embedding texts with {name!r}") from error
    try:
        model = library.SentenceTransformer(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).rstrip(".")
        raise EmprobeError(
            f"{name!r} could not be loaded as a sentence-transformers model: {why}. Give its directory or hub id, or take {TFIDF!r}."
        ) from error

    def encode(texts: Sequence[str]) -> Rows:
        return model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False)

    return Embedder(f"{name} (sentence-transformers {library.__version__})", encode)
