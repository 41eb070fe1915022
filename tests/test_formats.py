"""Frozen layers whose weights are stored in another format: the values are rounded once, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.cells import CELLS
from rnnkern.formats import round_to_bfloat16
from rnnkern.testing import Problem, inputs, layer_of, state_of

# T, B, I, H: one row, one tile and many of them, few units in the lanes, odd depths, a depth that goes by parts.
SIZES = [(3, 1, 1, 1), (3, 20, 3, 3), (4, 33, 2, 7), (6, 1, 33, 70), (3, 8, 31, 33), (2, 26, 1037, 37), (2, 30, 3, 523)]
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True}, {"bias": False}]


def with_rounded_matrices(problem, backend):
    """The float32 layer of a problem, its matrices rounded to bfloat16."""
    layer = layer_of(problem, backend)
    for array in layer.parameters.values():
        if array.ndim == 2:
            array[...] = round_to_bfloat16(array)
    return layer


def all_results(call, problem):
    """y and the final state of a call on the numbers of a problem."""
    drawn = inputs(problem)
    y, state = call(drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets)
    return y, *(state if isinstance(state, tuple) else (state,))


def test_bfloat16_has_the_bits_of_a_layer_with_rounded_matrices(cell, native):
    """Every path through the kernels, and every option: sums, states and biases are those of float32."""
    for index, sizes in enumerate(SIZES):
        options = OPTIONS[index % len(OPTIONS)] | {"proj_size": sizes[3] // 2 if CELLS[cell].projects else 0}
        problem = Problem(cell, *sizes, **options)
        frozen = layer_of(problem, native).freeze("bfloat16")
        expected = all_results(with_rounded_matrices(problem, native), problem)
        for result, exact in zip(all_results(frozen, problem), expected, strict=True):
            assert np.array_equal(result, exact), problem


def test_a_bfloat16_stream_has_the_bits_of_the_sequence(cell, native):
    """Step after step, whatever the number of rows and threads."""
    before = rk.num_threads()
    for B in (1, 2, 33):
        problem = Problem(cell, T=9, B=B, I=30, H=67, num_layers=2)
        frozen = layer_of(problem, native).freeze("bfloat16")
        stream = frozen.stream(B)
        y, _ = frozen(inputs(problem).x)
        assert np.array_equal(y, np.stack([stream.step(x_t) for x_t in inputs(problem).x])), B
        try:
            rk.set_num_threads(1)
            assert np.array_equal(y, frozen(inputs(problem).x)[0]), B
        finally:
            rk.set_num_threads(before)


def test_every_backend_rounds_the_same_values(backend):
    """What has no bfloat16 kernels runs in float32 on the rounded matrices."""
    for cell, (B, H) in product(CELLS, ((3, 9), (17, 2), (3, 40))):  # in a vector of units, of rows, beyond both
        problem = Problem(cell, T=4, B=B, I=5, H=H)
        expected = all_results(with_rounded_matrices(problem, backend).freeze(), problem)
        results = all_results(layer_of(problem, backend).freeze("bfloat16"), problem)
        for result, exact in zip(results, expected, strict=True):
            assert np.array_equal(result, exact), problem


@np.errstate(all="ignore")  # the carry of an infinity is a signalling NaN, which nothing takes
def test_rounding_is_to_the_nearest_even_of_every_kind_of_number():
    """Against the two neighbours of each number; NaN, infinities, zeros and denormals too."""
    drawn = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    ties = np.arange(0x3F000000, 0x3F200000, 0x8000, dtype=np.uint32)
    bits = np.concatenate([drawn, ties, np.uint32([0x7F7FFFFF, 0x7F800001, 0xFFFFFFFF, 0xFF800000, 1, 0x80000000])])
    x = bits.view(np.float32)
    result = round_to_bfloat16(x)
    assert not (result.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(np.isnan(result), np.isnan(x))
    numbers = ~np.isnan(x)
    upper = bits[numbers] & np.uint32(0xFFFF0000)
    exact, below, above = (
        np.where(np.isinf(value), np.copysign(np.float64(2.0**128), value), value.astype(np.float64))
        for value in (x[numbers], upper.view(np.float32), (upper + np.uint32(0x10000)).view(np.float32))
    )
    nearer = np.abs(exact - below) - np.abs(exact - above)
    expected = np.where((nearer < 0) | ((nearer == 0) & (upper >> 16 & 1 == 0)) | (exact == below), below, above)
    assert np.array_equal(result[numbers], expected.astype(np.float32))


def test_a_bfloat16_layer_reads_half_the_memory_and_copies_keep_it():
    """Packed weights are half as large; pickle and copies keep the format, and so does repr."""
    layer = rk.LSTM(64, 64, seed=0)
    plain, frozen = layer.freeze(), layer.freeze(weights="bfloat16")
    assert repr(frozen) == "LSTM(64, 64).freeze('bfloat16')"
    if plain.backend == "native":
        assert frozen._packed.nbytes < 0.52 * plain._packed.nbytes
    x = np.ones((3, 1, 64), np.float32)
    for one in (pickle.loads(pickle.dumps(frozen)), copy.copy(frozen), copy.deepcopy(frozen)):
        assert repr(one) == repr(frozen)
        assert np.array_equal(one(x)[0], frozen(x)[0])
    assert not np.array_equal(plain(x)[0], frozen(x)[0])


def test_what_cannot_be_stored_is_refused_by_name():
    """Unknown formats and a float64 layer; the message names the argument."""
    with pytest.raises(ValueError, match=r"weights: expected None .* or 'bfloat16', got str 'float16'"):
        rk.GRU(3, 4).freeze("float16")
    with pytest.raises(ValueError, match="weights: expected None for a layer of float64"):
        rk.GRU(3, 4, dtype="float64").freeze("bfloat16")
