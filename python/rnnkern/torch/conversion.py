"""`to_layer`: from a module of PyTorch to a layer that needs NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from ..arguments import describe
from ..layers import Recurrent
from .kernels import DTYPES
from .modules import SUPPORTED

__all__ = ["to_layer"]


def to_layer(module: torch.nn.Module) -> Recurrent[Any]:
    """A layer of rnnkern with the options of a module and a copy of its weights, for streams and ONNX for example.

    Parameters
    ----------
    module
        An RNN, LSTM or GRU of `rnnkern.torch` or of `torch.nn`.

    Returns
    -------
    rnnkern.Recurrent
        Of the same sizes, options, dtype and `batch_first`; it computes what the module does.

    Raises
    ------
    TypeError
        module is no such module.
    NotImplementedError
        Its parameters are of another dtype, or not on the CPU.

    Examples
    --------
    >>> import torch
    >>> module = torch.nn.GRU(3, 4)
    >>> stream = to_layer(module).freeze().stream()
    >>> y = stream.step(torch.ones(1, 3).numpy())
    >>> torch.allclose(module(torch.ones(1, 1, 3))[0][0], torch.from_numpy(y), atol=1e-6)
    True
    """
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"module: expected an RNN, LSTM or GRU of rnnkern.torch or torch.nn, got {describe(module)}")
    weights = {name: _weight(module, name) for name in module._flat_weights_names}
    for name, one in weights.items():
        if (one.dtype not in DTYPES and one.dtype is not torch.bfloat16) or one.device.type != "cpu":
            raise NotImplementedError(f"module: expected {SUPPORTED}, got {name} of {one.dtype} on {one.device}")
    layer: Recurrent[Any] = Recurrent(
        getattr(module, "cell", module.mode.lower()), module.input_size, module.hidden_size, module.num_layers,
        module.bias, module.batch_first, module.dropout, module.bidirectional, module.proj_size,
        dtype=DTYPES.get(one.dtype, np.dtype(np.float32)), backend=getattr(module, "backend", "auto"), seed=0,
        precision="bfloat16" if one.dtype is torch.bfloat16 else "float32",
        arithmetic=getattr(module, "arithmetic", "fma") if one.dtype is torch.float32 else "fma",
    )  # fmt: skip
    layer.load_state_dict({name: one.float() if one.dtype is torch.bfloat16 else one for name, one in weights.items()})
    return layer


def _weight(module: torch.nn.RNNBase, name: str) -> torch.Tensor:
    """A parameter, or what a parametrization makes of others."""
    if name not in module._parameters and not parametrize.is_parametrized(module, name):
        raise NotImplementedError(
            f"module: expected {name} as a parameter, got one that a hook computes before a call; "
            "torch.nn.utils.prune.remove or remove_weight_norm makes it a parameter"
        )
    weight: torch.Tensor = getattr(module, name).detach()
    return weight
