"""One run of a stack and its gradients: the tape, what `backward` returns, and the functional pair of one layer."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from . import backends, checkpoints, reference
from .arguments import (
    Arguments,
    Form,
    Signature,
    as_array,
    as_parameter,
    check_names,
    check_out,
    chosen_names,
    describe,
    flag,
    positive,
)
from .cells import CELLS, Cell
from .checkpoints import Checkpoints, Masks
from .clipping import clip_grad_value, norm_of, scale_down
from .copies import shared
from .formats import check_arithmetic, check_precision
from .stack import Backward, Forward, LayerSizes, Stack, State, Weights

__all__ = ["Flow", "Grads", "Parameters", "Tape", "backward", "forward"]

SAVES = ("gates", "outputs", "checkpoint")  # what a tape may keep, the fastest first

Array = NDArray[Any]
Names = Sequence[Mapping[str, str]]  # for each layer-direction: what its w_ih, w_hh, ... are called


class Parameters(Mapping[str, Array]):
    """A read-only mapping of names to arrays; the arrays themselves may be written into."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> Array:
        return self._arrays[name]

    def __setitem__(self, name: str, value: object) -> None:
        raise TypeError(f"parameters: cannot exchange an array; write into it, parameters[{name!r}][...] = value")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"parameters: cannot remove {name!r}, which the layer needs")

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def copies(self) -> dict[str, Array]:
        """A copy of each array, by name."""
        return {name: array.copy() for name, array in self._arrays.items()}

    def load(self, argument: str, given: Mapping[str, Any]) -> None:
        """Copy values into the arrays: all of them, or none when a name, shape or dtype is wrong."""
        check_names(argument, given, self._arrays)
        new = {
            name: as_parameter(f"{argument}[{name!r}]", given[name], array.shape, array.dtype).copy()
            for name, array in self._arrays.items()
        }
        for name, array in self._arrays.items():
            array[...] = new[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"_arrays": shared(self._arrays)}

    def __copy__(self) -> Parameters:
        return copy.deepcopy(self)  # a copy has arrays of its own

    def __repr__(self) -> str:
        return f"Parameters({', '.join(f'{name}: {array.shape}' for name, array in self._arrays.items())})"


@dataclass(slots=True, eq=False, repr=False)  # not frozen: each of its fields would cost 0.15 us of every forward
class Tape:
    """What one `forward` leaves for `backward`.

    It owns the packed weights of that forward and refers to x, the initial state, y and the final state: parameters
    may change before `backward`, x and the initial state may not. `backward` only reads it, so it may run twice, or
    from several threads.
    """

    signature: Signature
    backend: ModuleType
    names: Names
    packed: Any  # None where x has no elements
    saved: Any
    call: Forward
    form: Form
    weights: Sequence[Weights]  # those of the layer, not copied
    owner: object = field(default=None)  # the layer, None for the functional pair

    @property
    def gates(self) -> Mapping[str, Array]:
        """The gates and the states beside h at every step, as fresh, read-only copies (T, B, H), or (N, H) of sequences
        without padding.

        The keys are like those of the parameters, such as `f_l0` and `c_l1_reverse`; those of the functional pair are
        `f` and `c`. An RNN has `h_l0`. Time comes first whatever `batch_first`, (T, H) unbatched; past a row's end
        there are zeros. The backend native recomputes them from x and the parameters, in float64 and NumPy.

        Raises
        ------
        ValueError
            They must be recomputed, and the parameters or x are no longer those of the forward.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> _, _, tape = rk.LSTM(3, 4, seed=0).forward(np.ones((5, 2, 3)))
        >>> {name: gate.shape for name, gate in tape.gates.items()}["c_l0"], list(tape.gates)
        ((5, 2, 4), ['i_l0', 'f_l0', 'g_l0', 'o_l0', 'c_l0'])
        """
        return read_gates(self)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()

    def __repr__(self) -> str:
        stack = self.signature.stack
        steps, batch = self.call.steps, self.call.batch
        return f"Tape({stack.cell.name}, T={steps}, B={batch}, {stack.dtype}, {self.backend.name})"


@dataclass(frozen=True, eq=False)
class Flow:
    """What a backward saw of the gradients on their way: for each layer and direction (T, B), unbatched (T,), of
    sequences without padding (N,).

    Time comes first whatever `batch_first`; past a row's end there are zeros.
    """

    #: those of dL/dh_t, and of an LSTM dL/dc_t, by `h_l0`, `c_l1_reverse`, ...; the gradients of the state with which
    #: later steps go on, as `grads.state` is that of the initial one, with dy_t added, before `clip_state` bounds them
    norms: Mapping[str, Array]
    #: by `f_l0`, ..., the share of the units where a gate is at most 0.1 or above 0.9, tanh beyond 0.9, relu at 0
    saturation: Mapping[str, Array]


@dataclass(frozen=True, eq=False, repr=False)
class Grads:
    """Gradients: of x and of the parameters, as asked for, and of the initial state (structured like it)."""

    x: Any  #: an array, or a list of one for each sequence where x was one; None with `need_x=False`
    state: Any  #: an array, or a tuple of one for each state of the cell; of a Sequential a tuple of these
    parameters: Mapping[str, Array]  #: by the names of the layer's, those that were asked for
    norm: float | None = None  #: 2-norm of all parameters' gradients, before `max_norm` scaled them; None without it
    flow: Any = None  #: a `Flow` with `diagnostics=True`, else None; of a Sequential a tuple like `state`
    known_norm: float | None = field(default=None, init=False)  # the norm now, for whoever clips next

    def remember_norm(self, norm: float | None) -> None:
        """What `known_norm` is from now on; None where it must be measured again."""
        object.__setattr__(self, "known_norm", norm)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"x": shared(self.x), "state": shared(self.state)}

    def __copy__(self) -> Grads:
        return copy.deepcopy(self)  # a copy has arrays of its own

    def __repr__(self) -> str:
        x = None if self.x is None else [one.shape for one in self.x] if isinstance(self.x, list) else self.x.shape
        return f"Grads(x: {x}, state: {_shapes(self.state)}, parameters: {', '.join(self.parameters)})"


def _shapes(state: Any) -> Any:
    return tuple(map(_shapes, state)) if isinstance(state, tuple) else state.shape


def refuse_to_copy() -> NoReturn:
    """For every way to copy a tape: what it refers to is the memory of one process and belongs to one layer."""
    raise TypeError(
        "tape: cannot be copied or pickled, since it is bound to its layer and process; copy the layer and run "
        "`forward` again, or copy what `backward` returns"
    )


def forward(
    cell: str,
    x: Any,
    weights: Mapping[str, Any],
    state: Any = None,
    *,
    lengths: Any = None,
    offsets: Any = None,
    resets: Any = None,
    reverse: bool = False,
    save: str = "gates",
    precision: str = "float32",
    arithmetic: str = "fma",
) -> tuple[Any, Any, Tape]:
    """Run one layer in one direction and keep what `backward` needs.

    Parameters
    ----------
    cell
        A name in the registry of cells, such as `"lstm"`.
    x
        (T, B, I), (T, I) unbatched, with offsets (N, I), or a list of sequences (T_b, I).
    weights
        A mapping with `w_ih` (G*H, I), `w_hh` (G*H, P), and where wanted `b_ih` and `b_hh` (G*H,), the projection
        `w_hr` (P, H), and the extras of the cell (H,). An absent bias is no bias. The dtype of `w_ih`, float32 or
        float64, is that of the computation.
    state
        h (1, B, P), for an LSTM (h, c) with c (1, B, H), unbatched without B; None is zeros.
    lengths, offsets, resets
        As for the layers: integers (B,), integers (B + 1,), and bool (T, B) or (N,).
    reverse
        Run from the last step to the first.
    save
        What the tape keeps; the gradients are the same to the last bit on the backend native. `"gates"`: what backward
        needs. `"outputs"`: at most the cell state beside y; backward computes the gates of a block of steps again.
        `"checkpoint"`: states every sqrt(T) steps; backward runs the steps between them again.
    precision
        `"bfloat16"`: the operands of every product, in `backward` too, are rounded to it, as for the layers.
    arithmetic
        `"amx"`: products of float32 are the matrix engine's, in `backward` too, as for the layers.

    Returns
    -------
    y, state, tape
        y (T, B, P) and the final state, both read-only, and the tape.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> weights = {"w_ih": np.ones((4, 3)), "w_hh": np.zeros((4, 4))}
    >>> y, h, tape = rk.forward("rnn_tanh", np.ones((5, 2, 3)), weights)
    >>> y.shape, h.shape
    ((5, 2, 4), (1, 2, 4))
    >>> rk.backward(tape, np.ones_like(y)).parameters["w_ih"].shape
    (4, 3)
    """
    check_save(save)
    entry = CELLS[cell]
    stack = _stack_of(entry, weights, flag("reverse", reverse))
    precision = check_precision(precision, stack.dtype)
    stack = replace(stack, precision=precision, arithmetic=check_arithmetic(arithmetic, precision, stack.dtype))
    shapes = stack.layers[0].weight_shapes(True, stack.proj_size > 0)
    given = {
        name: as_parameter(f"weights[{name!r}]", weights[name], shape, stack.dtype)
        for name, shape in shapes.items()
        if name in weights
    }
    names = {name: name for name in given}
    if "b_ih" in given or "b_hh" in given:
        given = {name: given[name] if name in given else np.zeros(shape, stack.dtype) for name, shape in shapes.items()}
    signature = Signature(stack)
    arguments = signature.arguments(x, state, lengths, resets, offsets)
    backend = backends.pick(precision=precision, arithmetic=arithmetic)
    return run_forward(signature, backend, [given], [names], None, arguments, None, save)


def backward(
    tape: Tape,
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
    """Gradients of one `forward`; Werbos 1990, "Backpropagation through time".

    Parameters
    ----------
    tape
        What `forward` returned.
    dy
        Gradient of y, in its shape; None where the loss does not see y.
    dstate
        Gradient of the final state, structured like it; None, or None in place of h or c, where the loss does not
        see it.
    need_x
        Whether the gradient of x is wanted.
    parameters
        Which weights get a gradient: True for all, False for none, or their names. What is not asked for costs no time
        and changes no bit of the rest.
    max_norm, clip_value, clip_state, diagnostics
        As for `backward` of the layers.
    into
        Gradients of an earlier backward of the same shapes; what is asked for is added to them, in place.

    Returns
    -------
    Grads
        `x` (None without `need_x`), `state` (of the initial state) and `parameters`, with the keys and shapes of
        `weights`, those that are asked for; `norm` and `flow`, where they are. With `into`, that object.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> weights = {"w_ih": np.ones((4, 3)), "w_hh": np.eye(4)}
    >>> y, h, tape = rk.forward("rnn_tanh", np.ones((5, 2, 3)), weights)
    >>> grads = rk.backward(tape, dstate=np.ones_like(h), need_x=False, parameters=["w_hh"])
    >>> grads.state.shape, list(grads.parameters)
    ((1, 2, 4), ['w_hh'])
    """
    check_tape(tape, None)
    return run_backward(
        tape, dy, dstate, need_x, parameters, Limits(max_norm, clip_value, into), clip_state, diagnostics
    )


def _stack_of(cell: Cell, weights: Mapping[str, Any], reverse: bool) -> Stack:
    """The sizes that the weights of a single layer-direction imply."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights: expected a mapping of names to arrays, got {describe(weights)}")
    known = list(LayerSizes(cell, 1, 1, 1, False).weight_shapes(True, cell.projects))
    optional = {"b_ih", "b_hh", "w_hr"}
    unknown = [str(name) for name in weights if name not in known]
    missing = [name for name in known if name not in weights and name not in optional]
    if unknown or missing:
        raise ValueError(
            f"weights: expected {', '.join(known)} ({', '.join(sorted(optional & set(known)))} optional), got "
            f"{', '.join(map(str, weights)) or 'nothing'}"
        )
    w_ih, w_hh = (as_array(f"weights[{name!r}]", weights[name]) for name in ("w_ih", "w_hh"))
    dtype = w_ih.dtype.newbyteorder("=")
    if dtype not in (np.float32, np.float64):
        raise TypeError(f"weights['w_ih']: expected float32 or float64, got {w_ih.dtype}")
    gates = len(cell.gates)
    if w_ih.ndim != 2 or not w_ih.size or w_ih.shape[0] % gates:
        raise ValueError(f"weights['w_ih']: expected shape ({gates}*H, I), got {w_ih.shape}")
    rows, input_size = w_ih.shape
    hidden_size = rows // gates
    proj_size = 0
    if "w_hr" in weights:
        proj_size = w_hh.shape[1] if w_hh.ndim == 2 else 0
        if not 0 < proj_size < hidden_size:
            raise ValueError(
                f"weights['w_hh']: expected shape ({rows}, P) with 0 < P < {hidden_size} beside w_hr, got {w_hh.shape}"
            )
    return Stack(cell, input_size, hidden_size, proj_size, 1, (reverse,), dtype)


def check_save(save: object) -> None:
    """`save` is one of what there is."""
    if not isinstance(save, str) or save not in SAVES:
        raise ValueError(f"save: expected {', '.join(map(repr, SAVES))}, got {describe(save)}")


def check_tape(tape: object, owner: object) -> None:
    """The tape is one, and of this layer (None: of the functional pair)."""
    if not isinstance(tape, Tape):
        raise TypeError(f"tape: expected the tape that forward returned, got {describe(tape)}")
    if tape.owner is not owner:
        expected, came = ("rnnkern.forward" if one is None else f"a forward of {one!r}" for one in (owner, tape.owner))
        raise ValueError(f"tape: expected one of {expected}, got one of {came}" + " (another)" * (expected == came))


def uniform(generator: np.random.Generator, bound: float, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Draws from U(-bound, bound) in float64, cast; a piece at a time, so that the whole is never there in float64."""
    drawn = np.empty(shape, dtype)
    flat, piece = drawn.reshape(-1), 1 << 16
    for start in range(0, flat.size, piece):
        part = flat[start : start + piece]
        part[:] = generator.uniform(-bound, bound, part.size)
    return drawn


def dropout_masks(
    stack: Stack, steps: int, batch: int, dropout: float, seed: int, first: int = 0, last: int | None = None
) -> list[Array]:
    """0 or 1/(1-p), with probabilities p and 1-p: of the steps [first, last) (.., B, D*P), for each layer but the last.

    Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    last = steps if last is None else last
    drawn = _row_masks(stack, steps * batch, dropout, seed, [(first * batch, last * batch)])
    return [one.reshape(last - first, batch, stack.output_size) for one in drawn]


def packed_masks(
    stack: Stack, offsets: Array, dropout: float, seed: int, first: int = 0, last: int | None = None
) -> list[Array]:
    """The same of sequences one behind the other: (.., D*P) of the steps [first, last) of each."""
    ends = offsets[1:] if last is None else np.minimum(offsets[:-1] + last, offsets[1:])
    begins = np.minimum(offsets[:-1] + first, offsets[1:])
    spans = [(0, int(offsets[-1]))] if first == 0 and last is None else zip(begins.tolist(), ends.tolist(), strict=True)
    return _row_masks(stack, int(offsets[-1]), dropout, seed, list(spans))


def _row_masks(stack: Stack, rows: int, dropout: float, seed: int, spans: Sequence[tuple[int, int]]) -> list[Array]:
    """Masks of some spans of so many rows, one behind the other, for each layer but the last."""
    kept, size = stack.dtype.type(0 if dropout == 1 else 1 / (1 - dropout)), stack.output_size
    masks = []
    for layer in range(stack.num_layers - 1):
        drawn = []
        for first, last in spans:
            # The generator can go on by whole draws of 8 numbers.
            draws, skipped = divmod((layer * rows + first) * size, 8)
            generator = np.random.Generator(np.random.Philox(seed).advance(draws))
            drawn.append(generator.random(skipped + (last - first) * size, np.float32)[skipped:])
        numbers = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
        masks.append((numbers.reshape(-1, size) >= dropout) * kept)
    return masks


def run_inference(
    signature: Signature,
    forward: Callable[[Forward], State],
    x: Any,
    state: Any,
    lengths: Any,
    offsets: Any,
    resets: Any,
    out: Any,
    parameters: Sequence[Weights] = (),
    reserve: Any = None,
) -> tuple[Any, Any]:
    """y and the final state that `forward` gives. `parameters`: what `out` may not overlap beside the arguments."""
    inputs, states, lengths_, resets_, form = signature.arguments(x, state, lengths, resets, offsets)
    if out is None:
        y = np.empty((*inputs.shape[:-1], signature.output_size), signature.dtype)
    else:
        if form.listed:
            raise ValueError(f"out: expected None with a list of sequences, got {describe(out)}")
        of_state = state if isinstance(state, tuple | list) else (state,)
        given = (x, inputs, *of_state, *(states or ()), lengths, offsets, resets)
        held = (array for weights in parameters for array in weights.values())
        check_out(out, signature.output_shape(inputs, form), signature.dtype, (*given, *held))
        y = signature.from_caller(out, form)
    final = forward(Forward(inputs, states, y, None, lengths_, resets_, reserve=reserve, offsets=form.offsets))
    shown = signature.state_to_caller(final, form.unbatched)
    if out is None:
        return signature.to_caller(y, form), shown
    if not np.may_share_memory(out, y):
        signature.time_major(out)[...] = y
    return out, shown


def run_packed(backend: ModuleType, stack: Stack, packed: Any, call: Forward) -> State:
    """The final state of a forward with packed weights, for inference."""
    if call.x.size:
        final: State = backend.forward(stack, packed, call)[0]
        return final
    return no_steps(stack, call)


def no_steps(stack: Stack, call: Forward) -> State:
    """The final state of a call without elements: a copy of that before it."""
    return tuple(one.copy() for one in stack.filled(call.state, call.batch))


def run(backend: ModuleType, stack: Stack, weights: Sequence[Weights], call: Forward) -> tuple[Any, State, Any]:
    """The packed weights, the final state and what backward needs; where x has no elements only the state."""
    if not call.x.size:
        return None, no_steps(stack, call), None
    at_once = getattr(backend, "run", None)
    if at_once is None:
        packed = backend.pack(stack, weights, call.save is not None)
        return packed, *backend.forward(stack, packed, call)
    results: tuple[Any, State, Any] = at_once(stack, weights, call)
    return results


class Steps:
    """The states of B sequences that go on step by step, with a backend that has no stream of its own.

    One thread at a time may use it; another raises RuntimeError.
    """

    def __init__(
        self, backend: ModuleType, stack: Stack, packed: Any, batch: int, arguments: Callable[..., tuple[Array, Array]]
    ) -> None:
        self._forward = partial(backend.forward, stack, packed)
        self._arguments = arguments
        self._lock = threading.Lock()
        self._state: State = stack.filled(None, batch)
        self._last: tuple[Array, ...] | None = None

    @property
    def last(self) -> tuple[Array, ...] | None:
        """The states before the last step and its x_t, copied; None before the first step."""
        with self._alone():
            return None if self._last is None else tuple(one.copy() for one in self._last)

    def step(self, x_t: Any, out: Any) -> Array:
        """y_t (B, P), which is `out` unless that is None."""
        x, y = self._arguments(x_t, out)
        with self._alone():
            before = self._state
            self._state, _ = self._forward(Forward(x[None], before, y[None]))
            self._last = *before, x.copy()
        return y

    @property
    def state(self) -> State:
        """A tuple of arrays, copied both ways."""
        with self._alone():
            return tuple(one.copy() for one in self._state)

    @state.setter
    def state(self, value: State) -> None:
        with self._alone():
            self._state = tuple(one.copy() for one in value)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("stream: used by two threads at once; give each thread its own `frozen.stream()`")
        try:
            yield
        finally:
            self._lock.release()


def run_forward(
    signature: Signature,
    backend: ModuleType,
    weights: Sequence[Weights],
    names: Names,
    masks: Masks | None,
    arguments: Arguments,
    owner: object,
    save: str,
    reserve: Any = None,
) -> tuple[Any, Any, Tape]:
    """y and the final state, read-only, and the tape."""
    x, state, lengths, resets, form = arguments
    y = np.empty((*x.shape[:-1], signature.output_size), signature.dtype)
    call = Forward(x, state, y, save, lengths, resets, None, reserve, form.offsets)
    if save == "checkpoint" and x.size:
        packed, final, saved = checkpoints.forward(backend, signature.stack, weights, call, masks)
    else:
        call = call if masks is None else call._replace(masks=masks(0, None))
        packed, final, saved = run(backend, signature.stack, weights, call)
    for array in (y, *final):
        array.setflags(write=False)
    tape = Tape(signature, backend, names, packed, saved, call, form, weights, owner)
    shown = signature.to_caller(y, form)
    if shown is not y and not form.listed:  # the views of a list are read-only, as y is
        shown.setflags(write=False)
    return shown, signature.state_to_caller(final, form.unbatched), tape


def read_gates(tape: Tape) -> Mapping[str, Array]:
    """See `Tape.gates`."""
    stack, call = tape.signature.stack, tape.call
    gates = gates_by_name(stack, _suffixes(tape.names), _saved_values(tape))
    if call.lengths is not None:
        past_end = np.arange(call.steps)[:, None] >= call.lengths
        for gate in gates.values():
            gate[past_end] = 0
    return read_only({name: gate[:, 0] if tape.form.unbatched else gate for name, gate in gates.items()})


def gates_by_name(stack: Stack, suffixes: Sequence[str], values: Sequence[Sequence[Array]]) -> dict[str, Array]:
    """Copies of the gates and states among the saved values of each layer-direction, (T, B, H)."""
    shown = (*stack.cell.gates, *stack.cell.states)  # others only backward needs
    with np.errstate(all="ignore"):
        return {
            name + suffix: value.astype(stack.dtype)
            for suffix, of_layer in zip(suffixes, values, strict=True)
            for name, value in zip(stack.cell.saved, of_layer, strict=True)
            if name in shown
        }


def read_only(arrays: Mapping[str, Array]) -> Mapping[str, Array]:
    """The mapping and its arrays, not to be written to."""
    for array in arrays.values():
        array.setflags(write=False)
    return MappingProxyType(arrays)


def _saved_values(tape: Tape) -> Sequence[Sequence[Array]]:
    """Of each layer-direction, the saved values of the cell, like x (.., H) each; anything past a row's end."""
    stack, call = tape.signature.stack, tape.call
    if tape.saved is None:
        nothing = np.zeros((*call.x.shape[:-1], stack.hidden_size), stack.dtype)
        return [[nothing] * len(stack.cell.saved) for _ in stack.layers]
    values, packing = _padded_values(tape), call.packing
    return values if packing is None else [[packing.gather(one) for one in of_layer] for of_layer in values]


def _padded_values(tape: Tape) -> Sequence[Sequence[Array]]:
    """The same, (T, B, H) each, with anything past the ends."""
    stack, call = tape.signature.stack, tape.call
    if hasattr(tape.backend, "saved_values") and not isinstance(tape.saved, Checkpoints):
        values: Sequence[Sequence[Array]] = tape.backend.saved_values(stack, tape.saved, call)
        return values
    again = call._replace(y=np.empty_like(call.y))
    if isinstance(tape.saved, Checkpoints):
        masks = tape.saved.masks
        checkpoints.forward(tape.backend, stack, tape.weights, again, masks)
        again = again._replace(masks=None if masks is None else masks(0, None))
    else:
        run(tape.backend, stack, tape.weights, again)
    if not np.array_equal(again.y, call.y, equal_nan=True):  # the same bits come out of the same numbers
        raise ValueError(
            "gates: expected the parameters and x of the forward, since gates are recomputed from them, got others; "
            "read the gates before the optimizer's step"
        )
    return exact_values(stack, tape.weights, again)


def exact_values(stack: Stack, weights: Sequence[Weights], call: Forward) -> Sequence[Sequence[Array]]:
    """As `_saved_values`, recomputed in float64 and NumPy."""
    exact = replace(stack, dtype=np.dtype(np.float64), stored="")
    saved = reference.forward(exact, reference.pack(exact, weights, True), call)[1]
    return reference.saved_values(exact, saved, call)


@dataclass(frozen=True)
class Limits:
    """What is done with the gradients of a backward in the end."""

    max_norm: float | None
    clip_value: float | None
    into: Grads | None

    def __post_init__(self) -> None:
        for name in ("max_norm", "clip_value"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), finite=False)
        other = "clip_value" if self.clip_value is not None else "into" if self.into is not None else None
        if self.max_norm is not None and other is not None:
            raise ValueError(
                f"max_norm: expected None with {other}, got {self.max_norm}; `rk.clip_grad_norm` clips what has come "
                "together"
            )

    def finish(self, grads: Grads) -> Grads:
        """The gradients, clipped, or `into` with them added."""
        if self.max_norm is not None:
            arrays = list(grads.parameters.values())
            norm = norm_of(arrays)
            object.__setattr__(grads, "norm", norm)
            grads.remember_norm(norm * scale_down(arrays, norm, self.max_norm))
        if self.clip_value is not None:
            clip_grad_value(grads, self.clip_value)
        return add_into(self.into, grads)


def state_bound(clip_state: object) -> tuple[str, float] | None:
    """What bounds the gradients of states."""
    if clip_state is None:
        return None
    if not isinstance(clip_state, tuple | list) or len(clip_state) != 2 or clip_state[0] not in ("norm", "value"):
        raise ValueError(f"clip_state: expected ('norm', bound) or ('value', bound), got {clip_state!r}")
    return clip_state[0], positive("clip_state[1]", clip_state[1])


def run_backward(
    tape: Tape,
    dy: Any,
    dstate: Any,
    need_x: bool,
    parameters: bool | Iterable[str],
    limits: Limits,
    clip_state: object = None,
    diagnostics: bool = False,
) -> Grads:
    """Gradients of one forward."""
    need_x = flag("need_x", need_x)
    bound, watched = state_bound(clip_state), flag("diagnostics", diagnostics)
    if (bound or watched) and not hasattr(tape.backend, "watches"):
        raise ValueError(
            f"{'clip_state' if bound else 'diagnostics'}: expected {None if bound else False} with the backend "
            f"{tape.backend.name!r}, which does not look at gradients on their way; use backend='native' or 'reference'"
        )
    signature, call, form = tape.signature, tape.call, tape.form
    stack, batch = signature.stack, call.batch
    chosen = _chosen(tape.names, parameters)
    if dy is not None:
        dy = signature.output_gradient(dy, call.x, form)
    dfinal = signature.state("dstate", dstate, batch, form.unbatched, halves=True)
    measures = len(stack.cell.states) + len(stack.cell.gates)
    flow = [np.zeros((measures, *call.x.shape[:-1]), stack.dtype) for _ in stack.layers] if watched else None
    if tape.saved is None:
        dx: Array | None = np.zeros(call.x.shape, signature.dtype) if need_x else None
        initial = tuple(one.copy() for one in stack.filled(dfinal, batch))
        gradients = []
        for sizes in stack.layers:
            shapes = sizes.weight_shapes(True, stack.proj_size > 0)
            gradients.append({name: np.zeros(shape, stack.dtype) for name, shape in shapes.items()})
    else:
        wanted = None if parameters is True else chosen
        asked = Backward(dy, dfinal, need_x, wanted, bound=bound, flow=flow)
        at_once = not isinstance(tape.saved, Checkpoints)
        run_back = tape.backend.backward if at_once else partial(checkpoints.backward, tape.backend)
        dx, initial, gradients = run_back(stack, tape.packed, tape.saved, call, asked)
    grads = Grads(
        None if dx is None else signature.to_caller(dx, form),
        signature.state_to_caller(initial, form.unbatched),
        Parameters(
            {name: one[key] for names, one in zip(chosen, gradients, strict=True) for key, name in names.items()}
        ),
        flow=None if flow is None else _flow_by_name(tape, flow),
    )
    return limits.finish(grads)


def _flow_by_name(tape: Tape, flow: Sequence[Array]) -> Flow:
    cell = tape.signature.stack.cell
    norms: dict[str, Array] = {}
    saturation: dict[str, Array] = {}
    for suffix, measured in zip(_suffixes(tape.names), flow, strict=True):
        rows = iter(measured[..., 0] if tape.form.unbatched else measured)
        norms |= {state + suffix: next(rows) for state in cell.states}
        saturation |= {gate + suffix: next(rows) for gate in cell.gates}
    return Flow(Parameters(norms), Parameters(saturation))


def _suffixes(names: Names) -> list[str]:
    """Of each layer-direction, what its gates have behind their names: _l0, ..., _l0_reverse; of the pair nothing."""
    return [one["w_ih"].removeprefix("weight_ih").removeprefix("w_ih") for one in names]


def _chosen(names: Names, parameters: bool | Iterable[str]) -> Names:
    """Those of the names that are asked for."""
    if parameters is True:
        return names
    asked = chosen_names("parameters", parameters, (name for one in names for name in one.values()))
    return [{key: name for key, name in one.items() if name in asked} for one in names]


def add_into(into: Grads | None, grads: Grads) -> Grads:
    """The gradients; where `into` is given that, with them added: all of them, or none where an array does not fit."""
    if into is None:
        return grads
    if not isinstance(into, Grads):
        raise TypeError(f"into: expected the Grads of an earlier backward, got {describe(into)}")
    held, new = _by_name(into), _by_name(grads)  # and nothing of `into` that was not asked for
    for name, array in new.items():
        other = held.get(name)
        if not isinstance(other, np.ndarray) or other.shape != array.shape or other.dtype != array.dtype:
            raise ValueError(f"into.{name}: expected {array.dtype} of shape {array.shape}, got {describe(other)}")
        if not other.flags.writeable:
            raise ValueError(f"into.{name}: expected a writable array, got a read-only one")
    for name, array in new.items():
        held[name] += array
    into.remember_norm(None)
    if grads.flow is not None:
        object.__setattr__(into, "flow", grads.flow)
    return into


def _by_name(grads: Grads) -> dict[str, Array]:
    """All arrays of the gradients that are there, by the names error messages use."""
    of_x = grads.x if isinstance(grads.x, list) else [grads.x]
    arrays = {f"x[{i}]" if len(of_x) > 1 else "x": one for i, one in enumerate(of_x) if one is not None}
    arrays |= {f"state{place}": one for place, one in _leaves(grads.state) if one is not None}
    return arrays | {f"parameters[{name!r}]": one for name, one in grads.parameters.items()}


def _leaves(state: Any, place: str = "") -> Iterator[tuple[str, Array]]:
    """The arrays of a state, and where each stands in it."""
    if not isinstance(state, tuple):
        yield place, state
        return
    for index, one in enumerate(state):
        yield from _leaves(one, f"{place}[{index}]")
