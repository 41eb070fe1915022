"""Sequences of strings as integers: characters by themselves, words by their spelling too."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import describe
from ..data import Vocabulary
from .sequences import Sequences

Array = NDArray[Any]

ENDINGS = (1, 2, 3)  # letters of a word's end that have a vector of their own
UNKNOWN = ("unknown",)


def are_strings(X: Any) -> bool:
    """Whether the first sequence is a string, or begins with one."""
    listed = isinstance(X, Sequence) or (getattr(X, "ndim", 0) > 0 and not hasattr(X, "columns"))
    first = next(iter(X), None) if listed else None
    if isinstance(first, Sequence | np.ndarray) and len(first):
        return isinstance(first, str) or isinstance(first[0], str)
    return isinstance(first, str)


class Symbols:
    """The strings of sequences as rows of integers, each of which has a vector.

    Where all strings are characters, one integer. Of words, the word without its case, its last letters, and the kind
    of its characters, so that a word that training has not seen says something too.
    """

    def __init__(self, X: Any, min_count: int) -> None:
        sequences = _strings(X)
        self._words = any(len(string) > 1 for string in set(chain.from_iterable(sequences)))
        parts = (self._parts(string) for sequence in sequences for string in sequence)
        self._vocabulary = Vocabulary.count(parts, least=min_count, unknown=UNKNOWN)

    def __len__(self) -> int:
        return len(self._vocabulary)

    def encode(self, X: Any) -> Sequences:
        """Sequences whose steps are integers (S, F)."""
        sequences = _strings(X)
        rows = {string: self._vocabulary.encode(self._parts(string)) for string in set(chain.from_iterable(sequences))}
        steps = np.array([rows[string] for sequence in sequences for string in sequence])
        return Sequences(steps, np.array([len(sequence) for sequence in sequences]))

    def _parts(self, string: str) -> list[tuple[object, ...]]:
        if not self._words:
            return [(string,)]
        word = string.lower()
        return [(0, word), *((size, word[-size:]) for size in ENDINGS), ("kinds", _kinds(string))]


def _strings(X: Iterable[Any]) -> list[Sequence[str]]:
    """The sequences of X, each of at least one string and nothing else."""
    sequences: list[Sequence[str]] = []
    for index, one in enumerate(X):
        if not isinstance(one, str):
            if not isinstance(one, Sequence | np.ndarray):
                raise TypeError(f"X[{index}]: expected a sequence of strings, as X[0] is, got {describe(one)}")
            wrong = next((step for step, string in enumerate(one) if not isinstance(string, str)), None)
            if wrong is not None:
                raise TypeError(f"X[{index}][{wrong}]: expected a string, as X[0][0] is, got {describe(one[wrong])}")
        if len(one) == 0:
            raise ValueError(f"X[{index}]: expected at least one step, got an empty sequence")
        sequences.append(one)
    return sequences


def _kinds(string: str) -> str:
    """What kinds of characters follow one another: "Xx" of "Word", "d.d" of "12.5"."""
    kinds = ("d" if c.isdigit() else "X" if c.isupper() else "x" if c.isalpha() else c for c in string)
    return "".join(kind for kind, _ in groupby(kinds))
