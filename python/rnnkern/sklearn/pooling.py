"""What the output layer reads of the steps of a batch, and the way back of its gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sequences import Sequences

Array = NDArray[Any]


class Pooling(ABC):
    """Rows (R, D*H) for the output layer, of the y (T, B, D*H) and the state that a recurrent layer returns.

    `lengths` (B,) is None where all sequences of the batch have T steps.
    """

    @abstractmethod
    def read(self, y: Array, state: Any, lengths: Array | None) -> Array:
        """The rows."""

    @abstractmethod
    def gradient(self, drows: Array, y: Array, state: Any, lengths: Array | None) -> tuple[Array | None, Any]:
        """Gradients of y and of the state from that of the rows."""

    def targets(self, data: Sequences, batch: Array) -> Array:
        """(R,): which of the targets each row is for; one for each sequence, unless a subclass says otherwise."""
        return batch

    def of_targets(self, of_sequences: Array, lengths: Array) -> Array:
        """What holds for each sequence, for each target."""
        return of_sequences

    def of_steps(self, of_targets: Array, lengths: Array) -> Array:
        """What holds for each target, for each step."""
        return np.repeat(of_targets, lengths)


class Last(Pooling):
    """The last layer's final h: each sequence's own last one; of the reverse direction that of its first step."""

    def read(self, y: Array, state: Any, lengths: Array | None) -> Array:
        h = _h(state)
        last: Array = h[-_directions(y, h) :].swapaxes(0, 1)  # (B, D, H)
        return last.reshape(len(last), -1)

    def gradient(self, drows: Array, y: Array, state: Any, lengths: Array | None) -> tuple[Array | None, Any]:
        h = _h(state)
        dh, directions = np.zeros_like(h), _directions(y, h)
        dh[-directions:] = drows.reshape(len(drows), directions, -1).swapaxes(0, 1)
        return None, (dh, None) if isinstance(state, tuple) else dh


class Mean(Pooling):
    """The mean of y over the steps of each sequence."""

    def read(self, y: Array, state: Any, lengths: Array | None) -> Array:
        mean: Array = (y.sum(axis=0, dtype=np.float64) / _ends(y, lengths)).astype(y.dtype)
        return mean

    def gradient(self, drows: Array, y: Array, state: Any, lengths: Array | None) -> tuple[Array | None, Any]:
        share = (drows / _ends(y, lengths)).astype(y.dtype)
        return np.ascontiguousarray(np.broadcast_to(share, y.shape)), None


@dataclass(frozen=True)
class Steps(Pooling):
    """y at each step from step `skip` on: a row and a target for each, all sequences' first ones before all second."""

    skip: int = 0

    def read(self, y: Array, state: Any, lengths: Array | None) -> Array:
        return y[self.skip :].reshape(-1, y.shape[2]) if lengths is None else y[self._valid(len(y), lengths)]

    def gradient(self, drows: Array, y: Array, state: Any, lengths: Array | None) -> tuple[Array | None, Any]:
        dy = np.zeros_like(y)
        if lengths is None:
            dy[self.skip :] = drows.reshape(-1, *y.shape[1:])
        else:
            dy[self._valid(len(y), lengths)] = drows
        return dy, None

    def targets(self, data: Sequences, batch: Array) -> Array:
        lengths = data.lengths[batch]
        T = int(lengths.max(initial=0))
        where: Array = data.starts[batch] + np.arange(T)[:, None]
        return where[self._valid(T, lengths)]

    def of_targets(self, of_sequences: Array, lengths: Array) -> Array:
        return np.repeat(of_sequences, lengths)

    def of_steps(self, of_targets: Array, lengths: Array) -> Array:
        return of_targets

    def _valid(self, T: int, lengths: Array) -> Array:
        """(T, B): which steps are read; none past a row's end."""
        t = np.arange(T)[:, None]
        valid: Array = (t >= self.skip) & (t < lengths)
        return valid


POOLINGS: dict[str, Pooling] = {"last": Last(), "mean": Mean(), "steps": Steps()}


def _h(state: Any) -> Array:
    """h (L*D, B, H) of a state, with or without c."""
    h: Array = state[0] if isinstance(state, tuple) else state
    return h


def _directions(y: Array, h: Array) -> int:
    return int(y.shape[2] // h.shape[2])


def _ends(y: Array, lengths: Array | None) -> Any:
    """The number of steps of each row, (B, 1) where they differ; y is (T, B, D*H)."""
    return len(y) if lengths is None else lengths[:, None]
