"""What all estimators share: the parameters of a network, its layers, and their training."""

from __future__ import annotations

import math
import warnings
from abc import ABCMeta, abstractmethod
from contextlib import nullcontext
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from ..arguments import fraction, integer, number, positive
from ..clipping import clip_grad_norm
from ..layers import Recurrent
from ..pieces import Embedding
from ..terminal import Terminal
from ..train import Adam, Linear
from .network import Network
from .pooling import POOLINGS, Pooling
from .sequences import Sequences, batches

Array = NDArray[Any]

STEPS_PREDICTED_AT_ONCE = 1 << 15  # padding included; bounds the memory that a prediction takes


class TrainedNetwork(BaseEstimator, metaclass=ABCMeta):  # type: ignore[misc]
    """Layers that are trained on sequences; what these are and which loss they have is the subclass's."""

    _poolings: tuple[str, ...] = ("last", "mean")
    embedding_: Embedding | None = None  # of a subclass that reads symbols

    def __init__(
        self,
        hidden_size: int = 64,
        *,
        cell: str = "gru",
        num_layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
        pooling: str = "last",
        standardize: bool = True,
        learning_rate: float = 0.005,
        batch_size: int = 32,
        max_iter: int = 100,
        max_norm: float = 1.0,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 20,
        tol: float = 1e-4,
        warm_start: bool = False,
        random_state: Any = None,
        verbose: bool = False,
        dtype: Any = "float32",
        backend: str = "auto",
    ) -> None:
        self.hidden_size = hidden_size
        self.cell = cell
        self.num_layers = num_layers
        self.bidirectional = bidirectional
        self.dropout = dropout
        self.pooling = pooling
        self.standardize = standardize
        self.learning_rate = learning_rate
        self.batch_size = batch_size
        self.max_iter = max_iter
        self.max_norm = max_norm
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.warm_start = warm_start
        self.random_state = random_state
        self.verbose = verbose
        self.dtype = dtype
        self.backend = backend

    @property
    def n_iter_(self) -> int:
        """Epochs trained, those of `warm_start` and `partial_fit` included."""
        return len(self.loss_curve_)

    def _check_parameters(self) -> None:
        """Those that the layers do not check."""
        if self.pooling not in self._poolings:
            raise ValueError(f"pooling: expected one of {', '.join(self._poolings)}, got {self.pooling!r}")
        for name in ("batch_size", "max_iter", "n_iter_no_change"):
            integer(name, getattr(self, name), 1)
        positive("learning_rate", self.learning_rate)
        positive("max_norm", self.max_norm, finite=False)
        fraction("validation_fraction", self.validation_fraction)
        number("tol", self.tol)

    def _note_columns(self, columns: list[Any] | None) -> None:
        """What the features are called, where all of them have names."""
        self.__dict__.pop("feature_names_in_", None)
        if columns is not None and all(isinstance(one, str) for one in columns):
            self.feature_names_in_: Array = np.array(columns, dtype=object)

    def _check_columns(self, expected: str, columns: list[Any] | None) -> None:
        """Features that have names have those of fit, in that order."""
        if columns is not None and hasattr(self, "feature_names_in_"):
            names = self.feature_names_in_.tolist()
            if columns != names:
                raise ValueError(f"{expected} the columns {names}, as in fit, got {columns}")

    def _initialize(self, steps: Array, weights: Array, outputs: int) -> None:
        """Layers of new weights, and what they read of the steps; there is a weight for each step."""
        if isinstance(self.random_state, np.random.Generator):
            seeds = self.random_state.integers(2**31 - 1, size=3)
        else:
            seeds = check_random_state(self.random_state).randint(2**31 - 1, size=3)
        layer_seed, output_seed, seed = (int(seed) for seed in seeds)
        self._generator = np.random.default_rng(seed)
        layer = Recurrent(
            self.cell, self._initialize_inputs(steps, weights), self.hidden_size, self.num_layers, dropout=self.dropout,
            bidirectional=self.bidirectional, dtype=self.dtype, backend=self.backend, seed=layer_seed,
        )  # fmt: skip
        layer.release(for_good=True)  # an estimator lives on after its training
        width = layer.hidden_size * (1 + layer.bidirectional)
        self.output_ = Linear(width, outputs, dtype=self.dtype, backend=self.backend, seed=output_seed)
        self.layer_ = layer
        self._pooling = self.pooling  # what the weights are made for
        self.loss_curve_: list[float] = []
        self.validation_scores_: list[float] = []
        self._optimizer_state: dict[str, Any] | None = None

    @abstractmethod
    def _initialize_inputs(self, steps: Array, weights: Array) -> int:
        """The scales of the features; returns how many inputs the recurrent layer has."""

    @property
    def _network(self) -> Network:
        return Network(self.embedding_, self.layer_, self.output_, self._reading)

    @property
    def _reading(self) -> Pooling:
        """What the output layer reads, as the weights are made for it."""
        return POOLINGS[self._pooling]

    def _train(
        self, data: Sequences, targets: Array, weights: Array, rows: Array, epochs: int, early_stopping: bool
    ) -> bool:
        """Epochs over `rows`, until the loss or, with `early_stopping`, the validation score no longer improves.

        Returns False where the epochs were over before.
        """
        rows, validation = self._split(targets, rows) if early_stopping else (rows, rows[:0])
        layers = self._network.layers
        held_out = self._network.pooling.targets(data, validation)
        optimizer = Adam(layers, self.learning_rate)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        best, stale, kept, converged = -math.inf, 0, None, True
        try:
            with Terminal() if self.verbose else nullcontext() as terminal, np.errstate(all="ignore"):
                for epoch in range(epochs):
                    optimizer.lr = self._learning_rate(epoch / epochs)
                    loss = self._epoch(optimizer, data, targets, weights, rows)
                    self.loss_curve_.append(loss)
                    if not math.isfinite(loss):
                        message = f"the loss of epoch {self.n_iter_} is {loss}: training ends; lower learning_rate"
                        warnings.warn(message, ConvergenceWarning, stacklevel=4)
                        break
                    score, line = -loss, f"epoch {self.n_iter_}  loss {loss:.4g}"
                    if early_stopping:
                        outputs = self._outputs(data, validation)[held_out]
                        score = self._score(targets[held_out], outputs, weights[held_out])
                        self.validation_scores_.append(score)
                        line += f"  validation score {score:.4f}"
                    if terminal is not None:
                        terminal.progress(line)
                    stale = 0 if score > best + self.tol else stale + 1
                    if score > best:
                        best = score
                        kept = [layer.state_dict() for layer in layers] if early_stopping else None
                    if stale == self.n_iter_no_change:
                        break
                else:
                    converged = False
                if terminal is not None:
                    terminal.say(line)
        except KeyboardInterrupt:
            warnings.warn(f"training was interrupted in epoch {self.n_iter_ + 1}", stacklevel=4)
        self._optimizer_state = optimizer.state_dict()
        if kept is not None:
            for layer, parameters in zip(layers, kept, strict=True):
                layer.load_state_dict(parameters)
        return converged

    def _split(self, targets: Array, rows: Array) -> tuple[Array, Array]:
        """Rows to train on, and rows to validate on: at least two, in which each class has its share."""
        count = max(2, round(self.validation_fraction * len(rows)))
        if count >= len(rows):
            raise ValueError(
                f"validation_fraction: expected to leave sequences to train on, got {self.validation_fraction} of "
                f"{len(rows)}, and at least 2 to validate on"
            )
        rows = self._generator.permutation(rows)
        rows = rows[np.argsort(self._strata(targets, rows), kind="stable")]
        chosen = np.zeros(len(rows), bool)
        chosen[(np.arange(count) * len(rows) + self._generator.integers(len(rows))) // count] = True
        return rows[~chosen], rows[chosen]

    def _epoch(self, optimizer: Adam, data: Sequences, targets: Array, weights: Array, rows: Array) -> float:
        """Updates for each batch of `rows`; returns the mean loss."""
        network, total, count = self._network, 0.0, 0
        for batch in batches(data.lengths, self._drawn(rows), self.batch_size, self._generator):
            each = network.pooling.targets(data, batch)
            outputs, tape = network.forward(*data.batch(batch))
            losses, doutputs = self._losses(outputs, targets[each])
            total += float(weights[each] @ losses)
            count += len(each)
            doutputs *= weights[each, None] / len(each)
            grads = network.backward(tape, doutputs)
            if math.isfinite(clip_grad_norm(grads, self.max_norm)):  # else this step would end the training: skip it
                optimizer.step(grads)
        return total / count

    def _outputs(self, data: Sequences, rows: Array) -> Array:
        """The network's outputs (N, K), one row for each target; those of the sequences `rows` alone are computed."""
        network, lengths = self._network, data.lengths[rows]
        count = len(network.pooling.of_targets(data.lengths, data.lengths))
        outputs = np.zeros((count, self.output_.out_features), self.layer_.dtype)
        order, start = np.argsort(-lengths, kind="stable"), 0
        while start < len(rows):
            batch = rows[order[start : start + max(1, STEPS_PREDICTED_AT_ONCE // int(lengths[order[start]]))]]
            outputs[network.pooling.targets(data, batch)] = network(*data.batch(batch))
            start += len(batch)
        return outputs

    def _learning_rate(self, done: float) -> float:
        """The learning rate where this share of the epochs is done."""
        return self.learning_rate

    def _drawn(self, rows: Array) -> Array:
        """Those of the rows that this epoch reads."""
        return rows

    def _strata(self, targets: Array, rows: Array) -> Array:
        """Which stratum each of the sequences `rows` is in, of which `early_stopping` holds out equal shares."""
        return np.zeros(len(rows), int)

    @abstractmethod
    def _losses(self, outputs: Array, targets: Array) -> tuple[Array, Array]:
        """The loss of each row (B,), and its gradient (B, K)."""

    @abstractmethod
    def _score(self, targets: Array, outputs: Array, weights: Array) -> float:
        """What is to rise with `early_stopping`."""
