"""The classes that `replace` gives to modules: those of `modules`, and each is torch.nn's of its name as well.

Code that asks `isinstance(module, torch.nn.LSTM)` takes the branch that it took. The price: `torch.compile` breaks its
graph at such a class.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.compiler import is_compiling

from . import modules
from .uncompiled import uncompiled

__all__ = ["GRU", "LSTM", "RNN"]

_said = False


class _BreaksGraphs(modules.Layers):
    """Says so, once."""

    @uncompiled(inner=False)
    def forward(self, *arguments: Any, **options: Any) -> Any:
        # Within what torch.compile returned, between two graphs; a strict torch.export goes on to trace.
        if not is_compiling() and callable(get_eval_frame_callback()):
            return _between_graphs(self, arguments, options)
        return modules.Layers.forward(self, *arguments, **options)


@uncompiled()
def _between_graphs(module: modules.Layers, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    global _said
    if not _said:
        _said = True
        name = type(module).__name__
        warnings.warn(
            f"torch.compile breaks its graph at {name}, as at every torch.nn.{name}; after "
            "rnnkern.torch.replace(model, fullgraph=True) it does not, and isinstance(module, torch.nn."
            f"{name}) is false",
            stacklevel=5,
        )
    return modules.Layers.forward(module, *arguments, **options)


class RNN(_BreaksGraphs, modules.RNN, nn.RNN):
    """`modules.RNN`, and a `torch.nn.RNN`."""


class LSTM(_BreaksGraphs, modules.LSTM, nn.LSTM):
    """`modules.LSTM`, and a `torch.nn.LSTM`."""


class GRU(_BreaksGraphs, modules.GRU, nn.GRU):
    """`modules.GRU`, and a `torch.nn.GRU`."""
