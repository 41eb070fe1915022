"""`fit`: the loop around a model, its loss and its optimizer, for those who do not want to write it."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arguments import as_array, check_names, describe, flag, integer, positive, seed_or_none, warn_the_caller
from .clipping import clip_grad_norm
from .data import Batch
from .layers import Recurrent
from .schedules import CosineSchedule, PlateauSchedule, StepSchedule
from .sequential import Sequential, derived_seed
from .terminal import Terminal, stdout_is_a_terminal
from .train import SGD, Adam
from .weights import load, save

__all__ = ["History", "fit"]

Array = NDArray[Any]
Loss = Callable[..., tuple[float, Any]]
Metric = Callable[[Array, Array], float]
_SCHEDULES: tuple[type[Any], ...] = (CosineSchedule, StepSchedule, PlateauSchedule)
_Batch = tuple[Any, Array, Any, Any]  # x, target, and lengths and resets or None


@dataclass
class History:
    """What `fit` saw: one entry for each epoch that was finished, and why it ended."""

    loss: list[float] = field(default_factory=list)  #: of training, the mean of the batches by their rows
    validation_loss: list[float] = field(default_factory=list)  #: empty without validation
    metrics: dict[str, list[float]] = field(default_factory=dict)  #: on the validation
    lr: list[float] = field(default_factory=list)  #: at the end of the epoch
    seconds: list[float] = field(default_factory=list)  #: of the epoch, validation included
    best_epoch: int | None = None  #: index of the least validation loss, whose weights the model has; None without one
    ended: str = ""  #: why, such as "all epochs"

    def __str__(self) -> str:
        if not self.loss:
            return self.ended
        at = -1 if self.best_epoch is None else self.best_epoch
        best = "" if self.best_epoch is None else f", validation {self.validation_loss[at]:.4g} in epoch {at + 1}"
        return f"{self.ended}: training loss {self.loss[at]:.4g}{best}; {sum(self.seconds):.1f} s"


def fit(
    model: Any,
    data: Any,
    *,
    loss: Loss,
    epochs: int,
    optimizer: SGD | Adam | None = None,
    validation: Any = None,
    metrics: Mapping[str, Metric] | None = None,
    schedule: CosineSchedule | StepSchedule | PlateauSchedule | None = None,
    max_norm: float | None = None,
    patience: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    carry_state: bool = False,
    seed: int | None = None,
    verbose: bool | None = None,
) -> History:
    """Train a model; with validation it ends with the weights of the epoch whose validation loss was least.

    Ctrl-C ends the training after the step that runs, as if it had been the last; a second one at once.

    Parameters
    ----------
    model
        `Sequential`, or a recurrent layer.
    data
        What gives the batches of an epoch each time it is gone through, such as a list, or a function of the number of
        the epoch, from 0, that does. A batch is (x, target), (x, target, lengths) or (x, target, lengths, resets), as
        model and loss take them; lengths may be None.
    loss
        A function as `cross_entropy` or `mse`: of y and target the loss and the gradient of y; where a batch has
        lengths and y has steps it is given `lengths` and `batch_first` too.
    epochs
        How often to go through the data, those before a `resume` included.
    optimizer
        Of this model, such as `Adam(model)`, which None stands for; with a schedule its own.
    validation
        Batches that are not trained on, in the forms of `data`. A loss of NaN there warns.
    metrics
        Functions of the rows (N, F) of y on all of the validation and of their targets, (N,) or (N, F), by name; past
        a row's end there is none.
    schedule
        Of that optimizer: `step` is called after each step, of a `PlateauSchedule` after each epoch with the validation
        loss.
    max_norm
        To which the gradients of each step are scaled down together, with `clip_grad_norm`.
    patience
        How many epochs may follow the best one before the training ends; needs validation.
    checkpoint
        A file that is written after each epoch, as by `save`.
    resume
        Whether to go on from the checkpoint, where there is one: with a seed and the same data, to the same bits.
    carry_state
        Whether each batch begins with the states in which the one before it ended, as batches that follow one another
        in long streams: truncated backpropagation through time. An epoch begins with zeros.
    seed
        Of the dropout masks; None draws a fresh one.
    verbose
        Whether to show a line of progress; None shows it where stdout is a terminal.

    Returns
    -------
    History
        With the losses, metrics, learning rates and seconds of each epoch, and why the training `ended`.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.
    FloatingPointError
        A gradient is NaN or infinite, and whether the batch is; the model has the weights before that step.
    OSError
        The checkpoint cannot be read or written.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> x = np.random.default_rng(0).standard_normal((20, 64, 2))  # steps, sequences, features
    >>> target = x.sum((0, 2))[:, None]
    >>> model = rk.Sequential(rk.GRU(2, 16, seed=0), rk.Last(), rk.Linear(16, 1, seed=1))
    >>> def batches(epoch):
    ...     for part in np.array_split(np.random.default_rng(epoch).permutation(48), 3):
    ...         yield x[:, part], target[part]
    >>> history = rk.fit(model, batches, loss=rk.mse, epochs=30, optimizer=rk.Adam(model, lr=1e-2),
    ...                  validation=[(x[:, 48:], target[48:])], patience=5, seed=0)
    >>> min(history.validation_loss) < history.validation_loss[0] / 2
    True
    """
    _check_kinds(model, loss, metrics)
    epochs = integer("epochs", epochs, 1)
    patience = None if patience is None else integer("patience", patience, 1)
    max_norm = None if max_norm is None else positive("max_norm", max_norm)
    if validation is None and (patience is not None or metrics):
        raise ValueError(f"{'metrics' if patience is None else 'patience'}: expected None without validation")
    training = _Training(model, optimizer, schedule, seed_or_none(seed), dict(metrics or {}))
    if flag("resume", resume) and checkpoint is None:
        raise ValueError("checkpoint: expected a path to resume from, got None")
    if resume and checkpoint is not None and Path(checkpoint).exists():
        training.load(checkpoint, validation is not None)
    history, carry = training.history, flag("carry_state", carry_state)
    history.ended = "all epochs"
    shown = stdout_is_a_terminal() if verbose is None else flag("verbose", verbose)
    with Terminal() if shown else nullcontext() as terminal, _noting_interrupt() as interrupts:
        for epoch in range(len(history.loss), epochs):
            if interrupts or (patience is not None and training.waited >= patience):
                history.ended = "interrupted" if interrupts else f"no better validation for {training.waited} epochs"
                break
            start, state, mean = time.perf_counter(), None, _Mean()
            for step, batch in enumerate(_batches("data", data, epoch), 1):
                state, value, rows = training.step(batch, state if carry else None, loss, max_norm)
                mean.add(value, rows)
                if terminal is not None:
                    terminal.progress(f"epoch {epoch + 1}/{epochs}  step {step}  loss {mean.value:.4g}{training.shown}")
                if interrupts:
                    break
            if interrupts:
                history.ended = f"interrupted in epoch {epoch + 1}"
                break
            mean.need_rows("data", epoch)
            results = None
            if validation is not None:
                results = training.evaluate(_batches("validation", validation, epoch), loss, carry)
            training.end_epoch(mean.value, results, time.perf_counter() - start)
            if checkpoint is not None:
                training.save(checkpoint)
        if training.best is not None:
            model.load_state_dict(training.best)
        if terminal is not None:
            terminal.say(str(history))
    return history


def _check_kinds(model: Any, loss: Any, metrics: Any) -> None:
    """Refuse what is no model, no loss or no metrics."""
    if not isinstance(model, Sequential | Recurrent):
        raise TypeError(f"model: expected Sequential or a recurrent layer, got {describe(model)}")
    if not callable(loss):
        raise TypeError(f"loss: expected a function, such as rnnkern.mse, got {describe(loss)}")
    if metrics is not None and not (isinstance(metrics, Mapping) and all(map(callable, metrics.values()))):
        raise TypeError(f"metrics: expected a mapping of names to functions of y and target, got {describe(metrics)}")


class _Mean:
    """The mean of losses, by the rows of each."""

    def __init__(self) -> None:
        self.total, self.rows = 0.0, 0

    def add(self, value: float, rows: int) -> None:
        self.total, self.rows = self.total + value * rows, self.rows + rows

    @property
    def value(self) -> float:
        return self.total / self.rows if self.rows else math.nan

    def need_rows(self, name: str, epoch: int) -> None:
        """Refuse an epoch of empty batches, as windows of a series are that is shorter than one."""
        if not self.rows:
            raise ValueError(f"{name}: expected batches with rows, got only empty ones in epoch {epoch}")


class _Training:
    """A model with all that changes while it is trained, which a checkpoint keeps."""

    def __init__(self, model: Any, optimizer: Any, schedule: Any, seed: int | None, metrics: dict[str, Metric]) -> None:
        if schedule is not None and not isinstance(schedule, _SCHEDULES):
            raise TypeError(f"schedule: expected one of rnnkern, such as CosineSchedule, got {describe(schedule)}")
        if optimizer is None:
            optimizer = Adam(model) if schedule is None else schedule.optimizer
        if not isinstance(optimizer, SGD | Adam):
            raise TypeError(f"optimizer: expected one such as rnnkern.Adam(model), got {describe(optimizer)}")
        held = [list(map(id, one.values())) for one in optimizer._parameters]
        if held != [list(map(id, model.parameters.values()))]:
            raise ValueError("optimizer: expected one of the parameters of the model, such as rnnkern.Adam(model)")
        if schedule is not None and schedule.optimizer is not optimizer:
            raise ValueError("schedule: expected one of the optimizer, got one of another")
        self.model, self.optimizer, self.schedule, self.metrics, self._seed = model, optimizer, schedule, metrics, seed
        self.seed = int(np.random.default_rng().integers(2**63)) if seed is None else seed
        self.history = History(metrics={name: [] for name in metrics})
        self.best: dict[str, Array] | None = None
        self.by_epoch = isinstance(schedule, PlateauSchedule)

    @property
    def waited(self) -> int:
        """Epochs since the best one."""
        return len(self.history.loss) - 1 - (-1 if self.history.best_epoch is None else self.history.best_epoch)

    @property
    def shown(self) -> str:
        """The end of the line of progress."""
        losses = self.history.validation_loss
        return f"  validation {losses[-1]:.4g}" if losses else ""

    def _of_steps(self, lengths: Any) -> dict[str, Any]:
        """Where rows end, of what has steps."""
        if lengths is None:
            return {}
        return {"lengths": lengths} | ({"batch_first": True} if self.model.batch_first else {})

    def _of_loss(self, lengths: Any) -> dict[str, Any]:
        """What the loss is told of the ends of rows."""
        return self._of_steps(None if getattr(self.model, "many_to_one", False) else lengths)

    def _cause(self, batch: _Batch, y: Array) -> str:
        """Whether NaN in the gradient of a batch is of its data, and what to do about it."""
        x, target, lengths, _ = batch
        x = np.asarray(x)
        if not _finite(x, x, self._of_steps(lengths)):
            return "x of this batch has NaN or infinity: fill or leave out these values"
        if not _finite(target, y, self._of_loss(lengths)):
            return "target of this batch has NaN or infinity: leave these rows out, or give the loss row_weights of 0"
        return "x and target of this batch are finite: try a smaller learning rate, or max_norm=1.0"

    def step(self, batch: _Batch, state: Any, loss: Loss, max_norm: float | None) -> tuple[Any, float, int]:
        """Train on one batch; the final state, the loss, and the number of rows it is the mean of."""
        x, target, lengths, resets = batch
        seed, options = derived_seed(self.seed, self.optimizer.steps), self._of_loss(lengths)
        y, state, tape = self.model.forward(x, state, lengths=lengths, resets=resets, seed=seed)
        found = loss(y, target, **options)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise TypeError(f"loss: expected a function that returns the loss and its gradient, got {describe(found)}")
        value, dy = found
        grads = self.model.backward(tape, dy, need_x=False)
        if max_norm is not None:
            clip_grad_norm(grads, max_norm)
        try:
            self.optimizer.step(grads)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}. {self._cause(batch, y)}") from None
        if self.schedule is not None and not self.by_epoch:
            self.schedule.step()
        return state, float(value), _count(y, options)

    def evaluate(self, batches: Iterator[_Batch], loss: Loss, carry: bool) -> tuple[float, dict[str, float]]:
        """The loss and the metrics of batches that are not trained on."""
        mean, state, parts = _Mean(), None, []
        for x, target, lengths, resets in batches:
            options = self._of_loss(lengths)
            y, state = self.model(x, state if carry else None, lengths=lengths, resets=resets)
            mean.add(float(loss(y, target, **options)[0]), _count(y, options))
            if self.metrics:
                rows = _rows(target, y, options).copy()  # of an array that the next batch may be in too
                parts.append((_rows(y, y, options), rows))
        mean.need_rows("validation", len(self.history.loss))
        whole = [np.concatenate(part) for part in zip(*parts, strict=True)]
        return mean.value, {name: float(metric(*whole)) for name, metric in self.metrics.items()}

    def end_epoch(self, loss: float, results: tuple[float, dict[str, float]] | None, seconds: float) -> None:
        """Note what an epoch gave."""
        history = self.history
        if results is not None:
            validation, metrics = results
            best = math.inf if history.best_epoch is None else history.validation_loss[history.best_epoch]
            if validation < best:
                history.best_epoch, self.best = len(history.loss), self.model.state_dict()
            if math.isnan(validation) and not any(map(math.isnan, history.validation_loss)):
                warn_the_caller("validation: the loss is NaN, and an epoch with such a loss is never the best one")
            history.validation_loss.append(validation)
            for name, value in metrics.items():
                history.metrics[name].append(value)
        if self.schedule is not None and self.by_epoch:
            self.schedule.step(loss if results is None else results[0])
        history.loss.append(loss)
        history.lr.append(self.optimizer.lr)
        history.seconds.append(seconds)

    def save(self, path: str | Path) -> None:
        """Write all of it."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best}
        schedule = None if self.schedule is None else self.schedule.state_dict()
        save(path, state | {"schedule": schedule, "history": asdict(self.history), "seed": self.seed})

    def load(self, path: str | Path, validated: bool) -> None:
        """Go on from what was written; all of it or, with an error, nothing."""
        state, before = load(path), (self.model.state_dict(), self.optimizer.state_dict())
        try:
            check_names("state", state, ("model", "optimizer", "best", "schedule", "history", "seed"))
            history, schedule = History(**state["history"]), state["schedule"]
            if set(history.metrics) != set(self.metrics) or bool(history.validation_loss) != validated:
                raise ValueError("it was written with another validation or other metrics")
            if (schedule is None) != (self.schedule is None):
                raise ValueError("it was written with another schedule")
            if self._seed not in (None, state["seed"]):
                raise ValueError(f"it was written with the seed {state['seed']}, got {self._seed}")
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(schedule)
            self.history, self.best, self.seed = history, state["best"], state["seed"]
        except (TypeError, ValueError, KeyError) as error:
            for one, state_before in zip((self.model, self.optimizer), before, strict=True):
                one.load_state_dict(state_before)
            raise ValueError(f"checkpoint {path}: expected one of this training: {error}") from error


def _batches(name: str, data: Any, epoch: int) -> Iterator[_Batch]:
    """The batches of an epoch."""
    given = data if hasattr(data, "__iter__") or not callable(data) else data(epoch)
    if not hasattr(given, "__iter__") or (given is data and iter(given) is given):
        raise TypeError(f"{name}: expected a list or a function of the epoch, for one pass each, got {describe(data)}")
    none = True
    for batch in given:
        none, expected = (
            False,
            f"{name}: expected batches (x, target) or (x, target, lengths) or (x, target, lengths, resets)",
        )
        if isinstance(batch, Batch):
            raise TypeError(f"{expected}, got (x, lengths, indices): give x, labels[indices], lengths")
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3, 4):
            raise TypeError(f"{expected}, got {describe(batch)}; a single batch is [(x, target)]")
        x, target, lengths, resets = (*batch, None, None)[:4]
        yield x, as_array("target", target), lengths, resets
    if none:
        raise ValueError(f"{name}: expected at least one batch, got none in epoch {epoch}")


def _count(y: Array, options: Mapping[str, Any]) -> int:
    """How many rows a loss of y is the mean of."""
    return int(np.sum(options["lengths"])) if "lengths" in options else y.size // y.shape[-1]


def _rows(array: Array, y: Array, options: Mapping[str, Any]) -> Array:
    """Those rows of y, or of a target with its leading dimensions: (N, ...)."""
    if "lengths" in options:
        steps, batch = y.shape[1::-1] if "batch_first" in options else y.shape[:2]
        valid = np.arange(steps)[:, None] < np.reshape(options["lengths"], batch)
        return array[valid.T if "batch_first" in options else valid]
    return array.reshape(y.size // y.shape[-1], *array.shape[y.ndim - 1 :])


def _finite(array: Array, y: Array, options: Mapping[str, Any]) -> bool:
    """Whether those rows have neither NaN nor infinity; all of what has other rows, as a loss of one's own may take."""
    rows = _rows(array, y, options) if array.shape[: y.ndim - 1] == y.shape[:-1] else array
    return rows.dtype.kind != "f" or bool(np.isfinite(rows).all())


@contextmanager
def _noting_interrupt() -> Iterator[list[int]]:
    """Let the first Ctrl-C add to the list, where it would raise KeyboardInterrupt; the second one does that."""
    noted: list[int] = []
    usual = signal.default_int_handler
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not usual:
        yield noted
        return

    def note(number: int, _: object) -> None:
        noted.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, usual)
