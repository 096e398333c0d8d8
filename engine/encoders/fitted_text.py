"""Text by an encoder fitted on the catalogue: TF-IDF and a truncated SVD (latent semantic analysis).

Fitting needs scikit-learn; a fitted encoder is a vocabulary and two arrays, and encodes without it.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from speeder_engine.encoders.base import Input, fingerprint_of, read_weights, write_manifest, write_weights
from speeder_engine.encoders.features import Features, Floats
from speeder_engine.encoders.text import usable_texts
from speeder_engine.errors import DataError, MissingDependency
from speeder_engine.progress import progress_bar

KIND = "fitted-text"
WORD = r"(?u)\b\w\w+\b"
MAX_WORDS = 20_000
LARGE = 200  # texts, from which on rare and ubiquitous words are dropped


class FittedTextEncoder:
    """`words` are the vocabulary in column order, `idf` float32 [w], `components` float32 [dim, w]."""

    modality = "text"

    def __init__(self, words: Sequence[str], idf: Floats, components: Floats) -> None:
        if components.ndim != 2 or components.shape[1] != len(words) or idf.shape != (len(words),):
            raise DataError(f"fitted text encoder: {len(words)} words, but idf {idf.shape}, SVD {components.shape}")
        self.words = list(words)
        self.idf = idf
        self.components = components
        self.column = {word: column for column, word in enumerate(self.words)}

    @classmethod
    def fit(cls, texts: Sequence[str | None], dim: int = 256, seed: int = 0) -> "FittedTextEncoder":
        """Learns words and directions from `texts`; `dim` shrinks to what so few texts and words can span."""
        try:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise MissingDependency("scikit-learn", "train", "fitting a text encoder") from None
        usable, _ = usable_texts(texts)
        large = len(usable) >= LARGE
        vectorizer = TfidfVectorizer(
            token_pattern=WORD,
            sublinear_tf=True,
            max_features=MAX_WORDS,
            min_df=2 if large else 1,
            max_df=0.5 if large else 1.0,
        )
        with progress_bar() as progress:
            progress.add_task("text: TF-IDF + truncated SVD", total=None, note=f"{len(usable)} texts")
            try:
                weights = vectorizer.fit_transform(usable)
            except ValueError as error:
                raise DataError(f"fitted text encoder: no word to learn from in {len(texts)} texts") from error
            svd = TruncatedSVD(min(dim, *weights.shape), random_state=seed).fit(weights)
        words = vectorizer.get_feature_names_out().tolist()
        return cls(words, vectorizer.idf_.astype(np.float32), svd.components_.astype(np.float32))

    @property
    def dim(self) -> int:
        return len(self.components)

    @property
    def name(self) -> str:
        return f"text encoder fitted on the catalogue ({self.dim}-d, TF-IDF of {len(self.words)} words + truncated SVD)"

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(KIND, self.words, self._tensors())

    def encode(self, inputs: Sequence[Input], names: Sequence[str] | None = None) -> Features:
        """Unit vectors; a text without a known word says nothing and is not present, as an empty one."""
        texts, present = usable_texts(inputs)
        values = np.zeros((len(inputs), self.dim), np.float32)
        for row, text in zip(np.flatnonzero(present), texts, strict=True):
            values[row] = self._encode_one(text)
        norms = np.linalg.norm(values, axis=1)
        present = norms > 1e-6
        return Features.of_present(values[present] / norms[present, None], present)

    def _encode_one(self, text: str) -> Floats:
        """(1 + ln tf) idf, as a unit vector, projected; the unit length only guards against denormal numbers."""
        counts = Counter(word for word in re.findall(WORD, text.lower()) if word in self.column)
        columns = np.array([self.column[word] for word in counts], dtype=np.int64)
        weights = (1 + np.log(np.array(list(counts.values()), dtype=np.float32))) * self.idf[columns]
        projected: Floats = self.components[:, columns] @ (weights / max(float(np.linalg.norm(weights)), 1e-12))
        return projected

    def save(self, folder: Path) -> None:
        write_weights(folder, self._tensors())
        write_manifest(folder, KIND, {"words": self.words})

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> "FittedTextEncoder":
        tensors = read_weights(folder)
        return cls(settings["words"], tensors["idf"].numpy(), tensors["components"].numpy())

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {"idf": torch.from_numpy(self.idf), "components": torch.from_numpy(self.components)}
