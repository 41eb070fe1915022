"""`replace`: the recurrent modules of a model change their class."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.utils import parametrize

from ..arguments import describe
from .modules import GRU, LSTM, RNN, SUPPORTED, is_supported

__all__ = ["Replaced", "replace"]

OURS = {torch.nn.RNN: RNN, torch.nn.LSTM: LSTM, torch.nn.GRU: GRU}


@dataclass(frozen=True)
class Replaced:
    """What `replace` did, by the names of the modules within the model; prints as a list."""

    swapped: dict[str, str]  # and the module as it is now
    left: dict[str, str]  # and why

    def __str__(self) -> str:
        lines = [f"swapped  {name or '(the model)'}: {module}" for name, module in self.swapped.items()]
        lines += [f"left     {name or '(the model)'}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines) or "no RNN, LSTM or GRU found"


def replace(model: torch.nn.Module) -> Replaced:
    """Let every `torch.nn.RNN`, `LSTM` and `GRU` of a model run on rnnkern, in place.

    A module stays the object that it was and changes its class: parameters, buffers, hooks, and whoever refers to it or
    to them, such as an optimizer or a second parent, need not know. What it computes and the names in its `state_dict`
    stay as well; only the masks of dropout are others.

    Parameters
    ----------
    model
        Any module, also one that is itself an RNN, LSTM or GRU.

    Returns
    -------
    Replaced
        `swapped` and `left` by name. Left, with the reason, are subclasses, parametrized and scripted modules, and
        those of another device or dtype than float32 and float64 on the CPU.

    Raises
    ------
    TypeError
        model is not a module.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), torch.nn.GRU(3, 4))
    >>> print(replace(model))
    swapped  1: GRU(3, 4)
    >>> isinstance(model[1], GRU)
    True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {describe(model)}")
    found = [
        (name, module, _reason(module))
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, tuple(OURS)) or getattr(module, "original_name", None) in ("RNN", "LSTM", "GRU")
    ]
    for _, module, reason in found:
        if reason is None and type(module) in OURS:  # a module of two names is swapped once
            module.__class__ = OURS[type(module)]
    return Replaced(
        {name: repr(module) for name, module, reason in found if reason is None},
        {name: reason for name, _, reason in found if reason is not None},
    )


def _reason(module: torch.nn.Module) -> str | None:
    """Why a module is left as it is, else None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if parametrize.is_parametrized(module):
        return f"it is parametrized: {', '.join(module.parametrizations)}"
    if type(module) not in OURS:
        return f"it is a subclass, {type(module).__name__}, whose forward may be its own"
    if "forward" in vars(module):
        return "its forward was replaced"
    for name, parameter in module.named_parameters():
        if not is_supported(parameter.device, parameter.dtype):
            return f"{name} is {parameter.dtype} on {parameter.device}; supported are {SUPPORTED}"
    return None
