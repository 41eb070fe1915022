"""Gradients of every backend: against the reference, and against derivatives of the forward alone."""

from __future__ import annotations

import numpy as np
import pytest

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
