"""Initial weights that move how far gradients flow: each function writes into the parameters of a layer, in place.

All layers and directions are written. What a function is for follows from what a cell declares of its gates in
`cells.py`; for another cell it raises a ValueError that names those which fit. `rnnkern.diagnose` measures the effect.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import describe, number, positive, seed_or_none
from .cells import CELLS, Cell
from .layers import Recurrent

__all__ = ["chrono", "forget_bias", "identity", "orthogonal", "uniform_gate"]

Array = NDArray[Any]


def orthogonal(layer: Recurrent[Any], gain: float = 1.0, *, seed: int | None = None) -> None:
    """Recurrent weights that turn h and stretch it by `gain` alone; Saxe et al. 2014.

    The block of `weight_hh` (H, P) of each gate becomes `gain` times a matrix with orthonormal columns, drawn uniformly
    (Mezzadri 2007). Gradients of a tanh layer near zero keep their length with gain 1. For every cell.

    Parameters
    ----------
    layer
        A layer, whose parameters are written into.
    gain
        Factor, positive.
    seed
        None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.RNN(3, 8, dtype="float64")
    >>> rk.init.orthogonal(layer, gain=0.9, seed=0)
    >>> w = layer.parameters["weight_hh_l0"]
    >>> bool(np.allclose(w.T @ w, 0.81 * np.eye(8)))
    True
    """
    cell = _cell_of(layer)
    gain, generator = positive("gain", gain), np.random.default_rng(seed_or_none(seed))
    for weights in _layers(layer):
        for gate in cell.gates:
            block = _block(cell, gate, weights["w_hh"])
            q, r = np.linalg.qr(generator.standard_normal(block.shape))
            block[...] = gain * q * np.sign(np.diagonal(r))  # without the signs q would not be uniform


def identity(layer: Recurrent[Any], gain: float = 1.0) -> None:
    """Recurrent weights `gain` times the identity, and biases of zero: IRNN, Le et al. 2015.

    h stays as it is until x changes it, and so does its gradient, while the units are active (relu) or small (tanh).
    For cells of one gate whose activation has slope 1.

    Parameters
    ----------
    layer
        A layer, whose parameters are written into.
    gain
        Factor, positive.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above, or the cell is another; the message names what fits.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.RNN(3, 8, nonlinearity="relu")
    >>> rk.init.identity(layer)
    >>> bool((layer.parameters["weight_hh_l0"] == np.eye(8)).all())
    True
    """
    _cell_of(layer, lambda cell: cell.activations in (("relu",), ("tanh",)))
    gain = positive("gain", gain)
    for weights in _layers(layer):
        weights["w_hh"][...] = gain * np.eye(len(weights["w_hh"]))
        for name in ("b_ih", "b_hh"):
            if name in weights:
                weights[name][...] = 0


def forget_bias(layer: Recurrent[Any], value: float = 1.0) -> None:
    """Biases with which the state stays at first: of the gate that keeps it, `value`; Gers et al. 2000.

    The gate is f of an LSTM, z of a GRU, and 1 - f of the minimal gated unit. Without inputs it is sigmoid(value), and
    the memory of a unit 1 + exp(value) steps. The bias is `bias_ih`; `bias_hh` of the gate becomes zero.

    Parameters
    ----------
    layer
        A layer with biases, whose parameters are written into.
    value
        The bias; 1 is usual (Jozefowicz et al. 2015).

    Raises
    ------
    TypeError, ValueError
        An argument is not as above, or the cell has no such gate; the message names what fits.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.LSTM(3, 2)
    >>> rk.init.forget_bias(layer)
    >>> layer.parameters["bias_ih_l0"][2:4].tolist(), layer.parameters["bias_hh_l0"][2:4].tolist()
    ([1.0, 1.0], [0.0, 0.0])
    """
    cell = _gated(layer)
    value = number("value", value)
    for weights in _layers(layer):
        _set_keeping(cell, weights, np.full(layer.hidden_size, value))


def chrono(layer: Recurrent[Any], longest: float, *, seed: int | None = None) -> None:
    """Biases that spread the memories of the units over the lags that matter; Tallec and Ollivier 2018.

    The bias of the gate that keeps the state is log(u), u uniform in [1, longest - 1], so that the unit remembers some
    1 + u steps; that of an input gate, where the cell has one, is its negative.

    Parameters
    ----------
    layer
        A layer with biases, whose parameters are written into.
    longest
        The longest lag that is expected to matter, in steps, more than 2.
    seed
        None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above, or the cell has no such gate; the message names what fits.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.GRU(3, 100)
    >>> rk.init.chrono(layer, longest=500, seed=0)
    >>> memory = 1 + np.exp(layer.parameters["bias_ih_l0"][100:200])
    >>> bool(2 <= memory.min() < 50), bool(450 < memory.max() <= 500)
    (True, True)
    """
    cell = _gated(layer)
    if not 2 < number("longest", longest) < np.inf:
        raise ValueError(f"longest: expected a finite number of steps > 2, got {longest}")
    generator = np.random.default_rng(seed_or_none(seed))
    for weights in _layers(layer):
        kept = np.log(generator.uniform(1, longest - 1, layer.hidden_size))
        _set_keeping(cell, weights, kept)
        if cell.admits:
            _set_bias(cell, weights, cell.admits, -kept)


def uniform_gate(layer: Recurrent[Any], *, seed: int | None = None) -> None:
    """Biases that spread the gate which keeps the state evenly over (0, 1); Gu et al. 2020.

    The bias is log(u / (1 - u)), u uniform in [1/H, 1 - 1/H]: memories of all lengths up to H, with no lag to be
    chosen. That of an input gate, where the cell has one, is its negative.

    Parameters
    ----------
    layer
        A layer with biases, whose parameters are written into.
    seed
        None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above, or the cell has no such gate; the message names what fits.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.LSTM(3, 100)
    >>> rk.init.uniform_gate(layer, seed=0)
    >>> f = 1 / (1 + np.exp(-layer.parameters["bias_ih_l0"][100:200]))
    >>> np.histogram(f, 4, (0, 1))[0].tolist()
    [22, 22, 25, 31]
    """
    cell = _gated(layer)
    generator = np.random.default_rng(seed_or_none(seed))
    end = min(1 / layer.hidden_size, 0.5)  # a single unit keeps half
    for weights in _layers(layer):
        share = generator.uniform(end, 1 - end, layer.hidden_size)
        kept = np.log(share / (1 - share))
        _set_keeping(cell, weights, kept)
        if cell.admits:
            _set_bias(cell, weights, cell.admits, -kept)


def _cell_of(layer: object, fits: Callable[[Cell], object] = lambda _: True) -> Cell:
    """The cell of a layer, if the initialisation is for it."""
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM, GRU or Recurrent, got {describe(layer)}")
    cell = CELLS[layer.cell]
    if not fits(cell):
        known = ", ".join(one.name for one in CELLS.values() if fits(one))
        raise ValueError(f"layer: expected one of the cells {known}, got {cell.name}")
    return cell


def _gated(layer: Recurrent[Any]) -> Cell:
    """The cell of a layer that has a gate which keeps the state, and a bias for it."""
    cell = _cell_of(layer, lambda cell: cell.keeps or cell.renews)
    if not layer.bias:
        raise ValueError(f"layer: expected one with biases (bias=True), got {layer!r}")
    return cell


def _layers(layer: Recurrent[Any]) -> Iterator[dict[str, Array]]:
    """The weights of each layer-direction by the names of the functional pair."""
    yield from layer._weights


def _block(cell: Cell, gate: str, array: Array) -> Array:
    """The rows of a weight or bias that are a gate's; a view."""
    index, hidden = cell.gates.index(gate), len(array) // len(cell.gates)
    block: Array = array[index * hidden : (index + 1) * hidden]
    return block


def _set_bias(cell: Cell, weights: dict[str, Array], gate: str, values: Array) -> None:
    """The bias of a gate, all of it in `b_ih`."""
    _block(cell, gate, weights["b_ih"])[...] = values
    _block(cell, gate, weights["b_hh"])[...] = 0


def _set_keeping(cell: Cell, weights: dict[str, Array], values: Array) -> None:
    """The bias of the gate that keeps the state, or its negative for the gate that renews it."""
    _set_bias(cell, weights, cell.keeps or cell.renews, values if cell.keeps else -values)
