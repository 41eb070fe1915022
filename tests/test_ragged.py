"""Sequences of different lengths without padding: offsets, lists of arrays, and what is kept of them."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends
from rnnkern.layers import Recurrent

LENGTHS = np.array([4, 0, 11, 7, 1, 11, 3])
OFFSETS = np.concatenate([[0], LENGTHS.cumsum()])
T, B, N = int(LENGTHS.max()), len(LENGTHS), int(LENGTHS.sum())

# A cell, I and H, and options; with resets, with a mode of saving. The third and fourth put rows into lanes.
CASES: dict[str, tuple[str, int, int, dict[str, Any], bool, str]] = {
    "both directions": ("lstm", 5, 20, {"num_layers": 2, "bidirectional": True}, True, "gates"),
    "projection": ("lstm", 3, 18, {"proj_size": 4, "dtype": "float64"}, False, "outputs"),
    "few units": ("gru", 3, 2, {"num_layers": 2, "bidirectional": True}, True, "gates"),
    "few units, other saved values": ("rnn_relu", 2, 3, {}, True, "gates"),
    "two products": ("gru_reset_before", 4, 9, {"num_layers": 2}, True, "outputs"),
    "segments": ("lstm_peephole", 4, 7, {"num_layers": 2}, True, "checkpoint"),
    "segments both ways": ("lstm", 4, 7, {"num_layers": 2, "bidirectional": True}, True, "checkpoint"),
}


def drawn(layer: Recurrent, resets: bool) -> tuple[Any, ...]:
    """x, resets, state, dy and dstate; x and dy (T, B, .), with NaN past the ends."""
    rng, stack = np.random.default_rng(0), layer._signature.stack
    past = np.arange(T)[:, None] >= LENGTHS
    x, dy = (rng.standard_normal((T, B, size)).astype(layer.dtype) for size in layer.sizes)
    x[past] = dy[past] = np.nan
    state, dstate = (tuple(rng.standard_normal(s).astype(layer.dtype) for s in stack.state_shapes(B)) for _ in range(2))
    one = len(state) == 1
    return x, rng.random((T, B)) < 0.3 if resets else None, state[0] if one else state, dy, dstate[0] if one else dstate


def rows(padded: Any) -> Any:
    """Of an array (T, B, .), the rows that sequences have, one sequence behind the other."""
    return None if padded is None else np.concatenate([padded[:length, b] for b, length in enumerate(LENGTHS)])


def same(results: Any, expected: Any) -> None:
    """Equal bits."""
    if isinstance(expected, tuple | list):
        assert len(results) == len(expected)
        for one, other in zip(results, expected, strict=True):
            same(one, other)
    else:
        np.testing.assert_array_equal(results, expected)


def test_offsets_and_lists_have_the_bits_of_lengths() -> None:
    """Outputs, states, every gradient and the gates, of a layer and frozen; a list comes back as a list."""
    for name, (cell, inputs, hidden, options, with_resets, save) in CASES.items():
        layer = Recurrent(cell, inputs, hidden, **options, seed=1)
        x, resets, state, dy, dstate = drawn(layer, with_resets)
        y, final, tape = layer.forward(x, state, lengths=LENGTHS, resets=resets, save=save)
        grads, gates = layer.backward(tape, dy, dstate), tape.gates
        expected = (rows(y), final), (rows(grads.x), grads.state, [*grads.parameters.values()])
        own: dict[str, Any] = {"offsets": OFFSETS, "resets": rows(resets)}

        y, final, tape = layer.forward(rows(x), state, **own, save=save)
        grads = layer.backward(tape, rows(dy), dstate)
        found = (y, final), (grads.x, grads.state, [*grads.parameters.values()])
        same(found, expected)
        same([*tape.gates.values()], [rows(one) for one in gates.values()])
        same((layer(rows(x), state, **own), layer.freeze()(rows(x), state, **own)), (expected[0], expected[0]))

        def split(array: Any) -> list[Any]:
            return [array[first:last] for first, last in pairwise(OFFSETS)]

        y, final, tape = layer.forward(split(rows(x)), state, resets=rows(resets), save=save)
        grads = layer.backward(tape, split(rows(dy)), dstate)
        same((y, grads.x), (split(expected[0][0]), split(expected[1][0])))
        assert not any(one.flags.writeable for one in y), name


def test_what_is_kept_follows_the_rows_that_sequences_have() -> None:
    """With lengths as with offsets; whole rows keep T B of them."""
    x, layer = np.ones((T, B, 16), np.float32), rk.LSTM(16, 32, num_layers=2, seed=0)

    def kept(x: Any, **options: Any) -> int:
        layer.release()
        return int(layer.forward(x, **options)[2].saved.nbytes)

    whole, padded, packed = kept(x), kept(x, lengths=LENGTHS), kept(rows(x), offsets=OFFSETS)
    assert padded == packed
    assert abs(packed / whole - N / (T * B)) < 0.01
    plan = rk.memory_plan(layer, (N, 16), offsets=OFFSETS).kept
    assert plan["saved values"] == packed
    assert plan["y"] == N * 32 * 4
    most = sum(plan.values())
    assert layer.forward(rows(x), offsets=OFFSETS, save=most)[2].call.save == "gates"
    assert layer.forward(rows(x), offsets=OFFSETS, save=most - 1)[2].call.save == "outputs"


def test_dropout_without_padding_draws_a_number_for_each_row() -> None:
    """The same numbers whatever is kept of the steps."""
    for bidirectional in (True, False):
        layer = rk.GRU(4, 8, num_layers=3, dropout=0.5, bidirectional=bidirectional, seed=0)
        x, _, _, dy, _ = drawn(layer, False)
        results = []
        for save in ("gates", "checkpoint"):
            y, final, tape = layer.forward(rows(x), offsets=OFFSETS, seed=7, save=save)
            results.append((y, final, [*layer.backward(tape, rows(dy)).parameters.values()]))
        same(results[0], results[1])
    twin = rk.GRU(4, 8, num_layers=3, seed=0)
    assert not np.array_equal(twin(rows(x), offsets=OFFSETS)[0], results[0][0])


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_other_backends_know_offsets(backend: str) -> None:
    """As they know lengths, to the bit; the functional pair too, on the first backend."""
    if (reason := backends.get(backend).unavailable()) is not None:
        pytest.skip(reason)
    layer = rk.LSTM(5, 6, num_layers=2, bidirectional=True, backend=backend, seed=1)
    x, resets, state, dy, dstate = drawn(layer, True)
    y, final, tape = layer.forward(x, state, lengths=LENGTHS, resets=resets)
    grads = layer.backward(tape, dy, dstate)
    expected = rows(y), final, rows(grads.x), grads.state, [*grads.parameters.values()]
    y, final, tape = layer.forward(rows(x), state, offsets=OFFSETS, resets=rows(resets))
    grads = layer.backward(tape, rows(dy), dstate)
    same((y, final, grads.x, grads.state, [*grads.parameters.values()]), expected)
    assert tape.gates["c_l1_reverse"].shape == (N, 6)
    weights = {"w_ih": np.ones((6, 5)), "w_hh": np.eye(6)}
    lengths, offsets = (
        rk.forward("rnn_tanh", one, weights, **option, reverse=True)[0]
        for one, option in ((np.nan_to_num(x), {"lengths": LENGTHS}), (rows(x), {"offsets": OFFSETS}))
    )
    same(offsets, rows(lengths))


WRONG: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "with lengths": (np.ones((4, 3)), {"offsets": [0, 4], "lengths": [4]}, ValueError, "lengths: expected None with o"),
    "three dimensions": (np.ones((4, 1, 3)), {"offsets": [0, 4]}, ValueError, r"x: expected shape \(rows, 3\) with"),
    "end": (np.ones((4, 3)), {"offsets": [0, 3]}, ValueError, "offsets: expected values from 0 to 4, the rows of x"),
    "start": (np.ones((4, 3)), {"offsets": [1, 4]}, ValueError, "offsets: expected values from 0 to 4, .* got 1 first"),
    "falls": (np.ones((4, 3)), {"offsets": [0, 3, 2, 4]}, ValueError, "offsets: expected values that do not fall"),
    "none": (np.ones((0, 3)), {"offsets": np.zeros(0, int)}, ValueError, r"offsets: expected integers of shape \(B"),
    "floats": (np.ones((4, 3)), {"offsets": [0.0, 4.0]}, TypeError, "offsets: expected integers of shape"),
    "list and lengths": ([np.ones((4, 3))], {"lengths": [4]}, ValueError, "lengths: expected None with a list of seq"),
    "list and offsets": ([np.ones((4, 3))], {"offsets": [0, 4]}, ValueError, "offsets: expected None with a list of s"),
    "list and out": ([np.ones((4, 3))], {"out": np.ones((4, 2), "f4")}, ValueError, "out: expected None with a list"),
    "columns of one": ([np.ones((4, 3)), np.ones((4, 2))], {}, ValueError, r"x\[1\]: expected shape \(T, 3\), got"),
    "resets": (np.ones((4, 3)), {"offsets": [0, 4], "resets": [[True] * 4]}, ValueError, r"resets: .* shape \(4,\)"),
}


def test_wrong_offsets_and_lists_are_refused_by_name() -> None:
    """By what stacks arrays too, which a list of sequences is not; and nested numbers stay an array-like."""
    layer, listed = rk.GRU(3, 2, seed=0), [np.ones((4, 3)), np.ones((4, 3))]
    for call in (rk.Sequential(layer), partial(rk.tbptt, layer, k1=2), partial(rk.diagnose, layer)):
        with pytest.raises(ValueError, match=r"^x: expected one array, with lengths .*, got a list of sequences"):
            call(listed)
    for x, options, error, message in WRONG.values():
        with pytest.raises(error, match=f"^{message}"):
            layer(x, **options)
    same(layer([[1.0, 2.0, 3.0]]), layer(np.array([[1.0, 2.0, 3.0]])))
    empty, state = layer(np.ones((0, 3)), offsets=[0, 0, 0])
    assert empty.shape == (0, 2)
    assert state.shape == (1, 2, 2)
