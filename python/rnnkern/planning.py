"""What a forward and backward of a layer will take: memory, and how the work is divided; asked without running it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import describe, integer, row_offsets
from .backends.native import native_module
from .checkpoints import Chain, chains_of, segment_steps
from .config import num_threads
from .functional import SAVES, check_save
from .layers import Recurrent
from .limits import Limit, Limits, Work, limit, measure, takes_float16
from .stack import Stack, Weights

__all__ = ["Division", "Explanation", "MemoryPlan", "explain", "memory_plan"]

Array = NDArray[Any]

BLOCK_REASONS = {
    "cache": "whose gates stay in the private cache",
    "weights": "which pay for reading W_ih, larger than the private cache",
    "gradients": "which pay for reading and writing the gradients of the weights",
    "joining": "after each of which a thread that was asleep can join",
    "layers": "after each of which the layer above goes on",
    "call": "all there are",
}

LARGEST = int(np.iinfo(np.intp).max)  # size of an axis


@dataclass(frozen=True)
class Division:
    """How one call, forward or backward, is divided among threads and in time, and the bytes it works in."""

    threads: int
    split: str  #: what the threads divide among them, "rows", "units" or "layers" and directions
    block_steps: int  #: steps that are worked on while their gates are in cache
    kept: int  #: bytes that forward keeps for backward beside y and the states
    scratch: int  #: bytes of arrays that go when the call returns
    estimated: bool = False  #: kept and scratch are about that, not to the byte
    block_reason: str = "call"  #: why blocks have so many steps, a key of `BLOCK_REASONS`


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the arrays that a forward and a backward allocate, by purpose; `str` gives a table.

    `forward` and `backward` are the moments of each call at which it holds the most, `kept` is the time between them:
    what the tape and the caller hold, and `stays` what the layer keeps for its next call once the tape is gone, unless
    `layer.release()` is called; a call takes it from there instead of allocating it. The purposes:

    - packed weights: those of forward and, with inputs and outputs exchanged, of backward.
    - saved values: for each direction of each layer T B H elements times 5 (LSTM), 4 (GRU), 3 (GRU with the reset gate
      before the product) or 0 (RNN), H rounded up to whole vectors; and the outputs of all layers but the last.
    - y, and with `batch_first` x and the gradients of x and y: those that backends take and give have the time first,
      so that each but the given one is there twice where neither T nor B is 1.
    - states: the final one, and the gradient of the initial one.
    - scratch: a block of gates, which is meant to stay in cache, what else the steps work in, and with several layers
      the gradients between them. Up to 16 KiB lie on the stack and count as 0.

    That is the backend native, to the byte. Of numba and reference, which keep other values and work on all steps at
    once, the bytes are estimates (`estimated`), as the table says.
    """

    forward: Mapping[str, int]
    kept: Mapping[str, int]
    backward: Mapping[str, int]
    stays: Mapping[str, int]
    estimated: bool = False

    @property
    def peak(self) -> int:
        """The most bytes that are held at once in both calls."""
        return max(sum(self.forward.values()), sum(self.backward.values()))

    def __str__(self) -> str:
        columns = {"in forward": self.forward, "kept": self.kept, "in backward": self.backward, "stays": self.stays}
        purposes = dict.fromkeys(purpose for column in columns.values() for purpose in column)
        lines = [("bytes, estimated" if self.estimated else "bytes", *columns)]
        for purpose in purposes:
            numbers = [column.get(purpose, 0) for column in columns.values()]
            if any(numbers):
                lines.append((purpose, *(f"{number:,}" for number in numbers)))
        lines.append(("total", *(f"{sum(column.values()):,}" for column in columns.values())))
        return "\n".join(f"{purpose:<22}" + "".join(f"{one:>18}" for one in numbers) for purpose, *numbers in lines)


@dataclass(frozen=True, repr=False)
class Explanation:
    """What `explain` found; its text is for reading, its fields for programs."""

    call: str  #: the layer and the shape
    forward: Division
    backward: Division
    flops: int  #: of the products of forward; those of backward are twice as many
    weights: int  #: bytes of the parameters
    memory: MemoryPlan
    limits: tuple[Limit, Limit] | None  #: of forward alone, and of both calls
    without_limits: str = ""  #: why there are none
    products: str = ""  #: how fast a core makes them in each way that there is, where that was measured
    slices: str = ""  #: which ones products of floats are made of, with `arithmetic="amx"`

    def __str__(self) -> str:
        kept, peak = sum(self.memory.kept.values()), self.memory.peak
        about = "about " if self.memory.estimated else ""
        lines = {
            "forward": _sentence(self.forward, self.flops),
            "backward": _sentence(self.backward, 2 * self.flops),
            "weights": f"{self.weights:,} bytes, {self.memory.kept['packed weights']:,} packed for both calls",
            "memory": f"{about}{kept:,} bytes between the calls, {peak:,} at the peak",
            "limit": f"not known: {self.without_limits}",
        }
        if self.limits is not None:
            forward, both = (f"{1e3 * one.seconds:.3g} ms ({one.bound})" for one in self.limits)
            lines["limit"] = f"{forward} forward, {both} with backward: nothing is faster on this machine"
        if self.products:
            lines["products"] = self.products
        if self.slices:
            lines["slices"] = self.slices
        return "\n".join([self.call, *(f"{name:<10}{text}" for name, text in lines.items())])

    __repr__ = __str__


def _sentence(division: Division, flops: int) -> str:
    """Who does what in a call."""
    who = {
        "rows": f"{division.threads} threads divide the rows",
        "units": f"{division.threads} threads divide the units and meet at every step",
        "layers": f"{division.threads} threads work on layers and directions side by side",
    }
    threads = who[division.split] if division.threads > 1 else "1 thread"
    blocks = f"blocks of {division.block_steps:,} steps, {BLOCK_REASONS[division.block_reason]}"
    return f"{threads}; {blocks}; {flops / 1e9:.3g} GFLOP"


def memory_plan(layer: Recurrent, shape: Sequence[int], *, save: str = "gates", offsets: object = None) -> MemoryPlan:
    """The memory that `layer.forward(x)` and `layer.backward(tape, dy)` will allocate, for an x of this shape.

    It is what `tracemalloc` shows in NumPy's domain, to the byte, where x and dy are C-contiguous arrays of the layer's
    dtype (they are the caller's and not counted), without lengths, resets, initial state, `dstate`, dropout and `into`,
    with `need_x`, and with the number of threads and the instruction set that are in use now, for the first call or one
    after `layer.release()`. Without the compiled
    kernels, on the backends numba and reference, it is an estimate, within a fifth for all but small layers.

    Scratch of one layer is below 2 MiB a thread, mostly below 1, as long as 256 rows of gates (G H elements each, for a
    GRU twice as many), or one step of the batch where that is more, take at most 512 KiB a thread; where a core's
    private cache is larger than 2 MiB, it stands in place of these, and a quarter of it. A block of backward is not
    smaller, so with more units or rows scratch grows with both. It does not grow with the steps.

    Parameters
    ----------
    layer
        A layer of a backend on the CPU. Its weights are packed once in order to ask.
    shape
        Of x as the layer takes it: (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, (N, I) with `offsets`;
        T, B and N at least 1.
    save
        As for `forward`: `"gates"`, `"outputs"` or `"checkpoint"`.
    offsets
        As for `forward`; what is kept is that of N rows.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> plan = rk.memory_plan(rk.LSTM(64, 128, seed=0), (100, 32, 64))
    >>> plan.kept["y"] == 100 * 32 * 128 * 4
    True
    >>> print(plan)
    bytes                         in forward              kept       in backward             stays
    packed weights           ...
    """
    steps, batch = _steps_and_batch(layer, shape)
    check_save(save)
    given = None
    if offsets is not None:
        if len(shape) != 2:
            raise ValueError(f"shape: expected (rows, {layer.input_size}) with offsets, got {tuple(shape)}")
        given = row_offsets(offsets, steps)
        steps, batch = int(np.diff(given).max(initial=0)), len(given) - 1
    return _memory(layer, len(shape) == 3, steps, batch, *_plan(layer, steps, batch, save, given), save, given)


def fitting_save(
    layer: Recurrent, steps: int, batch: int, batched: bool, most: int, offsets: Array | None = None
) -> str:
    """The fastest `save` of which a forward leaves at most so many bytes.

    Raises
    ------
    ValueError
        There is none; the message says how much the least takes. Or nobody can tell, as of memory on a device.
    """
    if not hasattr(layer._backend, "plan"):
        raise ValueError(
            f"save: expected {', '.join(map(repr, SAVES))} with the backend {layer.backend!r}, whose memory is the "
            f"device's, got {most}"
        )
    kept: dict[str, int] = {}
    for save in SAVES:
        plan = _plan(layer, steps, batch, save, offsets)
        kept[save] = sum(_memory(layer, batched, steps, batch, *plan, save, offsets).kept.values())
        if kept[save] <= most:
            return save
    least = min(kept, key=lambda save: kept[save])  # of two directions outputs may leave less than checkpoints
    raise ValueError(f"save: expected at least {kept[least]} bytes, which {least!r} leaves, got {most}")


def explain(layer: Recurrent, shape: Sequence[int], *, limits: Limits | None = None) -> Explanation:
    """How `layer.forward(x)` and `layer.backward(tape, dy)` will run, and how fast they could: `print` it.

    Parameters
    ----------
    layer, shape
        As for `memory_plan`.
    limits
        What `rnnkern.limits.measure` returned. None measures the machine, which takes some ten seconds, once in a
        process for each instruction set and number of threads; a line on stderr says so.

    Returns
    -------
    Explanation
        The threads, what they divide among them, the steps in a block and why there are so many, for forward and
        backward; the additions and multiplications; bytes of weights and `memory_plan`; and `limits`, the shortest
        times of a forward alone and of both calls, by `rnnkern.limits.limit`. There are none for float64 and
        projections, nor where other programs kept the machine busy while it was measured. Where the CPU has more than
        multiply-adds, `products` has the rates of a core for each `arithmetic` and `precision`. With
        `arithmetic="amx"`, `slices` says which ones the layer takes on this machine.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> rk.explain(rk.GRU(64, 128, dtype="float64", seed=0), (100, 1, 64))
    GRU(64, 128, dtype='float64'), x (100, 1, 64)
    forward   ... blocks of ... steps, ...; 0.0147 GFLOP
    backward  ... blocks of 100 steps, all there are; 0.0295 GFLOP
    weights   595,968 bytes, ... packed for both calls
    memory    ... bytes between the calls, ... at the peak
    limit     not known: the machine is measured for float32 without projections
    """
    steps, batch = _steps_and_batch(layer, shape)
    packed, forward, backward = _plan(layer, steps, batch)
    found, reason, products = _limits(layer, steps, batch, limits)
    return Explanation(
        f"{layer!r}, x ({', '.join(map(str, shape))})",
        forward,
        backward,
        steps * batch * layer._signature.stack.flops,
        sum(array.nbytes for array in layer.parameters.values()),
        _memory(layer, len(shape) == 3, steps, batch, packed, forward, backward, "gates"),
        found,
        reason,
        products,
        _slices(layer._signature.stack),
    )


def _steps_and_batch(layer: object, shape: object) -> tuple[int, int]:
    """T and B of a shape of x."""
    if not isinstance(layer, Recurrent):
        raise TypeError(f"layer: expected an RNN, LSTM, GRU or Recurrent, got {describe(layer)}")
    dimensions, size = "B, T" if layer.batch_first else "T, B", layer.input_size
    expected = f"shape: expected ({dimensions}, {size}) or (T, {size})"
    if not isinstance(shape, tuple | list):
        raise TypeError(f"{expected}, got {describe(shape)}")
    if len(shape) not in (2, 3):
        raise ValueError(f"{expected}, got {len(shape)} dimensions")
    sizes = [integer(f"shape[{axis}]", one, 1, LARGEST) for axis, one in enumerate(shape)]
    if sizes.pop() != size:
        raise ValueError(f"{expected}, got {tuple(shape)}")
    if len(sizes) == 1:
        return sizes[0], 1
    first, second = sizes
    return (second, first) if layer.batch_first else (first, second)


def _plan(
    layer: Recurrent, steps: int, batch: int, save: str = "gates", offsets: Array | None = None
) -> tuple[int, Division, Division]:
    """Bytes of the packed weights, and both calls, from the backend that would run them."""
    plan = getattr(layer._backend, "plan", None)
    if plan is None:
        raise ValueError(
            f"layer: expected a backend on the CPU, got {layer.backend!r}, whose memory is the device's; "
            "ask with the same layer and backend='auto'"
        )
    if save == "checkpoint":
        return _plan_of_segments(layer, steps, batch, offsets)
    return _asked(layer, layer._signature.stack, layer._weights, steps, batch, save, offsets)


def _asked(
    layer: Recurrent,
    stack: Stack,
    weights: Sequence[Weights],
    steps: int,
    batch: int,
    save: str | None,
    offsets: Array | None,
) -> tuple[int, Division, Division]:
    """Of the first steps of the sequences, where there are offsets."""
    part = None if offsets is None else np.cumsum([0, *np.minimum(np.diff(offsets), steps)])
    packed, forward, backward = layer._backend.plan(stack, weights, steps, batch, save, part)
    return packed, Division(**forward), Division(**backward)


def _plan_of_segments(
    layer: Recurrent, steps: int, batch: int, offsets: Array | None
) -> tuple[int, Division, Division]:
    """With checkpoints: the most that `checkpoints.forward` and `backward` hold, which run a chain after the other."""
    stack, segment = layer._signature.stack, segment_steps(steps, batch)
    layers, element = chains_of(stack), _rows(steps, batch, offsets) * layer.dtype.itemsize
    alone, between = len(layers[0]) == 1, element * stack.output_size  # one chain; y between two layers
    inputs = [element * of_layer[0].stack.input_size for of_layer in layers]  # x of each layer
    before = -(-steps // segment) - 1  # segments but the first: the states that are kept of a chain
    of_chain = partial(_plan_of_chain, layer, segment=segment, batch=batch, several=before > 0, offsets=offsets)
    chains = [of_chain(chain, adds=i > 0) for of_layer in layers for i, chain in enumerate(of_layer)]
    packed, state, weights = (sum(getattr(one, name) for one in chains) for name in ("packed", "state", "weights"))
    kept = before * state + between * (len(layers) - 1)
    in_forward, in_backward = [], []
    for number, _ in enumerate(layers):
        outputs, first = between * min(number + 1, len(layers) - 1), number * len(layers[0])
        for i in range(first, first + len(layers[0])):
            done, later = chains[: i + 1], chains[first : i + 1] + chains[first + len(layers[0]) :]
            held = sum(one.packed + (before + 1) * one.state for one in done)
            in_forward.append(held + outputs + chains[i].forward)
            held = sum(one.state + one.weights for one in later) + inputs[number]
            in_backward.append(held + (between if number + 1 < len(layers) else 0) + chains[i].backward)
    if not alone:  # the states of all chains are brought together
        in_forward.append(packed + kept + 2 * state)
        in_backward.append(2 * state + weights + inputs[0])
    return (
        packed,
        replace(chains[0].division[0], kept=kept, scratch=max(in_forward) - packed - kept - state),
        replace(chains[0].division[1], scratch=max(in_backward) - state - weights - inputs[0]),
    )


def _rows(steps: int, batch: int, offsets: Array | None) -> int:
    """Of x in the first steps."""
    return steps * batch if offsets is None else int(np.minimum(np.diff(offsets), steps).sum())


@dataclass(frozen=True)
class _ChainPlan:
    """Bytes of a chain of `checkpoints`."""

    packed: int
    state: int
    weights: int
    forward: int  # while a segment runs
    backward: int
    division: tuple[Division, Division]


def _plan_of_chain(
    layer: Recurrent, chain: Chain, segment: int, batch: int, several: bool, offsets: Array | None, adds: bool
) -> _ChainPlan:
    """`several`: segments; `adds`: to dx of another chain, in place where its rows of a segment stand together."""
    weights, element = layer._weights[chain.own], _rows(segment, batch, offsets) * layer.dtype.itemsize
    x, y = (element * size for size in (chain.stack.input_size, chain.stack.output_size))
    packed, alone, _ = _asked(layer, chain.stack, weights, segment, batch, None, offsets)
    _, forward, backward = _asked(layer, chain.stack, weights, segment, batch, "gates", offsets)
    state = sum(math.prod(shape) for shape in chain.stack.state_shapes(batch)) * layer.dtype.itemsize
    copied = y if chain.columns != slice(None) else 0  # its columns of y, or of the gradient of y
    # Backward holds the most while a segment runs forward again, or while it runs back, with its part of dx. What is
    # kept of a segment has the state before it, and so has the gradient that was carried to it, but for the first one.
    carried, dx = state if several else 0, 0 if adds and offsets is None else x
    in_backward = copied + y + forward.kept + carried + max(state + forward.scratch, carried + dx + backward.scratch)
    of_weights = sum(array.nbytes for one in weights for array in one.values())
    return _ChainPlan(packed, state, of_weights, copied + alone.scratch, in_backward, (alone, backward))


def _memory(
    layer: Recurrent,
    batched: bool,
    steps: int,
    batch: int,
    packed: int,
    forward: Division,
    backward: Division,
    save: str,
    offsets: Array | None = None,
) -> MemoryPlan:
    """Adds what Python allocates around the calls of the backend; see `functional.run_forward` and `run_backward`."""
    stack = layer._signature.stack
    rows = steps * batch if offsets is None else int(offsets[-1])
    x, y = (rows * size * stack.dtype.itemsize for size in (stack.input_size, stack.output_size))
    state = sum(math.prod(shape) for shape in stack.state_shapes(batch)) * stack.dtype.itemsize
    parameters = sum(array.nbytes for array in layer.parameters.values())
    # x, y and their gradients are copied on the way to the backend or back; an axis of one element moves for free.
    copied = layer.batch_first and batched and steps > 1 and batch > 1
    kept = {
        "packed weights": packed,
        "saved values": forward.kept,
        "x": x * copied,
        "y": y * (1 + copied),
        "states": state,  # the final one
    }
    in_backward = kept | {
        "gradient of y": y * copied,
        "gradients of states": state,
        "gradient of x": x,
        "gradients of weights": parameters,
    }
    # A call holds the most while the kernels work in scratch, or after that, when its result is copied.
    return MemoryPlan(
        _larger(kept | {"y": y, "scratch": forward.scratch}, kept),
        kept,
        _larger(in_backward | {"scratch": backward.scratch}, in_backward | {"gradient of x": x * (1 + copied)}),
        {
            purpose: kept[purpose]
            for purpose in ("packed weights", "saved values")
            if layer._reserve is not None and save != "checkpoint"
        },
        forward.estimated,
    )


def _larger(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    """The one of more bytes."""
    return max(one, other, key=lambda parts: sum(parts.values()))


def _limits(
    layer: Recurrent, steps: int, batch: int, limits: Limits | None
) -> tuple[tuple[Limit, Limit] | None, str, str]:
    """The limits of forward and of both calls, or why there are none; and the rates of products."""
    if limits is not None and not isinstance(limits, Limits):
        raise TypeError(f"limits: expected None or what rnnkern.limits.measure returned, got {describe(limits)}")
    stack = layer._signature.stack
    if stack.dtype != np.float32 or stack.proj_size:
        return None, "the machine is measured for float32 without projections", ""
    if limits is None:
        native = native_module()
        if native is None:
            return None, "the compiled kernels measure the machine, and they are missing", ""
        try:
            limits = _measured(native.isa(), num_threads())
        except RuntimeError as error:
            return None, str(error), ""
    work = Work(stack, steps, batch)
    forward, both = (limit(work, limits, num_threads(), training) for training in (False, True))
    return (forward, both), "", _rates(limits, limits.sliced_flops(stack, training=False))


def _slices(stack: Stack) -> str:
    """Those that products of this stack are made of."""
    native = native_module()
    if not stack.engines or native is None or native.engine() in ("none", "pairs"):
        return ""
    if stack.hidden_size < native.lanes("float32") and not stack.proj_size:
        return "none: so few units are multiplied as floats"
    of_all = "three of bfloat16, six products"
    if native.engine().endswith("fp16") and takes_float16(stack):
        return f"forward of h: two of float16, three products; all else: {of_all}"
    return of_all


def _rates(limits: Limits, sliced: float) -> str:
    """Those of the products of a core, where there is more than one; `sliced`: of those made of slices."""
    rates = {"by multiply-adds": limits.flops}
    if sliced > limits.flops:  # else there is no engine
        rates["with arithmetic='amx'"] = sliced
    if limits.bfloat16_flops > limits.flops:
        rates["with precision='bfloat16'"] = limits.bfloat16_flops
    found = ", ".join(f"{rate / 1e9:.0f} {way}" for way, rate in rates.items())
    return f"GFLOP/s of a core at best: {found}" * (len(rates) > 1)


@cache
def _measured(isa: str, threads: int) -> Limits:
    sys.stderr.write(
        f"rnnkern.explain: some ten seconds to measure this machine with {isa} and {threads} threads, once; "
        "with `limits=` it need not\n"
    )
    return measure(threads)
