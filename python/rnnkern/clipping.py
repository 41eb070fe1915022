"""Clipping of gradients: by the norm of all of them together, or element by element."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import positive
from .backends.native import native_module

__all__ = ["clip_grad_norm", "clip_grad_value", "items_of", "mappings_of"]

Array = NDArray[Any]

_FLOATS = (np.dtype(np.float32), np.dtype(np.float64))


def clip_grad_norm(grads: Any, max_norm: float) -> float:
    """Scale all gradients together so that their joint 2-norm is at most `max_norm`, in place.

    The norm is taken over every element of every parameter as one vector. Where it exceeds `max_norm`, everything is
    multiplied by max_norm / (norm + 1e-6), as in `torch.nn.utils.clip_grad_norm_` (Pascanu et al. 2013).

    Parameters
    ----------
    grads
        What `backward` returns, or a mapping from names to arrays, or a sequence of such. What `backward(max_norm=)`
        has measured is not measured again: leave those gradients as they are in between.
    max_norm
        Positive; infinity only measures.

    Returns
    -------
    norm : float
        The norm before clipping, computed without overflow. Where it is NaN or infinite, nothing was scaled.

    Raises
    ------
    TypeError, ValueError
        grads hold something other than writable real arrays, or max_norm is not positive.

    Examples
    --------
    >>> gradients = {"weight": np.array([3.0, 4.0])}
    >>> clip_grad_norm([gradients], 1.0), gradients["weight"].round(3).tolist()
    (5.0, [0.6, 0.8])
    """
    limit = positive("max_norm", max_norm, finite=False)
    layers = grads if isinstance(grads, Sequence) else [grads]
    arrays = list(_writable(grads))
    norms = [_norm_of_layer(one) for one in layers]
    norm = math.hypot(*norms)
    factor = scale_down(arrays, norm, limit)
    _remember(layers, [one * factor for one in norms])
    return norm


def clip_grad_value(grads: Any, value: float) -> None:
    """Clip every element of every gradient to [-value, value], in place. NaN stays NaN.

    Parameters
    ----------
    grads
        What `backward` returns, or a mapping from names to arrays, or a sequence of such.
    value
        Positive.

    Raises
    ------
    TypeError, ValueError
        grads hold something other than writable real arrays, or value is not positive.

    Examples
    --------
    >>> gradients = {"weight": np.array([3.0, -0.5])}
    >>> clip_grad_value([gradients], 1.0)
    >>> gradients["weight"].tolist()
    [1.0, -0.5]
    """
    limit = positive("value", value, finite=False)
    for array in list(_writable(grads)):
        np.clip(array, -limit, limit, out=array)
    _remember(grads if isinstance(grads, Sequence) else [grads], None)


def mappings_of(name: str, values: Any) -> list[Mapping[str, Array]]:
    """One or several layers' mappings; an object with `.parameters` stands for that."""
    several = values if isinstance(values, Sequence) else [values]
    found = []
    for index, one in enumerate(several):
        mapping = getattr(one, "parameters", one)
        if not isinstance(mapping, Mapping):
            raise TypeError(f"{name}[{index}]: expected a mapping of names to arrays, got {type(one).__name__}")
        found.append(mapping)
    return found


def items_of(mappings: Sequence[Mapping[str, Array]]) -> Iterator[tuple[int, str, Array]]:
    for index, mapping in enumerate(mappings):
        for name, array in mapping.items():
            yield index, name, array


def _writable(grads: Any) -> Iterator[Array]:
    for index, name, array in items_of(mappings_of("grads", grads)):
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            got = getattr(array, "dtype", type(array).__name__)
            raise TypeError(f"grads[{index}][{name!r}]: expected an array of floats, got {got}")
        if not array.flags.writeable:
            raise ValueError(f"grads[{index}][{name!r}]: expected a writable array, to be clipped in place")
        yield array


def _remember(layers: Sequence[Any], norms: Sequence[float] | None) -> None:
    """What the norms are now of those whose norm was known; None where it must be measured again."""
    for index, one in enumerate(layers):
        if getattr(one, "known_norm", None) is not None:
            one.remember_norm(None if norms is None else norms[index])


def _norm_of_layer(grads: Any) -> float:
    """The 2-norm of the gradients of one layer, as it is known or measured now."""
    known: float | None = getattr(grads, "known_norm", None)
    return norm_of([array for _, _, array in items_of(mappings_of("grads", grads))]) if known is None else known


def norm_of(arrays: list[Array]) -> float:
    """The 2-norm of all elements."""
    with np.errstate(all="ignore"):
        total = _sum_of_squares(arrays)
        if math.isnan(total) or 1e-280 < total < math.inf:
            return math.sqrt(total)
        # Squares are not in range where the norm may be.
        largest = max((float(np.abs(array).max()) for array in arrays if array.size), default=0.0)
        if largest == 0 or math.isinf(largest):
            return largest
        return largest * math.sqrt(sum(float(np.square(array / largest, dtype=np.float64).sum()) for array in arrays))


def scale_down(arrays: list[Array], norm: float, limit: float) -> float:
    """Scale arrays of this norm together, in place, so that it is at most the limit; returns the factor."""
    factor = limit / (norm + 1e-6)
    if not math.isfinite(norm) or factor >= 1:
        return 1.0
    for array in arrays:
        array *= factor
    return factor


def _sum_of_squares(arrays: list[Array]) -> float:
    """In float64, by the rows of a matrix, in an order that does not depend on threads."""
    if native_module() is not None and all(map(_is_exact, arrays)):
        return float(native_module().sum_of_squares(arrays))
    flat = [array.ravel(order="K") for array in arrays]
    # einsum goes through a small buffer, whatever the dtype.
    return sum(float(np.einsum("i,i->", one, one, dtype=np.float64)) for one in flat)


def _is_exact(array: Array) -> bool:
    flags = array.flags
    return array.ndim in (1, 2) and array.dtype in _FLOATS and flags.c_contiguous and flags.aligned
