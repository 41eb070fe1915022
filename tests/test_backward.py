"""Gradients of every backend: against the reference, and against derivatives of the forward alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.cells import CELLS
from rnnkern.layers import PARAMETER_NAMES
from rnnkern.reference import forward_layer
from rnnkern.stack import Backward
from rnnkern.testing import Problem, assert_accurate, assert_directional, inputs, layer_of, numerical_gradients, run

SIZES = [
    (0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 1), (2, 3, 1, 2), (5, 2, 5, 3), (3, 1, 4, 4), (4, 5, 3, 5), (3, 7, 2, 7),
    (4, 1, 8, 8), (2, 6, 9, 9), (3, 2, 16, 15), (1, 17, 15, 16), (2, 4, 17, 17), (3, 8, 31, 33), (5, 3, 97, 97),
    (97, 1, 7, 5), (9, 20, 5, 3),
]  # fmt: skip

OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "loss_on_steps": {"loss": "steps"},
    "loss_on_final": {"loss": "final"},
    "loss_on_final_of_all": {"loss": "final", "num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True, "dropout": 0.4},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True, "bias": False},
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_training_matches_the_reference(cell, backend, dtype, sizes):
    """Outputs, states and every gradient are the reference's at awkward sizes."""
    problem = Problem(cell, *sizes, dtype=dtype)
    assert_accurate(problem, run(problem, backend))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_training_matches_the_reference_with_every_option(cell, backend, dtype, options):
    """The same with every option, alone and together."""
    problem = Problem(cell, T=7, B=4, I=5, H=9, dtype=dtype, **options)
    assert_accurate(problem, run(problem, backend))


@pytest.mark.parametrize(
    "sizes",
    [(1, 5, 1037, 37), (1, 26, 3, 523), (9, 33, 523, 27)],
    ids=["inputs in parts", "carry in parts", "outer products in blocks"],
)
def test_products_beyond_the_caches_match_the_reference(cell, native, dtype, sizes):
    """Sizes past each limit at which a product is cut into parts or blocks, for vectors of up to 64 bytes."""
    problem = Problem(cell, *sizes, dtype=dtype)
    assert_accurate(problem, run(problem, native))


@pytest.mark.parametrize("proj_size", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_projected_training_matches_the_reference(backend, dtype, proj_size, options):
    """The same for an LSTM with a projection."""
    problem = Problem("lstm", T=6, B=3, I=5, H=9, proj_size=proj_size, dtype=dtype, **options)
    assert_accurate(problem, run(problem, backend))


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_long_sequences_match_the_reference(cell, backend, dtype, scale):
    """Over 100 steps too, with weights that forget and with weights that are chaotic."""
    problem = Problem(cell, T=100, B=2, I=3, H=11, dtype=dtype, scale=scale)
    assert_accurate(problem, run(problem, backend))


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_nan_and_inf_in_gradients_stand_where_the_reference_has_them(cell, backend, dtype, poison):
    """A NaN or Inf in x reaches the gradients it reaches in the reference."""
    problem = Problem(cell, T=4, B=3, I=3, H=9, dtype=dtype, poison=poison)
    assert_accurate(problem, run(problem, backend))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_every_element_of_every_gradient_is_the_derivative(cell, backend, options):
    """In float64 each element agrees with a complex step of the forward, which no backward code enters."""
    problem = Problem(cell, T=5, B=3, I=2, H=3, dtype="float64", **options)
    gradients = numerical_gradients(problem)
    assert np.mean([gradient.any() for gradient in gradients.values()]) > 0.7  # resets leave some at zero
    results = run(problem, backend)
    assert_accurate(problem, {name: results[name] for name in gradients}, gradients)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
def test_every_element_of_projected_gradients_is_the_derivative(backend, options):
    """The same for an LSTM with a projection."""
    problem = Problem("lstm", T=4, B=3, I=2, H=3, proj_size=2, dtype="float64", **options)
    gradients = numerical_gradients(problem)
    assert all(gradient.any() for gradient in gradients.values())
    results = run(problem, backend)
    assert_accurate(problem, {name: results[name] for name in gradients}, gradients)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradients_along_a_random_direction_are_the_derivative(cell, backend, options):
    """At sizes beyond a vector, all elements at once."""
    problem = Problem(cell, T=9, B=5, I=6, H=17, dtype="float64", **options)
    assert_directional(problem, run(problem, backend))


def test_results_do_not_depend_on_what_the_memory_held(cell, backend, monkeypatch):
    """With every fresh array of NumPy full of NaN the results are the same bits: all of it is written."""
    problem = Problem(cell, T=5, B=3, I=4, H=9, num_layers=2, bidirectional=True, lengths=True, resets=True)
    expected = run(problem, backend)
    empty, empty_like = np.empty, np.empty_like

    def poisoned(array):
        if array.dtype.kind == "f":
            array.fill(np.nan)
        return array

    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: poisoned(empty(*args, **kwargs)))
    monkeypatch.setattr(np, "empty_like", lambda *args, **kwargs: poisoned(empty_like(*args, **kwargs)))
    for name, array in run(problem, backend).items():
        assert np.array_equal(array, expected[name]), name


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", [(64, 1, 16, 96), (9, 40, 5, 8)], ids=["few rows", "many rows"])
def test_a_gradient_of_x_is_added_to_what_is_given(backend, directions, size):
    """By two threads too, which work on two directions side by side where rows are few."""
    T, B, I, H = size
    layer = rk.LSTM(I, H, bidirectional=directions == 2, backend=backend, seed=0)
    x = np.random.default_rng(0).normal(size=(T, B, I)).astype(np.float32)
    before = rk.num_threads()
    try:
        for threads in (1, 2, 2):  # a helper that sleeps may come too late for the first
            rk.set_num_threads(threads)
            y, _, tape = layer.forward(x)
            asked = Backward(y, None, dx=np.zeros_like(x))
            found, _, _ = tape.backend.backward(tape.signature.stack, tape.packed, tape.saved, tape.call, asked)
            np.testing.assert_array_equal(found, layer.backward(tape, y).x)
    finally:
        rk.set_num_threads(before)


@pytest.mark.parametrize(("B", "H"), [(4, 5), (20, 3)])
def test_x_beyond_the_lengths_is_never_read(cell, backend, B, H):
    """NaN in x and dy past a row's end changes no bit of any result, and grads.x is zero there."""
    problem = Problem(cell, T=6, B=B, I=3, H=H, num_layers=2, bidirectional=True, lengths=True)
    drawn, layer = inputs(problem), layer_of(problem, backend)
    beyond = np.arange(problem.T)[:, None] >= drawn.lengths
    x, dy = drawn.x.copy(), drawn.dy.copy()
    expected_y, _, tape = layer.forward(x, lengths=drawn.lengths)
    expected = layer.backward(tape, dy)
    x[beyond], dy[beyond] = np.nan, np.nan
    y, _, tape = layer.forward(x, lengths=drawn.lengths)
    grads = layer.backward(tape, dy)
    assert np.array_equal(y, expected_y)
    assert (y[beyond] == 0).all()
    assert np.array_equal(grads.x, expected.x)
    assert (grads.x[beyond] == 0).all()
    for name, gradient in grads.parameters.items():
        assert np.array_equal(gradient, expected.parameters[name]), name


def taken_back_by_hand(problem, bound):
    """The gradients of a layer with bounds on those of the states, and their norms before, of each row by itself.

    A step is taken back by its Jacobian, from complex steps of the forward of that step alone, which no backward code
    enters.
    """
    drawn, sizes, P = inputs(problem), problem.stack.layers[0], problem.stack.state_size
    widths, end = [shape[-1] for shape in problem.stack.state_shapes(1)], problem.I
    (weights,) = drawn.weights
    shapes = {"x": (end,)} | dict(zip(problem.stack.cell.states, ((width,) for width in widths), strict=True))
    shapes |= {name: one.shape for name, one in weights.items()}
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])

    def split(flat):
        return dict(zip(shapes, np.split(flat, ends[:-1]), strict=True))

    def step(flat):
        parts = {name: part.reshape(shapes[name]) for name, part in split(flat).items()}
        y, state = np.empty((1, 1, P), np.clongdouble), [parts.pop(name)[None] for name in problem.stack.cell.states]
        new, _ = forward_layer(sizes, parts, parts.pop("x")[None, None], state, None, None, y)
        return np.concatenate([one[0] for one in new])

    found = {"dx": np.zeros_like(drawn.x), **{f"d{name}": 0 for name in weights}}
    found |= {f"d{name}": one[0].copy() for name, one in zip(problem.stack.cell.states, drawn.dstate, strict=True)}
    norms = {name: np.zeros((problem.T, problem.B)) for name in problem.stack.cell.states}
    flat_weights = np.concatenate([one.ravel() for one in weights.values()])
    for b in range(problem.B):
        state, steps = (
            [one[0, b] for one in drawn.state],
            range(problem.T if drawn.lengths is None else drawn.lengths[b]),
        )
        cuts = [drawn.resets is not None and drawn.resets[t, b] for t in steps]
        jacobians = []
        for t in steps:
            before = [0 * one if cuts[t] else one for one in state]
            flat = np.concatenate([drawn.x[t, b], *before, flat_weights]).astype(np.clongdouble)
            moved = flat + 1e-30j * np.eye(len(flat))
            jacobians.append(np.stack([step(one).imag * 1e30 for one in moved], 1))
            state = np.split(step(flat).real, np.cumsum(widths)[:-1])
        after = [one[0, b].astype(np.longdouble) for one in drawn.dstate]
        for t in reversed(steps):
            after[0] = after[0] + drawn.dy[t, b]
            for s, name in enumerate(norms):
                norms[name][t, b] = norm = np.sqrt(sum(one * one for one in after[s]))
                if bound[0] == "value":
                    after[s] = np.array([min(max(one, -bound[1]), bound[1]) for one in after[s]])
                elif norm > bound[1]:
                    after[s] = after[s] * bound[1] / norm
            parts = split(np.concatenate(after) @ jacobians[t])
            found["dx"][t, b] = parts["x"]
            after = [(0 if cuts[t] else 1) * parts[name] for name in norms]
            for name, one in weights.items():
                found[f"d{name}"] = found[f"d{name}"] + parts[name].reshape(one.shape)
        for name, one in zip(norms, after, strict=True):
            found[f"d{name}"][b] = one
    return found, norms


def test_bounded_gradients_are_those_of_steps_taken_back_by_hand():
    """With `clip_state` each row of each gradient of a state is bounded at each step; `flow` saw it before that."""
    kinds = [(cell, 0) for cell in CELLS] + [(cell, 2) for cell in CELLS if CELLS[cell].projects]
    bounds = ("norm", 0.5), ("value", 0.2)
    sizes = {"T": 4, "B": 3, "I": 2, "H": 3, "dtype": "float64", "lengths": True, "resets": True}
    for number, (cell, projected) in enumerate(kinds * 2):
        bound = bounds[number < len(kinds)]
        problem = Problem(cell, proj_size=projected, clip_state=bound, diagnostics=True, **sizes)
        found, norms = taken_back_by_hand(problem, bound)
        exact = {f"norm_d{name}_l0": one for name, one in norms.items()} | {"dx": found["dx"]}
        exact |= {f"d{name}": found[f"d{name}"][None] for name in norms}
        exact |= {f"d{PARAMETER_NAMES.get(one, one)}_l0": found[f"d{one}"] for one in inputs(problem).weights[0]}
        for backend in ("native", "reference"):
            results, free = run(problem, backend), run(replace(problem, clip_state=None), backend)
            assert not np.allclose(results["dx"], free["dx"])
            assert_accurate(problem, {name: results[name] for name in exact}, exact)
