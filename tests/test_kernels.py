"""Every way through the native kernels, crossed pairwise with every option, on every ISA of the machine.

A path is a way that sizes and threads take through the kernels: rows or units shared by threads, rows in lanes where
units are few, sums in parts, steps in blocks. A case sends a cell along a path on an ISA, and the options are drawn so
that each value of one meets each value of every other, and each path with each cell, in some case. Each test is a
sentence about all cases.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import config, planning
from rnnkern.backends.native import native_module
from rnnkern.backends.numba_units import unit_functions
from rnnkern.cells import CELLS, CellMath, Math
from rnnkern.testing import (
    Problem,
    assert_accurate,
    backward_options,
    infer,
    inputs,
    layer_of,
    named_gradients,
    named_states,
    run,
    state_of,
)

pytestmark = pytest.mark.skipif(native_module() is None, reason="the compiled module is missing")

Results = dict[str, Any]


@dataclass(frozen=True)
class Vectors:
    """What the sizes of a path depend on: lanes and bytes of a vector, of so many weights, and the cell's gates."""

    lanes: int
    bytes: int
    weight_bytes: int
    gates: int

    def deep(self, vectors: int) -> int:
        """The inputs of which a panel of so many vectors fills a part (kPartDepth in gemm.h)."""
        return 64 * 1024 // (vectors * self.weight_bytes)

    @property
    def block_rows(self) -> int:
        """The most rows of a block where the gates of a row take 1,024 bytes (policy.h)."""
        return max(native_module().private_cache() // 4096, 256)

    @property
    def outer_rows(self) -> int:
        """The rows of a part of a sum of outer products (kOuterRows)."""
        return 32 * 1024 // (4 * self.bytes)


@dataclass(frozen=True)
class Call:
    """What shows that a problem takes its path: the vectors, the problem and how both passes are divided."""

    vectors: Vectors
    problem: Problem
    forward: planning.Division
    backward: planning.Division

    @property
    def rows_in_lanes(self) -> bool:
        """Do vectors hold rows? Then what is kept for backward is padded to whole vectors of rows, not of units."""
        v, p, cell = self.vectors, self.problem, CELLS[self.problem.cell]
        states = -(-p.B // v.lanes) * p.H * v.bytes
        kept = p.T * states * len(cell.saved) * (cell.saved != ("h",))  # y is not kept twice
        narrow = states < p.B * v.bytes  # fewer vectors than rows: the condition of narrow.h
        return narrow and (cell.late_gates > 0 or kept <= self.forward.kept <= kept + 128)

    @property
    def in_blocks(self) -> bool:
        """Do both passes go through the steps in several blocks?"""
        return max(self.forward.block_steps, self.backward.block_steps) < self.problem.T


@dataclass(frozen=True)
class Path:
    """T, B, I and H, which follow the vectors; whether a call goes this way; and its threads."""

    sizes: Callable[[Vectors], tuple[int, int, int, int]]
    taken: Callable[[Call], bool]
    threads: int = 1
    large: bool = False  # takes the reference some tenths of a second
    one_layer: bool = False  # takes the reference ten times as long with more


PATHS = {
    "one row": Path(
        lambda v: (6, 1, 5, 9 * v.lanes + 2),
        lambda call: call.problem.B == 1,
    ),
    "less than a vector of units": Path(
        lambda v: (7, v.lanes - 1, 5, v.lanes - 1),
        lambda call: not call.rows_in_lanes,
    ),
    "tiles of rows": Path(
        lambda v: (4, 27, 2 * v.lanes + 3, 4 * v.lanes + 1),
        lambda call: not call.rows_in_lanes,
    ),
    "shared rows": Path(
        lambda _: (9, 33, 17, 41),
        lambda call: call.forward.split == call.backward.split == "rows" and call.forward.block_steps < call.problem.T,
        threads=3,
        large=True,
    ),
    "shared units": Path(
        lambda v: (2 + 16 // v.gates, 2, 97, 230 if v.gates == 1 else 135),
        lambda call: call.forward.split == call.backward.split == "units",
        threads=3,
        large=True,
    ),
    "rows in lanes": Path(
        lambda v: (6, 2 * v.lanes + 1, 5, v.lanes // 2),
        lambda call: call.rows_in_lanes,
    ),
    "rows in lanes, many columns": Path(
        lambda v: (5, 6 * v.lanes - 1, v.lanes + 3, max(1, 3 * v.lanes // 4)),
        lambda call: call.rows_in_lanes,
    ),
    "rows in lanes, shared": Path(
        lambda v: (1500 // (6 * v.lanes - 1) + 1, 6 * v.lanes - 1, 3, min(3, v.lanes - 1)),
        lambda call: call.rows_in_lanes and call.forward.block_steps < call.problem.T,
        threads=3,
        large=True,
    ),
    "rows in lanes, steps in blocks": Path(
        lambda v: (14, 301, 2, min(3, v.lanes - 1)),
        lambda call: call.rows_in_lanes and call.in_blocks,
        large=True,
    ),
    "steps in blocks": Path(
        lambda v: (v.block_rows // 86 + 1, 86, 5, 1024 * v.lanes // (v.bytes * v.gates) + 5),
        lambda call: call.in_blocks,
        large=True,
    ),
    "inputs in parts": Path(
        lambda v: (3, 9, v.deep(v.gates if v.gates > 2 else 4) + 13, (1 if v.gates > 2 else 4) * v.lanes + 1),
        lambda call: call.forward.block_steps * call.problem.B > 24,  # more than the rows of a tile and of a part
    ),
    "carry in parts": Path(
        lambda v: (2, 9, 3, max(v.deep(4) // v.gates, 4 * v.lanes) + 5),
        lambda call: call.vectors.gates * call.problem.H > call.vectors.deep(4),
        large=True,
        one_layer=True,
    ),
    "outer products in parts": Path(
        lambda v: (v.outer_rows // 33 + 1, 33, 32 * v.lanes + 9, 97 // v.gates + 1),
        # Where vectors have few lanes or the cache is small a block of backward has fewer rows than a part.
        lambda call: (
            call.backward.block_steps * call.problem.B > call.vectors.outer_rows or call.backward.block_reason != "call"
        ),
        large=True,
    ),
}

KINDS = [(cell, False) for cell in CELLS] + [(cell, True) for cell in CELLS if CELLS[cell].projects]
# One of each shape of a step, for sentences that others say of all cells.
SHAPES = [("rnn_relu", False), ("lstm", False), ("lstm", True), ("gru", False), ("gru_reset_before", False)]
# Without a projection each cell, of RNNs one, whose functions alone are different; for sentences about bits.
BIT_KINDS = [
    (cell, projected)
    for cell, projected in KINDS
    if projected <= (cell == "lstm") and CELLS[cell].nonlinearity in ("", "tanh")
]

OPTIONS: dict[str, Sequence[Any]] = {
    "numbers": ({"dtype": "float32"}, {"dtype": "float64"}, {"dtype": "float32", "precision": "bfloat16"}),
    "stack": ({}, {"num_layers": 3}, {"num_layers": 3, "dropout": 0.4}),
    "bidirectional": (False, True),
    "lengths": (False, True),
    "resets": (False, True),
    "bias": (True, False),
    "loss": ("both", "steps", "final"),
    "clip_state": (None, ("norm", 0.5), ("value", 0.1)),
    "diagnostics": (False, True),
}


def pairwise(factors: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    """Few combinations in which each value of a factor meets each value of every other factor.

    Greedy: a combination begins with a pair that has not met, and takes for factor after factor the value that meets
    most of those it has for the first time. They come shuffled, so that whatever fails somewhere fails soon.
    """
    choose, names = random.Random(seed), list(factors)
    values = {name: [(name, index) for index in range(len(factors[name]))] for name in names}
    unmet = dict.fromkeys(
        frozenset(pair) for one, other in combinations(names, 2) for pair in product(values[one], values[other])
    )
    combined = []
    while unmet:
        chosen = dict(next(iter(unmet)))
        for name in choose.sample(names, len(names)):
            if name not in chosen:
                gains = [sum(frozenset({value, met}) in unmet for met in chosen.items()) for value in values[name]]
                chosen[name] = choose.choice([i for i, gain in enumerate(gains) if gain == max(gains)])
        for pair in combinations(chosen.items(), 2):
            unmet.pop(frozenset(pair), None)
        combined.append({name: factors[name][chosen[name]] for name in names})
    choose.shuffle(combined)
    return combined


@dataclass(frozen=True)
class Case:
    """A cell on a path and an ISA, with options of `Problem`."""

    path: str
    cell: str
    projected: bool
    isa: str
    options: Mapping[str, Any]

    def __str__(self) -> str:
        options = [value if isinstance(value, str) else name for name, value in self.options.items() if value]
        return "-".join([self.path, self.cell + " projected" * self.projected, self.isa, *options])

    @property
    def vectors(self) -> Vectors:
        """Of the ISA, which is in use, and the dtype."""
        native, dtype = native_module(), np.dtype(self.options["dtype"])
        lanes = native.lanes(dtype)
        in_pairs = self.options.get("precision") == "bfloat16" and native.engine() == "pairs"
        itemsize = 2 if in_pairs else dtype.itemsize
        return Vectors(lanes, lanes * dtype.itemsize, lanes * itemsize, len(CELLS[self.cell].gates))

    @contextmanager
    def begun(self) -> Iterator[Problem]:
        """The problem, while its ISA and its threads are in use."""
        with config.use_isa(self.isa), threads(PATHS[self.path].threads):
            T, B, I, H = PATHS[self.path].sizes(self.vectors)
            yield Problem(self.cell, T, B, I, H, proj_size=(H - 1) * self.projected, **self.options)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads for a while."""
    before = rk.num_threads()
    rk.set_num_threads(count)
    try:
        yield
    finally:
        rk.set_num_threads(before)


def crossed(seed: int, on_each_isa: bool = False, **options: Sequence[Any]) -> pytest.MarkDecorator:
    """A parameter `case`: paths, cells, ISAs and options pairwise; small paths with each cell on each ISA if asked."""
    small = [path for path in PATHS if on_each_isa and not PATHS[path].large]
    large = [path for path in PATHS if path not in small]
    others = {"isa": config.isas() or ["none"], **OPTIONS, **options}
    found = pairwise({"path and kind": list(product(small, KINDS))} | others, seed) if small else []
    for row in found:
        row["path"], row["kind"] = row.pop("path and kind")
    found += pairwise({"path": large, "kind": KINDS if on_each_isa else BIT_KINDS} | others, seed)
    for row in found:
        if PATHS[row["path"]].one_layer:
            row["stack"] = {}
    cases = [
        Case(row.pop("path"), *row.pop("kind"), row.pop("isa"), row.pop("stack") | row.pop("numbers") | row)
        for row in found
    ]
    return pytest.mark.parametrize("case", cases, ids=str)


def same(results: Results, expected: Results) -> None:
    """Equal bits, by name."""
    assert results.keys() == expected.keys()
    for name, array in results.items():
        assert np.array_equal(array, expected[name], equal_nan=True), name


def passes(problem: Problem, x: Any, dy: Any, rows: slice = slice(None)) -> Results:
    """What belongs to rows, and with all rows the gradients of the parameters, of a forward and backward of some."""
    drawn, layer = inputs(problem), layer_of(problem, "native")

    def chosen(parts: Any) -> Any:
        return None if parts is None else state_of(tuple(part[:, rows] for part in parts))

    lengths = None if drawn.lengths is None else drawn.lengths[rows]
    resets = None if drawn.resets is None else drawn.resets[:, rows]
    y, state, tape = layer.forward(x[:, rows], chosen(drawn.state), lengths=lengths, resets=resets, seed=0)
    dy = None if dy is None else dy[:, rows]
    grads = layer.backward(tape, dy, chosen(drawn.dstate), **backward_options(problem))
    return {"y": y} | named_states(problem, state) | named_gradients(problem, grads)


def test_each_value_meets_each_value_of_other_factors() -> None:
    """In some combination, of which there are few."""
    factors = {"one": "abcde", "two": "xyz", "three": (1, 2), "four": (False, True)}
    combined = pairwise(factors, 0)
    for one, other in combinations(factors, 2):
        assert {(row[one], row[other]) for row in combined} == set(product(factors[one], factors[other]))
    assert len(combined) < 20


@pytest.mark.parametrize("path", PATHS)
def test_every_path_is_taken(path: str) -> None:
    """With its sizes a call of every cell is divided as it says, on every ISA, in both dtypes and in bfloat16."""
    for isa, numbers, cell in product(config.isas(), OPTIONS["numbers"], CELLS):
        case = Case(path, cell, False, isa, numbers)
        with case.begun() as problem:
            call = Call(case.vectors, problem, *planning._plan(layer_of(problem, "native"), problem.T, problem.B)[1:])
        assert call.forward.threads == call.backward.threads == PATHS[path].threads, call
        assert PATHS[path].taken(call), call


@crossed(0, on_each_isa=True)
def test_training_and_inference_match_the_reference(case: Case) -> None:
    """Outputs, states and every gradient, by the accuracy rule."""
    with case.begun() as problem:
        trained, inferred = run(problem, "native"), infer(problem, "native")
    assert_accurate(problem, trained)
    if not problem.dropout:  # which inference leaves out
        assert_accurate(problem, inferred)


@crossed(1)
def test_threads_change_no_bit(case: Case) -> None:
    """However many; helpers that sleep when a call begins join it at one step or another."""
    with case.begun() as problem:
        with threads(1):
            expected, inferred = run(problem, "native"), infer(problem, "native")
        for count, pause in ((2, 0.0), (3, 0.0), (3, 0.001), (2, 0.001)):
            with threads(count):
                time.sleep(pause)  # they fall asleep
                same(run(problem, "native"), expected)
                same(infer(problem, "native"), inferred)


ALIKE = ({}, {"num_layers": 3})  # without the masks of dropout, which are drawn for the whole batch


@crossed(2, stack=ALIKE)
def test_a_row_of_a_batch_is_that_row_run_alone(case: Case) -> None:
    """To the bit: outputs, states and gradients of what belongs to rows."""
    with case.begun() as problem:
        drawn = inputs(problem)
        together = passes(problem, drawn.x, drawn.dy)
        for row in {0, problem.B // 2, problem.B - 1}:
            alone = passes(problem, drawn.x, drawn.dy, slice(row, row + 1))
            for name in ("y", "dx", *problem.stack.cell.states, *(f"d{one}" for one in problem.stack.cell.states)):
                assert np.array_equal(alone[name], together[name][:, row : row + 1]), name


@crossed(3, stack=ALIKE, bidirectional=[False], lengths=[False], kind=SHAPES)
def test_a_sequence_in_pieces_is_the_sequence_at_once(case: Case) -> None:
    """To the bit: forward, dx and the gradient of the state, with a single step as a piece."""
    with case.begun() as problem:
        drawn, layer = inputs(problem), layer_of(problem, "native")

        def in_pieces(*ends: int) -> Results:
            state, ys, tapes = state_of(drawn.state), [], []
            pieces = [slice(first, last) for first, last in zip((0, *ends), (*ends, problem.T), strict=True)]
            for piece in pieces:
                resets = None if drawn.resets is None else drawn.resets[piece]
                y, state, tape = layer.forward(drawn.x[piece], state, resets=resets)
                ys.append(y)
                tapes.append(tape)
            dstate, dxs = state_of(drawn.dstate), []
            for piece, tape in zip(reversed(pieces), reversed(tapes), strict=True):
                dy = None if drawn.dy is None else drawn.dy[piece]
                grads = layer.backward(tape, dy, dstate, clip_state=problem.clip_state)
                dstate = grads.state
                dxs.insert(0, grads.x)
            gradients = {"dx": np.concatenate(dxs)} | named_states(problem, dstate, "d")
            return {"y": np.concatenate(ys)} | named_states(problem, state) | gradients

        same(in_pieces(1, max(1, problem.T - 1)), in_pieces())


@crossed(4, stack=ALIKE, bidirectional=[False], lengths=[False], resets=[False], loss=["both"], kind=SHAPES)
def test_every_way_to_infer_gives_the_same_bits(case: Case) -> None:
    """Forward, a call, a frozen call and the steps of a stream; and no state is a state of zeros."""
    with case.begun() as problem:
        drawn, layer = inputs(problem), layer_of(problem, "native")
        frozen = layer.freeze()
        zeros = state_of(tuple(np.zeros_like(part) for part in drawn.state))
        for state in (state_of(drawn.state), zeros):
            expected = {"y": layer(drawn.x, state)[0]} | named_states(problem, layer(drawn.x, state)[1])
            stream = frozen.stream(problem.B)
            stream.state = state
            steps = np.stack([stream.step(x_t) for x_t in drawn.x])
            for y, final in (
                layer.forward(drawn.x, state)[:2],
                frozen(drawn.x, None if state is zeros else state),
                layer(drawn.x, None if state is zeros else state),
                (steps, stream.state),
            ):
                same({"y": y} | named_states(problem, final), expected)


@crossed(5, lengths=[True], kind=SHAPES)
def test_what_lies_beyond_the_lengths_is_never_read(case: Case) -> None:
    """NaN in x and dy past a row's end changes no bit; y and dx are zero there."""
    with case.begun() as problem:
        drawn = inputs(problem)
        beyond = np.arange(problem.T)[:, None] >= drawn.lengths
        x, dy = drawn.x.copy(), None if drawn.dy is None else drawn.dy.copy()
        expected = passes(problem, x, dy)
        for array in (x, dy):
            if array is not None:
                array[beyond] = np.nan
        results = passes(problem, x, dy)
        same(results, expected)
        assert not results["y"][beyond].any()
        assert not results["dx"][beyond].any()


def test_numba_gives_no_two_functions_one_name():
    """Code of two processes that comes from the cache is told apart by the name, which must have the cell in it."""
    kernels = pytest.importorskip("rnnkern.backends.numba_cpu_kernels", reason="Numba is not installed")
    functions = [
        function.py_func
        for cell in CELLS.values()
        for forward in (True, False)
        for function in kernels._functions(cell, np.dtype("float32"), forward)
    ]
    assert len({function.__qualname__ for function in functions}) == len(functions) > 2 * len(CELLS)


def test_code_for_numba_sets_nothing_before_all_is_read():
    """A cell may set a gradient first and read what stands in the same place last, the gradient it got."""

    def math(_: Math) -> CellMath:
        def backward(dnew: Any, dx: Any, dprev: Any) -> None:
            dprev[0] = dnew[0] + dnew[0]
            dx[0] = dprev[0] * dnew[0]

        return CellMath(backward, backward)

    cell = replace(CELLS["rnn_tanh"], math=math)
    (unit,) = unit_functions(cell, np.dtype("float64"), False, lambda function: function)
    state, dx = np.array([[7.0, 5.0]]), np.zeros((1, 2))
    unit(2, 0, 1, (state, dx, state))
    np.testing.assert_array_equal(state, [[7, 10]])
    np.testing.assert_array_equal(dx, [[0, 50]])
