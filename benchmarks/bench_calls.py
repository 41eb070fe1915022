"""What a call costs beside its kernel: one step of 16 units, of a frozen layer and of a stream; checked, then timed."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, inputs, layer_of, named_states, state_of


@pytest.mark.parametrize("cell", CELLS)
def bench_frozen_call(benchmark: BenchmarkFixture, cell: str) -> None:
    """`frozen(x, state)`."""
    problem = Problem(cell, T=1, B=1, I=16, H=16)
    x, state, frozen = inputs(problem).x, state_of(inputs(problem).state), layer_of(problem).freeze()
    y, final = frozen(x, state)
    assert_accurate(problem, {"y": y} | named_states(problem, final))
    benchmark.group = "frozen(x, state)"
    benchmark(frozen, x, state)


@pytest.mark.parametrize("cell", CELLS)
def bench_stream_step(benchmark: BenchmarkFixture, cell: str) -> None:
    """`stream.step(x_t, out)`."""
    problem = Problem(cell, T=1, B=1, I=16, H=16)
    x, stream = inputs(problem).x, layer_of(problem).freeze().stream()
    stream.state = state_of(inputs(problem).state)
    out = np.empty((1, 16), np.float32)
    stream.step(x[0], out)
    assert_accurate(problem, {"y": out[None]} | named_states(problem, stream.state))
    benchmark.group = "stream.step(x_t, out)"
    benchmark(stream.step, x[0], out)
