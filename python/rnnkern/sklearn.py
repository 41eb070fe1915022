"""scikit-learn estimators: `RNNClassifier` and `RNNRegressor`, which give one label or number to each sequence."""

from __future__ import annotations

import math
import warnings
from abc import ABCMeta, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.utils import assert_all_finite, check_array, check_consistent_length, check_random_state, column_or_1d
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'rnnkern.sklearn needs scikit-learn 1.6 or newer: python -m pip install "scikit-learn>=1.6"'
    ) from error

from .arguments import as_array, describe, fraction, integer, number, positive
from .layers import Recurrent
from .terminal import Terminal
from .train import Adam, Linear, clip_grad_norm

__all__ = ["RNNClassifier", "RNNRegressor"]

Array = NDArray[Any]

FLOATS = [np.float64, np.float32]  # what X and y may be without a conversion
BATCHES_SORTED_TOGETHER = 16  # by length: enough that batches have little padding, few enough that they still vary
STEPS_PREDICTED_AT_ONCE = 1 << 15  # padding included; bounds the memory that a prediction takes
POOLINGS = ("last", "mean")
CHANNELS_AT_MOST, STEPS_PER_CHANNEL = 12, 10  # of arrays that look like (channels, T), see _warn_of_channels_first
EACH_STEP = "; for one at each step train rnnkern.Recurrent and rnnkern.Linear, as docs/sklearn.md says"


@dataclass(frozen=True, eq=False)
class Sequences:
    """N sequences, one after the other."""

    steps: Array  # (S, I), S steps in all
    lengths: Array  # (N,), positive

    @cached_property
    def starts(self) -> Array:
        """Where in `steps` each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    def batch(self, rows: Array) -> tuple[Array, Array | None]:
        """x (T, B, I) of the sequences `rows`, and their lengths; None where all have T steps."""
        lengths = self.lengths[rows]
        t = np.arange(lengths.max())[:, None]
        x = self.steps[self.starts[rows] + np.minimum(t, lengths - 1)]
        return x, None if lengths.min() == len(t) else lengths


class _RNNEstimator(BaseEstimator, metaclass=ABCMeta):  # type: ignore[misc]
    """All but the targets and their loss, which are the subclass's."""

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
    ) -> None:
        self.hidden_size = hidden_size
        self.cell = cell
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.pooling = pooling
        self.standardize = standardize
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.max_norm = max_norm
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.dtype = dtype
        self.backend = backend

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

    @property
    def n_iter_(self) -> int:
        """Epochs trained, those of `warm_start` and `partial_fit` included."""
        return len(self.loss_curve_)

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for at most `max_iter` epochs, from new weights or, with `warm_start`, from those there are.

        Ctrl-C ends the training with a warning and keeps what has been learned. A ConvergenceWarning says that
        `max_iter` ended it before `n_iter_no_change` epochs in a row had brought no improvement.

        Parameters
        ----------
        X
            N sequences, none of them empty: a list of arrays (T_i, I), or (T_i,) where there is one feature; an array
            (N, T, I); or a table (N, T), whose rows are sequences of T steps with one feature.
        y
            N targets.
        sample_weight
            (N,), not negative; None is all ones. A sequence of weight 0 counts as left out.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            An argument, or a parameter of the estimator, is not as described; the message names it.
        """
        fresh = not (self.warm_start and hasattr(self, "layer_"))
        if not self._fit(X, y, sample_weight, fresh, self.max_iter, self.early_stopping):
            warnings.warn(
                f"training ended after max_iter={self.max_iter} epochs while it still improved; raise max_iter, or "
                "go on with warm_start=True",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, fresh: bool, epochs: int, early_stopping: bool, classes: Any = None
    ) -> bool:
        """Check everything and train; the result is that of `_train`."""
        self._check_parameters()
        if y is None:
            raise ValueError(f"y: {type(self).__name__} requires y to be passed, but the target y is None")
        steps, lengths = self._sequences(X, fresh)
        _assert_one_each(y, lengths)
        weights = _weights(sample_weight, len(lengths))
        if fresh and hasattr(self, "layer_"):
            del self.layer_  # an error from here on leaves no model rather than halves of two
        targets, outputs = self._targets(y, weights, fresh, classes)
        weights *= self._factors(targets, weights)
        rows = np.flatnonzero(weights)
        weights /= weights[rows].mean()
        if fresh:
            self._initialize(steps, np.repeat(weights, lengths), outputs)
        data = self._standardized(steps, lengths)
        dtype = data.steps.dtype
        return self._train(data, targets, weights.astype(dtype), rows, epochs, early_stopping)

    def _check_parameters(self) -> None:
        """Those that the layers do not check."""
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {self.pooling!r}")
        for name in ("batch_size", "max_iter", "n_iter_no_change"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)
        positive("max_norm", self.max_norm, finite=False)
        fraction("validation_fraction", self.validation_fraction)
        number("tol", self.tol)

    def _sequences(self, X: Any, fresh: bool) -> tuple[Array, Array]:
        """The steps (S, I) of all sequences of X, and the lengths (N,); unless `fresh`, of the features there were."""
        several = _several(X)
        if several is not None:
            steps, lengths, columns = several
            steps = check_array(steps, dtype=FLOATS, ensure_all_finite=False, input_name="X", estimator=self)
            if fresh:
                _warn_of_channels_first(lengths, steps.shape[1])
                self.n_features_in_ = steps.shape[1]
                self.__dict__.pop("feature_names_in_", None)
                if columns is not None and all(isinstance(one, str) for one in columns):
                    self.feature_names_in_: Array = np.array(columns, dtype=object)
            elif columns is not None and hasattr(self, "feature_names_in_") and not self._of_tables:
                names = self.feature_names_in_.tolist()
                if columns != names:
                    raise ValueError(f"X: expected sequences of the columns {names}, as in fit, got {columns}")
        else:
            if fresh or self._of_tables:
                X = validate_data(self, X, reset=fresh, dtype=FLOATS, ensure_all_finite=False)
            else:
                X = check_array(X, dtype=FLOATS, ensure_all_finite=False, input_name="X", estimator=self)
            steps, lengths = X.reshape(-1, 1), np.full(len(X), X.shape[1])
        _assert_finite(steps, lengths)
        if fresh:
            self._of_tables: bool = several is None
        elif steps.shape[1] != self.layer_.input_size:
            raise ValueError(
                f"X: expected sequences of {self.layer_.input_size} features, as in fit, got {steps.shape[1]} features"
            )
        return steps, lengths

    def _initialize(self, steps: Array, weights: Array, outputs: int) -> None:
        """Layers of new weights, and the scales of the features; there is a weight for each step."""
        features = steps.shape[1]
        if isinstance(self.random_state, np.random.Generator):
            seeds = self.random_state.integers(2**31 - 1, size=3)
        else:
            seeds = check_random_state(self.random_state).randint(2**31 - 1, size=3)
        layer_seed, output_seed, seed = (int(seed) for seed in seeds)
        layer = Recurrent(
            self.cell, features, self.hidden_size, self.num_layers, dropout=self.dropout,
            bidirectional=self.bidirectional, dtype=self.dtype, backend=self.backend, seed=layer_seed,
        )  # fmt: skip
        width = layer.hidden_size * (1 + layer.bidirectional)
        self.output_ = Linear(width, outputs, dtype=self.dtype, backend=self.backend, seed=output_seed)
        self.layer_ = layer
        self._pooling = self.pooling  # what the weights are made for
        self.input_mean_, self.input_scale_ = np.zeros(features), np.ones(features)
        if self.standardize:
            self.input_mean_, self.input_scale_ = _mean_and_scale(steps, weights)
        self.loss_curve_: list[float] = []
        self.validation_scores_: list[float] = []
        self._generator = np.random.default_rng(seed)
        self._optimizer_state: dict[str, Any] | None = None

    def _standardized(self, steps: Array, lengths: Array) -> Sequences:
        return Sequences(((steps - self.input_mean_) / self.input_scale_).astype(self.layer_.dtype), lengths)

    def _train(
        self, data: Sequences, targets: Array, weights: Array, rows: Array, epochs: int, early_stopping: bool
    ) -> bool:
        """Epochs over `rows`, until the loss or, with `early_stopping`, the validation score no longer improves.

        Returns False where the epochs were over before.
        """
        rows, validation = self._split(targets, rows) if early_stopping else (rows, rows[:0])
        layers: tuple[Recurrent | Linear, ...] = (self.layer_, self.output_)
        optimizer = Adam(layers, self.learning_rate)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        best, stale, kept, converged = -math.inf, 0, None, True
        try:
            with Terminal() if self.verbose else nullcontext() as terminal, np.errstate(all="ignore"):
                for _ in range(epochs):
                    loss = self._epoch(optimizer, data, targets, weights, rows)
                    self.loss_curve_.append(loss)
                    if not math.isfinite(loss):
                        message = f"the loss of epoch {self.n_iter_} is {loss}: training ends; lower learning_rate"
                        warnings.warn(message, ConvergenceWarning, stacklevel=4)
                        break
                    score, line = -loss, f"epoch {self.n_iter_}  loss {loss:.4g}"
                    if early_stopping:
                        score = self._score(targets[validation], self._outputs(data, validation), weights[validation])
                        self.validation_scores_.append(score)
                        line += f"  validation score {score:.4f}"
                    if terminal is not None:
                        terminal.progress(line)
                    stale = 0 if score > best + self.tol else stale + 1
                    if score > best:
                        best = score
                        kept = [layer.state_dict() for layer in layers] if early_stopping else None
                    if stale == self.n_iter_no_change:
                        break
                else:
                    converged = False
                if terminal is not None:
                    terminal.say(line)
        except KeyboardInterrupt:
            warnings.warn(f"training was interrupted in epoch {self.n_iter_ + 1}", stacklevel=4)
        self._optimizer_state = optimizer.state_dict()
        if kept is not None:
            for layer, parameters in zip(layers, kept, strict=True):
                layer.load_state_dict(parameters)
        return converged

    def _split(self, targets: Array, rows: Array) -> tuple[Array, Array]:
        """Rows to train on, and rows to validate on: at least two, in which each class has its share."""
        count = max(2, round(self.validation_fraction * len(rows)))
        if count >= len(rows):
            raise ValueError(
                f"validation_fraction: expected to leave sequences to train on, got {self.validation_fraction} of "
                f"{len(rows)}, and at least 2 to validate on"
            )
        rows = self._generator.permutation(rows)
        if targets.ndim == 1:  # of a classifier
            rows = rows[np.argsort(targets[rows], kind="stable")]
        chosen = np.zeros(len(rows), bool)
        chosen[(np.arange(count) * len(rows) + self._generator.integers(len(rows))) // count] = True
        return rows[~chosen], rows[chosen]

    def _epoch(self, optimizer: Adam, data: Sequences, targets: Array, weights: Array, rows: Array) -> float:
        """One pass over `rows`; returns the mean loss."""
        layer, output, total = self.layer_, self.output_, 0.0
        for batch in _batches(data.lengths, rows, self.batch_size, self._generator):
            x, lengths = data.batch(batch)
            y, state, tape = layer.forward(x, lengths=lengths)
            outputs, output_tape = output.forward(self._pool(y, state, lengths))
            losses, doutputs = self._losses(outputs, targets[batch])
            total += float(weights[batch] @ losses)
            doutputs *= weights[batch, None] / len(batch)
            output_grads = output.backward(output_tape, doutputs)
            dy, dstate = self._unpool(output_grads.x, y, state, lengths)
            grads = [layer.backward(tape, dy, dstate, need_x=False), output_grads]
            if math.isfinite(clip_grad_norm(grads, self.max_norm)):  # else this step would end the training: skip it
                optimizer.step(grads)
        return total / len(rows)

    def _outputs(self, data: Sequences, rows: Array) -> Array:
        """The network's outputs (N, K) for the sequences `rows`."""
        lengths = data.lengths[rows]
        outputs = np.empty((len(rows), self.output_.out_features), self.layer_.dtype)
        order, start = np.argsort(-lengths, kind="stable"), 0
        while start < len(rows):
            batch = order[start : start + max(1, STEPS_PREDICTED_AT_ONCE // int(lengths[order[start]]))]
            x, ends = data.batch(rows[batch])
            y, state = self.layer_(x, lengths=ends)
            outputs[batch] = self.output_(self._pool(y, state, ends))
            start += len(batch)
        return outputs

    def _pool(self, y: Array, state: Any, lengths: Array | None) -> Array:
        """What the output layer reads, (B, D*H): the last layer's final h, or the mean of y over a row's steps."""
        if self._pooling == "mean":
            mean: Array = (y.sum(axis=0, dtype=np.float64) / _ends(y, lengths)).astype(y.dtype)
            return mean
        h = state[0] if isinstance(state, tuple) else state
        last: Array = h[-(1 + self.layer_.bidirectional) :].swapaxes(0, 1)  # (B, D, H)
        return last.reshape(len(last), -1)

    def _unpool(self, gradient: Any, y: Array, state: Any, lengths: Array | None) -> tuple[Array | None, Any]:
        """Gradients of y and of the state from that of `_pool`'s result."""
        if self._pooling == "mean":
            share = (gradient / _ends(y, lengths)).astype(y.dtype)
            return np.ascontiguousarray(np.broadcast_to(share, y.shape)), None
        h = state[0] if isinstance(state, tuple) else state
        dh = np.zeros_like(h)
        directions = 1 + self.layer_.bidirectional
        dh[-directions:] = gradient.reshape(len(gradient), directions, -1).swapaxes(0, 1)
        return None, (dh, None) if isinstance(state, tuple) else dh

    def _predict(self, X: Any) -> Array:
        """The network's outputs (N, K) for X, in float64."""
        check_is_fitted(self, "layer_")
        data = self._standardized(*self._sequences(X, False))
        return self._outputs(data, np.arange(len(data.lengths))).astype(np.float64)

    def _factors(self, targets: Array, weights: Array) -> Any:
        """What the weights are multiplied by, (N,) or a number."""
        return 1.0

    @abstractmethod
    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        """What the outputs are to be, (N, ...), and how many outputs that takes."""

    @abstractmethod
    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        """The loss of each row (B,), and its gradient (B, K)."""

    @abstractmethod
    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        """What is to rise with `early_stopping`."""


class RNNClassifier(ClassifierMixin, _RNNEstimator):  # type: ignore[misc]
    """A recurrent network that gives each sequence a class.

    The network reads the steps of a sequence; a linear layer maps what it has at the end to a logit for each class.
    It is trained with softmax cross-entropy, Adam and backpropagation through time over whole sequences. For a label at
    each step, or a sequence as the target, train `rnnkern.Recurrent` and `rnnkern.Linear` directly.

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
        Whether `fit` goes on from the weights, scales and classes of the last one.
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

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """Train one epoch more, without `early_stopping`; the first call makes the weights and measures the scales.

        Parameters
        ----------
        X, y, sample_weight
            As for `fit`.
        classes
            All labels that will ever occur; needed in the first call.

        Returns
        -------
        self

        Raises
        ------
        ValueError, TypeError
            As for `fit`; classes are missing in the first call, or differ in a later one; class_weight is "balanced",
            for which a part does not tell how often a class occurs.
        """
        if isinstance(self.class_weight, str):
            raise ValueError(
                f"class_weight: expected a dict or None for partial_fit, got {self.class_weight!r}: pass the weights "
                'of sklearn.utils.class_weight.compute_class_weight("balanced", classes=..., y=...) as a dict'
            )
        fresh = not hasattr(self, "layer_")
        if fresh and classes is None:
            raise ValueError("classes: expected all labels in the first call of partial_fit, got None")
        if classes is not None:
            classes = np.unique(classes)
            if not fresh and not np.array_equal(classes, self.classes_):
                raise ValueError(
                    f"classes: expected {self.classes_.tolist()} as in the first call, got {classes.tolist()}"
                )
        self._fit(X, y, sample_weight, fresh, 1, False, classes)
        return self

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
        return _log_softmax(self._predict(X))

    def decision_function(self, X: Any) -> Array:
        """The logit of each class, float64 (N, C); of two classes the second's less the first's, (N,)."""
        logits = self._predict(X)
        return logits[:, 1] - logits[:, 0] if len(self.classes_) == 2 else logits

    def _factors(self, targets: Array, weights: Array) -> Any:
        if self.class_weight is None:
            return 1.0
        if isinstance(self.class_weight, Mapping):
            factors = np.ones(len(self.classes_))
            labels = self.classes_.tolist()
            for label, factor in self.class_weight.items():
                if label not in labels:
                    raise ValueError(f"class_weight: expected labels among {labels}, got {label!r}")
                factors[labels.index(label)] = positive(f"class_weight[{label!r}]", factor, zero=True)
            if not (weights * factors[targets]).any():
                raise ValueError("class_weight: expected a class of y with a weight > 0, got 0 for all")
        elif self.class_weight == "balanced":
            totals = np.bincount(targets, weights, len(self.classes_))
            factors = weights.sum() / (np.count_nonzero(totals) * np.where(totals > 0, totals, 1))
        else:
            raise ValueError(f"class_weight: expected a dict, 'balanced' or None, got {self.class_weight!r}")
        return factors[targets]

    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        shape = np.asarray(y).shape
        if len(shape) > 1 and shape[1:] != (1,):
            raise ValueError(f"y: expected one label for each sequence, (N,), got shape {shape}{EACH_STEP}")
        labels = column_or_1d(y, warn=True)
        assert_all_finite(labels, input_name="y", estimator_name=type(self).__name__)
        check_classification_targets(labels)
        if fresh:
            self.classes_ = np.unique(labels) if classes is None else classes
        known = np.isin(labels, self.classes_)
        if not known.all():
            raise ValueError(f"y: expected labels among {self.classes_.tolist()}, got {labels[~known].tolist()[0]!r}")
        return np.searchsorted(self.classes_, labels), len(self.classes_)

    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        each = np.arange(len(targets)), targets
        log_probabilities = _log_softmax(outputs)
        gradient = np.exp(log_probabilities)
        gradient[each] -= 1
        return -log_probabilities[each], gradient

    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        return float(accuracy_score(targets, outputs.argmax(axis=1), sample_weight=weights))


class RNNRegressor(RegressorMixin, _RNNEstimator):  # type: ignore[misc]
    """A recurrent network that gives each sequence a number, or several.

    As `RNNClassifier`, whose parameters and attributes it has, but for `class_weight` and `classes_`. It is trained
    with the squared error on targets of mean 0 and deviation 1: each output of y is shifted and scaled, and predictions
    are scaled back.

    Attributes
    ----------
    target_mean_, target_scale_
        Of y, (K,), or () where y was (N,): the targets are shifted by the one and divided by the other.

    Examples
    --------
    >>> import numpy as np
    >>> from rnnkern.sklearn import RNNRegressor
    >>> generator = np.random.default_rng(0)
    >>> X = [generator.normal(size=(length, 2)) for length in generator.integers(5, 20, 200)]
    >>> y = [1000 + x[:, 0].sum() for x in X]
    >>> RNNRegressor(16, tol=0.01, random_state=0).fit(X[:150], y[:150]).score(X[150:], y[150:]) > 0.5
    True
    """

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train one epoch more, without `early_stopping`; the first call makes the weights and measures the scales.

        Parameters, result and errors are those of `fit`.
        """
        self._fit(X, y, sample_weight, not hasattr(self, "layer_"), 1, False)
        return self

    def predict(self, X: Any) -> Array:
        """The number, or numbers, of each sequence: float64 (N,), or (N, K) where y was."""
        outputs = self._predict(X)
        predictions: Array = outputs.reshape(-1, *self.target_mean_.shape) * self.target_scale_ + self.target_mean_
        return predictions

    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        values = check_array(y, dtype=np.float64, ensure_2d=False, input_name="y", estimator=self)
        if fresh:
            self.target_mean_, self.target_scale_ = _mean_and_scale(values, weights)
        elif values.shape[1:] != self.target_mean_.shape:
            raise ValueError(f"y: expected shape {(len(values), *self.target_mean_.shape)}, got {values.shape}")
        targets = ((values - self.target_mean_) / self.target_scale_).reshape(len(values), -1)
        return targets, targets.shape[1]

    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        errors = outputs - targets.astype(outputs.dtype)
        return np.square(errors).mean(axis=1), 2 / errors.shape[1] * errors

    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        return float(r2_score(targets, outputs, sample_weight=weights))


def _several(X: Any) -> tuple[Array, Array, list[Any] | None] | None:
    """Steps (S, I) and lengths (N,) of a list of sequences or an array (N, T, I); None for a table.

    A list of arrays is a list of sequences, a list of lists the array it makes, or sequences where it makes none. Of
    data frames the columns come third.
    """
    _assert_single_levels(X)
    if isinstance(X, Iterator):
        raise TypeError(f"X: expected a list of sequences or an array, got {describe(X)}; pass list(X)")
    if isinstance(X, list | tuple) and len(X) and not getattr(X[0], "shape", ()):
        try:
            X = np.asarray(X)
        except ValueError:  # lists of different lengths
            X = list(X)
    shape = getattr(X, "shape", None)
    if shape is not None and len(shape) == 2 and getattr(X, "dtype", np.dtype(object)) == np.dtype(object):
        _assert_not_nested(X)
    if shape is not None and len(shape) == 3:
        array = check_array(X, dtype=FLOATS, allow_nd=True, ensure_all_finite=False, input_name="X")
        if array.shape[1] == 0:
            raise ValueError(f"X: expected sequences of at least one step, got an array of shape {array.shape}")
        return array.reshape(-1, array.shape[2]), np.full(len(array), array.shape[1]), None
    if not isinstance(X, list | tuple) and not (shape is not None and len(shape) == 1 and X.dtype == object):
        return None
    if len(X) == 0:
        return None
    arrays: list[Array] = []
    columns = _columns(X[0])
    for index, one in enumerate(X):
        if columns is not None and _columns(one) not in (None, columns):
            raise ValueError(f"X[{index}]: expected the columns {columns}, as X[0] has, got {_columns(one)}")
        array = _numbers(f"X[{index}]", one)
        array = array[:, None] if array.ndim == 1 else array
        features = arrays[0].shape[1] if arrays else "I"
        if array.ndim != 2 or (arrays and array.shape[1] != features):
            transposed = arrays and array.ndim == 2 and len(array) == len(arrays[0])
            raise ValueError(
                f"X[{index}]: expected shape (T, {features}), got {array.shape}"
                + ("; steps come first: of arrays (channels, T) pass [x.T for x in X]" if transposed else "")
            )
        if len(array) == 0:
            raise ValueError(f"X[{index}]: expected at least one step, got an empty sequence")
        arrays.append(array)
    return np.concatenate(arrays), np.array([len(array) for array in arrays]), columns


def _columns(sequence: Any) -> list[Any] | None:
    """What the features of a data frame are called; None of what has no names for them."""
    names = getattr(sequence, "columns", None)
    return None if names is None else list(names)


def _numbers(name: str, sequence: Any) -> Array:
    """The array of a sequence, whose objects and strings are numbers, or an error that names it."""
    array = as_array(name, sequence)
    if array.dtype.kind not in "OSU":
        return array
    try:
        return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected numbers, got {describe(array)}: {error}") from None


def _assert_single_levels(table: Any) -> None:
    """A data frame has one name for each row and column: of more, rows are steps and columns features of steps."""
    ways_out = {
        "index": "of an index of (sequence, step) pass [x.to_numpy() for _, x in X.groupby(level=0, sort=False)], and "
        "a target for each",
        "columns": "of columns of (feature, step) pass X.to_numpy().reshape(len(X), I, T).transpose(0, 2, 1)",
    }
    for axis, way_out in ways_out.items():
        levels = getattr(getattr(table, axis, None), "nlevels", 1)
        if levels > 1:
            raise ValueError(
                f"X: expected a table with one sequence in each row, got a MultiIndex of {levels} levels as its "
                f"{axis}; {way_out}; of rows that are sequences all the same, of one feature, X.to_numpy()"
            )


def _assert_not_nested(table: Any) -> None:
    """The cells of a table are numbers: not series or arrays, as nested data frames have."""
    cells = table.iloc[:1] if hasattr(table, "iloc") else table[:1]
    if any(np.ndim(cell) for cell in np.asarray(cells, dtype=object).flat):
        raise ValueError(
            "X: expected numbers in a table, got sequences in its cells; pass a list of arrays (T, I), such as "
            "[np.column_stack(list(row)) for row in X.to_numpy()]"
        )


def _assert_finite(steps: Array, lengths: Array) -> None:
    """NaN and infinity are refused, with the sequence and the step."""
    finite = np.isfinite(steps).all(axis=1)
    if finite.all():
        return
    first = int(finite.argmin())
    index = int(np.searchsorted(np.cumsum(lengths), first, side="right"))
    where = f"X[{index}]: expected finite numbers, got"
    step = first - int(lengths[:index].sum())
    if not np.isnan(steps[first]).any():
        raise ValueError(f"{where} infinity at step {step}")
    raise ValueError(
        f"{where} NaN at step {step}; where it pads a shorter sequence, pass a list of sequences (T_i, I) without "
        "their padding; fill other gaps"
    )


def _warn_of_channels_first(lengths: Array, features: int) -> None:
    """Few steps with very many features each are more often a series of few channels, with its axes the other way."""
    T = int(lengths[0])
    if (lengths == T).all() and T <= CHANNELS_AT_MOST and features >= STEPS_PER_CHANNEL * T:
        warnings.warn(
            f"X is read as (N, T, I): {T} steps of {features} features. If it is (N, channels, T), pass "
            "np.transpose(X, (0, 2, 1))",
            stacklevel=5,
        )


def _assert_one_each(y: Any, lengths: Array) -> None:
    """There is a target, or an equal number of them, for each sequence; not one for each step of unequal sequences."""
    try:
        targets = np.asarray(y)
    except ValueError:  # what NumPy says of lists of different lengths
        targets = np.array([[]], dtype=object)
    if targets.ndim > 0 and targets.dtype == object and any(np.ndim(target) for target in targets[:1]):
        raise ValueError(f"y: expected one target for each sequence, got several of different number{EACH_STEP}")
    if targets.ndim > 2:
        raise ValueError(f"y: expected targets (N,) or (N, K), got shape {targets.shape}{EACH_STEP}")
    try:
        check_consistent_length(lengths, y)
    except ValueError as error:
        hint = EACH_STEP if targets.shape[:1] == (lengths.sum(),) else ""
        raise ValueError(
            f"{error}: X is read as {len(lengths)} sequences, along its first axis, and y is to have one target for "
            f"each sequence{hint}"
        ) from error


def _weights(sample_weight: Any, count: int) -> Array:
    """A weight for each sequence, float64 (N,), one of them positive."""
    if sample_weight is None:
        return np.ones(count)
    weights: Array = check_array(
        sample_weight, dtype=np.float64, ensure_2d=False, copy=True, input_name="sample_weight"
    )
    if weights.shape != (count,):
        raise ValueError(f"sample_weight: expected shape {(count,)}, got {weights.shape}")
    if weights.min() < 0 or not weights.any():
        raise ValueError(f"sample_weight: expected weights >= 0, not all of them zero, got {weights.min()} and more")
    return weights


def _mean_and_scale(values: Array, weights: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the first axis; 1 for the deviation of what is constant but for rounding."""
    mean = np.asarray(np.average(values, axis=0, weights=weights))
    scale = np.sqrt(np.average(np.square(values - mean), axis=0, weights=weights))
    return mean, np.where(scale <= 10 * np.finfo(values.dtype).eps * np.abs(mean), 1.0, scale)


def _batches(lengths: Array, rows: Array, size: int, generator: np.random.Generator) -> Iterator[Array]:
    """`rows` in random batches of nearly equal numbers, at most `size`, of similar length."""
    rows = generator.permutation(rows)
    batches: list[Array] = []
    for start in range(0, len(rows), BATCHES_SORTED_TOGETHER * size):
        some = rows[start : start + BATCHES_SORTED_TOGETHER * size]
        some = some[np.argsort(lengths[some], kind="stable")]
        count = math.ceil(len(some) / size)
        shortest, longer = divmod(len(some), count)  # the first `longer` have one more
        ends = [index * shortest + min(index, longer) for index in range(count + 1)]
        batches += [some[slice(*pair)] for pair in pairwise(ends)]
    for index in generator.permutation(len(batches)):
        yield batches[index]


def _ends(y: Array, lengths: Array | None) -> Any:
    """The number of steps of each row, (B, 1) where they differ; y is (T, B, D*H)."""
    return len(y) if lengths is None else lengths[:, None]


def _log_softmax(logits: Array) -> Array:
    """log(softmax) of each row, with the largest logit taken out first, so that nothing overflows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
