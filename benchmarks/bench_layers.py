"""Forward, and forward with backward, of a few workloads on every peer; each result is checked before it is timed."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from rnnkern import config
from rnnkern.bench.peers import OF_BFLOAT16, PEERS, Missing
from rnnkern.bench.workloads import SMALL, Workload, assert_right, numbers

LEFT_OUT = ("numba_cuda", "torch_cudnn", "torch_compile")  # two want a GPU, the other compiles for minutes
NAMES = [name for name in PEERS if name not in (*LEFT_OUT, *OF_BFLOAT16)]


@pytest.mark.parametrize("training", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("peer", NAMES)
@pytest.mark.parametrize("workload", SMALL.values(), ids=SMALL.keys())
def bench_layer(benchmark: BenchmarkFixture, workload: Workload, peer: str, training: bool) -> None:
    """A whole call with all threads: inference on frozen weights, or one training step without the optimiser."""
    threads = config.num_threads()
    try:
        prepared = PEERS[peer](workload, threads)
    except Missing as reason:
        pytest.skip(str(reason))
    if training and not prepared.trains:
        pytest.skip(f"{peer} has no training")
    given = numbers(workload)
    results = prepared.results(prepared.run(prepared.place(given.dy_checked) if training else None))
    assert_right(workload, results, prepared.eps)
    benchmark.group = f"{workload.name} {'forward_backward' if training else 'forward'}"
    isa = config.show_config(mode="dicts")["isa"]
    benchmark.extra_info.update(peer=peer, threads=threads, isa=isa, settings=prepared.settings)
    benchmark(prepared.run, prepared.place(given.dy) if training else None)
