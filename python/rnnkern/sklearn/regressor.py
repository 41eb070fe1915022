"""`RNNRegressor`: a number, or several, for each sequence."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils import check_array

from .base import RNNEstimator
from .targets import mean_and_scale, squared_errors

Array = NDArray[Any]


class RNNRegressor(RegressorMixin, RNNEstimator):  # type: ignore[misc]
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
            self.target_mean_, self.target_scale_ = mean_and_scale(values, weights)
        elif values.shape[1:] != self.target_mean_.shape:
            raise ValueError(f"y: expected shape {(len(values), *self.target_mean_.shape)}, got {values.shape}")
        targets = ((values - self.target_mean_) / self.target_scale_).reshape(len(values), -1)
        return targets, targets.shape[1]

    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        return squared_errors(outputs, targets)

    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        return float(r2_score(targets, outputs, sample_weight=weights))
