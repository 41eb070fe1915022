"""Runs the suite and gathers its results.

Each number of threads has a process of its own, pinned to as many cores before anything is imported: XLA and BLAS take
their threads from there. In a process the peers of a workload take turns in rounds, so that a change of the machine's
speed hits all alike, and no time counts before the result was right.
"""

from __future__ import annotations

import gc
import importlib.metadata
import multiprocessing
import os
import platform
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import __version__, limits
from ..config import num_threads, set_num_threads, show_config
from . import report
from .peers import PACKAGES, PEERS, Missing, Prepared
from .workloads import QUICK, WORKLOADS, Workload, assert_right, named, numbers

__all__ = ["MODES", "Options", "quick", "run"]

MODES = ("inference", "training")
ROUNDS = 5
FEWEST_CALLS, MOST_CALLS = 3, 5000  # timed of a peer and a mode
PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds; before a peer's turn, see _settle
WARM_UP = 0.1  # a call shorter than this is first run once untimed, in caches that others have filled
COMPILE_SECONDS = 60.0  # to get ready and run for the first time
QUICK_SECONDS = 160.0  # a workload takes 10 to 20 of them
ON_DEVICES = ("numba_cuda",)


@dataclass(frozen=True)
class Options:
    """What to run."""

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    peers: tuple[str, ...] = tuple(name for name in PEERS if name not in ON_DEVICES)
    threads: tuple[int, ...] = ()  # empty: 1 and all
    seconds: float = 1.0  # of timed calls for each peer and mode of a workload
    begin_within: float | None = None  # seconds; no workload begins after that
    left_out: Mapping[str, str] = field(default_factory=dict)  # peer -> why


def quick(options: Options) -> Options:
    """The options of a run that ends within three minutes."""
    compiled = {"torch_compile": "left out by --quick: it takes minutes to compile"}
    return Options(
        QUICK if options.workloads == tuple(WORKLOADS) else options.workloads,
        tuple(name for name in options.peers if name not in compiled),
        options.threads,
        min(options.seconds, 0.25),
        QUICK_SECONDS,
        {name: why for name, why in compiled.items() if name in options.peers},
    )


class Terminal(Protocol):
    """Where progress is shown."""

    def say(self, text: str = "") -> None:
        """Write lines that stay."""

    def progress(self, text: str) -> None:
        """Show one line in place of the last one."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Run the suite; the results as `report` takes them. Ctrl-C ends it early, with what was measured until then."""
    start = time.monotonic()
    threads = options.threads or tuple(sorted({1, num_threads()}))
    workloads = [named(name) for name in options.workloads]
    results = report.empty(describe_machine(), versions(), asdict(options) | {"threads": threads})
    workers: dict[int, Worker] = {}
    try:
        terminal.progress("measuring the limits of this machine")
        workers = {count: Worker(count) for count in threads}
        machine = _limits(workers[max(threads)], terminal, results)
        for done, workload in enumerate(workloads):
            elapsed = time.monotonic() - start
            if options.begin_within is not None and elapsed > options.begin_within:
                results["left_out"][workload.name] = f"{elapsed:.0f} s were over, more would break the time of --quick"
                continue
            left = f", about {elapsed / done * (len(workloads) - done) / 60:.0f} min left" if done else ""

            def tell(text: str, prefix: str = f"{done + 1}/{len(workloads)} {workload.name}", left: str = left) -> None:
                terminal.progress(f"{prefix}, {text}{left}")

            for row in _rows(workload, options, workers, machine, tell):
                results["rows"].append(row)
                terminal.say(report.line(row))
    except KeyboardInterrupt:
        results["interrupted"] = True
        terminal.say("interrupted; the report has what was measured")
    finally:
        for worker in workers.values():
            worker.end()
    results["machine"]["load_after"] = os.getloadavg()[0]
    return results


def _rows(
    workload: Workload,
    options: Options,
    workers: dict[int, Worker],
    machine: limits.Limits | None,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The rows of a workload, fewest threads first; a process that it ends is replaced."""
    left_out = {name: {"missing": why} for name, why in options.left_out.items()}
    fewer: dict[str, dict[str, Any]] = {}
    for threads in sorted(workers):
        try:
            times = workers[threads].ask(tell, "time", workload, options.peers, options.seconds)
        except EOFError:
            why = f"the process ended with {workers[threads].exit_code()} during this workload"
            times = {mode: {name: {"missing": why} for name in options.peers} for mode in MODES}
            workers[threads] = Worker(threads)
        for mode in MODES:
            floor = limits.floor(workload.work, machine, threads, mode == "training") if machine else None
            fewer[mode] = report.row(workload, mode, threads, times[mode] | left_out, floor, fewer.get(mode))
            yield fewer[mode]


def _limits(worker: Worker, terminal: Terminal, results: dict[str, Any]) -> limits.Limits | None:
    try:
        answer = worker.ask(terminal.progress, "limits")
    except EOFError:
        answer = "the process that measures them ended"
    if isinstance(answer, limits.Limits):
        results["limits"] = asdict(answer)
        return answer
    terminal.say(f"limits     not measured: {answer}")
    results["limits"] = {"missing": answer}
    return None


def describe_machine() -> dict[str, Any]:
    """The machine and the installation."""
    config = show_config(mode="dicts")
    return {
        "cpu": _cpu(),
        "cores": num_threads(),
        "isa": config["isa"],
        "compiler": config["compiler"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Of this package and of those of the peers that are installed."""
    found = {"rnnkern": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Worker:
    """A process on `threads` cores that measures what it is asked to."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, threads), name=f"bench-{threads}")
        with _inherited(threads):
            self._process.start()
        theirs.close()

    def ask(self, tell: Callable[[str], None], *question: Any) -> Any:
        """The answer, after handing all progress to `tell`; EOFError if the process has ended."""
        try:
            self._pipe.send(question)
            while True:
                kind, content = self._pipe.recv()
                if kind == "answer":
                    return content
                tell(content)
        except OSError as error:  # a broken pipe
            raise EOFError from error

    def exit_code(self) -> int | None:
        """Of a process that has ended; negative: by that signal."""
        self._process.join()
        return self._process.exitcode

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """What a process started now inherits: as many cores as threads, and that Ctrl-C is not its business."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if cores is not None:
            os.sched_setaffinity(0, _choose(cores, threads))
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGINT, before)


def _choose(cpus: set[int], count: int) -> list[int]:
    """CPUs of different cores before second threads of a core; the first, which serves most interrupts, last."""
    seen = set[str]()
    first, second = list[int](), list[int]()
    for cpu in sorted(cpus, reverse=True):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        core = topology.read_text() if topology.exists() else str(cpu)
        (second if core in seen else first).append(cpu)
        seen.add(core)
    return (first + second)[:count]


def _serve(pipe: Connection, threads: int) -> None:
    """The main loop of a worker."""
    set_num_threads(threads)
    warnings.simplefilter("ignore")  # of peers, about themselves
    too_long: dict[tuple[str, str, str], int] = {}

    def tell(text: str) -> None:
        pipe.send(("progress", text))

    while True:
        try:
            kind, *arguments = pipe.recv()
        except (EOFError, OSError):
            return
        if kind == "limits":
            try:
                answer: Any = limits.measure(threads)
            except RuntimeError as error:
                answer = str(error)
        else:
            workload, peers, seconds = arguments
            answer = time_peers(workload, threads, peers, seconds, tell, too_long)
        pipe.send(("answer", answer))


def time_peers(
    workload: Workload,
    threads: int,
    peers: Sequence[str],
    seconds: float,
    tell: Callable[[str], None] = lambda _: None,
    too_long: dict[tuple[str, str, str], int] | None = None,
) -> dict[str, dict[str, Any]]:
    """Times of each mode and peer, as `report.row` takes them, or the reason why there are none.

    `too_long` remembers, by peer, cell and mode, how many unrolled steps once took too long to compile.
    """
    too_long = {} if too_long is None else too_long
    results: dict[str, dict[str, Any]] = {mode: {} for mode in MODES}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name in peers:
        tell(f"{_threads(threads)}: {name} gets ready")
        for mode, outcome in _ready(name, workload, threads, too_long).items():
            results[mode][name], call = outcome
            if call is not None:
                calls[name, mode] = call
    samples = _in_turns(calls, seconds, lambda text: tell(f"{_threads(threads)}: {text}"))
    for (name, mode), taken in samples.items():
        first, median, third = np.quantile(taken, (0.25, 0.5, 0.75))
        results[mode][name] |= {
            "median": float(median),
            "quartiles": [float(first), float(third)],
            "fastest": min(taken),
            "calls": len(taken),
        }
    return results


Outcome = tuple[
    dict[str, Any], Callable[[], Any] | None
]  # what is known of a peer and a mode, and its call if it works


def _ready(
    name: str, workload: Workload, threads: int, too_long: dict[tuple[str, str, str], int]
) -> dict[str, Outcome]:
    """Prepare a peer, and check what it computes."""
    try:
        with _at_most(COMPILE_SECONDS):
            prepared = PEERS[name](workload, threads)
    except (Missing, TooLongError) as reason:
        return {mode: ({"missing": str(reason)}, None) for mode in MODES}
    except Exception as error:  # whatever a peer raises is the reason why it has no time
        return {mode: ({"missing": _first_line(error)}, None) for mode in MODES}
    outcomes: dict[str, Outcome] = {}
    for mode in MODES:
        key = (name, workload.cell, mode)
        if mode == "training" and not prepared.trains:
            outcomes[mode] = {"missing": "it has no training"}, None
        elif prepared.unrolled >= too_long.get(key, 1 << 62):
            outcomes[mode] = {"missing": f"{too_long[key]} steps already took over {COMPILE_SECONDS:.0f} s"}, None
        else:
            outcomes[mode] = _checked(prepared, workload, mode)
            if "took over" in outcomes[mode][0].get("missing", "") and prepared.unrolled:
                too_long[key] = prepared.unrolled
    return outcomes


def _checked(prepared: Prepared, workload: Workload, mode: str) -> Outcome:
    given = numbers(workload)
    dy = prepared.place(given.dy) if mode == "training" else None
    try:
        with _at_most(COMPILE_SECONDS):
            returned = prepared.run(None if dy is None else prepared.place(given.dy_checked))
        error = assert_right(workload, prepared.results(returned))
    except TooLongError as reason:
        return {"missing": str(reason)}, None
    except AssertionError as wrong:
        return {"missing": f"its result is wrong: {_first_line(wrong)}"}, None
    except Exception as raised:  # as above
        return {"missing": _first_line(raised)}, None
    return {"settings": prepared.settings, "error": error}, lambda: prepared.run(dy)


def _in_turns(
    calls: Mapping[tuple[str, str], Callable[[], Any]], seconds: float, tell: Callable[[str], None]
) -> dict[tuple[str, str], list[float]]:
    """Seconds of each timed call: the rounds go through all peers, in another order each."""
    once = {key: _seconds(call) for key, call in calls.items()}
    counts = {key: min(max(int(seconds / taken), FEWEST_CALLS), MOST_CALLS) for key, taken in once.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(ROUNDS):
            random.Random(turn).shuffle(order)
            for key in order:
                count = (turn + 1) * counts[key] // ROUNDS - turn * counts[key] // ROUNDS
                tell(f"round {turn + 1} of {ROUNDS}, {key[0]} {key[1]}")
                if count == 0:
                    continue
                _settle()
                if once[key] < WARM_UP:
                    calls[key]()
                samples[key] += [_seconds(calls[key]) for _ in range(count)]
    finally:
        gc.enable()
    return samples


def _settle() -> None:
    """Wait until the threads that the peer before left spinning sleep: 60 ms with ONNX Runtime, 100 ms with Numba."""
    end = time.perf_counter() + LONGEST_PAUSE
    idle = False
    while not idle and time.perf_counter() < end:
        start, cpu = time.perf_counter(), time.process_time()
        time.sleep(PAUSE)
        idle = time.process_time() - cpu < 0.1 * (time.perf_counter() - start)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class TooLongError(BaseException):
    """Raised out of a compiler, which catches exceptions of its own."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """TooLongError once the seconds are over, where Python has a say; at the end at the latest."""

    def stop(*_: Any) -> None:
        raise TooLongError(f"took over {seconds:.0f} s to compile")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
