"""Small runs of all native code, for the address, undefined-behaviour and thread sanitizers: `tools/sanitize`.

Results are compared with one thread's to the last bit; whether those are right is the business of other tests.
"""

from __future__ import annotations

import os
import random
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.config import num_threads, set_num_threads
from rnnkern.testing import Problem, infer, inputs, layer_of, run, state_of

pytestmark = [
    pytest.mark.sanitize,
    pytest.mark.skipif(native_module() is None, reason="the compiled module is missing"),
]

STACK = {"num_layers": 2, "bidirectional": True, "dropout": 0.4, "lengths": True, "resets": True}


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Two threads unless a test says otherwise, whatever the machine has."""
    before = num_threads()
    set_num_threads(2)
    yield
    set_num_threads(before)


def everything(problem: Problem) -> dict[str, Any]:
    """All results of inference and of a forward and backward."""
    inferred = {f"{name} of inference": array for name, array in infer(problem, "native").items()}
    return inferred | run(problem, "native")


def assert_same(results: dict[str, Any], expected: dict[str, Any]) -> None:
    assert results.keys() == expected.keys()
    for name, array in results.items():
        assert array.tobytes() == expected[name].tobytes(), name


def assert_threads_agree(problem: Problem) -> None:
    set_num_threads(1)
    expected = everything(problem)
    for threads in (2, 3):
        set_num_threads(threads)
        for _ in range(2):  # a helper that sleeps may come too late for the first
            assert_same(everything(problem), expected)


@pytest.mark.usefixtures("native")
def test_every_cell_and_option_around_the_edges_of_a_vector(cell: str, dtype: str) -> None:
    """Sizes of one less and one more than the lanes, in all combinations of options that chance brings together."""
    lanes = native_module().lanes(dtype)
    choose = random.Random(f"{cell} {dtype}").choice
    for seed in range(40):
        H = choose((1, 2, lanes - 1, lanes, lanes + 1, 2 * lanes + 1, 4 * lanes + 3))
        num_layers = choose((1, 1, 2, 3))
        problem = Problem(
            cell,
            T=seed % 10,
            B=choose((1, 2, 3, lanes - 1, lanes, lanes + 1)),
            I=choose((1, 2, lanes - 1, lanes, 2 * lanes + 1)),
            H=H,
            dtype=dtype,
            num_layers=num_layers,
            bidirectional=choose((False, True)),
            bias=choose((False, True)),
            proj_size=choose((0, 1, H // 2, H - 1)) if CELLS[cell].projects and H > 1 else 0,
            dropout=choose((0.0, 0.4, 1.0)) if num_layers > 1 else 0.0,
            lengths=choose((False, True)),
            resets=choose((False, True)),
            loss=choose(("steps", "final", "both")),
            seed=seed,
        )
        results = everything(problem)
        assert all(np.isfinite(array).all() for array in results.values()), problem


@pytest.mark.parametrize("options", [{}, STACK], ids=["plain", "stack"])
@pytest.mark.usefixtures("native")
def test_threads_share_rows(cell: str, dtype: str, options: dict[str, Any]) -> None:
    """Enough work and rows for a team: no barrier within a layer."""
    assert_threads_agree(Problem(cell, T=9, B=33, I=17, H=41, dtype=dtype, **options))


@pytest.mark.parametrize("options", [{}, STACK], ids=["plain", "stack"])
@pytest.mark.usefixtures("native")
def test_threads_share_units(cell: str, dtype: str, options: dict[str, Any]) -> None:
    """Fewer rows than threads: a barrier at each step and product."""
    gates = len(CELLS[cell].gates)  # just enough work for a team
    H = 230 if gates == 1 else 135
    assert_threads_agree(Problem(cell, T=2 + 16 // gates, B=1, I=97, H=H, dtype=dtype, **options))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform pins no threads")
@pytest.mark.parametrize("sizes", [(5, 256, 24, 135), (20, 1, 97, 300)], ids=["rows", "units"])
def test_many_threads(sizes: tuple[int, int, int, int]) -> None:
    """Of which a call asks as many as it can use, whatever CPUs there are, where its own are not all of them."""
    T, B, I, H = sizes
    cpus = os.sched_getaffinity(0)
    problems = [Problem("lstm", T, B, I, H, **options) for options in ({}, STACK)]
    expected = []
    for problem in problems:
        set_num_threads(1)
        expected.append(everything(problem))
    os.sched_setaffinity(0, {min(cpus)})
    try:
        set_num_threads(16)
        for problem, results in zip(problems, expected, strict=True):
            assert_same(everything(problem), results)
    finally:
        os.sched_setaffinity(0, cpus)


@pytest.mark.parametrize("products", [{"precision": "bfloat16"}, {"arithmetic": "amx"}], ids=["bfloat16", "slices"])
@pytest.mark.filterwarnings("ignore:arithmetic. 'amx' needs:UserWarning")
def test_whatever_multiplies(products: dict[str, Any]) -> None:
    """Multiply-adds, pairs and matrix engines: steps that are filled up, few rows that are not, and one."""
    before = native_module().use_engine("none")
    try:
        for best in ("none", "pairs", "emulated", "emulated-fp16"):
            native_module().use_engine(best)
            if native_module().engine() != best:
                continue  # these kernels have no such thing
            for name in CELLS:
                for T, B in (60, 18), (5, 3), (3, 1):
                    assert_threads_agree(Problem(name, T=T, B=B, I=5, H=20, **STACK, **products))
    finally:
        native_module().use_engine(before)


@pytest.mark.parametrize("sizes", [(1, 97, 150, 135), (33, 9, 99, 35)], ids=["units", "rows"])
@pytest.mark.usefixtures("native")
def test_threads_share_a_projection(dtype: str, sizes: tuple[int, int, int, int]) -> None:
    """Two products a step, in rows and in units."""
    B, I, H, P = sizes
    for name, cell in CELLS.items():
        if cell.projects:
            assert_threads_agree(Problem(name, T=5, B=B, I=I, H=H, proj_size=P, dtype=dtype, **STACK))


@pytest.mark.parametrize("sizes", [(0, 3, 2), (1, 1, 1), (5, 7, 9), (33, 17, 15), (300, 35, 97)], ids=str)
@pytest.mark.usefixtures("native")
def test_linear(dtype: str, sizes: tuple[int, int, int]) -> None:
    """Forward and backward, with and without bias, up to sizes that are worth a team."""
    rows, inputs_, outputs = sizes
    random = np.random.default_rng(0)
    x, dy = (random.normal(size=(rows, columns)).astype(dtype) for columns in (inputs_, outputs))
    for bias in (False, True):
        layer = rk.Linear(inputs_, outputs, bias, dtype=dtype, backend="native", seed=0)
        results = []
        for threads in (1, 2, 2, 3):
            set_num_threads(threads)
            y, tape = layer.forward(x)
            with_x, without_x = layer.backward(tape, dy), layer.backward(tape, dy, need_x=False)
            results.append({"y": y, "called": layer(x), "dx": with_x.x, **with_x.parameters})
            assert without_x.x is None
        for one in results[1:]:
            assert_same(one, results[0])


@pytest.mark.parametrize("B", [1, 9])
@pytest.mark.usefixtures("native")
def test_eight_threads_share_a_layer_and_its_frozen_copy(cell: str, B: int) -> None:
    """Forward, backward, calls and a stream for each, all at once; one of the callers has the team."""
    problem = Problem(cell, T=9, B=B, I=9, H=97, num_layers=2, lengths=True)
    drawn, layer = inputs(problem), layer_of(problem, "native")
    frozen = layer.freeze()

    def work(_: int) -> dict[str, Any]:
        y, _, tape = layer.forward(drawn.x, state_of(drawn.state), lengths=drawn.lengths)
        grads = layer.backward(tape, drawn.dy, state_of(drawn.dstate))
        stream = frozen.stream(B)
        steps = np.stack([stream.step(x_t) for x_t in drawn.x])
        called, _ = frozen(drawn.x, resets=np.zeros(drawn.x.shape[:2], bool))
        exact, _ = frozen(drawn.x)
        return {"y": y, "dx": grads.x, "steps": steps, "called": called, "exact": exact, **grads.parameters}

    expected = work(0)
    for name in ("steps", "exact"):
        assert_same({name: expected[name]}, {name: expected["called"]})
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(16)):
            assert_same(results, expected)


@pytest.mark.parametrize("H", [5, 97])
def test_eight_threads_fight_for_a_stream(H: int) -> None:
    """Some steps are refused; those that are not follow one another."""
    problem = Problem("lstm", T=9, B=9, I=9, H=H)
    x, frozen = inputs(problem).x, layer_of(problem, "native").freeze()
    stream = frozen.stream(9)

    def work(_: int) -> int:
        taken = 0
        for _ in range(20):
            try:
                stream.step(x[0])
                taken += 1
            except RuntimeError:
                pass
        return taken

    with ThreadPoolExecutor(8) as pool:
        taken = sum(pool.map(work, range(8)))
    alone = frozen.stream(9)
    for _ in range(taken):
        alone.step(x[0])
    for one, other in zip(stream.state, alone.state, strict=True):
        assert one.tobytes() == other.tobytes()


def test_eight_threads_share_a_tape() -> None:
    """Backward only reads it."""
    problem = Problem("lstm", T=9, B=9, I=9, H=33, **STACK)
    drawn, layer = inputs(problem), layer_of(problem, "native")
    _, _, tape = layer.forward(drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets, seed=3)
    expected = layer.backward(tape, drawn.dy)
    with ThreadPoolExecutor(8) as pool:
        for grads in pool.map(lambda _: layer.backward(tape, drawn.dy), range(16)):
            assert_same({"dx": grads.x, **grads.parameters}, {"dx": expected.x, **expected.parameters})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_child_computes_although_another_thread_has_the_team() -> None:
    """The child leaves the parent's team as it was at the fork, at work for a thread that the child has not got."""
    problem = Problem("gru", T=9, B=33, I=17, H=97)
    expected = everything(problem)
    busy, done = replace(problem, T=200), threading.Event()
    layer, x = layer_of(busy, "native"), inputs(busy).x

    def keep_busy() -> None:
        while not done.is_set():
            layer(x)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        for _ in range(3):
            time.sleep(0.01)
            child = forked()
            if child == 0:
                code = 1
                try:
                    assert_same(everything(problem), expected)
                    code = 0
                finally:
                    os._exit(code)
            assert exit_code(child) == 0
    finally:
        done.set()
        thread.join()


def forked() -> int:
    """`os.fork`, without the warning of Python 3.12 for a process with threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_child_refuses_a_stream_in_use_until_its_state_is_set() -> None:
    """The thread that was in a step is not there to end it."""
    problem = Problem("lstm", T=1, B=300, I=64, H=256)
    frozen, x, done = layer_of(problem, "native").freeze(), inputs(problem).x[0], threading.Event()
    stream, fresh = frozen.stream(300), frozen.stream(300)
    start = fresh.state
    expected = fresh.step(x).tobytes()

    def keep_busy() -> None:
        while not done.is_set():
            stream.step(x)

    def try_it() -> int:
        try:
            stream.step(x)
        except RuntimeError as error:
            stream.state = start
            return 0 if "forked" in str(error) and stream.step(x).tobytes() == expected else 1
        return 2  # it was between two steps

    thread = threading.Thread(target=keep_busy)
    thread.start()
    codes = []
    try:
        while 0 not in codes and len(codes) < 100:
            time.sleep(0.003)
            child = forked()
            if child == 0:
                code = 1
                try:
                    code = try_it()
                finally:
                    os._exit(code)
            codes.append(exit_code(child))
    finally:
        done.set()
        thread.join()
    assert set(codes) - {2} == {0}, codes


def exit_code(child: int) -> int | None:
    """Waits for a child; None if it hangs for a minute, and then it is ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        finished, status = os.waitpid(child, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None
