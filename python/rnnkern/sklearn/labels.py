"""What estimators of labels share: their loss, class weights, and `partial_fit`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score
from sklearn.utils import assert_all_finite
from sklearn.utils.multiclass import check_classification_targets

from ..arguments import positive
from .base import RNNEstimator
from .targets import log_softmax

Array = NDArray[Any]


class LabelEstimator(RNNEstimator):
    """Trained with softmax cross-entropy on labels, one for each row of the outputs."""

    class_weight: Any
    classes_: Array

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

    def _encoded(self, labels: Array, fresh: bool, classes: Any) -> tuple[Array, int]:
        """The place of each label in `classes_`, and how many classes there are."""
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
        log_probabilities = log_softmax(outputs)
        gradient = np.exp(log_probabilities)
        gradient[each] -= 1
        return -log_probabilities[each], gradient

    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        return float(accuracy_score(targets, outputs.argmax(axis=1), sample_weight=weights))
