"""The kernels for other compiled code: rnnkern_abi.h, called through ctypes, and the program in C."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from ctypes import c_bool, c_char, c_char_p, c_int64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rnnkern as rk
from rnnkern.backends import native as native_backend

native: Any = native_backend.native_module()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled module is missing")

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_layer.c"
INCLUDE = Path(rk.__file__).parent / "include"
VERSION = 4


class Stack(ctypes.Structure):
    _fields_ = [
        *[("isa", c_char_p), ("cell", c_char_p), ("element_bytes", c_int64), ("input_size", c_int64)],
        *[("hidden_size", c_int64), ("proj_size", c_int64), ("num_layers", c_int64), ("directions", c_int64)],
        *[("reverse", c_bool * 2), ("biased", c_bool), ("rounds", c_bool), ("engines", c_bool)],
    ]


class Arrays(ctypes.Structure):
    _fields_ = [("data", ctypes.POINTER(c_void_p)), ("count", c_int64)]


class Memory(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("bytes", c_int64)]


class Sizes(ctypes.Structure):
    _fields_ = [
        *[("states", c_int64), ("weights", c_int64), ("packed_for_inference", c_int64)],
        *[("packed_for_training", c_int64), ("kept", c_int64), ("kept_with_masks", c_int64)],
    ]


class Pack(ctypes.Structure):
    _fields_ = [("training", c_bool), ("weights", Arrays), ("packed", Memory)]


class Forward(ctypes.Structure):
    _fields_ = [
        *[("steps", c_int64), ("batch", c_int64), ("lengths", c_void_p), ("resets", c_void_p)],
        *[("masks", ctypes.POINTER(c_void_p)), ("x", c_void_p), ("initial", Arrays), ("packed", Memory)],
        *[("y", c_void_p), ("last", Arrays), ("training", c_bool), ("kept", Memory)],
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *[("forward", ctypes.POINTER(Forward)), ("dy", c_void_p), ("dlast", Arrays), ("dx", c_void_p)],
        *[("dinitial", Arrays), ("gradients", Arrays)],
    ]


class Message(ctypes.Structure):
    _fields_ = [("text", c_char * 240)]


class Functions(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("sizes", "pack", "forward", "backward")]


def functions() -> Functions:
    """The calls of the compiled module."""
    abi = ctypes.CDLL(native.__file__).rnnkern_abi
    abi.restype = ctypes.POINTER(Functions)
    return abi(VERSION).contents  # type: ignore[no-any-return]


def call(name: str, *arguments: Any) -> str:
    """Makes one of the calls; what its message says, empty where it ran."""
    function = ctypes.CFUNCTYPE(c_bool, *[c_int64 if isinstance(one, int) else c_void_p for one in arguments], c_void_p)
    message = Message()
    given = [one if isinstance(one, int) else ctypes.addressof(one) for one in arguments]
    ran = function(getattr(functions(), name))(*given, ctypes.addressof(message))
    return "" if ran else message.text.decode()


def pointers(arrays: Sequence[NDArray[Any] | None]) -> Any:
    """Their addresses, as an array of C; null for None."""
    return (c_void_p * len(arrays))(*[None if one is None else one.ctypes.data for one in arrays])


def arrays_of(arrays: Sequence[NDArray[Any] | None]) -> Arrays:
    return Arrays(pointers(arrays), len(arrays))


def memory_of(array: NDArray[np.uint8]) -> Memory:
    return Memory(array.ctypes.data, array.nbytes)


class Training:
    """A layer of the package, and the structs of the same training calls of the ABI."""

    def __init__(self) -> None:
        T, B, I, H = 6, 3, 4, 5
        self.layer = layer = rk.LSTM(I, H, num_layers=3, bidirectional=True, dropout=0.4, dtype="float64", seed=0)
        draw = np.random.default_rng(1).standard_normal
        self.x, self.dy = draw((T, B, I)), draw((T, B, 2 * H))
        self.lengths, self.resets = np.array([6, 2, 4]), np.arange(T * B).reshape(T, B) % 5 == 3
        self.y, self.dx = np.zeros_like(self.dy), np.zeros_like(self.x)
        self.states = [np.zeros((6, B, H)) for _ in range(4)]  # the last ones, and the gradients of the first
        self.weights = [layer.parameters[name] for names in layer._names for name in names.values()]
        self.gradients = [np.zeros_like(weight) for weight in self.weights]
        self.stack = Stack(None, b"lstm", 8, I, H, 0, 3, 2, (c_bool * 2)(False, True), True)
        self.sizes = Sizes()
        assert not call("sizes", self.stack, T, B, self.sizes)
        self.packed = np.zeros(self.sizes.packed_for_training, np.uint8)
        self.kept = np.zeros(self.sizes.kept_with_masks, np.uint8)
        self.tape = layer.forward(self.x, lengths=self.lengths, resets=self.resets, seed=7)[-1]
        self.masks = self.tape.call.masks
        self.pack = Pack(True, arrays_of(self.weights), memory_of(self.packed))
        self.forward = Forward(
            *[T, B, self.lengths.ctypes.data, self.resets.ctypes.data, pointers(self.masks), self.x.ctypes.data],
            *[arrays_of([None, None]), memory_of(self.packed), self.y.ctypes.data, arrays_of(self.states[:2])],
            *[True, memory_of(self.kept)],
        )
        self.backward = Backward(
            *[ctypes.pointer(self.forward), self.dy.ctypes.data, arrays_of([None, None]), self.dx.ctypes.data],
            *[arrays_of(self.states[2:]), arrays_of(self.gradients)],
        )


def test_a_training_call_is_that_of_the_layer_to_the_bit() -> None:
    """With lengths, resets and masks, three layers of both directions; sizes are those that the calls take."""
    one = Training()
    assert not call("pack", one.stack, one.pack)
    assert not call("forward", one.stack, one.forward)
    assert not call("backward", one.stack, one.backward)
    y, state, tape = one.layer.forward(one.x, lengths=one.lengths, resets=one.resets, seed=7)
    grads = one.layer.backward(tape, one.dy)
    found = [one.y, *one.states, one.dx, *one.gradients]
    expected = [y, *state, *grads.state, grads.x, *grads.parameters.values()]
    assert len(one.weights) == one.sizes.weights
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


WRONG: list[tuple[Any, str]] = [
    (lambda one: setattr(one.stack, "isa", b"none"), "isa: expected one that this CPU runs, got 'none'"),
    (lambda one: setattr(one.stack, "cell", b"none"), "cell: the compiled module has none named 'none'"),
    (lambda one: setattr(one.stack, "cell", None), "cell: expected a name, got null"),
    (lambda one: setattr(one.stack, "element_bytes", 2), "element_bytes: expected 4 or 8, got 2"),
    (lambda one: setattr(one.stack, "rounds", True), "rounds: expected false with element_bytes 8"),
    (lambda one: setattr(one.stack, "engines", True), "engines: expected false with element_bytes 8, and with rounds"),
    (lambda one: setattr(one.stack, "directions", 3), "directions: expected one or two"),
    (lambda one: setattr(one.forward.packed, "bytes", 8), r"packed: expected \d+ bytes, got 8"),
    (lambda one: setattr(one.forward.kept, "bytes", 8), r"kept: expected \d+ bytes, got 8"),
    (lambda one: setattr(one.forward.initial, "count", 1), "initial: expected 2 arrays, got 1"),
    (lambda one: one.lengths.fill(7), "lengths: expected 0 <= length <= 6, got 7"),
    (lambda one: setattr(one.forward, "steps", -1), "steps, batch: expected at least 0"),
    (lambda one: setattr(one.forward, "training", False), "packed: expected|masks: expected null"),
]


def test_a_wrong_call_says_why_and_does_nothing() -> None:
    """Sizes are checked before anything is read or written."""
    for change, why in WRONG:
        one = Training()
        change(one)
        assert re.match(why, call("forward", one.stack, one.forward))
        assert not one.y.any()


def test_another_version_is_refused() -> None:
    """Null, and not functions that take other structs."""
    abi = ctypes.CDLL(native.__file__).rnnkern_abi
    abi.restype = c_void_p
    assert [abi(version) is None for version in (VERSION - 1, VERSION, VERSION + 1)] == [True, False, True]


def test_the_program_in_c_trains_a_layer(tmp_path: Path) -> None:
    """Compiled as its first lines say, without a warning; at last it makes a hundredth of its first error."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path / "train_layer.so"
    flags = ["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-I", str(INCLUDE)]
    subprocess.run([compiler, *flags, str(EXAMPLE), "-lm", "-o", str(library)], check=True)
    train = ctypes.CDLL(os.fspath(library)).train
    train.restype = c_bool
    errors = np.zeros(300, np.float32)
    assert train(ctypes.byref(functions()), 300, errors.ctypes.data_as(c_void_p))
    assert errors[-20:].mean() < errors[0] / 100
