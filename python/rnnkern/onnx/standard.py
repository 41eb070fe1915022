"""The RNN, LSTM and GRU operators as the ONNX standard writes them: attributes, activations and one time loop.

Letters are those of the standard: W and R are the weights of input and recurrence, Wb and Rb their biases, P the
peepholes; f, g and h are the activations. Gates are in its order, i o f c (LSTM) and z r h (GRU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..reference import EXACT

__all__ = ["ACTIVATIONS", "DIRECTIONS", "OPERATORS", "Attributes", "Operator", "run"]

Array = NDArray[Any]
Function = Callable[[Array], Array]
State = list[Array]  # h, and for the LSTM c

DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}  # which run in reverse

# Each activation with the default alpha and beta where it takes them: those of the operator of that name. There is no
# operator Affine or ScaledTanh, so no default either.
ACTIVATIONS: Mapping[str, tuple[Callable[..., Array], Mapping[str, float | None]]] = {
    "Relu": (lambda x: np.maximum(x, 0), {}),
    "Tanh": (np.tanh, {}),
    "Sigmoid": (EXACT.sigmoid, {}),
    "Affine": (lambda x, alpha, beta: alpha * x + beta, {"alpha": None, "beta": None}),
    "LeakyRelu": (lambda x, alpha: np.where(x >= 0, x, alpha * x), {"alpha": 0.01}),
    "ThresholdedRelu": (lambda x, alpha: np.where(x >= alpha, x, np.zeros_like(x)), {"alpha": 1.0}),
    "ScaledTanh": (lambda x, alpha, beta: alpha * np.tanh(beta * x), {"alpha": None, "beta": None}),
    "HardSigmoid": (lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1), {"alpha": 0.2, "beta": 0.5}),
    "Elu": (lambda x, alpha: np.where(x >= 0, x, alpha * np.expm1(np.minimum(x, 0))), {"alpha": 1.0}),
    "Softsign": (lambda x: x / (1 + np.abs(x)), {}),
    "Softplus": (lambda x: np.logaddexp(x, 0), {}),
}
_BY_LOWER = {name.lower(): name for name in ACTIVATIONS}  # exporters differ in the case, and runtimes ignore it


@dataclass(frozen=True)
class Direction:
    """What one direction of a node computes with."""

    W: Array  # (G*H, I)
    R: Array  # (G*H, H)
    Wb: Array  # (G*H,)
    Rb: Array  # (G*H,)
    P: Array | None  # (3*H,)
    functions: tuple[Function, ...]  # f, g and h, f and g with the clip before them
    input_forget: bool
    linear_before_reset: bool


def _rnn(x: Array, state: State, d: Direction) -> State:
    (H,), (f,) = state, d.functions
    return [f(x @ d.W.T + H @ d.R.T + d.Wb + d.Rb)]


def _lstm(x: Array, state: State, d: Direction) -> State:
    (H, C), (f, g, h) = state, d.functions
    i, o, forget, c = np.split(x @ d.W.T + H @ d.R.T + d.Wb + d.Rb, 4, axis=-1)
    if d.P is not None:
        p_i, p_o, p_f = np.split(d.P, 3)
        i, forget = i + p_i * C, forget + p_f * C
    i = f(i)
    C = (1 - i if d.input_forget else f(forget)) * C + i * g(c)
    if d.P is not None:
        o = o + p_o * C
    return [f(o) * h(C), C]


def _gru(x: Array, state: State, d: Direction) -> State:
    (H,), (f, g) = state, d.functions
    x_z, x_r, x_h = np.split(x @ d.W.T + d.Wb, 3, axis=-1)
    R_z, R_r, R_h = np.split(d.R, 3)
    b_z, b_r, b_h = np.split(d.Rb, 3)
    z = f(x_z + H @ R_z.T + b_z)
    r = f(x_r + H @ R_r.T + b_r)
    h = g(x_h + (r * (H @ R_h.T + b_h) if d.linear_before_reset else (r * H) @ R_h.T + b_h))
    return [(1 - z) * h + z * H]


@dataclass(frozen=True)
class Operator:
    """What differs between the three."""

    name: str
    gates: int
    activations: tuple[str, ...]  # of a direction, unless a node says others
    step: Callable[[Array, State, Direction], State]  # x (B, I), states (B, H)
    inputs: tuple[str, ...] = ("X", "W", "R", "B", "sequence_lens", "initial_h")
    states: tuple[str, ...] = ("initial_h",)


OPERATORS: Mapping[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("RNN", 1, ("Tanh",), _rnn),
        Operator("GRU", 3, ("Sigmoid", "Tanh"), _gru),
        Operator(
            "LSTM",
            4,
            ("Sigmoid", "Tanh", "Tanh"),
            _lstm,
            ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
            ("initial_h", "initial_c"),
        ),
    )
}

# Cells of this package by the operator and the activations of a direction.
_CELLS = {
    ("RNN", "Tanh"): "rnn_tanh",
    ("RNN", "Relu"): "rnn_relu",
    ("RNN", "Sigmoid"): "rnn_sigmoid",
    ("LSTM", "Sigmoid", "Tanh", "Tanh"): "lstm",
    ("GRU", "Sigmoid", "Tanh"): "gru",
}


@dataclass(frozen=True)
class Activation:
    """A name of `ACTIVATIONS` with its alpha and beta."""

    name: str
    parameters: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Attributes:
    """The attributes of a node, checked and with their defaults."""

    operator: Operator
    reverse: tuple[bool, ...]  # for each direction
    activations: tuple[tuple[Activation, ...], ...]  # for each direction
    clip: float | None = None
    hidden_size: int | None = None
    batch_first: bool = False
    input_forget: bool = False
    linear_before_reset: bool = False

    @classmethod
    def of(cls, operator: str, values: Mapping[str, Any]) -> Attributes:
        """From the values a node has, by name.

        Raises
        ------
        ValueError
            The standard does not allow a value; the message names the attribute.

        Examples
        --------
        >>> attributes = Attributes.of("LSTM", {"direction": "bidirectional", "clip": 3.0})
        >>> attributes.reverse, attributes.obstacle
        ((False, True), 'clip=3')
        """
        entry = OPERATORS[operator]
        direction = values.get("direction", "forward")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
        reverse = DIRECTIONS[direction]
        clip = values.get("clip")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip: expected a positive number, got {clip:g}")
        return cls(
            entry,
            reverse,
            _activations(entry, len(reverse), values),
            # The largest float32 is what ONNX Runtime takes where there is no clip: it says so too, like infinity.
            None if clip is None or clip >= np.finfo(np.float32).max else float(clip),
            values.get("hidden_size"),
            _switch("layout", values),
            _switch("input_forget", values),
            bool(values.get("linear_before_reset", 0)),  # the standard: "when != 0"
        )

    def functions(self, direction: int) -> tuple[Function, ...]:
        """f, g and h of a direction, f and g with the clip before them.

        Nothing is clipped before h: its input is the cell state and not a gate, and ONNX Runtime does not either.
        """
        plain = [partial(ACTIVATIONS[one.name][0], **dict(one.parameters)) for one in self.activations[direction]]
        if self.clip is None:
            return tuple(plain)
        clipped = [partial(_clipped, one, self.clip) for one in plain]
        return (*clipped[:2], *plain[2:])

    @cached_property
    def obstacle(self) -> str | None:
        """What the kernels cannot do; None where there is no such thing."""
        if self.clip is not None:
            return f"clip={self.clip:g}"
        if self.input_forget:
            return "input_forget=1"
        if self._cell is None:
            return f"activations={[one.name for direction in self.activations for one in direction]}"
        return None

    def cell(self, peepholes: bool) -> str:
        """The cell of this package that does the same; only where there is no obstacle."""
        assert self._cell is not None
        if peepholes:
            return "lstm_peephole"
        return "gru_reset_before" if self._cell == "gru" and not self.linear_before_reset else self._cell

    @property
    def _cell(self) -> str | None:
        first, *others = ([one.name for one in direction] for direction in self.activations)
        return None if any(one != first for one in others) else _CELLS.get((self.operator.name, *first))


def _clipped(function: Function, clip: float, x: Array) -> Array:
    return function(np.clip(x, -clip, clip))


def _switch(name: str, values: Mapping[str, Any]) -> bool:
    value = values.get(name, 0)
    if value not in (0, 1):
        raise ValueError(f"{name}: expected 0 or 1, got {value}")
    return bool(value)


def _activations(operator: Operator, directions: int, values: Mapping[str, Any]) -> tuple[tuple[Activation, ...], ...]:
    """The activations of each direction; alpha and beta go, in order, to those that take one."""
    names = values.get("activations") or operator.activations * directions
    count = len(operator.activations)
    if operator.name == "RNN" and directions == 1 and len(names) == 2:
        names = names[:1]  # the default of the schema is for two directions, so nodes of one may have it too
    if len(names) != count * directions:
        raise ValueError(f"activations: expected {count} for each direction, {count * directions}, got {list(names)}")
    given = {key: list(values.get(f"activation_{key}") or ()) for key in ("alpha", "beta")}
    bound = []
    for name in names:
        if name.lower() not in _BY_LOWER:
            raise ValueError(f"activations: expected names out of {', '.join(ACTIVATIONS)}, got {name!r}")
        known = _BY_LOWER[name.lower()]
        parameters = []
        for key, default in ACTIVATIONS[known][1].items():
            value = given[key].pop(0) if given[key] else default
            if value is None:
                raise ValueError(f"activation_{key}: expected a value for {known}, which has no default, got none")
            parameters.append((key, float(value)))
        bound.append(Activation(known, tuple(parameters)))
    for key, left in given.items():
        if left:
            came = len(values[f"activation_{key}"])
            raise ValueError(
                f"activation_{key}: expected one value for each of the activations {list(names)} that take it, "
                f"{came - len(left)}, got {came}"
            )
    return tuple(tuple(bound[at : at + count]) for at in range(0, len(bound), count))


def run(
    attributes: Attributes,
    X: Array,
    W: Array,
    R: Array,
    B: Array | None,
    P: Array | None,
    lengths: Array | None,
    state: State,
) -> tuple[Array, State]:
    """Y and the final states of a node, one step after the other.

    Parameters
    ----------
    attributes
        Of the node.
    X, W, R, B, P
        As in the standard with layout=0, all of one dtype.
    lengths
        (B,) or None. Y past a row's end is zero.
    state
        Initial states (D, B, H).

    Returns
    -------
    Y, state
        (T, B, D, H), and the final states (D, B, H).
    """
    (T, rows, _), (D, _, H) = X.shape, R.shape
    Y = np.zeros((T, rows, D, H), X.dtype)
    final = [one.copy() for one in state]
    for index, reverse in enumerate(attributes.reverse):
        Wb, Rb = np.zeros((2, len(W[index])), X.dtype) if B is None else np.split(B[index], 2)
        direction = Direction(
            W[index],
            R[index],
            Wb,
            Rb,
            None if P is None else P[index],
            attributes.functions(index),
            attributes.input_forget,
            attributes.linear_before_reset,
        )
        for t in reversed(range(T)) if reverse else range(T):
            active = np.ones((rows, 1), bool) if lengths is None else (t < lengths)[:, None]
            new = attributes.operator.step(X[t], [one[index] for one in final], direction)
            for one, values in zip(final, new, strict=True):
                one[index] = np.where(active, values, one[index])
            Y[t, :, index] = np.where(active, new[0], 0)
    return Y, final
