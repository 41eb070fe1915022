"""Weights between this package and other frameworks: their gate orders, layouts and biases. Imports none of them.

Each pair is `from_x(cell, ...)`, which gives what `load_state_dict` of a layer of that cell takes, and
`to_x(cell, weights)`, the way back from `layer.parameters`. Arrays may be anything array-like on the CPU; results are
new arrays of float32 or float64, the wider of what came. What a framework cannot say is refused by name.

A framework with one bias where there are two here gives `bias_ih` and zeros, and gets their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array, as_floats, check_names, describe
from .cells import CELLS, Cell
from .layers import parameter_names
from .stack import Stack

__all__ = ["from_flax", "from_keras", "from_onnx", "from_torch", "to_flax", "to_keras", "to_onnx", "to_torch"]

Array = NDArray[Any]
Directions = list[dict[str, Array]]  # w_ih, w_hh, ... of one layer: forward, and reverse where there is one


def from_torch(cell: str, weights: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """Weights of a `torch.nn.RNN`, `LSTM` or `GRU` from the state dict of the module or of a model around it.

    Names and layouts are those of this package, so that `layer.load_state_dict(module.state_dict())` works too; this
    one takes the part of a larger state dict, and refuses cells that `torch.nn` does not have.

    Parameters
    ----------
    cell
        `"rnn_tanh"`, `"rnn_relu"`, `"lstm"` or `"gru"`.
    weights
        A mapping of names to tensors on the CPU, or arrays.
    prefix
        What the names of the module begin with, such as `"encoder.rnn."`; others are left out.

    Returns
    -------
    dict
        Names and values for `load_state_dict` of a layer of the same sizes and options.

    Raises
    ------
    ValueError, TypeError
        A name, a shape, a dtype or the cell does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> model = {"rnn.weight_ih_l0": np.ones((4, 3)), "rnn.weight_hh_l0": np.ones((4, 4)), "head.weight": np.ones(4)}
    >>> rk.RNN(3, 4, bias=False).load_state_dict(from_torch("rnn_tanh", model, prefix="rnn."))
    """
    entry = _of(_TORCH, "PyTorch", cell)
    check_names("weights", weights, weights)  # that it is a mapping
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {describe(prefix)}")
    ours = {str(name).removeprefix(prefix): one for name, one in weights.items() if str(name).startswith(prefix)}
    if not ours and weights:
        raise ValueError(f"prefix: expected what some of {', '.join(map(str, weights))} begin with, got {prefix!r}")
    return _joined(entry, _split(entry, ours))


def to_torch(cell: str, weights: Mapping[str, Any], prefix: str = "") -> dict[str, Array]:
    """The state dict of a `torch.nn.RNN`, `LSTM` or `GRU`, as NumPy arrays; `torch.from_numpy` makes tensors of them.

    Parameters
    ----------
    cell, prefix
        As for `from_torch`.
    weights
        By the names of `layer.parameters`.

    Raises
    ------
    ValueError, TypeError
        As for `from_torch`.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.GRU(3, 4, bias=False)
    >>> list(to_torch(layer.cell, layer.parameters, prefix="rnn."))
    ['rnn.weight_ih_l0', 'rnn.weight_hh_l0']
    """
    return {prefix + name: array for name, array in from_torch(cell, weights).items()}


def from_keras(cell: str, layers: Sequence[Any]) -> dict[str, Array]:
    """Weights of Keras 3 layers, `SimpleRNN`, `LSTM`, `GRU` or a `Bidirectional` of one.

    Parameters
    ----------
    cell
        `"rnn_tanh"`, `"rnn_relu"` or `"rnn_sigmoid"` of a `SimpleRNN`, `"lstm"`; `"gru"` of a `GRU`, and
        `"gru_reset_before"` of one with `reset_after=False`.
    layers
        For each layer of a stack the Keras layer, whose options are checked, or what its `get_weights()` gives:
        kernel (I, G*H), recurrent_kernel (H, G*H) and, with `use_bias`, bias (G*H,), for `"gru"` (2, 3*H); twice as
        many of a `Bidirectional`, whose outputs are concatenated.

    Returns
    -------
    dict
        Names and values for `load_state_dict` of a layer with `batch_first=True`.

    Raises
    ------
    ValueError, TypeError
        An option of a Keras layer that ours do not have (another activation, dropout, `go_backwards`, another
        `merge_mode`), or a shape, a dtype or the cell does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> kernel, recurrent_kernel, bias = np.ones((3, 16)), np.ones((4, 16)), np.zeros(16)
    >>> layer = rk.LSTM(3, 4, batch_first=True)
    >>> layer.load_state_dict(from_keras("lstm", [[kernel, recurrent_kernel, bias]]))
    """
    return _from(_KERAS, cell, layers)


def to_keras(cell: str, weights: Mapping[str, Any]) -> list[list[Array]]:
    """For each layer the list of arrays that `set_weights` of a built Keras layer takes, as `from_keras` says.

    Parameters
    ----------
    cell
        As for `from_keras`.
    weights
        By the names of `layer.parameters`.

    Raises
    ------
    ValueError, TypeError
        Keras has no such cell, or none with a projection; or a name or a shape does not fit.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.GRU(3, 4)
    >>> [[kernel, recurrent_kernel, bias]] = to_keras(layer.cell, layer.parameters)
    >>> kernel.shape, recurrent_kernel.shape, bias.shape
    ((3, 12), (4, 12), (2, 12))
    """
    return _to(_KERAS, cell, weights)


def from_onnx(cell: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Weights of the ONNX operators RNN, LSTM and GRU, one mapping of their inputs for each layer.

    Parameters
    ----------
    cell
        Name of the cell that the attributes of the operators make: `"lstm_peephole"` of an LSTM with P,
        `"gru_reset_before"` of a GRU with linear_before_reset=0, `"gru"` with 1.
    layers
        Mappings with W (D, G*H, I) and R (D, G*H, H), where wanted B (D, 2*G*H), and P (D, 3*H) for the cell with
        peepholes; D = 2 is bidirectional. None is as absent. The reverse direction alone (D = 1) reads as forward.

    Returns
    -------
    dict
        Names and values for `load_state_dict` of a layer, with biases where there is a B.

    Raises
    ------
    ValueError, TypeError
        A name, a shape, a dtype or the cell does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> operator = {"W": np.ones((2, 12, 3)), "R": np.ones((2, 12, 4)), "B": np.zeros((2, 24))}
    >>> layer = rk.GRU(3, 4, bidirectional=True)
    >>> layer.load_state_dict(from_onnx("gru", [operator]))
    """
    return _from(_ONNX, cell, layers)


def to_onnx(cell: str, weights: Mapping[str, Any]) -> list[dict[str, Array]]:
    """For each layer the inputs of its ONNX operator: W, R, B unless there are no biases, P with peepholes.

    Parameters
    ----------
    cell
        Name of the cell.
    weights
        By the names of `layer.parameters`.

    Raises
    ------
    ValueError, TypeError
        The standard has no projection; or a name or a shape does not fit.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.LSTM(3, 4, num_layers=2, bidirectional=True)
    >>> [first, second] = to_onnx(layer.cell, layer.parameters)
    >>> first["W"].shape, second["W"].shape, first["B"].shape
    ((2, 16, 3), (2, 16, 8), (2, 32))
    """
    return _to(_ONNX, cell, weights)


def from_flax(cell: str, layers: Sequence[Any]) -> dict[str, Array]:
    """Weights of Flax cells, of linen and of nnx: `SimpleCell`, `LSTMCell`, `OptimizedLSTMCell`, `GRUCell`.

    Parameters
    ----------
    cell
        `"lstm"`, `"gru"`, or for a `SimpleCell` by its `activation_fn` `"rnn_tanh"`, `"rnn_relu"`, `"rnn_sigmoid"`.
        Functions do not show in parameters: other ones than these, and sigmoid and tanh in the others, are not ours.
        Nor does the `residual=True` of a `SimpleCell`, which no cell of ours has.
    layers
        For each layer the parameters of its cell as nested mappings: of linen what `init` gives under `"params"` (for
        an `RNN` under `"cell"` there), of nnx `nnx.state(cell, nnx.Param)`. A list of two is forward and reverse.

    Returns
    -------
    dict
        Names and values for `load_state_dict` of a layer with biases.

    Raises
    ------
    ValueError, TypeError
        A name, a shape, a dtype or the cell does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> params = {"i": {"kernel": np.ones((3, 4)), "bias": np.zeros(4)}, "h": {"kernel": np.ones((4, 4))}}
    >>> rk.RNN(3, 4).load_state_dict(from_flax("rnn_tanh", [params]))
    """
    return _from(_FLAX["linen"], cell, layers)


def to_flax(cell: str, weights: Mapping[str, Any], module: str = "linen") -> list[Any]:
    """For each layer the parameters of its Flax cell, or a list of two where the layer is bidirectional.

    Parameters
    ----------
    cell
        As for `from_flax`.
    weights
        By the names of `layer.parameters`.
    module
        Whose parameters: `"linen"`, `"nnx"` for what `nnx.update` of an `OptimizedLSTMCell`, `GRUCell` or
        `SimpleCell` takes, or `"nnx.LSTMCell"`.

    Raises
    ------
    ValueError, TypeError
        Flax has no such cell, or none with a projection; `nnx.GRUCell` has no place for a `bias_hh` of the gate n
        that is not zero; or a name or a shape does not fit.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.LSTM(3, 4)
    >>> [params] = to_flax(layer.cell, layer.parameters)
    >>> list(params), params["if"]["kernel"].shape
    (['ii', 'if', 'ig', 'io', 'hi', 'hf', 'hg', 'ho'], (3, 4))
    """
    if not isinstance(module, str) or module not in _FLAX:
        raise ValueError(f"module: expected one of {', '.join(_FLAX)}, got {describe(module)}")
    return _to(_FLAX[module], cell, weights)


@dataclass(frozen=True)
class _Format:
    """What a framework has and how it orders it. `read` and `write` leave the rows in its own order of gates."""

    name: str
    cells: Mapping[str, Sequence[str]]  # the cells it has, and their gates in its order
    read: Callable[[Cell, _Sizes, str, Any], Directions]  # (cell, sizes, name for messages, one layer)
    write: Callable[[Cell, Directions], Any]

    def order(self, cell: Cell) -> Array:
        """For each gate of the framework, its place in our order."""
        return np.array([cell.gates.index(gate) for gate in self.cells[cell.name]])


class _Sizes(dict[str, int]):
    """Sizes by letter: found in the shape of one array, held to in those of the next."""

    def array(self, name: str, value: object, shape: str) -> Array:
        """An array of floats whose shape is such as "2, 4*H, I"; float32 where that holds every value of its dtype."""
        known = ", ".join(f"{letter}={size}" for letter, size in self.items())
        array = as_array(name, value)
        array = as_floats(name, array, np.dtype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64))
        terms = shape.split(", ")
        if len(terms) != array.ndim or not all(map(self._fits, terms, array.shape)):
            raise ValueError(f"{name}: expected shape ({shape}){' with ' * bool(known)}{known}, got {array.shape}")
        return array

    def _fits(self, term: str, size: int) -> bool:
        factor, _, letter = term.rpartition("*")
        if letter.isdigit():
            return size == int(letter)
        count, rest = divmod(size, int(factor or 1))
        return count > 0 and not rest and count == self.setdefault(letter, count)


def _of(cells: Iterable[str], framework: str, name: str) -> Cell:
    """The cell of a name, where the framework has it too."""
    cell = CELLS[name]
    if name not in cells:
        raise ValueError(f"cell: expected one that {framework} has ({', '.join(cells)}), got {name!r}")
    return cell


def _from(format: _Format, cell: str, layers: Sequence[Any]) -> dict[str, Array]:
    """The layers of a framework as a state dict, checked to be one stack."""
    entry = _of(format.cells, format.name, cell)
    if not isinstance(layers, list | tuple):
        raise TypeError(f"layers: expected a list with one item for each layer, got {describe(layers)}")
    if not layers:
        raise ValueError("layers: expected a list with one item for each layer, got an empty one")
    order = np.argsort(format.order(entry))
    sizes = _Sizes()
    read: list[Directions] = []
    for index, layer in enumerate(layers):
        name = f"layers[{index}]"
        directions = format.read(entry, sizes, name, layer)
        if len(directions) > 2 or len(directions) != sizes.setdefault("D", len(directions)):
            expected = f"{sizes['D']} direction(s), as layers[0]" if index else "one or two directions"
            raise ValueError(f"{name}: expected {expected}, got {len(directions)}")
        read.append([{key: _by_gate(key, array, order) for key, array in one.items()} for one in directions])
        if any(one.keys() != read[0][0].keys() for one in read[-1]):
            raise ValueError(f"{name}: expected biases in all layers and directions or in none, got them in some")
        sizes["I"] = sizes["D"] * sizes["H"]
    return _joined(entry, read)


def _to(format: _Format, cell: str, weights: Mapping[str, Any]) -> list[Any]:
    """A state dict as the layers of a framework."""
    entry = _of(format.cells, format.name, cell)
    order = format.order(entry)
    layers = _split(entry, weights)
    if "w_hr" in layers[0][0]:
        raise ValueError(f"weights: expected no projection, which {format.name} does not have, got weight_hr_l0")
    return [
        format.write(entry, [{key: _by_gate(key, array, order) for key, array in one.items()} for one in layer])
        for layer in layers
    ]


def _names(cell: Cell, layers: int, directions: int, bias: bool, projection: bool) -> list[dict[str, str]]:
    """What the weights of each layer-direction are called, which depends on no size."""
    return parameter_names(Stack(cell, 1, 1, int(projection), layers, (False, True)[:directions]), bias)


def _split(cell: Cell, weights: Mapping[str, Any]) -> list[Directions]:
    """A state dict by layer and direction, checked to be that of a stack of this cell."""
    check_names("weights", weights, weights)  # that it is a mapping
    layers = 1
    while f"weight_ih_l{layers}" in weights:
        layers += 1
    count = 2 if "weight_ih_l0_reverse" in weights else 1
    projection = cell.projects and "weight_hr_l0" in weights
    names = _names(cell, layers, count, "bias_ih_l0" in weights, projection)
    check_names("weights", weights, [name for one in names for name in one.values()])
    rows, state = f"{len(cell.gates)}*H", "P" if projection else "H"
    shapes = {"w_ih": f"{rows}, I", "w_hh": f"{rows}, {state}", "b_ih": rows, "b_hh": rows, "w_hr": "P, H"}
    shapes |= dict.fromkeys(cell.extras, "H")
    sizes = _Sizes()
    read: Directions = []
    for index, one in enumerate(names):
        if index == count:
            sizes["I"] = count * sizes[state]
        read.append({key: sizes.array(f"weights[{name!r}]", weights[name], shapes[key]) for key, name in one.items()})
    return [read[at : at + count] for at in range(0, len(read), count)]


def _joined(cell: Cell, layers: list[Directions]) -> dict[str, Array]:
    """Mirror of `_split`: copies, all of one dtype."""
    directions = [one for layer in layers for one in layer]
    first = directions[0]
    names = _names(cell, len(layers), len(layers[0]), "b_ih" in first, "w_hr" in first)
    dtype = np.result_type(*(array for one in directions for array in one.values()))
    return {
        name: np.array(one[key], dtype, order="C")
        for names_of, one in zip(names, directions, strict=True)
        for key, name in names_of.items()
    }


# The cells that other frameworks have too, by name, with their gates in the order of each. A cell that is not here is
# refused, whatever its gates are called.
_IN_OUR_ORDER = {cell: CELLS[cell].gates for cell in ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru")}
_KERAS_GATES = _IN_OUR_ORDER | dict.fromkeys(("gru", "gru_reset_before"), tuple("zrn"))
_ONNX_GATES = _KERAS_GATES | dict.fromkeys(("lstm", "lstm_peephole"), tuple("iofg"))


def _by_gate(key: str, array: Array, order: Array) -> Array:
    """A copy of a weight, its rows in another order of gates where they are those of gates."""
    if key not in ("w_ih", "w_hh", "b_ih", "b_hh"):
        return array.copy()
    return array.reshape(len(order), -1, *array.shape[1:])[order].reshape(array.shape)


_TORCH = ("rnn_tanh", "rnn_relu", "lstm", "gru")

_KERAS_GATED = {"activation": "tanh", "recurrent_activation": "sigmoid"}
# For each cell the class of the Keras layer, and the options with which it computes the same.
_KERAS_LAYERS: dict[str, dict[str, Any]] = {
    "rnn_tanh": {"class": "SimpleRNN", "activation": "tanh"},
    "rnn_relu": {"class": "SimpleRNN", "activation": "relu"},
    "rnn_sigmoid": {"class": "SimpleRNN", "activation": "sigmoid"},
    "lstm": {"class": "LSTM"} | _KERAS_GATED,
    "gru": {"class": "GRU", "reset_after": True} | _KERAS_GATED,
    "gru_reset_before": {"class": "GRU", "reset_after": False} | _KERAS_GATED,
}


# What may be done about an option that does not change what the trained layer computes. There is nothing for others.
_KERAS_ADVICE = dict.fromkeys(
    ("dropout", "recurrent_dropout"), ", which only training sees: what its get_weights() gives converts without it"
)


def _check_keras(cell: Cell, name: str, came: Mapping[str, Any], go_backwards: bool = False) -> None:
    """A Keras layer, as its class and its config, computes what the cell does."""
    expected = _KERAS_LAYERS[cell.name] | {"dropout": 0, "recurrent_dropout": 0, "go_backwards": go_backwards}
    if came["class"] == "Bidirectional":
        expected = {"merge_mode": "concat"}
        for key, reverse in (("layer", False), ("backward_layer", True)):
            _check_keras(cell, name, {"class": came[key]["class_name"]} | came[key]["config"], reverse)
    for option, value in expected.items():
        given = came.get(option)
        if given != value:
            raise ValueError(
                f"{name}: expected a Keras layer with {option}={value!r} for the cell {cell.name!r}, got "
                f"{'a custom one' if isinstance(given, dict) else repr(given)}{_KERAS_ADVICE.get(option, '')}"
            )


def _last(recurrent_kernel: Any, gates: int) -> int:
    """H of a recurrent kernel (H, G*H); -1 of what is none, which `_Sizes` then refuses by name."""
    shape = np.shape(recurrent_kernel)
    return shape[0] if len(shape) == 2 and shape[1] == gates * shape[0] else -1


def _of_cudnn(cell: Cell, name: str, layer: Sequence[Any], each: int) -> list[Any]:
    """Weights of a `CuDNNLSTM` or `CuDNNGRU` of Keras 2, as Keras's own files of it are read into an LSTM or GRU.

    Their biases have both halves of cuDNN, (2*G*H,). Kernels hold for each gate the transpose of cuDNN's matrix, the
    recurrent one as it is; of the other the block has the memory of cuDNN's (H, I) under the shape (I, H).
    """
    if cell.name not in _CUDNN_CELLS:
        raise ValueError(
            f"{name}[2]: expected the cell {' or '.join(map(repr, _CUDNN_CELLS))} for a bias of shape (2*G*H,), the "
            f"format of CuDNNLSTM and CuDNNGRU, got the cell {cell.name!r}"
        )
    gates = len(cell.gates)
    converted: list[Any] = []
    for at in range(0, len(layer), each):
        kernel, recurrent, bias = (np.asarray(one) for one in layer[at : at + each])
        blocks = [block.reshape(block.shape[::-1]).T for block in np.split(kernel, gates, axis=1)]
        converted += [np.hstack(blocks), np.hstack([block.T for block in np.split(recurrent, gates, axis=1)])]
        halves = bias.reshape(2, -1)
        converted.append(halves if cell.separate_gates else halves.sum(axis=0))
    return converted


_CUDNN_CELLS = ("lstm", "gru")


def _read_keras(cell: Cell, sizes: _Sizes, name: str, layer: Any) -> Directions:
    if hasattr(layer, "get_config"):
        _check_keras(cell, name, {"class": type(layer).__name__} | layer.get_config())
        layer = layer.get_weights()
    if not isinstance(layer, list | tuple):
        raise TypeError(f"{name}: expected a Keras layer or a list of its weights, got {describe(layer)}")
    if len(layer) not in (2, 3, 4, 6):
        raise ValueError(
            f"{name}: expected kernel, recurrent_kernel and, where there is one, bias, for one or two directions, "
            f"got {len(layer)} arrays"
        )
    rows = f"{len(cell.gates)}*H"
    shapes = [f"I, {rows}", f"H, {rows}", f"2, {rows}" if cell.separate_gates else rows]
    count = 2 if len(layer) > 3 else 1
    each = len(layer) // count
    if each == 3 and np.shape(layer[2]) == (2 * len(cell.gates) * _last(layer[1], len(cell.gates)),):
        layer = _of_cudnn(cell, name, layer, each)
    arrays = [sizes.array(f"{name}[{at}]", array, shapes[at % each]) for at, array in enumerate(layer)]
    directions = []
    for kernel, recurrent_kernel, *bias in (arrays[:each], arrays[each:])[:count]:
        one = {"w_ih": kernel.T, "w_hh": recurrent_kernel.T}
        if bias:
            one["b_ih"], one["b_hh"] = bias[0] if cell.separate_gates else (bias[0], np.zeros_like(bias[0]))
        directions.append(one)
    return directions


def _write_keras(cell: Cell, directions: Directions) -> list[Array]:
    layer = []
    for one in directions:
        layer += [np.ascontiguousarray(one["w_ih"].T), np.ascontiguousarray(one["w_hh"].T)]
        if "b_ih" in one:
            biases = np.stack([one["b_ih"], one["b_hh"]])
            layer.append(biases if cell.separate_gates else biases.sum(axis=0))
    return layer


_KERAS = _Format("Keras", _KERAS_GATES, _read_keras, _write_keras)

_ONNX_PEEPHOLES = ("p_i", "p_o", "p_f")


def _read_onnx(cell: Cell, sizes: _Sizes, name: str, layer: Any) -> Directions:
    check_names(name, layer, layer)  # that it is a mapping
    given = {key: value for key, value in layer.items() if value is not None}
    gates = len(cell.gates)
    shapes = {"W": f"D, {gates}*H, I", "R": f"D, {gates}*H, H"}
    shapes |= {"B": f"D, {2 * gates}*H"} if "B" in given else {}
    shapes |= {"P": f"D, {len(cell.extras)}*H"} if cell.extras else {}
    check_names(name, given, shapes)
    arrays = {key: sizes.array(f"{name}[{key!r}]", given[key], shape) for key, shape in shapes.items()}
    parts = {"w_ih": arrays["W"], "w_hh": arrays["R"]}
    if "B" in arrays:
        parts["b_ih"], parts["b_hh"] = np.split(arrays["B"], 2, axis=1)
    if "P" in arrays:
        parts |= zip(_ONNX_PEEPHOLES, np.split(arrays["P"], 3, axis=1), strict=True)
    return [{key: part[direction] for key, part in parts.items()} for direction in range(sizes["D"])]


def _write_onnx(cell: Cell, directions: Directions) -> dict[str, Array]:
    parts = {key: np.stack([one[key] for one in directions]) for key in directions[0]}
    layer = {"W": parts["w_ih"], "R": parts["w_hh"]}
    if "b_ih" in parts:
        layer["B"] = np.concatenate([parts["b_ih"], parts["b_hh"]], axis=1)
    if cell.extras:
        layer["P"] = np.concatenate([parts[key] for key in _ONNX_PEEPHOLES], axis=1)
    return layer


_ONNX = _Format("ONNX", _ONNX_GATES, _read_onnx, _write_onnx)


@dataclass(frozen=True)
class _Dense:
    """The dense layers a Flax cell is made of, each for one gate or for all of them, and which have a bias."""

    inputs: tuple[str, ...]
    recurrents: tuple[str, ...]
    biased: tuple[str, ...]


_FUSED = ("dense_i",), ("dense_h",)
_LSTM_RECURRENTS = ("hi", "hf", "hg", "ho")
_RNN_CELLS = ("rnn_tanh", "rnn_relu", "rnn_sigmoid")
# By the name of the cell; Flax has the gates in our order.
_FLAX_DENSE = {
    "linen": {
        **dict.fromkeys(_RNN_CELLS, _Dense(("i",), ("h",), ("i",))),
        "lstm": _Dense(("ii", "if", "ig", "io"), _LSTM_RECURRENTS, _LSTM_RECURRENTS),
        "gru": _Dense(("ir", "iz", "in"), ("hr", "hz", "hn"), ("ir", "iz", "in", "hn")),
    },
    "nnx": {
        **dict.fromkeys(_RNN_CELLS, _Dense(*_FUSED, ("dense_i",))),
        "lstm": _Dense(*_FUSED, ("dense_h",)),
        "gru": _Dense(*_FUSED, ("dense_i",)),
    },
    "nnx.LSTMCell": {"lstm": _Dense(("ii", "if_", "ig", "io"), _LSTM_RECURRENTS, _LSTM_RECURRENTS)},
}


def _read_flax(cell: Cell, sizes: _Sizes, name: str, layer: Any) -> Directions:
    if isinstance(layer, list | tuple):
        return [_read_flax_cell(cell, sizes, f"{name}[{index}]", one) for index, one in enumerate(layer)]
    return [_read_flax_cell(cell, sizes, name, layer)]


def _read_flax_cell(cell: Cell, sizes: _Sizes, name: str, params: Any) -> dict[str, Array]:
    check_names(name, params, params)  # that it is a mapping
    layouts = [layout[cell.name] for layout in _FLAX_DENSE.values() if cell.name in layout]
    dense = next((one for one in layouts if {*one.inputs, *one.recurrents} == {*params}), layouts[0])
    check_names(name, params, dense.inputs + dense.recurrents)
    weights: dict[str, Array] = {}
    for side, names, columns in (("ih", dense.inputs, "I"), ("hh", dense.recurrents, "H")):
        rows = "H" if len(names) == len(cell.gates) else f"{len(cell.gates)}*H"
        kernels, biases = [], []
        for one in names:
            shapes = {"kernel": f"{columns}, {rows}"} | ({"bias": rows} if one in dense.biased else {})
            check_names(f"{name}[{one!r}]", params[one], shapes)
            arrays = {key: sizes.array(f"{name}[{one!r}][{key!r}]", params[one][key], shapes[key]) for key in shapes}
            kernels.append(arrays["kernel"].T)
            biases.append(arrays.get("bias", np.zeros_like(arrays["kernel"][0])))
        weights |= {f"w_{side}": np.concatenate(kernels), f"b_{side}": np.concatenate(biases)}
    return weights


def _write_flax(module: str, cell: Cell, directions: Directions) -> Any:
    cells = [_write_flax_cell(module, cell, one) for one in directions]
    return cells[0] if len(cells) == 1 else cells


def _write_flax_cell(module: str, cell: Cell, weights: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    gates = len(cell.gates)
    dense = _FLAX_DENSE[module][cell.name]
    zeros = np.zeros_like(weights["w_hh"][:, 0])
    b_ih, b_hh = (weights.get(key, zeros).reshape(gates, -1) for key in ("b_ih", "b_hh"))
    # For each gate, has the one side a bias, and the other?
    on_input, on_recurrent = (
        np.repeat([[name in dense.biased] for name in names], gates // len(names), axis=0)
        for names in (dense.inputs, dense.recurrents)
    )
    for gate, biased, bias in zip(cell.gates, on_recurrent, b_hh, strict=True):
        if gate in cell.separate_gates and not biased and bias.any():
            raise ValueError(
                f"weights: expected zeros in the rows of bias_hh that belong to the gate {gate}, for which Flax "
                f"{module} has no bias, got others"
            )
    params = {}
    for names, matrix, bias in (
        (dense.inputs, weights["w_ih"], np.where(on_recurrent, b_ih, b_ih + b_hh)),
        (dense.recurrents, weights["w_hh"], np.where(on_input, b_hh, b_ih + b_hh)),
    ):
        kernels, biases = np.split(matrix, len(names)), np.split(bias.ravel(), len(names))
        for name, kernel, one in zip(names, kernels, biases, strict=True):
            params[name] = {"kernel": np.ascontiguousarray(kernel.T)} | ({"bias": one} if name in dense.biased else {})
    return params


_FLAX = {
    module: _Format(
        f"Flax {module}",
        {cell: _IN_OUR_ORDER[cell] for cell in layout},
        _read_flax,
        partial(_write_flax, module),
    )
    for module, layout in _FLAX_DENSE.items()
}
