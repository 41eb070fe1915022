"""Text as integers, cut into training and held-out parts, and n-gram models to measure a network against."""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["HELD_OUT", "Text", "read_text", "witten_bell_bits"]

HELD_OUT = 0.1  # the last share of a text, never trained on
_TOPICS = "pydoc_data.topics"

Symbols = NDArray[np.int64]


@dataclass(frozen=True)
class Text:
    """A text as indices into its alphabet."""

    name: str
    alphabet: str  # every character that occurs, sorted
    train: Symbols
    held_out: Symbols
    digest: str  # SHA-256 of the text, to know it again

    @classmethod
    def of(cls, name: str, characters: str) -> Text:
        """Split `characters` and number them by the sorted alphabet."""
        points = np.frombuffer(characters.encode("utf-32-le", "surrogatepass"), np.uint32)
        alphabet, symbols = np.unique(points, return_inverse=True)
        symbols = symbols.astype(np.int64)
        border = len(symbols) - int(len(symbols) * HELD_OUT)
        digest = hashlib.sha256(points.tobytes()).hexdigest()
        return cls(name, "".join(map(chr, alphabet)), symbols[:border], symbols[border:], digest)


def read_text(path: str | Path | None = None) -> Text:
    """The text of a UTF-8 file, or the help topics that every CPython carries (`pydoc_data.topics`, English).

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is not UTF-8, or the topics are missing from this Python.
    """
    if path is not None:
        try:
            return Text.of(str(path), Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected text in UTF-8: {error}") from error
    try:
        topics = importlib.import_module(_TOPICS).topics
    except ImportError as error:
        raise ValueError(f"this Python has no {_TOPICS}; name a text with --text FILE") from error
    return Text.of(_TOPICS, "".join(topics[key] for key in sorted(topics)))


def witten_bell_bits(train: Symbols, held_out: Symbols, order: int, alphabet_size: int) -> NDArray[np.float64]:
    """Bits that an interpolated n-gram model of `train` needs for each symbol of `held_out`.

    Witten and Bell 1991: after a context seen n times with t different successors, a symbol that followed c times has
    probability (c + t p) / (n + t), where p is that of the model with a context one shorter; the shortest is uniform.

    Parameters
    ----------
    train, held_out
        Integers in [0, alphabet_size).
    order
        Symbols in an n-gram, 1 or more.
    alphabet_size
        Number of different symbols; its power of `order` stays below 2**63.

    Returns
    -------
    bits : ndarray
        Shape of held_out.

    Examples
    --------
    >>> abab = np.array([0, 1] * 50)
    >>> [witten_bell_bits(abab, abab, order, 2)[:3].round(2).tolist() for order in (1, 2)]
    [[1.0, 1.0, 1.0], [1.0, 0.01, 0.01]]
    """
    probability = np.full(len(held_out), 1 / alphabet_size)
    for n in range(1, min(order, len(train), len(held_out)) + 1):
        grams, counts = np.unique(_grams(train, n, alphabet_size), return_counts=True)
        contexts, first, successors = np.unique(grams // alphabet_size, return_index=True, return_counts=True)
        seen = _grams(held_out, n, alphabet_size)
        c = _look_up(seen, grams, counts)
        n_context = _look_up(seen // alphabet_size, contexts, np.add.reduceat(counts, first))
        t = _look_up(seen // alphabet_size, contexts, successors)
        shorter = probability[n - 1 :]
        # An unseen context has n = t = 0 and leaves the shorter model as it is.
        probability[n - 1 :] = np.where(n_context > 0, (c + t * shorter) / np.maximum(n_context + t, 1), shorter)
    bits: NDArray[np.float64] = -np.log2(probability)
    return bits


def _grams(symbols: Symbols, n: int, alphabet_size: int) -> Symbols:
    """Every run of n symbols as one number, its last symbol the lowest digit."""
    code = np.zeros(len(symbols) - n + 1, np.int64)
    for offset in range(n):
        code = code * alphabet_size + symbols[offset : offset + len(code)]
    return code


def _look_up(keys: Symbols, table: Symbols, values: NDArray[np.int64]) -> NDArray[np.int64]:
    """values[i] where table[i] == key, 0 for a key that sorted `table` lacks."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)
