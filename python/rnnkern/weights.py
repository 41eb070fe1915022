"""Save and load weights and training state: one file, written whole or not at all.

The file is an `.npz` archive, so `numpy.load(path)["layer/weight_ih_l0"]` reads a weight without this package. Beside
the arrays, one `.npy` member each, it holds `structure.json`: the mapping itself, with every scalar, and for each array
the name of its member. Nothing in it is ever executed: no pickle.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

__all__ = ["load", "save"]

_STRUCTURE = "structure.json"
_FORMAT = "rnnkern 1"
_LARGEST_JSON_INTEGER = 2**63  # what other readers of JSON may be trusted with


def save(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write a nested mapping of arrays and scalars to `path`, whole or not at all.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and then take the name `path` in
    one step. Whatever fails before that, Ctrl-C included, leaves the previous file as it was.

    Parameters
    ----------
    path
        File to write; no suffix is added.
    state
        Mapping from str to NumPy arrays and scalars, int, float, str, bool, None, and lists, tuples and mappings of
        these, such as `{"layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}`.

    Raises
    ------
    TypeError
        A key is no str, or a value none of the above (object arrays and other array classes included).
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import tempfile, pathlib, numpy as np
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.npz"
    >>> save(path, {"layer": {"weight": np.ones((2, 3))}, "epoch": 3})
    >>> load(path)
    {'layer': {'weight': array([[1., 1., 1.],
           [1., 1., 1.]])}, 'epoch': 3}
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
    arrays: dict[str, NDArray[Any]] = {}
    structure = _encode(state, (), arrays)
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                for name, array in arrays.items():
                    # ZipInfo's fixed date: equal states give equal files.
                    with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                        npy.write_array(member, array, allow_pickle=False)
                text = json.dumps({"format": _FORMAT, "state": structure}, indent=1)
                archive.writestr(zipfile.ZipInfo(_STRUCTURE), text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save` wrote: the same keys, values, shapes and dtypes.

    Parameters
    ----------
    path
        File to read.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is damaged, truncated, or was not written by `save`.

    Examples
    --------
    See `save`.
    """
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            content = json.loads(archive.read(_STRUCTURE))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}, expected {_FORMAT!r}")
            state = _decode(content["state"], archive)
        if not isinstance(state, dict):
            raise ValueError("no mapping at the top")
    except Exception as error:  # zipfile, json and numpy raise a dozen types over bytes that are not theirs
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)}: expected a whole file written by rnnkern.save: {reason}") from error
    return state


def _encode(value: Any, keys: tuple[str, ...], arrays: dict[str, NDArray[Any]]) -> Any:
    """The value as JSON; arrays go into `arrays`. A JSON object is always {kind: content}."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{_where(keys)}: expected keys of type str, got {key!r}")
        return {"mapping": {key: _encode(one, (*keys, key), arrays) for key, one in value.items()}}
    if type(value) in (list, tuple):
        parts = [_encode(one, (*keys, str(index)), arrays) for index, one in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    if type(value) is int and not -_LARGEST_JSON_INTEGER <= value < _LARGEST_JSON_INTEGER:
        return {"integer": hex(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) or type(value) in (np.ndarray, np.memmap):
        array = np.asarray(value)
        if array.dtype.hasobject or npy.descr_to_dtype(npy.dtype_to_descr(array.dtype)) != array.dtype:
            raise TypeError(f"{_where(keys)}: expected a dtype that .npy files can hold, got {array.dtype}")
        name = "/".join(quote(key, safe="", errors="surrogatepass") for key in keys)
        arrays[name] = array
        return {"scalar" if isinstance(value, np.generic) else "array": name}
    raise TypeError(
        f"{_where(keys)}: expected an array, int, float, str, bool, None, list, tuple or mapping, "
        f"got {type(value).__name__}"
    )


def _where(keys: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in keys)


def _decode(value: Any, archive: zipfile.ZipFile) -> Any:
    """Mirror of `_encode`."""
    if isinstance(value, list):
        return [_decode(one, archive) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "mapping":
        return {key: _decode(one, archive) for key, one in content.items()}
    if kind == "tuple":
        return tuple(_decode(one, archive) for one in content)
    if kind == "integer":
        return int(content, 16)
    if kind in ("array", "scalar"):
        # The whole member first, so that its checksum is verified before its header is believed.
        array = npy.read_array(io.BytesIO(archive.read(content + ".npy")), allow_pickle=False)
        return array if kind == "array" else array[()]
    raise ValueError(f"unknown kind of value {kind!r}")
