"""The suites of workloads, their numbers, and the part of a result that is checked. To add a workload, add a line."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cells import CELLS
from ..layers import Recurrent
from ..limits import Work
from ..testing import Problem, assert_accurate, inputs, layer_of

__all__ = ["QUICK", "SMALL", "SUITES", "WORKLOADS", "Numbers", "Suite", "Workload", "assert_right", "named", "place_of"]

Array = NDArray[Any]

CHECKED_STEPS, CHECKED_ROWS = 8, 2
RESETS = 0.01  # of the steps of a row that begin anew: episodes of 100 steps

_NAME = re.compile(
    r"(?P<cell>\w+)-i(?P<I>\d+)-h(?P<H>\d+)-b(?P<B>\d+)-t(?P<T>\d+)(-l(?P<L>\d+))?(-d(?P<D>[12]))?"
    r"(?P<ragged>-ragged)?(?P<resets>-resets)?(?P<bfloat16>-bfloat16)?"
)


@dataclass(frozen=True)
class Workload:
    """A cell and its sizes: I inputs, H hidden units, B rows, T steps, L layers, D directions.

    Ragged rows have T / 10 to T steps, with resets the state of a row is zero again before some of its steps. The
    precision is that of products; peers that know no such thing compute everything in it.
    """

    cell: str
    I: int
    H: int
    B: int
    T: int
    layers: int = 1
    directions: int = 1
    ragged: bool = False
    resets: bool = False
    precision: str = "float32"

    @property
    def name(self) -> str:
        """A name that stays the same from run to run, such as `lstm-i128-h128-b32-t100`."""
        stacked = f"-l{self.layers}" * (self.layers > 1) + f"-d{self.directions}" * (self.directions > 1)
        options = "-ragged" * self.ragged + "-resets" * self.resets + "-bfloat16" * (self.precision == "bfloat16")
        return f"{self.cell}-i{self.I}-h{self.H}-b{self.B}-t{self.T}{stacked}{options}"

    @property
    def checked(self) -> Problem:
        """The problem that results are held to: the same weights, the first steps of the first and the last row.

        The naive loops of the accuracy rule would take minutes on a whole large workload. Row b of a result depends on
        row b alone and its first steps on nothing later, so this part of y can be taken from the whole call; so can all
        gradients of a loss on this part. Only a second direction begins at the end: there every step counts. Of ragged
        rows the first is checked, which a problem of one row makes T / 2 steps long.
        """
        whole = self.directions == 2 or self.ragged
        return Problem(
            self.cell,
            self.T if whole else min(self.T, CHECKED_STEPS),
            1 if self.ragged else min(self.B, CHECKED_ROWS),
            self.I,
            self.H,
            num_layers=self.layers,
            bidirectional=self.directions == 2,
            lengths=self.ragged,
            resets=self.resets,
            loss="steps",
            precision=self.precision,
        )

    @property
    def lengths(self) -> Array | None:
        """Of ragged rows, int64 (B,): one is T long, the first T / 2, the others as even as T / 10 to T can be."""
        if not self.ragged:
            return None
        spread = np.linspace(self.T, max(self.T / 10, 1), self.B - 1).round().astype(np.int64)
        return np.concatenate([[self.T // 2], np.random.default_rng(2).permutation(spread)])

    @property
    def work(self) -> Work:
        """What its flops and its limit are computed from."""
        lengths = self.lengths
        return Work(self.checked.stack, self.T, self.B, 0 if lengths is None else int(lengths.sum()))

    @property
    def rows(self) -> list[int]:
        """The rows of the batch that are checked."""
        return [0, self.B - 1][: self.checked.B]


@dataclass(frozen=True)
class Numbers:
    """What every peer gets: x (T, B, I), states (L*D, B, H), dy (T, B, D*H), all float32; and options.

    The same in every precision; peers that take bfloat16 round them before the clock starts.
    """

    x: Array
    state: tuple[Array, ...]
    dy: Array  # a loss on every step
    dy_checked: Array  # zero outside the part of y that is checked
    lengths: Array | None  # int64 (B,)
    resets: Array | None  # bool (T, B)


@lru_cache(maxsize=2)  # of a workload in bfloat16 and the same one in float32
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
    resets = None
    if part.resets is not None:
        resets = generator.random((workload.T, workload.B)) < RESETS
        resets[where] = part.resets
    for array in (x, *state, dy, dy_checked):
        array.flags.writeable = False
    return Numbers(x, state, dy, dy_checked, workload.lengths, resets)


def layer(workload: Workload, backend: str = "reference") -> Recurrent:
    """A layer with the workload's weights."""
    return layer_of(workload.checked, backend)


def assert_right(workload: Workload, results: Mapping[str, Array], eps: float | None = None) -> float:
    """The accuracy rule on the checked part of what a whole call gave, with `dy_checked` where it went backward.

    Returns the largest error as a fraction of its bound; `eps` and AssertionError as of `testing.assert_accurate`.
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
    return assert_accurate(problem, part, eps=eps)


def _named(problem: Problem, prefix: str) -> list[str]:
    return [prefix + state for state in CELLS[problem.cell].states]


def named(name: str) -> Workload:
    """The workload of a name, listed or not, such as `gru-i8-h16-b4-t50` or `lstm-i64-h64-b8-t20-l2-d2-ragged`.

    Raises
    ------
    ValueError
        It is no such name.

    >>> named("lstm-i64-h64-b1-t100") is WORKLOADS["lstm-i64-h64-b1-t100"]
    True
    >>> named("gru-i8-h16-b4-t50")
    Workload(cell='gru', I=8, H=16, B=4, T=50, layers=1, directions=1, ragged=False, resets=False, precision='float32')
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
    I, H, B, T, L, D = sizes
    ragged, resets = match["ragged"] is not None, match["resets"] is not None
    if ragged and B < 2:
        raise ValueError(f"workload: expected at least 2 ragged rows, got {name!r}")
    precision = "bfloat16" if match["bfloat16"] else "float32"
    return Workload(match["cell"], I, H, B, T, L, D, ragged, resets, precision)


@dataclass(frozen=True)
class Suite:
    """Workloads that are run together, by their names; those of real models by the models' names."""

    about: str
    workloads: Mapping[str, Workload]


_CORE = (
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

# The recurrent parts of models that people run, and what reinforcement learning and tagging train.
_SHIPPED = {
    "silero-vad": Workload("lstm", 128, 128, 1, 32),
    "DeepFilterNet": Workload("gru", 256, 256, 1, 100, layers=2),
    "easyocr": Workload("lstm", 256, 256, 1, 100, directions=2),
    "kokoro": Workload("lstm", 512, 256, 1, 100, directions=2),
    "encodec": Workload("lstm", 512, 512, 1, 75, layers=2),
    "pyannote": Workload("lstm", 60, 128, 4, 293, layers=4, directions=2),
    "openunmix": Workload("lstm", 512, 256, 1, 255, layers=3, directions=2),
    "resemblyzer": Workload("lstm", 40, 256, 8, 160, layers=3),
    "RL policy": Workload("lstm", 128, 128, 64, 16, resets=True),
    "DreamerV3": Workload("gru", 512, 512, 16, 64),
    "tagger": Workload("lstm", 256, 256, 32, 60, directions=2, ragged=True),
}

# Each with all steps, with rows that end early and with resets: a step that a row has should take as long in all three.
_WHOLE = (
    Workload("lstm", 64, 64, 16, 200),
    Workload("gru", 128, 128, 32, 120),
    Workload("lstm", 256, 256, 16, 120),
    Workload("lstm", 256, 256, 64, 60),
    Workload("rnn_tanh", 256, 256, 32, 120),
    Workload("lstm", 512, 512, 16, 60),
    Workload("gru", 512, 512, 64, 60),
)
_RAGGED = [one for whole in _WHOLE for one in (whole, replace(whole, ragged=True), replace(whole, resets=True))]

# A row that waits for its weights, and products that are arithmetic.
_PRECISION = (
    Workload("gru", 256, 256, 1, 100, precision="bfloat16"),
    Workload("lstm", 512, 512, 1, 100, precision="bfloat16"),
    Workload("lstm", 256, 256, 32, 100, precision="bfloat16"),
    Workload("gru", 256, 256, 32, 100, precision="bfloat16"),
    Workload("lstm", 512, 512, 64, 50, precision="bfloat16"),
    Workload("gru", 512, 512, 64, 50, precision="bfloat16"),
    Workload("lstm", 1024, 1024, 32, 25, precision="bfloat16"),
    Workload("rnn_tanh", 1024, 1024, 64, 50, precision="bfloat16"),
)

# Of `rnnkern bench --suite`; the first is the default.
SUITES = {
    "core": Suite("sizes from a vector to the caches' end", {workload.name: workload for workload in _CORE}),
    "shipped": Suite("the recurrent parts of real models", _SHIPPED),
    "ragged": Suite(
        "rows that end early, and resets, against whole rows", {workload.name: workload for workload in _RAGGED}
    ),
    "precision": Suite(
        "products in bfloat16, against peers in bfloat16", {workload.name: workload for workload in _PRECISION}
    ),
}
WORKLOADS = {workload.name: workload for suite in SUITES.values() for workload in suite.workloads.values()}


def place_of(workload: Workload) -> tuple[str, str]:
    """The suite that a workload is in, and its name there; ("", "") of one that no suite has."""
    places = [
        (name, label) for name, suite in SUITES.items() for label, one in suite.workloads.items() if one == workload
    ]
    return places[0] if places else ("", "")


# Of `rnnkern bench --quick`: small and middle, and of two cells two sizes, which make a line in a plot.
QUICK = (
    "lstm-i64-h64-b1-t100",
    "lstm-i256-h256-b1-t100",
    "gru-i64-h64-b1-t100",
    "gru-i256-h256-b1-t100",
    "lstm-i128-h128-b16-t100",
    "rnn_tanh-i128-h128-b16-t100",
)

# Of the benchmarks in benchmarks/: each cell once, small, and the quick ones.
SMALL = {
    workload.name: workload
    for workload in (*(Workload(cell, 32, 32, 8, 50) for cell in CELLS), *(WORKLOADS[name] for name in QUICK))
}
