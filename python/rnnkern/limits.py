"""How fast this machine could be: its rates, measured, and the limit of a call, the shortest time they allow."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import ceil, exp, log, log2, sqrt
from typing import Any, NamedTuple

import numpy as np

from .backends.native import native_module
from .cells import CELLS
from .stack import Stack

__all__ = ["Curve", "Limit", "Limits", "Step", "Work", "flops", "limit", "measure"]

FLOAT = 4  # bytes
SECONDS, RUNS = 0.004, 7  # a run is long beside a clock tick and the start of a team; the fastest of the runs counts
ATTEMPTS, PAUSE = 40, 0.05  # at finding all cores free, and seconds between them
VECTORS = 64  # of units, in L1, for the throughput of an elementwise part
SMALLEST, LARGEST, LARGEST_TOTAL = 16 << 10, 128 << 20, 512 << 20  # bytes: working sets of a core, and of all together
GRAIN = 1 << 10  # bytes; whole turns of the loop that reads, in every instruction set
STEEP, REFINEMENTS = 0.1, 3  # a curve gets a point between two that differ by more, down to an eighth of a doubling
STEADY = 0.05  # two measurements of a rate agree


@dataclass(frozen=True)
class Curve:
    """Bytes a second at which working sets are read again and again, by their size; a straight line between logarithms.

    >>> f"{Curve((16384, 65536), (4e9, 1e9)).at(32768):.3g}"
    '2e+09'
    """

    sizes: tuple[int, ...]  # bytes that each core reads, ascending
    rates: tuple[float, ...]  # of all cores that read

    def at(self, size: float) -> float:
        """The rate of a working set; beyond the ends of the curve that of its end."""
        return exp(np.interp(log(size), np.log(self.sizes), np.log(self.rates)))


@dataclass(frozen=True)
class Step:
    """The elementwise part of a cell's step: seconds from the old h to the new one, and seconds a unit when many."""

    latency: float
    unit: float


@dataclass(frozen=True)
class Limits:
    """The rates of this machine with the instruction set in use, float32; those of a core are of one core alone.

    No size of a cache is among them, since a virtual machine reports caches that it does not have.
    """

    isa: str
    cores: int
    flops: float  # of one core, a second; a multiply-add is two
    multiply_add_latency: float  # seconds
    barrier: float  # seconds, of all cores
    one_core: Curve
    apart: Curve  # all cores, each with a working set of its own
    together: Curve  # all cores, with the same working set
    forward: Mapping[str, Step]  # by cell
    backward: Mapping[str, Step]
    unsteady: tuple[str, ...] = ()  # what two measurements disagreed about by more than a twentieth
    bfloat16_flops: float = 0.0  # as `flops`, of products of bfloat16 numbers; 0: there is no instruction for them
    float16: bool = False  # a matrix engine multiplies float16 numbers too, as fast

    def sliced_flops(self, stack: Stack, training: bool) -> float:
        """As `flops`, of products of floats that are made of six of bfloat16 numbers, or of three of float16."""
        products = 6.0
        if self.float16 and takes_float16(stack):
            recurrent = 2 * len(stack.cell.gates) * stack.hidden_size**2 * len(stack.layers)
            products -= 3 * recurrent / stack.flops / (3 if training else 1)
        return self.bfloat16_flops / products


@dataclass(frozen=True)
class Work:
    """What a call has to do: T steps of B rows through a stack; ragged rows have fewer steps in all."""

    stack: Stack
    steps: int
    batch: int
    row_steps: int = 0  # steps of all rows together; 0: T B

    @property
    def rows_and_steps(self) -> int:
        """Of all rows together."""
        return self.row_steps or self.steps * self.batch


@dataclass(frozen=True)
class Limit:
    """The shortest time of a call, and what bounds it: latency, bytes or arithmetic."""

    seconds: float
    bound: str


def takes_float16(stack: Stack) -> bool:
    """Whether forward makes recurrent products of slices of float16 where the matrix engine has them."""
    return stack.cell.bounded and not stack.proj_size


def flops(work: Work, training: bool) -> int:
    """Additions and multiplications of the products: T B sum over layer-directions of 2 G H (I + H).

    Backward has two products for each one of forward: the gradients of its left and of its right side.
    """
    return work.rows_and_steps * work.stack.flops * (3 if training else 1)


def limit(work: Work, limits: Limits, threads: int, training: bool) -> Limit:
    """No program can be faster than the largest of three.

    - latency: the steps wait for each other, T + L - 1 of them since layers may follow one another like a wave. Each
      takes the elementwise part of the cell and a sum of H terms, at least log2(H) additions deep; twice that where a
      cell has two products a step.
    - bytes: each step of each layer-direction reads its recurrent weights, G H H numbers, as fast as a working set of
      that size is read, and the input's weights are read once. Traffic of x, y and saved gates is left out.
    - arithmetic: `flops` at the rate of multiply-adds, of bfloat16 numbers where the stack rounds to them and the CPU
      multiplies them, a sixth of that where it makes products of slices, or a third, plus the elementwise parts.

    Training adds the same for backward.

    Cores divide either rows, then each reads all recurrent weights, or units, then each keeps its share of them but
    waits at a barrier a step. The faster one counts, or fewer cores where that is faster still.
    """
    plans = [_plan(work, limits, training, 1, by_rows=True)]
    for cores in range(2, min(threads, limits.cores) + 1):
        plans += [_plan(work, limits, training, cores, by_rows) for by_rows in (True, False)]
    return min(plans, key=lambda plan: plan.seconds)


def _plan(work: Work, limits: Limits, training: bool, cores: int, by_rows: bool) -> Limit:
    stack, T = work.stack, work.steps
    cell, H = stack.cell, stack.hidden_size
    gates, count = len(cell.gates), len(stack.layers)
    passes = [limits.forward[cell.name], *[limits.backward[cell.name]] * training]
    share = max(1 / cores, T / work.rows_and_steps) if by_rows else 1 / cores  # a core has a whole row at least

    chain = (2 if cell.late_gates else 1) * ceil(log2(H)) * limits.multiply_add_latency
    meeting = 0.0 if by_rows else limits.barrier * (2 if cell.late_gates else 1)
    latency = (T + stack.num_layers - 1) * sum(one.latency + chain + meeting for one in passes)

    rate, size = limits.flops, FLOAT
    if limits.bfloat16_flops and stack.rounds:
        rate, size = limits.bfloat16_flops, FLOAT // 2
    elif stack.engines:
        rate = max(rate, limits.sliced_flops(stack, training))
    recurrent = size * gates * H * H
    inputs = size * sum(gates * H * (sizes.input_size + 2) for sizes in stack.layers)
    step = _read(limits, recurrent, cores, same=True) if by_rows else _read(limits, recurrent / cores, cores)
    stream = len(passes) * (T * count * step + _read(limits, inputs / cores, cores))

    elementwise = work.rows_and_steps * count * H * sum(one.unit for one in passes)
    arithmetic = share * (flops(work, training) / rate + elementwise)

    bounds = {"latency": latency, "bytes": stream, "arithmetic": arithmetic}
    bound = max(bounds, key=bounds.__getitem__)
    return Limit(bounds[bound], bound)


def _read(limits: Limits, size: float, cores: int, same: bool = False) -> float:
    """Seconds in which each of the cores reads `size` bytes, the same ones or each its own."""
    alone = limits.one_core.at(size)
    if cores == 1:
        return size / alone
    every = (limits.together if same else limits.apart).at(size)
    return size / min(alone, every / cores)


class _Probe(NamedTuple):
    """A loop of csrc/probes.h, how many floats it works on for each core, and on how many cores."""

    name: str
    elements: int
    threads: int = 1
    cell: str = ""

    def __str__(self) -> str:
        size = f" {FLOAT * self.elements >> 10} KiB" if self.name.startswith("read") else ""
        cell = f" of {self.cell}" * bool(self.cell)
        return f"{self.name}{size}{cell}, {self.threads} thread{'s' * (self.threads > 1)}"


def measure(threads: int) -> Limits:
    """Measure this machine; takes some ten seconds. Each rate is measured twice, the better one counts.

    Raises
    ------
    RuntimeError
        There are no compiled kernels, or other programs kept a core busy all the time.
    """
    native = native_module()
    if native is None:
        raise RuntimeError("the limits are measured by the compiled kernels, which are missing")
    lanes, many = int(native.lanes("float32")), VECTORS * int(native.lanes("float32"))
    one, apart = ("read", 1), ("read", threads)
    together = ("read_same", threads) if threads > 1 else one

    arithmetic, latency = (_Probe(name, lanes) for name in ("multiply_add", "multiply_add_latency"))
    barrier = _Probe("barrier", lanes, threads)
    of_engine = {"pairs": "multiply_pairs", "amx": "multiply_tiles"}.get(native.engine().removesuffix("-fp16"))
    pairs = [] if of_engine is None else [_Probe(of_engine, lanes)]
    probes = [arithmetic, latency, *pairs, *[barrier] * (threads > 1)]
    probes += [
        _Probe(way, size, 1, cell) for way in ("forward", "backward") for cell in CELLS for size in (lanes, many)
    ]
    probes += [_Probe(name, size // FLOAT, cores) for name, cores in {one, apart, together} for size in _sizes(cores)]

    first = {probe: _seconds(probe) for probe in probes}
    for _ in range(REFINEMENTS):
        first |= {probe: _seconds(probe) for probe in _between(first)}
    second = {probe: _seconds(probe) for probe in first}
    best = {probe: min(first[probe], second[probe]) for probe in first}

    def curve(name: str, cores: int) -> Curve:
        points = sorted((FLOAT * p.elements, FLOAT * p.elements * cores / s) for p, s in _of(best, name, cores))
        sizes, rates = zip(*points, strict=True)
        return Curve(sizes, _falling(rates))

    def step(way: str) -> dict[str, Step]:
        return {
            cell: Step(best[_Probe(way, lanes, 1, cell)], best[_Probe(way, many, 1, cell)] / many) for cell in CELLS
        }

    return Limits(
        native.isa(),
        threads,
        2 / best[arithmetic],
        best[latency],
        best[barrier] if threads > 1 else 0.0,
        curve(*one),
        curve(*apart),
        curve(*together),
        step("forward"),
        step("backward"),
        tuple(str(probe) for probe in first if abs(log(first[probe] / second[probe])) > log(1 + STEADY)),
        2 / best[pairs[0]] if pairs else 0.0,
        native.engine() == "amx-fp16",
    )


def _falling(rates: Sequence[float]) -> tuple[float, ...]:
    """The rates of ascending working sets, none below that of a larger one: what slowed it down was no limit.

    >>> _falling([5.0, 2.0, 3.0, 1.0])
    (5.0, 3.0, 3.0, 1.0)
    """
    return tuple(accumulate(reversed(rates), max))[::-1]


def _sizes(cores: int) -> Iterator[int]:
    """Working sets of a core, bytes: doubling, as far as all of them fit into memory."""
    size = SMALLEST
    while size <= min(LARGEST, max(LARGEST_TOTAL // cores, SMALLEST)):
        yield size
        size *= 2


def _of(seconds: Mapping[_Probe, float], name: str, cores: int) -> list[tuple[_Probe, float]]:
    """The points of a curve, ascending."""
    return sorted((probe, taken) for probe, taken in seconds.items() if (probe.name, probe.threads) == (name, cores))


def _between(seconds: Mapping[_Probe, float]) -> Iterable[_Probe]:
    """A probe between each two neighbours on a curve whose rates differ much."""
    for name, cores in {(probe.name, probe.threads) for probe in seconds if probe.name.startswith("read")}:
        for (small, fast), (large, slow) in pairwise(_of(seconds, name, cores)):
            if abs(log(fast / small.elements * large.elements / slow)) > log(1 + STEEP):
                middle = round(sqrt(small.elements * large.elements) * FLOAT / GRAIN) * GRAIN // FLOAT
                yield small._replace(elements=middle)


def _seconds(probe: _Probe) -> float:
    """Seconds of one unit of work of a probe, in its fastest run."""
    native: Any = native_module()

    def fastest(repeats: int) -> tuple[int, float] | None:
        work, taken = native.measure(probe.name, probe.cell, repeats, probe.elements, probe.threads, RUNS)
        complete = [seconds for seconds, present in taken if present == probe.threads]
        return (work, min(complete)) if complete else None

    repeats, attempts = 1, 0
    while attempts < ATTEMPTS:
        trial = fastest(repeats)  # the first of the runs wakes the team
        if trial is not None and trial[1] < SECONDS:
            repeats = max(2 * repeats, int(1.2 * repeats * SECONDS / trial[1]))
            continue
        if trial is not None:
            return trial[1] / trial[0]
        attempts += 1
        time.sleep(PAUSE)
    raise RuntimeError(
        f"other programs kept a core busy: {probe.name} found no {probe.threads} free cores in {ATTEMPTS} attempts"
    )
