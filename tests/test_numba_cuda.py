"""The CUDA kernels of Numba: in the simulator, which needs a process of its own, and on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, infer, run

EVERYTHING: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True, "dropout": 0.4}
PROBLEMS = [
    problem
    for cell in CELLS
    for problem in (
        Problem(cell, T=3, B=2, I=2, H=3),
        Problem(cell, T=2, B=2, I=3, H=2, dtype="float64", bias=False, lengths=True, loss="final"),
        Problem(cell, T=2, B=2, I=1, H=2, dtype="float64", **EVERYTHING),
        Problem(cell, T=3, B=1, I=2, H=5, resets=True, loss="steps"),
        Problem(cell, T=2, B=2, I=2, H=2, poison="nan"),
        Problem(cell, T=2, B=1, I=2, H=2, scale=1e4),
        Problem(cell, T=0, B=2, I=2, H=3, num_layers=2),
        Problem(cell, T=2, B=0, I=2, H=3, bidirectional=True),
    )
] + [
    Problem(cell, T=2, B=2, I=2, H=3, dtype=dtype, proj_size=2, **options)
    for cell in CELLS
    if CELLS[cell].projects
    for dtype, options in (("float32", {"lengths": True}), ("float64", EVERYTHING))
]


def check_layers(problems: list[Problem]) -> None:
    """Outputs, states and gradients of every problem."""
    for problem in problems:
        assert_accurate(problem, run(problem, "numba_cuda"))
    for problem in problems[:2]:
        assert_accurate(problem, infer(problem, "numba_cuda"))


def check_linear(dtype: str) -> None:
    """The output layer; with integers every product is exact."""
    device = backends.get("numba_cuda")
    generator = np.random.default_rng(0)
    x, weight, bias, dy = (generator.integers(-9, 9, shape).astype(dtype) for shape in ((4, 3), (2, 3), (2,), (4, 2)))
    y = np.empty_like(dy)
    device.linear_forward(x, weight, bias, y)
    np.testing.assert_array_equal(y, x @ weight.T + bias)
    device.linear_forward(x, weight, None, y)
    np.testing.assert_array_equal(y, x @ weight.T)
    for given, expected in zip(
        device.linear_backward(x, weight, dy, True), (dy @ weight, dy.T @ x, dy.sum(0)), strict=True
    ):
        np.testing.assert_array_equal(given, expected)
    assert device.linear_backward(x, weight, dy, False)[0] is None


def main() -> None:
    """What the simulator is to run."""
    assert backends.get("numba_cuda").unavailable() is None
    sys.setswitchinterval(1e-5)  # seconds: the simulator polls its threads, which wait for the interpreter meanwhile
    check_layers(PROBLEMS)
    for dtype in ("float32", "float64"):
        check_linear(dtype)


def test_every_cell_and_option_in_the_simulator():
    """Every cell and option at small sizes agrees with the reference in Numba's CUDA simulator."""
    pytest.importorskip("numba", reason="Numba is not installed")
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["numba", "numba_cuda"])
def test_what_numba_warns_of_while_it_is_imported_is_no_error(name, tmp_path):
    """As of a newer NumPy, in a process whose warnings are errors: whether a backend can run is answered."""
    (tmp_path / "numba").mkdir()
    for file in ("__init__", "cuda"):
        (tmp_path / "numba" / f"{file}.py").write_text(
            "import warnings\nwarnings.warn('a newer NumPy', DeprecationWarning)\nis_available = lambda: True\n"
        )
    program = (
        "import sys\nsys.meta_path[:] = [one for one in sys.meta_path if 'numba_cuda' not in type(one).__module__]\n"
        f"from rnnkern import backends\nassert backends.get({name!r}).unavailable() is None"
    )  # without numba-cuda's own way to put itself in place of numba.cuda
    path = os.pathsep.join([str(tmp_path), str(Path(rk.__file__).parents[1])])
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", program], env=os.environ | {"PYTHONPATH": path},
        check=True,
    )  # fmt: skip


@pytest.mark.gpu
def test_every_cell_and_option_on_a_gpu():
    """The same on a GPU, at sizes of more than one block of threads too."""
    reason = backends.get("numba_cuda").unavailable()
    if reason is not None:
        pytest.skip(reason)
    check_layers(PROBLEMS + [replace(problem, T=7, B=33, H=70) for problem in PROBLEMS if problem.T * problem.B])
    for dtype in ("float32", "float64"):
        check_linear(dtype)


if __name__ == "__main__":
    main()
