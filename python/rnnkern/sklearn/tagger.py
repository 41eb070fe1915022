"""`RNNTagger`: a label for each step of each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arguments import describe, integer
from ..pieces import Embedding
from .labels import LabelEstimator
from .sequences import Sequences
from .symbols import Symbols, are_strings
from .targets import log_softmax, weights_of

Array = NDArray[Any]

VECTOR_DEVIATION = 0.3  # of the elements of new vectors, of which a step of words adds up five


class RNNTagger(LabelEstimator):
    """A recurrent network that gives each step of a sequence a label.

    The network reads a sequence from both ends; a linear layer maps what it has at each step to a logit for each
    label. It is trained with softmax cross-entropy, each step counting the same, Adam and backpropagation through time
    over whole sequences.

    X is as for `RNNClassifier`, or a list of sequences of strings: words, `["the", "cat", ...]`, or characters, for
    which a string will do. Each has a learned vector. A word's is the sum of those of the word without its case, of its
    last letters and of the kinds of its characters, so that a word that training has not seen says something too. y is
    a list of sequences of labels, one for each step.

    Parameters
    ----------
    hidden_size
        H, the units of each layer and direction.
    cell
        Name of a cell of `rnnkern.Recurrent`, such as "gru", "lstm" or "rnn_tanh".
    num_layers
        Recurrent layers, one above the other.
    bidirectional
        Whether each layer also reads from the last step to the first. Without it a label depends on the steps up to
        its own alone, and `layer_.freeze().stream()` gives labels as steps come.
    embedding_size
        E, the elements of the vectors of strings.
    min_count
        How often a string or a part of it must come in training to have a vector; the others share one.
    dropout, standardize, learning_rate, batch_size, max_iter, max_norm, early_stopping, validation_fraction, \
n_iter_no_change, tol, warm_start, random_state, verbose, dtype, backend
        As for `RNNClassifier`; the score of `early_stopping` is the accuracy over all steps of the sequences held out.
    class_weight
        By which the weights of the steps of a label are multiplied: a dict from labels, 1 for those it lacks;
        "balanced", inversely as often as the label occurs; None, 1 for all.

    Attributes
    ----------
    classes_
        The labels, sorted.
    embedding_
        The vectors of strings, a trained `rnnkern.Embedding`; None where X has numbers.
    layer_, output_, input_mean_, input_scale_, loss_curve_, validation_scores_, n_iter_, n_features_in_, \
feature_names_in_
        As for `RNNClassifier`; those of features where X has numbers.

    Examples
    --------
    >>> from rnnkern.sklearn import RNNTagger
    >>> X = ["a1b22", "3c", "45de", "f", "6g7", "hh8", "9i0", "7", "k5"] * 10
    >>> y = [["digit" if c.isdigit() else "letter" for c in x] for x in X]
    >>> tagger = RNNTagger(8, random_state=0).fit(X, y)
    >>> tagger.predict(["b4"])[0].tolist(), tagger.predict_proba(["b4"])[0].shape
    (['letter', 'digit'], (2, 2))
    """

    _poolings = ("steps",)

    def __init__(
        self,
        hidden_size: int = 64,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        bidirectional: bool = True,
        embedding_size: int = 64,
        min_count: int = 2,
        dropout: float = 0.0,
        standardize: bool = True,
        learning_rate: float = 0.005,
        batch_size: int = 32,
        max_iter: int = 100,
        max_norm: float = 1.0,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 5,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
        dtype: Any = "float32",
        backend: str = "auto",
        class_weight: Any = None,
    ) -> None:
        super().__init__(
            hidden_size,
            cell=cell,
            num_layers=num_layers,
            bidirectional=bidirectional,
            dropout=dropout,
            pooling="steps",
            standardize=standardize,
            learning_rate=learning_rate,
            batch_size=batch_size,
            max_iter=max_iter,
            max_norm=max_norm,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            warm_start=warm_start,
            random_state=random_state,
            verbose=verbose,
            dtype=dtype,
            backend=backend,
        )
        self.embedding_size = embedding_size
        self.min_count = min_count
        self.class_weight = class_weight

    def predict(self, X: Any) -> list[Array]:
        """The most probable label of each step: an array (T_b,) for each sequence."""
        return [self.classes_[outputs.argmax(axis=1)] for outputs in self._predict_each(X)]

    def predict_proba(self, X: Any) -> list[Array]:
        """The probability of each label at each step: float64 (T_b, C) of each sequence, in the order of `classes_`."""
        return [np.exp(one) for one in self.predict_log_proba(X)]

    def predict_log_proba(self, X: Any) -> list[Array]:
        """The logarithm of `predict_proba`; finite where that underflows."""
        return [log_softmax(outputs) for outputs in self._predict_each(X)]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy over all steps of all sequences; `sample_weight` (N,) weighs the steps of each sequence."""
        predicted = self.predict(X)
        lengths = np.array([len(one) for one in predicted])
        right = np.concatenate(predicted) == self._checked_targets(y, lengths)
        return float(np.average(right, weights=np.repeat(weights_of(sample_weight, len(lengths)), lengths)))

    def _check_parameters(self) -> None:
        super()._check_parameters()
        integer("embedding_size", self.embedding_size, 1)
        integer("min_count", self.min_count, 1)

    def _sequences(self, X: Any, fresh: bool) -> Sequences:
        strings = are_strings(X)
        if fresh:
            self._symbols = Symbols(X, self.min_count) if strings else None
        elif strings is (self._symbols is None):
            expected = "numbers" if self._symbols is None else "strings"
            raise TypeError(f"X: expected sequences of {expected}, as in fit, got {describe(X)}")
        return super()._sequences(X, fresh) if self._symbols is None else self._symbols.encode(X)

    def _initialize_inputs(self, steps: Array, weights: Array) -> int:
        self.embedding_ = None
        if self._symbols is None:
            return super()._initialize_inputs(steps, weights)
        seed = int(self._generator.integers(2**31))
        self.embedding_ = Embedding(len(self._symbols), self.embedding_size, dtype=self.dtype, seed=seed)
        self.embedding_.parameters["weight"][...] *= VECTOR_DEVIATION
        return self.embedding_size

    def _standardized(self, data: Sequences) -> Sequences:
        return super()._standardized(data) if self._symbols is None else data

    def _checked_targets(self, y: Any, lengths: Array) -> Array:
        """The labels (S,) of all steps, one sequence after the other."""
        labels = []
        if len(y) != len(lengths):
            raise ValueError(f"y: expected a sequence of labels for each of the {len(lengths)} sequences, got {len(y)}")
        for index, (one, length) in enumerate(zip(y, lengths.tolist(), strict=True)):
            if np.ndim(one) == 0 and not isinstance(one, str):
                raise ValueError(f"y[{index}]: expected a label for each step of X[{index}], got {describe(one)}")
            array = np.asarray(list(one))
            if array.shape != (length,):
                raise ValueError(f"y[{index}]: expected {length} labels, one for each step, got shape {array.shape}")
            labels.append(array)
        return np.concatenate(labels)

    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        return self._encoded(y, fresh, classes)

    def _predict_each(self, X: Any) -> list[Array]:
        """The outputs (T_b, K) for each sequence, in float64."""
        data = self._data(X)
        return np.split(self._outputs(data, np.arange(len(data.lengths))).astype(np.float64), data.starts[1:])
