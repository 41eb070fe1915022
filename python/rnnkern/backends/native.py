"""The compiled kernels; see csrc/."""

from __future__ import annotations

import importlib
import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray

from ..cores import default_threads
from ..stack import Backward, Forward, Stack, State, Wanted

_native: Any
try:
    _native = importlib.import_module("rnnkern._rnnkern_native")
except ImportError as error:
    _native, _import_error = None, str(error)
else:
    _built, _limit = [isa for isa, _ in _native.isas()], os.environ.get("RNNKERN_MAX_ISA")
    if _limit and _limit not in _built:
        raise ValueError(f"RNNKERN_MAX_ISA: expected one of {', '.join(_built)}, got {_limit!r}")
    _engine = os.environ.get("RNNKERN_AMX")
    if _engine and _engine not in ("off", "emulated", "emulated-fp16"):
        raise ValueError(f"RNNKERN_AMX: expected 'off', 'emulated' or 'emulated-fp16', got {_engine!r}")
    _asked = os.environ.get("RNNKERN_NUM_THREADS") or "1"  # empty: not set
    if not _asked.isdecimal() or int(_asked) < 1:
        raise ValueError(f"RNNKERN_NUM_THREADS: expected a positive integer, got {_asked!r}")
    _native.set_num_threads(default_threads())

__all__ = [
    "backward",
    "build_failure",
    "forward",
    "frozen_call",
    "has_engines",
    "linear_backward",
    "linear_forward",
    "missing_engine",
    "name",
    "native_module",
    "pack",
    "plan",
    "reserve",
    "rounds_operands",
    "run",
    "stream",
    "unavailable",
]

Array = NDArray[Any]

name = "native"
watches = True
rounds_operands = True
has_engines = True


def native_module() -> Any:
    """The compiled module, None where it is missing."""
    return _native


def missing_engine() -> str | None:
    """See `backends`."""
    if _native.engine() not in ("none", "pairs"):
        return None
    return (
        "arithmetic: 'amx' needs a CPU with a matrix engine (Intel AMX) and kernels for AVX-512; products are made by "
        "multiply-adds here, as accurately; RNNKERN_AMX=emulated has the engine's bits, slowly"
    )


def build_failure() -> str | None:
    """The last lines the compiler printed when the package was installed without its kernels, else None."""
    path = Path(__file__).parent.parent / "_build_failure.txt"
    return path.read_text() if path.exists() else None


def unavailable() -> str | None:
    """Why the compiled kernels are not there, with the command that mends it; None if they are."""
    if _native is not None:
        return None
    reason = "the kernels did not compile, see `rnnkern doctor`" if build_failure() else _import_error
    # Without --no-cache-dir pip would take the wheel that it has just built without kernels.
    command = f"python -m pip install --force-reinstall --no-deps --no-cache-dir {_source()}"
    return f"{reason}; install g++ and the Python headers, then: {command}"


def _source() -> str:
    """What this package was installed from, as an argument of pip."""
    try:
        record = metadata.distribution("rnnkern").read_text("direct_url.json")
    except metadata.PackageNotFoundError:  # run from the checkout
        return shlex.quote(str(Path(__file__).parents[3]))
    if record is None:  # by its name
        return "rnnkern"
    origin = json.loads(record)
    url: str = origin["url"]
    path = shlex.quote(url2pathname(urlsplit(url).path) if url.startswith("file:") else url)
    return f"--editable {path}" if origin.get("dir_info", {}).get("editable") else path


def pack(stack: Stack, weights: Sequence[Mapping[str, Array]], training: bool) -> Any:
    """See `backends`."""
    return _native.pack(stack.description, stack.weight_names["b_ih" in weights[0]], weights, training)


def run(stack: Stack, weights: Sequence[Mapping[str, Array]], call: Forward) -> tuple[Any, State, Any]:
    """See `backends`."""
    names = stack.weight_names["b_ih" in weights[0]]
    results: tuple[Any, State, Any] = _native.run(stack.description, names, weights, call)
    return results


def reserve() -> Any:
    """See `backends`."""
    return _native.reserve()


def forward(stack: Stack, packed: Any, call: Forward) -> tuple[State, Any]:
    """See `backends`."""
    final, saved = packed.forward(call)
    return final, saved


def backward(
    stack: Stack, packed: Any, saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """See `backends`; what `call` says is in `saved`."""
    names: tuple[str, ...] = packed.names
    gradients: Sequence[Mapping[str, Array | None]] = asked.sums or [dict.fromkeys(names)] * len(stack.layers)
    if asked.wanted is not None:
        pairs = zip(gradients, asked.wanted, strict=True)
        gradients = [{name: one[name] for name in names if name in wanted} for one, wanted in pairs]
    saturated = None if asked.flow is None else stack.cell.saturated
    results: tuple[Array | None, State, list[dict[str, Array]]] = packed.backward(
        saved,
        asked.dy,
        asked.dstate,
        asked.need_x,
        asked.need_state,
        gradients,
        asked.bound,
        saturated,
        asked.flow,
        asked.dx,
    )
    return results


def plan(
    stack: Stack,
    weights: Sequence[Mapping[str, Array]],
    steps: int,
    batch: int,
    save: str | None,
    offsets: Array | None = None,
) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """See `backends`."""
    packed = pack(stack, weights, True)
    count = steps if offsets is None else int(offsets[-1])
    forward, backward = (packed.plan(count, batch, save, one, offsets) for one in (False, True))
    return packed.nbytes, forward, backward


def frozen_call(packed: Any, friendly: Callable[..., Any], batch_first: bool) -> Callable[..., Any]:
    """See `backends`."""
    call: Callable[..., Any] = _native.frozen_call(packed, friendly, batch_first).run
    return call


def stream(packed: Any, batch: int, arguments: Callable[..., Any]) -> Any:
    """See `backends`."""
    return _native.stream(packed, batch, arguments)


def linear_forward(
    x: Array, weight: Array, bias: Array | None, y: Array, rounds: bool = False, engines: bool = False
) -> None:
    """See `backends`."""
    _native.linear(x, weight, bias, y, None, None, None, None, rounds, engines)


def linear_backward(
    x: Array,
    weight: Array,
    dy: Array,
    need_x: bool,
    wanted: Wanted = ("weight", "bias"),
    rounds: bool = False,
    engines: bool = False,
) -> tuple[Array | None, Array | None, Array | None]:
    """See `backends`."""
    dx = np.empty_like(x) if need_x else None
    dweight = np.zeros_like(weight) if "weight" in wanted else None
    dbias = np.zeros(len(weight), weight.dtype) if "bias" in wanted else None
    _native.linear(x, weight, None, None, dy, dx, dweight, dbias, rounds, engines)
    return dx, dweight, dbias
