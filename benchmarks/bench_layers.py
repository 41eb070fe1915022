"""Forward, and forward with backward, of every workload on every peer; each result is checked before it is timed."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from rnnkern import config
from rnnkern.bench.peers import PEERS, Missing
from rnnkern.bench.workloads import WORKLOADS
from rnnkern.testing import assert_accurate

SLOW = ("numba_cuda",)  # in the simulator; on a GPU its tests time it


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("peer", [name for name in PEERS if name not in SLOW])
@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS.keys())
def bench_layer(benchmark: BenchmarkFixture, workload, peer, training) -> None:  # type: ignore[no-untyped-def]
    """A whole call with all threads: inference on frozen weights, or one training step without the optimiser."""
    threads = config.num_threads()
    try:
        run = PEERS[peer](workload, threads)
    except Missing as reason:
        pytest.skip(str(reason))
    problem = workload.problem
    assert_accurate(problem, run(training))
    benchmark.group = f"{workload.name} {'forward_backward' if training else 'forward'}"
    benchmark.extra_info.update(peer=peer, threads=threads, isa=config.show_config(mode="dicts")["isa"])
    benchmark(run, training)
