"""Comparisons of what layers return, and inputs for them."""

from __future__ import annotations

import numpy as np

import rnnkern as rk
from rnnkern.testing import assert_within_rounding


def agree(tested, expected):
    """Equal but for the last bits, for two orders of the same sums."""
    for one, other in zip(parts(tested), parts(expected), strict=True):
        assert_within_rounding("result", one, other, [other], "this test")


def same(tested, expected):
    """Equal bits."""
    for one, other in zip(parts(tested), parts(expected), strict=True):
        assert one.dtype == other.dtype
        assert np.array_equal(one, other, equal_nan=True)


def parts(value):
    """The arrays of a result: of a state, of gradients, of a tuple of them."""
    if isinstance(value, np.ndarray):
        return [value]
    if isinstance(value, rk.Grads):
        value = (value.x, value.state, *value.parameters.values())
    return [part for one in value if one is not None for part in parts(one)]


def given(layer, T=5, B=3, seed=0):
    """A random x and initial state in the dtype of the layer."""
    generator = np.random.default_rng(seed)
    _, state = layer(np.zeros((T, B, layer.input_size)))
    draw = [generator.normal(size=part.shape).astype(layer.dtype) for part in parts(state)]
    x = generator.normal(size=(T, B, layer.input_size)).astype(layer.dtype)
    return x, draw[0] if len(draw) == 1 else tuple(draw)
