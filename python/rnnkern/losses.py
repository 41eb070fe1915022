"""Losses: the mean over the rows that count, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import as_array, describe

__all__ = ["cross_entropy", "mse"]

Array = NDArray[Any]


def cross_entropy(
    logits: ArrayLike, targets: ArrayLike, lengths: ArrayLike | None = None, *, batch_first: bool = False
) -> tuple[float, Array]:
    """Softmax cross-entropy, mean over the valid steps, and its gradient.

    Per step: log(sum_k exp(logits_k)) - logits_target, in nats, with the largest logit taken out of the sum first, so
    that nothing overflows. As `torch.nn.functional.cross_entropy` over the valid steps.

    Parameters
    ----------
    logits
        float32 or float64, (T, B, C), or any leading shape (..., C) where no lengths are given.
    targets
        Integers in [0, C) of the leading shape.
    lengths
        Integers (B,), 0 <= length <= T. Past a row's end neither logits nor targets are read.
    batch_first
        The leading shape is (B, T). Matters only with lengths.

    Returns
    -------
    loss : float
        0 where there is no valid step.
    dlogits : ndarray
        Shape and dtype of logits; zero past a row's end.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dlogits = cross_entropy(np.zeros((2, 1, 4)), np.array([[3], [0]]))
    >>> round(loss, 4), dlogits[0, 0].tolist()
    (1.3863, [0.125, 0.125, 0.125, -0.375])
    """
    z = _floats("logits", logits)
    if z.ndim < 2:
        raise ValueError(f"logits: expected shape (..., C) of at least 2 dimensions, got {z.shape}")
    chosen = as_array("targets", targets)
    if chosen.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got {chosen.dtype}")
    if chosen.shape != z.shape[:-1]:
        raise ValueError(f"targets: expected shape {z.shape[:-1]}, got {chosen.shape}")
    classes = z.shape[-1]
    valid = _valid_steps("logits", z, lengths, batch_first)
    rows = z.reshape(-1, classes) if valid is None else z[valid]
    chosen = chosen.reshape(-1) if valid is None else chosen[valid]
    count = len(rows)
    if count == 0:
        return 0.0, np.zeros_like(z, order="C")
    if chosen.min() < 0 or chosen.max() >= classes:
        worst = chosen.min() if chosen.min() < 0 else chosen.max()
        raise ValueError(f"targets: expected values in [0, {classes}), got {worst}")

    at_target = (np.arange(count), chosen)
    with np.errstate(all="ignore"):  # Inf and NaN go through
        gradient = rows - rows.max(axis=-1, keepdims=True)
        target_logits = gradient[at_target]
        np.exp(gradient, out=gradient)
        total = gradient.sum(axis=-1)
        loss = np.mean(np.log(total) - target_logits, dtype=np.float64)
        gradient /= total[:, None] * count
        gradient[at_target] -= 1 / count
    return float(loss), _spread(gradient, valid, z)


def mse(
    prediction: ArrayLike, target: ArrayLike, lengths: ArrayLike | None = None, *, batch_first: bool = False
) -> tuple[float, Array]:
    """Mean squared error over all elements of the valid steps, and its gradient.

    As `torch.nn.functional.mse_loss` over the valid steps; the mean is taken in float64.

    Parameters
    ----------
    prediction
        float32 or float64, (T, B, C), or any shape where no lengths are given.
    target
        Real numbers of the same shape.
    lengths
        Integers (B,), 0 <= length <= T. Past a row's end neither prediction nor target is read.
    batch_first
        The shape is (B, T, C). Matters only with lengths.

    Returns
    -------
    loss : float
        0 where there is no valid step.
    dprediction : ndarray
        Shape and dtype of prediction; zero past a row's end.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype or shape, naming the argument.

    Examples
    --------
    >>> loss, dprediction = mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    >>> loss, dprediction.tolist()
    (2.0, [0.0, -2.0])
    """
    y = _floats("prediction", prediction)
    wanted = as_array("target", target)
    if wanted.dtype.kind not in "fiub":
        raise TypeError(f"target: expected real numbers, got {wanted.dtype}")
    if wanted.shape != y.shape:
        raise ValueError(f"target: expected shape {y.shape}, got {wanted.shape}")
    valid = _valid_steps("prediction", y, lengths, batch_first)
    with np.errstate(all="ignore"):
        gradient = np.subtract(y if valid is None else y[valid], wanted if valid is None else wanted[valid])
        gradient = np.asarray(gradient, dtype=y.dtype)  # a float64 target does not widen the result
        count = gradient.size
        if count == 0:
            return 0.0, np.zeros_like(y, order="C")
        loss = np.mean(np.square(gradient, dtype=np.float64))
        gradient *= 2 / count
    return float(loss), _spread(gradient, valid, y)


def _floats(name: str, value: ArrayLike) -> Array:
    array = as_array(name, value)
    if array.dtype not in (np.float32, np.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {array.dtype}")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _valid_steps(name: str, values: Array, lengths: ArrayLike | None, batch_first: bool) -> Array | None:
    """Where a step is within its row, bool of the leading shape; None for everywhere."""
    if lengths is None:
        return None
    if values.ndim != 3:
        raise ValueError(f"lengths: expected {name} of 3 dimensions with them, got {name} of shape {values.shape}")
    B, T = values.shape[:2] if batch_first else values.shape[1::-1]
    ends = as_array("lengths", lengths)
    if ends.dtype.kind not in "iu":
        raise TypeError(f"lengths: expected integers of shape ({B},), got {describe(ends)}")
    if ends.shape != (B,):
        raise ValueError(f"lengths: expected integers of shape ({B},), got {describe(ends)}")
    if B and (ends.min() < 0 or ends.max() > T):
        raise ValueError(f"lengths: expected values in [0, {T}], got {ends.min()} to {ends.max()}")
    inside: Array = np.arange(T) < ends[:, None]
    return inside if batch_first else inside.T


def _spread(rows: Array, valid: Array | None, like: Array) -> Array:
    """Gradients of the valid steps in the shape of all steps, zero elsewhere."""
    if valid is None:
        return rows.reshape(like.shape)
    full = np.zeros(like.shape, like.dtype)
    full[valid] = rows
    return full
