"""Runs the suite and gathers its results.

Each number of threads has a process of its own, pinned to as many cores before anything is imported: XLA and BLAS take
their threads from there. In a process the peers of a workload take turns in rounds, so that a change of the machine's
speed hits all alike, and no time counts before the result was right. Which peer is the best is decided in rounds of
their own: the fastest of several times would be faster than the same peer is in the long run.
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
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .. import __version__, limits
from ..config import num_threads, set_num_threads, show_config
from ..cores import siblings
from . import report
from .peers import ENTRANTS, OF_BFLOAT16, OWN, PACKAGES, PEERS, Missing, Prepared
from .workloads import QUICK, SUITES, Workload, assert_right, named, numbers

__all__ = ["DEFAULT_SUITE", "MODES", "Options", "of_suites", "quick", "run"]

MODES = ("inference", "training")
DEFAULT_SUITE = next(iter(SUITES))
CHOOSING_ROUNDS, ROUNDS = 2, 5  # the first find the best peer, the others are timed; in each at least one call
CHOOSING_SHARE, BEATEN = 0.25, 2.0  # of the seconds; a peer that takes so many times the best one is not timed again
MOST_CALLS = 5000  # timed of a peer and a mode
PAUSE, LONGEST_PAUSE = 0.01, 1.0  # seconds; before a peer's turn, see _settle
WARM_UP = 0.1  # a call shorter than this is first run once untimed, in caches that others have filled
COMPILE_SECONDS = 60.0  # to get ready and run for the first time
QUICK_SECONDS = 160.0  # a workload takes 10 to 20 of them


def of_suites(suites: Sequence[str]) -> tuple[str, ...]:
    """The names of the workloads of some suites."""
    return tuple(workload.name for suite in suites for workload in SUITES[suite].workloads.values())


@dataclass(frozen=True)
class Options:
    """What to run."""

    workloads: tuple[str, ...] = of_suites([DEFAULT_SUITE])
    peers: tuple[str, ...] = ENTRANTS
    threads: tuple[int, ...] = ()  # empty: 1 and all
    seconds: float = 0.5  # of timed calls for each peer and mode of a workload
    begin_within: float | None = None  # seconds; no workload begins after that


def quick(options: Options) -> Options:
    """The options of a run that ends within three minutes."""
    return replace(
        options,
        workloads=QUICK if options.workloads == Options().workloads else options.workloads,
        seconds=min(options.seconds, 0.25),
        begin_within=QUICK_SECONDS,
    )


class Terminal(Protocol):
    """Where progress is shown."""

    def say(self, text: str = "") -> None:
        """Write lines that stay."""

    def progress(self, text: str) -> None:
        """Show one line in place of the last one."""


def run(options: Options, terminal: Terminal) -> dict[str, Any]:
    """Run the suite; the results as `report` takes them. Ctrl-C ends it early, with what was measured until then."""
    start, others_before = time.monotonic(), _others_seconds()
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
    if others_before is not None and (others := _others_seconds()) is not None:
        results["machine"]["others"] = max(others - others_before, 0.0) / (time.monotonic() - start)
    return results


def _rows(
    workload: Workload,
    options: Options,
    workers: dict[int, Worker],
    machine: limits.Limits | None,
    tell: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """The rows of a workload, fewest threads first; a process that it ends is replaced."""
    fewer: dict[str, dict[str, Any]] = {}
    peers = [name for name in options.peers if name not in OF_BFLOAT16 or workload.precision == "bfloat16"]
    for threads in sorted(workers):
        try:
            times = workers[threads].ask(tell, "time", workload, peers, options.seconds)
        except EOFError:
            why = f"the process ended with {workers[threads].exit_code()} during this workload"
            times = {mode: {name: {"missing": why} for name in peers} for mode in MODES}
            workers[threads] = Worker(threads)
        for mode in MODES:
            limit = limits.limit(workload.work, machine, threads, mode == "training") if machine else None
            fewer[mode] = report.row(workload, mode, threads, times[mode], limit, fewer.get(mode))
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


def _others_seconds() -> float | None:
    """CPU time that other programs and other virtual machines have had so far of our CPUs; None where it is not known.

    Children count as this program once they have ended.
    """
    if not hasattr(os, "sched_getaffinity"):
        return None
    cpus = {f"cpu{cpu}" for cpu in os.sched_getaffinity(0)}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal; what follows is part of user.
        taken = [[int(ticks) for ticks in line[1:9]] for line in lines if line and line[0] in cpus]
    except (OSError, ValueError):
        return None
    ticks = sum(sum(one) - one[3] - one[4] for one in taken)
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - sum(own[:4])


def describe_machine() -> dict[str, Any]:
    """The machine and the installation."""
    config = show_config(mode="dicts")
    return {
        "cpu": _cpu(),
        "cores": num_threads(),
        "isa": config["isa"],
        "compiler": config["compiler"],
        "platform": f"{platform.system()} {platform.machine()}",
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
        core = siblings(cpu)
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
    calls: dict[Key, Callable[[], Any]] = {}
    for name in peers:
        tell(f"{_threads(threads)}: {name} gets ready")
        for mode, outcome in _ready(name, workload, threads, too_long).items():
            results[mode][name], call = outcome
            if call is not None:
                calls[name, mode] = call

    def in_turns(some: Mapping[Key, Callable[[], Any]], seconds: float, rounds: int) -> dict[Key, list[float]]:
        return _in_turns(some, {key: once[key] for key in some}, seconds, rounds, tell_threads)

    def tell_threads(text: str) -> None:
        tell(f"{_threads(threads)}: {text}")

    once = {key: _seconds(call) for key, call in calls.items()}
    chosen = in_turns(
        {key: call for key, call in calls.items() if key[0] not in OWN}, seconds * CHOOSING_SHARE, CHOOSING_ROUNDS
    )
    choice = {key: float(np.median(taken)) for key, taken in chosen.items()}
    best = {mode: min((taken for key, taken in choice.items() if key[1] == mode), default=0.0) for mode in MODES}
    beaten = {key for key, taken in choice.items() if taken > BEATEN * best[key[1]]}
    timed = in_turns({key: call for key, call in calls.items() if key not in beaten}, seconds, ROUNDS)
    for key, taken in (chosen | timed).items():
        first, median, third = np.quantile(taken, (0.25, 0.5, 0.75))
        name, mode = key
        results[mode][name] |= {
            "median": float(median),
            "quartiles": [float(first), float(third)],
            "fastest": min(taken),
            "calls": len(taken),
        }
        if key in choice:
            results[mode][name]["choice"] = choice[key]
    return results


Key = tuple[str, str]  # a peer and a mode
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
        error = assert_right(workload, prepared.results(returned), prepared.eps)
    except TooLongError as reason:
        return {"missing": str(reason)}, None
    except AssertionError as wrong:
        return {"missing": f"its result is wrong: {_first_line(wrong)}"}, None
    except Exception as raised:  # as above
        return {"missing": _first_line(raised)}, None
    return {"settings": prepared.settings, "error": error}, lambda: prepared.run(dy)


def _in_turns(
    calls: Mapping[Key, Callable[[], Any]],
    once: Mapping[Key, float],
    seconds: float,
    rounds: int,
    tell: Callable[[str], None],
) -> dict[Key, list[float]]:
    """Seconds of each timed call: the rounds go through all peers, in another order each. `once`: those of one call."""
    counts = {key: min(max(int(seconds / taken), rounds), MOST_CALLS) for key, taken in once.items()}
    samples: dict[Key, list[float]] = {key: [] for key in calls}
    order = list(calls)
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            random.Random(turn).shuffle(order)
            for key in order:
                tell(f"round {turn + 1} of {rounds}, {key[0]} {key[1]}")
                _settle()
                if once[key] < WARM_UP:
                    calls[key]()
                count = (turn + 1) * counts[key] // rounds - turn * counts[key] // rounds
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
