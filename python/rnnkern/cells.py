"""Every cell once: the names of its gates, states and extras, and its elementwise math, forward and backward.

The math of a cell is a pair of functions made from a `Math`, so that the same lines run in NumPy (the reference),
in Numba on a CPU and in a CUDA kernel. Their arguments are indexable by gate, state, extra or saved value; what an
element is (a NumPy array, a Python list of arrays, a scalar of a Numba view) is the caller's business:

    forward(x, r, extra, prev, new, saved)
        x[g], r[g]   pre-activations of gate g: the input's share (W_ih x + b_ih) and the recurrent (W_hh h + b_hh)
        prev[s]      states before the step; new[s] receives the states after it
        saved[v]     receives what backward needs
    backward(saved, extra, prev, dnew, dx, dr, dprev, dextra)
        dnew[s]      gradients of the states after the step
        dx[g], dr[g] receive the gradients of x[g] and r[g]
        dprev[s]     receives the gradient of prev[s] that does not go through W_hh
        dextra[e]    receives the gradient of extra[e] at this step and row

A cell with two dependent products a step also has `prepare` and `prepare_backward`; see `gru_reset_before`.
"""

from __future__ import annotations

import math as numbers
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["CELLS", "NONLINEARITIES", "Cell", "CellMath", "Math", "cell_of_nonlinearity", "table"]


# Where an activation hardly has a slope: at or below the first of these, and above the second.
SATURATED = {"sigmoid": (0.1, 0.9), "tanh": (-0.9, 0.9), "relu": (0.0, numbers.inf)}


class Math(Protocol):
    """The elementwise functions and constants a cell is written in; constants have the type of the elements."""

    @property
    def one(self) -> Any: ...
    @property
    def zero(self) -> Any: ...
    @property
    def sigmoid(self) -> Callable[[Any], Any]: ...
    @property
    def tanh(self) -> Callable[[Any], Any]: ...
    @property
    def relu(self) -> Callable[[Any], Any]: ...
    @property
    def relu_gradient(self) -> Callable[[Any], Any]:
        """Of h = relu(a), as a function of h: 1 where h > 0, else 0; NaN of NaN."""


@dataclass(frozen=True)
class CellMath:
    """The functions of a cell for one `Math`; the `prepare` pair only where a cell has two products a step."""

    forward: Callable[..., None]
    backward: Callable[..., None]
    prepare: Callable[..., None] | None = None
    prepare_backward: Callable[..., None] | None = None


@dataclass(frozen=True)
class Cell:
    """What the package knows of a cell. Gate order is that of the rows of `weight_ih` and `weight_hh`."""

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    math: Callable[[Math], CellMath]
    activations: tuple[str, ...]  # of each gate, by its name in `Math`
    keeps: str = ""  # the gate that says how much of the state stays: all of it where the gate is 1
    renews: str = ""  # the same the other way round: nothing of it where the gate is 1
    admits: str = ""  # the gate of what is new, where that is not 1 less what stays
    extras: tuple[str, ...] = ()  # vectors of H elements beside the matrices and biases
    late_gates: int = 0  # last gates whose recurrent product waits for `prepare`
    projects: bool = False  # may have a projection: the math never reads the previous h elementwise
    separate_gates: tuple[str, ...] = ()  # use x[g] and r[g] apart and not their sum, so that two biases do not merge
    bounded: bool = True  # what recurrent products take of a step is within [-1, 1] where the h before it is
    nonlinearity: str = ""  # what `rnnkern.RNN` calls it, of the cells which that layer chooses from
    source: str = ""  # the paper

    @property
    def saturated(self) -> list[tuple[float, float]]:
        """Of each gate: it is saturated at or below the first of these, and above the second."""
        return [SATURATED[activation] for activation in self.activations]

    def __reduce__(self) -> tuple[Callable[[str], Cell], tuple[str]]:
        return _cell, (self.name,)  # by name: functions made in functions cannot be pickled


def _cell(name: str) -> Cell:
    return CELLS[name]


def _rnn(activation: str) -> Callable[[Math], CellMath]:
    """Elman 1990: h' = activation(W_ih x + b_ih + W_hh h + b_hh)."""

    def bind(math: Math) -> CellMath:
        one, zero, relu_gradient = math.one, math.zero, math.relu_gradient
        function = getattr(math, activation)

        def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
            h = function(x[0] + r[0])
            saved[0] = h
            new[0] = h

        def backward_tanh(
            saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any
        ) -> None:
            d = dnew[0] * (one - saved[0] * saved[0])
            dx[0] = d
            dr[0] = d
            dprev[0] = zero

        def backward_sigmoid(
            saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any
        ) -> None:
            d = dnew[0] * (saved[0] * (one - saved[0]))
            dx[0] = d
            dr[0] = d
            dprev[0] = zero

        def backward_relu(
            saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any
        ) -> None:
            d = dnew[0] * relu_gradient(saved[0])
            dx[0] = d
            dr[0] = d
            dprev[0] = zero

        backward = {"tanh": backward_tanh, "sigmoid": backward_sigmoid, "relu": backward_relu}[activation]
        return CellMath(forward, backward)

    return bind


def _lstm(math: Math) -> CellMath:
    """Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000."""
    one, zero, sigmoid, tanh = math.one, math.zero, math.sigmoid, math.tanh

    def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
        i = sigmoid(x[0] + r[0])
        f = sigmoid(x[1] + r[1])
        g = tanh(x[2] + r[2])
        o = sigmoid(x[3] + r[3])
        c = f * prev[1] + i * g
        saved[0] = i
        saved[1] = f
        saved[2] = g
        saved[3] = o
        saved[4] = c
        new[0] = o * tanh(c)
        new[1] = c

    def backward(saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any) -> None:
        i, f, g, o = saved[0], saved[1], saved[2], saved[3]
        tanh_c = tanh(saved[4])
        dc = dnew[1] + dnew[0] * o * (one - tanh_c * tanh_c)
        di = dc * g * (i * (one - i))
        df = dc * prev[1] * (f * (one - f))
        dg = dc * i * (one - g * g)
        do = dnew[0] * tanh_c * (o * (one - o))
        dx[0] = di
        dx[1] = df
        dx[2] = dg
        dx[3] = do
        dr[0] = di
        dr[1] = df
        dr[2] = dg
        dr[3] = do
        dprev[0] = zero
        dprev[1] = dc * f

    return CellMath(forward, backward)


def _lstm_peephole(math: Math) -> CellMath:
    """Gers and Schmidhuber 2000: the gates see the cell state through peepholes, the output gate the new one."""
    one, zero, sigmoid, tanh = math.one, math.zero, math.sigmoid, math.tanh

    def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
        i = sigmoid(x[0] + r[0] + extra[0] * prev[1])
        f = sigmoid(x[1] + r[1] + extra[1] * prev[1])
        g = tanh(x[2] + r[2])
        c = f * prev[1] + i * g
        o = sigmoid(x[3] + r[3] + extra[2] * c)
        saved[0] = i
        saved[1] = f
        saved[2] = g
        saved[3] = o
        saved[4] = c
        new[0] = o * tanh(c)
        new[1] = c

    def backward(saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any) -> None:
        i, f, g, o, c = saved[0], saved[1], saved[2], saved[3], saved[4]
        tanh_c = tanh(c)
        do = dnew[0] * tanh_c * (o * (one - o))
        dc = dnew[1] + dnew[0] * o * (one - tanh_c * tanh_c) + do * extra[2]
        di = dc * g * (i * (one - i))
        df = dc * prev[1] * (f * (one - f))
        dg = dc * i * (one - g * g)
        dx[0] = di
        dx[1] = df
        dx[2] = dg
        dx[3] = do
        dr[0] = di
        dr[1] = df
        dr[2] = dg
        dr[3] = do
        dprev[0] = zero
        dprev[1] = dc * f + di * extra[0] + df * extra[1]
        dextra[0] = di * prev[1]
        dextra[1] = df * prev[1]
        dextra[2] = do * c

    return CellMath(forward, backward)


def _gru(math: Math) -> CellMath:
    """Cho et al. 2014 with the reset gate after the product (cuDNN, PyTorch)."""
    one, sigmoid, tanh = math.one, math.sigmoid, math.tanh

    def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
        reset = sigmoid(x[0] + r[0])
        z = sigmoid(x[1] + r[1])
        m = r[2]
        n = tanh(x[2] + reset * m)
        saved[0] = reset
        saved[1] = z
        saved[2] = n
        saved[3] = m
        new[0] = (one - z) * n + z * prev[0]

    def backward(saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any) -> None:
        reset, z, n, m = saved[0], saved[1], saved[2], saved[3]
        dn = dnew[0] * (one - z) * (one - n * n)
        dz = dnew[0] * (prev[0] - n) * (z * (one - z))
        dreset = dn * m * (reset * (one - reset))
        dx[0] = dreset
        dx[1] = dz
        dx[2] = dn
        dr[0] = dreset
        dr[1] = dz
        dr[2] = dn * reset
        dprev[0] = dnew[0] * z

    return CellMath(forward, backward)


def _gru_reset_before(math: Math) -> CellMath:
    """Cho et al. 2014, equations 5 to 8: the reset gate scales h before the candidate's product.

    A step is `prepare` (r, z and the scaled state, from the products of the first two gates), the product of the last
    gate with the scaled state, and `forward`. Backward runs them in the opposite order.
    """
    one, sigmoid, tanh = math.one, math.sigmoid, math.tanh

    def prepare(x: Any, r: Any, prev: Any, scaled: Any, saved: Any) -> None:
        reset = sigmoid(x[0] + r[0])
        saved[0] = reset
        saved[1] = sigmoid(x[1] + r[1])
        scaled[0] = reset * prev[0]

    def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
        n = tanh(x[2] + r[2])
        z = saved[1]
        saved[2] = n
        new[0] = (one - z) * n + z * prev[0]

    def backward(saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any) -> None:
        z, n = saved[1], saved[2]
        dz = dnew[0] * (prev[0] - n) * (z * (one - z))
        dn = dnew[0] * (one - z) * (one - n * n)
        dx[1] = dz
        dr[1] = dz
        dx[2] = dn
        dr[2] = dn
        dprev[0] = dnew[0] * z

    def prepare_backward(saved: Any, prev: Any, dscaled: Any, dx: Any, dr: Any, dprev: Any) -> None:
        reset = saved[0]
        dreset = dscaled[0] * prev[0] * (reset * (one - reset))
        dx[0] = dreset
        dr[0] = dreset
        dprev[0] = dprev[0] + dscaled[0] * reset

    return CellMath(forward, backward, prepare, prepare_backward)


def _mgu(math: Math) -> CellMath:
    """Zhou et al. 2016, the minimal gated unit: one gate forgets and resets."""
    one, sigmoid, tanh = math.one, math.sigmoid, math.tanh

    def prepare(x: Any, r: Any, prev: Any, scaled: Any, saved: Any) -> None:
        f = sigmoid(x[0] + r[0])
        saved[0] = f
        scaled[0] = f * prev[0]

    def forward(x: Any, r: Any, extra: Any, prev: Any, new: Any, saved: Any) -> None:
        f = saved[0]
        n = tanh(x[1] + r[1])
        saved[1] = n
        new[0] = (one - f) * prev[0] + f * n

    def backward(saved: Any, extra: Any, prev: Any, dnew: Any, dx: Any, dr: Any, dprev: Any, dextra: Any) -> None:
        f, n = saved[0], saved[1]
        dn = dnew[0] * f * (one - n * n)
        dx[0] = dnew[0] * (n - prev[0])  # of f, until prepare_backward makes it that of x
        dx[1] = dn
        dr[1] = dn
        dprev[0] = dnew[0] * (one - f)

    def prepare_backward(saved: Any, prev: Any, dscaled: Any, dx: Any, dr: Any, dprev: Any) -> None:
        f = saved[0]
        df = (dx[0] + dscaled[0] * prev[0]) * (f * (one - f))
        dx[0] = df
        dr[0] = df
        dprev[0] = dprev[0] + dscaled[0] * f

    return CellMath(forward, backward, prepare, prepare_backward)


class _Registry(Mapping[str, Cell]):
    """Cells by name; an unknown name is a ValueError that lists what there is."""

    def __init__(self, *cells: Cell) -> None:
        self._cells = {cell.name: cell for cell in cells}

    def __getitem__(self, name: str) -> Cell:
        if not isinstance(name, str):
            raise TypeError(f"cell: expected a name (str), got {type(name).__name__}")
        if name not in self._cells:
            raise ValueError(f"cell: expected one of {', '.join(self._cells)}, got {name!r}")
        return self._cells[name]

    def __contains__(self, name: object) -> bool:
        return name in self._cells

    def __iter__(self) -> Iterator[str]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)


CELLS: Mapping[str, Cell] = _Registry(
    *(
        Cell(
            f"rnn_{name}",
            ("h",),
            ("h",),
            ("h",),
            _rnn(name),
            (name,),
            bounded=name != "relu",
            nonlinearity=name,
            source="Elman 1990",
        )
        for name in ("tanh", "relu", "sigmoid")
    ),
    Cell(
        "lstm",
        tuple("ifgo"),
        ("h", "c"),
        ("i", "f", "g", "o", "c"),
        _lstm,
        ("sigmoid", "sigmoid", "tanh", "sigmoid"),
        keeps="f",
        admits="i",
        projects=True,
        source="Hochreiter and Schmidhuber 1997, Gers et al. 2000",
    ),
    Cell(
        "lstm_peephole",
        tuple("ifgo"),
        ("h", "c"),
        ("i", "f", "g", "o", "c"),
        _lstm_peephole,
        ("sigmoid", "sigmoid", "tanh", "sigmoid"),
        keeps="f",
        admits="i",
        extras=("p_i", "p_f", "p_o"),
        projects=True,
        source="Gers and Schmidhuber 2000",
    ),
    Cell(
        "gru",
        tuple("rzn"),
        ("h",),
        ("r", "z", "n", "m"),
        _gru,
        ("sigmoid", "sigmoid", "tanh"),
        keeps="z",
        separate_gates=("n",),
        source="Cho et al. 2014, the reset gate after the product as in PyTorch and cuDNN",
    ),
    Cell(
        "gru_reset_before",
        tuple("rzn"),
        ("h",),
        ("r", "z", "n"),
        _gru_reset_before,
        ("sigmoid", "sigmoid", "tanh"),
        keeps="z",
        late_gates=1,
        source="Cho et al. 2014, equations 5 to 8",
    ),
    Cell(
        "mgu",
        tuple("fn"),
        ("h",),
        ("f", "n"),
        _mgu,
        ("sigmoid", "tanh"),
        renews="f",
        late_gates=1,
        source="Zhou et al. 2016, equation 8",
    ),
)

# The cells of `rnnkern.RNN` by its argument `nonlinearity`.
NONLINEARITIES = {cell.nonlinearity: cell.name for cell in CELLS.values() if cell.nonlinearity}


def cell_of_nonlinearity(nonlinearity: object) -> str:
    """The name of the cell that `rnnkern.RNN` takes for a nonlinearity."""
    if not isinstance(nonlinearity, str):
        raise TypeError(f"nonlinearity: expected a name (str), got {type(nonlinearity).__name__} {nonlinearity!r}")
    if nonlinearity not in NONLINEARITIES:
        raise ValueError(f"nonlinearity: expected one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    return NONLINEARITIES[nonlinearity]


def table() -> str:
    """Every cell in a table of Markdown: gates, states, extras, whether it takes a projection, and the source."""
    rows = [
        (f"`{cell.name}`", " ".join(cell.gates), " ".join(cell.states), " ".join(cell.extras),
         "yes" if cell.projects else "", cell.source)
        for cell in CELLS.values()
    ]  # fmt: skip
    head = ("cell", "gates", "states", "extras", "projection", "source")
    lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)
