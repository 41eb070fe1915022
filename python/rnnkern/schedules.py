"""Schedules of the learning rate: each sets `lr` of an optimizer, when it is made and after each of its steps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from .arguments import check_names, describe, fraction, integer, number, positive
from .train import SGD, Adam

__all__ = ["CosineSchedule", "PlateauSchedule", "StepSchedule"]


class _Schedule(ABC):
    """A learning rate that is a function of the number of steps alone."""

    def __init__(self, optimizer: SGD | Adam) -> None:
        self.optimizer = _optimizer(optimizer)
        self.base_lr = optimizer.lr
        self.steps = 0
        optimizer.lr = self.lr_at(0)

    @abstractmethod
    def lr_at(self, step: int) -> float:
        """The learning rate of the step after so many."""

    def step(self) -> None:
        """Set the learning rate of the next step; to be called after each step of the optimizer."""
        self.steps += 1
        self.optimizer.lr = self.lr_at(self.steps)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps and the optimizer's first learning rate, to `save`."""
        return {"steps": self.steps, "base_lr": self.base_lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, and set the learning rate that belongs there; with an error, nothing changes.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown, or a value is out of range.
        """
        check_names("state", state, ("steps", "base_lr"))
        steps = integer("state['steps']", state["steps"], 0)
        self.base_lr, self.steps = positive("state['base_lr']", state["base_lr"], zero=True), steps
        self.optimizer.lr = self.lr_at(steps)


class CosineSchedule(_Schedule):
    """Up in a line, then down as half a cosine (Loshchilov and Hutter 2017, equation 5; Goyal et al. 2017, 2.2).

    With W steps of warm-up of S in all, at step n from 0: lr (n + 1) / (W + 1) for n < W, then
    final_lr + (lr - final_lr) (1 + cos(pi (n - W) / (S - W))) / 2, and final_lr from n = S on.

    Parameters
    ----------
    optimizer
        `SGD`, `Adam` or `AdamW`; its `lr` now is the highest.
    total_steps
        S, at least 1.
    warmup_steps
        W, from 0 to S - 1.
    final_lr
        Learning rate at the end, >= 0.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> optimizer = rk.SGD({"weight": np.zeros(3)}, lr=1.0)
    >>> schedule = rk.CosineSchedule(optimizer, total_steps=6, warmup_steps=2)
    >>> rates = []
    >>> for _ in range(8):
    ...     rates.append(round(optimizer.lr, 2))
    ...     schedule.step()  # after optimizer.step(grads)
    >>> rates
    [0.33, 0.67, 1.0, 0.85, 0.5, 0.15, 0.0, 0.0]
    """

    def __init__(
        self, optimizer: SGD | Adam, total_steps: int, warmup_steps: int = 0, *, final_lr: float = 0.0
    ) -> None:
        self.total_steps = integer("total_steps", total_steps, 1)
        self.warmup_steps = integer("warmup_steps", warmup_steps, 0, self.total_steps - 1)
        self.final_lr = positive("final_lr", final_lr, zero=True)
        super().__init__(optimizer)

    def lr_at(self, step: int) -> float:
        """The learning rate of the step after so many; a pure function of it."""
        if step < self.warmup_steps:
            return self.base_lr * (step + 1) / (self.warmup_steps + 1)
        part = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.final_lr + (self.base_lr - self.final_lr) * (1 + math.cos(math.pi * part)) / 2


class StepSchedule(_Schedule):
    """The learning rate times `factor` after every so many steps: lr factor^(n // every) at step n from 0.

    Parameters
    ----------
    optimizer
        `SGD`, `Adam` or `AdamW`; its `lr` now is that of the first steps.
    every
        Steps (or epochs, where `step` is called after each of these), at least 1.
    factor
        In [0, 1).

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> schedule = rk.StepSchedule(rk.SGD({"weight": np.zeros(3)}, lr=1.0), every=10, factor=0.5)
    >>> [schedule.lr_at(step) for step in (0, 9, 10, 25)]
    [1.0, 1.0, 0.5, 0.25]
    """

    def __init__(self, optimizer: SGD | Adam, every: int, factor: float = 0.1) -> None:
        self.every = integer("every", every, 1)
        self.factor = fraction("factor", factor)
        super().__init__(optimizer)

    def lr_at(self, step: int) -> float:
        """The learning rate of the step after so many; a pure function of it."""
        return self.base_lr * self.factor ** (step // self.every)


class PlateauSchedule:
    """The learning rate times `factor` where a loss falls no more, as `torch.optim.lr_scheduler.ReduceLROnPlateau`.

    A loss is better where it is below `best - threshold |best|`. After more than `patience` losses in a row that are
    not (NaN is not), the learning rate falls and the count begins again.

    Parameters
    ----------
    optimizer
        `SGD`, `Adam` or `AdamW`.
    factor
        In [0, 1).
    patience
        Losses, at least 0.
    threshold
        In [0, 1).
    final_lr
        What the learning rate does not fall below, >= 0.

    Raises
    ------
    TypeError, ValueError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> optimizer = rk.SGD({"weight": np.zeros(3)}, lr=1.0)
    >>> schedule = rk.PlateauSchedule(optimizer, factor=0.5, patience=1)
    >>> rates = []
    >>> for validation_loss in (3.0, 2.0, 2.0, 2.1, 1.0, 1.1):
    ...     schedule.step(validation_loss)
    ...     rates.append(optimizer.lr)
    >>> rates
    [1.0, 1.0, 1.0, 0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        optimizer: SGD | Adam,
        factor: float = 0.1,
        patience: int = 10,
        *,
        threshold: float = 1e-4,
        final_lr: float = 0.0,
    ) -> None:
        self.optimizer = _optimizer(optimizer)
        self.factor = fraction("factor", factor)
        self.patience = integer("patience", patience, 0)
        self.threshold = fraction("threshold", threshold)
        self.final_lr = positive("final_lr", final_lr, zero=True)
        self.best = math.inf
        self.waited = 0

    def step(self, loss: float) -> None:
        """Take in one loss, such as that of an epoch on what is not trained on.

        Raises
        ------
        TypeError
            loss is no number.
        """
        value = number("loss", loss)
        margin = 0.0 if math.isinf(self.best) else self.threshold * abs(self.best)
        if value < self.best - margin:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited > self.patience:
            self.optimizer.lr = min(self.optimizer.lr, max(self.optimizer.lr * self.factor, self.final_lr))
            self.waited = 0

    def state_dict(self) -> dict[str, Any]:
        """The best loss, how many came since, and the learning rate, to `save`."""
        return {"best": self.best, "waited": self.waited, "lr": self.optimizer.lr}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, with its learning rate; with an error, nothing changes.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown, or a value is out of range.
        """
        check_names("state", state, ("best", "waited", "lr"))
        best, waited = number("state['best']", state["best"]), integer("state['waited']", state["waited"], 0)
        self.optimizer.lr = positive("state['lr']", state["lr"], zero=True)
        self.best, self.waited = best, waited


def _optimizer(value: SGD | Adam) -> SGD | Adam:
    if not isinstance(value, SGD | Adam):
        raise TypeError(f"optimizer: expected SGD, Adam or AdamW, got {describe(value)}")
    return value
