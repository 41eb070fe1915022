"""Random wrong calls at the public API and at the compiled module.

`test_hostile.py` runs this file as a script, in child processes, so that a crash is seen as the signal that ended one:
`python tests/hostile_calls.py public 0 100` (or `native`) repeats a batch.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import pickle
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

import rnnkern as rk
from rnnkern import config
from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.stack import Forward, Stack

native = native_module()

BATCHES, REJECTED_IN_BATCH = 4, 1_300  # of each target: 10,400 wrong calls in all
HUGE = (2**46, 2**62, 2**63, 10**30)  # no memory holds an array with such a dimension, whatever the system promises


meddled_with: list[Any] = []  # arrays of the call at hand that were changed under its eyes


class HostileError(Exception):
    """What hostile objects raise; it may come through."""


SENSIBLE = (
    ValueError, TypeError, OverflowError, FloatingPointError, MemoryError, HostileError, rk.BackendUnavailableError
)  # fmt: skip


def _raise(*_: Any, **__: Any) -> Any:
    raise HostileError


class Raises:
    """Raises in every protocol by which it could be read."""

    __array__ = __index__ = __len__ = __getitem__ = __iter__ = __bool__ = __float__ = __fspath__ = __str__ = _raise
    __dlpack__ = __dlpack_device__ = __contains__ = __eq__ = __repr__ = __buffer__ = keys = _raise
    __hash__ = None  # type: ignore[assignment]


class Lies:
    """Answers in every protocol, and each answer is of the wrong type or size."""

    def __init__(self) -> None:
        self.asked = 0

    def __len__(self) -> int:
        self.asked += 1
        return 40 if self.asked > 1 else 1

    def __getitem__(self, index: Any) -> Any:
        if index == 100:
            raise IndexError
        return np.zeros((1, 2, 3), np.float32)

    def __array__(self, *_: Any, **__: Any) -> Any:
        return np.zeros((1,) * 5, np.int8)

    def __index__(self) -> int:
        return 2**70

    def __dlpack__(self, **_: Any) -> Any:
        return "no capsule"

    def __dlpack_device__(self) -> Any:
        return (1, 0)

    def keys(self) -> Any:
        return ["w_ih", 3]


class Elements:
    """A sequence that lets `count` change each time it is asked, and runs `meddle` before it hands out an element."""

    def __init__(self, values: Any, counts: list[int], meddle: Callable[[], Any] = lambda: None) -> None:
        self.values, self.counts, self.meddle = list(values), counts, meddle

    def __len__(self) -> int:
        return self.counts.pop(0) if len(self.counts) > 1 else self.counts[0]

    def __getitem__(self, index: int) -> Any:
        self.meddle()
        if index >= 100:
            raise IndexError
        return self.values[index % len(self.values)]


class Converts:
    """An array only through `__array__`, which may run `meddle`."""

    def __init__(self, array: Any, meddle: Callable[[], Any] = lambda: None) -> None:
        self.array, self.meddle = array, meddle

    def __array__(self, *_: Any, **__: Any) -> Any:
        self.meddle()
        return self.array


class OnADevice:
    """An array that is not on the CPU."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("on a device")

    def __dlpack_device__(self) -> Any:
        return (2, 0)


class OddArray(np.ndarray):  # type: ignore[type-arg]
    """Lies about its shape and dtype to Python."""

    shape = property(lambda _: (7, 7))  # type: ignore[assignment]
    dtype = property(lambda _: np.dtype("float64"))  # type: ignore[assignment]


class OddDict(dict):  # type: ignore[type-arg]
    """A dict whose Python methods disagree with its content."""

    def __len__(self) -> int:
        return 1

    def __contains__(self, _: object) -> bool:
        return True

    def __getitem__(self, _: object) -> Any:
        return np.zeros(3, np.float64)


class OddKey:
    """Found in the way to the weight of that name, and raises when it is compared, once it is in its dict."""

    in_place = False

    def __hash__(self) -> int:
        return hash("w_hh")

    def __eq__(self, _: object) -> bool:
        return self.in_place and bool(_raise())


def with_odd_key(values: dict[Any, Any]) -> dict[Any, Any]:
    key = OddKey()
    result = {key: 1} | values
    key.in_place = True
    return result


def junk(rng: random.Random) -> Any:
    """Anything but what is asked for."""
    return rng.choice(
        (None, ..., True, -1, 0, -(2**63), *HUGE, float("nan"), float("inf"), -0.5, 1j, "", "lstm\0", "\ud800", b"\xff",
         [], (), {}, {"w_ih": 1}, {1.5}, object(), int, np.float32, range(3), (i for i in range(3)), slice(None),
         memoryview(b"abc"), np.float32(1), np.zeros(()), np.zeros(3), np.zeros((2**40, 0, 3), np.float32),
         np.zeros((1, 2, 3, 4, 5)), np.array(["a"]), np.array([None, []], object), np.datetime64("now"),
         [[1.0], [2.0, 3.0]], Raises(), Lies(), OnADevice(), Elements([1.0], [1, 50, 0]), OddDict(a=1),
         with_odd_key({}))
    )  # fmt: skip


DTYPES = ("f2", "f4", "f8", "g", "i1", "i8", "u8", "c8", "?", "O", "U3", "M8[s]", "V4")


# Each takes (generator, array, the call's other arrays) and gives something near the array.


def other_dtype(rng: random.Random, a: Any, _: Any) -> Any:
    dtype = rng.choice(DTYPES)
    return np.zeros(a.shape, dtype) if dtype[0] in "MV" else a.astype(dtype)


def other_shape(rng: random.Random, a: Any, _: Any) -> Any:
    shape = list(a.shape) or [1]
    axis = rng.randrange(len(shape))
    change = rng.choice(("more", "less", "none", "many", "insert", "drop"))
    if change == "insert":
        shape.insert(axis, 1)
    elif change == "drop":
        del shape[axis]
    elif change == "many":
        shape = [0, *shape[1:]]
        shape[axis] = shape[axis] and HUGE[0]  # its state would have so many rows too
    else:
        shape[axis] = {"more": shape[axis] + 1, "less": max(shape[axis] - 1, 0), "none": 0}[change]
    return np.resize(a, shape) if change != "many" else np.zeros(shape, a.dtype)


def other_layout(rng: random.Random, a: Any, _: Any) -> Any:
    kind = rng.choice(("order", "strided", "reversed", "broadcast", "misaligned", "byte order", "read-only"))
    if kind == "order":
        return np.asfortranarray(a)
    if kind == "strided":
        wide = np.zeros(tuple(2 * n for n in a.shape), a.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in a.shape)]
        view[...] = a
        return view
    if kind == "reversed":
        return a[::-1]
    if kind == "broadcast" and a.size:
        return np.broadcast_to(a.reshape(-1)[:1], a.shape) if a.ndim == 1 else np.broadcast_to(a[:1], a.shape)
    if kind == "misaligned":
        view = np.zeros(a.nbytes + 1, np.uint8)[1:].view(a.dtype).reshape(a.shape)
        view[...] = a
        return view
    if kind == "byte order":
        return a.astype(a.dtype.newbyteorder())
    view = a.view()
    view.flags.writeable = False
    return view


def other_values(rng: random.Random, a: Any, _: Any) -> Any:
    a = a.copy()
    if a.size:
        values = {"f": (np.nan, np.inf, -np.inf, 1e-310, 3e38), "i": (-1, 2**62, -(2**63), 10**6)}
        a.flat[rng.randrange(a.size)] = rng.choice(values.get(a.dtype.kind, (1, 0)))
    return a


def other_type(rng: random.Random, a: Any, _: Any) -> Any:
    odd = rng.choice((OddArray, np.matrix)) if a.ndim == 2 else OddArray
    return rng.choice(
        (a.tolist, lambda: memoryview(a), lambda: np.ma.array(a), lambda: a.view(odd), lambda: Converts(a),
         lambda: a.reshape(-1)[:1].reshape(()) if a.size else a.dtype, lambda: tuple(a), lambda: iter(a), a.tobytes)
    )()  # fmt: skip


def overlapping(rng: random.Random, a: Any, others: Any) -> Any:
    large = [other for other in others if other is not a and other.nbytes >= a.nbytes and other.flags.c_contiguous]
    if not large:
        return junk(rng)
    return rng.choice(large).reshape(-1).view(np.uint8)[: a.nbytes].view(a.dtype).reshape(a.shape)


def meddling(rng: random.Random, a: Any, others: Any) -> Any:
    if not others:
        return junk(rng)
    victim = rng.choice(others)
    return Converts(a, lambda: flatten(victim))


def near_array(rng: random.Random, a: Any, others: Any) -> Any:
    kinds = (other_dtype, other_shape, other_layout, other_values, other_type, overlapping, meddling)
    return rng.choice(kinds)(rng, a, others)


def take_away(array: Any) -> None:
    meddled_with.append(array)
    array.resize((0,), refcheck=False)


def flatten(array: Any) -> None:
    meddled_with.append(array)
    array.shape = (array.size,)


def near_sequence(rng: random.Random, values: Any, others: Any) -> Any:
    owners = [other for other in others if other.flags.owndata]
    owner = rng.choice(owners) if owners else np.zeros(1)
    count = len(values)
    return rng.choice(
        (lambda: list(values), lambda: values[:-1], lambda: (*values, None), lambda: (v for v in values),
         lambda: Elements(values or [0], [count, count + 40]), lambda: Elements(values or [0], [count, 0]),
         lambda: Elements(values or [0], [count], lambda: take_away(owner)), lambda: dict.fromkeys("a"))
    )()  # fmt: skip


def near_dict(rng: random.Random, values: Any, _: Any) -> Any:
    key = rng.choice(list(values) or [""])
    without = {name: value for name, value in values.items() if name != key}
    return rng.choice(
        (without, without | {"w_xh": values.get(key)}, without | {key: None}, without | {b"w_hh": values.get(key)},
         values | {"extra": np.zeros(3)}, values | {3: 4}, with_odd_key(values),
         OddDict(values), MappingProxyType(values), list(values.items()))
    )  # fmt: skip


def near_int(rng: random.Random, value: int, _: Any) -> Any:
    near = (-1, 0, -value, value + 1, float(value), str(value), True, np.int64(value), [value], np.array(value))
    return rng.choice((*near, *HUGE))


NEAR: tuple[tuple[Any, Callable[..., Any]], ...] = (
    (np.ndarray, near_array),
    ((tuple, list), near_sequence),
    (dict, near_dict),
    (bool, lambda rng, value, _: rng.choice((int(value), None, "yes", np.bool_(value), [value]))),
    (int, near_int),
    (float, lambda rng, value, _: rng.choice((-value, str(value), value * 1e308 * 10, float("nan"), 1j, HUGE[0]))),
    (str, lambda rng, value, _: rng.choice((value + "x", value.upper(), value.encode(), [value], value[:-1]))),
)


def mutated(rng: random.Random, value: Any, others: Any) -> Any:
    """Something near a value: one leaf, or one container, is another."""
    if rng.random() < 0.15:
        return junk(rng)
    if isinstance(value, tuple | list) and value and rng.random() < 0.6:
        at = rng.randrange(len(value))
        return type(value)([mutated(rng, one, others) if i == at else one for i, one in enumerate(value)])
    if isinstance(value, dict) and value and rng.random() < 0.6:
        key = rng.choice(list(value))
        return value | {key: mutated(rng, value[key], others)}
    for kind, near in NEAR:
        if isinstance(value, kind):
            return near(rng, value, others)
    return junk(rng)


def arrays_in(value: Any) -> Iterator[Any]:
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, tuple | list | dict):
        for one in value.values() if type(value) is dict else value:
            yield from arrays_in(one)


Call = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]  # function, arguments, names of those it fills


def floats(*shape: int, dtype: Any = np.float32) -> Any:
    return np.linspace(-1, 1, int(np.prod(shape))).reshape(shape).astype(dtype)


def by_position(function: Callable[..., Any]) -> Callable[..., Any]:
    """For functions that take no names."""
    return lambda **arguments: function(*arguments.values())


class Public:
    """Valid calls of the public API."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        options = [
            ("rnn_relu", {}), ("rnn_tanh", {"num_layers": 2, "dropout": 0.5}), ("rnn_sigmoid", {"bias": False}),
            ("lstm", {"bidirectional": True}), ("lstm", {"proj_size": 2, "batch_first": True}),
            ("gru", {"dtype": "float64"}), ("gru_reset_before", {"num_layers": 2, "bidirectional": True}),
        ]  # fmt: skip
        self.layers = [rk.Recurrent(cell, 3, 4, seed=1, **option) for cell, option in options]  # type: ignore[arg-type]
        self.linear = rk.Linear(3, 2, seed=1)
        self.path = Path("state.npz")
        rk.save(self.path, self.linear.state_dict())

    def inputs(self, layer: Any, unbatched: bool = False) -> dict[str, Any]:
        """Arguments of a call with T=3, B=2."""
        dtype, directions = layer.dtype, 2 if layer.bidirectional else 1
        batch: tuple[int, ...] = () if unbatched else (2,)
        lead: tuple[int, ...] = (3,) if unbatched else (2, 3) if layer.batch_first else (3, 2)
        rows = layer.num_layers * directions
        state = [floats(rows, *batch, layer.proj_size or 4, dtype=dtype), floats(rows, *batch, 4, dtype=dtype)]
        arguments = {"x": floats(*lead, 3, dtype=dtype)}
        if self.rng.random() < 0.7:
            arguments["state"] = tuple(state) if layer.cell == "lstm" else state[0]
        if self.rng.random() < 0.5 and not unbatched:
            arguments["lengths"] = np.array([3, 1])
        if self.rng.random() < 0.5:
            arguments["resets"] = np.zeros(lead, bool)
        return arguments

    def output(self, layer: Any, x: Any) -> Any:
        return np.zeros((*x.shape[:-1], (layer.proj_size or 4) * (2 if layer.bidirectional else 1)), layer.dtype)

    def make(self) -> Call:
        sizes = {"input_size": 3, "hidden_size": 4, "num_layers": 2, "bias": True, "batch_first": False, "seed": 3}
        options = {"dropout": 0.5, "bidirectional": False, "dtype": "float32", "backend": "native"}
        kind, extra = self.rng.choice(
            ((rk.RNN, {"nonlinearity": "tanh"}), (rk.LSTM, {"proj_size": 2}), (rk.GRU, {"reset_after": True}),
             (rk.Recurrent, {"cell": "lstm", "proj_size": 0}))
        )  # fmt: skip
        return kind, sizes | options | extra, ()

    def call(self) -> Call:
        layer = self.rng.choice(self.layers)
        arguments = self.inputs(layer, self.rng.random() < 0.3)
        if self.rng.random() < 0.5:
            arguments["out"] = self.output(layer, arguments["x"])
        return self.rng.choice((layer, layer.freeze())), arguments, ("out",)

    def forward(self) -> Call:
        layer = self.rng.choice(self.layers)
        return layer.forward, self.inputs(layer) | {"save": "gates", "seed": 5}, ()

    def backward(self) -> Call:
        layer = self.rng.choice(self.layers)
        arguments = self.inputs(layer)
        y, state, tape = layer.forward(**arguments)
        dstate = tuple(one.copy() for one in state) if isinstance(state, tuple) else state.copy()
        given = {"tape": tape, "dy": np.ones_like(y), "dstate": dstate, "need_x": True, "parameters": True}
        if self.rng.random() < 0.2:
            given["into"] = layer.backward(tape)
        if self.rng.random() < 0.1:
            given["tape"] = self.layers[0].forward(floats(3, 2, 3))[2]
        return layer.backward, given, ()

    def memory_plan(self) -> Call:
        layer = self.rng.choice(self.layers)
        return rk.memory_plan, {"layer": layer, "shape": self.inputs(layer, self.rng.random() < 0.3)["x"].shape}, ()

    def functional(self) -> Call:
        weights = {"w_ih": floats(16, 3), "w_hh": floats(16, 4), "b_ih": floats(16), "b_hh": floats(16)}
        if self.rng.random() < 0.5:
            weights |= {"w_hh": floats(16, 2), "w_hr": floats(2, 4)}
        x = floats(3, 2, 3)
        if self.rng.random() < 0.5:
            return rk.forward, {"cell": "lstm", "x": x, "weights": weights, "reverse": True, "save": "gates"}, ()
        y, state, tape = rk.forward("lstm", x, weights)
        return rk.backward, {"tape": tape, "dy": np.ones_like(y), "dstate": tuple(one.copy() for one in state)}, ()

    def stream(self) -> Call:
        layer = self.rng.choice([one for one in self.layers if not one.bidirectional])
        frozen = layer.freeze()
        if self.rng.random() < 0.2:
            return frozen.stream, {"batch": 2}, ()
        stream, x = frozen.stream(2), floats(2, 3, dtype=layer.dtype)
        if self.rng.random() < 0.2:
            return (lambda state: setattr(stream, "state", state)), {"state": stream.state}, ()
        return stream.step, {"x_t": x, "out": self.output(layer, x)}, ("out",)

    def load_weights(self) -> Call:
        layer = self.rng.choice((*self.layers, self.linear))
        return (lambda mapping: layer.load_state_dict(mapping)), {"mapping": layer.state_dict()}, ()

    def output_layer(self) -> Call:
        x, choice = floats(3, 2, 3), self.rng.randrange(4)
        if choice == 0:
            sizes = {"in_features": 3, "out_features": 2, "bias": True}
            return rk.Linear, sizes | {"dtype": "float64", "backend": "native", "seed": 1}, ()
        if choice == 1:
            return self.linear, {"x": x, "out": np.zeros((3, 2, 2), np.float32)}, ("out",)
        if choice == 2:
            return self.linear.forward, {"x": x}, ()
        return self.linear.backward, {"tape": self.linear.forward(x)[1], "dy": floats(3, 2, 2), "need_x": True}, ()

    def loss(self) -> Call:
        x, common = floats(3, 2, 4), {"lengths": np.array([1, 3]), "batch_first": False}
        if self.rng.random() < 0.5:
            return rk.cross_entropy, {"logits": x, "targets": np.zeros((3, 2), np.int64)} | common, ()
        return rk.mse, {"prediction": x, "target": floats(3, 2, 4)} | common, ()

    def training(self) -> Call:
        parameters, gradients = {"weight": floats(3, 2), "bias": floats(2)}, {"weight": floats(3, 2), "bias": floats(2)}
        adam = rk.Adam([parameters], lr=0.1)
        calls: tuple[Call, ...] = (
            (rk.clip_grad_norm, {"grads": [gradients], "max_norm": 1.0}, ("grads",)),
            (rk.clip_grad_value, {"grads": [gradients], "value": 1.0}, ("grads",)),
            (rk.SGD, {"parameters": [parameters], "lr": 0.1, "momentum": 0.5}, ()),
            (rk.Adam, {"parameters": parameters, "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8}, ()),
            (adam.step, {"grads": [gradients]}, ()),
            (adam.load_state_dict, {"state": adam.state_dict()}, ()),
        )
        return self.rng.choice(calls)

    def settings(self) -> Call:
        def use_isa(name: Any) -> None:
            with config.use_isa(name):
                pass

        calls = ((config.set_num_threads, {"count": 2}, ()), (use_isa, {"name": "baseline"}, ()))
        return self.rng.choice(calls)

    def files(self) -> Call:
        if self.rng.random() < 0.2:
            return rk.save, {"path": "saved.npz", "state": {"a": floats(3), "b": [1, (2.0, None)]}}, ()
        content = bytearray(self.path.read_bytes())
        content[self.rng.randrange(len(content))] ^= self.rng.randrange(1, 256)
        damaged = Path("damaged.npz")
        damaged.write_bytes(content[: self.rng.choice((None, self.rng.randrange(len(content))))])
        return rk.load, {"path": str(damaged)}, ()

    VALID = (make, call, forward, backward, functional, stream, load_weights, output_layer, loss, training, settings)
    VALID += (call, forward, backward, files, memory_plan)


class Native:
    """Valid calls of the compiled module."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        cells = [(cell, projects) for cell in CELLS.values() for projects in {False, cell.projects}]
        self.stacks = [
            Stack(cell, 3, 4, 2 if projects else 0, layers, directions, np.dtype(dtype), precision=precision)
            for cell, projects in cells
            for layers, directions, dtype, precision in (
                (1, (False,), "f4", "float32"),
                (1, (True,), "f4", "bfloat16"),
                (2, (False, True), "f8", "float32"),
            )
        ]
        self.saved = [self.run(stack)[1] for stack in self.stacks]

    def pack_arguments(self, stack: Stack, training: bool, bias: bool) -> dict[str, Any]:
        return {
            "stack": stack.description, "names": stack.weight_names[bias], "training": training,
            "weights": [
                {name: floats(*shape, dtype=stack.dtype) for name, shape in one.items()}
                for one in stack.weight_shapes[bias]
            ],
        }  # fmt: skip

    def state(self, stack: Stack) -> tuple[Any, ...]:
        return tuple(floats(*shape, dtype=stack.dtype) for shape in stack.state_shapes(2))

    def forward_arguments(self, stack: Stack, packed: bool = True) -> dict[str, Any]:
        some, rows = (
            self.rng.random() < 0.5,
            self.rng.choice(("lengths", "offsets", "sizes") if packed else ("lengths",)),
        )
        lead: tuple[int, ...] = (5, 2) if rows == "lengths" else (7,)
        y = np.zeros((*lead, stack.output_size), stack.dtype)
        return {
            "x": floats(*lead, 3, dtype=stack.dtype),
            "state": self.state(stack),
            "lengths": np.array([5, 2]) if rows == "lengths" and some else None,
            "offsets": np.array([0, 5, 7]) if rows == "offsets" else None,
            "sizes": np.array([2, 2, 1, 1, 1]) if rows == "sizes" else None,
            "resets": np.zeros(lead, bool) if some else None,
            "masks": [np.ones_like(y) for _ in range(stack.num_layers - 1)] if some else None,
            "y": y,
            "save": self.rng.choice(("gates", "gates", "outputs", None)),
        }

    def run(self, stack: Stack, bias: bool = True) -> tuple[Any, Any, dict[str, Any]]:
        packed = native.pack(**self.pack_arguments(stack, True, bias))
        arguments = self.forward_arguments(stack) | {"save": self.rng.choice(("gates", "outputs"))}
        return packed, packed.forward(Forward(**arguments))[1], arguments

    def pack(self) -> Call:
        stack = self.rng.choice(self.stacks)
        return native.pack, self.pack_arguments(stack, True, self.rng.random() < 0.5), ()

    def forward(self) -> Call:
        stack = self.rng.choice(self.stacks)
        packed = native.pack(**self.pack_arguments(stack, self.rng.random() < 0.5, True))
        if self.rng.random() < 0.1:
            return packed.forward, {"request": tuple(Forward(**self.forward_arguments(stack)))}, ("request",)
        return (lambda **fields: packed.forward(Forward(**fields))), self.forward_arguments(stack), ("y",)

    def plan(self) -> Call:
        packed = native.pack(**self.pack_arguments(self.rng.choice(self.stacks), self.rng.random() < 0.9, True))
        return packed.plan, {
            "steps": 5, "batch": 2, "save": self.rng.choice(("gates", "outputs", None)),
            "backward": self.rng.random() < 0.5,
        }, ()  # fmt: skip

    def backward(self) -> Call:
        stack, bias = self.rng.choice(self.stacks), self.rng.random() < 0.5
        packed, saved, given = self.run(stack, bias)
        change, lead = self.rng.random(), given["y"].shape[:-1]
        if change < 0.1:
            saved = self.rng.choice(self.saved)
        elif change < 0.2:
            given[self.rng.choice("xy")].resize((1,), refcheck=False)
        arguments = {
            "saved": saved,
            "dy": np.ones((*lead, stack.output_size), stack.dtype),
            "dlast": self.state(stack),
            "need_x": True,
            "need_state": self.rng.random() < 0.5,
            "gradients": self.gradients(stack, bias),
            "bound": self.rng.choice((None, ("norm", 1.0), ("value", 0.5))),
            "saturated": self.rng.choice((None, stack.cell.saturated)),
            "flow": self.flow(stack, lead),
            "dx": self.rng.choice((None, np.zeros((*lead, stack.input_size), stack.dtype))),
        }
        return packed.backward, arguments, ("gradients", "flow", "dx")

    def flow(self, stack: Stack, lead: tuple[int, ...]) -> list[Any]:
        """Arrays for what is measured of each layer-direction in a call of these rows."""
        shape = (len(stack.cell.states) + len(stack.cell.gates), *lead)
        return [np.zeros(shape, stack.dtype) for _ in stack.layers]

    def gradients(self, stack: Stack, bias: bool) -> list[dict[str, Any]]:
        """Arrays to add gradients to, None for new ones, without some of them."""
        wanted, given = self.rng.choice((0.5, 1)), self.rng.random() < 0.5
        return [
            {
                name: np.zeros(shape, stack.dtype) if given else None
                for name, shape in one.items()
                if self.rng.random() < wanted
            }
            for one in stack.weight_shapes[bias]
        ]

    def frozen_call(self) -> Call:
        stack = self.rng.choice(self.stacks)
        packed = native.pack(**self.pack_arguments(stack, self.rng.random() < 0.2, True))
        if self.rng.random() < 0.1:
            return native.frozen_call, {"packed": packed, "friendly": _raise, "batch_first": True}, ()
        call = native.frozen_call(packed, self.rng.choice((_raise, None)), self.rng.random() < 0.3)
        given = self.forward_arguments(stack, packed=False)
        arguments: dict[str, Any] = {
            "x": given["x"],
            "state": given["state"] if len(stack.cell.states) > 1 else given["state"][0],
            "lengths": None,
            "offsets": None,
            "resets": None,
            "out": self.rng.choice((None, given["y"])),
        }
        if self.rng.random() < 0.3:  # T, B = 1 or without B
            one = self.rng.choice((np.s_[:, :1], np.s_[:, 0]))
            for name, value in arguments.items():
                kept = tuple(part[one].copy() for part in value) if isinstance(value, tuple) else value
                arguments[name] = value[one].copy() if isinstance(value, np.ndarray) else kept
        return by_position(call.run), arguments, ("out",)

    def step(self) -> Call:
        stack = self.rng.choice([one for one in self.stacks if len(one.directions) == 1])
        packed = native.pack(**self.pack_arguments(stack, self.rng.random() < 0.2, True))
        choice = self.rng.random()
        if choice < 0.1:
            return native.stream, {"packed": packed, "batch": 2, "arguments": _raise}, ()
        x, y = floats(2, 3, dtype=stack.dtype), np.zeros((2, stack.output_size), stack.dtype)
        right = (x.copy(), y.copy())
        near = tuple(near_array(self.rng, array, right) for array in right)
        arguments = self.rng.choice(
            (_raise, None, lambda *_: right, lambda *_: near, lambda *_: junk(self.rng),
             lambda *_: near_sequence(self.rng, right, right))
        )  # fmt: skip
        steps = native.stream(packed, 2, arguments)
        if choice < 0.3:
            return (lambda state: setattr(steps, "state", state)), {"state": steps.state}, ()
        return by_position(steps.step), {"x_t": x, "out": self.rng.choice((None, y))}, ("out",)

    def linear(self) -> Call:
        dtype = self.rng.choice((np.float32, np.float64))
        x, weight, y = floats(5, 3, dtype=dtype), floats(2, 3, dtype=dtype), floats(5, 2, dtype=dtype)
        bias, products = floats(2, dtype=dtype), {"rounds": self.rng.random() < 0.5, "engines": self.rng.random() < 0.5}
        gradients = {"dx": np.zeros_like(x), "dweight": np.zeros_like(weight), "dbias": np.zeros_like(bias)}
        if self.rng.random() < 0.5:
            given = {"bias": bias, "y": y, "dy": None} | dict.fromkeys(gradients)
        else:
            given = {"bias": None, "y": None, "dy": y} | gradients
        return native.linear, {"x": x, "weight": weight} | given | products, ("y", *gradients)

    def small(self) -> Call:
        packed, saved, _ = self.run(self.stacks[0])
        calls: tuple[Call, ...] = (
            (native.sum_of_squares, {"arrays": [floats(9), floats(2, 3)]}, ()),
            (native.set_num_threads, {"count": 2}, ()),
            (native.lanes, {"dtype": "float32"}, ()),
            ((lambda name: native.use_isa(name)), {"name": native.isa()}, ()),
            ((lambda one: native.Packed.nbytes.fget(one)), {"one": packed}, ()),
            ((lambda one: native.Saved.nbytes.fget(one)), {"one": saved}, ()),
            ((lambda one: native.Packed.isa.fget(one)), {"one": packed}, ()),
            ((lambda one: native.Steps.state.fget(one)), {"one": native.stream(packed, 2, _raise)}, ()),
            ((lambda one: native.Steps.step(one, None, None)), {"one": native.stream(packed, 2, _raise)}, ()),
            ((lambda one: native.FrozenCall.run(one)), {"one": native.frozen_call(packed, _raise, True)}, ()),
        )
        return self.rng.choice(calls)

    def instance(self) -> Call:
        """Ways to make an instance without its constructor, or to take one for another; there is no valid one."""
        packed, saved, _ = self.run(self.stacks[0])
        instances = (packed, saved, native.frozen_call(packed, _raise, False), native.stream(packed, 1, _raise))
        one, another = self.rng.sample(instances, 2)
        kind, other = type(one), type(another)

        def use(instance: Any) -> None:
            for name in ("nbytes", "state"):
                getattr(instance, name, None)
            native.FrozenCall.run(instance, None, None, None, None, None)
            native.Steps.step(instance, None, None)

        calls: tuple[Call, ...] = (
            (lambda kind: kind(), {"kind": kind}, ()),
            (lambda kind: use(kind.__new__(kind)), {"kind": kind}, ()),
            (lambda kind: use(object.__new__(kind)), {"kind": kind}, ()),
            (lambda kind: use(type("Sub", (kind,), {})()), {"kind": kind}, ()),
            (lambda other: setattr(one, "__class__", other), {"other": other}, ()),
            (lambda kind: setattr(kind, "__new__", object.__new__), {"kind": kind}, ()),
            (lambda arguments: one.__init__(*arguments), {"arguments": ("lstm", "float32")}, ()),
            (lambda copied: copied(one), {"copied": self.rng.choice((copy.copy, copy.deepcopy, pickle.dumps))}, ()),
        )
        return self.rng.choice(calls)

    VALID = (pack, pack, forward, forward, forward, backward, backward, backward, linear, linear, small, instance)
    VALID += (frozen_call, frozen_call, step, step, plan)


TARGETS: dict[str, type[Any]] = {"public": Public, "native": Native}
ALSO_SENSIBLE = {Public.files: (OSError,), Native.instance: (AttributeError,)}


def wrong_call(rng: random.Random, call: Call) -> tuple[Call, bool]:
    """The call with one mutation, or with many; and whether it was one."""
    function, arguments, filled = call
    near = rng.random() < 0.6
    arguments = dict(arguments)
    if near:
        others = list(arrays_in(list(arguments.values())))
        name = rng.choice(list(arguments))
        if rng.random() < 0.03:
            del arguments[name]
        elif rng.random() < 0.03:
            arguments["another"] = junk(rng)
        else:
            arguments[name] = mutated(rng, arguments[name], others)
    else:
        for name in arguments:
            arguments[name] = mutated(rng, arguments[name], ()) if rng.random() < 0.5 else junk(rng)
    return (function, arguments, filled), near


def check_untouched(before: list[tuple[Any, bytes]], arguments: dict[str, Any], filled: tuple[str, ...]) -> None:
    """The arrays of the caller hold what they held, but for those that a call was asked to fill."""
    outputs = list(arrays_in([arguments.get(name) for name in filled]))
    for array, content in before:
        excused = any(array is one for one in meddled_with) or any(np.may_share_memory(array, one) for one in outputs)
        assert excused or np.ndarray.tobytes(array) == content, "an argument was written to"


def throw(target: str, seed: int, count: int) -> dict[str, int]:
    """Wrong calls until `count` were rejected; their numbers by kind. Each is named on stdout before it is made."""
    warnings.simplefilter("ignore")
    np.seterr(all="ignore")
    config.set_num_threads(2)
    rng = random.Random(f"{target} {seed}")
    valid = TARGETS[target](rng)
    numbers = {"rejected": 0, "near": 0, "accepted": 0}
    while numbers["rejected"] < count:
        meddled_with.clear()
        build = rng.choice(valid.VALID)
        (function, arguments, filled), near = wrong_call(rng, build(valid))
        before = [(array, np.ndarray.tobytes(array)) for array in arrays_in(list(arguments.values()))]
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in arguments.items())
        sys.stdout.write(f"{build.__name__}({kinds})\n")
        sys.stdout.flush()
        try:
            function(**arguments)
        except Exception as error:
            if not isinstance(error, (*SENSIBLE, *ALSO_SENSIBLE.get(build, ()))) and not meddled_with:
                raise
            numbers["rejected"] += 1
            numbers["near"] += near
            check_untouched(before, arguments, ())
        else:
            numbers["accepted"] += 1
            check_untouched(before, arguments, filled)
    return numbers


if __name__ == "__main__":
    faulthandler.enable()
    sys.stdout.write(json.dumps(throw(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))) + "\n")
