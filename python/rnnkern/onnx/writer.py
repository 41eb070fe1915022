"""Layers of this package as ONNX models."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .. import convert
from ..arguments import describe, flag, warn_the_caller
from ..layers import Recurrent
from .standard import OPERATORS

__all__ = ["CELL_OPERATORS", "export", "to_model"]

OPSET = 14  # since then the three operators only gained types; every ONNX Runtime from 1.8 on reads it
IR_VERSION = 7  # came with that opset

# The operator of each cell, with its attributes; the activations are those of one direction.
CELL_OPERATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    "rnn_sigmoid": ("RNN", {"activations": ["Sigmoid"]}),
    "lstm": ("LSTM", {}),
    "lstm_peephole": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {"linear_before_reset": 0}),
}


def export(layer: Recurrent, path: str | os.PathLike[str], *, state: bool = False, lengths: bool = False) -> None:
    """Write a layer as an ONNX model, which ONNX Runtime and others run to the same results.

    The input is `x`; the outputs are `y` and the final state, `h_n` and for an LSTM `c_n`.

    Parameters
    ----------
    layer
        An `RNN`, `LSTM`, `GRU` or `Recurrent` of a cell that the standard has, without projection. What holds for its
        calls holds for the model: shapes (with `batch_first` too), zeros past a row's end, no dropout. Also a module of
        PyTorch that `rnnkern.torch.to_layer` takes. Of `precision="bfloat16"` the model has the parameters but not the
        rounding, which operators of ONNX do not say, and a UserWarning that.
    path
        File to write; no suffix is added.
    state
        Whether the initial state is an input, `h_0` and for an LSTM `c_0`, as for a call; else it is zeros.
    lengths
        Whether there is an input `lengths`, int64 (B,).

    Raises
    ------
    TypeError
        layer is none, or state or lengths no bool.
    ValueError
        The standard has no operator for the layer; the message says why.
    OSError
        The file cannot be written.

    Examples
    --------
    >>> import pathlib, tempfile, numpy as np, rnnkern as rk, rnnkern.onnx
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.onnx"
    >>> layer = rk.LSTM(3, 4, num_layers=2, bidirectional=True, seed=0)
    >>> rnnkern.onnx.export(layer, path, state=True)
    >>> x, h_0, c_0 = np.ones((5, 2, 3), np.float32), np.ones((4, 2, 4), np.float32), np.ones((4, 2, 4), np.float32)
    >>> y, h_n, c_n = rnnkern.onnx.prepare(path).run([x, h_0, c_0])
    >>> bool(np.allclose(y, layer(x, (h_0, c_0))[0], atol=1e-6))
    True
    """
    onnx.save_model(to_model(layer, state=state, lengths=lengths), os.fspath(path))


def to_model(layer: Recurrent, *, state: bool = False, lengths: bool = False) -> Any:
    """The `onnx.ModelProto` that `export` writes, with its arguments and errors."""
    layer = _layer(layer)
    if layer.cell not in CELL_OPERATORS:
        raise ValueError(f"layer: expected a cell that ONNX has, {', '.join(CELL_OPERATORS)}, got {layer.cell!r}")
    if layer.proj_size:
        raise ValueError(f"layer: expected proj_size=0, since no operator of ONNX has a projection, got {layer!r}")
    if layer.precision != "float32":
        warn_the_caller(f"precision: the model computes in float32, since ONNX has no word for {layer.precision!r}")
    graph = _layer_graph(layer, flag("state", state), flag("lengths", lengths))
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="rnnkern")


def _layer(layer: object) -> Recurrent[Any]:
    """The layer itself, or one made of a module of PyTorch, which whoever has one has imported."""
    if isinstance(layer, Recurrent):
        return layer
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(layer, torch.nn.RNNBase):
        from ..torch import to_layer  # it imports PyTorch

        return to_layer(layer)
    raise TypeError(f"layer: expected a layer of rnnkern or a module of PyTorch, got {describe(layer)}")


def _layer_graph(layer: Recurrent, state: bool, lengths: bool) -> Any:
    """x -> (Transpose ->) operator -> Squeeze, or Transpose -> Reshape -> operator -> ... -> y, and the states."""
    operator, attributes = CELL_OPERATORS[layer.cell]
    D, L, H = (2 if layer.bidirectional else 1), layer.num_layers, layer.hidden_size
    attributes = attributes | {"hidden_size": H, "direction": "bidirectional" if layer.bidirectional else "forward"}
    if "activations" in attributes:
        attributes["activations"] = attributes["activations"] * D
    states = [name.removeprefix("initial_") for name in OPERATORS[operator].states]  # h, and c of an LSTM
    real, leading = helper.np_dtype_to_tensor_dtype(layer.dtype), ("B", "T") if layer.batch_first else ("T", "B")

    inputs = [helper.make_tensor_value_info("x", real, (*leading, layer.input_size))]
    outputs = [helper.make_tensor_value_info("y", real, (*leading, D * H))]
    outputs += [helper.make_tensor_value_info(f"{one}_n", real, (L * D, "B", H)) for one in states]
    constants: dict[str, Any] = {}
    by_time = D == 1 and not layer.batch_first  # (T, 1, B, H) needs no other order
    constants["axis" if by_time else "shape"] = np.array([1] if by_time else [0, 0, D * H])  # 0 leaves a size as it is
    nodes = []
    given: dict[str, str] = {}  # inputs of the operators, by the names of the standard
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ("B",)))
        nodes.append(helper.make_node("Cast", ["lengths"], ["sequence_lens"], to=onnx.TensorProto.INT32))
        given["sequence_lens"] = "sequence_lens"
    if state:
        inputs += [helper.make_tensor_value_info(f"{one}_0", real, (L * D, "B", H)) for one in states]
        if L > 1:
            nodes += [helper.make_node("Split", [f"{one}_0"], _each_layer(f"{one}_0", L), axis=0) for one in states]

    x = "x"
    if layer.batch_first:
        nodes.append(helper.make_node("Transpose", ["x"], ["x_by_time"], perm=[1, 0, 2]))
        x = "x_by_time"
    for index, weights in enumerate(convert.to_onnx(layer.cell, layer.parameters)):
        given["X"], last = x, index == L - 1
        for key, array in weights.items():
            given[key] = f"{key}_l{index}"
            constants[given[key]] = array
        if state:
            given |= {f"initial_{one}": _each_layer(f"{one}_0", L)[index] for one in states}
        names = [given.get(key, "") for key in OPERATORS[operator].inputs]
        results = [f"Y_l{index}", *(_each_layer(f"{one}_n", L)[index] for one in states)]
        nodes.append(helper.make_node(operator, names, results, name=f"{layer.cell}_l{index}", **attributes))
        below, x = f"Y_l{index}", "y" if last else f"y_l{index}"  # (T, D, B, H) to (T, B, D*H)
        if by_time:
            nodes.append(helper.make_node("Squeeze", [below, "axis"], [x]))
            continue
        perm = [2, 0, 1, 3] if last and layer.batch_first else [0, 2, 1, 3]
        nodes.append(helper.make_node("Transpose", [below], [f"{below}_rows"], perm=perm))
        nodes.append(helper.make_node("Reshape", [f"{below}_rows", "shape"], [x]))
    if L > 1:
        nodes += [helper.make_node("Concat", _each_layer(f"{one}_n", L), [f"{one}_n"], axis=0) for one in states]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    return helper.make_graph(nodes, layer.cell, inputs, outputs, initializers)


def _each_layer(name: str, layers: int) -> list[str]:
    """What the parts of a state are called, one for each layer; the only layer has it all."""
    return [f"{name}_l{index}" for index in range(layers)] if layers > 1 else [name]
