"""No input from Python may crash the process, and no use of processes, signals, threads or memory either."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hostile_calls
import rnnkern as rk
from hostile_calls import BATCHES, REJECTED_IN_BATCH, TARGETS
from rnnkern import backends
from rnnkern.backends.native import native_module

native = native_module()

pytestmark = pytest.mark.skipif(native is None, reason="the compiled module is missing")


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(rk.__file__).parents[1])},
        timeout=300, capture_output=True, text=True, errors="replace",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(BATCHES))
@pytest.mark.parametrize("target", TARGETS)
def test_wrong_calls_raise_and_never_crash(target: str, seed: int, tmp_path: Path) -> None:
    """Each ends in an error of a sensible class, or is right after all, and leaves what it was given as it was."""
    child = run_python(tmp_path, hostile_calls.__file__, target, str(seed), str(REJECTED_IN_BATCH))
    *calls, numbers = child.stdout.splitlines() or [""]
    how = f"signal {signal.Signals(-child.returncode).name}" if child.returncode < 0 else f"exit {child.returncode}"
    assert child.returncode == 0, f"{how} in call {len(calls) + 1}, {numbers}\n{child.stderr}"
    counted = json.loads(numbers)
    assert counted["rejected"] == REJECTED_IN_BATCH
    assert 3 * counted["near"] >= counted["rejected"]


def test_backward_refuses_what_other_weights_saved() -> None:
    """Of the same sizes too: gradients of one forward with the weights of another belong to nothing."""
    layer = rk.GRU(3, 4, backend="native", seed=0)
    (y, _, tape), (_, _, other) = (layer.forward(np.ones((5, 2, 3))) for _ in range(2))
    tape.packed = other.packed
    with pytest.raises(ValueError, match="saved: expected what forward of these weights returned"):
        layer.backward(tape, np.ones_like(y))


def test_steps_without_rows_take_no_time() -> None:
    """However many they are; the state and the gradients are those of nothing."""
    layer, x = rk.GRU(3, 4, backend="native", seed=0), np.zeros((2**40, 0, 3), np.float32)
    y, _, tape = layer.forward(x)
    assert layer.freeze()(x)[0].shape == y.shape == (2**40, 0, 4)
    assert not layer.backward(tape, np.zeros_like(y)).parameters["weight_ih_l0"].any()


def test_more_rows_than_memory_are_rejected() -> None:
    """An array without elements can have so many rows that the size of the scratch memory would wrap around."""
    rows = 2**64 // 24 + 1
    with pytest.raises(ValueError, match="weight: expected at least one row and one column"):
        backends.get("native").linear_forward(
            x=np.zeros((rows, 0), np.float32), weight=np.zeros((0, 0), np.float32), bias=None,
            y=np.zeros((rows, 0), np.float32),
        )  # fmt: skip


@pytest.mark.parametrize(
    "work",
    [
        "layer, x = rk.LSTM(64, 64), np.zeros((20_000, 8, 64), np.float32)\nwhile True: layer(x)",
        "frozen, x = rk.LSTM(4, 8).freeze(), np.zeros((5, 2, 4))\nwhile True: frozen(x)",
        "stream, x = rk.LSTM(4, 8).freeze().stream(), np.zeros((1, 4))\nwhile True: stream.step(x)",
        "layer, x = rk.GRU(4, 8), np.zeros((5, 2, 4)).tolist()\nwhile True: layer.backward(layer.forward(x)[2])",
    ],
    ids=["kernel", "frozen", "stream", "training"],
)
def test_daemon_threads_may_outlive_the_interpreter(work: str, tmp_path: Path) -> None:
    """A thread that wants the GIL while the interpreter shuts down does not abort the process, wherever it is."""
    program = f"""
import threading, time
import numpy as np, rnnkern as rk
for _ in range(3):
    threading.Thread(target=exec, args=({work!r}, globals().copy()), daemon=True).start()
time.sleep(0.3)
"""
    child = run_python(tmp_path, "-c", program)
    assert child.returncode == 0, child.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform pins no threads")
def test_threads_stay_where_somebody_pins_them(tmp_path: Path) -> None:
    """`taskset -ap` on a running program holds for the team too."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one CPU")
    program = """
import os, time
import numpy as np, rnnkern as rk
rk.set_num_threads(2)
frozen, x = rk.LSTM(128, 128).freeze(), np.zeros((50, 16, 128), "float32")
def call(times):
    for _ in range(times):
        frozen(x)
        time.sleep(0.002)
def tasks():
    return [int(name) for name in os.listdir("/proc/self/task")]
deadline = time.monotonic() + 15  # while others want the CPUs no helper is asked
while len(tasks()) < 2 and time.monotonic() < deadline:
    call(10)
threads, cpus = tasks(), os.sched_getaffinity(0)
assert all(os.sched_getaffinity(thread) == cpus for thread in threads)
for thread in threads:
    os.sched_setaffinity(thread, {min(cpus)})
call(30)
assert all(os.sched_getaffinity(thread) == {min(cpus)} for thread in threads)
"""
    child = run_python(tmp_path, "-c", program)
    assert child.returncode == 0, child.stderr


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this platform pins no threads")
def test_a_signal_handler_may_fork_during_a_call(tmp_path: Path) -> None:
    """The child gives up the call, in which the work of its threads is missing, and goes on; so does the parent."""
    program = """
import os, signal, time, warnings
import numpy as np, rnnkern as rk
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: a process with threads forks
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # nobody knows then whether the CPUs are wanted by others
rk.set_num_threads(2)
layer, x, children = rk.GRU(97, 300), np.zeros((3_000, 2, 97), np.float32), []
signal.signal(signal.SIGALRM, lambda *_: children.append(os.fork()))
signal.setitimer(signal.ITIMER_REAL, 0.12)
try:
    while not children:
        layer(x)
except RuntimeError as error:
    assert children == [0] and "fork" in str(error)
    layer(x[:100])
else:
    if children == [0]:
        os._exit(3)
    for _ in range(600):
        child, status = os.waitpid(children[0], os.WNOHANG)
        if child:
            assert os.waitstatus_to_exitcode(status) in (0, 3), status  # 3: no helper had come, nothing was missing
            break
        time.sleep(0.05)
    else:
        os.kill(children[0], signal.SIGKILL)
        raise SystemExit("the child hangs")
"""
    child = run_python(tmp_path, "-c", program)
    assert child.returncode == 0, child.stderr


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers that signal")
def test_a_signal_handler_during_a_call_computes_with_denormals(tmp_path: Path) -> None:
    """And so does a thread that it starts, which outlives the call; in the kernels they count as zero."""
    program = """
import signal, threading
import numpy as np, rnnkern as rk
seen, tiny, ended = [], 5e-324, threading.Event()

def handler(*_):
    seen.append(tiny * 1.0)
    threading.Thread(target=lambda: ended.wait() and seen.append(tiny * 1.0)).start()

signal.signal(signal.SIGALRM, handler)
layer, x = rk.LSTM(64, 512), np.zeros((3_000, 16, 64), np.float32)
signal.setitimer(signal.ITIMER_REAL, 0.12)
while not seen:
    layer(x)
ended.set()
for thread in threading.enumerate():
    if thread is not threading.current_thread():
        thread.join()
assert seen == [tiny, tiny], seen
"""
    child = run_python(tmp_path, "-c", program)
    assert child.returncode == 0, child.stderr


def test_a_projection_is_smaller_than_the_state() -> None:
    """In the compiled module too, whose kernels have arrays of the larger of the two."""
    for P in (2, 3, 2**20):
        with pytest.raises(ValueError, match="proj_size: expected less than hidden_size 2, got"):
            native.pack(("lstm", "float32", False, False, 3, 2, P, 1, (False,)), ("w_ih", "w_hh", "w_hr"), [{}], True)


FAILING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
static __thread long left;
void fail_after(long calls) { left = calls; }
void *malloc(size_t size) {
  static void *(*real)(size_t);
  if (!real) real = (void *(*)(size_t))dlsym(RTLD_NEXT, "malloc");
  if (left > 0 && --left == 0) return NULL;
  return real(size);
}
"""


def test_no_memory_at_any_allocation_is_a_memory_error(tmp_path: Path) -> None:
    """Each of them fails once, in all calls that make or use a compiled object; none is freed twice."""
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("cc is not installed, or this is not Linux")
    (tmp_path / "failing.c").write_text(FAILING)
    subprocess.run([compiler, "-shared", "-fPIC", "failing.c", "-o", "failing.so"], cwd=tmp_path, check=True)
    program = """
import ctypes
import numpy as np, rnnkern as rk
fail_after = ctypes.PyDLL("./failing.so").fail_after
fail_after.argtypes = [ctypes.c_long]
layer, x, linear = rk.LSTM(3, 4, 2, seed=0), np.zeros((3, 2, 3), np.float32), rk.Linear(3, 2, seed=0)
frozen, stream = layer.freeze(), layer.freeze().stream()
expected = frozen(x)[0].tobytes()
tape = layer.forward(x)[2]
calls = [layer.freeze, frozen.stream, lambda: frozen(x), lambda: stream.step(x[0, :1]), lambda: layer.forward(x),
         lambda: layer.backward(tape), lambda: linear(x[0])]
failed = 0
for call in calls:
    for count in range(1, 60):
        try:
            fail_after(count)
            call()
            fail_after(0)
        except MemoryError:
            failed += 1
    assert frozen(x)[0].tobytes() == expected
assert failed > 20, failed
"""
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, timeout=100, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(rk.__file__).parents[1]), "LD_PRELOAD": "./failing.so"},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize("name", ["RNNKERN_MAX_ISA", "OMP_NUM_THREADS"])
def test_an_empty_variable_is_none(name: str, tmp_path: Path) -> None:
    """As the shell's `NAME= program` means it."""
    child = subprocess.run(
        [sys.executable, "-c", "import rnnkern as rk; print(rk.num_threads())"], cwd=tmp_path, capture_output=True,
        env={key: value for key, value in os.environ.items() if key != name}
        | {"PYTHONPATH": str(Path(rk.__file__).parents[1]), name: ""}, text=True, check=True,
    )  # fmt: skip
    assert int(child.stdout) >= 1
