"""The compiled handlers of `rnnkern.jax`: built on this machine at first use, kept, and registered with XLA.

XLA promises no ABI between versions of jaxlib, so no wheel could hold them for all: the 3 s of g++ are spent once for
each jaxlib, and the library stays in `$RNNKERN_CACHE_DIR`, by default `~/.cache/rnnkern`. What anybody else could
have written there is not loaded: the process then compiles for itself, and says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

import jax

from .. import __version__
from ..backends.native import native_module, unavailable

__all__ = ["HANDLERS", "cache_directory", "find_bytes", "registered"]

HANDLERS = ("rnnkern_xla_pack", "rnnkern_xla_forward", "rnnkern_xla_backward")

_SOURCE = Path(__file__).with_name("handlers.cpp")
_INCLUDE = Path(__file__).parents[1] / "include"
_OPTIONS = ("-std=c++17", "-O2", "-fPIC", "-shared")
_HASH = hashlib.sha256().digest_size
_lock = Lock()


class _Unavailable(Exception):
    """The handlers cannot be had here; the message says why."""


def registered() -> bool:
    """Whether XLA has the handlers; at first use compiles and registers them, or warns that it could not."""
    with _lock:
        return _register() is not None


def find_bytes(isa: str, cell: str, numbers: Sequence[int]) -> tuple[int, ...]:
    """Sizes that the kernels ask for, once `registered`; see `rnnkern_find_bytes` of handlers.cpp."""
    found, message = (ctypes.c_int64 * 3)(), ctypes.create_string_buffer(240)  # as in rnnkern_abi.h
    given = (ctypes.c_int64 * len(numbers))(*numbers)
    library: Any = _register()
    if not library.rnnkern_find_bytes(isa.encode(), cell.encode(), given, found, message):
        raise ValueError(message.value.decode())
    return tuple(found)


@cache
def _register() -> ctypes.CDLL | None:
    try:
        if native_module() is None:
            raise _Unavailable(unavailable())
        library = _library()
        module = ctypes.CDLL(native_module().__file__)
        if not all(hasattr(library, name) for name in ("rnnkern_connect", "rnnkern_find_bytes", *HANDLERS)):
            raise _Unavailable("what the C++ compiler made has no handlers")
        library.rnnkern_connect.restype = library.rnnkern_find_bytes.restype = ctypes.c_bool
        if not library.rnnkern_connect(module.rnnkern_abi):
            raise _Unavailable("the compiled kernels are of another version")
    except _Unavailable as error:
        warnings.warn(f"rnnkern.jax runs through jax.pure_callback, many times slower, because {error}", stacklevel=5)
        return None
    for name in HANDLERS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return library


def cache_directory() -> Path:
    """Where compiled code is kept from one process to the next."""
    chosen = os.environ.get("RNNKERN_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rnnkern"


def _library() -> ctypes.CDLL:
    """The handlers as a loaded library, compiled if there is none that fits."""
    digest = hashlib.sha256()
    for part in (_SOURCE.read_bytes(), (_INCLUDE / "rnnkern_abi.h").read_bytes(), *map(str.encode, _OPTIONS)):
        digest.update(hashlib.sha256(part).digest())
    name = f"jax-{version('jaxlib')}-{__version__}-{digest.hexdigest()[:16]}.so"
    try:
        directory = cache_directory()
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory = directory.resolve()
        _check_private(directory)
        kept = directory / name
        if not _intact(kept):
            with tempfile.TemporaryDirectory(dir=directory) as scratch:
                _compile(Path(scratch)).replace(kept)
        return ctypes.CDLL(str(kept))
    except (OSError, RuntimeError) as error:  # no home, or nothing can be written or loaded there
        warnings.warn(f"rnnkern.jax compiles its handlers in each process, some 3 s, because {error}", stacklevel=6)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return ctypes.CDLL(str(_compile(Path(scratch))))
    except OSError as error:
        raise _Unavailable(f"what the C++ compiler made cannot be loaded: {error}") from error


def _check_private(directory: Path) -> None:
    """Only this user and root may put files into a folder, or another folder in its place."""
    if not _written_by_us(directory.stat()):
        raise PermissionError(f"others own or may write to {directory}; run `chmod go-w` on it, or choose another one")
    for parent in directory.parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(f"others may write to {parent}, and so replace {directory}")


def _written_by_us(status: os.stat_result) -> bool:
    return status.st_uid in (0, os.getuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _intact(library: Path) -> bool:
    """Whether a file is ours and ends in the hash of the rest. To load half a library can kill the process."""
    try:
        status = library.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or not _written_by_us(status):
        return False
    content = library.read_bytes()
    return hashlib.sha256(content[:-_HASH]).digest() == content[-_HASH:]


def _compile(directory: Path) -> Path:
    chosen = os.environ.get("CXX", "")
    try:
        compiler = shlex.split(chosen) or [path for path in map(shutil.which, ("g++", "c++", "clang++")) if path][:1]
    except ValueError as error:
        raise _Unavailable(f"the environment variable CXX holds no command: {error} in {chosen!r}") from error
    if not compiler:
        raise _Unavailable("there is no C++ compiler; install g++, or name one in the environment variable CXX")
    library = directory / "handlers.so"
    include = (f"-I{path}" for path in (_INCLUDE, jax.ffi.include_dir()))
    command = [*compiler, *_OPTIONS, *include, str(_SOURCE), "-o", str(library)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise _Unavailable(f"the C++ compiler did not start: {error}") from error
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or error.stderr.splitlines()[-5:]
        raise _Unavailable("\n".join([f"{shlex.join(command)} failed:", *lines[:5]])) from error
    if not library.is_file():
        raise _Unavailable(f"{shlex.join(command)} made no file")
    content = library.read_bytes()
    library.write_bytes(content + hashlib.sha256(content).digest())
    library.chmod(0o700)  # whatever the umask
    return library
