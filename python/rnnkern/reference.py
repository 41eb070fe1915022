"""The reference: forward and backpropagation through time in NumPy, one time loop over any cell.

It runs in the dtype it is given (float64 and longdouble as the measure of every kernel, complex for the complex-step
derivative), and in any `Arithmetic`, so that the accuracy rule can ask what rounding alone does to a problem. As the
backend `reference` it computes in float64 and rounds the results to the dtype of the layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cells import Cell, CellMath
from .stack import Backward, Forward, LayerSizes, Stack, State, Wanted, Weights, backward_by_layer, forward_by_layer

__all__ = [
    "EXACT",
    "ROUNDED",
    "Arithmetic",
    "Saved",
    "arithmetic_of",
    "backward_layer",
    "backward_rows",
    "backward_step",
    "bounded",
    "forward_layer",
    "gradients",
    "nearest_bfloat16",
]

Array = NDArray[Any]


def _sigmoid(a: Array) -> Array:
    if np.iscomplexobj(a):
        return np.asarray(1 / (1 + np.exp(-a)))
    small: Array = np.exp(-np.abs(a))  # in (0, 1]: no overflow on either side
    return np.asarray(np.where(a < 0, small, 1) / (1 + small))


def _relu(a: Array) -> Array:
    return np.where(a.real <= 0, 0, a)  # NaN stays NaN


def _relu_gradient(h: Array) -> Array:
    return np.where(np.isnan(h), h, (h.real > 0).astype(h.dtype))


def _matmul(a: Array, w: Array) -> Array:
    return a @ w.T


def _as_they_are(a: Array) -> Array:
    return a


def nearest_bfloat16(a: Array) -> Array:
    """The nearest numbers of 8 bits, ties to even, in the dtype of a; infinite from 2^128 on."""
    mantissa, exponent = np.frexp(a)
    rounded = np.ldexp(np.rint(mantissa * 256) / 256, exponent)
    return np.asarray(np.where(np.abs(rounded) < 2.0**128, rounded, rounded * np.inf), a.dtype)


@dataclass(frozen=True)
class Arithmetic:
    """How the reference computes. `product(a, w)`: a (..., K) times w (N, K) gives (..., N).

    `operand` is what becomes of both before: of the rows and the weights of every matrix product, not of sums that add
    rows of gradients, as for biases.
    """

    sigmoid: Callable[[Array], Array] = _sigmoid
    tanh: Callable[[Array], Array] = np.tanh
    relu: Callable[[Array], Array] = _relu
    relu_gradient: Callable[[Array], Array] = _relu_gradient
    product: Callable[[Array, Array], Array] = _matmul
    operand: Callable[[Array], Array] = _as_they_are
    one: float = 1.0
    zero: float = 0.0

    def multiply(self, a: Array, w: Array) -> Array:
        """The product of the operands."""
        return self.product(self.operand(a), self.operand(w))


EXACT = Arithmetic()
ROUNDED = Arithmetic(operand=nearest_bfloat16)


@dataclass(frozen=True)
class Saved:
    """What the backward of one layer-direction needs, a list over time each."""

    values: list[list[Array]]  # saved values of the cell, (B, H) each
    prev: list[list[Array]]  # states before each step, after the cut
    scaled: list[list[Array]]  # inputs of the late product, where the cell has one
    hidden: list[Array]  # h before the projection (B, H), where there is one


def _rows(values: Sequence[Array]) -> Array:
    """Arrays of one gate each, (B, H), as the rows of a matrix product: (B, G*H)."""
    return np.concatenate(list(values), axis=-1) if len(values) > 1 else values[0]


def _order(steps: int, reverse: bool) -> range:
    return range(steps - 1, -1, -1) if reverse else range(steps)


def forward_layer(
    sizes: LayerSizes,
    weights: Weights,
    x: Array,
    state: State,
    lengths: Array | None,
    cut: Array | None,
    y: Array,
    arithmetic: Arithmetic = EXACT,
) -> tuple[State, Saved]:
    """One layer-direction. x (T, B, I), state h (B, P) and others (B, H), cut bool (T, B) of `stack.cuts`; fills y."""
    cell, H = sizes.cell, sizes.hidden_size
    math = cell.math(arithmetic)
    G, early = len(cell.gates), (len(cell.gates) - cell.late_gates) * H
    no_bias = np.zeros(G * H, y.dtype)
    b_ih, b_hh = weights.get("b_ih", no_bias), weights.get("b_hh", no_bias)
    w_hh = weights["w_hh"]
    extra = [weights[name] for name in cell.extras]
    product = arithmetic.multiply
    input_share = (product(x, weights["w_ih"]) + b_ih).astype(y.dtype, copy=False)
    saved = Saved([[] for _ in x], [[] for _ in x], [[] for _ in x], list(x))
    current = list(state)
    for t in _order(len(x), sizes.reverse):
        prev = current if cut is None else [np.where(cut[t][:, None], 0, s).astype(s.dtype) for s in current]
        active = None if lengths is None else (t < lengths)[:, None]
        gates = np.split(input_share[t], G, axis=-1)
        recurrent = np.split(product(prev[0], w_hh[:early]) + b_hh[:early], G - cell.late_gates, axis=-1)
        values: list[Any] = [None] * len(cell.saved)
        new: list[Any] = [None] * len(cell.states)
        if math.prepare is not None:
            scaled: list[Any] = [None]
            math.prepare(gates, recurrent, prev, scaled, values)
            recurrent = [*recurrent, product(scaled[0], w_hh[early:]) + b_hh[early:]]
            saved.scaled[t] = scaled
        math.forward(gates, recurrent, extra, prev, new, values)
        if "w_hr" in weights:
            saved.hidden[t] = new[0]
            new[0] = product(new[0], weights["w_hr"])
        saved.values[t], saved.prev[t] = values, list(prev)
        current = new if active is None else [np.where(active, n, s) for n, s in zip(new, current, strict=True)]
        y[t] = new[0] if active is None else np.where(active, new[0], 0)
    return tuple(current), saved


def backward_step(
    sizes: LayerSizes,
    weights: Weights,
    math: CellMath,
    values: Sequence[Array],
    prev: Sequence[Array],
    dnew: Sequence[Array],
    product: Callable[[Array, Array], Array] = _matmul,
) -> tuple[list[Array], list[Array], list[Array], list[Array]]:
    """Gradients of the states after a step taken to those before it, a product with the transposed Jacobian.

    `values` and `prev` are what `forward_layer` has saved of the step; `dnew` may have dimensions before theirs.
    Returns the gradients of x's and h's share of each gate, of the states before the step, and of the extras.
    """
    cell, early = sizes.cell, (len(sizes.cell.gates) - sizes.cell.late_gates) * sizes.hidden_size
    w_hh, G = weights["w_hh"], len(cell.gates)
    if "w_hr" in weights:
        dnew = [product(dnew[0], weights["w_hr"].T), *dnew[1:]]
    dx: list[Any] = [None] * G
    dr: list[Any] = [None] * G
    dprev: list[Any] = [None] * len(cell.states)
    dextra: list[Any] = [None] * len(cell.extras)
    math.backward(values, [weights[name] for name in cell.extras], prev, dnew, dx, dr, dprev, dextra)
    if math.prepare_backward is not None:
        dscaled = product(_rows(dr[-cell.late_gates :]), w_hh[early:].T)
        math.prepare_backward(values, prev, [dscaled], dx, dr, dprev)
    recurrent = product(_rows(dr[: G - cell.late_gates]), w_hh[:early].T)
    dprev[0] = recurrent + dprev[0]
    return dx, dr, dprev, dextra


def bounded(gradient: Array, bound: tuple[str, float] | None) -> Array:
    """Each row of a gradient (B, .) by itself, its norm or its elements brought down to the bound."""
    if bound is None:
        return gradient
    kind, most = bound
    if kind == "value":
        return np.clip(gradient, -most, most)
    norm = _norms(gradient)
    factor = np.where((norm > most) & np.isfinite(norm), most / norm, 1).astype(gradient.dtype)
    return np.asarray(gradient * factor[:, None])


def _norms(rows: Array) -> Array:
    return np.asarray(np.sqrt(np.square(rows).sum(-1)))


def _measured(cell: Cell, gradients: Sequence[Array], values: Sequence[Array]) -> list[Array]:
    """The norms of the gradients of the states, and the share of the units where each gate is saturated, (B,) each."""
    gates = (values[cell.saved.index(gate)] for gate in cell.gates)
    shares = [((gate <= low) | (gate > high)).mean(-1) for gate, (low, high) in zip(gates, cell.saturated, strict=True)]
    return [*map(_norms, gradients), *shares]


def backward_rows(
    sizes: LayerSizes,
    weights: Weights,
    x: Array,
    saved: Saved,
    lengths: Array | None,
    cut: Array | None,
    dy: Array | None,
    dstate: State,
    arithmetic: Arithmetic = EXACT,
    bound: tuple[str, float] | None = None,
    flow: Array | None = None,
) -> tuple[dict[str, Array], State]:
    """What the sums over steps and rows run over, and the gradient of the initial state.

    By name, (T, B, .) and zero where a row is inactive: the gradients `dx` and `dr` of x's and h's share of the gates,
    those of the states after each step, `dh` and `dc`, and of each extra by its name; and the inputs `x`, `h` before
    each step, `scaled` of the late product and `hidden` of the projection. `bound` and `flow`: see `stack.Backward`.
    """
    cell, H = sizes.cell, sizes.hidden_size
    math = cell.math(arithmetic)
    gates = len(cell.gates) * H
    (T, B), dtype = x.shape[:2], dstate[0].dtype
    of_states = [f"d{state}" for state in cell.states]
    widths = dict.fromkeys((*of_states, *cell.extras, "scaled", "hidden"), H)
    widths |= {"dx": gates, "dr": gates, "dh": sizes.state_size, "h": sizes.state_size}
    rows = {name: np.zeros((T, B, width), dtype) for name, width in widths.items()}
    rows["x"] = np.zeros_like(x)
    carried = list(dstate)
    for t in reversed(_order(T, sizes.reverse)):
        active = np.ones((B, 1), bool) if lengths is None else (t < lengths)[:, None]
        prev = saved.prev[t]
        dnew = [carried[0] if dy is None else carried[0] + np.where(active, dy[t], 0), *carried[1:]]
        if flow is not None:
            flow[:, t] = np.where(active[:, 0], _measured(cell, dnew, saved.values[t]), 0)
        dnew = [bounded(one, bound) for one in dnew]
        dx, dr, dprev, dextra = backward_step(sizes, weights, math, saved.values[t], prev, dnew, arithmetic.multiply)
        of_step = {"dx": _rows(dx), "dr": _rows(dr), "x": x[t], "h": prev[0]}
        of_step |= dict(zip((*of_states, *cell.extras), (*dnew, *dextra), strict=True))
        if "w_hr" in weights:
            of_step["hidden"] = saved.hidden[t]
        if cell.late_gates:
            of_step["scaled"] = saved.scaled[t][0]
        for name, one in of_step.items():
            rows[name][t] = np.where(active, one, 0)
        if cut is not None:
            dprev = [np.where(cut[t][:, None], 0, d) for d in dprev]
        carried = [np.where(active, d, c) for d, c in zip(dprev, carried, strict=True)]
    return rows, tuple(carried)


def backward_layer(
    sizes: LayerSizes,
    weights: Weights,
    x: Array,
    saved: Saved,
    lengths: Array | None,
    cut: Array | None,
    dy: Array | None,
    dstate: State,
    wanted: Wanted | None = None,
    need_x: bool = True,
    arithmetic: Arithmetic = EXACT,
    bound: tuple[str, float] | None = None,
    flow: Array | None = None,
) -> tuple[Array | None, State, dict[str, Array]]:
    """Gradients of one layer-direction: of x (T, B, I), of the initial state, and of the wanted weights (None: all)."""
    rows, initial = backward_rows(sizes, weights, x, saved, lengths, cut, dy, dstate, arithmetic, bound, flow)
    names = weights if wanted is None else wanted
    dx = arithmetic.multiply(rows["dx"], weights["w_ih"].T) if need_x else None
    return dx, initial, gradients(sizes.cell, names, rows, arithmetic)


def gradients(cell: Cell, wanted: Wanted, rows: Weights, arithmetic: Arithmetic = EXACT) -> dict[str, Array]:
    """The gradients of the wanted weights: sums over the rows of all steps, zero where a row is inactive.

    rows (T, B, .): dx and dr of the gates' two shares, dh of h after a projection, x, h before each step, scaled and
    hidden as in `Saved`, and the gradients of extras by name.
    """
    flat = {name: one.reshape(one.shape[0] * one.shape[1], one.shape[2]) for name, one in rows.items()}
    ones = np.ones((len(flat["dx"]), 1), flat["dx"].dtype)
    late = flat["dr"].shape[-1] - cell.late_gates * flat["scaled"].shape[-1]
    vectors = {"b_ih": flat["dx"], "b_hh": flat["dr"]} | {name: flat[name] for name in cell.extras}

    def sum_of_outer(left: Array, right: Array) -> Any:
        return arithmetic.multiply(left.T, right.T)

    sums = {name: arithmetic.product(one.T, ones.T)[:, 0] for name, one in vectors.items() if name in wanted}
    if "w_ih" in wanted:
        sums["w_ih"] = sum_of_outer(flat["dx"], flat["x"])
    if "w_hh" in wanted:
        sums["w_hh"] = sum_of_outer(flat["dr"], flat["h"])
        if cell.late_gates:
            sums["w_hh"][late:] = sum_of_outer(flat["dr"][:, late:], flat["scaled"])
    if "w_hr" in wanted:
        sums["w_hr"] = sum_of_outer(flat["dh"], flat["hidden"])
    return sums


# The backend `reference`: the functions above over a stack, in float64.

name = "reference"
watches = True
rounds_operands = True


def unavailable() -> str | None:
    """Why this backend cannot run: never."""
    return None


def pack(stack: Stack, weights: Sequence[Weights], training: bool) -> list[dict[str, Array]]:
    """A float64 copy of the weights."""
    return [{key: np.array(value, np.float64) for key, value in one.items()} for one in weights]


def arithmetic_of(stack: Stack) -> Arithmetic:
    """That of the precision of a stack."""
    return ROUNDED if stack.rounds else EXACT


def forward(stack: Stack, packed: Sequence[Weights], call: Forward) -> tuple[State, Any]:
    """See `backends`."""
    x, state = call.x.astype(np.float64), stack.filled(call.state, call.batch)
    exact = call._replace(x=x, state=_to_float64(state), y=np.empty(call.y.shape))
    with np.errstate(all="ignore"):
        run_layer = partial(forward_layer, arithmetic=arithmetic_of(stack))
        final, saved = forward_by_layer(run_layer, stack, packed, exact)
        call.y[...] = exact.y
        return tuple(s.astype(stack.dtype) for s in final), saved if call.save else None


def saved_values(stack: Stack, saved: Any, call: Forward) -> list[list[Array]]:
    """See `backends`."""
    count = range(len(stack.cell.saved))
    return [[np.array([values[v] for values in kept.values]) for v in count] for _, kept in saved]


def backward(
    stack: Stack, packed: Sequence[Weights], saved: Any, call: Forward, asked: Backward
) -> tuple[Array | None, State, list[dict[str, Array]]]:
    """See `backends`."""
    dstate = _to_float64(stack.filled(asked.dstate, call.batch))
    exact = asked._replace(dy=None if asked.dy is None else asked.dy.astype(np.float64), dstate=dstate)
    with np.errstate(all="ignore"):
        run_layer = partial(backward_layer, arithmetic=arithmetic_of(stack))
        dx, initial, gradients = backward_by_layer(run_layer, stack, packed, saved, call, exact)
        return (
            None if dx is None else dx.astype(stack.dtype),
            tuple(s.astype(stack.dtype) for s in initial),
            [{key: value.astype(stack.dtype) for key, value in one.items()} for one in gradients],
        )


def plan(
    stack: Stack,
    weights: Sequence[Weights],
    steps: int,
    batch: int,
    save: str | None,
    offsets: Array | None = None,
) -> tuple[int, Mapping[str, Any], Mapping[str, Any]]:
    """See `backends`. Counts the float64 arrays that grow with the steps, which have padding."""
    cell, H, P = stack.cell, stack.hidden_size, stack.state_size
    gates, itemsize = len(cell.gates) * H, np.dtype(np.float64).itemsize
    elements = steps * batch * itemsize  # bytes of one number for each step and row
    # A value that is a state too, as c, is there once; one that is a gate's product holds on to those of all gates.
    values = H * (len({*cell.saved, *cell.states} - {"h"}) + cell.late_gates + (stack.proj_size > 0)) + P
    values += (gates - H) * bool(cell.separate_gates)
    kept = elements * (values * len(stack.layers) + stack.input_size + stack.output_size * (stack.num_layers - 1))
    packed = sum(array.size for one in weights for array in one.values()) * itemsize
    widest = max(sizes.input_size for sizes in stack.layers)
    in_forward = elements * (gates + stack.output_size)
    in_backward = elements * (
        2 * gates + 2 * widest + 2 * P + H * (1 + len(cell.states) + len(cell.extras)) + stack.output_size
    )
    common = {"threads": 1, "split": "rows", "block_steps": steps, "estimated": True}
    return packed, common | {"kept": kept, "scratch": in_forward}, common | {"kept": 0, "scratch": in_backward}


def linear_forward(x: Array, weight: Array, bias: Array | None, y: Array, rounds: bool = False) -> None:
    """y = x W^T + b; x (rows, inputs), weight (outputs, inputs), y (rows, outputs)."""
    product = (ROUNDED if rounds else EXACT).multiply(x.astype(np.float64), weight.astype(np.float64))
    y[...] = product if bias is None else product + bias


def linear_backward(
    x: Array, weight: Array, dy: Array, need_x: bool, wanted: Wanted = ("weight", "bias"), rounds: bool = False
) -> tuple[Array | None, Array | None, Array | None]:
    """Gradients of x, weight and bias, None where not wanted."""
    multiply, exact = (ROUNDED if rounds else EXACT).multiply, dy.astype(np.float64)
    dx = multiply(exact, weight.astype(np.float64).T).astype(x.dtype) if need_x else None
    dweight = multiply(exact.T, x.astype(np.float64).T).astype(x.dtype) if "weight" in wanted else None
    return dx, dweight, exact.sum(0).astype(x.dtype) if "bias" in wanted else None


def _to_float64(state: State) -> State:
    return tuple(one.astype(np.float64) for one in state)
