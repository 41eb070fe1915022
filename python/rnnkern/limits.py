"""How fast this machine could be: its rates, measured, and the shortest time of a call that follows from them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any

from .backends.native import native_module
from .cells import CELLS
from .stack import Stack

__all__ = ["Floor", "Level", "Limits", "Step", "Work", "floor", "flops", "measure"]

FLOAT = 4  # bytes
SECONDS, RUNS = 0.004, 7  # a run is long beside a clock tick and the start of a team; the fastest of the runs counts
ATTEMPTS, PAUSE = 40, 0.05  # at finding all cores free, and seconds between them
VECTORS = 64  # of units, in L1, for the throughput of an elementwise part
LARGEST_READ = 512 << 20


@dataclass(frozen=True)
class Level:
    """A cache, or memory: its size, and the bytes a second that one core and all cores together read from it."""

    name: str
    bytes: int
    shared: bool  # by all cores; else each has one of its own
    one_core: float
    all_cores: float


@dataclass(frozen=True)
class Step:
    """The elementwise part of a cell's step: seconds from the old h to the new one, and seconds a unit when many."""

    latency: float
    unit: float


@dataclass(frozen=True)
class Limits:
    """The rates of this machine with the instruction set in use, float32; those of a core are of one core alone."""

    isa: str
    cores: int
    flops: float  # of one core, a second; a multiply-add is two
    multiply_add_latency: float  # seconds
    barrier: float  # seconds, of all cores
    levels: tuple[Level, ...]  # nearest first, the last is memory
    forward: Mapping[str, Step]  # by cell
    backward: Mapping[str, Step]


@dataclass(frozen=True)
class Work:
    """What a call has to do: T steps of B rows through a stack."""

    stack: Stack
    steps: int
    batch: int


@dataclass(frozen=True)
class Floor:
    """The shortest time of a call, and what it is bound by: latency, bytes or arithmetic."""

    seconds: float
    bound: str


def flops(work: Work, training: bool) -> int:
    """Additions and multiplications of the products: T B sum over layer-directions of 2 G H (I + H).

    Backward has two products for each one of forward: the gradients of its left and of its right side.
    """
    return work.steps * work.batch * work.stack.flops * (3 if training else 1)


def floor(work: Work, limits: Limits, threads: int, training: bool) -> Floor:
    """No program can be faster than the largest of three, plus one read of the weights.

    - latency: the steps wait for each other, T + L - 1 of them since layers may follow one another like a wave. Each
      takes the elementwise part of the cell and a sum of H terms, at least log2(H) additions deep; twice that where a
      cell has two products a step.
    - bytes: each step of each layer-direction reads its recurrent weights, G H H numbers, from the nearest level of
      memory that holds them. Traffic of x, y and saved gates is left out.
    - arithmetic: `flops` at the rate of multiply-adds, plus the elementwise parts.

    Training adds the same for backward. The read of the weights comes first: packing, or filling the caches.

    Cores divide either rows, then each reads all weights, or units, then each keeps its share of the weights but waits
    at a barrier a step. The faster one counts, or fewer cores where that is faster still.
    """
    plans = [_plan(work, limits, training, 1, by_rows=True)]
    for cores in range(2, min(threads, limits.cores) + 1):
        plans += [_plan(work, limits, training, cores, by_rows) for by_rows in (True, False)]
    return min(plans, key=lambda plan: plan.seconds)


def _plan(work: Work, limits: Limits, training: bool, cores: int, by_rows: bool) -> Floor:
    stack, T, B = work.stack, work.steps, work.batch
    cell, H = stack.cell, stack.hidden_size
    gates, count = len(cell.gates), len(stack.layers)
    passes = [limits.forward[cell.name], *[limits.backward[cell.name]] * training]
    share = ceil(B / cores) / B if by_rows else 1 / cores

    chain = (2 if cell.late_gates else 1) * ceil(log2(H)) * limits.multiply_add_latency
    meeting = 0.0 if by_rows else limits.barrier * (2 if cell.late_gates else 1)
    latency = (T + stack.num_layers - 1) * sum(one.latency + chain + meeting for one in passes)

    recurrent = FLOAT * gates * H * H
    own = recurrent if by_rows else recurrent / cores
    stream = T * count * len(passes) * _read(limits, own, recurrent, cores)

    elementwise = T * B * count * H * sum(one.unit for one in passes)
    arithmetic = share * (flops(work, training) / limits.flops + elementwise)

    weights = FLOAT * sum(gates * H * (sizes.input_size + H + 2) for sizes in stack.layers)
    bounds = {"latency": latency, "bytes": stream, "arithmetic": arithmetic}
    bound = max(bounds, key=bounds.__getitem__)
    return Floor(bounds[bound] + _read(limits, weights / cores, weights, cores), bound)


def _read(limits: Limits, own: float, whole: float, cores: int) -> float:
    """Seconds in which each of the cores reads `own` bytes, which are `whole` bytes of different memory in all."""
    for level in limits.levels:
        if (whole if level.shared else own) <= level.bytes:
            break
    return cores * own / min(cores * level.one_core, level.all_cores)


def measure(threads: int) -> Limits:
    """Measure this machine; takes a few seconds.

    Raises
    ------
    RuntimeError
        There are no compiled kernels, or other programs kept a core busy all the time.
    """
    native = native_module()
    if native is None:
        raise RuntimeError("the limits are measured by the compiled kernels, which are missing")
    lanes = int(native.lanes("float32"))
    levels = []
    for name, size, shared, part in _parts(threads):
        one, every = (_seconds("read", part, cores) for cores in (1, threads))
        levels.append(Level(name, size, shared, FLOAT * part / one, FLOAT * part * threads / every))

    def steps(direction: str) -> dict[str, Step]:
        many = VECTORS * lanes
        return {
            cell: Step(_seconds(direction, lanes, cell=cell), _seconds(direction, many, cell=cell) / many)
            for cell in CELLS
        }

    return Limits(
        native.isa(),
        threads,
        2 / _seconds("multiply_add", lanes),
        _seconds("multiply_add_latency", lanes),
        _seconds("barrier", lanes, threads) if threads > 1 else 0.0,
        tuple(levels),
        steps("forward"),
        steps("backward"),
    )


def _parts(threads: int) -> list[tuple[str, int, bool, int]]:
    """Of each level its name, size, whether it is shared, and how many floats a core reads to measure it."""
    levels = [(f"L{level}", size, shared, size // 2) for level, size, shared in _caches()]
    largest = max(size for _, size, _, _ in levels)
    levels.append(("memory", 1 << 62, True, min(4 * largest, LARGEST_READ)))
    unit = 1 << 10  # floats, whole vectors of every instruction set
    return [
        (name, size, shared, part // (threads if shared else 1) // FLOAT // unit * unit)
        for name, size, shared, part in levels
    ]


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> list[tuple[int, int, bool]]:
    """Level, bytes and whether shared, nearest first; common sizes where the system does not tell."""
    found = []
    for index in sorted(folder.glob("index[0-9]")):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            number, unit = (index / "size").read_text().strip()[:-1], (index / "size").read_text().strip()[-1]
        except (OSError, ValueError):
            continue
        if kind != "Instruction":
            found.append((level, int(number) * {"K": 1 << 10, "M": 1 << 20}[unit], level >= 3))
    return found or [(1, 32 << 10, False), (2, 1 << 20, False), (3, 32 << 20, True)]


def _seconds(name: str, elements: int, threads: int = 1, cell: str = "") -> float:
    """Seconds of one unit of work of a measurement, in its fastest run."""
    native: Any = native_module()

    def fastest(repeats: int, runs: int) -> tuple[int, float] | None:
        work, taken = native.measure(name, cell, repeats, elements, threads, runs)
        complete = [seconds for seconds, present in taken if present == threads]
        return (work, min(complete)) if complete else None

    repeats, attempts = 1, 0
    while attempts < ATTEMPTS:
        trial = fastest(repeats, RUNS)  # the first of the runs wakes the team
        if trial is not None and trial[1] < SECONDS:
            repeats *= 2
            continue
        if trial is not None:
            return trial[1] / trial[0]
        attempts += 1
        time.sleep(PAUSE)
    raise RuntimeError(f"other programs kept a core busy: {name} found no {threads} free cores in {ATTEMPTS} attempts")
