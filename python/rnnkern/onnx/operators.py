"""The operators as classes of `onnx.reference`: the checks of a node, and its run on the kernels or step by step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import helper
from onnx.reference.op_run import OpRun

from .. import convert
from ..arguments import Signature, describe
from ..cells import CELLS
from ..layers import Frozen, parameter_names
from ..stack import Stack
from . import standard
from .standard import Attributes

__all__ = ["OPERATORS", "Recurrence", "as_constant"]

Array = NDArray[Any]

OLDEST_OPSET = 7
WEIGHTS = ("W", "R", "B", "P")
REALS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class Packed:
    """The layer of a node with what it was made of."""

    attributes: Attributes
    weights: list[Array | None]  # W, R, B and P
    frozen: Frozen
    hidden: int
    exact: np.dtype[Any] | None  # what X and the states have where the layer takes and gives them as they are


class Recurrence(OpRun):
    """What the three operators share; `onnx.reference` knows each by the name of its class."""

    def __init__(self, onnx_node: Any, run_params: Any) -> None:
        super().__init__(onnx_node, run_params)
        name = repr(onnx_node.name) if onnx_node.name else f"with the outputs {list(onnx_node.output)}"
        self._label = f"{self.op_type} node {name}"
        opset = run_params["opsets"][onnx_node.domain]
        if opset < OLDEST_OPSET:
            raise ValueError(f"{self._label}: expected opset {OLDEST_OPSET} or newer, got {opset}")
        self._warned = False
        self._held: Packed | None = None
        # Attributes that refer to those of a function are known when it is called.
        self.attributes = None if self.has_linked_attribute else self._parse(vars(self))
        entry = standard.OPERATORS[self.op_type]
        # By name: where another node leaves out an output, onnx.reference has a value for the input "" too.
        places = {key: at for at, (key, name) in enumerate(zip(entry.inputs, onnx_node.input, strict=False)) if name}
        self._places = places
        self._weights = [places.get(name) for name in WEIGHTS]
        self._states_given = [places[name] for name in entry.states if name in places]
        self._lengths = places.get("sequence_lens")
        self._wanted = [bool(name) for name in onnx_node.output]

    def _parse(self, values: Mapping[str, Any]) -> Attributes:
        """The attributes that the node has; the defaults that the schema added to the values stay out."""
        try:
            attributes = Attributes.of(self.op_type, {one.name: values[one.name] for one in self.onnx_node.attribute})
        except ValueError as error:
            raise ValueError(f"{self._label}: {error}") from None
        if attributes.obstacle is not None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._label} runs step by step in NumPy: the kernels have no {attributes.obstacle}", stacklevel=2
            )
        return attributes

    def run(self, *arrays: Any, **options: Any) -> tuple[Array | None, ...]:
        """As the base class says; inputs that a packed layer takes as they are skip the checks and go to it at once."""
        held = self._held
        if held is not None and held.exact is not None and self._takes(held, arrays):
            state: Any = [arrays[at] for at in self._states_given]
            if held.attributes.batch_first:
                state = [one.swapaxes(0, 1) for one in state]
            lengths = None if self._lengths is None else arrays[self._lengths]
            try:
                y, final = held.frozen(
                    arrays[0], state if len(state) > 1 else state[0] if state else None, lengths=lengths
                )
                return self._outputs(held.attributes, held.hidden, y, final)
            except (ValueError, TypeError):
                pass  # The checks of `_run` name the input.
        outputs: tuple[Array | None, ...] = super().run(*arrays, **options)
        return outputs

    def _takes(self, held: Packed, arrays: tuple[Any, ...]) -> bool:
        """Whether a layer is that of the weights, and its call has the last word on X, the states and lengths."""
        if len(self._states_given) not in (0, len(held.attributes.operator.states)):
            return False
        for at in (0, *self._states_given):
            array = arrays[at]
            if not isinstance(array, np.ndarray) or array.dtype != held.exact or array.ndim != 3:
                return False
        return all(map(is_, [None if at is None else arrays[at] for at in self._weights], held.weights))

    def _run(self, *arrays: Array | None, **values: Any) -> tuple[Array | None, ...]:
        attributes = self.attributes or self._parse(values)
        given = {key: array for key, at in self._places.items() if (array := arrays[at]) is not None}
        self._check(attributes, given)
        dtype = given["X"].dtype
        run = self._run_kernels if attributes.obstacle is None else self._run_formulas
        y, state = run(attributes, given, np.dtype(np.float64 if dtype == np.float64 else np.float32))
        outputs = self._outputs(attributes, given["R"].shape[2], y, state)
        return tuple(one if one is None else one.astype(dtype, copy=False) for one in outputs)

    def _outputs(self, attributes: Attributes, hidden: int, y: Array, state: Any) -> tuple[Array | None, ...]:
        """Y and the states as the standard has them, None for what the node leaves out."""
        # (B, T, D, H) with batch_first, else (T, B, D, H).
        y = y.reshape(*y.shape[:2], len(attributes.reverse), hidden)
        states = state if isinstance(state, tuple | list) else (state,)
        if attributes.batch_first:
            states = [one.swapaxes(0, 1) for one in states]
        else:
            y = y.swapaxes(1, 2)
        return tuple([one if name else None for name, one in zip(self._wanted, (y, *states), strict=False)])

    def _run_kernels(
        self, attributes: Attributes, given: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> tuple[Array, Any]:
        """y (T, B, D*H), (B, T, D*H) with batch_first, and the final state as a layer gives it, or a list."""
        frozen = self._frozen(attributes, given, dtype)
        state: Any = self._states(attributes, given, dtype) if given.keys() & {"initial_h", "initial_c"} else None
        if state is not None and len(state) == 1:
            (state,) = state
        return frozen(given["X"].astype(dtype, copy=False), state, lengths=given.get("sequence_lens"))

    def _frozen(self, attributes: Attributes, given: Mapping[str, Array], dtype: np.dtype[Any]) -> Frozen:
        """The layer of the node, kept from call to call where its weights are constants."""
        arrays = [given.get(name) for name in WEIGHTS]
        held = self._held
        if held and held.attributes == attributes and all(map(is_, arrays, held.weights)):
            return held.frozen
        weights = {name: given[name].astype(dtype) for name in WEIGHTS if name in given}
        cell = attributes.cell(peepholes="P" in given)
        D, _, I = given["W"].shape
        # In convert, as in layers, one direction alone is the forward one.
        stack = Stack(CELLS[cell], I, given["R"].shape[2], directions=(False, True)[:D], dtype=dtype)
        parameters = convert.from_onnx(cell, [weights])
        by_direction = [
            {key: parameters[name] for key, name in one.items()} for one in parameter_names(stack, "B" in weights)
        ]
        stack = replace(stack, directions=attributes.reverse)
        frozen = Frozen(Signature(stack, attributes.batch_first), "auto", by_direction, self._label)
        if all(array is None or _is_constant(array) for array in arrays):
            exact = self.attributes is not None and given["X"].dtype == dtype
            self._held = Packed(attributes, arrays, frozen, stack.hidden_size, dtype if exact else None)
        return frozen

    def _run_formulas(
        self, attributes: Attributes, given: Mapping[str, Array], dtype: np.dtype[Any]
    ) -> tuple[Array, Any]:
        """As `_run_kernels`."""
        reals = {name: array.astype(dtype) for name, array in given.items() if name != "sequence_lens"}
        x = reals["X"].swapaxes(0, 1) if attributes.batch_first else reals["X"]
        with np.errstate(all="ignore"):
            y, final = standard.run(
                attributes,
                x,
                reals["W"],
                reals["R"],
                reals.get("B"),
                reals.get("P"),
                given.get("sequence_lens"),
                self._states(attributes, given, dtype),
            )
        return (y.swapaxes(0, 1) if attributes.batch_first else y), final

    def _states(self, attributes: Attributes, given: Mapping[str, Array], dtype: np.dtype[Any]) -> list[Array]:
        """The initial states (D, B, H), zeros for those that are not given."""
        batch = given["X"].shape[0 if attributes.batch_first else 1]
        D, _, H = given["R"].shape
        states = []
        for name in attributes.operator.states:
            array = given.get(name)
            if array is None:
                array = np.zeros((D, batch, H), dtype)
            elif attributes.batch_first:
                array = array.swapaxes(0, 1)
            states.append(array.astype(dtype, copy=False))
        return states

    def _check(self, attributes: Attributes, given: Mapping[str, Array]) -> None:
        """The inputs are there, of one dtype, and of the shapes that X, R and the attributes imply."""
        for name in ("X", "W", "R"):
            if name not in given:
                raise ValueError(f"{self._label}: expected an input {name}, got none")
        X, R = given["X"], given["R"]
        if X.dtype.name not in REALS:
            raise self._wrong("X", f"one of {', '.join(REALS)}", X)
        for name, array in given.items():
            if name != "sequence_lens" and array.dtype != X.dtype:
                raise self._wrong(name, f"{X.dtype}, which X has", array)
        D, G = len(attributes.reverse), attributes.operator.gates
        if X.ndim != 3 or not X.shape[2]:
            raise self._wrong("X", "shape (B, T, I)" if attributes.batch_first else "shape (T, B, I)", X)
        if R.ndim != 3 or not R.size:
            raise self._wrong("R", f"shape ({D}, {G}*H, H)", R)
        T, B = X.shape[1::-1] if attributes.batch_first else X.shape[:2]
        W, H = given["W"], R.shape[2]
        I = W.shape[2] if W.ndim == 3 and W.size else X.shape[2]
        if X.shape[2] != I:
            raise self._wrong("X", f"{I} features, as W has", X)
        if attributes.hidden_size not in (None, H):
            raise ValueError(f"{self._label}: hidden_size: expected {H}, as R has, got {attributes.hidden_size}")
        state = (B, D, H) if attributes.batch_first else (D, B, H)
        shapes = {"R": (D, G * H, H), "W": (D, G * H, I), "B": (D, 2 * G * H), "P": (D, 3 * H), "sequence_lens": (B,)}
        shapes |= {"initial_h": state, "initial_c": state}
        for name, shape in shapes.items():
            if name in given and given[name].shape != shape:
                raise self._wrong(name, f"shape {shape}", given[name])
        lengths = given.get("sequence_lens")
        if lengths is None:
            return
        if lengths.dtype.kind not in "iu":
            raise self._wrong("sequence_lens", "integers", lengths)
        if lengths.size and (lengths.min() < 0 or lengths.max() > T):
            came = f"{lengths.min()} to {lengths.max()}"
            raise ValueError(f"{self._input('sequence_lens')}: expected values from 0 to {T}, got {came}")

    def _wrong(self, name: str, expected: str, came: Array) -> ValueError:
        return ValueError(f"{self._input(name)}: expected {expected}, got {describe(came)}")

    def _input(self, name: str) -> str:
        """How messages call an input: by the standard's name and by that in the graph."""
        index = standard.OPERATORS[self.op_type].inputs.index(name)
        return f"{self._label}: input {name} ({self.onnx_node.input[index]!r})"

    def _check_and_fix_outputs(self, res: tuple[Any, ...]) -> tuple[Any, ...]:
        """None stands for an output that the node leaves out, which the base class does not allow."""
        return res


class RNN(Recurrence):
    """Elman's cell."""


class LSTM(Recurrence):
    """With or without peepholes."""


class GRU(Recurrence):
    """With the reset gate before or after the product."""


class DequantizeLinear(OpRun):
    """Of every opset; `onnx.reference` has it only from 19 on."""

    def _run(
        self,
        x: Array,
        scale: Array,
        zero_point: Array | None = None,
        axis: int = 1,
        block_size: int = 0,
        output_dtype: int = 0,
    ) -> tuple[Array]:
        dtype = helper.tensor_dtype_to_np_dtype(output_dtype) if output_dtype else scale.dtype
        y = x.astype(np.float32)
        if zero_point is not None:
            y -= _spread(zero_point, x.shape, axis, block_size).astype(np.float32)
        return ((y * _spread(scale, x.shape, axis, block_size).astype(np.float32)).astype(dtype),)


def _spread(value: Array, shape: tuple[int, ...], axis: int, block_size: int) -> Array:
    """A scale or zero point of a tensor, an axis or blocks of one, to broadcast against a shape."""
    if value.size == 1 and value.ndim < 2:
        return value.reshape(())
    if block_size:
        return value.repeat(block_size, axis).take(range(shape[axis]), axis)
    ends = [1] * len(shape)
    ends[axis] = value.size
    return value.reshape(ends)


class Loop(OpRun):
    """With scan outputs stacked, also none of them, and without a condition; `onnx.reference` joins or refuses them."""

    def need_context(self) -> bool:
        """The body reads values of the graphs around it."""
        return True

    def _run(
        self, M: Array | None, cond: Array | None = None, *carried: Any, context: Any, attributes: Any, **options: Any
    ) -> tuple[Any, ...]:
        body: Any = options.pop("body")
        state: list[Any] = list(carried)
        scanned: list[list[Array]] = []
        while (M is None or len(scanned) < M) and (cond is None or cond):
            inputs = (np.array(len(scanned), np.int64), np.array(True), *state)
            feeds = {**context, **dict(zip(body.input_names, inputs, strict=False))}
            cond, *results = body.run(None, feeds, attributes=attributes)
            state = results[: len(carried)]
            scanned.append(results[len(carried) :])
        if scanned:
            return (*state, *map(np.stack, zip(*scanned, strict=True)))
        return (*state, *map(_nothing_of, body.output_types_[1 + len(carried) :]))


def _nothing_of(kind: Any) -> Array:
    """No iterations of a tensor; sizes that its type leaves open are 0."""
    sizes = [one.dim_value for one in kind.tensor_type.shape.dim]
    return np.empty((0, *sizes), helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))


OPERATORS = (RNN, LSTM, GRU, DequantizeLinear, Loop)


def as_constant(array: Array) -> Array:
    """The array where nothing can change it, else a copy of that kind."""
    if _is_constant(array):
        return array
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def _is_constant(array: Any) -> bool:
    """No array is left through which its memory may be written to."""
    while isinstance(array, np.ndarray):
        if array.flags.writeable:
            return False
        array = array.base
    return array is None or isinstance(array, bytes)
