"""What `rnnkern bench` does not measure of the speed goals: calls of one step, long calls of one row, float64 against
float32, and calls beside a process that keeps a core busy. Prints Markdown; about four minutes on two cores.

    python lab/2026_11_23_goals.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

import rnnkern as rk
from rnnkern.bench.workloads import WORKLOADS, Workload

CALLS, FEWEST_SECONDS = 21, 0.2


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def samples(call: Callable[[], object], count: int = CALLS) -> list[float]:
    call()
    return [seconds(call) for _ in range(count)]


def median_in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Of at least CALLS calls each, in turns, so that a change of the machine's speed hits both."""
    count = max(CALLS, int(FEWEST_SECONDS / (seconds(first) + seconds(second))))
    pairs = [(seconds(first), seconds(second)) for _ in range(min(count, 500))]
    return tuple(np.median(pairs, axis=0))


def training(workload: Workload, dtype: str = "float32") -> Callable[[], object]:
    layer = rk.Recurrent(
        workload.cell, workload.I, workload.H, workload.layers,
        bidirectional=workload.directions == 2, dtype=dtype, backend="native", seed=0,
    )  # fmt: skip
    draw = np.random.default_rng(0).normal
    x = draw(size=(workload.T, workload.B, workload.I)).astype(dtype)
    dy = draw(size=(workload.T, workload.B, workload.H * workload.directions)).astype(dtype)

    def call() -> object:
        _, _, tape = layer.forward(x)
        return layer.backward(tape, dy)

    return call


def heading(text: str, *columns: str) -> None:
    print(f"\n## {text}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)


def calls_of_one_step() -> None:
    heading("One step, one row, H = 16, from Python", "cell", "frozen call, us", "stream step with out=, us")
    for cell in ("lstm", "gru"):
        frozen = rk.Recurrent(cell, 16, 16, seed=0, backend="native").freeze()
        x, out, stream = np.zeros((1, 1, 16), np.float32), np.empty((1, 16), np.float32), frozen.stream()
        whole = samples(lambda f=frozen, x=x: f(x), 5000)
        step = samples(lambda s=stream, x=x[0], out=out: s.step(x, out), 5000)
        print(f"| {cell} | {np.median(whole) * 1e6:.2f} | {np.median(step) * 1e6:.2f} |")


def long_calls() -> None:
    heading(
        "A frozen call of 20,000 steps, one row, one input, one thread: ns a step", "cell", "H", "median", "fastest"
    )
    x = np.random.default_rng(0).normal(size=(20_000, 1, 1)).astype(np.float32)
    for cell in ("lstm", "gru"):
        for hidden in (16, 32, 64):
            frozen = rk.Recurrent(cell, 1, hidden, seed=0, backend="native").freeze()
            taken = np.array(samples(lambda f=frozen: f(x), 60)) / 20_000 * 1e9
            print(f"| {cell} | {hidden} | {np.median(taken):.0f} | {taken.min():.0f} |")


def float64() -> None:
    heading("Forward and backward, one thread", "workload", "float32, ms", "float64, ms", "ratio")
    ratios = []
    for workload in WORKLOADS.values():
        single, double = median_in_turns(training(workload), training(workload, "float64"))
        ratios.append(single / double)
        print(f"| {workload.name} | {single * 1e3:.2f} | {double * 1e3:.2f} | {ratios[-1]:.2f} |", flush=True)
    print(f"\ngeometric mean {np.exp(np.mean(np.log(ratios))):.2f}, lowest {min(ratios):.2f}")


@contextmanager
def busy_core() -> Iterator[None]:
    core = str(max(os.sched_getaffinity(0)))
    process = subprocess.Popen(["taskset", "-c", core, sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def beside_a_busy_core() -> None:
    heading(
        f"All threads beside a busy core, {CALLS} calls of forward and backward, against one thread on free cores",
        "workload", "one thread, ms", "median", "95th percentile",
    )  # fmt: skip
    threads = rk.num_threads()
    for workload in WORKLOADS.values():
        call = training(workload)
        rk.set_num_threads(1)
        alone = np.median(samples(call))
        rk.set_num_threads(threads)
        with busy_core():
            time.sleep(0.05)
            beside = np.array(samples(call)) / alone
        print(
            f"| {workload.name} | {alone * 1e3:.2f} | {np.median(beside):.2f}x | {np.quantile(beside, 0.95):.2f}x |",
            flush=True,
        )


if __name__ == "__main__":
    print(f"{rk.num_threads()} threads, NumPy {np.__version__}")
    calls_of_one_step()
    long_calls()
    rk_threads = rk.num_threads()
    rk.set_num_threads(1)
    float64()
    rk.set_num_threads(rk_threads)
    beside_a_busy_core()
