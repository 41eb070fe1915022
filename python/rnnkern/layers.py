"""The layers: a stack of one cell with its parameters, its frozen snapshot for inference, and the stream."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import backends
from .arguments import (
    Signature,
    flag,
    float_dtype,
    integer,
    probability,
    seed_or_none,
    warn_the_caller,
)
from .cells import CELLS, cell_of_nonlinearity
from .checkpoints import Masks
from .copies import owned
from .formats import check_arithmetic, check_format, check_precision, copied, rounded
from .functional import (
    Grads,
    Limits,
    Parameters,
    Steps,
    Tape,
    check_save,
    check_tape,
    dropout_masks,
    exact_values,
    gates_by_name,
    packed_masks,
    read_only,
    run,
    run_backward,
    run_forward,
    run_inference,
    run_packed,
    uniform,
)
from .pieces import Piece, check_room
from .stack import Forward, Stack, State, Weights

__all__ = ["GRU", "LSTM", "RNN", "Frozen", "Recurrent", "Stream"]

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # for type checkers alone, which know it: of `typing` from Python 3.13 on

    StateT = TypeVar("StateT", default=Any)
    LayerT = TypeVar("LayerT")
else:
    from typing import TypeVar

    StateT = TypeVar("StateT")  # what a layer returns as its state: an array, for an LSTM a tuple of two

Array = NDArray[Any]

PARAMETER_NAMES = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "w_hr": "weight_hr"}


def parameter_names(stack: Stack, bias: bool) -> list[dict[str, str]]:
    """For each layer-direction, what its weights are called: weight_ih_l0, ..., weight_ih_l0_reverse, ..."""
    directions = len(stack.directions)
    return [
        {
            key: f"{PARAMETER_NAMES.get(key, key)}_l{index // directions}" + ("_reverse" if sizes.reverse else "")
            for key in sizes.weight_shapes(bias, stack.proj_size > 0)
        }
        for index, sizes in enumerate(stack.layers)
    ]


def _check_size(stack: Stack, bias: bool) -> None:
    """The parameters fit into memory; asked before any is made, from two layers, however many there are."""
    directions = len(stack.directions)
    first, *more = replace(stack, num_layers=min(stack.num_layers, 2)).layers[::directions]
    counts = [
        sum(math.prod(shape) for shape in sizes.weight_shapes(bias, stack.proj_size > 0).values())
        for sizes in (first, *more)
    ]
    size = directions * (counts[0] + (stack.num_layers - 1) * counts[-1]) * stack.dtype.itemsize
    check_room("input_size, hidden_size, num_layers", size)


class Recurrent(Piece, Generic[StateT]):
    """A stack of layers of any cell of the registry; `RNN`, `LSTM` and `GRU` choose the cell.

    Parameters
    ----------
    cell
        Name of the cell, such as `"lstm"`.
    input_size, hidden_size
        I, the features of x, and H, the units; positive.
    num_layers
        L; layer l > 0 reads the output of the layer below.
    bias
        Whether there are `bias_ih` and `bias_hh`.
    batch_first
        Whether x, y and resets have the batch before the time.
    dropout
        Probability, in [0, 1], with which `forward` zeroes an element between two layers; the rest is scaled by
        1 / (1 - dropout). Without effect on a single layer and on inference.
    bidirectional
        Whether each layer also runs from the last step to the first (D = 2).
    proj_size
        P, the size h is projected to, for the cells that have a projection; 0 for none.
    dtype
        float32 or float64.
    precision
        Of the operands of products, for a layer of float32: `"bfloat16"` rounds the rows and the weights of every
        matrix product, forward and backward, to nearest even; sums, states, gates, biases, gradients and parameters
        stay float32. Faster where the CPU has instructions for it; the values do not depend on the machine, but for
        their last digits on one with matrix engines.
    arithmetic
        How products of float32 are made, with the same accuracy: `"fma"` by multiply-adds, `"amx"` by the matrix engine
        of the CPU, of three bfloat16 slices of each number; where there is none by multiply-adds, with a warning once.
    backend
        A name of `rnnkern.backend_names()`; `"auto"` takes the best present.
    seed
        Of the initial parameters, U(-1/sqrt(H), 1/sqrt(H)), and of the dropout masks of calls without a seed.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it.
    BackendUnavailableError
        A backend asked for by name cannot run.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> layer = rk.Recurrent("gru", 3, 4, seed=0)
    >>> y, h = layer(np.zeros((5, 2, 3)))
    >>> y.shape, h.shape
    ((5, 2, 4), (1, 2, 4))
    """

    _keeps_memory = True  # for its next call

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        arithmetic: str = "fma",
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        entry = CELLS[cell]
        hidden_size = integer("hidden_size", hidden_size, 1)
        proj_size = integer("proj_size", proj_size, 0, hidden_size - 1)
        if proj_size and not entry.projects:
            raise ValueError(f"proj_size: expected 0 for the cell {cell!r}, which has no projection, got {proj_size}")
        stack = Stack(
            entry,
            integer("input_size", input_size, 1),
            hidden_size,
            proj_size,
            integer("num_layers", num_layers, 1),
            (False, True) if flag("bidirectional", bidirectional) else (False,),
            float_dtype(dtype),
            precision=check_precision(precision, float_dtype(dtype)),
            arithmetic=check_arithmetic(arithmetic, precision, float_dtype(dtype)),
        )
        self._signature = Signature(stack, flag("batch_first", batch_first))
        self._bias = flag("bias", bias)
        _check_size(stack, self._bias)
        self._dropout = probability("dropout", dropout)
        if self._dropout and stack.num_layers == 1:
            warn_the_caller(f"dropout: has no effect on a single layer, got {dropout} with num_layers=1")
        self._chosen_backend = backend
        self._generator = np.random.default_rng(seed_or_none(seed))
        self._names = parameter_names(stack, self._bias)
        bound = 1 / math.sqrt(hidden_size)
        self._parameters = Parameters(
            {
                names[key]: uniform(self._generator, bound, shape, stack.dtype)
                for names, sizes in zip(self._names, stack.layers, strict=True)
                for key, shape in sizes.weight_shapes(self._bias, proj_size > 0).items()
            }
        )
        self._connect()

    def _connect(self) -> None:
        """Make what follows from the rest, in a copy too."""
        self._backend = backends.pick(self._chosen_backend, self.precision, self.arithmetic)
        # The parameters as backends take them, one mapping for each layer-direction.
        self._weights = [{key: self._parameters[name] for key, name in names.items()} for names in self._names]
        self._reserve = backends.reserve_of(self._backend) if self._keeps_memory else None

    @property
    def cell(self) -> str:
        """Name of the cell."""
        return self._signature.stack.cell.name

    @property
    def input_size(self) -> int:
        """I, the features of x."""
        return self._signature.stack.input_size

    @property
    def hidden_size(self) -> int:
        """H, the units."""
        return self._signature.stack.hidden_size

    @property
    def num_layers(self) -> int:
        """L, the layers one above the other."""
        return self._signature.stack.num_layers

    @property
    def bias(self) -> bool:
        """Whether there are biases."""
        return self._bias

    @property
    def batch_first(self) -> bool:
        """Whether the batch comes before the time."""
        return self._signature.batch_first

    @property
    def dropout(self) -> float:
        """Probability of a zero between two layers."""
        return self._dropout

    @property
    def proj_size(self) -> int:
        """P, or 0 without a projection."""
        return self._signature.stack.proj_size

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of parameters and results."""
        return self._signature.dtype

    @property
    def precision(self) -> str:
        """What the operands of products are rounded to, `"float32"` where they are not."""
        return self._signature.stack.precision

    @property
    def arithmetic(self) -> str:
        """How products of float32 are made, `"fma"` or `"amx"`."""
        return self._signature.stack.arithmetic

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        name: str = self._backend.name
        return name

    @property
    def sizes(self) -> tuple[int, int]:
        """I and D*P."""
        return self.input_size, self._signature.output_size

    @property
    def bidirectional(self) -> bool:
        """Whether each layer also runs in reverse."""
        return len(self._signature.stack.directions) == 2

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        offsets: Any = None,
        resets: Any = None,
        out: Array | None = None,
    ) -> tuple[Any, StateT]:
        """Inference: no dropout, and nothing kept for `backward`.

        Parameters
        ----------
        x
            (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched: an array, an array-like or a CPU object with
            `__dlpack__`. Copied only where it is not a C-contiguous array of the layer's dtype. With `offsets` (N, I).
            A list or tuple of arrays (T_b, I), and of nothing else, is one of sequences: y is a list of them too.
        state
            h (L*D, B, P), for an LSTM (h, c) with c (L*D, B, H), whatever `batch_first`; unbatched without B. Index
            l*D + d. None is zeros.
        lengths
            Integers (B,) from 0 to T, in any order: steps of each row; not with unbatched x. x beyond is not read, y
            there is zero; the final state is that of the row's last step, in reverse that of step 0.
        offsets
            Integers (B + 1,), from 0 to N, nondecreasing: x has no padding, and sequence b is its rows from
            `offsets[b]` to `offsets[b + 1]`; so have y and resets, whatever `batch_first`. Not with lengths.
        resets
            Bool (T, B), (B, T) with `batch_first`, (T,) unbatched, (N,) with `offsets`. True at t cuts
            the link from t-1 to t in every layer and direction: what follows starts from a zero state.
        out
            Where to write y: of its exact shape and dtype, writable, C-contiguous, apart from every input.

        Returns
        -------
        y, state
            y like x, (.., D*P), zeros past a row's end, and the final state, structured like the initial one.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.
        """
        backend, stack, weights = self._backend, self._signature.stack, self._weights

        def forward(call: Forward) -> State:
            return run(backend, stack, weights, call)[1]

        return run_inference(self._signature, forward, x, state, lengths, offsets, resets, out, weights, self._reserve)

    def forward(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        offsets: Any = None,
        resets: Any = None,
        save: str | int = "gates",
        seed: int | None = None,
    ) -> tuple[Any, StateT, Tape]:
        """Training: with dropout, and with a tape for `backward`.

        Parameters
        ----------
        x, state, lengths, offsets, resets
            As for a call. The tape refers to x and the state where they were not copied: leave them as they are until
            `backward` has run. Lengths, offsets and resets are copied.
        save
            What the tape keeps; the gradients are the same to the last bit on the backend native. `"gates"`: what
            backward needs. `"outputs"`: at most the cell state beside y, and y of inner layers; backward computes the
            gates of a block of steps again. `"checkpoint"`: states every sqrt(T) steps, and where the layer is
            bidirectional y of inner layers; backward runs the steps between them again. An int: the fastest of these
            whose `memory_plan(...).kept` has at most so many bytes.
        seed
            Of the dropout masks (Philox); None draws one from the layer's own generator.

        Returns
        -------
        y, state, tape
            y and the final state as from a call, but read-only, since the tape refers to them, and the tape.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> layer = rk.LSTM(3, 4, seed=0)
        >>> y, (h, c), tape = layer.forward(np.ones((5, 2, 3)))
        >>> grads = layer.backward(tape, dy=np.ones_like(y))
        >>> grads.x.shape, grads.parameters["weight_hh_l0"].shape
        ((5, 2, 3), (16, 4))
        """
        seed = seed_or_none(seed)
        signature, stack = self._signature, self._signature.stack
        arguments = signature.arguments(x, state, lengths, resets, offsets)
        form = arguments.form
        if isinstance(save, int):
            from .planning import fitting_save  # which imports this module, and is not asked in most calls

            call, most = Forward(arguments.x, None, arguments.x, offsets=form.offsets), integer("save", save, 0)
            save = fitting_save(self, call.steps, call.batch, arguments.x.ndim == 3, most, form.offsets)
        check_save(save)
        masks: Masks | None = None
        if self._dropout and stack.num_layers > 1:
            if seed is None:
                seed = int(self._generator.integers(2**63))
            if form.offsets is not None:
                masks = partial(packed_masks, stack, form.offsets, self._dropout, seed)
            else:
                steps, batch, _ = arguments.x.shape
                masks = partial(dropout_masks, stack, steps, batch, self._dropout, seed)
        return run_forward(
            signature, self._backend, self._weights, self._names, masks, arguments, self, save, self._reserve
        )

    def backward(
        self,
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
            From `forward` of this layer. It is only read: backward may run twice, or from several threads, and the
            parameters may have changed since.
        dy
            Gradient of y, in its shape; None where the loss does not see y. Not read past a row's end.
        dstate
            Gradient of the final state, structured like it; None, or None in place of h or c, where the loss does not
            see it.
        need_x
            Whether the gradient of x is wanted.
        parameters
            Which parameters get a gradient: True for all, False for none, or their names. What is not asked for costs
            no time and changes no bit of the rest.
        max_norm
            Positive: the gradients of the parameters are scaled together so that their norm is at most that, as by
            `clip_grad_norm`; infinity only measures. The norm before that is `grads.norm`. Not with `clip_value` or
            `into`.
        clip_value
            Positive: each element of the gradients of the parameters is clipped to [-clip_value, clip_value].
        clip_state
            `("norm", bound)` or `("value", bound)`: on the way back, at each step and after dy_t is added, each row of
            dL/dh_t, and of an LSTM of dL/dc_t, is scaled down to that norm, or its elements are clipped. A norm that is
            not finite scales nothing. Backends native and reference.
        diagnostics
            Whether the norms of these gradients at each step, and the saturation of each gate, are wanted as
            `grads.flow`. Backends native and reference.
        into
            Gradients of an earlier backward of the same shapes; what is asked for is added to them, in place.

        Returns
        -------
        Grads
            `x`, shaped like x, None without `need_x`; `state`, of the initial state; `parameters`, with those keys of
            `layer.parameters` that are asked for; `norm` and `flow`, where they are. With `into`, that object.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> layer = rk.RNN(3, 4, seed=0)
        >>> y, _, tape = layer.forward(np.ones((5, 2, 3)))
        >>> grads = layer.backward(tape, y, max_norm=0.1, clip_state=("norm", 1.0), diagnostics=True)
        >>> grads.norm > 0.1, grads.flow.norms["h_l0"].shape
        (True, (5, 2))
        """
        check_tape(tape, self)
        limits = Limits(max_norm, clip_value, into)
        return run_backward(tape, dy, dstate, need_x, parameters, limits, clip_state, diagnostics)

    def freeze(self, weights: str | None = None) -> Frozen[StateT]:
        """A packed snapshot of the parameters for inference; later changes of the parameters do not reach it.

        Parameters
        ----------
        weights
            What the matrices of the weights are stored in: None, the layer's dtype, or `"bfloat16"`, for a layer of
            float32: rounded to nearest even, half the memory to read at each step (except with few units, whose
            matrices are small). Biases, states and sums stay float32, so that the results are those of a layer whose
            matrices have the rounded values.

        Raises
        ------
        ValueError
            `weights` is not as above.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> layer, x = rk.LSTM(3, 4, seed=0), np.ones((5, 1, 3), np.float32)
        >>> bool(np.abs(layer.freeze("bfloat16")(x)[0] - layer.freeze()(x)[0]).max() < 0.01)
        True
        """
        stored = check_format(weights, self.dtype)
        # In bfloat16 precision the weights are rounded in any case, and are read in half the time.
        narrow = stored or "bfloat16" * self._signature.stack.rounds
        signature = Signature(replace(self._signature.stack, stored=narrow), self.batch_first)
        copy = rounded if narrow else copied
        return Frozen(signature, self._chosen_backend, [copy(one) for one in self._weights], repr(self), stored)

    def release(self, *, for_good: bool = False) -> None:
        """Give up the memory that the layer keeps for its next call; that call allocates again.

        On the backend native a layer keeps the packed weights of its last call, and what the last `forward` saved once
        its tape is gone: fresh memory costs a large layer a tenth of a training step. `memory_plan` says how much.

        Parameters
        ----------
        for_good
            Whether later calls, and those of copies, are to leave none either.

        Raises
        ------
        TypeError
            `for_good` is no bool.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> layer = rk.GRU(3, 4, seed=0)
        >>> y, h = layer(np.ones((5, 2, 3)))
        >>> layer.release()
        """
        if flag("for_good", for_good):
            self._keeps_memory = False
        if self._reserve is not None:
            self._reserve.release()
            self._reserve = self._reserve if self._keeps_memory else None

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_backend", "_weights", "_reserve")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()


def _with_parameters(**own: str) -> Callable[[type[LayerT]], type[LayerT]]:
    """Give a class the section on parameters and errors of `Recurrent`, for those it has, and for its own.

    For `help`; a reader of the source, or an editor that only reads it, finds them at `Recurrent`.
    """

    def document(layer: type[LayerT]) -> type[LayerT]:
        if layer.__doc__ is None or Recurrent.__doc__ is None:  # python -OO
            return layer
        section = inspect.cleandoc(Recurrent.__doc__).partition("Parameters\n")[2].partition("\n\nRaises\n")
        entries = re.findall(r"^(\w.*)\n((?:    .*\n?)+)", section[0], re.MULTILINE)
        text = {name: (names, words.rstrip()) for names, words in entries for name in names.split(", ")}
        text |= {name: (name, "    " + words) for name, words in own.items()}
        chosen = dict.fromkeys(text[name] for name in inspect.signature(layer).parameters)
        parameters = "\n".join(f"{names}\n{words}" for names, words in chosen)
        raises = section[2].partition("\n\nExamples\n")[0]
        intro, _, examples = inspect.cleandoc(layer.__doc__).partition("\n\nExamples\n")
        intro = intro.replace("See `Recurrent` for the parameters.", "").rstrip()
        layer.__doc__ = f"{intro}\n\nParameters\n----------\n{parameters}\n\nRaises\n{raises}\n\nExamples\n{examples}\n"
        return layer

    return document


@_with_parameters(nonlinearity='f: `"tanh"`, `"relu"` or `"sigmoid"`.')
class RNN(Recurrent[Array]):
    """Elman 1990: h' = f(W_ih x + b_ih + W_hh h + b_hh), f one of tanh, relu and sigmoid; as `torch.nn.RNN`.

    See `Recurrent` for the parameters.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> y, h = rk.RNN(3, 4, nonlinearity="relu", seed=0)(np.ones((5, 3)))
    >>> y.shape, h.shape
    ((5, 4), (1, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        arithmetic: str = "fma",
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            cell_of_nonlinearity(nonlinearity),
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            dtype=dtype, precision=precision, arithmetic=arithmetic, backend=backend, seed=seed,
        )  # fmt: skip
        self.nonlinearity = nonlinearity


@_with_parameters()
class LSTM(Recurrent[tuple[Array, Array]]):
    """Hochreiter and Schmidhuber 1997 with forget gates (Gers et al. 2000); as `torch.nn.LSTM`.

    i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*), g = tanh(the same); c' = f c + i g, h' = o tanh(c'); with
    `proj_size` h' = W_hr (o tanh(c')). See `Recurrent` for the parameters.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> y, (h, c) = rk.LSTM(3, 4, proj_size=2, seed=0)(np.ones((5, 1, 3)))
    >>> y.shape, h.shape, c.shape
    ((5, 1, 2), (1, 1, 2), (1, 1, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        arithmetic: str = "fma",
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        super().__init__(
            "lstm", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            dtype=dtype, precision=precision, arithmetic=arithmetic, backend=backend, seed=seed,
        )  # fmt: skip


@_with_parameters(reset_after="Whether the reset gate acts on the product W_hn h + b_hn, or on h before it.")
class GRU(Recurrent[Array]):
    """Cho et al. 2014; as `torch.nn.GRU`.

    r, z = sigmoid(W_i* x + b_i* + W_h* h + b_h*), h' = (1-z) n + z h. With `reset_after` (cuDNN, PyTorch)
    n = tanh(W_in x + b_in + r (W_hn h + b_hn)), else (the paper) n = tanh(W_in x + b_in + W_hn (r h) + b_hn).
    See `Recurrent` for the parameters.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> y, h = rk.GRU(3, 4, bidirectional=True, seed=0)(np.ones((5, 1, 3)))
    >>> y.shape, h.shape
    ((5, 1, 8), (2, 1, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        arithmetic: str = "fma",
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.reset_after = flag("reset_after", reset_after)
        super().__init__(
            "gru" if self.reset_after else "gru_reset_before",
            input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional,
            dtype=dtype, precision=precision, arithmetic=arithmetic, backend=backend, seed=seed,
        )  # fmt: skip


class Frozen(Generic[StateT]):
    """A packed, immutable snapshot of a layer for inference; made by `Recurrent.freeze`.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> fast = rk.GRU(3, 4, seed=0).freeze()
    >>> y, h = fast(np.ones((5, 2, 3), np.float32))
    >>> stream = fast.stream(batch=2)
    >>> steps = [stream.step(np.ones((2, 3), np.float32)) for _ in range(5)]
    >>> bool(np.allclose(y, steps, atol=1e-6))
    True
    """

    def __init__(
        self, signature: Signature, backend: str, weights: Sequence[Weights], layer: str, stored: str = ""
    ) -> None:
        self._signature = signature
        self._chosen_backend = backend
        self._weights = weights
        self._layer = layer
        self._stored = stored  # as asked for
        self._pack()

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        name: str = self._backend.name
        return name

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype of the results."""
        return self._signature.dtype

    def _pack(self) -> None:
        stack = self._signature.stack
        self._backend = backends.pick(self._chosen_backend, stack.precision, stack.arithmetic)
        self._packed = self._backend.pack(self._signature.stack, self._weights, False)
        forward = partial(run_packed, self._backend, self._signature.stack, self._packed)
        self._call = partial(run_inference, self._signature, forward)
        if hasattr(self._backend, "frozen_call"):
            self._call = self._backend.frozen_call(self._packed, self._call, self._signature.batch_first)

    def __call__(
        self,
        x: Any,
        state: Any = None,
        *,
        lengths: Any = None,
        offsets: Any = None,
        resets: Any = None,
        out: Array | None = None,
    ) -> tuple[Any, StateT]:
        """y and the final state; the arguments, results and errors are those of the layer's call."""
        return self._call(x, state, lengths, offsets, resets, out)

    def stream(self, batch: int = 1) -> Stream[StateT]:
        """B sequences fed step by step, from a state of zeros.

        Raises
        ------
        ValueError
            The layer is bidirectional: its reverse direction starts at the end.
        """
        return Stream(self, batch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_backend", "_packed", "_call")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._weights = [{key: owned(array) for key, array in one.items()} for one in self._weights]
        self._pack()

    def __repr__(self) -> str:
        return f"{self._layer}.freeze({self._stored!r})" if self._stored else f"{self._layer}.freeze()"


class Stream(Generic[StateT]):
    """B sequences fed step by step through a frozen layer; made by `Frozen.stream`. One thread at a time may use it.

    `step` after `step` gives the bits of the frozen layer's call on the whole sequence with the native backend.

    Examples
    --------
    >>> import numpy as np, rnnkern as rk
    >>> stream = rk.GRU(3, 4, seed=0).freeze().stream(batch=2)
    >>> y_t = stream.step(np.ones((2, 3)))
    >>> before = stream.state
    >>> y_t = stream.step(np.ones((2, 3)), out=y_t)  # into the same array
    >>> stream.state = before  # a step back
    >>> bool((stream.step(np.ones((2, 3))) == y_t).all())
    True
    """

    def __init__(self, frozen: Frozen[StateT], batch: int = 1) -> None:
        stack = frozen._signature.stack
        if len(stack.directions) > 1:
            raise ValueError(f"stream: expected a layer of one direction, got {frozen._layer}")
        self._frozen = frozen
        self._batch = integer("batch", batch, 1)
        make = getattr(frozen._backend, "stream", partial(Steps, frozen._backend, stack))
        self._steps = make(frozen._packed, self._batch, partial(frozen._signature.step, self._batch))
        self._step: Callable[[Any, Any], Array] = self._steps.step

    def step(self, x_t: Any, out: Array | None = None) -> Array:
        """The output of the next step.

        Parameters
        ----------
        x_t
            (B, I).
        out
            Where to write the output: (B, P), of the layer's dtype, writable, C-contiguous, apart from x_t.

        Returns
        -------
        y_t
            (B, P); `out` where given.

        Raises
        ------
        ValueError, TypeError
            An argument is not as above; the message names it. The state is as before.
        RuntimeError
            Another thread is using the stream.
        """
        return self._step(x_t, out)

    @property
    def gates(self) -> Mapping[str, Array]:
        """The gates and the states beside h at the last step, as fresh, read-only copies (B, H).

        The keys are those of `tape.gates`, such as `f_l0`. They are recomputed from the x_t of that step, the state
        before it and the frozen parameters, in float64 and NumPy. A copy of a stream has none before its own first
        step.

        Raises
        ------
        ValueError
            There was no step yet.
        RuntimeError
            Another thread is using the stream.

        Examples
        --------
        >>> import numpy as np, rnnkern as rk
        >>> stream = rk.GRU(3, 4, seed=0).freeze().stream()
        >>> y_t = stream.step(np.ones((1, 3)))
        >>> {name: gate.shape for name, gate in stream.gates.items()}
        {'r_l0': (1, 4), 'z_l0': (1, 4), 'n_l0': (1, 4)}
        """
        last, stack = self._steps.last, self._frozen._signature.stack
        if last is None:
            raise ValueError("gates: expected a step before, got none")
        *before, x_t = last
        y = np.empty((1, self._batch, stack.output_size), stack.dtype)
        values = exact_values(stack, self._frozen._weights, Forward(x_t[None], tuple(before), y, "gates"))
        gates = gates_by_name(stack, [f"_l{layer}" for layer in range(stack.num_layers)], values)
        return read_only({name: gate[0] for name, gate in gates.items()})

    @property
    def state(self) -> StateT:
        """The state after the last step, h (L, B, P) or (h, c), copied both ways; set to None for zeros."""
        state: StateT = self._frozen._signature.state_to_caller(self._steps.state, False)
        return state

    @state.setter
    def state(self, value: Any) -> None:
        signature = self._frozen._signature
        self._steps.state = signature.stack.filled(signature.state("state", value, self._batch), self._batch)

    def reset(self) -> None:
        """Start again from a state of zeros."""
        self.state = None

    def __getstate__(self) -> tuple[Frozen[StateT], int, State]:
        return self._frozen, self._batch, self._steps.state

    def __setstate__(self, state: tuple[Frozen[StateT], int, State]) -> None:
        frozen, batch, states = state
        self.__init__(frozen, batch)  # type: ignore[misc]
        self._steps.state = states

    def __repr__(self) -> str:
        return f"{self._frozen!r}.stream(batch={self._batch})"
