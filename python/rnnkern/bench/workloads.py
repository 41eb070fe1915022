"""The named workloads, their numbers, and the part of a result that is checked. To add a workload, add a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cells import CELLS
from ..layers import Recurrent
from ..limits import Work
from ..testing import Problem, assert_accurate, inputs, layer_of

__all__ = ["QUICK", "SUITE", "WORKLOADS", "Numbers", "Workload", "assert_right", "named"]

Array = NDArray[Any]

CHECKED_STEPS, CHECKED_ROWS = 8, 2

_NAME = re.compile(r"(?P<cell>\w+)-i(?P<I>\d+)-h(?P<H>\d+)-b(?P<B>\d+)-t(?P<T>\d+)(-l(?P<L>\d+))?(-d(?P<D>[12]))?")


@dataclass(frozen=True)
class Workload:
    """A cell and its sizes: I inputs, H hidden units, B rows, T steps, L layers, D directions; float32."""

    cell: str
    I: int
    H: int
    B: int
    T: int
    layers: int = 1
    directions: int = 1

    @property
    def name(self) -> str:
        """A name that stays the same from run to run, such as `lstm-i128-h128-b32-t100`."""
        stacked = f"-l{self.layers}" * (self.layers > 1) + f"-d{self.directions}" * (self.directions > 1)
        return f"{self.cell}-i{self.I}-h{self.H}-b{self.B}-t{self.T}{stacked}"

    @property
    def checked(self) -> Problem:
        """The problem that results are held to: the same weights, the first steps of the first and the last row.

        The naive loops of the accuracy rule would take minutes on a whole large workload. Row b of a result depends on
        row b alone and its first steps on nothing later, so this part of y can be taken from the whole call; so can all
        gradients of a loss on this part. Only a second direction begins at the end: there every step counts.
        """
        return Problem(
            self.cell,
            self.T if self.directions == 2 else min(self.T, CHECKED_STEPS),
            min(self.B, CHECKED_ROWS),
            self.I,
            self.H,
            num_layers=self.layers,
            bidirectional=self.directions == 2,
            loss="steps",
        )

    @property
    def work(self) -> Work:
        """What its flops and its floor are computed from."""
        return Work(self.checked.stack, self.T, self.B)

    @property
    def rows(self) -> list[int]:
        """The rows of the batch that are checked."""
        return [0, self.B - 1][: self.checked.B]


@dataclass(frozen=True)
class Numbers:
    """What every peer gets, float32: x (T, B, I), states (L*D, B, H), and gradients of y (T, B, D*H)."""

    x: Array
    state: tuple[Array, ...]
    dy: Array  # a loss on every step
    dy_checked: Array  # zero outside the part of y that is checked


@lru_cache(maxsize=1)
def numbers(workload: Workload) -> Numbers:
    """Draw the numbers around those of the checked problem."""
    problem, generator = workload.checked, np.random.default_rng(1)
    part, stack = inputs(problem), problem.stack
    assert part.dy is not None  # the loss is on every step
    where = np.ix_(range(problem.T), workload.rows)

    def normal(*shape: int) -> Array:
        return generator.normal(size=shape).astype(np.float32)

    x, dy = normal(workload.T, workload.B, workload.I), normal(workload.T, workload.B, stack.output_size)
    state = tuple(normal(*shape) for shape in stack.state_shapes(workload.B))
    x[where] = part.x
    for whole, some in zip(state, part.state, strict=True):
        whole[:, workload.rows] = some
    dy_checked = np.zeros_like(dy)
    dy_checked[where] = part.dy
    for array in (x, *state, dy, dy_checked):
        array.flags.writeable = False
    return Numbers(x, state, dy, dy_checked)


def layer(workload: Workload, backend: str = "reference") -> Recurrent:
    """A layer with the workload's weights."""
    return layer_of(workload.checked, backend)


def assert_right(workload: Workload, results: Mapping[str, Array]) -> float:
    """The accuracy rule on the checked part of what a whole call gave, with `dy_checked` where it went backward.

    Returns the largest error as a fraction of its bound; AssertionError as `testing.assert_accurate`.
    """
    problem, part = workload.checked, dict[str, Array]()
    for name, whole in results.items():
        assert np.isfinite(whole).all(), f"NaN or Inf in {name} of {workload.name}"
        if name in ("y", "dx"):
            part[name] = whole[np.ix_(range(problem.T), workload.rows)]
        elif name in _named(problem, "d"):
            part[name] = whole[:, workload.rows]
        elif name in _named(problem, ""):
            if problem.T == workload.T:  # else it is the state after steps that are not checked
                part[name] = whole[:, workload.rows]
        else:
            part[name] = whole
    return assert_accurate(problem, part)


def _named(problem: Problem, prefix: str) -> list[str]:
    return [prefix + state for state in CELLS[problem.cell].states]


def named(name: str) -> Workload:
    """The workload of a name, listed or not, such as `gru-i8-h16-b4-t50` or `lstm-i64-h64-b8-t20-l2-d2`.

    Raises
    ------
    ValueError
        It is no such name.

    >>> named("lstm-i64-h64-b1-t100") is WORKLOADS["lstm-i64-h64-b1-t100"]
    True
    >>> named("gru-i8-h16-b4-t50")
    Workload(cell='gru', I=8, H=16, B=4, T=50, layers=1, directions=1)
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    match = _NAME.fullmatch(name)
    if match is None or match["cell"] not in CELLS:
        example, cells = next(iter(WORKLOADS)), ", ".join(CELLS)
        raise ValueError(f"workload: expected a name such as {example}, with a cell of {cells}, got {name!r}")
    sizes = [int(match[size] or 1) for size in "IHBTLD"]
    if min(sizes) < 1:
        raise ValueError(f"workload: expected sizes of at least 1, got {name!r}")
    return Workload(match["cell"], *sizes)


_LINES = (
    # One row, small: a step is latency and a read of the weights.
    Workload("lstm", 16, 16, 1, 256),
    Workload("gru", 32, 32, 1, 256),
    Workload("lstm", 64, 64, 1, 100),
    Workload("gru", 64, 64, 1, 100),
    Workload("rnn_tanh", 64, 64, 1, 100),
    Workload("lstm", 128, 128, 1, 100),
    Workload("gru", 128, 128, 1, 100),
    Workload("lstm", 256, 256, 1, 100),
    Workload("gru", 256, 256, 1, 100),
    Workload("rnn_tanh", 256, 256, 1, 100),
    Workload("lstm", 512, 512, 1, 100),
    Workload("rnn_tanh", 512, 512, 1, 100),
    Workload("lstm", 1024, 1024, 1, 50),
    Workload("gru", 2, 2, 16, 10_000),
    # Middle.
    Workload("lstm", 128, 128, 16, 100),
    Workload("gru", 128, 128, 16, 100),
    Workload("rnn_tanh", 128, 128, 16, 100),
    Workload("gru", 128, 128, 32, 100),
    Workload("lstm", 256, 256, 32, 100),
    Workload("gru", 256, 256, 32, 100),
    Workload("rnn_tanh", 256, 256, 32, 100),
    Workload("lstm", 200, 200, 20, 35, layers=2),
    Workload("lstm", 128, 128, 32, 100, layers=2),
    # Large: arithmetic.
    Workload("lstm", 256, 256, 64, 150),
    Workload("lstm", 512, 512, 64, 50),
    Workload("gru", 512, 512, 64, 50),
    Workload("lstm", 1024, 1024, 64, 25),
    Workload("rnn_tanh", 1024, 1024, 64, 50),
    Workload("lstm", 256, 256, 64, 50, directions=2),
)
WORKLOADS = {workload.name: workload for workload in _LINES}

# Of `rnnkern bench --quick`: small and middle.
QUICK = (
    "lstm-i64-h64-b1-t100",
    "gru-i64-h64-b1-t100",
    "rnn_tanh-i64-h64-b1-t100",
    "lstm-i128-h128-b16-t100",
    "gru-i128-h128-b32-t100",
    "rnn_tanh-i128-h128-b16-t100",
)

# Of the suite in benchmarks/: each cell once, small, and the quick ones.
SUITE = {
    workload.name: workload
    for workload in (*(Workload(cell, 32, 32, 8, 50) for cell in CELLS), *(WORKLOADS[name] for name in QUICK))
}
