"""Seeded problems and the accuracy rule: what tests, benchmarks and bug reports share.

The rule, the same for every backend, cell, dtype and tensor: `max|y - y64| <= 4 (max_k max|y_k - y64| + 4 eps max|y64|
+ 1000 tiny)`. y64 is the reference in more digits than the tested dtype; y_0 to y_3 are naive loops in the tested
dtype, which say what rounding alone does to this problem. It follows T, H and the weights by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import reference
from .cells import CELLS
from .functional import Grads, dropout_masks
from .layers import Recurrent, parameter_names
from .reference import EXACT, Arithmetic
from .stack import Backward, Forward, Stack, State, Weights, backward_by_layer, forward_by_layer

__all__ = [
    "Inputs",
    "Problem",
    "assert_accurate",
    "assert_directional",
    "assert_within_rounding",
    "backward_options",
    "infer",
    "inputs",
    "layer_of",
    "numerical_gradients",
    "run",
]

Array = NDArray[Any]
Results = dict[str, Array]  # y, h, c, ..., and the gradients dx, dh, dc, ..., dweight_ih_l0, ...

STEP = 1e-30  # of the complex step: its square is below every dtype's last digit


@dataclass(frozen=True)
class Problem:
    """Sizes, options and a seed, which say everything about one forward and backward; `inputs` draws the numbers."""

    cell: str = "lstm"
    T: int = 5
    B: int = 3
    I: int = 4
    H: int = 5
    dtype: str = "float32"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    dropout: float = 0.0
    lengths: bool = False
    resets: bool = False
    loss: str = "both"  # "steps": through y, "final": through the final state, "both"
    clip_state: tuple[str, float] | None = None
    diagnostics: bool = False
    scale: float = 1.0  # of the weights, beside uniform in [-1/sqrt(H), 1/sqrt(H)]
    poison: str = ""  # "nan", "inf" or "-inf": one element of x in the middle
    seed: int = 0
    precision: str = "float32"
    arithmetic: str = "fma"

    @property
    def stack(self) -> Stack:
        """The sizes as backends take them."""
        return Stack(
            CELLS[self.cell],
            self.I,
            self.H,
            self.proj_size,
            self.num_layers,
            (False, True) if self.bidirectional else (False,),
            np.dtype(self.dtype),
            precision=self.precision,
            arithmetic=self.arithmetic,
        )


@dataclass(frozen=True)
class Inputs:
    """The numbers of a problem, all read-only, in its dtype and the layout of the backends."""

    x: Array
    state: State
    weights: list[dict[str, Array]]
    lengths: Array | None
    resets: Array | None
    masks: list[Array] | None
    dy: Array | None
    dstate: State | None


@lru_cache(maxsize=256)
def inputs(problem: Problem) -> Inputs:
    """Draw the numbers of a problem; the same for the same problem."""
    stack, T, B = problem.stack, problem.T, problem.B
    generator = np.random.default_rng(problem.seed)

    def normal(*shape: int) -> Array:
        return generator.normal(size=shape).astype(stack.dtype)

    x = normal(T, B, problem.I)
    if problem.poison:
        x[T // 2, B // 2, 0] = float(problem.poison)
    state = tuple(normal(*shape) for shape in stack.state_shapes(B))
    bound = problem.scale / np.sqrt(problem.H)
    weights = [
        {name: generator.uniform(-bound, bound, shape).astype(stack.dtype) for name, shape in shapes.items()}
        for shapes in (sizes.weight_shapes(problem.bias, problem.proj_size > 0) for sizes in stack.layers)
    ]
    dy, dstate = normal(T, B, stack.output_size), tuple(normal(*shape) for shape in stack.state_shapes(B))
    lengths = generator.permutation(np.linspace(0, T, B).round().astype(np.int64) if B > 1 else [T // 2])
    resets = generator.random((T, B)) < 0.3
    drawn = Inputs(
        x,
        state,
        weights,
        lengths if problem.lengths else None,
        resets if problem.resets else None,
        dropout_masks(stack, T, B, problem.dropout, problem.seed) if problem.dropout else None,
        None if problem.loss == "final" else dy,
        None if problem.loss == "steps" else dstate,
    )
    for array in (x, *state, *(w for one in weights for w in one.values()), dy, *dstate, lengths, resets):
        array.flags.writeable = False
    return drawn


def layer_of(problem: Problem, backend: str = "auto") -> Recurrent:
    """The layer of a problem, with its weights."""
    layer = Recurrent(
        problem.cell,
        problem.I,
        problem.H,
        problem.num_layers,
        problem.bias,
        dropout=problem.dropout,
        bidirectional=problem.bidirectional,
        proj_size=problem.proj_size,
        dtype=problem.dtype,
        precision=problem.precision,
        arithmetic=problem.arithmetic,
        backend=backend,
    )
    names = parameter_names(problem.stack, problem.bias)
    layer.load_state_dict(
        {
            name: one[key]
            for one, names_of in zip(inputs(problem).weights, names, strict=True)
            for key, name in names_of.items()
        }
    )
    return layer


def state_of(state: State | None) -> Any:
    """A state, or a gradient of one, as layers take it."""
    return state[0] if state is not None and len(state) == 1 else state


def infer(problem: Problem, backend: str = "auto") -> Results:
    """y and the final state of inference."""
    drawn, layer = inputs(problem), layer_of(problem, backend)
    y, state = layer(drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets)
    return {"y": y} | named_states(problem, state)


def run(problem: Problem, backend: str = "auto", save: str = "gates") -> Results:
    """Everything a forward and a backward of the layer give."""
    drawn, layer = inputs(problem), layer_of(problem, backend)
    y, state, tape = layer.forward(
        drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets, save=save, seed=problem.seed
    )
    grads = layer.backward(tape, drawn.dy, state_of(drawn.dstate), **backward_options(problem))
    return {"y": y} | named_states(problem, state) | named_gradients(problem, grads)


def backward_options(problem: Problem) -> dict[str, Any]:
    """What `backward` of a layer is asked for beside gradients."""
    return {"clip_state": problem.clip_state, "diagnostics": problem.diagnostics}


def named_states(problem: Problem, state: Any, prefix: str = "") -> Results:
    """A state by the names of its parts."""
    parts = state if isinstance(state, tuple) else (state,)
    return {prefix + name: part for name, part in zip(CELLS[problem.cell].states, parts, strict=True)}


def named_gradients(problem: Problem, grads: Grads) -> Results:
    """Gradients by the names of what they belong to."""
    x = {} if grads.x is None else {"dx": grads.x}
    flow = {} if grads.flow is None else {f"norm_d{name}": one for name, one in grads.flow.norms.items()}
    flow |= {} if grads.flow is None else {f"saturated_{name}": one for name, one in grads.flow.saturation.items()}
    gradients = {f"d{name}": one for name, one in grads.parameters.items()}
    return x | named_states(problem, grads.state, "d") | gradients | flow


def assert_accurate(
    problem: Problem, results: Mapping[str, Array], exact: Mapping[str, Array] | None = None, eps: float | None = None
) -> float:
    """The accuracy rule for every tensor of the results.

    Parameters
    ----------
    problem
        What was run.
    results
        What `run` or `infer` gave, or a part of it.
    exact
        Used in place of the reference's results, such as `numerical_gradients`.
    eps
        Of the numbers that were computed with, where those have fewer digits than the dtype of the results.

    Returns
    -------
    float
        The largest error, as a fraction of its bound.

    Raises
    ------
    AssertionError
        A tensor is beyond its bound; the message names it and the problem.

    Examples
    --------
    >>> problem = Problem("gru", T=3, B=2, I=2, H=3)
    >>> assert_accurate(problem, run(problem, "reference")) < 1
    True
    """
    positive = _positive(problem, results)
    references = exact_results(problem, positive) if exact is None else exact
    naive = naive_results(problem, positive)
    return max(
        assert_within_rounding(name, tested, references[name], [one[name] for one in naive], problem, eps)
        for name, tested in results.items()
    )


def assert_within_rounding(
    name: str, tested: Any, exact: Any, naive: Sequence[Any], context: object, eps: float | None = None
) -> float:
    """The accuracy rule for one tensor; `exact` has more digits than `tested`, the naive results have its dtype.

    Returns the error as a fraction of its bound. `context` ends the message of the AssertionError, `eps` is that of
    `assert_accurate`.
    """
    tested, exact = np.asarray(tested), np.asarray(exact)
    where = f"{name} of {context!r}"
    assert tested.shape == exact.shape, f"shape {tested.shape} instead of {exact.shape}: {where}"
    with np.errstate(all="ignore"):
        rounded = exact.astype(tested.dtype)
    finite = np.isfinite(rounded)
    special = np.isclose(tested, rounded, rtol=0, atol=0, equal_nan=True) | (finite & np.isfinite(tested))
    assert special.all(), (
        f"{tested[~special][0]} instead of {rounded[~special][0]} at {np.argwhere(~special)[0]}: {where}"
    )
    if not finite.any():
        return 0.0
    limits = np.finfo(tested.dtype)
    exact = np.where(finite, exact, 0)

    def distance(values: Array) -> Any:
        return np.abs(np.where(finite & np.isfinite(values), values, exact) - exact)

    spread = max(distance(np.asarray(values)).max() for values in naive)
    bound = 4 * (spread + 4 * (eps or limits.eps) * np.abs(exact).max() + 1000 * limits.tiny)
    error = distance(tested)
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= bound, (
        f"{tested[worst]} instead of {exact[worst]} at {tuple(map(int, worst))}: error {error[worst]:.3g} beyond the "
        f"bound {bound:.3g}: {where}"
    )
    return float(error[worst] / bound)


def _positive(problem: Problem, results: Mapping[str, Array]) -> bytes | None:
    """The pattern y > 0 of the tested results, for cells whose backward reads only their output.

    The derivative of relu jumps at 0, so that an output of one rounding error may have either; both are right.
    """
    reads_output = CELLS[problem.cell].saved == ("h",) and "y" in results
    return np.packbits(results["y"] > 0).tobytes() if reads_output else None


@lru_cache(maxsize=512)
def exact_results(problem: Problem, positive: bytes | None = None) -> Results:
    """The reference in float64, or in longdouble for a float64 problem."""
    dtype = np.float64 if problem.dtype == "float32" else np.longdouble
    return _evaluate(problem, dtype, reference.arithmetic_of(problem.stack), positive)


@lru_cache(maxsize=512)
def naive_results(problem: Problem, positive: bytes | None = None) -> list[Results]:
    """y_0 to y_3: plain; activations moved at random by up to 2 ulp; the same, sums in reverse; another seed."""
    naive = naive_arithmetics(problem.seed)
    if problem.stack.rounds:
        naive = [replace(one, operand=_rounded_near(eps)) for one, eps in zip(naive, _BEFORE_ROUNDING, strict=True)]
    return [_evaluate(problem, problem.dtype, one, positive) for one in naive]


def naive_arithmetics(seed: int) -> list[Arithmetic]:
    """Those of y_0 to y_3."""
    return [
        Arithmetic(product=_sequential),
        _moved(seed, _sequential),
        _moved(seed, _sequential_reverse),
        _moved(seed + 1, _sequential),
    ]


# By how many units of the last digit the operands of y_0 to y_3 are moved before they are rounded: those next to a tie
# go the one way in some and the other way in others, as they may where they are computed.
_BEFORE_ROUNDING = (0, 4, -4, 0)


def _rounded_near(units: int) -> Callable[[Array], Array]:
    def operand(a: Array) -> Array:
        return reference.nearest_bfloat16(a * a.dtype.type(1 + units * np.finfo(a.dtype).eps))

    return operand


def _sequential(a: Array, w: Array, reverse: bool = False) -> Array:
    """a (..., K) times w (N, K), each sum term by term in the order of k; of small results many terms at once."""
    (N, K), M, order = w.shape, prod(a.shape[:-1]), slice(None, None, -1 if reverse else 1)
    left, right = a.reshape(M, K).T[order], np.ascontiguousarray(w.T[order])
    total = np.zeros((M, N), np.result_type(a, w))
    count = 2**14 // total.size if 1 < total.size < 2**12 else 1  # NumPy adds the terms of one number in another order
    for k in range(0, K, count):
        terms = np.multiply(left[k : k + count, :, None], right[k : k + count, None], order="C")
        terms[0] += total
        total = terms[0] if count == 1 else np.add.reduce(terms, axis=0)
    return total.reshape(*a.shape[:-1], N)


_sequential_reverse = partial(_sequential, reverse=True)


def _moved(seed: int, product: Callable[[Array, Array], Array]) -> Arithmetic:
    generator = np.random.default_rng(seed)

    def move(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
        def moved(a: Array) -> Array:
            value = function(a)
            factor = 1 + generator.uniform(-2, 2, value.shape) * np.finfo(value.dtype).eps
            moved: Array = value * factor.astype(value.dtype)
            return moved

        return moved

    return Arithmetic(move(EXACT.sigmoid), move(EXACT.tanh), move(EXACT.relu), product=product)


def _evaluate(problem: Problem, dtype: Any, arithmetic: Arithmetic, positive: bytes | None) -> Results:
    """Forward and backward of the reference in a dtype and an arithmetic."""
    stack, drawn = problem.stack, inputs(problem)
    weights = [{name: w.astype(dtype) for name, w in one.items()} for one in drawn.weights]
    call, asked = _cast(problem, drawn, dtype)
    y = call.y
    with np.errstate(all="ignore"):
        forward_layer = partial(reference.forward_layer, arithmetic=arithmetic)
        final, saved = forward_by_layer(forward_layer, stack, weights, call)
        if positive is not None:
            take_signs(stack, saved, y, positive)
        backward_layer = partial(reference.backward_layer, arithmetic=arithmetic)
        dx, initial, gradients = backward_by_layer(backward_layer, stack, weights, saved, call, asked)
    assert dx is not None
    names = parameter_names(stack, problem.bias)
    parameters = {
        f"d{names_of[key]}": one for names_of, ones in zip(names, gradients, strict=True) for key, one in ones.items()
    }
    names_of_flow = [f"norm_d{state}" for state in stack.cell.states] + [
        f"saturated_{gate}" for gate in stack.cell.gates
    ]
    flow = {
        f"{name}_l{index // len(stack.directions)}" + "_reverse" * sizes.reverse: one
        for index, (sizes, measured) in enumerate(zip(stack.layers, asked.flow or (), strict=False))
        for name, one in zip(names_of_flow, measured, strict=True)
    }
    return (
        {"y": y}
        | named_states(problem, final)
        | {"dx": dx}
        | named_states(problem, initial, "d")
        | parameters
        | flow
    )  # fmt: skip


def _cast(problem: Problem, drawn: Inputs, dtype: Any) -> tuple[Forward, Backward]:
    """What is asked for, in a dtype."""

    def cast(array: Any) -> Any:
        return None if array is None else array.astype(dtype)

    masks = None if drawn.masks is None else [cast(mask) for mask in drawn.masks]
    y = np.empty((problem.T, problem.B, problem.stack.output_size), dtype)
    dstate = None if drawn.dstate is None else tuple(map(cast, drawn.dstate))
    cell, flow = problem.stack.cell, None
    if problem.diagnostics:
        shape = len(cell.states) + len(cell.gates), problem.T, problem.B
        flow = [np.empty(shape, dtype) for _ in problem.stack.layers]
    return (
        Forward(cast(drawn.x), tuple(map(cast, drawn.state)), y, "gates", drawn.lengths, drawn.resets, masks),
        Backward(cast(drawn.dy), dstate, bound=problem.clip_state, flow=flow),
    )


def take_signs(stack: Stack, saved: Sequence[Any], y: Array, positive: bytes) -> None:
    """Where the tested y of the last layer has another sign than the saved output, give that the tested sign."""
    pattern = np.unpackbits(np.frombuffer(positive, np.uint8), count=y.size).reshape(y.shape).astype(bool)
    directions, P = len(stack.directions), stack.state_size
    for direction, (_, kept) in enumerate(saved[-directions:]):
        columns = pattern[:, :, direction * P : (direction + 1) * P]
        for t, values in enumerate(kept.values):
            h = values[0]
            tiny = np.finfo(h.dtype).tiny
            values[0] = np.where((h > 0) == columns[t], h, np.where(columns[t], tiny, -tiny))


def _leaves(problem: Problem, drawn: Inputs) -> dict[str, Array]:
    """Complex copies of everything a gradient is taken of, by the name of the gradient."""
    dtype = np.clongdouble
    names = parameter_names(problem.stack, problem.bias)
    return (
        {"dx": drawn.x.astype(dtype)}
        | named_states(problem, tuple(one.astype(dtype) for one in drawn.state), "d")
        | {
            f"d{names_of[key]}": one.astype(dtype)
            for names_of, ones in zip(names, drawn.weights, strict=True)
            for key, one in ones.items()
        }
    )


def _derivative(problem: Problem, drawn: Inputs, leaves: Mapping[str, Array]) -> Any:
    """Derivative of sum(dy * y) + sum(dstate * state) along the imaginary part of the leaves, over `STEP`."""
    stack = problem.stack
    names = parameter_names(stack, problem.bias)
    weights: list[Weights] = [{key: leaves[f"d{name}"] for key, name in one.items()} for one in names]
    state = tuple(leaves[f"d{name}"] for name in stack.cell.states)
    y = np.empty((problem.T, problem.B, stack.output_size), np.clongdouble)
    call = Forward(leaves["dx"], state, y, None, drawn.lengths, drawn.resets, drawn.masks)
    final, _ = forward_by_layer(reference.forward_layer, stack, weights, call)
    steps = [] if drawn.dy is None else [(drawn.dy, y)]
    ends = [] if drawn.dstate is None else list(zip(drawn.dstate, final, strict=True))
    return sum((np.sum(d * value.imag) for d, value in (*steps, *ends)), np.longdouble(0)) / STEP


@cache
def numerical_gradients(problem: Problem) -> Results:
    """Every gradient from the forward alone, one complex step an element; for small problems.

    Squire and Trapp 1998, "Using complex variables to estimate derivatives of real functions".
    """
    drawn = inputs(problem)
    leaves = _leaves(problem, drawn)
    results = {name: np.empty(leaf.shape, np.longdouble) for name, leaf in leaves.items()}
    for name, leaf in leaves.items():
        for index in np.ndindex(leaf.shape):
            value = leaf[index]
            leaf[index] = value + 1j * STEP
            results[name][index] = _derivative(problem, drawn, leaves)
            leaf[index] = value
    return results


def assert_directional(problem: Problem, results: Mapping[str, Array]) -> float:
    """The gradients of a float64 problem along one random direction agree with a complex step of the forward.

    All elements at once, so for problems of any size. Returns and raises as `assert_accurate`.
    """
    drawn = inputs(problem)
    leaves = _leaves(problem, drawn)
    generator = np.random.default_rng(problem.seed + 1)
    direction = {name: generator.normal(size=leaf.shape) for name, leaf in leaves.items()}
    stepped = {name: leaf + 1j * np.longdouble(STEP) * direction[name] for name, leaf in leaves.items()}
    exact = _derivative(problem, drawn, stepped)

    def along(gradients: Mapping[str, Array]) -> Any:
        return sum(np.sum(np.longdouble(1) * gradients[name] * one) for name, one in direction.items())

    naive = [along(one) for one in naive_results(problem, _positive(problem, results))]
    tested = np.float64(along(results))
    return assert_within_rounding("directional derivative", tested, exact, naive, problem)


def without_dropout(problem: Problem) -> Problem:
    """The problem that inference solves."""
    return replace(problem, dropout=0.0)
