"""Save and load weights and training state: one file, written whole or not at all.

The file is an `.npz` archive, so `numpy.load(path)["layer/weight_ih_l0"]` reads a weight without this package. Beside
the arrays, one `.npy` member each, it holds `structure.json`: the mapping itself, with every scalar, and for each array
the name of its member. Where the path ends in `.safetensors` it is of that format, the structure in its metadata with a
checksum, and a weight is called `layer.weight_ih_l0` in it. Nothing in either is ever executed: no pickle.
"""

from __future__ import annotations

import io
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

__all__ = ["load", "save"]

Arrays = dict[str, NDArray[Any]]
Add = Callable[[Arrays, tuple[str, ...], NDArray[Any]], str]  # (arrays, keys, array) -> the name it has in the file

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
        File to write; no suffix is added. One that ends in `.safetensors` is of that format, and needs the package
        `safetensors`; other programs find the arrays in it under their keys, joined by dots.
    state
        Mapping from str to NumPy arrays and scalars, int, float, str, bool, None, and lists, tuples and mappings of
        these, such as `{"layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}`.

    Raises
    ------
    TypeError
        A key is no str, or a value none of the above (object arrays and other array classes included), or of a dtype
        that the format does not have.
    OSError
        The file cannot be written.
    ImportError
        The package `safetensors` is needed and not installed.

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
    form = _form(path)
    arrays: Arrays = {}
    structure = _encode(state, (), arrays, form.add)
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            form.write(file, structure, arrays)
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
        File to read. One that ends in `.safetensors` may also be of another program: then its arrays come back by
        their names, in one flat mapping.

    Raises
    ------
    OSError
        The file cannot be read.
    ValueError
        It is damaged, truncated, was not written by `save` or has a dtype that NumPy has not.
    ImportError
        The package `safetensors` is needed and not installed.

    Examples
    --------
    See `save`.
    """
    form = _form(path)
    data = Path(path).read_bytes()
    try:
        state = form.read(data)
        if not isinstance(state, dict):
            raise ValueError("no mapping at the top")
    except Exception as error:  # zipfile, json, safetensors and numpy raise a dozen types over bytes not theirs
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{os.fspath(path)}: expected {form.description}: {reason}") from error
    return state


def _encode(value: Any, keys: tuple[str, ...], arrays: Arrays, add: Add) -> Any:
    """The value as JSON; `add` puts arrays into `arrays` and names them. A JSON object is always {kind: content}."""
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{_where(keys)}: expected keys of type str, got {key!r}")
        return {"mapping": {key: _encode(one, (*keys, key), arrays, add) for key, one in value.items()}}
    if type(value) in (list, tuple):
        parts = [_encode(one, (*keys, str(index)), arrays, add) for index, one in enumerate(value)]
        return parts if type(value) is list else {"tuple": parts}
    if type(value) is int and not -_LARGEST_JSON_INTEGER <= value < _LARGEST_JSON_INTEGER:
        return {"integer": hex(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic) or type(value) in (np.ndarray, np.memmap):
        return {"scalar" if isinstance(value, np.generic) else "array": add(arrays, keys, np.asarray(value))}
    raise TypeError(
        f"{_where(keys)}: expected an array, int, float, str, bool, None, list, tuple or mapping, "
        f"got {type(value).__name__}"
    )


def _where(keys: tuple[str, ...]) -> str:
    return "state" + "".join(f"[{key!r}]" for key in keys)


def _decode(value: Any, take: Callable[[str], NDArray[Any]]) -> Any:
    """Mirror of `_encode`; `take` gives the array of a name."""
    if isinstance(value, list):
        return [_decode(one, take) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "mapping":
        return {key: _decode(one, take) for key, one in content.items()}
    if kind == "tuple":
        return tuple(_decode(one, take) for one in content)
    if kind == "integer":
        return int(content, 16)
    if kind in ("array", "scalar"):
        array = take(content)
        return array if kind == "array" else array[()]
    raise ValueError(f"unknown kind of value {kind!r}")


def _parse(text: str | bytes) -> dict[str, Any]:
    """The JSON that holds the structure of a state, under "state"."""
    content: dict[str, Any] = json.loads(text)
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r}, expected {_FORMAT!r}")
    return content


@dataclass(frozen=True)
class _Form:
    """A format of files."""

    description: str
    add: Add  # raises TypeError for a dtype that the format does not have
    write: Callable[[BinaryIO, Any, Arrays], None]
    read: Callable[[bytes], Any]  # raises anything where the bytes are not whole


def _form(path: str | os.PathLike[str]) -> _Form:
    """The format that the suffix of a path asks for."""
    if Path(path).suffix != ".safetensors":
        return _NPZ
    _safetensors()
    return _SAFETENSORS


def _add_npz(arrays: Arrays, keys: tuple[str, ...], array: NDArray[Any]) -> str:
    if array.dtype.hasobject or npy.descr_to_dtype(npy.dtype_to_descr(array.dtype)) != array.dtype:
        raise TypeError(f"{_where(keys)}: expected a dtype that .npy files can hold, got {array.dtype}")
    name = "/".join(quote(key, safe="", errors="surrogatepass") for key in keys)
    arrays[name] = array
    return name


def _write_npz(file: BinaryIO, structure: Any, arrays: Arrays) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            # ZipInfo's fixed date: equal states give equal files.
            with archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True) as member:
                npy.write_array(member, array, allow_pickle=False)
        text = json.dumps({"format": _FORMAT, "state": structure}, indent=1)
        archive.writestr(zipfile.ZipInfo(_STRUCTURE), text)


def _read_npz(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # Each member whole first, so that its checksum is verified before its header is believed.
        return _decode(
            _parse(archive.read(_STRUCTURE))["state"],
            lambda name: npy.read_array(io.BytesIO(archive.read(name + ".npy")), allow_pickle=False),
        )


_NPZ = _Form("a whole file written by rnnkern.save", _add_npz, _write_npz, _read_npz)

_SAFETENSORS_KEY = "rnnkern"  # the one entry of ours in the metadata, whose order in the file is random
_SAFETENSORS_DTYPES = {
    name: np.dtype(code)
    for name, code in {
        "F64": "<f8", "F32": "<f4", "F16": "<f2", "C64": "<c8", "BOOL": "?",
        "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
        "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    }.items()
}  # fmt: skip


def _safetensors() -> ModuleType:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(f'a path that ends in .safetensors: {error}; pip install "rnnkern[safetensors]"') from error
    module: ModuleType = safetensors
    return module


def _add_safetensors(arrays: Arrays, keys: tuple[str, ...], array: NDArray[Any]) -> str:
    if array.dtype not in _SAFETENSORS_DTYPES.values():
        raise TypeError(f"{_where(keys)}: expected a dtype that .safetensors files can hold, got {array.dtype}")
    name = ".".join(keys).encode(errors="replace").decode()
    while name in arrays or name == "__metadata__":
        name += "'"
    arrays[name] = np.asarray(array, order="C")
    return name


def _checksum(structure: Any, arrays: Arrays) -> int:
    """Of everything that comes back; the format has none of its own."""
    crc = zlib.crc32(json.dumps(structure).encode())
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(f"{name} {array.dtype.str} {array.shape}".encode(), crc)
        crc = zlib.crc32(array.data, crc)
    return crc


def _write_safetensors(file: BinaryIO, structure: Any, arrays: Arrays) -> None:
    text = json.dumps({"format": _FORMAT, "crc32": _checksum(structure, arrays), "state": structure})
    file.write(_safetensors().numpy.save(arrays, {_SAFETENSORS_KEY: text}))


def _read_safetensors(data: bytes) -> Any:
    given = dict(_safetensors().deserialize(data))  # checks that sizes and offsets fit the data
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = header.pop("__metadata__", None) or {}
    arrays = {}
    for name in header:  # the order of the file; `deserialize` has none
        tensor = given[name]
        if tensor["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name!r} is of dtype {tensor['dtype']}, which NumPy does not have")
        arrays[name] = np.frombuffer(tensor["data"], _SAFETENSORS_DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    # Ours by the key or by the value, so that damage to either is not taken for another program's file.
    if not any(key == _SAFETENSORS_KEY or f'"{_FORMAT}"' in text for key, text in metadata.items()):
        return arrays
    content = _parse(metadata[_SAFETENSORS_KEY])
    if content["crc32"] != _checksum(content["state"], arrays):
        raise ValueError("its contents do not match their checksum")
    return _decode(content["state"], arrays.__getitem__)


_SAFETENSORS = _Form("a whole safetensors file", _add_safetensors, _write_safetensors, _read_safetensors)
