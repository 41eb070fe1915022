"""Losses: the weighted mean over the rows that count, and its gradient.

A row is the last dimension of what is predicted: one (t, b), or one element where there is only one dimension. All
losses take the same `lengths`, `batch_first`, `row_weights` and `need_gradient`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arguments import as_array, as_real_floats, describe, flag, integer, positive, probability, row_lengths

__all__ = ["binary_cross_entropy", "cross_entropy", "huber", "mae", "mse"]

Array = NDArray[Any]


@dataclass(frozen=True)
class _Elementwise:
    """A loss of single elements: its value and its derivative, functions of predictions and targets."""

    value: Callable[[Array, Array], Array]
    slope: Callable[[Array, Array], Array]
    names: tuple[str, str] = ("prediction", "target")
    most: float | None = None  # targets are from 0 to this


def cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    batch_first: bool = False,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    row_weights: ArrayLike | None = None,
    need_gradient: bool = True,
) -> tuple[float, Any]:
    """Softmax cross-entropy, mean over the rows that count, and its gradient.

    Per row, in nats: log(sum_k exp(logits_k)) - logits_target, with the largest logit taken out of the sum first, so
    that nothing overflows. As `torch.nn.functional.cross_entropy` over the rows that count. With class weights w and
    label smoothing s (Szegedy et al. 2016, section 7), where p = softmax(logits) and n goes over the rows:

        sum_n r_n ((1 - s) w_target -log(p_target) + s / C sum_k w_k -log(p_k)) / sum_n r_n w_target

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
    weights
        w, numbers >= 0 (C,): what a target of each class counts; None for 1 each.
    ignore_index
        A target that says that its row does not count, in [0, C) or not.
    label_smoothing
        s, from 0 to 1: the part of each target that is spread evenly over all classes.
    row_weights
        r, numbers >= 0 that broadcast to the leading shape, such as (T, B), or (B,), which is (B, 1) with
        `batch_first`. A row of weight 0 does not count and is not read. None for 1 each.
    need_gradient
        Whether the gradient is wanted; without it the loss has the same bits.

    Returns
    -------
    loss : float
        0 where no row counts.
    dlogits : ndarray or None
        Shape and dtype of logits, zero in rows that do not count; None without `need_gradient`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dlogits = cross_entropy(np.zeros((2, 1, 4)), np.array([[3], [0]]))
    >>> round(loss, 4), dlogits[0, 0].tolist()
    (1.3863, [0.125, 0.125, 0.125, -0.375])
    >>> loss, dlogits = cross_entropy(np.zeros((2, 4)), np.array([3, -1]), ignore_index=-1, label_smoothing=0.2)
    >>> round(loss, 4), dlogits.round(2).tolist()
    (1.3863, [[0.2, 0.2, 0.2, -0.6], [0.0, 0.0, 0.0, 0.0]])
    """
    z = as_real_floats("logits", logits)
    if z.ndim < 2:
        raise ValueError(f"logits: expected shape (..., C) of at least 2 dimensions, got {z.shape}")
    chosen = as_array("targets", targets)
    if chosen.shape == z.shape:
        expected = f"targets: expected integers of shape {z.shape[:-1]}, one class for each row of logits"
        raise ValueError(f"{expected}, got {describe(chosen)}; of one-hot rows take targets.argmax(-1)")
    if chosen.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got {chosen.dtype}")
    if chosen.shape != z.shape[:-1]:
        raise ValueError(f"targets: expected shape {z.shape[:-1]}, got {chosen.shape}")
    classes = z.shape[-1]
    of_class = np.ones(classes) if weights is None else _weights("weights", weights, (classes,))
    smoothing = probability("label_smoothing", label_smoothing)
    counts = _valid_steps("logits", z, lengths, batch_first)
    if ignore_index is not None:
        counts = _both(counts, chosen != integer("ignore_index", ignore_index, -(2**63)))
    counts, share = _row_weights(row_weights, chosen.shape, counts)
    flag("need_gradient", need_gradient)

    rows, chosen = _counting(z, counts), _counting(chosen[..., None], counts)[:, 0]
    if chosen.size and (chosen.min() < 0 or chosen.max() >= classes):
        worst = chosen.min() if chosen.min() < 0 else chosen.max()
        raise ValueError(f"targets: expected values in [0, {classes}), got {worst}")
    share = np.ones(len(rows)) if share is None else share
    loss, gradient = _softmax_loss(rows, chosen, share, of_class, smoothing, need_gradient)
    return loss, None if gradient is None else _spread(gradient, counts, z)


def _softmax_loss(
    rows: Array, chosen: Array, share: Array, of_class: Array, smoothing: float, need_gradient: bool
) -> tuple[float, Array | None]:
    """The loss of rows (N, C) with targets (N,), weights of the rows (N,) and of the classes (C,), and its gradient."""
    own = share * of_class[chosen]
    total = own.sum()
    if total == 0:
        return 0.0, np.zeros_like(rows, order="C") if need_gradient else None
    # Divide what a row counts: between its target, and every class times the weight of that.
    own *= (1 - smoothing) / total
    every = share * (smoothing / len(of_class) / total)

    at_target = (np.arange(len(rows)), chosen)
    with np.errstate(all="ignore"):  # Inf and NaN go through
        gradient = rows - rows.max(axis=-1, keepdims=True)
        target_logits = gradient[at_target]
        logits_sum = np.einsum("nc,c->n", gradient, of_class) if smoothing else None
        np.exp(gradient, out=gradient)
        sums = gradient.sum(axis=-1)
        log_sums = np.log(sums)
        loss = np.sum(own * (log_sums - target_logits))
        if logits_sum is not None:
            loss += np.sum(every * (log_sums * of_class.sum() - logits_sum))
        if not need_gradient:
            return float(loss), None
        gradient *= ((own + every * of_class.sum()) / sums).astype(rows.dtype)[:, None]
        if smoothing:
            gradient -= np.multiply.outer(every, of_class).astype(rows.dtype, copy=False)
        gradient[at_target] -= own
    return float(loss), gradient


def binary_cross_entropy(
    logits: ArrayLike,
    targets: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    batch_first: bool = False,
    row_weights: ArrayLike | None = None,
    need_gradient: bool = True,
) -> tuple[float, Any]:
    """Cross-entropy of yes or no, mean over all elements of the rows that count, and its gradient.

    Per element, in nats: -t log(p) - (1 - t) log(1 - p) with p = sigmoid(z), computed as
    `max(z, 0) - z t + log(1 + exp(-|z|))`, which no finite logit z overflows. As
    `torch.nn.functional.binary_cross_entropy_with_logits`.

    Parameters
    ----------
    logits
        z, float32 or float64, (T, B, C), or any shape where no lengths are given: each element a question of its own.
    targets
        t, numbers from 0 to 1, or bool, of the same shape.
    lengths, batch_first, row_weights, need_gradient
        As for `mse`.

    Returns
    -------
    loss : float
        0 where no row counts.
    dlogits : ndarray or None
        Shape and dtype of logits, zero in rows that do not count; None without `need_gradient`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dlogits = binary_cross_entropy(np.array([0.0, 1000.0]), np.array([True, True]))
    >>> round(loss, 4), dlogits.tolist()
    (0.3466, [-0.25, 0.0])
    """
    return _mean(_BINARY, logits, targets, lengths, batch_first, row_weights, need_gradient)


def mse(
    prediction: ArrayLike,
    target: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    batch_first: bool = False,
    row_weights: ArrayLike | None = None,
    need_gradient: bool = True,
) -> tuple[float, Any]:
    """Mean squared error over all elements of the rows that count, and its gradient.

    As `torch.nn.functional.mse_loss` over the rows that count; the mean is taken in float64.

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
    row_weights
        Numbers >= 0 that broadcast to the shape without its last dimension (where there is one alone, to that), such
        as (T, B), or (B,), which is (B, 1) with `batch_first`. A row of weight 0 does not count and is not read; the
        mean is over the weights. None for 1 each.
    need_gradient
        Whether the gradient is wanted; without it the loss has the same bits.

    Returns
    -------
    loss : float
        0 where no row counts.
    dprediction : ndarray or None
        Shape and dtype of prediction, zero in rows that do not count; None without `need_gradient`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dprediction = mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    >>> loss, dprediction.tolist()
    (2.0, [0.0, -2.0])
    >>> mse(np.array([1.0, 2.0]), np.array([1.0, 4.0]), row_weights=[3, 1], need_gradient=False)
    (1.0, None)
    """
    return _mean(_SQUARED, prediction, target, lengths, batch_first, row_weights, need_gradient)


def mae(
    prediction: ArrayLike,
    target: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    batch_first: bool = False,
    row_weights: ArrayLike | None = None,
    need_gradient: bool = True,
) -> tuple[float, Any]:
    """Mean absolute error over all elements of the rows that count, and its gradient, which is 0 where they are equal.

    As `torch.nn.functional.l1_loss` over the rows that count; the mean is taken in float64.

    Parameters
    ----------
    prediction, target, lengths, batch_first, row_weights, need_gradient
        As for `mse`.

    Returns
    -------
    loss, dprediction
        As from `mse`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dprediction = mae(np.array([1.0, 2.0]), np.array([1.0, 4.0]))
    >>> loss, dprediction.tolist()
    (1.0, [0.0, -0.5])
    """
    return _mean(_ABSOLUTE, prediction, target, lengths, batch_first, row_weights, need_gradient)


def huber(
    prediction: ArrayLike,
    target: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    delta: float = 1.0,
    batch_first: bool = False,
    row_weights: ArrayLike | None = None,
    need_gradient: bool = True,
) -> tuple[float, Any]:
    """Huber's loss (1964), mean over all elements of the rows that count, and its gradient.

    Per element with the error e: `e^2 / 2` where `|e| <= delta`, else `delta (|e| - delta / 2)`. As
    `torch.nn.functional.huber_loss` over the rows that count; the mean is taken in float64.

    Parameters
    ----------
    prediction, target, lengths, batch_first, row_weights, need_gradient
        As for `mse`.
    delta
        > 0, in the units of target: from there on an error counts in proportion, not by its square.

    Returns
    -------
    loss, dprediction
        As from `mse`.

    Raises
    ------
    TypeError, ValueError
        Wrong dtype, shape or range, naming the argument.

    Examples
    --------
    >>> loss, dprediction = huber(np.array([1.5, 2.0]), np.array([1.0, 5.0]))
    >>> loss, dprediction.tolist()
    (1.3125, [0.25, -0.5])
    """
    bound = positive("delta", delta)

    def value(y: Array, t: Array) -> Array:
        size = np.abs(np.subtract(y, t, dtype=np.float64))
        near = np.minimum(size, bound)
        return near * (size - near / 2)

    loss = _Elementwise(value, lambda y, t: np.clip(y - t, -bound, bound))
    return _mean(loss, prediction, target, lengths, batch_first, row_weights, need_gradient)


def _mean(
    loss: _Elementwise,
    prediction: ArrayLike,
    target: ArrayLike,
    lengths: ArrayLike | None,
    batch_first: bool,
    row_weights: ArrayLike | None,
    need_gradient: bool,
) -> tuple[float, Any]:
    """The mean of a loss over the elements of the rows that count, and its gradient."""
    name, target_name = loss.names
    y, wanted = as_real_floats(name, prediction), as_array(target_name, target)
    if wanted.dtype.kind not in "fiub":
        raise TypeError(f"{target_name}: expected real numbers, got {wanted.dtype}")
    if wanted.shape != y.shape:
        raise ValueError(f"{target_name}: expected shape {y.shape}, got {wanted.shape}")
    leading = y.shape[:-1] if y.ndim > 1 else y.shape
    counts, share = _row_weights(row_weights, leading, _valid_steps(name, y, lengths, batch_first))
    flag("need_gradient", need_gradient)
    shape = y.shape if y.ndim > 1 else (*y.shape, 1)
    rows, targets = _counting(y.reshape(shape), counts), _counting(wanted.reshape(shape), counts)
    if rows.size == 0:
        return 0.0, np.zeros_like(y, order="C") if need_gradient else None
    if loss.most is not None and not ((targets >= 0) & (targets <= loss.most)).all():
        came = f"{targets.min()} to {targets.max()}"
        raise ValueError(f"{target_name}: expected values from 0 to {loss.most:g}, got {came}")
    share = np.asarray(1 / rows.size if share is None else share[:, None] / (share.sum() * shape[-1]))
    with np.errstate(all="ignore"):  # Inf and NaN go through
        values = loss.value(rows, targets)
        result = np.mean(values, dtype=np.float64) if share.ndim == 0 else np.sum(share * values)
        if not need_gradient:
            return float(result), None
        # Keep the dtype of y, which a float64 target would widen.
        gradient = np.asarray(loss.slope(rows, targets), dtype=y.dtype)
        gradient *= share.astype(y.dtype)
    return float(result), _spread(gradient, counts, y)


def _logistic_loss(z: Array, t: Array) -> Array:
    loss: Array = np.maximum(z, 0) - z * t + np.log1p(np.exp(-np.abs(z)))
    return loss


def _sigmoid(z: Array) -> Array:
    small = np.exp(-np.abs(z))
    result: Array = np.where(z < 0, small, 1) / (1 + small)
    return result


_SQUARED = _Elementwise(lambda y, t: np.square(y - t, dtype=np.float64), lambda y, t: 2 * (y - t))
_ABSOLUTE = _Elementwise(lambda y, t: np.abs(y - t), lambda y, t: np.sign(y - t))
_BINARY = _Elementwise(_logistic_loss, lambda z, t: _sigmoid(z) - t, ("logits", "targets"), most=1.0)


def _weights(name: str, value: ArrayLike, shape: tuple[int, ...], *, broadcast: bool = False) -> Array:
    """Finite numbers >= 0 of a shape, or that broadcast to it, as float64."""
    array = as_array(name, value)
    expected = f"{name}: expected numbers >= 0 {'that broadcast to' if broadcast else 'of'} shape {shape}"
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{expected}, got {describe(array)}")
    if broadcast and array.ndim <= len(shape):
        sizes = zip(array.shape[::-1], shape[::-1], strict=False)
        if all(size in (1, whole) for size, whole in sizes):
            array = np.broadcast_to(array, shape)
    if array.shape != shape:
        raise ValueError(f"{expected}, got {describe(array)}")
    if not (np.isfinite(array) & (array >= 0)).all():
        raise ValueError(f"{expected}, got {array.min()} to {array.max()}")
    return array.astype(np.float64)


def _row_weights(
    row_weights: ArrayLike | None, leading: tuple[int, ...], counts: Array | None
) -> tuple[Array | None, Array | None]:
    """Where a row counts, and the weights of the rows that do, float64 in one dimension; None where all are 1."""
    if row_weights is None:
        return counts, None
    weights = _weights("row_weights", row_weights, leading, broadcast=True)
    counts = _both(counts, weights > 0)
    return counts, weights[counts]


def _both(one: Array | None, other: Array) -> Array:
    return other if one is None else one & other


def _counting(values: Array, counts: Array | None) -> Array:
    """The rows that count, in two dimensions."""
    if counts is not None:
        return values[counts]
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def _valid_steps(name: str, values: Array, lengths: ArrayLike | None, batch_first: bool) -> Array | None:
    """Where a step is within its row, bool of the leading shape; None for everywhere."""
    if lengths is None:
        return None
    if values.ndim != 3:
        raise ValueError(f"lengths: expected {name} of 3 dimensions with them, got {name} of shape {values.shape}")
    B, T = values.shape[:2] if batch_first else values.shape[1::-1]
    inside: Array = np.arange(T) < row_lengths(lengths, T, B)[:, None]
    return inside if batch_first else inside.T


def _spread(rows: Array, counts: Array | None, like: Array) -> Array:
    """Gradients of the rows that count in the shape of all, zero elsewhere."""
    if counts is None:
        return rows.reshape(like.shape)
    full = np.zeros(like.shape, like.dtype)
    full[counts] = rows if like.ndim > 1 else rows[:, 0]
    return full
