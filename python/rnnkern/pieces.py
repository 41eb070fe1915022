"""What stands around recurrent layers beside `Linear`: `Embedding` and `Dropout`."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .arguments import (
    as_array,
    as_parameter,
    as_real_floats,
    check_names,
    chosen_names,
    describe,
    float_dtype,
    integer,
    probability,
    seed_or_none,
)
from .functional import Grads, Parameters, refuse_to_copy

__all__ = ["Dropout", "Embedding"]

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class _EmbeddingTape:
    owner: Embedding
    indices: Array  # intp, a copy, in the caller's shape

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Embedding:
    """A learned vector for each symbol: y[t, b] = weight[x[t, b]], as `torch.nn.Embedding`.

    Parameters
    ----------
    num_embeddings
        Number of symbols V; they are the integers from 0 to V - 1.
    embedding_dim
        Elements E of each vector.
    dtype
        float32 or float64.
    seed
        Of the initial weights, standard normal, drawn in float64; None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An option is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.Embedding(5, 3, seed=0)
    >>> y, tape = layer.forward(np.array([[0, 4], [4, 1]]))  # (T, B)
    >>> y.shape, layer.backward(tape, np.ones_like(y)).parameters["weight"][:, 0].tolist()
    ((2, 2, 3), [1.0, 1.0, 0.0, 0.0, 2.0])
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, *, dtype: DTypeLike = "float32", seed: int | None = None
    ) -> None:
        self.num_embeddings = integer("num_embeddings", num_embeddings, 1)
        self.embedding_dim = integer("embedding_dim", embedding_dim, 1)
        self.dtype = float_dtype(dtype)
        generator = np.random.default_rng(seed_or_none(seed))
        weight = generator.standard_normal((self.num_embeddings, self.embedding_dim))
        self._parameters = Parameters({"weight": weight.astype(self.dtype)})

    @property
    def parameters(self) -> Mapping[str, Array]:
        """A read-only mapping of `weight` (V, E) to a writable C-contiguous array; the next call sees changes."""
        return self._parameters

    def __repr__(self) -> str:
        dtype = "" if self.dtype == np.float32 else f", dtype={self.dtype.name!r}"
        return f"Embedding({self.num_embeddings}, {self.embedding_dim}{dtype})"

    def __copy__(self) -> Embedding:
        return copy.deepcopy(self)  # a copy has arrays of its own

    def __call__(self, x: Any) -> Array:
        """y (..., E) of integers x (...) from 0 to V - 1; keeps nothing."""
        return self.parameters["weight"][self._indices(x)]

    def forward(self, x: Any) -> tuple[Array, _EmbeddingTape]:
        """y, read-only, and the tape for `backward`, which has a copy of x."""
        indices = self._indices(x)
        y = self.parameters["weight"][indices]
        y.flags.writeable = False
        return y, _EmbeddingTape(self, indices)

    def backward(
        self,
        tape: _EmbeddingTape,
        dy: Any,
        *,
        parameters: bool | Iterable[str] = True,
        into: Grads | None = None,
    ) -> Grads:
        """Gradients of one `forward`.

        Parameters
        ----------
        tape
            What this layer's `forward` returned.
        dy
            Gradient of y, in its shape.
        parameters
            Which parameters get a gradient: True for all, False for none, or their names.
        into
            What an earlier `backward` returned: what is asked for is added to it.

        Returns
        -------
        Grads
            `x` None, since symbols have no gradient; an empty `state`; `parameters`, where each symbol's row of
            `weight` is the sum of dy over the places where it stood, added up in their order.

        Raises
        ------
        TypeError, ValueError
            An argument is not as above; the message names it.
        """
        _check_tape(tape, _EmbeddingTape, self)
        wanted = chosen_names("parameters", parameters, self.parameters)
        rows = as_parameter("dy", dy, (*tape.indices.shape, self.embedding_dim), self.dtype)
        held = None if into is None else self._held(into, wanted)
        if not wanted:
            return Grads(None, (), Parameters({})) if into is None else into
        gradient = np.zeros_like(self.parameters["weight"]) if held is None else held
        _add_by_index(gradient, tape.indices.reshape(-1), rows.reshape(-1, self.embedding_dim))
        return Grads(None, (), Parameters({"weight": gradient})) if into is None else into

    def state_dict(self) -> dict[str, Array]:
        """A copy of the parameters."""
        return {name: array.copy() for name, array in self.parameters.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Copy the parameters in, or, with an error, nothing.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown, or an array does not fit.
        """
        check_names("mapping", mapping, self.parameters)
        weight = self.parameters["weight"]
        weight[...] = as_parameter("mapping['weight']", mapping["weight"], weight.shape, self.dtype)

    def _indices(self, x: Any) -> Array:
        """x as intp, a copy."""
        array = as_array("x", x)
        if array.dtype.kind not in "iu":
            raise TypeError(f"x: expected integers, got {describe(array)}")
        if array.size and (array.min() < 0 or array.max() >= self.num_embeddings):
            worst = array.min() if array.min() < 0 else array.max()
            raise ValueError(f"x: expected values from 0 to {self.num_embeddings - 1}, got {worst}")
        return array.astype(np.intp)

    def _held(self, into: object, wanted: Sequence[str]) -> Array | None:
        """The array that the gradient is to be added to."""
        if not isinstance(into, Grads):
            raise TypeError(f"into: expected the Grads of an earlier backward, got {describe(into)}")
        if not wanted:
            return None
        held, shape = into.parameters.get("weight"), self.parameters["weight"].shape
        if not isinstance(held, np.ndarray) or held.shape != shape or held.dtype != self.dtype:
            raise ValueError(f"into.parameters['weight']: expected {self.dtype} of shape {shape}, got {describe(held)}")
        if not held.flags.writeable:
            raise ValueError("into.parameters['weight']: expected a writable array, got a read-only one")
        return held


@dataclass(frozen=True, eq=False)
class _DropoutTape:
    owner: Dropout
    mask: Array  # 0 or 1 / (1 - p)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Dropout:
    """Each element zero with probability p, else times 1 / (1 - p), in `forward` alone; a call changes nothing.

    Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting", scaled in training as
    `torch.nn.Dropout`. Masks come from `numpy.random.Philox`, as those between the layers of a recurrent stack.

    Parameters
    ----------
    p
        From 0 to 1.
    seed
        Of the masks of forwards without a seed of their own; None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An option is not as above; the message names it.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.Dropout(0.5)
    >>> y, tape = layer.forward(np.ones(6), seed=5)
    >>> y.tolist(), layer.backward(tape, np.ones(6)).x.tolist()
    ([2.0, 2.0, 0.0, 2.0, 2.0, 0.0], [2.0, 2.0, 0.0, 2.0, 2.0, 0.0])
    >>> layer(np.ones(6)).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """

    parameters: Mapping[str, Array] = Parameters({})  # so that it may stand among layers

    def __init__(self, p: float = 0.5, *, seed: int | None = None) -> None:
        self.p = probability("p", p)
        self._generator = np.random.default_rng(seed_or_none(seed))

    def __repr__(self) -> str:
        return f"Dropout({self.p})"

    def __copy__(self) -> Dropout:
        return copy.deepcopy(self)  # a copy has a generator of its own

    def __call__(self, x: Any) -> Array:
        """A copy of x, float32 or float64 of any shape."""
        return as_real_floats("x", x).copy()

    def forward(self, x: Any, *, seed: int | None = None) -> tuple[Array, _DropoutTape]:
        """y, read-only and of the dtype of x, and the tape for `backward`; the same seed gives the same mask."""
        array = as_real_floats("x", x)
        seed = seed_or_none(seed)
        if seed is None:
            seed = int(self._generator.integers(2**63))
        drawn = np.random.Generator(np.random.Philox(seed)).random(array.shape, np.float32)
        mask = np.asarray((drawn >= self.p) * array.dtype.type(0 if self.p == 1 else 1 / (1 - self.p)))
        y = np.asarray(array * mask)
        y.flags.writeable = False
        return y, _DropoutTape(self, mask)

    def backward(self, tape: _DropoutTape, dy: Any) -> Grads:
        """Gradients of one `forward`: `x`, which is dy times the mask of that forward; no `state`, no `parameters`.

        Raises
        ------
        TypeError, ValueError
            tape is not of this layer, or dy not of the shape of y; the message names it.
        """
        _check_tape(tape, _DropoutTape, self)
        rows = as_parameter("dy", dy, tape.mask.shape, tape.mask.dtype)
        return Grads(np.asarray(rows * tape.mask), (), Parameters({}))


def _check_tape(tape: _EmbeddingTape | _DropoutTape, kind: type, owner: object) -> None:
    if not isinstance(tape, kind):
        raise TypeError(f"tape: expected the tape that forward returned, got {describe(tape)}")
    if tape.owner is not owner:
        raise ValueError(f"tape: expected a tape of {owner!r}, got one of another layer, {tape.owner!r}")


def _add_by_index(sums: Array, indices: Array, rows: Array) -> None:
    """Add each of the rows to the one of `sums` that its index names."""
    if not indices.size:
        return
    order = np.argsort(indices, kind="stable")  # a half to a third of the time of np.add.at
    ordered = indices[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    sums[ordered[starts]] += np.add.reduceat(rows[order], starts, axis=0)
