"""The backends in order of preference, and the choice among them.

A backend is a module with these names; arrays are time-major, C-contiguous and of `stack.dtype` unless said:

    name                  str
    unavailable()         None, or why it cannot run here, with the command that mends it
    pack(stack, weights, training) -> packed
        weights: a mapping for each layer-direction (w_ih, w_hh, b_ih, b_hh, w_hr, extras); copies what it keeps
    forward(stack, packed, call) -> (final state, saved)
        call is a `stack.Forward`, of which y is filled; saved is what backward needs, None where `call.save` is
    backward(stack, packed, saved, call, asked) -> (dx or None, dstate, gradients)
        asked is a `stack.Backward`; dstate: () unless asked for; gradients: a dict like weights for each
        layer-direction, of the names that are wanted; the others cost no time
    linear_forward(x, weight, bias, y)                 x (rows, inputs), weight (outputs, inputs), y (rows, outputs)
    linear_backward(x, weight, dy, need_x, wanted=("weight", "bias")) -> (dx, dweight, dbias), None where not wanted

A backend that rounds the operands of products to bfloat16, where `stack.precision` says so, also has:

    rounds_operands = True
        and `rounds=False` as the last argument of both functions of Linear

One that can make products of floats on a matrix engine, where `stack.arithmetic` says so, also has:

    has_engines = True
        and `engines=False` behind that argument
    missing_engine() -> str | None
        why products are made by multiply-adds here all the same

A backend that runs exact arrays sooner than Python has looked at them also has:

    frozen_call(packed, friendly, batch_first) -> call
        call(x, state, lengths, offsets, resets, out) is friendly of the same, which takes whatever a caller may pass
    stream(packed, batch, arguments) -> steps
        with what `functional.Steps` has; arguments(x_t, out) -> (x_t, y) are the friendly checks of a step

A backend that packs weights and runs a forward with them in one crossing also has:

    run(stack, weights, call) -> (packed, final state, saved)
    reserve() -> reserve
        memory that such calls of a layer leave to the next one, in `call.reserve`; with `nbytes` and `release()`

A backend that can read what a forward has saved also has:

    saved_values(stack, saved, call) -> for each layer-direction the saved values of the cell, (T, B, H) each
        anything past a row's end

A backend whose backward bounds and measures the gradients of states on its way also has:

    watches               True: it does what `Backward.bound` and `Backward.flow` say

A backend that can say how it runs a training call before it does also has:

    plan(stack, weights, steps, batch, save, offsets=None) -> (bytes of the packed weights, forward, backward)
        forward, backward: mappings with the fields of `planning.Division`; what is not exact says that it is estimated

Nothing a caller passes is written to but y, and no result aliases an argument other than y.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from types import ModuleType
from typing import Any

__all__ = ["ORDER", "BackendUnavailableError", "backend_names", "get", "pick", "reserve_of"]

# Best first. A CUDA backend is used only by name: moving arrays to a device is the caller's decision.
ORDER = ("native", "numba", "reference", "numba_cuda")
AUTOMATIC = ("native", "numba", "reference")

_MODULES = {
    "native": "rnnkern.backends.native",
    "numba": "rnnkern.backends.numba_cpu",
    "reference": "rnnkern.reference",
    "numba_cuda": "rnnkern.backends.numba_cuda",
}

_stepped_down = False


class BackendUnavailableError(ImportError):
    """A backend that was asked for by name cannot run here; the message says why and what mends it."""


def backend_names() -> tuple[str, ...]:
    """Names of all backends, available or not, best first.

    >>> backend_names()
    ('native', 'numba', 'reference', 'numba_cuda')
    """
    return ORDER


def get(name: str) -> ModuleType:
    """The module of a backend by name, available or not."""
    if name not in _MODULES:
        raise ValueError(f"backend: expected 'auto' or one of {', '.join(ORDER)}, got {name!r}")
    return importlib.import_module(_MODULES[name])


def pick(name: str = "auto", precision: str = "float32", arithmetic: str = "fma") -> ModuleType:
    """The backend to use, which has to have the precision of its products and their arithmetic.

    `auto` is the environment variable RNNKERN_BACKEND where it is not empty, else the best present of native, numba and
    reference, with one warning when it is not the first.

    Raises
    ------
    TypeError, ValueError
        name is not the name of a backend, or the backend lacks the precision or the arithmetic.
    BackendUnavailableError
        A named backend cannot run.
    """
    module = _pick(name)
    if precision != "float32" and not getattr(module, "rounds_operands", False):
        raise ValueError(
            f"precision: expected 'float32' on the backend {module.name!r}, which rounds no operands, got "
            f"{precision!r}; the backends 'native' and 'reference' do"
        )
    if arithmetic != "fma":
        if not getattr(module, "has_engines", False):
            raise ValueError(
                f"arithmetic: expected 'fma' on the backend {module.name!r}, got {arithmetic!r}; 'native' has it"
            )
        _say_once(module.missing_engine())
    return module


_said: set[str] = set()


def _say_once(reason: str | None) -> None:
    """Warn of what is slower than asked for, the first time in this process."""
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(reason, stacklevel=_users_level())


def _pick(name: str) -> ModuleType:
    if not isinstance(name, str):
        raise TypeError(f"backend: expected a name (str), got {type(name).__name__}")
    if name == "auto":
        name = os.environ.get("RNNKERN_BACKEND") or "auto"
    if name != "auto":
        module = get(name)
        reason = module.unavailable()
        if reason is not None:
            raise BackendUnavailableError(f"backend {name!r} is unavailable: {reason}")
        return module
    reasons: list[str] = []
    for candidate in AUTOMATIC:
        module = get(candidate)
        reason = module.unavailable()
        if reason is None:
            _warn_once(candidate, reasons)
            return module
        reasons.append(f"{candidate}: {reason}")
    raise BackendUnavailableError("no backend is available: " + "; ".join(reasons))


def reserve_of(backend: ModuleType) -> Any:
    """A new reserve of memory for the calls of a layer; None for a backend that has no use for one."""
    make = getattr(backend, "reserve", None)
    return None if make is None else make()


def _warn_once(chosen: str, reasons: list[str]) -> None:
    global _stepped_down
    if reasons and not _stepped_down:
        _stepped_down = True
        message = f"rnnkern runs on the backend {chosen!r}, because {'; '.join(reasons)}"
        warnings.warn(message, stacklevel=_users_level())


def _users_level() -> int:
    """The stacklevel, for the caller, of the first line that is not of this package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "rnnkern":
        frame, level = frame.f_back, level + 1
    return level
