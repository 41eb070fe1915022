"""Calls of the kernels with tensors, without autograd, and the tape as a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import backends
from ..arguments import Signature
from ..backends.native import native_module
from ..cells import CELLS
from ..config import num_threads
from ..functional import dropout_masks
from ..stack import Stack, State

__all__ = ["DTYPES", "Kernels", "Needs", "Rows", "Tape", "array_of", "kernels_of", "tape_of", "tensor_of"]

Array = NDArray[Any]

_to_dlpack = torch._C._to_dlpack

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


class Rows(NamedTuple):
    """What a call has beside x, state and weights, as backends take it."""

    lengths: Array | None
    resets: Array | None
    masks: Sequence[Array] | None


class Tape(NamedTuple):
    """What one forward leaves to its backward."""

    packed: Any
    saved: Any  # of the backend; None where x has no elements
    rows: Rows
    places: tuple[int, int]  # the addresses of x and y, whose memory `saved` refers to


class Needs(NamedTuple):
    """Whose gradients are wanted."""

    x: bool
    state: bool
    weights: Sequence[bool]


def tensor_of(tape: Tape) -> Tensor:
    """A tensor of one byte whose storage holds the tape: it dies with the last tensor that shares its memory."""
    tensor = torch.zeros(1, dtype=torch.uint8)
    tensor.untyped_storage().tape = tape
    return tensor


def tape_of(tensor: Tensor, x: Tensor, y: Tensor) -> Tape | None:
    """What `tensor_of` was given; None where one is a copy, or has other memory by now."""
    tape: Tape | None = getattr(tensor.untyped_storage(), "tape", None)
    return tape if tape is not None and tape.places == (x.data_ptr(), y.data_ptr()) else None


class _Lent:
    """A tensor as NumPy asks for it. `Tensor.numpy` would forbid to resize its storage from then on."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **_: Any) -> Any:
        return _to_dlpack(self.tensor)

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # the CPU


def array_of(tensor: Tensor) -> Array:
    """The tensor's own memory where it is contiguous, else a copy; to be read."""
    array: Array = np.from_dlpack(_Lent(tensor.contiguous().resolve_neg()))
    return array


def _writable(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    """The memory of a contiguous tensor, which the caller keeps alive."""
    memory = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.ndarray(tensor.shape, dtype, memory)


@contextmanager
def _few_threads(count: int) -> Iterator[None]:
    """Bound the threads of this thread's calls."""
    native = native_module()
    before = native.limit_caller(count)
    try:
        yield
    finally:
        native.limit_caller(before)


_unbounded = nullcontext()


def _threads_of_torch() -> AbstractContextManager[None]:
    """In this context a call has no more threads than torch would use: DataLoader workers have one."""
    count = torch.get_num_threads()
    return _unbounded if count >= num_threads() else _few_threads(count)


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
        with _threads_of_torch():
            return self.backend.pack(self.signature.stack, arrays, training)

    def arrays(self, weights: Sequence[Tensor]) -> list[dict[str, Array]]:
        """The memory of the weights where they are contiguous, else copies."""
        return self.by_layer([array_of(one) for one in weights])

    def by_layer(self, weights: Sequence[Any]) -> list[dict[str, Any]]:
        """A mapping for each layer-direction, of the weights of all, one after the other."""
        count = len(self.keys)
        return [dict(zip(self.keys, weights[i : i + count], strict=True)) for i in range(0, len(weights), count)]

    def weight_shapes(self) -> list[tuple[int, ...]]:
        """In the order of the weights."""
        bias, projection = "b_ih" in self.keys, "w_hr" in self.keys
        shapes = [sizes.weight_shapes(bias, projection) for sizes in self.signature.stack.layers]
        return [one[key] for one in shapes for key in self.keys]

    def rows(
        self, x: Tensor, lengths: Tensor | None, resets: Tensor | None, seed: Tensor | None, dropout: float
    ) -> Rows:
        """Lengths and resets checked and copied, the masks drawn."""
        steps, batch = x.shape[:2]
        return Rows(
            None if lengths is None else self.signature.lengths(array_of(lengths), steps, batch, False),
            None if resets is None else self.signature.resets(array_of(resets), steps, batch, False),
            self.masks(x, seed, dropout),
        )

    def masks(self, x: Tensor, seed: Tensor | None, dropout: float) -> Sequence[Array] | None:
        """Of dropout between the layers; None, which stands for no dropout, without a seed."""
        if seed is None:
            return None
        return dropout_masks(self.signature.stack, x.shape[0], x.shape[1], dropout, int(seed))

    def infer(self, arrays: Sequence[dict[str, Array]], x: Tensor, state: Sequence[Tensor], rows: Rows) -> list[Tensor]:
        """y and the final state."""
        training = rows.masks is not None  # weights packed for inference take no masks
        return self.forward(self.pack(arrays, training), x, state, rows, training)[0]

    def forward(
        self, packed: Any, x: Tensor, state: Sequence[Tensor], rows: Rows, training: bool
    ) -> tuple[list[Tensor], Tape]:
        """y (T, B, D*P) with the final state, and the tape; x (T, B, I), no state is zeros."""
        signature, inputs = self.signature, array_of(x)
        steps, batch, _ = inputs.shape
        initial = tuple([array_of(one) for one in state]) if state else self.zeros(batch)
        self._make_way(steps * batch)
        y, saved = torch.empty((steps, batch, signature.output_size), dtype=x.dtype), None
        if inputs.size:
            with _threads_of_torch():
                final, saved = self.backend.forward(
                    signature.stack, packed, inputs, initial, *rows, _writable(y, signature.dtype), training
                )
        else:
            final = tuple([one.copy() for one in initial])
        results = [y, *[torch.from_numpy(one) for one in final]]
        return results, Tape(packed, saved, rows, (x.data_ptr(), y.data_ptr()))

    def backward(
        self,
        tape: Tape,
        x: Tensor,
        dy: Tensor | None,
        dfinal: Sequence[Tensor | None],
        need: Needs,
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor | None]]:
        """Gradients of x, of the initial state (an empty list unless needed) and of the weights; None unless needed."""
        steps, batch, _ = x.shape
        dstate = tuple(
            [zero if one is None else array_of(one) for one, zero in zip(dfinal, self.zeros(batch), strict=True)]
        )
        from_numpy = torch.from_numpy
        if tape.saved is None:
            return (
                torch.zeros_like(x) if need.x else None,
                [from_numpy(one.copy()) for one in dstate if need.state],
                [x.new_zeros(shape) for shape in self.weight_shapes()],
            )
        self._make_way(steps * batch)
        with _threads_of_torch():
            dx, dinitial, gradients = self.backend.backward(
                self.signature.stack,
                tape.packed,
                tape.saved,
                *tape.rows,
                None if dy is None else array_of(dy),
                dstate,
                need.x,
                None if all(need.weights) else self._wanted(need.weights),
            )
        return (
            None if dx is None else from_numpy(dx),
            [from_numpy(one) for one in dinitial] if need.state else [],
            [from_numpy(one[key]) if key in one else None for one in gradients for key in self.keys],
        )

    def _wanted(self, need: Sequence[bool]) -> list[list[str]]:
        """The keys of the weights that need their gradient, of each layer-direction."""
        return [[key for key, needed in one.items() if needed] for one in self.by_layer(need)]

    def _make_way(self, rows: int) -> None:
        """End the threads of torch before a long call."""
        if self.flops * rows > _PAUSE_FLOPS:
            _pause(_SOFT)


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
