"""`memory_plan` and `explain`: what they promise is what a call takes."""

from __future__ import annotations

import copy
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends, limits, planning
from rnnkern.backends import numba_cuda
from rnnkern.cells import CELLS
from rnnkern.functional import SAVES
from rnnkern.planning import fitting_save

# Values that a step saves of an element of y; none where y itself is all that backward needs.
SAVED = {name: len(cell.saved) for name, cell in CELLS.items() if cell.saved != ("h",)}

ALIGNMENT = 64  # bytes that one piece of memory has more, so that what is in it may begin at a multiple

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The most threads of a call."""
    before = rk.num_threads()
    rk.set_num_threads(request.param)
    yield request.param
    rk.set_num_threads(before)


@contextmanager
def traced() -> Iterator[None]:
    """Allocations are counted from zero."""
    tracemalloc.start()
    try:
        yield
    finally:
        tracemalloc.stop()


def bytes_of_arrays() -> int:
    """What NumPy holds of all that was allocated since the tracing began."""
    traces = tracemalloc.take_snapshot().traces
    return sum(trace.size for trace in traces if trace.domain == np.lib.tracemalloc_domain)


def arrays(layer: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """x, and the gradient of y."""
    width = layer.forward(np.zeros(shape, layer.dtype))[0].shape[-1]
    return np.ones(shape, layer.dtype), np.ones((*shape[:-1], width), layer.dtype)


def peak_while_sampled(layer: Any, x: Any, dy: Any) -> int:
    """The most bytes of arrays that another thread saw, which looks all the time: kernels run without the GIL."""
    over, most = threading.Event(), 0

    def look() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, bytes_of_arrays())

    layer.release()
    with traced():
        looker = threading.Thread(target=look)
        looker.start()
        try:
            results = layer.forward(x)
            layer.backward(results[-1], dy)
        finally:
            over.set()
            looker.join()
    return most


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (rk.LSTM(8, 32, seed=0), (2_000, 16, 8)),
        (rk.LSTM(8, 32, num_layers=3, proj_size=5, bidirectional=True, seed=0), (500, 16, 8)),
        (rk.GRU(8, 33, num_layers=2, bias=False, dtype="float64", seed=0), (1_000, 16, 8)),
        (rk.RNN(8, 64, seed=0), (4_000, 16, 8)),
        (rk.GRU(200, 16, seed=0), (20_000, 200)),
    ],
    ids=repr,
)
def test_the_peak_is_that_of_numpys_domain(layer: Any, shape: tuple[int, ...]) -> None:
    """To the byte. Within a kernel no array comes or goes, so one look at it is exact."""
    x, dy = arrays(layer, shape)
    # Where the machine is busy, the other thread may get no turn during a kernel.
    peaks = [peak_while_sampled(layer, x, dy) for _ in range(3)]
    assert max(peaks) == rk.memory_plan(layer, shape).peak


# All of them are large beside what Python's objects take, a state too but for a single row.
OPTIONS: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    ({}, (100, 96, 64)),
    ({"bidirectional": True, "num_layers": 2}, (2_000, 64)),
    ({"batch_first": True}, (96, 100, 64)),
    ({"batch_first": True}, (1, 2_000, 64)),
    ({"batch_first": True, "bidirectional": True, "num_layers": 2}, (96, 50, 64)),
    ({"num_layers": 4, "dtype": "float64"}, (50, 96, 64)),
    ({"bias": False}, (50, 96, 64)),
    ({"hidden_size": 3}, (10, 2_000, 64)),
]


def held(layer: Any, x: Any, dy: Any, save: str = "gates") -> tuple[int, int, int]:
    """Bytes of arrays between the calls, and the tracer's peaks of forward and backward."""
    layer.release()
    with traced():
        results = layer.forward(x, save=save)
        forward, kept = tracemalloc.get_traced_memory()[1], bytes_of_arrays()
        tracemalloc.reset_peak()
        layer.backward(results[-1], dy)
        return kept, forward, tracemalloc.get_traced_memory()[1]


OBJECTS = 24_000  # bytes that Python allocates in a call, at most; 19,000 were seen


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("options", "shape"), OPTIONS, ids=repr)
def test_each_call_holds_what_is_planned(cell: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Between the calls to the byte; at the tracer's own peaks, which count Python's objects too, but for those."""
    layer = rk.Recurrent(cell, 64, seed=0, **{"hidden_size": 64} | options)
    x, dy = arrays(layer, shape)
    plan = rk.memory_plan(layer, shape)
    # The tracer counts all threads, and one of the test runner's may be busy: the least of three is the call's.
    kept, forward, backward = map(min, zip(*(held(layer, x, dy) for _ in range(3)), strict=True))
    assert kept == sum(plan.kept.values())
    assert 0 <= forward - sum(plan.forward.values()) < OBJECTS
    assert 0 <= backward - sum(plan.backward.values()) < OBJECTS
    assert plan.peak == max(sum(plan.forward.values()), sum(plan.backward.values()))


@pytest.mark.usefixtures("threads")
def test_each_way_to_save_holds_what_is_planned(cell: str) -> None:
    """Between the calls to the byte, and less with each; a budget of bytes finds the fastest that fits."""
    for bidirectional in (False, True):
        layer = rk.Recurrent(cell, 64, 64, num_layers=2, bidirectional=bidirectional, seed=0)
        steps, chains = (100, 4) if bidirectional else (400, 1)
        assert_each_way_holds_what_is_planned(layer, *arrays(layer, (steps, 24, 64)), chains)


def assert_each_way_holds_what_is_planned(layer: Any, x: Any, dy: Any, chains: int) -> None:
    """Python's objects come with each chain of `checkpoints`."""
    bytes_kept = []
    for save in SAVES:
        plan = rk.memory_plan(layer, x.shape, save=save)
        # The tracer counts all threads, and one of the test runner's may be busy: the least of three is the call's.
        kept, forward, backward = map(min, zip(*(held(layer, x, dy, save) for _ in range(3)), strict=True))
        assert kept == sum(plan.kept.values())
        assert 0 <= forward - sum(plan.forward.values()) < OBJECTS * chains
        assert 0 <= backward - sum(plan.backward.values()) < OBJECTS * chains
        bytes_kept.append(kept)
    for kept in bytes_kept:
        fits = [save for save, needed in zip(SAVES, bytes_kept, strict=True) if needed <= kept]
        assert fitting_save(layer, len(x), 24, True, kept) == fits[0]
    # Of two directions checkpoints have y of inner layers too, which is all that cells of one state leave as outputs.
    assert bytes_kept == sorted(bytes_kept, reverse=True) or (len(CELLS[layer.cell].states) == 1 and chains > 1)
    least = min(bytes_kept)
    assert layer.forward(x, save=least)[2].packed is not None
    with pytest.raises(ValueError, match=f"save: expected at least {least} bytes"):
        layer.forward(x, save=least - 1)


def test_a_layer_leaves_memory_to_its_next_call(cell: str) -> None:
    """As much as planned, none after `release`; another tape, a shorter call or a copy is not in its way."""
    layer = rk.Recurrent(cell, 64, 64, num_layers=2, seed=0)
    x, dy = arrays(layer, (100, 4, 64))
    layer.release()
    y, _, tape = layer.forward(x)
    other = layer.forward(2 * x)[-1]  # while the first tape is there
    expected = layer.backward(tape, dy).parameters
    del tape, other
    plan = rk.memory_plan(layer, x.shape)
    assert layer._reserve.nbytes == sum(plan.stays.values())
    copied = copy.deepcopy(layer)
    layer(x[:50])
    with traced():
        again, _, tape = layer.forward(x)
        assert bytes_of_arrays() == sum(plan.kept.values()) - sum(plan.stays.values())
    assert np.array_equal(again, y)
    for name, gradient in layer.backward(tape, dy).parameters.items():
        assert np.array_equal(gradient, expected[name])
    del tape
    layer.release()
    assert layer._reserve.nbytes == copied._reserve.nbytes == 0
    copied.release(for_good=True)
    for one in (copied, copy.deepcopy(copied)):
        assert np.array_equal(one(x)[0], y)
        assert not rk.memory_plan(one, x.shape).stays


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bidirectional", [False, True])
def test_what_is_kept_is_what_the_design_allows(cell: str, dtype: str, bidirectional: bool) -> None:
    """For each direction a few values for each element of y, packed weights of a copy for each pass, and states."""
    T, B, I, H = 100, 20, 32, 64
    layer = rk.Recurrent(cell, I, H, bidirectional=bidirectional, dtype=dtype, seed=0)
    kept = rk.memory_plan(layer, (T, B, I)).kept
    size, directions = np.dtype(dtype).itemsize, 1 + bidirectional
    assert kept["y"] == T * B * H * directions * size
    assert kept["saved values"] == (SAVED[cell] * kept["y"] + ALIGNMENT if cell in SAVED else 0)
    parameters = sum(array.nbytes for array in layer.parameters.values())
    assert kept["packed weights"] <= 2 * parameters + ALIGNMENT * directions
    assert kept["states"] == len(CELLS[cell].states) * directions * B * H * size
    assert sum(kept.values()) == kept["y"] + kept["saved values"] + kept["packed weights"] + kept["states"]


@pytest.mark.usefixtures("threads")
def test_scratch_is_small_and_does_not_grow_with_the_steps(cell: str, dtype: str) -> None:
    """Below 2 MiB or its cache for a thread, where the smallest block of backward takes a quarter of that at most."""
    native = backends.get("native").native_module()
    cache = max(2 << 20, native.private_cache() if native else 0)
    gates = len(CELLS[cell].gates) * (2 if CELLS[cell].separate_gates else 1)
    for H, batch in product((1, 4, 16, 32, 64, 96, 128, 192, 256), (1, 16, 300)):
        layer = rk.Recurrent(cell, 8, H, dtype=dtype, seed=0)
        short, long = (rk.explain(layer, (T, batch, 8), limits=MACHINE) for T in (100_000, 1_000_000))
        for call, longer in ((short.forward, long.forward), (short.backward, long.backward)):
            assert call.scratch == longer.scratch
            if max(batch, 256) * gates * H * layer.dtype.itemsize <= call.threads * cache // 4:
                assert call.scratch < call.threads * cache


STEPS = {cell: limits.Step(latency=1e-6, unit=0.0) for cell in CELLS}
CURVE = limits.Curve((1 << 14,), (1e10,))
MACHINE = limits.Limits("none", 2, 1e9, 1e-9, 1e-6, CURVE, CURVE, CURVE, STEPS, STEPS)


def test_an_explanation_says_what_a_call_does() -> None:
    """Its text has the figures of its fields; the limits are those of the benchmarks."""
    layer = rk.LSTM(64, 128, num_layers=2, seed=0)
    one = rk.explain(layer, (100, 32, 64), limits=MACHINE)
    work = limits.Work(layer._signature.stack, 100, 32)
    assert one.flops == limits.flops(work, False)
    assert one.limits == tuple(limits.limit(work, MACHINE, rk.num_threads(), both) for both in (False, True))
    assert not one.products
    of_engine = replace(MACHINE, bfloat16_flops=18e9)
    rates = (
        "products  GFLOP/s of a core at best: 1 by multiply-adds, 3 with arithmetic='amx', 18 with precision='bfloat16'"
    )
    assert rates in str(rk.explain(layer, (100, 32, 64), limits=of_engine))
    sliced = limits.Work(replace(work.stack, arithmetic="amx"), 100, 32)
    assert limits.limit(sliced, of_engine, 1, True).seconds < limits.limit(work, of_engine, 1, True).seconds
    of_float16 = replace(of_engine, float16=True)
    assert limits.limit(sliced, of_float16, 1, True).seconds < limits.limit(sliced, of_engine, 1, True).seconds
    assert one.memory == rk.memory_plan(layer, (100, 32, 64))
    assert str(one).startswith("LSTM(64, 128, num_layers=2), x (100, 32, 64)\nforward ")
    for figure in (one.forward.block_steps, one.backward.block_steps, one.weights, one.memory.peak):
        assert f"{figure:,}" in str(one)
    assert repr(one) == str(one)


def test_an_explanation_names_what_threads_divide() -> None:
    """Rows where there are enough, else units, or layers and directions; one thread divides nothing."""
    before = rk.num_threads()
    rk.set_num_threads(2)
    try:
        rows = rk.explain(rk.LSTM(256, 256, seed=0), (50, 64, 256), limits=MACHINE)
        units = rk.explain(rk.LSTM(256, 256, seed=0), (50, 1, 256), limits=MACHINE)
        both_ways = rk.explain(rk.LSTM(64, 64, bidirectional=True, seed=0), (100, 64), limits=MACHINE)
        one_after_the_other = rk.explain(rk.LSTM(64, 64, 2, seed=0), (100, 64), limits=MACHINE)
        alone = rk.explain(rk.LSTM(2, 2, seed=0), (1, 1, 2), limits=MACHINE)
        few_units = [rk.explain(rk.GRU(size, 2, seed=0), (9999, 4, size), limits=MACHINE) for size in (2, 80)]
        rk.set_num_threads(16)
        of_many = [
            str(rk.explain(rk.LSTM(size, size, seed=0), (50, batch, size), limits=MACHINE)).partition("backward")[0]
            for size, batch in ((64, 1), (512, 1), (128, 8), (128, 64))
        ]
        rk.set_num_threads(1)
        reasons = {
            name: rk.explain(layer, (T, 4, layer.input_size), limits=MACHINE)
            for name, layer, T in (
                ("all there are", rk.RNN(8, 8, seed=0), 4),
                ("the private cache;", rk.RNN(8, 8, seed=0), 1 << 20),
                ("W_ih", rk.LSTM(640, 640, seed=0), 512),
            )
        }
    finally:
        rk.set_num_threads(before)
    for name, explanation in reasons.items():
        assert name in str(explanation).partition("backward")[0]
    assert "the gradients of the weights" in str(reasons["W_ih"]).partition("backward")[2]
    assert "2 threads divide the rows;" in str(rows)
    assert "2 threads divide the units and meet at every step;" in str(units)
    expected = ["2 threads divide the units", "16 threads divide the units", *["8 threads divide", "16 threads divide"]]
    for text, found in zip(expected, of_many, strict=True):
        assert text in found
    for layers in (both_ways, one_after_the_other):
        assert str(layers).count("2 threads work on layers and directions side by side;") == 2
    assert "1 thread; blocks of 1 steps, all there are;" in str(alone)
    threads = [str(one).partition("backward")[2].split(" thread")[0].strip() for one in few_units]
    assert threads == ["1", "2"]  # helpers read what the other core has written: worth it where it is multiplied often


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_other_backends_estimate(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the compiled kernels; within a fifth of what the calls hold, and the texts say what it is."""
    if (reason := backends.get(backend).unavailable()) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(planning, "native_module", lambda: None)
    layer = rk.LSTM(24, 40, num_layers=2, bidirectional=True, backend=backend, seed=0)
    x, dy = arrays(layer, (100, 32, 24))
    layer.backward(layer.forward(x)[-1], dy)  # compiles
    layer.parameters["weight_hh_l0"][...] += 0  # packs anew
    explanation = rk.explain(layer, x.shape)
    plan = explanation.memory
    with traced():
        results = layer.forward(x)
        forward, kept = tracemalloc.get_traced_memory()[1], bytes_of_arrays()
        tracemalloc.reset_peak()
        layer.backward(results[-1], dy)
        backward = tracemalloc.get_traced_memory()[1]
    for estimate, held in ((plan.forward, forward), (plan.kept, kept), (plan.backward, backward)):
        assert abs(sum(estimate.values()) - held) < held / 5
    assert explanation.forward.threads == explanation.backward.threads == 1
    assert str(plan).startswith("bytes, estimated ")
    assert "\nmemory    about " in str(explanation)
    assert "limit     not known: the compiled kernels measure the machine, and they are missing" in str(explanation)


def test_a_backend_on_a_device_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the way out."""
    monkeypatch.setattr(numba_cuda, "unavailable", lambda: None)
    layer = rk.LSTM(3, 4, backend="numba_cuda", seed=0)
    with pytest.raises(ValueError, match=r"layer: expected a backend on the CPU, got 'numba_cuda', .* backend='auto'"):
        rk.memory_plan(layer, (5, 2, 3))
    with pytest.raises(ValueError, match=r"save: expected 'gates', .* with the backend 'numba_cuda', .* got 100"):
        layer.forward(np.zeros((5, 2, 3), np.float32), save=100)


def test_the_machine_is_measured_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With a word on stderr; and where that fails, the explanation says why and has the rest."""
    measured: list[int] = []

    def measure(threads: int) -> limits.Limits:
        measured.append(threads)
        if len(measured) == 1:
            raise RuntimeError("other programs kept a core busy")
        return replace(MACHINE, cores=threads)

    monkeypatch.setattr(planning, "measure", measure)
    planning._measured.cache_clear()
    layer = rk.RNN(3, 4, seed=0)
    try:
        assert "limit     not known: other programs kept a core busy" in str(rk.explain(layer, (5, 3)))
        assert [rk.explain(layer, (5, 3)).limits is None for _ in range(3)] == [False] * 3
    finally:
        planning._measured.cache_clear()
    assert len(measured) == 2
    assert capsys.readouterr().err.count("some ten seconds to measure this machine") == 2


def test_wrong_questions_are_refused() -> None:
    """The message names the argument."""
    layer = rk.LSTM(3, 4, seed=0)
    wrong: list[tuple[Any, Any, type[Exception], str]] = [
        (layer, (5, 2, 4), ValueError, r"shape: expected \(T, B, 3\) or \(T, 3\), got \(5, 2, 4\)"),
        (layer, (5, 2, 2, 3), ValueError, "shape: expected .* got 4 dimensions"),
        (layer, (0, 2, 3), ValueError, r"shape\[0\]: expected an integer from 1 to .*, got 0"),
        (layer, (5, 2.0, 3), TypeError, r"shape\[1\]: expected an integer from 1 to .*, got float 2.0"),
        (layer, "tbi", TypeError, "shape: expected .* got str 'tbi'"),
        (layer, (2**40, 2**22, 3), ValueError, "sizes: their product exceeds 2"),
        (layer, (2**70, 2, 3), ValueError, r"shape\[0\]: expected an integer from 1 to 9223372036854775807"),
        (layer.freeze(), (5, 2, 3), TypeError, "layer: expected an RNN, LSTM, GRU or Recurrent, got Frozen"),
    ]
    for which, shape, error, message in wrong:
        for ask in (rk.memory_plan, rk.explain):
            with pytest.raises(error, match=message):
                ask(which, shape)
    with pytest.raises(TypeError, match="limits: expected None or what"):
        rk.explain(layer, (5, 2, 3), limits=3)  # type: ignore[arg-type]
