"""`Sequential`: pieces one after the other as one model, its frozen snapshot and its stream."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .arguments import (
    as_array,
    as_floats,
    as_parameter,
    check_out,
    chosen_names,
    describe,
    flag,
    refuse_sequences,
    row_lengths,
    seed_or_none,
)
from .functional import Grads, Limits, Parameters, refuse_to_copy
from .layers import Recurrent
from .pieces import Dropout, Embedding, Last, Piece
from .train import Linear

__all__ = ["FrozenSequential", "Sequential", "SequentialStream", "derived_seed"]

Array = NDArray[Any]

_KINDS = (Embedding, Recurrent, Dropout, Last, Linear)


def derived_seed(seed: int, place: int) -> int:
    """A seed for one of many places, such as pieces or steps, that has nothing in common with those of the others."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0])


@cache
def _options(function: Callable[..., Any]) -> frozenset[str]:
    """The arguments that a function of a piece takes."""
    return frozenset(inspect.signature(function).parameters)


@dataclass(frozen=True)
class _Chain:
    """What the whole of some pieces takes and gives; runs them one after the other."""

    pieces: tuple[Any, ...]  # as given, or frozen
    names: tuple[str, ...]  # what errors call them
    dtype: np.dtype[Any]
    batch_first: bool
    symbols: bool  # whether x is of symbols
    steps: bool  # whether y has steps, which `Last` takes away
    features: int  # of y

    @cached_property
    def recurrent(self) -> list[bool]:
        """Which pieces have a state."""
        return ["state" in _options(type(piece).__call__) for piece in self.pieces]

    def ask(self, index: int, method: str, *arguments: Any, **options: Any) -> Any:
        """What a method of a piece returns; it is given those of the options that it takes."""
        piece = self.pieces[index]
        function = getattr(type(piece), method)
        taken = _options(function)
        try:
            return function(piece, *arguments, **{name: one for name, one in options.items() if name in taken})
        except (TypeError, ValueError) as error:
            error.add_note(f"in {self.names[index]}")
            raise

    def run(
        self, method: str, x: Any, state: Any, lengths: Any, resets: Any, seed: int | None = None
    ) -> tuple[Array, tuple[Any, ...], list[Any], Array | None]:
        """y, the final states, what else the method of each piece returned, and which steps of y count."""
        recurrent = self.recurrent
        given = self.states("state", state)
        refuse_sequences(x)
        x = as_array("x", x) if self.symbols else as_floats("x", x, self.dtype)
        valid = None if lengths is None else self._valid_steps(x, lengths)
        if resets is not None and not any(recurrent):
            raise ValueError(f"resets: expected None without a recurrent layer, got {describe(resets)}")
        # Recurrent layers and `Last` read nothing past a row's end, and the former write zeros there; others do not
        # know of ends.
        if valid is not None and "lengths" not in _options(type(self.pieces[0]).__call__):
            x = np.where(valid if self.symbols else valid[..., None], x, x.dtype.type(0))
        states: list[Any] = []
        rest: list[Any] = []
        for index, has_state in enumerate(recurrent):
            before = given[len(states)] if has_state else None
            own_seed = None if seed is None else derived_seed(seed, index)
            result = self.ask(index, method, x, state=before, lengths=lengths, resets=resets, seed=own_seed)
            x, *others = result if isinstance(result, tuple) else (result,)
            if has_state:
                states.append(others.pop(0))
            rest += others
        if valid is None or not self.steps or recurrent[-1]:
            return x, tuple(states), rest, None
        return np.where(valid[..., None], x, x.dtype.type(0)), tuple(states), rest, valid

    def states(self, name: str, given: Any) -> Sequence[Any]:
        """A state for each recurrent layer."""
        count = sum(self.recurrent)
        if given is None:
            return [None] * count
        expected = f"{name}: expected a tuple of {count}, one for each recurrent layer"
        if not isinstance(given, tuple | list):
            raise TypeError(f"{expected}, got {describe(given)}")
        if len(given) != count:
            raise ValueError(f"{expected}, got {len(given)} elements")
        return given

    def _valid_steps(self, x: Array, lengths: Any) -> Array:
        """Whether each step is one of its row: bool (T, B), (B, T) with `batch_first`."""
        shape = x.shape if self.symbols else x.shape[:-1]
        if len(shape) != 2:
            raise ValueError(f"lengths: expected None where x has no steps and rows, got x of shape {x.shape}")
        steps, batch = reversed(shape) if self.batch_first else shape
        valid: Array = np.arange(steps)[:, None] < row_lengths(lengths, steps, batch)
        return np.ascontiguousarray(valid.T) if self.batch_first else valid


@dataclass(frozen=True, eq=False)
class _SequentialTape:
    """What `Sequential.forward` leaves for `backward`."""

    owner: Sequential
    tapes: Sequence[Any]
    shape: tuple[int, ...]  # of y
    valid: Array | None  # which steps of y count

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Sequential(Piece):
    """Pieces one after the other as one model: what it computes are the bits of its pieces called by hand.

    Its parameters are those of the pieces, called by their place, as in `torch.nn.Sequential`: `0.weight`,
    `1.weight_ih_l0`. An optimizer takes them as they are. A state is a tuple with the state of each recurrent layer.

    Parameters
    ----------
    pieces
        `Embedding` (the first alone), `RNN`, `LSTM`, `GRU`, `Recurrent`, `Dropout`, `Last`, `Linear`: each once, of one
        dtype, each with as many features as the one before it gives, and all with one `batch_first`. After `Last`
        there are no steps, so that neither a recurrent layer nor another `Last` may follow.

    Raises
    ------
    TypeError, ValueError
        Pieces do not fit; the message names both.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> embedding, layer, head = rk.Embedding(10, 3, seed=0), rk.GRU(3, 4, seed=1), rk.Linear(4, 2, seed=2)
    >>> model = rk.Sequential(embedding, layer, rk.Dropout(0.1), head)
    >>> symbols = np.array([[1, 2], [3, 4], [5, 6]])  # (T, B)
    >>> optimizer = rk.Adam(model.parameters)
    >>> y, state, tape = model.forward(symbols, seed=0)
    >>> loss, dy = rk.cross_entropy(y, np.zeros((3, 2), int))
    >>> optimizer.step(model.backward(tape, dy))
    >>> y, (h,) = model(symbols)
    >>> y.shape, h.shape
    ((3, 2, 2), (1, 2, 4))
    >>> print(model.summary())
       piece             y          parameters
    0  Embedding(10, 3)  (T, B, 3)          30
    1  GRU(3, 4)         (T, B, 4)         108
    2  Dropout(p=0.1)    (T, B, 4)           0
    3  Linear(4, 2)      (T, B, 2)          10
       float32                             148
    """

    def __init__(self, *pieces: Piece) -> None:
        self._chain = _chain(pieces)
        self._parameters = Parameters(
            {f"{index}.{name}": one for index, piece in enumerate(pieces) for name, one in piece.parameters.items()}
        )

    @property
    def pieces(self) -> tuple[Any, ...]:
        """The pieces, in order."""
        return self._chain.pieces

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of parameters and results."""
        return self._chain.dtype

    @property
    def batch_first(self) -> bool:
        """Whether the batch comes before the time."""
        return self._chain.batch_first

    @property
    def many_to_one(self) -> bool:
        """Whether there is one y for a whole sequence, since there is a `Last`."""
        return not self._chain.steps

    def configuration(self) -> dict[str, Any]:
        """Not of one piece: a Sequential is made of its pieces, each with a configuration.

        Raises
        ------
        TypeError
            Always.
        """
        raise TypeError("configuration: ask each of `pieces`")

    def __repr__(self) -> str:
        return f"Sequential({', '.join(map(repr, self.pieces))})"

    def __call__(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """Inference: no dropout, and nothing kept for `backward`.

        Parameters
        ----------
        x
            (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched; where the first piece is an `Embedding` integers
            without I.
        state
            A tuple with the state of each recurrent layer, or None for it; None is zeros for all.
        lengths
            Integers (B,) from 0 to T, in any order: steps of each row; not with unbatched x. x beyond is not read, y
            there is zero.
        resets
            As for the recurrent layers.

        Returns
        -------
        y, state
            y (T, B, F) as x is, of a model with `Last` (B, F), or (F,) unbatched, and the final states.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it, and a note the piece.
        """
        return self._chain.run("__call__", x, state, lengths, resets)[:2]

    def forward(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None, seed: int | None = None
    ) -> tuple[Array, tuple[Any, ...], _SequentialTape]:
        """Training: with dropout, and with a tape for `backward`.

        Parameters
        ----------
        x, state, lengths, resets
            As for a call. The tape refers to x and the state where they were not copied: leave them as they are until
            `backward` has run.
        seed
            Of all dropout masks of this forward; each piece gets a seed of its own made of it. None lets each draw from
            its own generator.

        Returns
        -------
        y, state, tape
            As from a call, but read-only, and the tape.

        Raises
        ------
        ValueError, TypeError
            As for a call.
        """
        y, states, tapes, valid = self._chain.run("forward", x, state, lengths, resets, seed_or_none(seed))
        y.setflags(write=False)
        return y, states, _SequentialTape(self, tapes, y.shape, valid)

    def backward(
        self,
        tape: _SequentialTape,
        dy: Any = None,
        dstate: Any = None,
        *,
        need_x: bool = True,
        parameters: bool | Iterable[str] = True,
        max_norm: float | None = None,
        clip_value: float | None = None,
        clip_state: tuple[str, float] | None = None,
        diagnostics: bool = False,
        into: Grads | None = None,
    ) -> Grads:
        """Gradients of one `forward`.

        Parameters
        ----------
        tape
            From `forward` of this model. It is only read, and the parameters may have changed since.
        dy
            Gradient of y, in its shape; None where the loss does not see y. Not read past a row's end.
        dstate
            Gradient of the final states, structured like them; None, also in place of one of them, where the loss does
            not see it.
        need_x
            Whether the gradient of x is wanted; symbols have none.
        parameters
            Which parameters get a gradient: True for all, False for none, or their names. What is not asked for costs
            no time.
        max_norm, clip_value
            As for a recurrent layer, of the parameters of all pieces together.
        clip_state, diagnostics
            As for a recurrent layer, of each one.
        into
            Gradients of an earlier backward of the same shapes; what is asked for is added to them, in place.

        Returns
        -------
        Grads
            `x`, shaped like x, None without `need_x` or of symbols; `state`, of the initial states, one for each
            recurrent layer, and so `flow`, where it is asked for; `parameters`, with those keys of `parameters` that
            are asked for, and their `norm` with `max_norm`. With `into`, that object.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.
        """
        if not isinstance(tape, _SequentialTape):
            raise TypeError(f"tape: expected the tape that forward returned, got {describe(tape)}")
        if tape.owner is not self:
            raise ValueError(f"tape: expected a tape of {self!r}, got one of another model, {tape.owner!r}")
        limits = Limits(max_norm, clip_value, into)
        chain, wanted = self._chain, set(chosen_names("parameters", parameters, self._parameters))
        need_x = flag("need_x", need_x) and not chain.symbols
        dstates = list(chain.states("dstate", dstate))
        shaped = np.zeros(tape.shape, self.dtype) if dy is None else as_parameter("dy", dy, tape.shape, self.dtype)
        dx: Any = shaped if tape.valid is None else np.where(tape.valid[..., None], shaped, self.dtype.type(0))
        asked = [
            [name for name in piece.parameters if f"{index}.{name}" in wanted]
            for index, piece in enumerate(self.pieces)
        ]
        needed = [need_x or any(pair) for pair in zip(chain.recurrent, asked, strict=True)]
        states: list[Any] = []
        flows: list[Any] = []
        gradients: dict[str, Array] = {}
        first = needed.index(True) if any(needed) else len(needed)
        for index in reversed(range(first, len(needed))):
            piece, recurrent = self.pieces[index], chain.recurrent[index]
            one = chain.ask(
                index,
                "backward",
                tape.tapes[index],
                dx,
                dstate=dstates.pop() if recurrent else None,
                need_x=any(needed[:index]) or need_x,
                parameters=len(asked[index]) == len(piece.parameters) or asked[index],
                clip_state=clip_state,
                diagnostics=diagnostics,
            )
            dx = one.x
            gradients |= {f"{index}.{name}": gradient for name, gradient in one.parameters.items()}
            if recurrent:
                states.insert(0, one.state)
                flows.insert(0, one.flow)
        found = Parameters({name: gradients[name] for name in self._parameters if name in wanted})
        flow = tuple(flows) if diagnostics else None
        return limits.finish(Grads(dx if need_x else None, tuple(states), found, flow=flow))

    def freeze(self, weights: str | None = None) -> FrozenSequential:
        """A snapshot for inference with packed recurrent layers; later changes of the parameters do not reach it.

        Parameters
        ----------
        weights
            What the matrices of the recurrent layers are stored in, as for their `freeze`: None or `"bfloat16"`.

        Raises
        ------
        ValueError
            `weights` is not as above.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> model = rk.Sequential(rk.Embedding(10, 3, seed=0), rk.GRU(3, 4, seed=1), rk.Linear(4, 2, seed=2))
        >>> stream = model.freeze().stream()
        >>> [stream.step([symbol]).shape for symbol in (7, 0, 3)]
        [(1, 2), (1, 2), (1, 2)]
        """
        kept = [(index, piece) for index, piece in enumerate(self.pieces) if not isinstance(piece, Dropout)]
        pieces = (one.freeze(weights) if isinstance(one, Recurrent) else copy.deepcopy(one) for _, one in kept)
        names = tuple(self._chain.names[index] for index, _ in kept)
        return FrozenSequential(replace(self._chain, pieces=tuple(pieces), names=names), repr(self))

    def summary(self) -> str:
        """A table of the pieces: the shape of the y of each, and its number of parameters."""
        rows, leading, features = [("", "piece", "y", "parameters")], "B, T" if self.batch_first else "T, B", 0
        for index, piece in enumerate(self.pieces):
            leading = "B" if isinstance(piece, Last) else leading
            features = piece.sizes[1] if piece.sizes else features
            shape = f"({leading}, {features or '...'})"
            rows.append((str(index), repr(piece), shape, f"{piece.num_parameters:,}"))
        rows.append(("", self.dtype.name, "", f"{self.num_parameters:,}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            f"{index:<{widths[0]}}  {piece:<{widths[1]}}  {shape:<{widths[2]}}  {count:>{widths[3]}}"
            for index, piece, shape, count in rows
        )


class FrozenSequential:
    """A snapshot of a `Sequential` for inference; made by `Sequential.freeze`.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> fast = rk.Sequential(rk.GRU(3, 4, seed=0), rk.Last(), rk.Linear(4, 2, seed=1)).freeze()
    >>> y, (h,) = fast(np.ones((5, 2, 3)))
    >>> stream = fast.stream(batch=2)
    >>> bool((y == [stream.step(np.ones((2, 3))) for _ in range(5)][-1]).all())
    True
    """

    def __init__(self, chain: _Chain, model: str) -> None:
        self._chain = chain
        self._model = model

    def __call__(
        self, x: Any, state: Any = None, *, lengths: Any = None, resets: Any = None
    ) -> tuple[Array, tuple[Any, ...]]:
        """y and the final states; the arguments, results and errors are those of the model's call."""
        return self._chain.run("__call__", x, state, lengths, resets)[:2]

    def stream(self, batch: int = 1) -> SequentialStream:
        """B sequences fed step by step, from states of zeros.

        Raises
        ------
        ValueError
            A layer is bidirectional: its reverse direction starts at the end. Or no layer is recurrent.
        """
        return SequentialStream(self, batch)

    def __copy__(self) -> FrozenSequential:
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        return f"{self._model}.freeze()"


class SequentialStream:
    """B sequences fed step by step through a frozen model; made by `FrozenSequential.stream`. One thread at a time may
    use it.

    `step` after `step` gives the bits of the frozen model's call on the whole sequence with the native backend; of a
    model with `Last` it gives the y of the sequence if it ended there.

    Examples
    --------
    >>> import rnnkern as rk
    >>> model = rk.Sequential(rk.Embedding(9, 3, seed=0), rk.GRU(3, 4, seed=1), rk.Linear(4, 2, seed=2))
    >>> stream = model.freeze().stream()
    >>> stream.step([7]).shape, stream.state[0].shape
    ((1, 2), (1, 1, 4))
    >>> stream.reset()  # another sequence begins
    """

    def __init__(self, frozen: FrozenSequential, batch: int = 1) -> None:
        chain = frozen._chain
        if not any(chain.recurrent):
            raise ValueError(f"stream: expected a recurrent layer, got {frozen._model}")
        self._frozen, self._batch = frozen, batch
        self._streams = [one.stream(batch) for one, has in zip(chain.pieces, chain.recurrent, strict=True) if has]
        self._connect()

    def _connect(self) -> None:
        """Make what follows from the rest, in a copy too."""
        chain, streams = self._frozen._chain, iter(self._streams)
        self._lock = threading.Lock()
        self._steps = [
            next(streams).step if has else one
            for one, has in zip(chain.pieces, chain.recurrent, strict=True)
            if not isinstance(one, Last)
        ]

    def step(self, x_t: Any, out: Array | None = None) -> Array:
        """The output of the next step.

        Parameters
        ----------
        x_t
            (B, I); where the first piece is an `Embedding` integers (B,).
        out
            Where to write the output: (B, F), of the model's dtype, writable, C-contiguous, apart from x_t.

        Returns
        -------
        y_t
            (B, F); `out` where given.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it. The states are as before.
        RuntimeError
            Another thread is using the stream.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("stream: used by two threads at once; give each thread its own `frozen.stream()`")
        try:
            if out is not None:  # before a state moves
                check_out(out, (self._batch, self._frozen._chain.features), self._frozen._chain.dtype, (x_t,))
            for step in self._steps[:-1]:
                x_t = step(x_t)
            y_t: Array = self._steps[-1](x_t, out=out)
            return y_t
        finally:
            self._lock.release()

    @property
    def state(self) -> tuple[Any, ...]:
        """The state of each recurrent layer after the last step, copied both ways; set to None for zeros."""
        return tuple(one.state for one in self._streams)

    @state.setter
    def state(self, value: Any) -> None:
        given = self._frozen._chain.states("state", value)
        before = self.state
        try:
            for stream, one in zip(self._streams, given, strict=True):
                stream.state = one
        except BaseException:
            for stream, one in zip(self._streams, before, strict=True):
                stream.state = one
            raise

    def reset(self) -> None:
        """Start again from states of zeros."""
        self.state = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_frozen": self._frozen, "_batch": self._batch, "_streams": self._streams}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def __copy__(self) -> SequentialStream:
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        return f"{self._frozen!r}.stream(batch={self._batch})"


def _chain(pieces: tuple[Any, ...]) -> _Chain:
    """The pieces where they fit together."""
    kinds = "Embedding, RNN, LSTM, GRU, Recurrent, Dropout, Last or Linear"
    for index, piece in enumerate(pieces):
        if isinstance(piece, Sequential):
            raise TypeError(f"pieces[{index}]: expected {kinds}, got a Sequential; give its pieces, *model.pieces")
        if isinstance(piece, list | tuple):
            raise TypeError(f"pieces[{index}]: expected {kinds}, got a {describe(piece)}; give its elements, *pieces")
        if not isinstance(piece, _KINDS):
            raise TypeError(f"pieces[{index}]: expected {kinds}, got {describe(piece)}")
        if any(piece is other for other in pieces[:index]):
            raise ValueError(f"pieces[{index}]: expected each piece once, got {piece!r} again")
        if isinstance(piece, Embedding) and index:
            raise ValueError(f"pieces[{index}]: expected an Embedding in the first place alone, got {piece!r} there")
    sized = [(f"pieces[{index}], {piece!r}", piece) for index, piece in enumerate(pieces) if piece.sizes]
    if not sized:
        raise ValueError(f"pieces: expected an Embedding, a Linear or a recurrent layer, got {len(pieces)} of others")
    for (before, one), (name, piece) in pairwise(sized):
        if one.dtype != piece.dtype:
            raise ValueError(f"{name}: expected {one.dtype}, as of {before}, got {piece.dtype}")
        if one.sizes[1] != piece.sizes[0]:
            raise ValueError(f"{name}: expected {one.sizes[1]} features, as {before} gives, got {piece.sizes[0]}")
    _check_steps(pieces)
    timed = [one for one in pieces if isinstance(one, Recurrent | Last)]
    return _Chain(
        pieces,
        tuple(f"pieces[{index}], {piece!r}" for index, piece in enumerate(pieces)),
        sized[0][1].dtype,
        bool(timed and timed[0].batch_first),
        isinstance(pieces[0], Embedding),
        not any(isinstance(one, Last) for one in pieces),
        sized[-1][1].sizes[1],
    )


def _check_steps(pieces: Sequence[Any]) -> None:
    """What goes over the steps agrees on where they stand and on how long there are any."""
    seen: tuple[str, Any] | None = None  # the last piece that goes over the steps
    below: Any = None  # what the features of x come from
    for index, piece in enumerate(pieces):
        name = f"pieces[{index}], {piece!r}"
        if isinstance(piece, Recurrent | Last):
            if seen and isinstance(seen[1], Last):
                raise ValueError(f"{name}: expected no piece that goes over steps after {seen[0]}, which leaves none")
            if seen and seen[1].batch_first != piece.batch_first:
                raise ValueError(
                    f"{name}: expected batch_first={seen[1].batch_first}, as of {seen[0]}, got {piece.batch_first}"
                )
            two = isinstance(below, Recurrent) and below.bidirectional
            if isinstance(piece, Last) and piece.bidirectional != two:
                raise ValueError(f"{name}: expected bidirectional={two}, as of {below!r}, got {piece.bidirectional}")
            seen = name, piece
        below = piece if piece.sizes else below
