"""The output layer, losses, clipping and optimizers: against derivatives, formulas and PyTorch."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import clipping, reference

LENGTHS = [0, 5, 2, 4]  # of rows of 5 steps


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(11)


def central_difference(function: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Gradient of a function of a float64 array."""
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        moved = x.copy()
        moved[index] += step
        above = function(moved)
        moved[index] -= 2 * step
        gradient[index] = (above - function(moved)) / (2 * step)
    return gradient


# Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (1,), (7,), (5, 3), (2, 3, 4), (0,), (3, 0)])
def test_linear_is_the_affine_map(
    backend: str, dtype: str, bias: bool, leading: tuple[int, ...], random: np.random.Generator
) -> None:
    """y = x W^T + b and its gradients, to the rounding of a sum."""
    layer = rk.Linear(9, 17, bias, dtype=dtype, backend=backend, seed=0)
    x, dy = random.standard_normal((*leading, 9)).astype(dtype), random.standard_normal((*leading, 17)).astype(dtype)
    y, tape = layer.forward(x)
    grads = layer.backward(tape, dy)
    weight = layer.parameters["weight"].astype(np.longdouble)
    rows, dy_rows = x.reshape(-1, 9).astype(np.longdouble), dy.reshape(-1, 17).astype(np.longdouble)
    expected = {
        "y": (y, x @ weight.T + (layer.parameters["bias"] if bias else 0), 10),
        "x": (grads.x, dy @ weight, 17),
        "weight": (grads.parameters["weight"], dy_rows.T @ rows, len(rows)),
    }
    if bias:
        expected["bias"] = (grads.parameters["bias"], dy_rows.sum(0), len(rows))
    for got, right, terms in expected.values():
        assert got.dtype == dtype
        assert got.shape == right.shape
        # |error| <= terms * eps * sum of |products|, and no product here exceeds 4 * 4
        assert np.abs(got - right).max(initial=0) <= 16 * terms * max(terms, 1) * np.finfo(dtype).eps
    np.testing.assert_array_equal(layer(x), y)
    assert list(grads.parameters) == list(layer.parameters)


def test_linear_writes_to_out_and_adds_into(backend: str, random: np.random.Generator) -> None:
    """`out` receives y; `into` receives the sum of both gradients."""
    layer = rk.Linear(3, 2, backend=backend, seed=0)
    x, dy = random.standard_normal((4, 5, 3), np.float32), random.standard_normal((4, 5, 2), np.float32)
    out = np.full((4, 5, 2), np.nan, np.float32)
    assert layer(x, out=out) is out
    y, tape = layer.forward(x)
    np.testing.assert_array_equal(out, y)
    once, twice = layer.backward(tape, dy), layer.backward(tape, dy)
    assert layer.backward(tape, dy, into=twice) is twice
    np.testing.assert_array_equal(twice.x, 2 * once.x)
    for name, gradient in once.parameters.items():
        np.testing.assert_array_equal(twice.parameters[name], 2 * gradient)
    without = layer.backward(tape, dy, need_x=False)
    assert without.x is None
    assert layer.backward(tape, dy, need_x=False, into=without) is without
    for names in (["weight"], ["bias"], []):
        part = layer.backward(tape, dy, parameters=names)
        np.testing.assert_array_equal(part.x, once.x)
        assert list(part.parameters) == names
        for name in names:
            np.testing.assert_array_equal(part.parameters[name], once.parameters[name])
        layer.backward(tape, dy, need_x=False, parameters=names, into=part)
        np.testing.assert_array_equal(part.x, once.x)
    with pytest.raises(ValueError, match="parameters: expected names from weight, bias, got weights"):
        layer.backward(tape, dy, parameters=["weights"])


def test_linear_tape_keeps_the_weights_of_its_forward(backend: str) -> None:
    """Backward is right although the parameters have changed since, and y cannot be written to."""
    layer = rk.Linear(3, 2, backend=backend, seed=0)
    x = np.ones((4, 3), np.float32)
    y, tape = layer.forward(x)
    expected = layer.backward(tape, y).x
    layer.parameters["weight"][...] = np.nan
    np.testing.assert_array_equal(layer.backward(tape, y).x, expected)
    with pytest.raises(ValueError, match="read-only"):
        y += 1


def test_linear_starts_as_documented_and_copies() -> None:
    """Same seed, same weights, within the bound; copies and pickles are layers of their own."""
    layer, again = rk.Linear(16, 40, seed=3), rk.Linear(16, 40, seed=3)
    np.testing.assert_array_equal(layer.parameters["weight"], again.parameters["weight"])
    assert 0.2 < np.abs(layer.parameters["weight"]).max() <= 0.25
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        x = np.ones((2, 16), np.float32)
        np.testing.assert_array_equal(other(x), layer(x))
        other.parameters["bias"][...] = 5
        assert not (layer.parameters["bias"] == 5).any()
    again.load_state_dict({name: 2 * array for name, array in layer.state_dict().items()})
    np.testing.assert_array_equal(again.parameters["bias"], 2 * layer.parameters["bias"])


WRONG_CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: rk.Linear(0, 2), ValueError, "in_features: expected"),
    (lambda: rk.Linear(2, 2.0), TypeError, "out_features: expected"),
    (lambda: rk.Linear(2, 2, 1), TypeError, "bias: expected"),
    (lambda: rk.Linear(2, 2, dtype="float16"), ValueError, "dtype: expected"),
    (lambda: rk.Linear(2, 2, backend="none"), ValueError, "backend: expected"),
    (lambda: rk.Linear(2, 2, seed=-1), ValueError, "seed: expected"),
    (lambda: rk.Linear(3, 2)(np.ones((4, 2))), ValueError, r"x: expected shape \(..., 3\), got \(4, 2\)"),
    (lambda: rk.Linear(3, 2)(np.ones((4, 3), complex)), TypeError, "x: expected"),
    (lambda: rk.Linear(3, 2)(np.ones((4, 3)), out=np.ones((4, 3), np.float32)), ValueError, "out: expected"),
    (lambda: rk.Linear(3, 2).backward(None, np.ones((4, 2))), TypeError, "tape: expected"),
    (
        lambda: rk.Linear(3, 2).backward(rk.Linear(3, 2).forward(np.ones(3))[1], [1, 1]),
        ValueError,
        "tape: expected",
    ),
    (lambda: rk.Linear(3, 2).load_state_dict({"weight": np.ones((2, 3))}), ValueError, "mapping: expected"),
]


def test_linear_names_what_is_wrong(subtests: pytest.Subtests) -> None:
    """Argument, expectation and what came."""
    for call, error, message in WRONG_CALLS:
        with subtests.test(message), pytest.raises(error, match=message):
            call()


def test_linear_checks_backward_before_it_adds() -> None:
    """A wrong dy or into leaves into as it was."""
    layer = rk.Linear(3, 2, seed=0)
    _, tape = layer.forward(np.ones((4, 3), np.float32))
    grads = layer.backward(tape, np.ones((4, 2), np.float32))
    before = copy.deepcopy(grads)
    _, other = layer.forward(np.ones((5, 3), np.float32))
    for tape_, dy, into, message in (
        (tape, np.ones((4, 3)), grads, "dy: expected"),
        (other, np.ones((5, 2)), grads, r"into\.x: expected"),
        (tape, np.ones((4, 2)), {}, "into: expected"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            layer.backward(tape_, dy, into=into)
    np.testing.assert_array_equal(grads.x, before.x)
    np.testing.assert_array_equal(grads.parameters["weight"], before.parameters["weight"])


# Losses


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batch_first", [False, True])
def test_losses_have_their_derivative(lengths: Any, batch_first: bool, random: np.random.Generator) -> None:
    """Central differences of the loss in float64; past a row's end nothing is read and the gradient is zero."""
    shape = (4, 5) if batch_first else (5, 4)
    logits, values, answers = random.standard_normal((3, *shape, 3))
    targets, answers = random.integers(3, size=shape), 1 / (1 + np.exp(-answers))
    steps = np.arange(5) < np.array(lengths or [5] * 4)[:, None]
    inside = steps if batch_first else steps.T
    logits[~inside], values[~inside], answers[~inside], targets[~inside] = np.nan, np.nan, np.nan, -(2**60)
    for loss, wanted in (
        (rk.cross_entropy, targets),
        (partial(rk.cross_entropy, label_smoothing=0.3), targets),
        (rk.binary_cross_entropy, answers),
        (rk.mse, values),
        (rk.mae, values),
        (partial(rk.huber, delta=0.7), values),
    ):
        value, gradient = loss(logits, wanted, lengths, batch_first=batch_first)
        assert type(value) is float
        assert (gradient[~inside] == 0).all()
        moved = central_difference(lambda x, f=loss, w=wanted: f(x, w, lengths, batch_first=batch_first)[0], logits)
        np.testing.assert_allclose(gradient[inside], moved[inside], rtol=0, atol=1e-9)
        # one row alone, weighted by its share, adds up to the whole
        rows = [logits.swapaxes(0, 1), wanted.swapaxes(0, 1)] if not batch_first else [logits, wanted]
        parts = [loss(rows[0][b][:n], rows[1][b][:n])[0] * n for b, n in enumerate(lengths or [5] * 4)]
        assert value == pytest.approx(sum(parts) / inside.sum(), rel=1e-12)


def test_weighted_losses_have_their_derivative(random: np.random.Generator) -> None:
    """Central differences in float64; a weight counts as so many equal rows, and a row of weight 0 is not read."""
    logits, values = random.standard_normal((2, 6, 4, 3))
    targets, answers = random.integers(3, size=(6, 4)), random.random((6, 4, 3))
    row_weights, lengths = random.integers(1, 4, size=(6, 4)), [6, 3, 0, 5]
    row_weights[0, 0], row_weights[2, 1], row_weights[4, 3] = 1, 0, 0
    repeats = row_weights * (np.arange(6)[:, None] < lengths)
    unread = repeats == 0
    logits[unread], targets[unread], values[unread], answers[unread] = np.nan, 77, np.nan, np.nan
    targets[0, 0] = -5
    for loss, wanted, options in (
        (rk.cross_entropy, targets, {"ignore_index": -5}),
        (rk.cross_entropy, targets, {"weights": [0, 2, 1], "ignore_index": -5}),
        (rk.cross_entropy, targets, {"weights": [0.5, 2, 1], "label_smoothing": 0.2, "ignore_index": -5}),
        (rk.binary_cross_entropy, answers, {}),
        (rk.mse, values, {}),
        (rk.mae, values, {}),
        (rk.huber, values, {"delta": 0.7}),
    ):
        f = partial(loss, row_weights=row_weights, **options)
        value, gradient = f(logits, wanted, lengths)
        assert f(logits, wanted, lengths, need_gradient=False) == (value, None)
        moved = central_difference(lambda x, f=f, w=wanted: f(x, w, lengths)[0], logits)
        np.testing.assert_allclose(gradient[~unread], moved[~unread], rtol=0, atol=1e-9)
        assert (gradient[unread] == 0).all()
        assert not options.get("ignore_index") or (gradient[0, 0] == 0).all()
        repeated = [np.repeat(one.reshape(24, *one.shape[2:]), repeats.reshape(-1), axis=0) for one in (logits, wanted)]
        assert value == pytest.approx(loss(*repeated, **options)[0], rel=1e-12)


def test_losses_agree_with_torch(dtype: str, torch: Any, random: np.random.Generator) -> None:
    """Value and gradient."""
    logits = (10 * random.standard_normal((6, 4, 7))).astype(dtype)
    values, targets = random.standard_normal((6, 4, 7)).astype(dtype), random.integers(7, size=(6, 4))
    answers, targets[1, 1] = random.random((6, 4, 7)).astype(dtype), 2
    functional, weights = torch.nn.functional, np.arange(7).astype(dtype)
    options: dict[str, Any] = {"ignore_index": 2, "label_smoothing": 0.1}
    theirs_options = options | {"weight": torch.tensor(weights)}
    for ours, theirs, wanted in (
        (rk.cross_entropy, lambda z, t: functional.cross_entropy(z.reshape(-1, 7), t.reshape(-1)), targets),
        (
            partial(rk.cross_entropy, weights=weights, **options),
            lambda z, t: functional.cross_entropy(z.reshape(-1, 7), t.reshape(-1), **theirs_options),
            targets,
        ),
        (rk.binary_cross_entropy, functional.binary_cross_entropy_with_logits, answers),
        (rk.mse, functional.mse_loss, values),
        (rk.mae, functional.l1_loss, values),
        (partial(rk.huber, delta=3), partial(functional.huber_loss, delta=3.0), values),
    ):
        value, gradient = ours(logits, wanted)
        z = torch.tensor(logits, requires_grad=True)
        loss = theirs(z, torch.tensor(wanted))
        loss.backward()
        eps = float(np.finfo(dtype).eps)
        assert value == pytest.approx(loss.item(), rel=20 * eps)
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=20 * eps, atol=eps)


def test_cross_entropy_is_stable() -> None:
    """Large logits neither overflow nor vanish; -inf is a class that cannot be, NaN stays."""
    with np.errstate(all="raise"):
        loss, gradient = rk.cross_entropy(np.array([[1e38, 0, -1e38], [0, 0, -np.inf]], np.float32), [0, 1])
    assert loss == pytest.approx(math.log(2) / 2)
    np.testing.assert_allclose(gradient, [[0, 0, 0], [0.25, -0.25, 0]], atol=1e-7)
    loss, _ = rk.cross_entropy(np.array([[-1000.0, 1000.0]]), np.array([0], np.uint8))
    assert loss == 2000
    loss, gradient = rk.cross_entropy(np.array([[np.nan, 0.0], [0.0, 0.0]]), [0, 0])
    assert math.isnan(loss)
    assert np.isnan(gradient[0]).all()
    assert not np.isnan(gradient[1]).any()


def test_binary_cross_entropy_is_stable() -> None:
    """Large logits neither overflow nor lose what is small; of one dimension each element is a row."""
    with np.errstate(all="raise"):
        loss, gradient = rk.binary_cross_entropy(np.array([3e38, -3e38], np.float32), [1, 0], row_weights=[1, 3])
    assert (loss, gradient.tolist()) == (0, [0, 0])
    loss, gradient = rk.binary_cross_entropy(np.array([-40.0]), [False])
    assert loss == gradient[0] == pytest.approx(math.exp(-40), rel=1e-15)


def test_losses_of_nothing_are_zero() -> None:
    """No valid step: nothing to learn from, and no NaN."""
    for shape, lengths in (((0, 2, 3), None), ((4, 0, 3), []), ((4, 2, 3), [0, 0])):
        for loss, wanted in (
            (rk.cross_entropy, np.zeros(shape[:2], int)),
            (rk.binary_cross_entropy, np.zeros(shape)),
            (rk.mse, np.zeros(shape)),
        ):
            lengths_ = None if lengths is None else np.array(lengths, int)
            value, gradient = loss(np.full(shape, np.nan, np.float32), wanted, lengths_)
            assert value == 0
            np.testing.assert_array_equal(gradient, np.zeros(shape, np.float32))


Z, ZT = np.zeros((5, 2, 3)), np.zeros((5, 2), int)


WRONG_LOSSES = [
    (lambda: rk.cross_entropy(np.zeros(3), 0), ValueError, "logits: expected shape"),
    (lambda: rk.cross_entropy(Z.astype(int), ZT), TypeError, "logits: expected float32 or float64, got int64"),
    (lambda: rk.cross_entropy(Z, ZT.astype(float)), TypeError, "targets: expected integers, got float64"),
    (lambda: rk.cross_entropy(Z, ZT[:4]), ValueError, r"targets: expected shape \(5, 2\), got \(4, 2\)"),
    (lambda: rk.cross_entropy(Z, Z), ValueError, r"targets: expected integers of shape \(5, 2\), .* of one-hot rows"),
    (lambda: rk.cross_entropy(Z, ZT + 3), ValueError, r"targets: expected values in \[0, 3\), got 3"),
    (lambda: rk.cross_entropy(Z, ZT - 1), ValueError, r"targets: expected values in \[0, 3\), got -1"),
    (lambda: rk.cross_entropy(Z[0], ZT[0], [1, 1]), ValueError, "lengths: expected logits of 3 dimensions"),
    (lambda: rk.cross_entropy(Z, ZT, [1, 2, 3]), ValueError, r"lengths: expected integers of shape \(2,\)"),
    (lambda: rk.cross_entropy(Z, ZT, [1.0, 2.0]), TypeError, r"lengths: expected integers of shape \(2,\)"),
    (lambda: rk.cross_entropy(Z, ZT, [1, 6]), ValueError, "lengths: expected values from 0 to 5, got 1 to 6"),
    (lambda: rk.mse(Z, Z[..., :1]), ValueError, "target: expected shape"),
    (lambda: rk.mse(Z, Z.astype(complex)), TypeError, "target: expected real numbers"),
    (lambda: rk.mse(Z.astype(complex), Z), TypeError, "prediction: expected"),
]


def test_losses_name_what_is_wrong(subtests: pytest.Subtests) -> None:
    """Argument, expectation and what came."""
    for call, error, message in WRONG_LOSSES:
        with subtests.test(message), pytest.raises(error, match=message):
            call()


def test_options_of_losses_are_named() -> None:
    """Argument, expectation and what came."""
    for loss, wanted, options, message in (
        (rk.cross_entropy, ZT, {"weights": [1, 2]}, r"weights: expected numbers >= 0 of shape \(3,\), got"),
        (rk.cross_entropy, ZT, {"weights": [1, -2, 1]}, r"weights: expected numbers >= 0 of shape \(3,\), got -2 to 1"),
        (rk.cross_entropy, ZT, {"label_smoothing": 1.1}, "label_smoothing: expected a number from 0 to 1, got 1.1"),
        (rk.cross_entropy, ZT, {"ignore_index": 1.0}, "ignore_index: expected an integer"),
        (rk.binary_cross_entropy, Z + 2, {}, "targets: expected values from 0 to 1, got 2.0 to 2.0"),
        (rk.huber, Z, {"delta": 0}, "delta: expected a finite number > 0, got 0"),
        (rk.mse, Z, {"row_weights": np.ones((5, 2, 3))}, r"row_weights: expected numbers >= 0 that broadcast to shape"),
        (rk.mae, Z, {"row_weights": np.ones(5)}, r"that broadcast to shape \(5, 2\), got float64 of shape \(5,\)"),
        (rk.mae, Z, {"row_weights": [1, math.nan]}, r"row_weights: expected numbers >= 0 that .*, got nan to nan"),
        (rk.mae, Z, {"row_weights": "1"}, r"row_weights: expected numbers >= 0 that"),
        (rk.mae, Z, {"need_gradient": 0}, "need_gradient: expected a bool, got int 0"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            loss(Z, wanted, **options)  # type: ignore[operator]


# Clipping


def test_clipping_agrees_with_torch(dtype: str, torch: Any, random: np.random.Generator) -> None:
    """Norm and values, above and below the bound."""
    arrays = [random.standard_normal(shape).astype(dtype) for shape in ((40, 30), (7,), (0, 3))]
    for bound in (1.0, 1e3, math.inf):
        grads = [{"a": arrays[0].copy(), "b": arrays[1].copy()}, {"c": arrays[2].copy()}]
        tensors = [torch.zeros(a.shape, dtype=getattr(torch, dtype)) for a in arrays]
        for tensor, array in zip(tensors, arrays, strict=True):
            tensor.grad = torch.tensor(array)
        norm = torch.nn.utils.clip_grad_norm_(tensors, bound).item()
        eps = float(np.finfo(dtype).eps)
        assert rk.clip_grad_norm(grads, bound) == pytest.approx(norm, rel=10 * eps)
        for array, tensor in zip([*grads[0].values(), *grads[1].values()], tensors, strict=True):
            np.testing.assert_allclose(array, tensor.grad.numpy(), rtol=10 * eps)
        rk.clip_grad_value(grads, 0.01)
        torch.nn.utils.clip_grad_value_(tensors, 0.01)
        np.testing.assert_allclose(grads[0]["a"], tensors[0].grad.numpy(), rtol=10 * eps)


def test_the_norm_neither_overflows_nor_underflows(dtype: str) -> None:
    """Where squares leave the range of the dtype, the norm does not."""
    info = np.finfo(dtype)
    for size in (float(info.max) / 4, 1.0, float(info.tiny), float(info.smallest_subnormal)):
        gradients = {"a": np.array([3, 0], dtype), "b": np.array([[4]], dtype)}
        for array in gradients.values():
            array *= size / 5 if size == info.max / 4 else size
        expected = float(np.hypot(np.longdouble(gradients["a"][0]), np.longdouble(gradients["b"][0, 0])))
        assert rk.clip_grad_norm([gradients], math.inf) == pytest.approx(expected, rel=1e-15)
    assert rk.clip_grad_norm([{"a": np.zeros(3, dtype)}], 1) == 0
    assert rk.clip_grad_norm([], 1) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_that_is_not_finite_scales_nothing(bad: float) -> None:
    """It is returned for the caller to see."""
    gradients = {"a": np.array([1.0, bad, 3.0])}
    before = gradients["a"].copy()
    assert str(rk.clip_grad_norm([gradients], 1.0)) == str(abs(bad))
    np.testing.assert_array_equal(gradients["a"], before)


def test_clipping_takes_what_backward_returns() -> None:
    """One Grads, or several."""
    layer = rk.Linear(3, 2, seed=0)
    _, tape = layer.forward(np.ones((4, 3), np.float32))
    grads = layer.backward(tape, np.ones((4, 2), np.float32))
    norm = rk.clip_grad_norm(grads, 1.0)
    assert norm == pytest.approx(math.sqrt(8 * 16))
    assert rk.clip_grad_norm([grads], math.inf) == pytest.approx(1, abs=1e-6)
    rk.clip_grad_value(grads, 0.1)
    assert np.abs(grads.parameters["weight"]).max() == np.float32(0.1)


def test_backward_clips_the_gradients_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bits of clipping them afterwards, on any number of threads; a norm that is known is not measured again."""
    model = rk.Sequential(rk.LSTM(100, 130, 2, seed=0), rk.Linear(130, 2, seed=1))
    layer, head = model.pieces
    x, before = np.random.default_rng(0).standard_normal((5, 2, 130)), rk.num_threads()
    tapes = [(one, *one.forward(x if one is head else x[..., :100])) for one in (model, layer, head)]
    for one, y, *_, tape in tapes:
        plain, found = one.backward(tape, y), []
        squares = sum(float(np.square(a, dtype=np.float64).sum()) for a in plain.parameters.values())
        for threads in (1, 3):
            rk.set_num_threads(threads)
            found.append(one.backward(tape, y, max_norm=0.5))
        rk.set_num_threads(before)
        norm = rk.clip_grad_norm(plain, 0.5)
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-14)
        for grads in found:
            assert grads.norm == norm
            assert all(np.array_equal(grads.parameters[name], plain.parameters[name]) for name in plain.parameters)
        by_value = one.backward(tape, y, clip_value=0.01)
        assert max(np.abs(gradient).max() for gradient in by_value.parameters.values()) == np.float32(0.01)
    both = [one.backward(tape, y, max_norm=math.inf) for one, y, *_, tape in tapes[1:]]
    expected = rk.clip_grad_norm([one.backward(tape, y) for one, y, *_, tape in tapes[1:]], 0.1)
    with monkeypatch.context() as patched:
        patched.setattr(clipping, "_sum_of_squares", None)
        assert rk.clip_grad_norm(both, 0.1) == expected
        assert rk.clip_grad_norm(both, math.inf) == pytest.approx(0.1, rel=1e-4)
    (one, y, *_, tape), *_ = tapes
    for options, message in (
        ({"max_norm": 1.0, "clip_value": 1.0}, "max_norm: expected None with clip_value, got 1.0"),
        ({"max_norm": 1.0, "into": one.backward(tape, y)}, "max_norm: expected None with into, got 1.0"),
        ({"max_norm": 0.0}, "max_norm: expected a number > 0"),
        ({"clip_value": -1}, "clip_value: expected a number > 0"),
        ({"clip_state": ("norms", 1.0)}, r"clip_state: expected \('norm', bound\) or \('value', bound\), got"),
        ({"clip_state": ("norm", math.nan)}, r"clip_state\[1\]: expected a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            one.backward(tape, y, **options)
    monkeypatch.delattr(reference, "watches")
    one = rk.GRU(3, 4, backend="reference")
    with pytest.raises(ValueError, match=r"clip_state: expected None with the backend 'reference'.*backend='native'"):
        one.backward(one.forward(np.ones((2, 3)))[2], clip_state=("norm", 1.0))


def _read_only() -> np.ndarray:
    array = np.ones(3)
    array.flags.writeable = False
    return array


WRONG_GRADIENTS = [
    ([{"a": np.ones(3)}], 0, ValueError, "expected a number > 0, got 0"),
    ([{"a": np.ones(3)}], math.nan, ValueError, "expected a number > 0, got nan"),
    ([{"a": np.ones(3)}], "1", TypeError, "expected a number, got str"),
    ([{"a": np.ones(3)}, {"a": _read_only()}], 0.1, ValueError, r"grads\[1\]\['a'\]: expected a writable"),
    ([{"a": np.ones(3)}, {"a": [1.0]}], 0.1, TypeError, r"grads\[1\]\['a'\]: expected an array of floats"),
    ([np.ones(3)], 0.1, TypeError, r"grads\[0\]: expected a mapping"),
]


@pytest.mark.parametrize("clip", [rk.clip_grad_norm, rk.clip_grad_value])
def test_clipping_names_what_is_wrong(subtests: pytest.Subtests, clip: Callable[..., object]) -> None:
    """And leaves the gradients alone."""
    for grads, bound, error, message in WRONG_GRADIENTS:
        with subtests.test(message):
            with pytest.raises(error, match=message):
                clip(grads, bound)
            first = grads[0]["a"] if isinstance(grads[0], dict) else grads[0]
            assert (first == 1).all()


# Optimizers

OPTIMIZERS = [
    (rk.SGD, "SGD", {"lr": 0.1}),
    (rk.SGD, "SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.2}),
    (rk.Adam, "Adam", {}),
    (rk.AdamW, "AdamW", {"lr": 0.02, "betas": (0.5, 0.7), "eps": 0.1, "weight_decay": 0.3}),
]
SHAPES = {"weight": (150, 140), "bias": (3,)}  # the first takes two blocks of an optimizer


@pytest.mark.parametrize(("optimizer", "name", "options"), OPTIMIZERS)
def test_optimizers_agree_with_torch(
    optimizer: Any, name: str, options: dict[str, Any], dtype: str, torch: Any, random: np.random.Generator
) -> None:
    """Step for step, in place."""
    layers = [
        {key: random.standard_normal(shape).astype(dtype) for key, shape in SHAPES.items()},
        {"weight": random.standard_normal((2, 2)).astype(dtype)},
    ]
    tensors = [torch.tensor(array) for layer in layers for array in layer.values()]
    ours, theirs = optimizer(layers, **options), getattr(torch.optim, name)(tensors, **options)
    for _ in range(5):
        grads = [{key: random.standard_normal(a.shape).astype(dtype) for key, a in layer.items()} for layer in layers]
        for tensor, gradient in zip(tensors, (g for one in grads for g in one.values()), strict=True):
            tensor.grad = torch.tensor(gradient)
        ours.step(grads)
        theirs.step()
    for tensor, array in zip(tensors, (a for layer in layers for a in layer.values()), strict=True):
        np.testing.assert_allclose(array, tensor.numpy(), rtol=0, atol=50 * np.finfo(dtype).eps)


@pytest.mark.parametrize(("optimizer", "name", "options"), OPTIMIZERS)
def test_optimizers_go_on_from_their_state(
    optimizer: Any, name: str, options: dict[str, Any], tmp_path: Any, random: np.random.Generator
) -> None:
    """Saved, loaded and continued is bitwise the same as never stopped."""
    parameters = {key: random.standard_normal(shape) for key, shape in SHAPES.items()}
    gradients = [{key: random.standard_normal(shape) for key, shape in SHAPES.items()} for _ in range(4)]
    first = optimizer(parameters, **options)
    for one in gradients[:2]:
        first.step(one)
    resumed = copy.deepcopy(parameters)
    rk.save(tmp_path / name, first.state_dict())
    second = optimizer(resumed, **options)
    second.load_state_dict(rk.load(tmp_path / name))
    for one in gradients[2:]:
        first.step(one)
        second.step(one)
    for key, value in parameters.items():
        np.testing.assert_array_equal(value, resumed[key])


@pytest.mark.parametrize(("optimizer", "options"), [(one, options) for one, _, options in OPTIMIZERS[1:3]])
def test_parameters_of_one_optimizer_do_not_meet(
    optimizer: Any, options: dict[str, Any], random: np.random.Generator
) -> None:
    """Those that it updates as one vector, of either dtype and of no elements, become what each becomes alone."""
    shapes = [((5,), "f4"), ((0, 3), "f4"), ((2, 3), "f4"), ((7,), "f8"), ((), "f8"), ((150, 140), "f8"), ((4,), "f8")]
    together = {str(i): np.array(random.standard_normal(shape), dtype) for i, (shape, dtype) in enumerate(shapes)}
    alone = [{key: array.copy()} for key, array in together.items()]
    ours, theirs = optimizer(together, **options), [optimizer(one, **options) for one in alone]
    for _ in range(3):
        grads = {key: np.array(random.standard_normal(one.shape), one.dtype) for key, one in together.items()}
        ours.step(grads)
        for one, parameter in zip(theirs, alone, strict=True):
            one.step({key: grads[key] for key in parameter})
    for one in alone:
        for key, value in one.items():
            np.testing.assert_array_equal(together[key], value, strict=True)


def test_groups_of_parameters_become_what_optimizers_of_their_own_make_of_them(random: np.random.Generator) -> None:
    """Bitwise, also in a copy, by patterns of names of which the last that fits stands; a new lr moves all."""
    layers = [{key: random.standard_normal(3) for key in ("weight", "bias")} for _ in range(2)]
    expected = copy.deepcopy(layers)
    for optimizer in (partial(rk.SGD, momentum=0.5), rk.AdamW):
        groups = {"*.bias": {"weight_decay": 0, "lr_factor": 2}, "1.*": {"lr_factor": 0.25}}
        copied = pickle.loads(pickle.dumps((layers, optimizer(layers, 0.1, weight_decay=0.3, groups=groups))))
        alone = [
            (layer[key], optimizer({"p": layer[key]}, 0.1 * factor, weight_decay=decay), factor)
            for layer, factors in zip(expected, ((1, 2), (0.25, 0.25)), strict=True)
            for (key, decay), factor in zip({"weight": 0.3, "bias": 0}.items(), factors, strict=True)
        ]
        for lr in (0.1, 0.05):
            copied[1].lr = lr
            grads = [{key: random.standard_normal(3) for key in ("weight", "bias")} for _ in range(2)]
            copied[1].step(grads)
            for (_, one, factor), gradient in zip(alone, (g for both in grads for g in both.values()), strict=True):
                one.lr = lr * factor
                one.step({"p": gradient})
        for layer, other in zip(copied[0], expected, strict=True):
            for key, value in layer.items():
                np.testing.assert_array_equal(value, other[key], strict=True)
        layers = copy.deepcopy(expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_gradient_that_is_not_finite_stops_the_step(bad: float, dtype: str) -> None:
    """The error names the parameter, and parameters, moments and the count of steps are as before."""
    layers = rk.GRU(3, 4, dtype=dtype, seed=0), rk.Linear(4, 2, dtype=dtype, seed=1)
    optimizer, grads = rk.Adam(layers), [layer.state_dict() for layer in layers]
    optimizer.step(grads)
    before = [layer.state_dict() for layer in layers], optimizer.state_dict()
    grads[1]["weight"][1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"grads\[1\]\['weight'\]: expected finite values"):
        optimizer.step(grads)
    assert repr(([layer.state_dict() for layer in layers], optimizer.state_dict())) == repr(before)
    grads[1]["weight"][...] = np.finfo(dtype).max / 4  # whose sum overflows
    optimizer.step(grads)


def test_a_wrong_step_changes_nothing() -> None:
    """Gradients are checked before the first parameter moves, and that the parameters are those that were given."""
    parameters = {"a": np.ones(3), "b": np.ones((2, 2))}
    optimizer = rk.Adam(parameters)
    good = {"a": np.ones(3), "b": np.ones((2, 2))}
    for grads, message in (
        ([good, good], "grads: expected 1, one for each layer, got 2"),
        ({"a": np.ones(3)}, r"grads\[0\]: expected the names \['a', 'b'\], got \['a'\]"),
        (
            good | {"b": np.ones(4)},
            r"grads\[0\]\['b'\]: expected float64 of shape \(2, 2\), got float64 of shape \(4,\)",
        ),
        (good | {"b": np.ones((2, 2), np.float32)}, r"grads\[0\]\['b'\]: expected float64"),
        (parameters, r"grads\[0\]: expected gradients, as backward returns, got the parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.step(grads)
    given = parameters["a"]
    parameters["a"] = given * 1  # which the optimizer does not know of
    with pytest.raises(ValueError, match=r"parameters\[0\]\['a'\]: expected the array that the optimizer was given"):
        optimizer.step(good)
    parameters["a"] = given[:]
    last = parameters.pop("b")
    with pytest.raises(ValueError, match="parameters: expected the 2 that the optimizer was given, got 1"):
        optimizer.step({"a": good["a"]})
    parameters["b"] = last
    assert optimizer.state_dict()["steps"] == 0
    optimizer.step({name: np.zeros_like(one) for name, one in good.items()})
    assert (parameters["a"] == 1).all()
    assert (parameters["b"] == 1).all()


WRONG_OPTIMIZERS = [
    (lambda p: rk.SGD(p, -1), ValueError, "lr: expected a finite number >= 0, got -1"),
    (lambda p: rk.SGD(p, math.inf), ValueError, "lr: expected"),
    (lambda p: rk.SGD(p, None), TypeError, "lr: expected a number, got NoneType"),
    (lambda p: rk.SGD(p, 0.1, 1.0), ValueError, r"momentum: expected a number in \[0, 1\), got 1.0"),
    (lambda p: rk.Adam(p, betas=0.9), TypeError, "betas: expected two numbers"),
    (lambda p: rk.Adam(p, betas=(0.9, 1)), ValueError, r"betas\[1\]: expected"),
    (lambda p: rk.Adam(p, eps=0), ValueError, "eps: expected a finite number > 0, got 0"),
    (lambda p: rk.Adam([p, p["a"]]), TypeError, r"parameters\[1\]: expected a mapping"),
    (lambda p: rk.Adam({"a": p["a"].T}), ValueError, r"parameters\[0\]\['a'\]: expected a writable C-contiguous"),
    (
        lambda p: rk.Adam({"a": p["a"].astype(int)}),
        TypeError,
        r"parameters\[0\]\['a'\]: expected an array of floats",
    ),
    (lambda p: rk.Adam(p).load_state_dict({"steps": 1}), ValueError, "state: expected the names"),
    (lambda p: rk.Adam(p).load_state_dict(rk.Adam({"b": p["a"]}).state_dict()), ValueError, r"state\['mean'\]"),
    (lambda p: rk.SGD(p, 0.1).load_state_dict({"steps": -1}), ValueError, r"state\['steps'\]: expected"),
]


def test_optimizers_name_what_is_wrong(subtests: pytest.Subtests) -> None:
    """Argument, expectation and what came."""
    for call, error, message in WRONG_OPTIMIZERS:
        with subtests.test(message), pytest.raises(error, match=message):
            call({"a": np.ones((2, 3))})


def test_options_of_optimizers_are_named() -> None:
    """Argument, expectation and what came."""
    parameters = {"a": np.ones(3), "b": np.ones(2)}
    for optimizer, options, message in (
        (rk.AdamW, {"weight_decay": -1}, "weight_decay: expected a finite number >= 0, got -1"),
        (rk.AdamW, {"groups": ["0.a"]}, "groups: expected a mapping of patterns of names to mappings, got list"),
        (rk.AdamW, {"groups": {"a": {}}}, "groups: expected patterns of the names 0.a, 0.b, got 'a'"),
        (rk.AdamW, {"groups": {"*": 0.1}}, r"groups\['\*'\]: expected a mapping with lr_factor and weight_decay, got"),
        (rk.Adam, {"groups": {"0.a": {"weight_decay": 1}}}, "expected a mapping with lr_factor, got weight_decay"),
        (rk.Adam, {"groups": {"0.a": {"lr_factor": -1}}}, r"groups\['0.a'\]\['lr_factor'\]: expected a finite number"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer(parameters, **options)


# Schedules


def test_schedules_agree_with_torch(torch: Any, random: np.random.Generator) -> None:
    """Learning rate for learning rate, the best and not the last loss counts, and NaN is no better."""
    theirs = torch.optim.lr_scheduler
    losses = [*(1 / (1 + np.arange(12))), *random.random(25), math.nan, -1.0, *random.random(25)]
    for ours, make in (
        (partial(rk.CosineSchedule, total_steps=60, final_lr=0.1), lambda o: theirs.CosineAnnealingLR(o, 60, 0.1)),
        (partial(rk.StepSchedule, every=7, factor=0.5), lambda o: theirs.StepLR(o, 7, 0.5)),
        (
            partial(rk.PlateauSchedule, factor=0.5, patience=3, threshold=0.1, final_lr=0.01),
            lambda o: theirs.ReduceLROnPlateau(o, factor=0.5, patience=3, threshold=0.1, min_lr=0.01, eps=0),
        ),
    ):
        optimizer = rk.SGD({"p": np.ones(2)}, lr=0.8)
        other = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.8)
        schedule, expected = ours(optimizer), make(other)
        for loss in losses[:60]:
            assert optimizer.lr == pytest.approx(other.param_groups[0]["lr"], rel=1e-12)
            other.step()
            given = [loss] if isinstance(schedule, rk.PlateauSchedule) else []
            schedule.step(*given)
            expected.step(*given)


def test_schedules_go_on_from_their_state(tmp_path: Any) -> None:
    """Saved and loaded, or copied with the optimizer, they set what they would have; what is wrong changes nothing."""
    for make, given in (
        (partial(rk.CosineSchedule, total_steps=9, warmup_steps=4), ()),
        (partial(rk.StepSchedule, every=2), ()),
        (partial(rk.PlateauSchedule, patience=0), (1.0,)),
    ):
        first = make(rk.SGD({"p": np.ones(2)}, lr=0.5))
        for _ in range(5):
            first.step(*given)
        rk.save(tmp_path / "schedule", first.state_dict())
        second, third = make(rk.Adam({"p": np.ones(2)}, lr=0.1)), pickle.loads(pickle.dumps(first))
        before = second.state_dict()
        for wrong in ({}, before | {"more": 1}, dict.fromkeys(before, -1), dict.fromkeys(before, "1")):
            with pytest.raises((TypeError, ValueError), match="state"):
                second.load_state_dict(wrong)
        assert second.state_dict() == before
        second.load_state_dict(rk.load(tmp_path / "schedule"))
        for one in (second, third):
            assert one.optimizer.lr == first.optimizer.lr
            one.step(*given)
        first.step(*given)
        assert second.optimizer.lr == third.optimizer.lr == first.optimizer.lr
    for call, message in (
        (lambda o: rk.CosineSchedule(o.lr, 5), "optimizer: expected SGD, Adam or AdamW, got float 0.5"),
        (lambda o: rk.CosineSchedule(o, 5, 5), "warmup_steps: expected an integer from 0 to 4, got 5"),
        (lambda o: rk.StepSchedule(o, 0), "every: expected an integer >= 1, got 0"),
        (lambda o: rk.PlateauSchedule(o, 1.0), r"factor: expected a number in \[0, 1\), got 1.0"),
        (lambda o: rk.PlateauSchedule(o).step([1.0]), "loss: expected a number, got list"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call(rk.SGD({"p": np.ones(2)}, lr=0.5))


# All together


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_a_network_learns(cell: str, random: np.random.Generator) -> None:
    """To say which of two symbols came three steps ago, in rows of different lengths."""
    T, B = 12, 16
    layer = rk.Recurrent(cell, 2, 12, seed=0)
    output = rk.Linear(12, 2, seed=1)
    optimizer = rk.Adam([layer.parameters, output.parameters], lr=0.03)
    lengths = random.integers(6, T + 1, size=B)
    loss = math.inf
    for _ in range(60):
        symbols = random.integers(2, size=(T, B))
        y, _, tape = layer.forward(np.eye(2, dtype=np.float32)[symbols], lengths=lengths)
        logits, output_tape = output.forward(y)
        targets = np.concatenate([np.zeros((3, B), int), symbols[:-3]])
        loss, dlogits = rk.cross_entropy(logits, targets, lengths)
        output_grads = output.backward(output_tape, dlogits)
        grads = [layer.backward(tape, output_grads.x, need_x=False), output_grads]
        rk.clip_grad_norm(grads, 1.0)
        optimizer.step(grads)
    assert loss < 0.3  # chance is ln 2 over three quarters of the steps
