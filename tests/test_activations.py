"""The compiled tanh, sigmoid and relu: at most 4 ulp wherever the result is normal, and exact at the ends."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rnnkern as rk
from rnnkern.backends.native import native_module

Array = NDArray[Any]

ULP = 4
WIDER = {"float32": np.float64, "float64": np.longdouble}
SATURATED = {"float32": {"tanh": 10, "sigmoid": 104}, "float64": {"tanh": 20, "sigmoid": 746}}

# Where a result leaves the normal numbers or saturates, and the worst points that searches have found.
POINTS = {
    ("tanh", "float32"): [8.5, 9.01, 10, float.fromhex("0x1.206168p+2"), float.fromhex("0x1.cda304p+1")],
    ("tanh", "float64"): [19, 20, float.fromhex("0x1.ea4a389a3df86p+2")],
    ("sigmoid", "float32"): [87.33, 87.34, 88, 88.376, 88.72, 89, 103, 104, float.fromhex("0x1.f36f2ap+0")],
    ("sigmoid", "float64"): [708.39, 709, 709.44, 709.78, 710, 745, 746, float.fromhex("0x1.0a6ec54d96d99p+4")],
}


def apply(name: str, x: Array) -> Array:
    """What a layer makes of x: its only unit takes each row as it is, and adds to it what leaves even -0.0 alone."""
    layer = rk.Recurrent(f"rnn_{name}", 1, 1, dtype=x.dtype.name, backend="native")
    nothing = np.full(1, -0.0, x.dtype)
    layer.load_state_dict(
        {"weight_ih_l0": np.ones((1, 1), x.dtype), "weight_hh_l0": nothing[:, None]}
        | dict.fromkeys(("bias_ih_l0", "bias_hh_l0"), nothing)
    )
    return layer(x.reshape(1, -1, 1))[0].reshape(-1)


def exact(name: str, x: Array) -> Array:
    """The function in the next wider type."""
    wide = x.astype(WIDER[x.dtype.name])
    with np.errstate(over="ignore"):
        result: Array = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    return result


def edges(name: str, dtype: str) -> Array:
    """Zeros, the smallest and largest numbers, POINTS and the boundaries of the argument reduction, with neighbours."""
    limits = np.finfo(dtype)
    period = np.log(2) / 2 if name == "tanh" else np.log(2)
    boundaries = (np.arange(np.ceil(SATURATED[dtype][name] / period)) + 0.5) * period
    special = [0, limits.smallest_subnormal, limits.smallest_normal, limits.max]
    x = np.concatenate([special, POINTS[name, dtype], boundaries]).astype(dtype)
    with np.errstate(over="ignore"):
        x = np.concatenate([x, np.nextafter(x, x.dtype.type(0)), np.nextafter(x, x.dtype.type(np.inf))])
    return np.concatenate([x, -x, [np.inf, -np.inf]]).astype(dtype)


@cache
def arguments(name: str, dtype: str) -> tuple[Array, Array]:
    """Arguments over the whole range and their exact results."""
    if dtype == "float32":  # by bit pattern: all binades, and densely those where something happens
        first, last = np.array([2.0**-14, 128], "f4").view(np.uint32)
        bits = np.concatenate([np.arange(0, 0x7F800000, 1031), np.arange(first, last, 257)]).astype(np.uint32)
        x = bits.view(np.float32)
    else:
        random = np.random.default_rng(7)
        scale = SATURATED[dtype][name]
        x = np.concatenate([random.uniform(0, scale, 150_000), random.uniform(0, scale / 20, 100_000)])
        x = np.concatenate([x, 2.0 ** random.uniform(-1022, 10, 50_000)])
    x = np.concatenate([x, -x, edges(name, dtype)])
    x.flags.writeable = False
    return x, exact(name, x)


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_error_is_at_most_four_ulp(name: str, dtype: str) -> None:
    """Where the exact result is a normal number; below that, the result is anything from 0 to the smallest one."""
    if np.finfo(WIDER[dtype]).eps >= np.finfo(dtype).eps:
        pytest.skip("this platform has no type wider than float64 to compare with")
    x, expected = arguments(name, dtype)
    y, tiny = apply(name, x), np.finfo(dtype).smallest_normal
    normal = np.abs(expected) >= tiny
    ulps = np.abs(y - expected)[normal] / np.spacing(np.abs(expected[normal]).astype(dtype))
    worst = int(ulps.argmax())
    assert ulps[worst] <= ULP, f"{float(ulps[worst]):.2f} ulp at {float(x[normal][worst]).hex()}"
    assert (np.abs(y[~normal]) <= tiny).all()
    assert (y[~normal] * x[~normal] >= 0).all() if name == "tanh" else (y >= 0).all()


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_saturation_is_exact(dtype: str) -> None:
    """Far out the results are -1, 0 and 1 to the last bit, up to infinity."""
    limits = np.finfo(dtype)
    for name, low in (("tanh", -1), ("sigmoid", 0)):
        start = SATURATED[dtype][name]
        x = np.array([start, np.nextafter(start, np.inf), start + 0.5, 2 * start, 1e30, limits.max, np.inf], dtype)
        assert (apply(name, x) == 1).all()
        assert (apply(name, -x) == low).all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_nan_stays_nan(name: str, dtype: str) -> None:
    """In any lane, of any sign, beside numbers that stay what they are."""
    x = np.linspace(-3, 3, 37).astype(dtype)
    plain = apply(name, x)
    for lane in range(len(x)):
        for nan in (np.nan, -np.nan):
            given = x.copy()
            given[lane] = nan
            y = apply(name, given)
            assert np.isnan(y[lane])
            assert (np.delete(y, lane) == np.delete(plain, lane)).all()


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_zeros(dtype: str) -> None:
    """tanh keeps the sign of zero, relu gives +0 for both, sigmoid one half; denormals count as near zero."""
    smallest = np.finfo(dtype).smallest_subnormal
    zeros = np.array([0.0, -0.0], dtype)
    assert apply("tanh", zeros).tobytes() == zeros.tobytes()
    assert apply("relu", zeros).tobytes() == np.zeros(2, dtype).tobytes()
    assert (apply("sigmoid", np.array([0.0, -0.0, smallest, -smallest], dtype)) == 0.5).all()


@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_relu_is_exact(dtype: str) -> None:
    """It is max(x, 0); denormals are zero in layers."""
    x = np.concatenate([edges(name, dtype) for name in ("tanh", "sigmoid")])
    expected = np.where(x >= np.finfo(dtype).smallest_normal, x, np.zeros(1, dtype))
    assert apply("relu", x).tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "relu"])
@pytest.mark.parametrize("dtype", WIDER)
@pytest.mark.usefixtures("native")
def test_length_does_not_matter(name: str, dtype: str) -> None:
    """A vector that is not full gives the bits of a full one, whatever its length."""
    x = np.linspace(-9, 9, 2 * native_module().lanes(dtype) + 1).astype(dtype)
    every = [apply(name, x[i : i + 1])[0] for i in range(len(x))]
    for n in range(len(x) + 1):
        assert apply(name, x[:n].copy()).tolist() == every[:n]
