"""What is narrower than float32: the precision of products, and formats for the weights of a frozen layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import describe

__all__ = ["check_arithmetic", "check_format", "check_precision", "copied", "round_to_bfloat16", "rounded"]

Array = NDArray[Any]


def check_precision(precision: object, dtype: np.dtype[Any]) -> str:
    """The precision of the products of a layer of this dtype."""
    if not isinstance(precision, str) or precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision: expected 'float32' or 'bfloat16', got {describe(precision)}")
    if precision == "bfloat16" and dtype != np.float32:
        raise ValueError(f"precision: expected 'bfloat16' with dtype float32 alone, got it with {dtype}")
    return precision


def check_arithmetic(arithmetic: object, precision: str, dtype: np.dtype[Any]) -> str:
    """The arithmetic of the products of a layer of this precision and dtype."""
    if not isinstance(arithmetic, str) or arithmetic not in ("fma", "amx"):
        raise ValueError(f"arithmetic: expected 'fma' or 'amx', got {describe(arithmetic)}")
    if arithmetic == "amx" and dtype != np.float32:
        raise ValueError(f"arithmetic: expected 'amx' with dtype float32 alone, got it with {dtype}")
    if arithmetic == "amx" and precision != "float32":
        raise ValueError(
            f"arithmetic: expected 'fma' with precision={precision!r}, whose products are a matrix engine's wherever "
            "there is one, got 'amx'"
        )
    return arithmetic


def check_format(weights: object, dtype: np.dtype[Any]) -> str:
    """The name of a format for the weights of a layer of this dtype; empty for None, the dtype itself."""
    if weights is None:
        return ""
    if weights != "bfloat16":
        raise ValueError(f"weights: expected None (the dtype of the layer) or 'bfloat16', got {describe(weights)}")
    if dtype != np.float32:
        raise ValueError(f"weights: expected None for a layer of {dtype}; 'bfloat16' is for float32, got {weights!r}")
    return "bfloat16"


def round_to_bfloat16(array: Array) -> Array:
    """The nearest bfloat16 numbers, ties to even, as float32; NaN stays NaN, and what is too large becomes infinite.

    >>> import numpy as np
    >>> round_to_bfloat16(np.float32([1.00390625, 1.01171875, 3.4e38])).tolist()
    [1.0, 1.015625, inf]
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    upper = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    quiet = bits & np.uint32(0xFFFF0000) | np.uint32(0x00400000)
    return np.where(np.isnan(array), quiet, upper).view(np.float32)


def copied(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of a layer-direction as they are."""
    return {key: array.copy() for key, array in weights.items()}


def rounded(weights: Mapping[str, Array]) -> dict[str, Array]:
    """The weights of a layer-direction with the values of their matrices in bfloat16; vectors stay as they are."""
    return {key: round_to_bfloat16(array) if array.ndim == 2 else array.copy() for key, array in weights.items()}
