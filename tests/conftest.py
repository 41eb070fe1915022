"""Fixtures drawn from the registries: every cell, every backend, every ISA of the machine."""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported; products are small, waiting is not
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # read when JAX is imported; where it has a GPU it would run there
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "2")  # read with it; what is shared out among devices needs some
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # read when SciPy is imported; scikit-learn skips a check without it

import gc
import heapq
import random
from collections import defaultdict
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rnnkern import backends, config
from rnnkern.cells import CELLS

pytest.register_assert_rewrite("onnx_models", "results", "torch_modules")  # which several files of tests share

# The native backend once on each ISA of the machine. A device backend joins where there is a device; the simulator runs
# in a process and with tests of its own.
NATIVE: list[tuple[str, str | None]] = [("native", isa) for isa in config.isas()] or [("native", None)]
ON_DEVICES = ("numba_cuda",)
BACKENDS = NATIVE + [
    (name, None)
    for name in backends.ORDER
    if name != "native" and (name not in ON_DEVICES or backends.get(name).unavailable() is None)
]


def label(backend: tuple[str, str | None]) -> str:
    """The name of a backend and its ISA in the name of a test."""
    return "-".join(filter(None, backend))


def running(backend: tuple[str, str | None]) -> Iterator[str]:
    """The name of a backend while it runs on its ISA; skips where it cannot run."""
    name, isa = backend
    reason = backends.get(name).unavailable()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with nullcontext() if isa is None else config.use_isa(isa):
        yield name


@pytest.fixture(params=BACKENDS, ids=label)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of every backend; native once on each ISA."""
    yield from running(request.param)


@pytest.fixture(params=NATIVE, ids=label)
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """The native backend on each ISA, for what only it promises."""
    yield from running(request.param)


@pytest.fixture(params=list(CELLS))
def cell(request: pytest.FixtureRequest) -> str:
    """The name of every cell."""
    return str(request.param)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Both dtypes."""
    return str(request.param)


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """PyTorch on one thread; skips where it is not installed."""
    module: ModuleType = pytest.importorskip("torch", reason="PyTorch is not installed")
    module.set_num_threads(1)
    return module


@pytest.fixture(scope="session")
def runtime() -> ModuleType:
    """ONNX Runtime; skips where it is not installed."""
    module: ModuleType = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return module


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is compiled at first use is compiled once for all tests, and the user's own is left alone."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RNNKERN_CACHE_DIR", str(folder))
        yield folder


def pytest_configure(config: pytest.Config) -> None:
    """Tests that name no backend run on the best there is."""
    config.addinivalue_line("filterwarnings", "ignore:rnnkern runs on the backend")


# What comes round, alone or listed with more: each value is in some test of a grid. All else is a test's own.
COMES_ROUND = {"cell", "backend", "native", "dtype", "layout"}

# Numba takes half a second to compile a cell in a dtype: one of each shape of a step comes in float32, one in both.
COMPILED, COMPILED_IN_BOTH = ("rnn_tanh", "lstm", "gru", "gru_reset_before"), "lstm"


def compiles_much(item: pytest.Item) -> bool:
    """Would the test alone have Numba compile its cell in its dtype, float64 where it does not say?"""
    params = item.callspec.params
    cell = params.get("cell", COMPILED_IN_BOTH)
    compiled = cell == COMPILED_IN_BOTH or (params.get("dtype") == "float32" and cell in COMPILED)
    return params.get("backend") == ("numba", None) and not compiled


def shown(item: pytest.Item) -> set[frozenset[Any]]:
    """What a test of a grid shows: each value of its parameters, and each pair of values of its own ones."""
    params, names = item.callspec.params, {name: (name,) for name in item.callspec.params}
    for marker in item.iter_markers("parametrize"):  # what is listed together is one value
        listed = marker.args[0]
        together = tuple(name.strip() for name in listed.split(",")) if isinstance(listed, str) else tuple(listed)
        names |= dict.fromkeys(together, together)
    values = {group: (group, *(id(params[name]) for name in group)) for group in names.values()}
    own = [value for group, value in values.items() if COMES_ROUND.isdisjoint(group)]
    return {frozenset({value}) for value in values.values()} | {frozenset(pair) for pair in combinations(own, 2)}


def few(grid: list[pytest.Item]) -> set[pytest.Item]:
    """Of the tests of one function, few that show all that any shows; its name draws which cell meets which backend."""
    order = random.Random(grid[0].originalname).sample(range(len(grid)), len(grid))
    each = [shown(item) for item in grid]
    missing = set().union(*each)
    gains = [(-len(each[i]), place, i) for place, i in enumerate(order)]
    heapq.heapify(gains)
    chosen = set()
    while missing:
        _, place, i = heapq.heappop(gains)
        gain = len(each[i] & missing)
        if gains and gain < -gains[0][0]:  # others have shown some of it meanwhile
            heapq.heappush(gains, (-gain, place, i))
            continue
        chosen.add(grid[i])
        missing -= each[i]
    return chosen


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what a grid of parameters has beyond few of its tests: `-m exhaustive`. Faults of kernels show first."""
    items.sort(key=lambda item: item.path.name != "test_kernels.py")
    grids = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec"):
            grids[item.path, item.originalname].append(item)
    for grid in grids.values():
        quick = [item for item in grid if not compiles_much(item)]
        chosen = few(quick or grid)
        for item in grid:
            if item not in chosen:
                item.add_marker(pytest.mark.exhaustive)


def pytest_collection_finish() -> None:
    """Modules and tests live to the end: the collector of garbage need not walk a million objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With CI set, a skip is a failure, so that nothing is left out unseen; devices are not to be had everywhere."""
    report = yield
    on_device = any(item.get_closest_marker(name) for name in ("gpu", "engine"))
    if os.environ.get("CI") and report.skipped and call.excinfo is not None and not on_device:
        reason = call.excinfo.value
        if isinstance(reason, pytest.skip.Exception):
            report.outcome = "failed"
            report.longrepr = f"skipped, which CI does not allow: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a whole module, which `importorskip` at its top leaves out where a framework is missing."""
    report = yield
    if os.environ.get("CI") and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"{collector.nodeid} is skipped, which CI does not allow"
    return report
