"""`RNNClassifier`: a label for each sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils import column_or_1d

from .labels import LabelEstimator
from .targets import EACH_STEP, log_softmax

Array = NDArray[Any]


class RNNClassifier(ClassifierMixin, LabelEstimator):  # type: ignore[misc]
    """A recurrent network that gives each sequence a class.

    The network reads the steps of a sequence; a linear layer maps what it has at the end to a logit for each class.
    It is trained with softmax cross-entropy, Adam and backpropagation through time over whole sequences. For a label at
    each step there is `RNNTagger`.

    Parameters
    ----------
    hidden_size
        H, the units of each layer and direction.
    cell
        Name of a cell of `rnnkern.Recurrent`, such as "gru", "lstm" or "rnn_tanh".
    num_layers
        Recurrent layers, one above the other.
    bidirectional
        Whether each layer also reads from the last step to the first.
    dropout
        Probability with which an element between two recurrent layers is zeroed in training.
    pooling
        What the linear layer reads: "last", each sequence's own last h (of the reverse direction that of its first
        step); "mean", the mean of h over the steps.
    standardize
        Whether features are shifted and scaled to mean 0 and deviation 1 over all steps of the training data. Turn it
        off for features on one scale, such as one-hot vectors, of which it would blow up the rare ones.
    learning_rate
        Of Adam.
    batch_size
        Sequences of an update. Sequences of similar length share a batch.
    max_iter
        The most epochs of a `fit`.
    max_norm
        The gradient is scaled down to this norm where it exceeds it; infinity for never.
    early_stopping
        Whether to hold out a part of the training data, to stop when its score (accuracy; R^2 of a regressor) no longer
        rises, and to restore the weights of the best one. Otherwise training stops when its loss no longer falls.
    validation_fraction
        Share of the sequences that `early_stopping` holds out.
    n_iter_no_change
        Epochs in a row without an improvement by `tol` after which training stops.
    tol
        Of the score or the loss; see `n_iter_no_change`.
    warm_start
        Whether `fit` goes on from the weights, scales and classes of the last one; what these are made for, such as
        `hidden_size`, must be as it was.
    random_state
        None, an integer, a `numpy.random.RandomState` or a `numpy.random.Generator`. An integer gives the same bits
        each time, on one machine.
    verbose
        Whether to print the progress; in one line that changes on a terminal, by rich where it is installed.
    dtype
        float32 or float64, of the network.
    backend
        As for `rnnkern.Recurrent`.
    class_weight
        By which the weights of the sequences of a class are multiplied: a dict from labels, 1 for those it lacks;
        "balanced", inversely as often as the class occurs; None, 1 for all.

    Attributes
    ----------
    classes_
        The labels, sorted.
    layer_, output_
        The trained `rnnkern.Recurrent` and `rnnkern.Linear`, for `freeze`, `stream`, `rnnkern.save` and what else they
        can; they take standardized features.
    input_mean_, input_scale_
        (I,): the features are shifted by the one and divided by the other.
    loss_curve_
        Mean training loss of each epoch.
    validation_scores_
        Validation score of each epoch; empty without `early_stopping`.
    n_iter_
        Epochs trained.
    n_features_in_
        I; of a model fitted with a table, its number of columns T.
    feature_names_in_
        The names of the columns, of a model fitted with a data frame or a list of them.

    Examples
    --------
    >>> import numpy as np
    >>> from rnnkern.sklearn import RNNClassifier
    >>> generator = np.random.default_rng(0)
    >>> X = [generator.normal(size=(length, 2)) for length in generator.integers(5, 20, 200)]
    >>> y = ["up" if x[:, 0].sum() > 0 else "down" for x in X]
    >>> RNNClassifier(16, early_stopping=True, random_state=0).fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.8
    True
    """

    def __init__(
        self,
        hidden_size: int = 64,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "last",
        standardize: bool = True,
        learning_rate: float = 0.005,
        batch_size: int = 32,
        max_iter: int = 100,
        max_norm: float = 1.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
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
            pooling=pooling,
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
        self.class_weight = class_weight

    def predict(self, X: Any) -> Array:
        """The most probable class of each sequence, (N,)."""
        best = self._predict(X).argmax(axis=1)
        labels: Array = self.classes_[best]
        return labels

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, float64 (N, C), in the order of `classes_`."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X: Any) -> Array:
        """The logarithm of `predict_proba`; finite where that underflows."""
        return log_softmax(self._predict(X))

    def decision_function(self, X: Any) -> Array:
        """The logit of each class, float64 (N, C); of two classes the second's less the first's, (N,)."""
        logits = self._predict(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        shape = np.asarray(y).shape
        if len(shape) > 1 and shape[1:] != (1,):
            raise ValueError(f"y: expected one label for each sequence, (N,), got shape {shape}{EACH_STEP}")
        return self._encoded(column_or_1d(y, warn=True), fresh, classes)

    def _strata(self, targets: Array, rows: Array) -> Array:
        strata: Array = targets[rows]
        return strata
