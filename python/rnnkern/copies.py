"""What becomes of arrays in copies: pickle, `copy`, joblib, another process."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

__all__ = ["owned", "shared"]

Array = NDArray[Any]


class _Shared:
    """An array on its way into a copy, where it arrives as a plain array again.

    There is one such object for each array, so that whatever refers to the same array still does so in the copy:
    picklers remember objects, and joblib's, which writes an array anew each time it meets it, remembers these.
    """

    def __init__(self, array: Array) -> None:
        self._array = array

    def __reduce__(self) -> tuple[Any, ...]:
        return owned, (self._array,)


class _Known(threading.local):
    """Those of each thread, since a copy is made in one and a `setdefault` of two at once may give each its own."""

    def __init__(self) -> None:
        self.by_id: WeakValueDictionary[int, _Shared] = WeakValueDictionary()  # of the array, which lives as long


_known = _Known()


def shared(value: Any) -> Any:
    """The value for `__getstate__`: its arrays, in tuples, lists and dicts too, in the form that is copied."""
    if isinstance(value, np.ndarray):
        return _known.by_id.setdefault(id(value), _Shared(value))
    if isinstance(value, dict):
        return {key: shared(one) for key, one in value.items()}
    return type(value)(shared(one) for one in value) if isinstance(value, tuple | list) else value


def owned(array: Array) -> Array:
    """The array where it is writable and its memory its own, else a copy: of a file mapped by joblib, of a buffer that
    pickle was given beside its bytes.
    """
    root: Any = array
    while isinstance(root, np.ndarray) and root.base is not None:
        root = root.base
    own = type(array) is np.ndarray and isinstance(root, np.ndarray | bytearray)
    return array if own and array.flags.carray else np.array(array, order="C")
