"""Outputs and final states of every backend, against the reference by the accuracy rule."""

from __future__ import annotations

import numpy as np
import pytest

from rnnkern.testing import Problem, assert_accurate, infer, inputs, layer_of, without_dropout

# T, B, I, H: around the edges of vectors (4, 8, 16 lanes) and tiles, never all powers of two.
SIZES = [
    (0, 2, 3, 4), (2, 0, 3, 4), (1, 1, 1, 1), (2, 3, 1, 2), (5, 2, 5, 3), (3, 1, 4, 4), (4, 5, 3, 5), (3, 7, 2, 7),
    (4, 1, 8, 8), (2, 6, 9, 9), (3, 2, 16, 15), (1, 17, 15, 16), (2, 4, 17, 17), (3, 8, 31, 33), (5, 3, 97, 97),
    (97, 1, 7, 5), (9, 20, 5, 3),
]  # fmt: skip

OPTIONS = {
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "dropout": {"num_layers": 2, "dropout": 0.4},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True, "dropout": 0.4},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True, "bias": False},
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_inference_matches_the_reference(cell, backend, dtype, sizes):
    """Every cell, backend, ISA and dtype gives the reference's outputs and states at awkward sizes."""
    problem = Problem(cell, *sizes, dtype=dtype)
    assert_accurate(problem, infer(problem, backend))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_inference_matches_the_reference_with_every_option(cell, backend, dtype, options):
    """The same with layers, directions, lengths, resets and without bias; inference has no dropout."""
    problem = Problem(cell, T=7, B=4, I=5, H=9, dtype=dtype, **options)
    assert_accurate(without_dropout(problem), infer(problem, backend))


@pytest.mark.parametrize("proj_size", [1, 4, 8])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"]], ids=["plain", "all"])
def test_projection_matches_the_reference(backend, dtype, proj_size, options):
    """An LSTM with a projection gives the reference's outputs and states."""
    problem = Problem("lstm", T=6, B=3, I=5, H=9, proj_size=proj_size, dtype=dtype, **options)
    assert_accurate(without_dropout(problem), infer(problem, backend))


@pytest.mark.parametrize("poison", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["plain", "stack"])
def test_nan_and_inf_stand_where_the_reference_has_them(cell, backend, dtype, poison, options):
    """A NaN or Inf in x reaches what it reaches in the reference, and no other row."""
    problem = Problem(cell, T=6, B=5, I=3, H=9, dtype=dtype, poison=poison, **options)
    assert_accurate(problem, infer(problem, backend))


def test_saturated_activations_are_exact(cell, backend, dtype):
    """Pre-activations of thousands give the limits of tanh and sigmoid, not NaN."""
    problem = Problem(cell, T=4, B=3, I=5, H=17, dtype=dtype, scale=1e4)
    assert_accurate(problem, infer(problem, backend))


def test_an_infinite_product_with_a_zero_state_is_nan(cell, backend):
    """A zero state is multiplied, not skipped: 0 * inf in the weights is NaN as in the reference."""
    problem = Problem(cell, T=1, B=2, I=3, H=5)
    drawn, layer = inputs(problem), layer_of(problem, backend)
    for name, array in layer.parameters.items():
        if name.startswith("weight_hh"):
            array[:] = np.inf
    assert np.isnan(layer(drawn.x)[0]).all()
