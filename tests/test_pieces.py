"""What stands around recurrent layers: against derivatives that do not come from its backward, and what it promises."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import rnnkern as rk


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(12)


def test_embedding_has_its_derivative(random: np.random.Generator) -> None:
    """Each element of the weight moves what it was moved for, in float64; sums in float32 are those, rounded."""
    for shape in ((), (4,), (7, 3), (0, 3)):
        layer = rk.Embedding(6, 2, dtype="float64", seed=1)
        x, dy = random.integers(6, size=shape, dtype=np.uint8), random.standard_normal((*shape, 2))
        y, tape = layer.forward(x)
        np.testing.assert_array_equal(y, layer(x), strict=True)
        assert y.shape == (*shape, 2)
        assert not y.flags.writeable
        grads = layer.backward(tape, dy)
        assert grads.x is None
        weight = layer.parameters["weight"]
        expected = np.empty_like(weight)
        for index in np.ndindex(weight.shape):
            before, values = weight[index], []
            for moved in (0.5, -0.5):
                weight[index] = before + moved
                values.append((layer(x) * dy).sum())
            weight[index] = before
            expected[index] = values[0] - values[1]  # y is linear in the weight
        np.testing.assert_allclose(grads.parameters["weight"], expected, rtol=0, atol=1e-13)
        x[...] = 0  # the tape has a copy
        assert layer.backward(tape, dy, into=grads) is grads
        np.testing.assert_allclose(grads.parameters["weight"], 2 * expected, rtol=0, atol=1e-13)
        assert not layer.backward(tape, dy, parameters=False).parameters
        single = rk.Embedding(6, 2, seed=1)
        np.testing.assert_array_equal(single.parameters["weight"], weight.astype(np.float32), strict=True)
        single_grads = single.backward(single.forward(np.asarray(tape.indices))[1], dy).parameters["weight"]
        np.testing.assert_allclose(single_grads, expected, rtol=1e-5, atol=1e-5)
        assert single_grads.dtype == np.float32


def test_dropout_has_its_derivative_and_evaluates_when_called(random: np.random.Generator) -> None:
    """What is kept is scaled, as many as p says; the same seed, the same bits; backward has the mask of its forward."""
    for p, dtype in ((0.0, "float64"), (0.3, "float32"), (0.3, "float64"), (1.0, "float32")):
        x = random.standard_normal((50, 40, 5)).astype(dtype)
        layer = rk.Dropout(p, seed=0)
        y, tape = layer.forward(x, seed=7)
        np.testing.assert_allclose(y, np.where(y == 0, 0, x / (1 - p) if p < 1 else np.nan), rtol=1e-6)
        assert abs((y == 0).mean() - p) < 0.02
        assert y.dtype == dtype
        again, _ = rk.Dropout(p).forward(x, seed=7)
        np.testing.assert_array_equal(y, again)
        twin = copy.copy(layer)
        np.testing.assert_array_equal(layer.forward(x)[0], twin.forward(x)[0])
        dy = random.standard_normal(x.shape).astype(dtype)
        grads = layer.backward(tape, dy)
        # dropout is linear: its derivative along dy is what it makes of dy
        np.testing.assert_array_equal(grads.x, layer.forward(dy, seed=7)[0], strict=True)
        assert not np.shares_memory(layer(x), x)
        np.testing.assert_array_equal(layer(x), x, strict=True)
        assert not layer.parameters
        assert not grads.parameters


def test_last_has_its_derivative(random: np.random.Generator) -> None:
    """In each layout it is the row's own last step, or zero, as a layer's final state; NaN past its end is not read."""
    for lengths in (None, [0, 4, 2]):
        y, dlast = random.standard_normal((4, 3, 5)), random.standard_normal((3, 5))
        ends = lengths or [4, 4, 4]
        y[np.arange(4)[:, None] >= ends] = np.nan
        rows = [y[n - 1, b] if n else np.zeros(5) for b, n in enumerate(ends)]
        for batch_first in (False, True):
            given = np.ascontiguousarray(y.swapaxes(0, 1)) if batch_first else y
            np.testing.assert_array_equal(rk.last(given, lengths, batch_first=batch_first), rows, strict=True)
            dy = rk.last_gradient(dlast, given.shape, lengths, batch_first=batch_first)
            # last is linear: moving an element of y by 1 moves the sum of dlast times it by that element's derivative
            whole = np.where(np.isnan(given), 0, given)
            base = (rk.last(whole, lengths, batch_first=batch_first) * dlast).sum()
            for index in np.ndindex(given.shape):
                moved = whole.copy()
                moved[index] += 1
                change = (rk.last(moved, lengths, batch_first=batch_first) * dlast).sum() - base
                assert change == pytest.approx(dy[index], abs=1e-13)
    row = np.float32(random.standard_normal((4, 5)))
    np.testing.assert_array_equal(rk.last(row), row[-1], strict=True)
    np.testing.assert_array_equal(rk.last_gradient(row[0], (4, 5))[-1], row[0], strict=True)
    np.testing.assert_array_equal(rk.last(row[:0]), np.zeros(5, np.float32), strict=True)
    assert rk.last_gradient(row[0], (0, 5)).shape == (0, 5)
    layer = rk.GRU(2, 5, seed=0)
    output, state = layer(random.standard_normal((4, 3, 2)), lengths=[1, 4, 2])
    np.testing.assert_array_equal(rk.last(output, [1, 4, 2]), state[-1], strict=True)


def test_pieces_name_what_is_wrong_and_can_be_copied() -> None:
    """Argument, expectation and what came; a copy has arrays of its own, a tape refuses."""
    embedding, dropout, y = rk.Embedding(4, 2, seed=0), rk.Dropout(), np.zeros((5, 3, 2))
    tape, dropped = embedding.forward([0, 3])[1], dropout.forward(y)[1]
    dy = np.ones((2, 2))
    calls: list[tuple[Any, str]] = [
        (lambda: rk.Embedding(0, 2), "num_embeddings: expected an integer >= 1, got 0"),
        (lambda: embedding([4]), "x: expected values from 0 to 3, got 4"),
        (lambda: embedding([-1, 0]), "x: expected values from 0 to 3, got -1"),
        (lambda: embedding([0.0]), r"x: expected integers, got float64 of shape \(1,\)"),
        (lambda: embedding.backward(dropped, dy), "tape: expected the tape that forward returned, got _DropoutTape"),
        (
            lambda: rk.Embedding(4, 2).backward(tape, dy),
            r"tape: expected a tape of Embedding\(4, 2\), got one of another",
        ),
        (
            lambda: embedding.backward(tape, y),
            r"dy: expected float32 of shape \(2, 2\), got float32 of shape \(5, 3, 2\)",
        ),
        (lambda: embedding.backward(tape, dy, parameters=["bias"]), "parameters: expected names from weight, got bias"),
        (
            lambda: embedding.backward(tape, dy, into=dropout.backward(dropped, y)),
            r"into.parameters\['weight'\]: expected",
        ),
        (lambda: embedding.load_state_dict({"weight": y}), r"mapping\['weight'\]: expected float32 of shape \(4, 2\)"),
        (lambda: rk.Dropout(1.5), "p: expected a number from 0 to 1, got 1.5"),
        (lambda: dropout([1, 2]), "x: expected float32 or float64, got int64"),
        (lambda: dropout.backward(dropped, dy), r"dy: expected float64 of shape \(5, 3, 2\), got"),
        (lambda: rk.last(y[0, 0]), r"y: expected \(T, B, F\) or \(T, F\), got \(2,\)"),
        (lambda: rk.last(y, [1, 2, 6]), "lengths: expected values from 0 to 5, got 1 to 6"),
        (lambda: rk.last(y[0], [1]), "lengths: expected None with unbatched y, got list"),
        (lambda: rk.last_gradient(dy, (5, 3, 2)), r"dlast: expected shape \(3, 2\), got \(2, 2\)"),
        (lambda: rk.last_gradient(dy, 5), "shape: expected a sequence of integers, got int 5"),
        (lambda: pickle.dumps(tape), "tape: cannot be copied"),
        (lambda: copy.copy(dropped), "tape: cannot be copied"),
    ]
    for call, message in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    for twin in (copy.copy(embedding), pickle.loads(pickle.dumps(embedding))):
        np.testing.assert_array_equal(twin([1, 2]), embedding([1, 2]))
        twin.load_state_dict({"weight": np.ones((4, 2))})
        assert twin([1]).tolist() == [[1, 1]]
        assert embedding([1]).tolist() != [[1, 1]]
