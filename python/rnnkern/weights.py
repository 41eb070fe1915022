"""Save and load weights and training state: one file, written whole or not at all.

The file is an `.npz` archive, so `numpy.load(path)["layer/weight_ih_l0"]` reads a weight without this package. Beside
the arrays, one `.npy` member each, it holds `structure.json`: the mapping itself, with every scalar, and for each array
the name of its member. Where the path ends in `.safetensors` it is of that format, the structure in its metadata with a
checksum, and a weight is called `layer.weight_ih_l0` in it. Nothing in either is ever executed: no pickle.
"""

from __future__ import annotations

import atexit
import errno
import hashlib
import io
import json
import os
import re
import secrets
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from urllib.parse import quote

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # not on Windows, where the temporary files of killed saves stay
    fcntl = None  # type: ignore[assignment]

__all__ = ["load", "save"]

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]
Arrays = dict[str, NDArray[Any]]
Add = Callable[[Arrays, tuple[str, ...], NDArray[Any]], str]  # (arrays, keys, array) -> the name it has in the file

_STRUCTURE = "structure.json"
_FORMAT = "rnnkern 1"
_LARGEST_JSON_INTEGER = 2**63  # what other readers of JSON may be trusted with


def save(path: AnyPath, state: Mapping[str, Any]) -> None:
    """Write a nested mapping of arrays and scalars to `path`, whole or not at all.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and then take the name `path` in
    one step. Whatever fails before that, Ctrl-C included, leaves the previous file as it was. The new file has its
    permissions and, where that is allowed, its owner; a symbolic link stays one; a hard link keeps the previous
    contents. What saves of this file that were killed have left in the directory is removed. Arrays that another thread
    changes meanwhile are written as they are met.

    Parameters
    ----------
    path
        File to write; no suffix is added. One that ends in `.safetensors` is of that format, and needs the package
        `safetensors`; other programs find the arrays in it under their keys, joined by dots. Its arrays are
        little-endian: big-endian ones come back as such, of the same values.
    state
        Mapping from str to NumPy arrays and scalars, int, float, str, bool, None, and lists, tuples and mappings of
        these, such as `{"layer": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}`.

    Raises
    ------
    TypeError
        A key is no str, or a value none of the above (object arrays and other array classes included), or of a dtype
        that the format does not have.
    OSError
        The file cannot be written, is write-protected, or is a directory, a device, a FIFO or a socket.
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
    path = _path(path)
    form = _form(path)
    arrays: Arrays = {}
    structure = _encode(state, (), arrays, form.add)
    with _replacing(path) as file:
        form.write(file, structure, arrays)


def load(path: AnyPath) -> dict[str, Any]:
    """Read what `save` wrote: the same keys, values, shapes and dtypes.

    Parameters
    ----------
    path
        File to read. One that ends in `.safetensors` may also be of another program: then its arrays come back by
        their names, in one flat mapping.

    Raises
    ------
    OSError
        The file cannot be read, or is a directory, a device, a FIFO or a socket.
    ValueError
        It is damaged, truncated, compressed, was not written by `save` or has a dtype that NumPy has not. Of files of
        PyTorch and of NumPy the message says how to read them.
    ImportError
        The package `safetensors` is needed and not installed.

    Examples
    --------
    See `save`.
    """
    path = _path(path)
    form = _form(path)
    _status(path)
    data = path.read_bytes()
    try:
        state = form.read(data)
        if not isinstance(state, dict):
            raise ValueError("no mapping at the top")
    except Exception as error:  # zipfile, json, safetensors and numpy raise a dozen types over bytes not theirs
        reason = _foreign(data) or " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: expected {form.description}: {reason}") from error
    return state


def _path(path: AnyPath) -> Path:
    try:
        name = os.fsdecode(path)
    except TypeError:
        raise TypeError(f"path: expected a str, bytes or os.PathLike, got {type(path).__name__}") from None
    if not name or name.endswith(os.sep):
        raise IsADirectoryError(errno.EISDIR, "expected the name of a file", name)
    return Path(name)


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _status(path: Path) -> os.stat_result | None:
    """The status of a file, None where there is none; OSError where there is something else."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL  # the former makes it an IsADirectoryError
        raise OSError(number, f"expected a file, got {_KINDS.get(kind, 'something else')}", str(path))
    return status


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of another once it is whole; errors name that other."""
    before = _status(path)
    # Ask the bits too: the superuser may write to everything, and has protected this file all the same.
    if before and not (before.st_mode & 0o222 and os.access(path, os.W_OK)):
        raise PermissionError(errno.EACCES, "the file is write-protected", str(path))
    target = Path(os.path.realpath(path))  # a symbolic link stays one
    # Name the target by a hash, since its own name may be as long as names can be.
    prefix = f".rnnkern-{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]}-"
    try:
        _remove_abandoned(target.parent, prefix)
        temporary, file = _create(target.parent, prefix, before)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:  # Windows renames no open file
                    file.close()
                temporary.replace(target)
        finally:
            _forget(temporary)
    except OSError as error:
        if error.errno:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


_unfinished: set[tuple[int, Path]] = set()  # by process, since a fork has the set and not the thread that saves


@atexit.register
def _remove_unfinished() -> None:
    """Remove what a daemon thread will not finish."""
    for process, path in list(_unfinished):
        if process == os.getpid():
            with suppress(OSError):
                path.unlink()


def _forget(temporary: Path) -> None:
    """Remove a temporary file where it is still there."""
    with suppress(OSError):
        temporary.unlink()
    _unfinished.discard((os.getpid(), temporary))


def _create(folder: Path, prefix: str, like: os.stat_result | None) -> tuple[Path, BinaryIO]:
    """A new temporary file, locked for as long as it is open, with the owner and the permissions of another."""
    path = folder / f"{prefix}{secrets.token_hex(8)}.tmp"
    permissions = stat.S_IMODE(like.st_mode) if like else 0o666  # less the umask
    _unfinished.add((os.getpid(), path))
    try:
        file = open(path, "xb", opener=partial(os.open, mode=permissions))  # noqa: SIM115
        try:
            taken = _taken(path, file)
            if like and not taken:
                with suppress(OSError):  # the owner is for the superuser to change
                    os.chown(path, like.st_uid, like.st_gid)
                with suppress(OSError):  # a file system without permissions
                    path.chmod(permissions)
        except BaseException:
            file.close()
            raise
    except BaseException:
        _forget(path)
        raise
    if not taken:
        return path, file
    file.close()
    _forget(path)
    return _create(folder, prefix, like)  # of another name, which the other save does not have in its hands


def _taken(path: Path, file: BinaryIO) -> bool:
    """Lock a new file; whether another save takes it for abandoned, since it was not locked until now."""
    try:
        _lock(file)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return not path.exists()


def _lock(file: BinaryIO) -> None:
    """Lock a file until it is closed or its process ends; OSError where another has locked it."""
    if fcntl is None:
        raise OSError(errno.ENOTSUP, "no locks on this system")
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_abandoned(folder: Path, prefix: str) -> None:
    """Remove the temporary files that no process holds any more: those of saves that were killed."""
    if fcntl is None:
        return
    pattern = re.compile(re.escape(prefix) + "[0-9a-f]{16}[.]tmp")
    with suppress(PermissionError):  # a directory that may be written to and not read
        for path in folder.iterdir():
            if pattern.fullmatch(path.name):
                with suppress(OSError), open(path, "rb", opener=_without_waiting) as file:
                    _lock(file)
                    path.unlink()


def _without_waiting(name: str, flags: int) -> int:
    """Open no link, and a FIFO without waiting for its writer."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


_THEN = ", and rnnkern.convert.from_torch takes them"
_TORCH_LEGACY = re.compile(rb"\x80.\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19", re.DOTALL)


def _foreign(data: bytes) -> str | None:
    """Which other program writes such a file, and how to read it; None where that is not known."""
    names: list[str] = []
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:  # zipfile raises half a dozen types
        names = archive.namelist()
    of_torch = [name for name in names if name.endswith("/data.pkl")]
    if any(name.endswith("/constants.pkl") for name in names) and of_torch:
        return "it is a program of PyTorch: torch.jit.load(path).state_dict() has its weights" + _THEN
    if of_torch or _TORCH_LEGACY.match(data):
        return "it is a file of PyTorch: torch.load(path, weights_only=True) reads its tensors" + _THEN
    if names and _STRUCTURE not in names and all(name.endswith(".npy") for name in names):
        return "it is an archive of numpy.savez: dict(numpy.load(path)) reads it"
    if data.startswith(b"\x93NUMPY"):
        return "it is an array of numpy.save: numpy.load(path) reads it"
    if data.startswith(b"\x89HDF\r\n\x1a\n") or "model.weights.h5" in names:
        return "it is a file of HDF5 or Keras: keras reads it, and rnnkern.convert.from_keras takes the weights"
    if re.match(rb"\x80[\x02-\x05]", data):
        return "it is a pickle: pickle.load or joblib.load reads it, of a file that you trust"
    return None


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
        try:
            array = take(content)
        except KeyError:
            raise ValueError(f"the array {content!r} is missing, or asked for twice") from None
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


def _form(path: Path) -> _Form:
    """The format that the suffix of a path asks for."""
    if path.suffix != ".safetensors":
        return _NPZ
    _safetensors()
    return _SAFETENSORS


_LONGEST_DTYPE = 8_000  # characters; NumPy reads no header of over 10,000, of which the most dimensions take 1,400


def _add_npz(arrays: Arrays, keys: tuple[str, ...], array: NDArray[Any]) -> str:
    described = npy.dtype_to_descr(array.dtype)
    if array.dtype.hasobject or npy.descr_to_dtype(described) != array.dtype or len(str(described)) > _LONGEST_DTYPE:
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
        members = {member.filename: member for member in archive.infolist()}
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise ValueError("its members are compressed, and those of `save` never are; pack them again without")
        # A small file may claim that its members are large, or that they lie on each other.
        if len(members) < len(archive.infolist()) or sum(one.file_size for one in members.values()) > len(data):
            raise ValueError("its members overlap")

        def read(name: str) -> bytes:
            # Take each member once, and whole, so that its checksum is verified before its header is believed.
            return archive.read(members.pop(name))

        return _decode(
            _parse(read(_STRUCTURE))["state"],
            lambda name: npy.read_array(io.BytesIO(read(name + ".npy")), allow_pickle=False),
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
        raise ImportError(f"a path that ends in .safetensors: {error}; python -m pip install safetensors") from error
    module: ModuleType = safetensors
    return module


def _add_safetensors(arrays: Arrays, keys: tuple[str, ...], array: NDArray[Any]) -> str:
    dtype = array.dtype.newbyteorder("<")  # the byte order of the format
    if dtype not in _SAFETENSORS_DTYPES.values():
        raise TypeError(f"{_where(keys)}: expected a dtype that .safetensors files can hold, got {array.dtype}")
    name = ".".join(keys).encode(errors="replace").decode()
    while name in arrays or name == "__metadata__":
        name += "'"
    arrays[name] = np.array(array, dtype, order="C")  # a copy, so that what is written is what the checksum is of
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
    return _decode(content["state"], arrays.pop)  # each once


_SAFETENSORS = _Form("a whole safetensors file", _add_safetensors, _write_safetensors, _read_safetensors)
