"""Which layers learn what lies 50 to 1,000 steps back: the adding problem and the copy task.

    python examples/long_lags.py             at most 20 minutes on two cores: long_lags.csv and long_lags.png
    python examples/long_lags.py --quick     seconds: two layers at one short lag
    python examples/long_lags.py --tasks copy --lags 100 500 --minutes 5

Each layer gets an equal share of the time for each task and lag, and stops early when it has learned; what it has not
learned in its share is drawn as such. Ctrl-C ends it with what is finished. The page is docs/examples/long_lags.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import multiprocessing
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import rnnkern as rk

Array = NDArray[Any]

HIDDEN, BATCH = 32, 16
LOOK = 25  # updates from one look at the loss to the next
LEARNED = 0.1  # of the loss that is left without any memory
SYMBOLS, KEPT = 4, 5  # of the copy task: how many symbols there are, and how many of them are to be kept


LAYERS: dict[str, tuple[Any, str, str]] = {  # name in the picture: class, initialisation, colour
    "tanh": (rk.RNN, "", "#9a9a9a"),
    "tanh, orthogonal": (rk.RNN, "orthogonal", "#444444"),
    "LSTM": (rk.LSTM, "", "#8fbbe0"),
    "LSTM, chrono": (rk.LSTM, "chrono", "#1f6fa8"),
    "GRU": (rk.GRU, "", "#f0b48a"),
    "GRU, chrono": (rk.GRU, "chrono", "#c8581a"),
}


def layer_of(name: str, inputs: int, lag: int) -> Any:
    kind, initialisation, _ = LAYERS[name]
    layer = kind(inputs, HIDDEN, seed=0)
    if initialisation == "orthogonal":
        rk.init.orthogonal(layer, seed=0)
    elif initialisation == "chrono":
        rk.init.chrono(layer, longest=1.5 * lag, seed=0)
    return layer


class Task(ABC):
    """Random rows, a model, and a loss with the value that it has for who remembers nothing."""

    guess: float
    inputs: int

    @abstractmethod
    def model(self, layer: Any) -> rk.Sequential:
        """The layer between what it reads and what it says."""

    @abstractmethod
    def batch(self, generator: np.random.Generator, lag: int) -> tuple[Array, Array]:
        """x and the target."""

    @abstractmethod
    def loss(self, y: Array, target: Array) -> tuple[float, Any]:
        """The loss, and the gradient of y."""


class Adding(Task):
    """Of `lag` numbers one is marked in the first tenth and one in the second half; the answer is their sum."""

    guess = 1 / 6  # squared error of who always says 1
    inputs = 2

    def model(self, layer: Any) -> rk.Sequential:
        return rk.Sequential(layer, rk.Last(), rk.Linear(HIDDEN, 1, seed=1))

    def batch(self, generator: np.random.Generator, lag: int) -> tuple[Array, Array]:
        x, rows = np.zeros((lag, BATCH, 2), np.float32), np.arange(BATCH)
        x[..., 0] = generator.random((lag, BATCH))
        x[generator.integers(lag // 10, size=BATCH), rows, 1] = 1
        x[generator.integers(lag // 2, lag, size=BATCH), rows, 1] = 1
        return x, (x[..., 0] * x[..., 1]).sum(0)[:, None]

    def loss(self, y: Array, target: Array) -> tuple[float, Any]:
        return rk.mse(y, target)


class Copy(Task):
    """Five symbols, `lag` blanks, and then the five symbols are to be said in their order."""

    guess = math.log(SYMBOLS)
    inputs = 8

    def model(self, layer: Any) -> rk.Sequential:
        embedding = rk.Embedding(SYMBOLS + 2, self.inputs, seed=2)
        return rk.Sequential(embedding, layer, rk.Linear(HIDDEN, SYMBOLS, seed=1))

    def batch(self, generator: np.random.Generator, lag: int) -> tuple[Array, Array]:
        blank, go = SYMBOLS, SYMBOLS + 1
        x, target = np.full((lag + 2 * KEPT, BATCH), blank), np.full((lag + 2 * KEPT, BATCH), -1)
        x[:KEPT] = target[-KEPT:] = generator.integers(SYMBOLS, size=(KEPT, BATCH))
        x[-KEPT] = go
        return x, target

    def loss(self, y: Array, target: Array) -> tuple[float, Any]:
        return rk.cross_entropy(y, target, ignore_index=-1)


TASKS: dict[str, Task] = {"adding": Adding(), "copy": Copy()}


@dataclass(frozen=True)
class Job:
    task: str
    lag: int
    layer: str
    seconds: float  # its share of the time
    updates: float  # and how many it may have at most


@dataclass(frozen=True)
class Result:
    job: Job
    updates: int
    seconds: float
    left: float  # loss of the last updates, as a share of that of a guess

    @property
    def learned(self) -> bool:
        return self.left < LEARNED

    def __str__(self) -> str:
        verdict = "learned" if self.learned else f"not learned, {self.left:.0%} of the loss of a guess left"
        job = self.job
        return f"{job.task:6} {job.lag:5}  {job.layer:16} {self.updates:6} updates {self.seconds:5.1f} s  {verdict}"


def train(job: Job) -> Result:
    """Train on fresh rows until it is learned, or its share of the time is over."""
    task, generator, start = TASKS[job.task], np.random.default_rng(0), time.perf_counter()
    model = task.model(layer_of(job.layer, task.inputs, job.lag))
    optimizer = rk.Adam(model, lr=0.01)
    losses: list[float] = []
    left = math.inf
    while time.perf_counter() - start < job.seconds and len(losses) < job.updates and not left < LEARNED:
        x, target = task.batch(generator, job.lag)
        y, _, tape = model.forward(x)
        loss, dy = task.loss(y, target)
        grads = model.backward(tape, dy, need_x=False)
        try:
            rk.clip_grad_norm(grads, 1.0)
            optimizer.step(grads)
        except FloatingPointError:  # the gradient exploded, as that of tanh does: go on with the next rows
            pass
        losses.append(loss / task.guess)
        if len(losses) % LOOK == 0:
            left = float(np.mean(losses[-LOOK:]))
    return Result(job, len(losses), time.perf_counter() - start, float(np.mean(losses[-LOOK:])))


def start_worker() -> None:
    """Give a process of the pool one thread, and leave Ctrl-C to the first process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rk.set_num_threads(1)


def write(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("task", "lag", "layer", "share", "learned", "updates", "seconds", "left"))
        for one in results:
            row = (one.job.task, one.job.lag, one.job.layer, f"{one.job.seconds:.1f}", one.learned, one.updates)
            writer.writerow((*row, f"{one.seconds:.1f}", f"{one.left:.3f}"))


def draw(results: Sequence[Result], path: Path) -> None:
    """Seconds until each layer had learned, by lag; crosses in the band above where it had not."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        print("no picture without matplotlib: python -m pip install matplotlib")
        return
    tasks = [task for task in TASKS if any(one.job.task == task for one in results)]
    lags = sorted({one.job.lag for one in results})
    share = max(one.job.seconds if math.isfinite(one.job.seconds) else one.seconds for one in results)
    figure, axes = plt.subplots(1, len(tasks), figsize=(5 * len(tasks), 4.2), sharey=True, squeeze=False)
    for axis, task in zip(axes[0], tasks, strict=True):
        axis.axhspan(share * 1.15, share * 5, color="#f4e9e9")
        axis.text(-0.5, share * 3.7, "not learned in its share", color="#a05050", fontsize=9)
        for index, (layer, (_, _, colour)) in enumerate(LAYERS.items()):
            found = {one.job.lag: one for one in results if (one.job.task, one.job.layer) == (task, layer)}
            shift = (index - len(LAYERS) / 2 + 0.5) * 0.09
            places = np.array([lags.index(lag) for lag in found])
            heights = np.array([one.seconds if one.learned else np.nan for one in found.values()])
            axis.plot(places + shift, heights, "o-", color=colour, label=layer)
            failed = places[np.isnan(heights)]
            axis.plot(failed + shift, np.full(len(failed), share * 2.2), "x", color=colour, markeredgewidth=2)
        axis.set(title=task, xlabel="lag (steps)", yscale="log", xlim=(-0.6, len(lags) - 0.4), ylim=(0.3, share * 5))
        axis.set_yticks([tick for tick in (1, 3, 10, 30, 100, 300) if tick <= share])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.set_xticks(range(len(lags)), [f"{lag:,}" for lag in lags])
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"seconds until learned, one thread, of {share:.0f} s")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--lags", nargs="+", type=int, default=[50, 200, 500, 1000])
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--minutes", type=float, default=20, help="of all together, at most")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument(
        "--quick", action="store_true", help="tanh and GRU, the adding problem at 50 steps, 400 updates"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("long_lags"), metavar="FOLDER", help="for the picture and the table"
    )
    options = parser.parse_args()
    if min(options.lags) < 10:
        parser.error(f"--lags: expected at least 10 steps, got {min(options.lags)}")
    if options.quick:
        options.tasks, options.lags, options.layers = ["adding"], [50], ["tanh", "GRU, chrono"]
    kinds = [(task, lag, layer) for lag in options.lags for task in options.tasks for layer in options.layers]
    share = math.inf if options.quick else 60 * options.minutes * options.processes / len(kinds)
    jobs = [Job(*kind, seconds=share, updates=400 if options.quick else math.inf) for kind in kinds]
    print(f"{len(jobs)} trainings" + ("" if options.quick else f", each of at most {share:.0f} s"), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    with multiprocessing.get_context("spawn").Pool(options.processes, start_worker) as pool:
        try:
            for result in pool.imap_unordered(train, jobs):
                results.append(result)
                print(f"{len(results):3}/{len(jobs)}  {result}", flush=True)
        except KeyboardInterrupt:
            print(f"interrupted; {len(results)} trainings are finished")
    if results:
        results.sort(key=lambda one: jobs.index(one.job))
        print("share of the loss of a guess that is left:")
        for one in results:
            print(f"  {f'{one.job.task} at {one.job.lag}, {one.job.layer}':32}  {one.left:.3f}")
        write(results, options.out / "long_lags.csv")
        draw(results, options.out / "long_lags.png")


if __name__ == "__main__":
    main()
