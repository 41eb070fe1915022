"""Calls of the kernels with tensors, without autograd, and the tape as a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import backends
from ..arguments import Signature
from ..cells import CELLS
from ..functional import dropout_masks
from ..stack import Stack, State

__all__ = ["DTYPES", "Kernels", "Tape", "kernels_of", "tape_of", "tensor_of"]

Array = NDArray[Any]

DTYPES: dict[torch.dtype, np.dtype[Any]] = {torch.float32: np.dtype(np.float32), torch.float64: np.dtype(np.float64)}


def _pause_of_openmp() -> Callable[[int], int]:
    """`omp_pause_resource_all` of the OpenMP runtime that torch uses, or what does nothing where there is none."""
    try:
        pause: Callable[[int], int] = ctypes.CDLL(torch._C.__file__).omp_pause_resource_all
    except (AttributeError, OSError):
        return lambda kind: kind
    return pause


_pause = _pause_of_openmp()
_SOFT = 1  # omp_pause_soft: threads end, settings stay
# After an operation of torch its threads spin for milliseconds, on the cores that ours are waiting for. To end them
# costs 30 us, and 50 more in torch's next operation: worth it for calls of about a millisecond and more.
_PAUSE_FLOPS = 10**8


class Tape(NamedTuple):
    """What one forward leaves to its backward."""

    packed: Any
    saved: Any  # of the backend; None where x has no elements
    lengths: Array | None
    resets: Array | None
    masks: Sequence[Array] | None


def tensor_of(tape: Tape) -> Tensor:
    """A tensor of one byte whose storage holds the tape: it dies with the last tensor that shares its memory."""
    tensor = torch.from_numpy(np.zeros(1, np.uint8))
    tensor.untyped_storage().tape = tape
    return tensor


def tape_of(tensor: Tensor) -> Tape:
    """What `tensor_of` was given."""
    tape: Tape | None = getattr(tensor.untyped_storage(), "tape", None)
    if tape is None:
        raise RuntimeError("tape: expected the tensor that rnnkern::forward returned, got a copy, which holds no tape")
    return tape


def _array(tensor: Tensor) -> Array:
    """The tensor's own memory where it is contiguous, else a copy."""
    array: Array = tensor.contiguous().resolve_neg().numpy()
    return array


class Kernels:
    """A stack on a backend, from tensors to tensors and without autograd. The state is a tuple, (h,) or (h, c)."""

    def __init__(self, signature: Signature, backend: ModuleType, keys: tuple[str, ...]) -> None:
        self.signature = signature
        self.backend = backend
        self.keys = keys  # the weights of a layer-direction, in torch's order
        self.flops = signature.stack.flops  # of a row of one step
        self._zeros = 0, signature.zeros(0)

    def zeros(self, batch: int) -> State:
        """A state of zeros, to be read; kept until another batch size comes."""
        known, zeros = self._zeros
        if known != batch:
            zeros = self.signature.zeros(batch)
            self._zeros = batch, zeros
        return zeros

    def pack(self, arrays: Sequence[dict[str, Array]], training: bool) -> Any:
        """The backend's copy of what `arrays` returned."""
        return self.backend.pack(self.signature.stack, arrays, training)

    def arrays(self, weights: Sequence[Tensor]) -> list[dict[str, Array]]:
        """The memory of the weights where they are contiguous, else copies."""
        return self.by_layer([_array(one.detach()) for one in weights])

    def by_layer(self, weights: Sequence[Any]) -> list[dict[str, Any]]:
        """A mapping for each layer-direction, of the weights of all, one after the other."""
        count = len(self.keys)
        return [dict(zip(self.keys, weights[i : i + count], strict=True)) for i in range(0, len(weights), count)]

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """In the order of the weights."""
        bias, projection = "b_ih" in self.keys, "w_hr" in self.keys
        shapes = [sizes.weight_shapes(bias, projection) for sizes in self.signature.stack.layers]
        return [one[key] for one in shapes for key in self.keys]

    def masks(self, x: Tensor, dropout: float, seed: Tensor | None) -> Sequence[Array] | None:
        """Of dropout between the layers; None, which stands for no dropout, without a seed."""
        if seed is None:
            return None
        return dropout_masks(self.signature.stack, x.shape[0], x.shape[1], dropout, int(seed))

    def infer(
        self,
        arrays: Sequence[dict[str, Array]],
        x: Tensor,
        state: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        masks: Sequence[Array] | None,
    ) -> list[Tensor]:
        """y and the final state."""
        training = masks is not None  # weights packed for inference take no masks
        return self.forward(self.pack(arrays, training), x, state, lengths, resets, masks, training)[0]

    def forward(
        self,
        packed: Any,
        x: Tensor,
        state: Sequence[Tensor],
        lengths: Tensor | None,
        resets: Tensor | None,
        masks: Sequence[Array] | None,
        training: bool,
    ) -> tuple[list[Tensor], Tape]:
        """y (T, B, D*P) with the final state, and the tape; x (T, B, I), no state is zeros."""
        signature, inputs = self.signature, _array(x)
        steps, batch, _ = inputs.shape
        initial = tuple([_array(one) for one in state]) if state else self.zeros(batch)
        ends = None if lengths is None else signature.lengths(_array(lengths), steps, batch, False)
        cuts = None if resets is None else signature.resets(_array(resets), steps, batch, False)
        if self.flops * steps * batch > _PAUSE_FLOPS:
            _pause(_SOFT)
        y, saved = np.empty((steps, batch, signature.output_size), signature.dtype), None
        if inputs.size:
            final, saved = self.backend.forward(
                signature.stack, packed, inputs, initial, ends, cuts, masks, y, training
            )
        else:
            final = tuple([one.copy() for one in initial])
        from_numpy = torch.from_numpy
        return [from_numpy(y), *[from_numpy(one) for one in final]], Tape(packed, saved, ends, cuts, masks)

    def backward(
        self,
        tape: Tape,
        x: Tensor,
        dy: Tensor | None,
        dfinal: Sequence[Tensor | None],
        need_x: bool,
        need_state: bool,
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """Gradients of x (None unless needed), of the initial state (none unless needed) and of the weights."""
        packed, saved, ends, cuts, masks = tape
        steps, batch, _ = x.shape
        dstate = tuple(
            [zero if one is None else _array(one) for one, zero in zip(dfinal, self.zeros(batch), strict=True)]
        )
        from_numpy = torch.from_numpy
        if saved is None:
            return (
                torch.zeros_like(x) if need_x else None,
                [from_numpy(one.copy()) for one in dstate if need_state],
                [x.new_zeros(shape) for shape in self.weight_shapes()],
            )
        if self.flops * steps * batch > _PAUSE_FLOPS:
            _pause(_SOFT)
        gradient = None if dy is None else _array(dy)
        dx, dinitial, gradients = self.backend.backward(
            self.signature.stack, packed, saved, ends, cuts, masks, gradient, dstate, need_x
        )
        return (
            None if dx is None else from_numpy(dx),
            [from_numpy(one) for one in dinitial] if need_state else [],
            [from_numpy(one[key]) for one in gradients for key in self.keys],
        )


@lru_cache(maxsize=256)
def kernels_of(
    cell: str,
    input_size: int,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    bias: bool,
    backend: str,
    dtype: torch.dtype,
) -> Kernels:
    """The kernels of a module of these options; the operators have them as arguments too."""
    directions: tuple[bool, ...] = (False, True) if bidirectional else (False,)
    stack = Stack(CELLS[cell], input_size, hidden_size, proj_size, num_layers, directions, DTYPES[dtype])
    keys = tuple(stack.layers[0].weight_shapes(bias, proj_size > 0))
    return Kernels(Signature(stack), backends.pick(backend), keys)
