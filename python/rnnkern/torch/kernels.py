"""Calls of the kernels with tensors, without autograd, and the tape as a tensor."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
)

from .. import backends
from ..arguments import Signature, row_offsets
from ..backends.native import native_module
from ..cells import CELLS
from ..config import num_threads
from ..functional import dropout_masks, packed_masks, run, run_packed
from ..layers import parameter_names
from ..stack import Backward, Forward, Stack
from .packing import Packing

__all__ = [
    "DTYPES",
    "Kernels",
    "Rows",
    "Tape",
    "array_of",
    "kernels_of",
    "tape_of",
    "tensor_of",
    "threads_of_torch",
    "too_many_threads",
]

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

    lengths: Array | None = None
    resets: Array | None = None
    masks: Sequence[Array] | None = None
    offsets: Array | None = None
    sizes: Array | None = None


_NO_ROWS = Rows()


class Tape(NamedTuple):
    """What one forward leaves to its backward."""

    packed: Any
    saved: Any  # of the backend; None where x has no elements
    call: Forward
    places: tuple[int, int]  # the addresses of x and y, whose memory `saved` refers to


def tensor_of(tape: Tape) -> Tensor:
    """A tensor of one byte whose storage holds the tape: it dies with the last tensor that shares its memory."""
    tensor = torch.from_numpy(np.zeros(1, np.uint8))
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
    """The tensor's own memory where it is contiguous and aligned, else a copy; to be read."""
    array: Array = np.from_dlpack(_Lent(tensor.resolve_neg() if tensor.is_neg() else tensor))
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else array.copy()


def _unwrapped(tensor: Tensor) -> Tensor:
    """Without what torch.func wraps a tensor in to differentiate."""
    while is_gradtrackingtensor(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def _known(tensor: Tensor) -> Array:
    """The values within transforms of torch.func, to be checked; zeros where one has batched them."""
    tensor = _unwrapped(tensor)
    if is_functorch_wrapped_tensor(tensor):
        return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    return array_of(tensor)


def too_many_threads() -> bool:
    """A call would have more threads than torch would use: a DataLoader's worker has one."""
    return torch.get_num_threads() < _num_threads()


@contextmanager
def threads_of_torch() -> Iterator[None]:
    """Bound the calls of this thread to the threads that torch would use."""
    native = native_module()
    if native is None:
        yield
        return
    before = native.limit_caller(torch.get_num_threads())
    try:
        yield
    finally:
        native.limit_caller(before)


_num_threads = num_threads if native_module() is None else native_module().num_threads


class Kernels:
    """A stack on a backend, from tensors to tensors and without autograd. The state is a tuple, (h,) or (h, c)."""

    def __init__(self, signature: Signature, backend: ModuleType, keys: tuple[str, ...], dtype: torch.dtype) -> None:
        self.signature = signature
        self.backend = backend
        self.dtype = dtype
        self.keys = keys  # the weights of a layer-direction, in torch's order
        self.names = [names[key] for names in parameter_names(signature.stack, "b_ih" in keys) for key in keys]
        bias, projection = "b_ih" in keys, "w_hr" in keys
        shapes = [sizes.weight_shapes(bias, projection) for sizes in signature.stack.layers]
        self.weight_shapes = [one[key] for one in shapes for key in keys]
        self.flops = signature.stack.flops  # of a row of one step

    def pack(self, arrays: Sequence[dict[str, Array]], training: bool) -> Any:
        """The backend's copy of what `arrays` returned."""
        return self.backend.pack(self.signature.stack, arrays, training)

    def arrays(self, weights: Sequence[Tensor]) -> list[dict[str, Array]]:
        """The memory of the weights where they are contiguous and aligned, else copies."""
        for name, shape, one in zip(self.names, self.weight_shapes, weights, strict=True):
            if one.dtype is not self.dtype or not one.is_cpu:
                got = f"{name} of {one.dtype} on {one.device}"
                raise TypeError(f"parameters: expected all of {self.dtype} on cpu, got {got}")
            if one.shape != shape:
                raise ValueError(f"parameters: expected {name} of shape {shape}, got {tuple(one.shape)}")
        return self.by_layer([array_of(one) for one in weights])

    def by_layer(self, weights: Sequence[Any]) -> list[dict[str, Any]]:
        """A mapping for each layer-direction, of the weights of all, one after the other."""
        count = len(self.keys)
        return [dict(zip(self.keys, weights[i : i + count], strict=True)) for i in range(0, len(weights), count)]

    def rows(
        self,
        x: Tensor,
        lengths: Tensor | None,
        resets: Tensor | None,
        packing: Packing | None,
        seed: Tensor | None,
        dropout: float,
    ) -> Rows:
        """What says which rows there are checked and copied, the masks drawn."""
        if lengths is resets is packing is seed is None:
            return _NO_ROWS
        steps, batch = x.shape[:2]
        if packing is not None:
            offsets, sizes = packing
            return Rows(
                None,
                None if resets is None else array_of(resets).copy(),
                self.masks(x, seed, dropout),
                None if offsets is None else row_offsets(array_of(offsets), steps),
                None if sizes is None else array_of(sizes).copy(),
            )
        return Rows(
            None if lengths is None else self.signature.lengths(array_of(lengths), steps, batch, False),
            None if resets is None else self.signature.resets(array_of(resets), steps, batch, False),
            self.masks(x, seed, dropout),
        )

    def check(self, x: Tensor, lengths: Tensor | None, resets: Tensor | None, packing: Packing | None) -> None:
        """Refuse what `rows` refuses, of a call in torch's own operations."""
        steps, batch = x.shape[:2]
        if lengths is not None:
            self.signature.lengths(_known(lengths), steps, batch, False)
        if packing is not None:
            if packing.offsets is not None:
                row_offsets(_known(packing.offsets), steps)
        elif resets is not None:
            self.signature.resets(_known(resets), steps, batch, False)

    def masks(self, x: Tensor, seed: Tensor | None, dropout: float) -> Sequence[Any] | None:
        """Of dropout between the layers; None, which stands for no dropout, without a seed."""
        if seed is None:
            return None
        if is_batchedtensor(_unwrapped(seed)):  # vmap with randomness="different": each call its own, by torch
            size = self.signature.output_size
            ones = torch.ones((*x.shape[:2], size), dtype=x.dtype)
            return [torch.nn.functional.dropout(ones, dropout) for _ in range(self.signature.stack.num_layers - 1)]
        if x.dim() == 2:
            return packed_masks(self.signature.stack, np.array([0, len(x)]), dropout, int(seed))
        return dropout_masks(self.signature.stack, x.shape[0], x.shape[1], dropout, int(seed))

    def infer(self, arrays: Sequence[dict[str, Array]], x: Tensor, state: Sequence[Tensor], rows: Rows) -> list[Tensor]:
        """y and the final state."""
        if rows.masks is not None:  # weights packed for inference take no masks
            return self.forward(arrays, x, state, rows)[0]
        call = self.call(x, state, rows, None)
        final = run(self.backend, self.signature.stack, arrays, call)[1]
        return [torch.from_numpy(call.y), *map(torch.from_numpy, final)]

    def run(self, packed: Any, x: Tensor, state: Sequence[Tensor], rows: Rows) -> list[Tensor]:
        """What `infer` gives, with weights packed for inference."""
        call = self.call(x, state, rows, None)
        final = run_packed(self.backend, self.signature.stack, packed, call)
        return [torch.from_numpy(call.y), *map(torch.from_numpy, final)]

    def forward(
        self, arrays: Sequence[dict[str, Array]], x: Tensor, state: Sequence[Tensor], rows: Rows
    ) -> tuple[list[Tensor], Tape]:
        """What `infer` gives, and the tape."""
        call = self.call(x, state, rows, "gates")
        packed, final, saved = run(self.backend, self.signature.stack, arrays, call)
        results = [torch.from_numpy(call.y), *map(torch.from_numpy, final)]
        return results, Tape(packed, saved, call, (x.data_ptr(), results[0].data_ptr()))

    def call(self, x: Tensor, state: Sequence[Tensor], rows: Rows, save: str | None) -> Forward:
        """The request to the backend; x (T, B, I) or (N, I), no state is zeros."""
        signature, inputs = self.signature, array_of(x)
        self._make_way(inputs)
        y = np.empty((*inputs.shape[:-1], signature.output_size), signature.dtype)
        states = tuple([array_of(one) for one in state]) if state else None
        lengths, resets, masks, offsets, sizes = rows
        return Forward(inputs, states, y, save, lengths, resets, masks, None, offsets, sizes)

    def again(
        self, x: Tensor, state: Sequence[Tensor], weights: Sequence[Tensor], rows: Rows
    ) -> tuple[list[Tensor], Tape]:
        """What a training forward gives, for a backward that got no tape."""
        with threads_of_torch():
            return self.forward(self.arrays(weights), x, state, rows)

    def backward(
        self,
        tape: Tape,
        x: Tensor,
        gradients: Sequence[Tensor | None],
        need_x: bool,
        need_state: Sequence[bool],
        need_weights: Sequence[bool],
    ) -> list[Tensor | None]:
        """Gradients of x, of the initial state and of the weights; None where nothing of the kind is needed.

        `gradients` are those of y and of the final state.
        """
        if too_many_threads():
            with threads_of_torch():
                return self.backward(tape, x, gradients, need_x, need_state, need_weights)
        dy, *dfinal = [None if one is None else array_of(one) for one in gradients]
        stack, from_numpy = self.signature.stack, torch.from_numpy
        if tape.saved is None:
            passed = stack.filled(tuple(dfinal), tape.call.batch) if any(need_state) else ()
            return [
                torch.zeros_like(x) if need_x else None,
                *([from_numpy(one.copy()) for one in passed] or [None] * len(need_state)),
                *[x.new_zeros(shape) for shape in self.weight_shapes],
            ]
        self._make_way(tape.call.x)
        wanted = None if all(need_weights) else self._wanted(need_weights)
        asked = Backward(dy, tuple(dfinal), need_x, wanted, need_state=any(need_state))
        dx, dinitial, slopes = self.backend.backward(stack, tape.packed, tape.saved, tape.call, asked)
        found = [None if dx is None else from_numpy(dx)]
        found += [from_numpy(one) for one in dinitial] or [None] * len(need_state)
        if wanted is None:
            return found + [from_numpy(one[key]) for one in slopes for key in self.keys]
        return found + [from_numpy(one[key]) if key in one else None for one in slopes for key in self.keys]

    def _wanted(self, need: Sequence[bool]) -> list[list[str]]:
        """The keys of the weights that need their gradient, of each layer-direction."""
        return [[key for key, needed in one.items() if needed] for one in self.by_layer(need)]

    def _make_way(self, x: Array) -> None:
        """End the threads of torch before a long call."""
        if self.flops * x.size > _PAUSE_FLOPS * x.shape[-1]:
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
    precision: str,
    arithmetic: str,
    dtype: torch.dtype,
) -> Kernels:
    """The kernels of a module of these options; the operators have them as arguments too."""
    directions: tuple[bool, ...] = (False, True) if bidirectional else (False,)
    sizes = input_size, hidden_size, proj_size, num_layers
    stack = Stack(CELLS[cell], *sizes, directions, DTYPES[dtype], precision=precision)
    if dtype is torch.float32 and precision == "float32":  # a module may become of another dtype
        stack = replace(stack, arithmetic=arithmetic)
    keys = tuple(stack.layers[0].weight_shapes(bias, proj_size > 0))
    return Kernels(Signature(stack), backends.pick(backend, precision, stack.arithmetic), keys, dtype)
