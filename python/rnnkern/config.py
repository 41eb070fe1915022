"""What this installation is made of, and its two switches: threads and instruction set."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, overload

from . import backends
from .backends.native import native_module

__all__ = ["isas", "num_threads", "set_num_threads", "show_config", "use_isa"]


def num_threads() -> int:
    """The most threads a call uses: min(physical cores, affinity, cgroup quota) unless lowered.

    >>> num_threads() >= 1
    True
    """
    native = native_module()
    return 1 if native is None else native.num_threads()


def set_num_threads(count: int) -> None:
    """Set the most threads a call uses, in this process from now on. Results do not depend on it, to the last bit.

    Raises
    ------
    TypeError, ValueError
        count is not an integer, or is below 1.

    Examples
    --------
    >>> before = num_threads()
    >>> set_num_threads(1)
    >>> num_threads()
    1
    >>> set_num_threads(before)
    """
    if isinstance(count, bool) or not hasattr(count, "__index__"):
        raise TypeError(f"count: expected an integer, got {type(count).__name__}")
    if count < 1:
        raise ValueError(f"count: expected at least 1, got {count}")
    native = native_module()
    if native is not None:
        native.set_num_threads(min(int(count), 1 << 20))


def isas() -> list[str]:
    """The instruction sets the kernels were compiled for and this CPU runs, best first; empty without kernels.

    >>> isinstance(isas(), list)
    True
    """
    native = native_module()
    return [] if native is None else [name for name, supported in native.isas() if supported]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Pack weights for another instruction set while the context lasts. The environment's RNNKERN_MAX_ISA sets the
    best one for a whole process.

    Raises
    ------
    ValueError
        The CPU does not run it, or there is none of that name.
    """
    native = native_module()
    if native is None or name not in isas():
        raise ValueError(f"isa: expected one of {', '.join(isas()) or 'none'}, got {name!r}")
    before = native.isa()
    native.use_isa(name)
    try:
        yield
    finally:
        native.use_isa(before)


_LONG = 10**9  # ns; of a call that is worth waking helpers for, long after the one before


def _threads_now() -> str:
    """What the policy of the threads would decide for a long call at this moment."""
    native = native_module()
    if native is None:
        return "1 wanted: the kernels are not compiled"
    wanted, (cpus, runnable) = native.num_threads(), native.supply()
    helpers, _ = native.decide(
        threads=wanted, expected_ns=_LONG, since_last=_LONG, cpus=cpus, runnable=runnable, awake=0
    )
    busy = f"{runnable} threads of this machine run or wait" if runnable else "how many are busy is not known"
    return f"{wanted} wanted; {cpus} CPUs, {busy}; a long call would ask {helpers} helpers"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # imported, and not from a file
        return True


_OPTIONAL = ("numba", "torch", "onnx", "rich", "matplotlib", "threadpoolctl")


@overload
def show_config(mode: Literal["text"] = "text") -> None: ...
@overload
def show_config(mode: Literal["dicts"]) -> dict[str, Any]: ...
def show_config(mode: str = "text") -> dict[str, Any] | None:
    """Print the configuration, or return it as a dict.

    Keys: compiler (None without kernels), isas_built, isa (in use), bfloat16 (whether `precision="bfloat16"` has an
    instruction of this CPU), engine (what multiplies bfloat16: a matrix engine, "amx" or "emulated", or one that
    multiplies float16 too, "amx-fp16" or "emulated-fp16"; "pairs" or "none"; None without kernels), threads,
    threads_now (a sentence: how many of them a long call would take at this moment, beside what else runs), backends
    (by name None, or why it cannot run), optional (by package, whether it is there).

    Raises
    ------
    ValueError
        mode is neither "text" nor "dicts".

    Examples
    --------
    >>> show_config(mode="dicts")["threads"] >= 1
    True
    """
    if mode not in ("text", "dicts"):
        raise ValueError(f"mode: expected 'text' or 'dicts', got {mode!r}")
    native = native_module()
    config: dict[str, Any] = {
        "compiler": None if native is None else native.compiler,
        "isas_built": [] if native is None else [name for name, _ in native.isas()],
        "isa": None if native is None else native.isa(),
        "bfloat16": native is not None and native.engine() in ("pairs", "amx", "amx-fp16"),
        "engine": None if native is None else native.engine(),
        "threads": num_threads(),
        "threads_now": _threads_now(),
        "backends": {name: backends.get(name).unavailable() for name in backends.backend_names()},
        "optional": {name: _is_installed(name) for name in _OPTIONAL},
    }
    if mode == "dicts":
        return config
    for key, value in config.items():
        print(f"{key:<11}", value)  # noqa: T201
    return None


def _register_with_threadpoolctl() -> None:
    """Let `threadpoolctl.threadpool_limits` see and limit the team, where threadpoolctl is installed."""
    try:
        import threadpoolctl
    except ImportError:
        return
    if native_module() is None or not hasattr(threadpoolctl, "register"):  # from threadpoolctl 3.2 on
        return

    class RnnkernController(threadpoolctl.LibController):  # type: ignore[misc]
        user_api = "rnnkern"
        internal_api = "rnnkern"
        filename_prefixes = ("_rnnkern_native",)
        check_symbols = ("rnnkern_get_num_threads", "rnnkern_set_num_threads")

        def get_num_threads(self) -> int:
            return int(self.dynlib.rnnkern_get_num_threads())

        def set_num_threads(self, num_threads: int) -> None:
            self.dynlib.rnnkern_set_num_threads(num_threads)

        def get_version(self) -> str | None:
            return None

        def set_additional_attributes(self) -> None:
            pass

    threadpoolctl.register(RnnkernController)


_register_with_threadpoolctl()
