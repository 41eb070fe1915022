"""What all estimators share: their parameters, reading X, training and predicting."""

from __future__ import annotations

import math
import warnings
from abc import ABCMeta, abstractmethod
from contextlib import nullcontext
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ..arguments import fraction, integer, number, positive
from ..layers import Recurrent
from ..terminal import Terminal
from ..train import Adam, Linear, clip_grad_norm
from .sequences import FLOATS, Sequences, as_sequences, assert_finite, batches, warn_of_channels_first
from .targets import assert_one_each, mean_and_scale, weights_of

Array = NDArray[Any]

STEPS_PREDICTED_AT_ONCE = 1 << 15  # padding included; bounds the memory that a prediction takes
POOLINGS = ("last", "mean")


class RNNEstimator(BaseEstimator, metaclass=ABCMeta):  # type: ignore[misc]
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
        assert_one_each(y, lengths)
        weights = weights_of(sample_weight, len(lengths))
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
        several = as_sequences(X)
        if several is not None:
            steps, lengths, columns = several
            steps = check_array(steps, dtype=FLOATS, ensure_all_finite=False, input_name="X", estimator=self)
            if fresh:
                warn_of_channels_first(lengths, steps.shape[1])
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
        assert_finite(steps, lengths)
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
            self.input_mean_, self.input_scale_ = mean_and_scale(steps, weights)
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
        for batch in batches(data.lengths, rows, self.batch_size, self._generator):
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


def _ends(y: Array, lengths: Array | None) -> Any:
    """The number of steps of each row, (B, 1) where they differ; y is (T, B, D*H)."""
    return len(y) if lengths is None else lengths[:, None]
