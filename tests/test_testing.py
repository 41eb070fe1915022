"""The accuracy rule itself: it passes what rounding explains, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from rnnkern.testing import (
    Problem,
    assert_accurate,
    assert_directional,
    assert_within_rounding,
    exact_results,
    naive_results,
    numerical_gradients,
    run,
)

EVERYTHING = {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True}


def test_naive_loops_pass(cell, dtype):
    """Each of the four loops that the bound is made of is within it."""
    problem = Problem(cell, dtype=dtype, **EVERYTHING)
    for results in naive_results(problem):
        assert all(array.dtype == dtype for array in results.values())
        assert_accurate(problem, results)


def test_a_small_error_in_any_tensor_fails(cell, dtype):
    """A thousand units in the last place of its largest element, in one element of one tensor."""
    problem = Problem(cell, dtype=dtype, **EVERYTHING)
    results = run(problem, "reference")
    for name in results:
        wrong = {key: array.copy() for key, array in results.items()}
        wrong[name].flat[0] += 1000 * np.finfo(dtype).eps * np.abs(wrong[name]).max()
        with pytest.raises(AssertionError, match=rf"{name} of Problem\(cell='{cell}'"):
            assert_accurate(problem, wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_must_stand_where_the_reference_has_them(value):
    """Neither more of them nor fewer, and with their sign."""
    finite = np.array([1.0, 2.0], np.float32)
    special = np.array([1.0, value], np.float32)
    assert_within_rounding("value", special, special.astype(np.float64), [special], "here")
    for tested, exact in ((special, finite), (finite, special), (-special, special)):
        if np.isnan(value) and tested is not finite and exact is special:
            continue  # NaN has no sign
        with pytest.raises(AssertionError, match=r"at .*: value of 'here'"):
            assert_within_rounding("value", tested, exact.astype(np.float64), [exact], "here")


def test_both_derivatives_of_relu_pass_at_its_kink():
    """The reference takes the pattern y > 0 from the tested y."""
    problem = Problem("rnn_relu", dtype="float64")
    results = run(problem, "reference")
    assert_accurate(problem, results)
    assert exact_results(problem) is not exact_results(problem, np.packbits(results["y"] > 0).tobytes())


def test_gradients_of_the_reference_are_derivatives_of_its_forward(cell):
    """Complex steps, element by element and along a direction; a wrong gradient fails both."""
    problem = Problem(cell, T=4, B=3, I=2, H=3, dtype="float64", **EVERYTHING)
    gradients = numerical_gradients(problem)
    results = {name: array for name, array in run(problem, "reference").items() if name in gradients}
    assert_accurate(problem, results, gradients)
    assert_directional(problem, results)
    results["dweight_hh_l0"] = results["dweight_hh_l0"] * (1 + 1e-10)
    with pytest.raises(AssertionError, match="dweight_hh_l0"):
        assert_accurate(problem, results, gradients)
    with pytest.raises(AssertionError, match="directional derivative"):
        assert_directional(problem, results)


def test_a_problem_prints_as_the_call_that_makes_it(cell):
    """So that a failure can be pasted."""
    problem = Problem(cell, T=1, poison="nan", **EVERYTHING)
    assert eval(repr(problem), {"Problem": Problem}) == problem
