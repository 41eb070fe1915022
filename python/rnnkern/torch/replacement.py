"""`replace` and `restore`: the recurrent modules of a model change their class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize

from ..arguments import describe, flag
from . import drop_in, modules
from .modules import OWN, SUPPORTED, Layers, is_supported, torchs

__all__ = ["Replaced", "replace", "restore"]

NAMES = ("RNN", "LSTM", "GRU")
CELLS = (torch.nn.RNNCell, torch.nn.LSTMCell, torch.nn.GRUCell)
# By the name of the class: what torch.nn has, what `replace` makes of it, and what with fullgraph=True.
KINDS = {name: tuple(getattr(place, name) for place in (torch.nn, drop_in, modules)) for name in NAMES}


@dataclass(frozen=True)
class Replaced:
    """What `replace` or `restore` did, by the names of the modules within the model; prints as a list."""

    swapped: dict[str, str]  # and the module as it is now
    left: dict[str, str]  # and why

    def __str__(self) -> str:
        lines = [f"swapped  {name or '(the model)'}: {module}" for name, module in self.swapped.items()]
        lines += [f"left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no RNN, LSTM or GRU found"


def replace(model: torch.nn.Module, *, fullgraph: bool = False) -> Replaced:
    """Let every `torch.nn.RNN`, `LSTM` and `GRU` of a model run on rnnkern, in place.

    A module stays the object that it was and changes its class: parameters, buffers, hooks, and whoever refers to it or
    to them, such as an optimizer or a second parent, need not know. What it computes and the names in its `state_dict`
    stay as well; only the masks of dropout are others. `restore` is the way back.

    Parameters
    ----------
    model
        Any module, also one that is itself an RNN, LSTM or GRU.
    fullgraph
        False: the class is one that is torch.nn's too, so that `isinstance(module, torch.nn.LSTM)` stays true;
        `torch.compile` breaks its graph there, as at torch.nn's own. True: the class is that of `rnnkern.torch`, one
        node of a compiled graph, of which `isinstance(module, torch.nn.LSTM)` is false.

    Returns
    -------
    Replaced
        `swapped` and `left` by name. Left, with the reason, are cells (`LSTMCell`), subclasses, parametrized, quantized
        and scripted modules, and those of another device or dtype than float32, float64 and bfloat16 on the CPU (or on
        meta).

    Raises
    ------
    TypeError
        model is not a module, or fullgraph not a bool.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.GRU(3, 4))
    >>> print(replace(model))
    swapped  1: GRU(3, 4)
    >>> type(model[1]) is torch.nn.GRU, isinstance(model[1], torch.nn.GRU)
    (False, True)
    """
    target = 2 if flag("fullgraph", fullgraph) else 1
    wanted = {one: kinds[target] for kinds in KINDS.values() for one in kinds if one is not kinds[target]}
    return _change(model, wanted, _why_not_replaced)


def restore(model: torch.nn.Module) -> Replaced:
    """Make the modules that run on rnnkern torch.nn's again, in place: undoes `replace`, also of frozen modules.

    Modules stay the objects that they were, with their parameters, mode and hooks; a model without a module that is
    left needs rnnkern no more, to be pickled, exported or quantized.

    Parameters
    ----------
    model
        Any module, also one that is itself an RNN, LSTM or GRU.

    Returns
    -------
    Replaced
        `swapped` and `left` by name. Left, with the reason, is what torch.nn does not have, `reset_after=False`, and
        subclasses and parametrized modules.

    Raises
    ------
    TypeError
        model is not a module.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.GRU(3, 4))
    >>> print(replace(model).swapped, restore(model).swapped, type(model[0]) is torch.nn.GRU)
    {'0': 'GRU(3, 4)'} {'0': 'GRU(3, 4)'} True
    """
    wanted = {one: kinds[0] for kinds in KINDS.values() for one in kinds[1:]}
    report = _change(model, wanted, _why_not_restored)
    for name in report.swapped:
        module = model.get_submodule(name)
        for own in OWN:
            vars(module).pop(own, None)
    return report


def _change(
    model: object,
    wanted: Mapping[type[torch.nn.Module], type[torch.nn.Module]],
    why_not: Callable[[torch.nn.Module], str | None],
) -> Replaced:
    """Change the classes of modules; `why_not` says why one is left as it is, which counts if it is recurrent."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        reason = why_not(module)
        if type(module) in wanted or reason is not None:
            found.append((name, module, reason))
    for _, module, reason in found:
        if reason is None and type(module) in wanted:  # a module of two names is swapped once
            module.__class__ = wanted[type(module)]
    return Replaced(
        {name: repr(module) for name, module, reason in found if reason is None},
        {name: reason for name, _, reason in found if reason is not None},
    )


def _why_not_replaced(module: torch.nn.Module) -> str | None:
    """Why a recurrent module of torch is left as it is, else None."""
    kind = type(module)
    scripted = isinstance(module, torch.jit.ScriptModule)
    name = module.original_name if scripted else kind.__name__
    if name.removesuffix("Cell") in NAMES:
        if scripted:
            return "it is compiled by TorchScript"
        if kind.__module__.startswith("torch.ao.nn."):
            return "it is quantized"
    if isinstance(module, CELLS):
        return "it is a cell, whose calls are single steps: rnnkern runs layers, over all steps in one call"
    if not isinstance(module, (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU, Layers)):
        return None
    if (reason := _why_not_changed(module)) is not None:
        return None if isinstance(module, Layers) else reason
    for name, parameter in module.named_parameters():
        if not is_supported(parameter.device, parameter.dtype):
            return f"{name} is {parameter.dtype} on {parameter.device}; supported are {SUPPORTED}"
    return None


def _why_not_restored(module: torch.nn.Module) -> str | None:
    """Why a module of rnnkern is left as it is, else None."""
    if not isinstance(module, Layers):
        return None
    if (reason := _why_not_changed(module)) is not None:
        return reason
    try:
        torchs(module)
    except NotImplementedError as error:
        return str(error)
    return None


def _why_not_changed(module: torch.nn.Module) -> str | None:
    """Why the class of a recurrent module cannot be changed, else None."""
    if parametrize.is_parametrized(module):
        return f"it is parametrized: {', '.join(module.parametrizations)}"
    if not any(type(module) in kinds for kinds in KINDS.values()):
        return f"it is a subclass, {type(module).__name__}, whose forward may be its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    return None
