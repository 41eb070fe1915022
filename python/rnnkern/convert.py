"""Weights between this package and other frameworks: gate orders, layouts and biases. Imports none of them.

Each pair is `from_x(cell, layers)`, which gives what `Recurrent.load_state_dict` takes, and `to_x(cell, weights)`, the
way back. `cell` is a name of the registry, `layers` has one item a layer, and arrays may be anything array-like on the
CPU. Results are new arrays of float32 or float64, the wider of what came.

Here a layer-direction is rows of gates, with two biases: w_ih (G*H, I), w_hh (G*H, P), b_ih and b_hh (G*H,).
A framework with a single bias gives b_ih and zeros, and gets their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array, as_floats, check_names, describe
from .cells import CELLS, Cell
from .layers import parameter_names
from .stack import Stack

__all__ = ["from_onnx", "to_onnx"]

Array = NDArray[Any]
Directions = list[dict[str, Array]]  # of one layer: the forward direction, then the reverse one where there is one


def from_onnx(cell: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Array]:
    """Weights of the ONNX operators RNN, LSTM and GRU, one mapping of their inputs for each layer.

    Parameters
    ----------
    cell
        Name of the cell that the attributes of the operators make: `"lstm_peephole"` of an LSTM with P,
        `"gru_reset_before"` of a GRU with linear_before_reset=0, `"gru"` with 1.
    layers
        Mappings with W (D, G*H, I) and R (D, G*H, H), where wanted B (D, 2*G*H), and P (D, 3*H) for the cell with
        peepholes; D = 2 is bidirectional. The reverse direction alone (D = 1) is read as the forward one.

    Returns
    -------
    dict
        Names and values for `load_state_dict` of a layer with `bias` as B is there.

    Raises
    ------
    ValueError, TypeError
        A name, a shape or the cell does not fit; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> operator = {"W": np.ones((2, 12, 3)), "R": np.ones((2, 12, 4)), "B": np.zeros((2, 24))}
    >>> layer = rk.GRU(3, 4, bidirectional=True)
    >>> layer.load_state_dict(from_onnx("gru", [operator]))
    """
    return _from(_ONNX, cell, layers)


def to_onnx(cell: str, weights: Mapping[str, Any]) -> list[dict[str, Array]]:
    """The inputs W, R, B (unless there are no biases) and P (with peepholes) of one ONNX operator for each layer.

    Parameters
    ----------
    cell
        Name of the cell.
    weights
        By the names of `Recurrent.parameters`.

    Raises
    ------
    ValueError, TypeError
        The standard has no such cell, or none with a projection; or a name or a shape does not fit.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.LSTM(3, 4, num_layers=2, bidirectional=True)
    >>> [first, second] = to_onnx(layer.cell, layer.parameters)
    >>> first["W"].shape, second["W"].shape, first["B"].shape
    ((2, 16, 3), (2, 16, 8), (2, 32))
    """
    return _to(_ONNX, cell, weights)


@dataclass(frozen=True)
class _Format:
    """What a framework has and how it orders it. `read` and `write` leave the rows in its own order of gates."""

    name: str
    cells: tuple[str, ...]
    gates: Mapping[str, str]  # from the gates of a cell, in our order, to the framework's order
    read: Callable[[Cell, _Sizes, str, Any], Directions]  # (cell, sizes, name for messages, one layer)
    write: Callable[[Cell, Directions], Any]

    def cell(self, name: str) -> Cell:
        """The cell, where the framework has it too."""
        cell = CELLS[name]
        if name not in self.cells:
            raise ValueError(f"cell: expected one that {self.name} has ({', '.join(self.cells)}), got {name!r}")
        return cell

    def order(self, cell: Cell) -> Array:
        """For each gate of the framework, its place in our order."""
        return np.array([cell.gates.index(gate) for gate in self.gates["".join(cell.gates)]])


class _Sizes(dict[str, int]):
    """Sizes by letter: found in the shape of one array, held to in those of the next."""

    def array(self, name: str, value: object, shape: str) -> Array:
        """An array of floats whose shape is such as "D, 4*H, I"; float32 where that holds every value of its dtype."""
        known = ", ".join(f"{letter}={size}" for letter, size in self.items())
        array = as_array(name, value)
        array = as_floats(name, array, np.dtype(np.float32 if np.can_cast(array.dtype, np.float32) else np.float64))
        terms = shape.split(", ")
        if len(terms) != array.ndim or not all(map(self._fits, terms, array.shape)):
            raise ValueError(f"{name}: expected shape ({shape}){' with ' * bool(known)}{known}, got {array.shape}")
        return array

    def _fits(self, term: str, size: int) -> bool:
        factor, _, letter = term.rpartition("*")
        count, rest = divmod(size, int(factor or 1))
        return count > 0 and not rest and count == self.setdefault(letter, count)


def _from(format: _Format, cell: str, layers: Sequence[Any]) -> dict[str, Array]:
    """The layers of a framework as a state dict, checked to be one stack."""
    entry = format.cell(cell)
    if not isinstance(layers, list | tuple):
        raise TypeError(f"layers: expected a list with one item for each layer, got {describe(layers)}")
    if not layers:
        raise ValueError("layers: expected a list with one item for each layer, got an empty one")
    sizes = _Sizes()
    directions: Directions = []
    for index, layer in enumerate(layers):
        read = format.read(entry, sizes, f"layers[{index}]", layer)
        directions += read
        if len(read) != sizes.setdefault("D", len(read)) or len(read) > 2:
            raise ValueError(f"layers[{index}]: expected {min(sizes['D'], 2)} direction(s), got {len(read)}")
        if any(one.keys() != directions[0].keys() for one in read):
            raise ValueError(
                f"layers[{index}]: expected {', '.join(directions[0])}, as in layers[0], got {', '.join(read[-1])}"
            )
        sizes["I"] = sizes["D"] * sizes["H"]
    order = np.argsort(format.order(entry))
    dtype = np.result_type(*(array for one in directions for array in one.values()))
    stack = Stack(entry, 1, 1, 0, len(layers), (False, True)[: sizes["D"]])  # for the names, which depend on no size
    return {
        name: _by_gate(key, weights[key], order).astype(dtype)
        for names, weights in zip(parameter_names(stack, "b_ih" in directions[0]), directions, strict=True)
        for key, name in names.items()
    }


def _to(format: _Format, cell: str, weights: Mapping[str, Any]) -> list[Any]:
    """A state dict as the layers of a framework."""
    entry = format.cell(cell)
    order = format.order(entry)
    layers = _layers(entry, weights)
    if "w_hr" in layers[0][0]:
        raise ValueError(f"weights: expected no projection, which {format.name} does not have, got weight_hr_l0")
    return [
        format.write(entry, [{key: _by_gate(key, array, order) for key, array in one.items()} for one in layer])
        for layer in layers
    ]


def _layers(cell: Cell, weights: Mapping[str, Any]) -> list[Directions]:
    """A state dict by layer and direction, checked to be that of a stack of this cell."""
    check_names("weights", weights, weights)  # that it is a mapping
    num_layers = 1
    while f"weight_ih_l{num_layers}" in weights:
        num_layers += 1
    projection = cell.projects and "weight_hr_l0" in weights
    count = 2 if "weight_ih_l0_reverse" in weights else 1
    stack = Stack(cell, 1, 1, int(projection), num_layers, (False, True)[:count])  # for the names
    names = parameter_names(stack, "bias_ih_l0" in weights)
    check_names("weights", weights, [name for one in names for name in one.values()])
    rows, state = f"{len(cell.gates)}*H", "P" if projection else "H"
    shapes = {"w_ih": f"{rows}, I", "w_hh": f"{rows}, {state}", "b_ih": rows, "b_hh": rows, "w_hr": "P, H"}
    shapes |= dict.fromkeys(cell.extras, "H")
    sizes = _Sizes()
    layers: list[Directions] = []
    for index in range(0, len(names), count):
        layers.append(
            [
                {key: sizes.array(f"weights[{name!r}]", weights[name], shapes[key]) for key, name in one.items()}
                for one in names[index : index + count]
            ]
        )
        sizes["I"] = count * sizes[state]
    return layers


def _by_gate(key: str, array: Array, order: Array) -> Array:
    """A copy of a weight, its rows in another order of gates where they are those of gates."""
    if key not in ("w_ih", "w_hh", "b_ih", "b_hh"):
        return array.copy()
    return array.reshape(len(order), -1, *array.shape[1:])[order].reshape(array.shape)


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


_ONNX = _Format("ONNX", tuple(CELLS), {"h": "h", "ifgo": "iofg", "rzn": "zrn"}, _read_onnx, _write_onnx)
