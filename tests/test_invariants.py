"""What holds bit for bit with the native backend, and how layers behave under threads, fork and hard numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import backends, config, cores
from rnnkern.cells import CELLS
from rnnkern.functional import SAVES
from rnnkern.testing import Problem, assert_accurate, infer, inputs, layer_of, run, state_of

STACKS = {
    "plain": {},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
}


def same(results, expected):
    """Equal bits, by name."""
    assert set(results) == set(expected)
    for name, array in results.items():
        assert np.array_equal(array, expected[name], equal_nan=True), name


def as_results(cell, y, state):
    """y and a state by their names."""
    return {"y": y} | dict(zip(CELLS[cell].states, state if isinstance(state, tuple) else (state,), strict=True))


def run_rows(problem, backend, chosen):
    """A problem's layer on some rows of its batch: everything that belongs to rows."""
    drawn, layer = inputs(problem), layer_of(problem, backend)

    def rows(state):
        return state_of(tuple(part[:, chosen] for part in state))

    y, state, tape = layer.forward(
        drawn.x[:, chosen],
        rows(drawn.state),
        lengths=None if drawn.lengths is None else drawn.lengths[chosen],
        resets=None if drawn.resets is None else drawn.resets[:, chosen],
    )
    grads = layer.backward(tape, drawn.dy[:, chosen], rows(drawn.dstate))
    gradients = as_results(problem.cell, grads.x, grads.state)
    return as_results(problem.cell, y, state) | {f"d{name}": array for name, array in gradients.items()}


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize(("B", "H"), [(2, 5), (7, 17), (33, 40), (6, 1), (33, 3), (33, 7)])
def test_a_row_of_a_batch_is_that_row_run_alone(cell, native, dtype, stack, B, H):
    """Outputs, states, dx and the state's gradient have the same bits; with few units rows stand in lanes together."""
    problem = Problem(cell, T=5, B=B, I=7, H=H, dtype=dtype, **stack)
    together = run_rows(problem, native, slice(None))
    for row in {0, 1, B // 2, B - 1}:
        alone = run_rows(problem, native, slice(row, row + 1))
        same(alone, {name: array[:, row : row + 1] for name, array in together.items()})


@pytest.mark.parametrize(("B", "H", "proj_size"), [(3, 9, 0), (3, 9, 5), (20, 3, 0)])
def test_a_sequence_in_chunks_is_the_sequence_at_once(cell, native, dtype, B, H, proj_size):
    """Chunks of 1, 7, 64 and T steps give the same bits: forward, dx and the state's gradient."""
    problem = Problem(
        cell, T=130, B=B, I=6, H=H, num_layers=2, dtype=dtype, proj_size=proj_size * CELLS[cell].projects, resets=True
    )
    drawn, layer = inputs(problem), layer_of(problem, native)

    def in_chunks(length):
        state, ys, tapes = state_of(drawn.state), [], []
        pieces = [slice(start, start + length) for start in range(0, problem.T, length)]
        for piece in pieces:
            y, state, tape = layer.forward(drawn.x[piece], state, resets=drawn.resets[piece])
            ys.append(y)
            tapes.append(tape)
        dstate, dxs = state_of(drawn.dstate), []
        for piece, tape in zip(reversed(pieces), reversed(tapes), strict=True):
            grads = layer.backward(tape, drawn.dy[piece], dstate)
            dstate = grads.state
            dxs.append(grads.x)
        gradients = as_results(cell, np.concatenate(dxs[::-1]), dstate)
        return as_results(cell, np.concatenate(ys), state) | {f"d{name}": array for name, array in gradients.items()}

    expected = in_chunks(problem.T)
    for length in (1, 7, 64):
        same(in_chunks(length), expected)


@pytest.mark.parametrize(("B", "H"), [(1, 17), (5, 17), (20, 3)])
def test_a_stream_has_the_bits_of_the_sequence(cell, native, dtype, B, H):
    """Step after step of `Stream` is the frozen call is the layer's call is `forward`."""
    problem = Problem(cell, T=20, B=B, I=6, H=H, num_layers=2, dtype=dtype)
    drawn, layer = inputs(problem), layer_of(problem, native)
    frozen = layer.freeze()
    stream = frozen.stream(B)
    stream.state = state_of(drawn.state)
    y, state, _ = layer.forward(drawn.x, state_of(drawn.state))
    expected = as_results(cell, y, state)
    same(as_results(cell, *layer(drawn.x, state_of(drawn.state))), expected)
    same(as_results(cell, *frozen(drawn.x, state_of(drawn.state))), expected)
    steps = np.stack([stream.step(x_t) for x_t in drawn.x])
    same(as_results(cell, steps, stream.state), expected)


@pytest.mark.parametrize("B", [1, 33])
def test_a_stream_goes_on_with_another_number_of_threads(cell, native, B):
    """Its steps keep their bits when that changes on the way; of many layers too, whose steps nobody can share."""
    for sizes in ({"B": B, "I": 200, "H": 300}, {"B": 1, "I": 20, "H": 100, "num_layers": 12}):
        problem = Problem(cell, T=9, **sizes)
        x, frozen = inputs(problem).x, layer_of(problem, native).freeze()
        expected, _ = frozen(x)
        stream, steps = frozen.stream(problem.B), []
        before = rk.num_threads()
        try:
            for step, x_t in enumerate(x):
                rk.set_num_threads(1 + step % 3)
                steps.append(stream.step(x_t))
        finally:
            rk.set_num_threads(before)
        same({"y": np.stack(steps)}, {"y": expected})


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS.keys())
@pytest.mark.parametrize("sizes", [(40, 1, 97, 230), (9, 37, 33, 48), (200, 37, 9, 3)], ids=str)
def test_any_number_of_threads_gives_the_same_bits(cell, native, dtype, stack, sizes):
    """Gradients of the parameters included; for few rows, where threads share units, and for many."""
    problem = Problem(cell, *sizes, dtype=dtype, **stack)
    before = rk.num_threads()
    try:
        rk.set_num_threads(1)
        expected = run(problem, native), infer(problem, native)
        for threads in (2, 3, 8):
            rk.set_num_threads(threads)
            same(run(problem, native), expected[0])
            same(infer(problem, native), expected[1])
    finally:
        rk.set_num_threads(before)


def test_every_way_to_save_gives_the_same_bits(cell, native):
    """Gradients and their flow, of layers in lanes, shared units and layers side by side, with dropout and all else."""
    both_ways: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True}
    one_way: dict[str, Any] = {"num_layers": 3, "dropout": 0.3, "lengths": True, "resets": True}
    for T, B, I, H, stack in (
        (300, 4, 5, 33, both_ways),
        (40, 20, 5, 3, both_ways),
        (70, 1, 40, 160, {}),
        (300, 1, 20, 40, both_ways),
        (50, 5, 5, 20, one_way),
        (50, 5, 5, 20, one_way | {"bidirectional": True}),
    ):
        problem = Problem(cell, T=T, B=B, I=I, H=H, clip_state=("norm", 1.0), diagnostics=True, **stack)
        expected = run(problem, native)
        for save in SAVES:
            same(run(problem, native, save=save), expected)


def test_checkpoints_flush_what_two_directions_add_up_to(native):
    """A sum of their gradients of x that is subnormal is zero, as in every other way to save."""
    layer = rk.RNN(6, 5, bidirectional=True, seed=0, backend=native)
    draws = np.random.default_rng(0)
    x, dy = (draws.normal(size=(200, 2, size)).astype(np.float32) for size in (6, 10))
    dx = {}
    for save in SAVES:
        _, _, tape = layer.forward(x, save=save)
        dx[save] = layer.backward(tape, dy * np.float32(1e-37)).x
    sums = np.abs(dx["gates"])
    assert np.any(sums == 0)
    assert not np.any((sums > 0) & (sums < np.finfo(np.float32).tiny))
    same(dx, dict.fromkeys(dx, dx["gates"]))


def test_helpers_that_come_during_a_call_change_no_bit(cell, native):
    """They are asleep when it begins, and join at one step or another; for shared rows, units and layers."""
    one_way: dict[str, Any] = {"num_layers": 4, "resets": True}
    both_ways: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
    for T, B, I, H, stack in (
        (60, 1, 40, 160, both_ways | {"dropout": 0.3}),
        (60, 6, 40, 160, both_ways | {"dropout": 0.3, "lengths": True}),
        (60, 200, 40, 3, both_ways | {"dropout": 0.3, "lengths": True}),
        (100, 1, 40, 160, both_ways),
        (200, 1, 40, 70, one_way),
    ):
        problem = Problem(cell, T=T, B=B, I=I, H=H, **stack)
        before = rk.num_threads()
        try:
            rk.set_num_threads(1)
            expected = run(problem, native)
            rk.set_num_threads(before)
            for pause in (0.001, 0.003, 0.02):
                time.sleep(pause)
                same(run(problem, native), expected)
        finally:
            rk.set_num_threads(before)


@pytest.mark.skipif(backends.get("native").unavailable() is not None, reason="the compiled module is missing")
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="scheduling affinity is Linux's")
def test_helpers_come_to_cpus_of_their_own_however_busy_the_others_are():
    """What runs elsewhere on the machine takes nothing from a process that is kept to some of its CPUs."""
    if len(os.sched_getaffinity(0)) == 1:
        pytest.skip("needs a CPU beside those of the process")
    program = """
import os, threading, time
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import rnnkern as rk
from rnnkern.testing import Problem, inputs, layer_of
rk.set_num_threads(2)
problem = Problem("lstm", T=3000, B=16, I=64, H=64)
layer, x = layer_of(problem, "native"), inputs(problem).x
layer(x)
(helper,) = {int(name) for name in os.listdir("/proc/self/task")} - {threading.get_native_id()}
end = time.monotonic() + 1
while time.monotonic() < end:
    layer(x)
print(open(f"/proc/self/task/{helper}/schedstat").read().split()[0])
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(len(os.sched_getaffinity(0)) + 1)]
    try:
        worked = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True, timeout=60
        ).stdout
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert int(worked) > 2_000_000  # ns; a helper that is never asked runs for 0.1 ms


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "num_layers": 2, "dropout": 0.4},
        {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
        {"loss": "final", "bidirectional": True, "lengths": True},
        {"T": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("projected", [False, True])
def test_every_cell_and_option_at_small_sizes(cell, native, dtype, options, projected):
    """Training and inference, odd sizes and all options together."""
    for B, I, H in ((1, 1, 2), (3, 5, 9), (9, 2, 17)):
        proj_size = H // 2 * projected * CELLS[cell].projects
        problem = Problem(cell, **({"T": 4, "B": B, "I": I, "H": H, "proj_size": proj_size, "dtype": dtype} | options))
        assert_accurate(problem, run(problem, native))
        assert_accurate(replace(problem, dropout=0.0), infer(problem, native))


def test_eight_threads_may_use_one_layer(cell, native):
    """Forward, backward and inference at once, with the bits of a thread alone."""
    problem = Problem(cell, T=20, B=4, I=8, H=24, num_layers=2)
    eight_threads_agree(problem, native)


def test_eight_threads_may_use_one_layer_of_any_backend(cell, backend):
    """The same for every backend."""
    eight_threads_agree(Problem(cell, T=6, B=3), backend)


def eight_threads_agree(problem, backend):
    """Each of eight threads gets what one thread gets."""
    drawn, layer = inputs(problem), layer_of(problem, backend)
    frozen = layer.freeze()

    def work(_):
        y, _, tape = layer.forward(drawn.x, state_of(drawn.state))
        grads = layer.backward(tape, drawn.dy, state_of(drawn.dstate))
        frozen_y, _ = frozen(drawn.x, state_of(drawn.state))
        return {"y": y, "frozen_y": frozen_y, "dx": grads.x, **grads.parameters}

    expected = work(None)
    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(32)):
            same(results, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_computes(native):
    """A child of a process that has used its threads makes its own, and gets the same bits."""
    problem = Problem("lstm", T=20, B=33, I=16, H=64)
    expected = run(problem, native)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a process with threads forks
        child = os.fork()
    if child == 0:
        code = 1
        try:
            same(run(problem, native), expected)
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 60
    finished, status = os.waitpid(child, os.WNOHANG)
    while not finished and time.monotonic() < deadline:
        time.sleep(0.01)
        finished, status = os.waitpid(child, os.WNOHANG)
    if not finished:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert finished, "the child hangs"
    assert os.waitstatus_to_exitcode(status) == 0
    same(run(problem, native), expected)


def test_a_caller_keeps_its_denormals(cell, backend):
    """A kernel may flush them while it runs; after it they are there as before, on this thread and a new one."""
    problem = Problem(cell, T=20, B=9, H=17)
    run(problem, backend)
    smallest = np.finfo(np.float32).smallest_subnormal

    def halves_of_normals():
        return (np.full(64, np.finfo(np.float32).tiny) / np.float32(2) > smallest).all()

    assert halves_of_normals()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(halves_of_normals).result()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_denormals_cost_no_time(cell, native, training):
    """100,000 steps after an impulse, where states decay to nothing, take at most 1.2 times those of noise."""
    T = 100_000
    layer = rk.Recurrent(cell, 4, 8, bias=False, seed=0, backend=native)
    for array in layer.parameters.values():
        array *= 0.5  # so that every cell forgets
    impulse = np.zeros((T, 1, 4), np.float32)
    impulse[0] = 1
    noise = np.random.default_rng(0).normal(size=impulse.shape).astype(np.float32)
    dy = np.zeros((T, 1, 8), np.float32)
    dy[-1] = 1
    frozen = layer.freeze()

    def seconds(x):
        start = time.thread_time()  # on a busy machine the wall clock measures the others
        if training:
            _, _, tape = layer.forward(x)
            layer.backward(tape, dy)
        else:
            frozen(x)
        return time.thread_time() - start

    before = rk.num_threads()
    rk.set_num_threads(1)
    fastest_impulse = fastest_noise = float("inf")
    for calls in range(1, 201):
        fastest_impulse = min(fastest_impulse, seconds(impulse))
        fastest_noise = min(fastest_noise, seconds(noise))
        if calls >= 10 and fastest_impulse <= 1.2 * fastest_noise:
            break  # a machine whose speed changes by more than this between two calls needs more of them
    rk.set_num_threads(before)
    assert fastest_impulse <= 1.2 * fastest_noise


@pytest.mark.slow
def test_a_million_steps(native):
    """Lengths have no cliff: the last steps are those of a run that starts in the middle."""
    layer = rk.GRU(1, 3, seed=0, backend=native)
    x = np.random.default_rng(0).normal(size=(1_000_000, 1, 1)).astype(np.float32)
    y, state, tape = layer.forward(x)
    _, middle = layer(x[:700_000])
    end_y, end = layer(x[700_000:], middle)
    same({"y": y[700_000:], "h": state}, {"y": end_y, "h": end})
    grads = layer.backward(tape, None, state)
    assert all(np.isfinite(gradient).all() for gradient in grads.parameters.values())


@pytest.mark.slow
@pytest.mark.exhaustive  # for its memory
def test_more_gate_elements_than_32_bits_count():
    """T*B*G*H beyond 2**31, while y takes 2.2 GB: the last row is that row run alone. On the best ISA."""
    reason = backends.get("native").unavailable()
    if reason is not None:
        pytest.skip(reason)
    T, B, H = 1025, 2**16, 8
    layer = rk.LSTM(1, H, seed=0, backend="native")
    x = np.zeros((T, B, 1), np.float32)
    x[:, -1] = np.random.default_rng(0).normal(size=(T, 1))
    y, (h, c) = layer(x)
    alone, (h_alone, c_alone) = layer(x[:, -1:])
    same({"y": y[:, -1:], "h": h[:, -1:], "c": c[:, -1:]}, {"y": alone, "h": h_alone, "c": c_alone})


def test_helpers_are_asked_where_their_barriers_are_worth_it():
    """On far cores short steps go alone, in both directions; when the cores are near again, that is found out."""
    native = backends.get("native").native_module()
    if native is None:
        pytest.skip("the compiled module is missing")
    worth, (alone, together, measured) = native.Worth(), range(3)

    def way(step_ns=2_000, steps=100, meetings=1, threads=2):
        return worth.next(step_ns=step_ns, steps=steps, meetings=meetings, threads=threads)

    def measure(alone_ns, together_ns):
        for already in range(3):
            assert way() == measured
            if already:
                assert way(meetings=2) == together  # lest helpers fall asleep meanwhile
            worth.found(step_ns=2_000, threads=2, alone_ns=alone_ns, together_ns=together_ns)

    assert way(step_ns=0) == way(step_ns=20_000) == way(steps=10) == together
    measure(900, 1_400)  # far: a barrier takes 950 ns
    table = [(2_000, 1, 2, alone), (4_400, 2, 2, alone), (6_500, 1, 2, together), (13_000, 2, 2, together)]
    for step_ns, meetings, threads, expected in table:
        assert way(step_ns, meetings=meetings, threads=threads) == expected, (step_ns, meetings, threads)
    ways = [way() for _ in range(1_000)]
    assert set(ways[:-4]) == {alone}
    assert ways[-1] == measured
    measure(900, 600)  # near: 150 ns
    assert way() == way(meetings=2) == together
    while way() != measured:
        pass
    for _ in range(24):
        assert way() == measured
        worth.tried()
    assert way() == together


def test_the_number_of_helpers_that_a_call_asks_for(monkeypatch, tmp_path):
    """A CPU that nobody else wants for each, of 1 to 128; all where that is not known; few for a short call."""
    native = backends.get("native").native_module()
    if native is None:
        pytest.skip("the compiled module is missing")
    long, short, tiny, ago, just = 1_000_000, 60_000, 4_000, 1_000_000, 10_000  # ns
    table = [
        # threads, expected, since the last, CPUs, runnable, awake -> helpers, looks again
        (1, long, ago, 1, 1, 0, 0, False),
        (2, long, ago, 2, 1, 0, 1, False),
        (2, long, ago, 2, 2, 0, 0, True),
        (2, long, ago, 2, 2, 1, 1, False),  # the other is the helper, which spins
        (2, long, ago, 2, 3, 1, 0, True),
        (16, long, ago, 16, 1, 0, 15, False),
        (16, long, ago, 16, 2, 0, 14, False),
        (16, long, ago, 16, 11, 0, 5, False),
        (16, long, ago, 16, 15, 0, 1, False),
        (16, long, ago, 16, 16, 0, 0, True),
        (16, long, ago, 16, 40, 0, 0, True),
        (16, long, ago, 16, 16, 15, 15, False),
        (64, long, ago, 128, 1, 0, 63, False),
        (64, long, ago, 128, 100, 0, 28, False),
        (64, long, ago, 128, 100, 10, 38, False),
        (16, long, ago, 16, 0, 0, 15, False),  # not known, as where the caller may not run on all CPUs
        (16, short, ago, 16, 1, 0, 0, False),
        (16, short, ago, 16, 4, 3, 3, False),
        (16, short, just, 16, 1, 0, 7, False),  # those that sleep are woken one after the other
        (16, short, just, 16, 11, 10, 10, False),
        (16, tiny, just, 16, 1, 0, 1, False),
        (16, tiny, just, 16, 16, 15, 15, False),
        (16, tiny, ago, 16, 4, 3, 3, False),
        (2, tiny, just, 2, 1, 0, 1, False),
    ]
    for threads, expected_ns, since_last, cpus, runnable, awake, *decision in table:
        asked = native.decide(
            threads=threads, expected_ns=expected_ns, since_last=since_last, cpus=cpus, runnable=runnable, awake=awake
        )
        assert list(asked) == decision, (threads, expected_ns, since_last, cpus, runnable, awake)
    waits = [
        # helpers, woken, expected -> at most, all in ns
        *[(1, 0, long, 2_000), (1, 1, long, 2_000), (15, 0, long, 30_000), (15, 1, long, 30_000)],
        *[(2, 2, long, 31_250), (3, 2, long, 62_500), (15, 15, long, 300_000)],
        *[(15, 0, short, 3_000), (15, 15, short, 26_250), (200, 200, 20 * long, 300_000), (200, 0, 20 * long, 300_000)],
    ]
    for helpers, woken, expected_ns, longest in waits:
        assert native.wait_at_start(helpers, woken, expected_ns) == longest, (helpers, woken, expected_ns)
    monkeypatch.setattr(native, "supply", lambda: (16, 16))
    monkeypatch.setattr(native, "num_threads", lambda: 16)
    assert config.show_config("dicts")["threads_now"].endswith("a long call would ask 0 helpers")
    alone = [[str(cpu) for cpu in range(count)] for count in (1, 2, 4, 128)]
    paired = [f"{cpu % 64},{cpu % 64 + 64}" for cpu in range(128)]  # two threads to each of 64 cores
    quotas = [
        *[(alone[0], np.inf, 1), (alone[3], np.inf, 128), (alone[3], 2.0, 2), (alone[3], 1.5, 2), (alone[2], 0.1, 1)],
        *[(alone[1], 64.0, 2), (paired, np.inf, 64), (paired, 8.0, 8), (paired[:3], np.inf, 3), ([], np.inf, 1)],
        *[(paired[5::64], np.inf, 1)],  # affinity to both threads of one core
    ]
    for siblings, quota, threads in quotas:
        assert cores.most_threads(siblings, quota) == threads
    cgroups = [
        # files, and the quota that follows from them
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, np.inf),
        ({"proc/self/cgroup": "0::/../of/the/host\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n3:cpuset:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        ({}, np.inf),
    ]
    for case, (files, quota) in enumerate(cgroups):
        for name, text in files.items():
            (tmp_path / str(case) / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / str(case) / name).write_text(text)
        assert cores.cgroup_quota(tmp_path / str(case)) == quota, files
    retreats = [0]
    while len(retreats) < 8:
        retreats.append(native.next_retreat(retreats[-1]))
    assert retreats == [0, 1, 3, 7, 15, 31, 63, 63]
