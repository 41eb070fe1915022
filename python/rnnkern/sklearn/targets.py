"""Targets, the weights of sequences, and scales."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array, check_consistent_length

Array = NDArray[Any]

EACH_STEP = "; for one at each step take RNNTagger, or for numbers rnnkern.Recurrent and rnnkern.Linear"


def assert_one_each(y: Any, lengths: Array) -> None:
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


def weights_of(sample_weight: Any, count: int) -> Array:
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


def mean_and_scale(values: Array, weights: Array) -> tuple[Array, Array]:
    """Mean and standard deviation over the first axis; 1 for the deviation of what is constant but for rounding."""
    mean = np.asarray(np.average(values, axis=0, weights=weights))
    scale = np.sqrt(np.average(np.square(values - mean), axis=0, weights=weights))
    return mean, np.where(scale <= 10 * np.finfo(values.dtype).eps * np.abs(mean), 1.0, scale)


def squared_errors(outputs: Array, targets: Array) -> tuple[Array, Array]:
    """The mean squared error of each row (R,), and its gradient (R, K)."""
    errors = outputs - targets.astype(outputs.dtype)
    return np.square(errors).mean(axis=1), 2 / errors.shape[1] * errors


def log_softmax(logits: Array) -> Array:
    """log(softmax) of each row, with the largest logit taken out first, so that nothing overflows."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
