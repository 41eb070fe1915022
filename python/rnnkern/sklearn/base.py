"""What the estimators of X and y share: reading X, fitting and predicting."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_array
from sklearn.utils.validation import check_is_fitted, validate_data

from .pooling import POOLINGS
from .sequences import FLOATS, Sequences, as_sequences, assert_finite, warn_of_channels_first
from .targets import assert_one_each, mean_and_scale, weights_of
from .training import TrainedNetwork

Array = NDArray[Any]

_OF_LAYER = ("cell", "hidden_size", "num_layers", "bidirectional", "dropout", "dtype")  # parameters that it keeps to


class RNNEstimator(TrainedNetwork):
    """All but the targets and their loss, which are the subclass's."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        return tags

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
            N targets; of a tagger N sequences of labels, as long as those of X.
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
        if not fresh:
            self._check_unchanged()
        elif hasattr(self, "layer_"):
            del self.layer_  # an error from here on leaves no model rather than halves of two
        data = self._sequences(X, fresh)
        y = self._checked_targets(y, data.lengths)
        pooling = POOLINGS[self.pooling]
        weights = pooling.of_targets(weights_of(sample_weight, len(data.lengths)), data.lengths)
        targets, outputs = self._targets(y, weights, fresh, classes)
        weights = weights * self._factors(targets, weights)
        of_steps = pooling.of_steps(weights, data.lengths)
        rows = np.flatnonzero(np.add.reduceat(of_steps, data.starts))
        mean = weights[pooling.targets(data, rows)].mean()
        if fresh:
            self._initialize(data.steps, of_steps / mean, outputs)
        weights = (weights / mean).astype(self.layer_.dtype)
        return self._train(self._standardized(data), targets, weights, rows, epochs, early_stopping)

    def _check_unchanged(self) -> None:
        """The parameters are those of the weights from which training goes on."""
        made = {name: getattr(self.layer_, name) for name in _OF_LAYER} | {"pooling": self._pooling}
        if self.embedding_ is not None:
            made["embedding_size"] = self.embedding_.sizes[1]
        for name, value in made.items():
            if (given := getattr(self, name)) != value:
                raise ValueError(
                    f"{name}: expected {value}, as of the weights to go on from, got {given}; for new ones "
                    "fit without warm_start"
                )

    def _sequences(self, X: Any, fresh: bool) -> Sequences:
        """The sequences of X; unless `fresh`, of the features there were."""
        several = as_sequences(X)
        if several is not None:
            steps, lengths, columns = several
            steps = check_array(steps, dtype=FLOATS, ensure_all_finite=False, input_name="X", estimator=self)
            if fresh:
                warn_of_channels_first(lengths, steps.shape[1])
                self.n_features_in_ = steps.shape[1]
                self._note_columns(columns)
            elif not self._of_tables:
                self._check_columns("X: expected sequences of", columns)
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
        return Sequences(steps, lengths)

    def _initialize_inputs(self, steps: Array, weights: Array) -> int:
        """The scales of the features; returns how many inputs the recurrent layer has."""
        features = int(steps.shape[1])
        self.input_mean_, self.input_scale_ = np.zeros(features), np.ones(features)
        if self.standardize:
            self.input_mean_, self.input_scale_ = mean_and_scale(steps, weights)
        return features

    def _standardized(self, data: Sequences) -> Sequences:
        """The sequences as the network reads them."""
        return Sequences(((data.steps - self.input_mean_) / self.input_scale_).astype(self.layer_.dtype), data.lengths)

    def _data(self, X: Any) -> Sequences:
        """The sequences of X as the network reads them."""
        check_is_fitted(self, "layer_")
        return self._standardized(self._sequences(X, False))

    def _predict(self, X: Any) -> Array:
        """The network's outputs (N, K) for X, in float64."""
        data = self._data(X)
        return self._outputs(data, np.arange(len(data.lengths))).astype(np.float64)

    def _checked_targets(self, y: Any, lengths: Array) -> Any:
        """y where it has a target for each sequence."""
        assert_one_each(y, lengths)
        return y

    def _factors(self, targets: Array, weights: Array) -> Any:
        """What the weights are multiplied by, (N,) or a number."""
        return 1.0

    @abstractmethod
    def _targets(self, y: Any, weights: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        """What the outputs are to be, (N, ...), and how many outputs that takes."""
