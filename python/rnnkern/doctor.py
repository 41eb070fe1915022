"""`rnnkern doctor`: what this installation is made of, and a short test of every backend that can run."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from . import __version__, backends, testing
from .cells import CELLS
from .config import show_config

__all__ = ["run"]

BUILD_FAILURE = Path(__file__).with_name("_build_failure.txt")  # written by a build whose compile failed
FAILURE_LINES = 12
TEST_SECONDS = 1.0  # no further cell is tested after that


def run(asked: str, say: Callable[[str], object]) -> int:
    """Print the report with `say`; 1 where a self-test fails or the backend `asked` for by name is unusable."""
    config = show_config(mode="dicts")
    say(f"rnnkern      {__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    say(f"platform     {platform.platform()}")
    say(f"compiler     {config['compiler'] or 'none: the kernels are not compiled'}")
    in_use = (config["isa"] or "none") + ", with bfloat16" * config["bfloat16"]
    if config["engine"] not in (None, "none", "pairs"):
        in_use += f", matrix engine {config['engine']}"
    say(f"ISAs         built: {', '.join(config['isas_built']) or 'none'}; in use: {in_use}")
    say(f"threads      {config['threads_now']}")
    say(f"optional     {', '.join(name for name, present in config['optional'].items() if present) or 'none'}")
    if BUILD_FAILURE.exists():
        say("build        the kernels did not compile; the last lines were")
        for line in BUILD_FAILURE.read_text(encoding="utf-8", errors="replace").splitlines()[-FAILURE_LINES:]:
            say(f"             | {line}")
    unusable, wrong = {}, {}
    for name, reason in config["backends"].items():
        if reason is not None:
            unusable[name] = reason
            say(f"{name:<12} unavailable: {reason}")
            continue
        try:
            verdict = self_test(name)
        except Exception as error:  # whatever a backend raises is the finding of its test
            wrong[name] = f"{type(error).__name__}: {error}"
            say(f"{name:<12} FAILED: {wrong[name]}")
        else:
            say(f"{name:<12} works: {verdict}")
    if asked != "auto" and asked not in backends.backend_names():
        say(f"backend {asked!r} was asked for, and there is none of that name")
        return 1
    if asked in unusable or asked in wrong:
        say(f"backend {asked!r} was asked for and is unusable")
        return 1
    return 1 if wrong else 0


def self_test(backend: str) -> str:
    """Forward and backward of one cell after another, held to the accuracy rule; AssertionError where one fails."""
    start, largest, tested = time.perf_counter(), 0.0, 0
    for cell in CELLS:
        # The simulator of the CUDA backend takes seconds for more than this.
        problem = testing.Problem(cell, T=3, B=2, I=4, H=5, num_layers=2)
        largest = max(largest, testing.assert_accurate(problem, testing.run(problem, backend)))
        tested += 1
        if time.perf_counter() - start > TEST_SECONDS:
            break
    seconds = time.perf_counter() - start
    cells = f"{tested} of {len(CELLS)} cells"
    return f"forward and backward of {cells}, errors up to {largest:.0%} of the bound, {seconds:.2f} s"
