"""A step is the list of phases that a cell declares: cells made of phases that the package's own do not use.

`phases.cpp` has a cell with a layer norm inside its step and one without a recurrent product, and runs them through the
loops of the kernels. Here the same cells stand as plain loops, whose derivatives are complex steps.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rnnkern.testing import assert_within_rounding

ROOT = Path(__file__).parents[1]
T, B, I = 5, 4, 3
NAMES = ("x", "initial", "w_ih", "w_hh", "b_ih", "b_hh", "gain", "shift")

Arrays = dict[str, Any]


def _norm(x: Any, h: Any, given: Arrays, moved: Callable[[Any], Any]) -> Any:
    """The layer norm of the sum, and tanh of it."""
    a = x + h @ given["w_hh"].T + given["b_hh"]
    mean = a.mean(-1, keepdims=True)
    n = (a - mean) / np.sqrt((a * a).mean(-1, keepdims=True) - mean * mean + 1e-5)
    return moved(np.tanh(given["gain"] * moved(n) + given["shift"]))


def _min_gru(x: Any, h: Any, _: Arrays, moved: Callable[[Any], Any]) -> Any:
    z, n = moved(1 / (1 + np.exp(-x[:, : h.shape[1]]))), moved(np.tanh(x[:, h.shape[1] :]))
    return (1 - z) * h + z * n


CELLS = {"norm_rnn": (0, 1, _norm), "min_gru": (1, 2, _min_gru)}


def _forward(step: Any, given: Arrays, rows: Arrays, moved: Callable[[Any], Any]) -> tuple[Any, Any]:
    """y and the final state of a plain loop over time."""
    h, lengths = given["initial"], rows["lengths"]
    y = [h] * T
    for t in reversed(range(T)) if rows["reverse"] else range(T):
        link = t + 1 if rows["reverse"] else t
        cut = rows["resets"][link] & (link < lengths) if link < T else np.zeros(B, bool)
        active = (t < lengths)[:, None]
        x = given["x"][t] @ given["w_ih"].T + given["b_ih"]
        h = np.where(active, step(x, np.where(cut[:, None] & active, 0, h), given, moved), h)
        y[t] = np.where(active, h, 0)
    return np.array(y), h


def _results(step: Any, given: Arrays, rows: Arrays, dtype: Any, seed: int | None = None) -> Arrays:
    """Outputs, and gradients by complex steps, computed in a dtype; with a seed functions are moved by up to 2 ulp."""
    drawn, tiny = np.random.default_rng(seed), 1e-100

    def moved(a: Any) -> Any:
        return a if seed is None else a * (1 + (drawn.uniform(-2, 2, a.shape) * np.finfo(dtype).eps).astype(dtype))

    cast = {name: array.astype(dtype) for name, array in given.items()}
    y, last = _forward(step, cast, rows, moved)
    results = {"y": y, "last": last}
    for name in NAMES:
        gradient = results["d" + name] = np.zeros(cast[name].shape, dtype)
        for index in np.ndindex(gradient.shape):
            changed = cast[name].astype(np.result_type(dtype, np.complex64))
            changed[index] += tiny * 1j
            y, last = _forward(step, cast | {name: changed}, rows, moved)
            gradient[index] = ((y.imag * cast["dy"]).sum() + (last.imag * cast["dlast"]).sum()) / tiny
    return results


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The functions of phases.cpp, with the widest vectors of this machine."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not installed")
    module = tmp_path_factory.mktemp("phases") / "phases.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-march=native", "-ffp-contract=off", "-Wno-psabi"]
    source = str(ROOT / "tests" / "phases.cpp")
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", str(module)], check=True)
    return ctypes.CDLL(str(module))


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("H", [5, 21])
@pytest.mark.parametrize("cell", CELLS)
def test_cells_of_other_phases_have_their_outputs_and_gradients(phases: Any, cell: str, H: int, reverse: bool) -> None:
    """Among threads that share the units as alone, to the bit; with rows that end early and resets."""
    number, gates, step = CELLS[cell]
    drawn = np.random.default_rng(H)
    shapes = {"x": (T, B, I), "initial": (B, H), "w_ih": (gates * H, I), "w_hh": (gates * H, H)}
    shapes |= dict.fromkeys(("b_ih", "b_hh"), (gates * H,)) | dict.fromkeys(("gain", "shift"), (H,))
    given = {name: drawn.uniform(-1, 1, shape) for name, shape in shapes.items()}
    given |= {"dy": drawn.standard_normal((T, B, H)), "dlast": drawn.standard_normal((B, H))}
    rows = {
        "lengths": np.array([T, 3, 0, 4]),
        "resets": drawn.uniform(size=(T, B)) < 0.3,
        "reverse": reverse,
    }
    tested = []
    for threads in (1, 2):
        results = {"y": np.full((T, B, H), np.nan), "last": np.full((B, H), np.nan)}
        results |= {"d" + name: np.full(shapes[name], np.nan if name in ("x", "initial") else 0.0) for name in NAMES}
        arrays = [np.ascontiguousarray(array) for array in given.values()]
        pointers = [array.ctypes.data for array in (*arrays, *results.values())]
        phases.run(
            number, (ctypes.c_int64 * 4)(T, B, I, H), (ctypes.c_void_p * len(pointers))(*pointers),
            rows["lengths"].ctypes.data_as(ctypes.c_void_p), rows["resets"].ctypes.data_as(ctypes.c_void_p),
            ctypes.c_bool(reverse), threads,
        )  # fmt: skip
        tested.append(results)
    exact = _results(step, given, rows, np.longdouble)
    naive = [_results(step, given, rows, np.float64, seed) for seed in range(4)]
    for name, array in tested[0].items():
        assert np.array_equal(array, tested[1][name]), name
        assert_within_rounding(name, array, exact[name], [one[name] for one in naive], (cell, H, reverse))


def test_each_row_is_one_threads_whatever_the_lengths(phases: Any) -> None:
    """In whole vectors of rows, where there are fewer of those than threads and where some have no step left too."""
    drawn = np.random.default_rng(0)
    for B, grain, threads in ((5, 8, 4), (20, 8, 3), (20, 16, 8), (7, 1, 3), (3, 1, 8), (33, 4, 5)):
        for first, last in ((0, T), (2, 4), (T - 1, T)):
            lengths = np.where(drawn.random(B) < 0.5, drawn.integers(0, T + 1, B), 0)
            lengths[0] = max(lengths[0], 1)
            bounds = np.zeros((threads, 2), np.int64)
            phases.divide_rows(
                lengths.ctypes.data_as(ctypes.c_void_p), *(ctypes.c_int64(one) for one in (lengths.max(), B, grain)),
                *(ctypes.c_int64(min(one, lengths.max())) for one in (first, last)), threads,
                bounds.ctypes.data_as(ctypes.c_void_p),
            )  # fmt: skip
            vectors = [one for begin, end in bounds for one in range(begin // grain, -(-end // grain))]
            assert vectors == list(range(-(-B // grain))), (B, grain, threads, first, last, lengths, bounds)


# A text of phases.cpp, what takes its place, and what the compiler says.
BROKEN_LAWS = {
    "reads a gate that is of no phase before": ("tanh(x[1])", "tanh(x[2])", "not_there_for_this_phase"),
    "saves a value in no slot": ("n = saved[1] = tanh", "n = saved[2] = tanh", "not_there_for_this_phase"),
    "reads h before a step with a projection": (
        "Phases<Each<2, MinGru>>", "Phases<Each<2, MinGru>, Projection>", "not_there_for_this_phase",
    ),
    "leaves a gate without a phase": ("Each<2, MinGru>", "Each<1, MinGru>", "each gate belongs to a phase"),
    "keeps a state in no slot": (
        "gates = 2, states = 1, saved = 2;", "gates = 2, states = 2, saved = 2, kept[] = {kInOutput, 2};", "in a slot",
    ),
    "takes h in a later phase": ("Means<2, Normalized>", "Product<From::h, 0, Normalized>", "takes h or nothing"),
}  # fmt: skip


@pytest.mark.parametrize("law", BROKEN_LAWS)
def test_a_cell_that_breaks_a_law_does_not_compile(law: str, tmp_path: Path) -> None:
    """What a part may read and write, and what the loops rely on, is checked before anything runs."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not installed")
    before, after, message = BROKEN_LAWS[law]
    text = (ROOT / "tests" / "phases.cpp").read_text(encoding="utf-8")
    assert text.count(before) == 1
    source = tmp_path / "phases.cpp"
    source.write_text(text.replace(before, after), encoding="utf-8")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-psabi", f"-I{ROOT / 'csrc'}", str(source)]
    compiled = subprocess.run(command, check=False, capture_output=True, text=True)
    assert compiled.returncode != 0
    assert message in compiled.stderr
