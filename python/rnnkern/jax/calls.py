"""How a call of `rnnkern.jax` runs: through the compiled handlers, or through Python where there are none.

Both ways have the same three functions, which take x (T, B, I) with T and B at least 1, a tuple of states, int32
lengths (B,) or None, bool resets (T, B) or None, and all weights, layer-direction by layer-direction:

    infer(call, x, state, lengths, resets, weights) -> y, *final state
    forward(call, x, state, lengths, resets, weights) -> (y, *final state), residuals
    backward(call, residuals, dy, dstate) -> dx or None, tuple of dstate, tuple of the gradients of the weights
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from .. import backends
from ..stack import Backward, Forward, Stack, State
from .handlers import find_bytes

__all__ = ["Call", "Compiled", "ThroughPython", "vary_alike"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Call:
    """What is known of a call when JAX traces it, beside the shapes of its arrays."""

    stack: Stack
    bias: bool
    lengths: bool
    resets: bool
    isa: str | None  # of the packed weights; None: through Python
    need_x: bool = True  # whether backward gives dx

    @property
    def weight_shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """Names and shapes of the weights of each layer-direction."""
        return [sizes.weight_shapes(self.bias, self.stack.proj_size > 0) for sizes in self.stack.layers]

    def output_like(self, x: Any) -> jax.ShapeDtypeStruct:
        """Shape and dtype of y."""
        return jax.ShapeDtypeStruct((*x.shape[:2], self.stack.output_size), x.dtype)

    def weights_like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtype of the weights."""
        shapes = (shape for one in self.weight_shapes for shape in one.values())
        return tuple(jax.ShapeDtypeStruct(shape, self.stack.dtype) for shape in shapes)


def like(array: Any) -> jax.ShapeDtypeStruct:
    """Its shape and dtype."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def vary_alike(arrays: Any, beside: Any = ()) -> Any:
    """The arrays of a tree as they are, but varying over each axis of a `jax.shard_map` that one of all varies over.

    What JAX holds for equal on all devices it takes from one of them, and what is summed over them in backward follows
    from that: the derivative of this cast is the sum. Without its `check_vma` there is nothing to be done.
    """
    axes = {axis for one in jax.tree.leaves((arrays, beside)) for axis in jax.typeof(one).mat.varying}

    def cast(array: Any) -> Any:
        return jax.lax.pcast(array, tuple(sorted(axes - jax.typeof(array).mat.varying, key=str)), to="varying")

    return jax.tree.map(cast, arrays) if axes else arrays


class Compiled:
    """Through the handlers of handlers.cpp, which say what their arguments are."""

    @staticmethod
    def infer(call: Call, x: Any, state: Any, lengths: Any, resets: Any, weights: Any) -> Any:
        inference, _, _ = _bytes(call, x)
        packed = _handler(call, "pack", [_memory(inference)], training=False)(*weights)[0]
        results = [call.output_like(x), *map(like, state)]
        return _handler(call, "forward", results)(x, *_rows(lengths, resets), packed, *state)

    @staticmethod
    def forward(call: Call, x: Any, state: Any, lengths: Any, resets: Any, weights: Any) -> Any:
        _, training, keeps = _bytes(call, x)
        packed = _handler(call, "pack", [_memory(training)], training=True)(*weights)[0]
        results = [call.output_like(x), *map(like, state), _memory(keeps)]
        *results, kept = _handler(call, "forward", results)(x, *_rows(lengths, resets), packed, *state)
        return results, (x, state, lengths, resets, packed, results[0], kept)

    @staticmethod
    def backward(call: Call, residuals: Any, dy: Any, dstate: Any) -> Any:
        x, state, lengths, resets, packed, y, kept = residuals
        results = [*([like(x)] if call.need_x else []), *map(like, state), *call.weights_like()]
        arguments = x, *_rows(lengths, resets), packed, y, kept, dy, *state, *dstate
        return _gradients(call, _handler(call, "backward", results, need_x=call.need_x)(*arguments))


def _memory(size: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((size,), np.uint8)


def _sizes(call: Call) -> tuple[int, int, int, int]:
    stack = call.stack
    return stack.input_size, stack.hidden_size, stack.proj_size, stack.num_layers


def _bytes(call: Call, x: Any) -> tuple[int, int, int]:
    """Of the weights, packed for inference and for training, and of what training keeps."""
    stack = call.stack
    assert call.isa is not None
    reverse = (*stack.directions, False)[:2]
    products = stack.rounds, stack.engines
    numbers = stack.dtype.itemsize, *_sizes(call), len(stack.directions), *reverse, *products, *x.shape[:2]
    inference, training, kept = find_bytes(call.isa, stack.cell.name, numbers)
    return inference, training, kept


def _handler(call: Call, name: str, results: Sequence[jax.ShapeDtypeStruct], **options: bool) -> Any:
    # Only a vmap over weights, and one over gradients, still reach this: each element is then a call of its own.
    function = partial(
        jax.ffi.ffi_call(f"rnnkern_xla_{name}", results, vmap_method="sequential"),
        isa=call.isa,
        cell=call.stack.cell.name,
        sizes=np.array(_sizes(call), np.int64),
        reverse=np.array(call.stack.directions, np.int64),
        flags=np.array([call.bias, call.stack.rounds, call.stack.engines], np.int64),
        **options,
    )
    return partial(_call, function)


def _call(function: Any, *arguments: Any) -> Any:
    """The results of an array function that JAX cannot look into, which vary as its arguments do."""
    return vary_alike(function(*arguments), beside=arguments)


def _rows(lengths: Any, resets: Any) -> tuple[Any, Any]:
    return (
        jnp.zeros((0,), jnp.int32) if lengths is None else lengths,
        jnp.zeros((0, 0), bool) if resets is None else resets,
    )


def _gradients(call: Call, results: Sequence[Any]) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
    dx, rest = (results[0], results[1:]) if call.need_x else (None, results)
    states = len(call.stack.cell.states)
    return dx, tuple(rest[:states]), tuple(rest[states:])


class ThroughPython:
    """Through `jax.pure_callback` on the best backend there is. Backward runs forward again: a tape is no array."""

    @staticmethod
    def infer(call: Call, x: Any, state: Any, lengths: Any, resets: Any, weights: Any) -> Any:
        results = [call.output_like(x), *map(like, state)]
        function = partial(jax.pure_callback, partial(_infer, call), results, vmap_method="sequential")
        return _call(function, x, state, lengths, resets, weights)

    @staticmethod
    def forward(call: Call, x: Any, state: Any, lengths: Any, resets: Any, weights: Any) -> Any:
        arguments = x, state, lengths, resets, weights
        return ThroughPython.infer(call, *arguments), arguments

    @staticmethod
    def backward(call: Call, residuals: Any, dy: Any, dstate: Any) -> Any:
        x, state, *_ = residuals
        results = [*([like(x)] if call.need_x else []), *map(like, state), *call.weights_like()]
        function = partial(jax.pure_callback, partial(_backward, call), results, vmap_method="sequential")
        return _gradients(call, _call(function, *residuals, dy, dstate))


def _infer(call: Call, *arguments: Any) -> list[Any]:
    y, final, _ = _run(call, False, *arguments)
    return [y, *final]


def _backward(call: Call, *arguments: Any) -> list[Any]:
    *residuals, dy, dstate = arguments
    _, _, backward = _run(call, True, *residuals)
    dx, dinitial, gradients = backward(Backward(_numpy(dy), tuple(map(_numpy, dstate)), call.need_x))
    ordered = (one[key] for one, shapes in zip(gradients, call.weight_shapes, strict=True) for key in shapes)
    return [*([dx] if call.need_x else []), *dinitial, *ordered]


def _run(
    call: Call, training: bool, x: Any, state: Any, lengths: Any, resets: Any, weights: Any
) -> tuple[Array, State, Any]:
    """y, the final state, and the backward of this forward."""
    stack, x = call.stack, _numpy(x)
    backend = backends.pick(precision=stack.precision, arithmetic=stack.arithmetic)
    steps, batch, _ = x.shape
    if lengths is not None:
        lengths = _numpy(lengths).astype(np.int64)
        if lengths.min() < 0 or lengths.max() > steps:
            raise ValueError(f"lengths: expected values from 0 to {steps}, got {lengths.min()} to {lengths.max()}")
    resets = None if resets is None else _numpy(resets)
    arrays = map(_numpy, weights)
    packed = backend.pack(stack, [{key: next(arrays) for key in one} for one in call.weight_shapes], training)
    y = np.empty((steps, batch, stack.output_size), stack.dtype)
    forward = Forward(x, tuple(map(_numpy, state)), y, "gates" if training else None, lengths, resets)
    final, saved = backend.forward(stack, packed, forward)
    return y, final, partial(backend.backward, stack, packed, saved, forward)


def _numpy(array: Any) -> Array:
    return np.require(np.asarray(array), None, ["C", "ALIGNED"])
