"""The output side of training from NumPy: `Linear`, SGD, Adam and AdamW."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import backends
from .arguments import (
    as_floats,
    as_parameter,
    check_out,
    chosen_names,
    describe,
    flag,
    float_dtype,
    fraction,
    integer,
    positive,
    seed_or_none,
)
from .clipping import items_of, mappings_of
from .copies import shared
from .formats import check_arithmetic, check_precision
from .functional import Grads, Limits, Parameters, refuse_to_copy, uniform
from .pieces import Piece, check_room

__all__ = ["SGD", "Adam", "AdamW", "Linear"]

Array = NDArray[Any]
Groups = Mapping[str, Mapping[str, float]]  # of an optimizer: options of the parameters whose names fit a pattern

_BLOCK = 1 << 14  # elements an optimizer updates at a time: its temporaries stay in the L2 cache
_SHORT = 1 << 13  # elements whose dot product OpenBLAS gives to no threads; over 10,000 it does


@dataclass(frozen=True, eq=False)
class _LinearTape:
    """What `Linear.forward` leaves for `backward`; it refers to x and owns a copy of the weight."""

    owner: Linear
    x: Array  # (rows, in_features)
    weight: Array
    shape: tuple[int, ...]  # leading dimensions of the caller's x

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse_to_copy()


class Linear(Piece):
    """The output layer: y = x W^T + b over all steps at once, with the packed product of the recurrent layers.

    Parameters
    ----------
    in_features, out_features
        Elements of x and of y.
    bias
        Whether there is a b.
    dtype
        float32 or float64.
    precision
        As for the recurrent layers: `"bfloat16"` rounds the operands of products.
    arithmetic
        As for the recurrent layers: `"amx"` makes products of float32 on the matrix engine of the CPU.
    backend
        As for the recurrent layers.
    seed
        Of the initial weights, U(-1/sqrt(in_features), 1/sqrt(in_features)) drawn in float64; None draws a fresh one.

    Raises
    ------
    TypeError, ValueError
        An option is not as above; the message names it.
    BackendUnavailableError
        A named backend cannot run here.

    Examples
    --------
    >>> import rnnkern as rk
    >>> layer = rk.Linear(3, 2, seed=0)
    >>> y, tape = layer.forward(np.ones((5, 4, 3)))
    >>> y.shape, layer.backward(tape, np.ones_like(y)).parameters["bias"].tolist()
    ((5, 4, 2), [20.0, 20.0])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        dtype: DTypeLike = "float32",
        precision: str = "float32",
        arithmetic: str = "fma",
        backend: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.in_features = integer("in_features", in_features, 1)
        self.out_features = integer("out_features", out_features, 1)
        self.bias = flag("bias", bias)
        self.dtype = float_dtype(dtype)
        self.precision = check_precision(precision, self.dtype)
        self.arithmetic = check_arithmetic(arithmetic, precision, self.dtype)
        self._chosen_backend = backend
        self._backend = backends.pick(backend, self.precision, self.arithmetic)
        shapes: dict[str, tuple[int, ...]] = {"weight": (self.out_features, self.in_features)}
        if self.bias:
            shapes["bias"] = (self.out_features,)
        check_room("in_features, out_features", sum(map(math.prod, shapes.values())) * self.dtype.itemsize)
        bound = 1 / math.sqrt(self.in_features)
        generator = np.random.default_rng(seed_or_none(seed))
        self._parameters = Parameters(
            {name: uniform(generator, bound, shape, self.dtype) for name, shape in shapes.items()}
        )

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        name: str = self._backend.name
        return name

    @property
    def _products(self) -> tuple[bool, ...]:
        """What a backend that rounds operands is told, and one that has engines."""
        return (False, True) if self.arithmetic == "amx" else (True,) if self.precision == "bfloat16" else ()

    @property
    def sizes(self) -> tuple[int, int]:
        """in_features and out_features."""
        return self.in_features, self.out_features

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend = backends.pick(self._chosen_backend, self.precision, self.arithmetic)

    def __call__(self, x: Any, *, out: Array | None = None) -> Array:
        """y (..., out_features) of x (..., in_features), to `out` where given; keeps nothing."""
        rows, shape = self._rows(x)
        if out is None:
            return self._product(rows).reshape(*shape, self.out_features)
        check_out(out, (*shape, self.out_features), self.dtype, (x, rows, *self.parameters.values()))
        self._product(rows, out.reshape(-1, self.out_features))
        return out

    def forward(self, x: Any) -> tuple[Array, _LinearTape]:
        """y, read-only, and the tape for `backward`, which refers to x: leave x as it is until then."""
        rows, shape = self._rows(x)
        y = self._product(rows).reshape(*shape, self.out_features)
        y.flags.writeable = False
        return y, _LinearTape(self, rows, self.parameters["weight"].copy(), shape)

    def backward(
        self,
        tape: _LinearTape,
        dy: Any,
        *,
        need_x: bool = True,
        parameters: bool | Iterable[str] = True,
        max_norm: float | None = None,
        clip_value: float | None = None,
        into: Grads | None = None,
    ) -> Grads:
        """Gradients of one `forward`.

        Parameters
        ----------
        tape
            What this layer's `forward` returned.
        dy
            Gradient of y, in its shape.
        need_x
            Whether the gradient of x is wanted.
        parameters
            Which parameters get a gradient: True for all, False for none, or their names. What is not asked for costs
            no time and changes no bit of the rest.
        max_norm, clip_value
            As for a recurrent layer.
        into
            What an earlier `backward` of the same shapes returned: what is asked for is added to it.

        Returns
        -------
        Grads
            `x` (None without `need_x`), an empty `state`, and `parameters`, with those keys and shapes of the layer's
            that are asked for.

        Raises
        ------
        TypeError, ValueError
            An argument is not as above; the message names it.
        """
        if not isinstance(tape, _LinearTape):
            raise TypeError(f"tape: expected the tape that forward returned, got {describe(tape)}")
        if tape.owner is not self:
            raise ValueError(f"tape: expected a tape of {self!r}, got one of another layer, {tape.owner!r}")
        flag("need_x", need_x)
        limits = Limits(max_norm, clip_value, into)
        wanted = chosen_names("parameters", parameters, self.parameters)
        dy = as_parameter("dy", dy, (*tape.shape, self.out_features), self.dtype).reshape(-1, self.out_features)
        x_shape = (*tape.shape, self.in_features)
        if tape.x.size:
            dx, dweight, dbias = self._backend.linear_backward(tape.x, tape.weight, dy, need_x, wanted, *self._products)
        else:
            dx, dweight, dbias = tape.x, np.zeros_like(tape.weight), np.zeros(self.out_features, self.dtype)
        grads = Grads(
            dx.reshape(x_shape) if need_x else None,
            (),
            Parameters({name: {"weight": dweight, "bias": dbias}[name] for name in wanted}),
        )
        return limits.finish(grads)

    def _rows(self, x: Any) -> tuple[Array, tuple[int, ...]]:
        """x as (rows, in_features), and its leading dimensions."""
        array = as_floats("x", x, self.dtype)
        if array.ndim < 1 or array.shape[-1] != self.in_features:
            raise ValueError(f"x: expected shape (..., {self.in_features}), got {array.shape}")
        return array.reshape(-1, self.in_features), array.shape[:-1]

    def _product(self, rows: Array, y: Array | None = None) -> Array:
        if y is None:
            y = np.empty((len(rows), self.out_features), self.dtype)
        if len(rows):
            self._backend.linear_forward(
                rows, self.parameters["weight"], self.parameters.get("bias"), y, *self._products
            )
        return y


@dataclass(frozen=True)
class _Settings:
    """What `groups` of an optimizer says of a parameter."""

    lr_factor: float = 1.0
    weight_decay: float | None = None  # None: the optimizer's


class _Optimizer(ABC):
    """Parameters, the checks of their gradients, and the walk over both in blocks.

    Small neighbours are one vector, so that a step of a small network is a few operations of NumPy. Subclasses name
    what they keep of the gradients (`_moments`) and say what is to be subtracted from one block (`_change`).
    """

    _moments: tuple[str, ...] = ()
    _group_options: tuple[str, ...] = ("lr_factor",)
    weight_decay: float = 0.0
    _decoupled = False  # whether weight decay leaves the gradient alone

    def __init__(self, parameters: Any, lr: float, groups: Groups | None) -> None:
        self.lr = lr
        self.steps = 0
        self._parameters = mappings_of("parameters", parameters)
        self._names = [f"{index}.{name}" for index, one in enumerate(self._parameters) for name in one]
        self._values = self._flat_parameters()
        settings = _settings(groups, self._names, self._group_options)
        self._groups = _groups(self._values, settings)
        self._settings = [settings[group.start] for group in self._groups]
        self._state = {moment: [self._zeros(group) for group in self._groups] for moment in self._moments}

    def _flat_parameters(self) -> list[Array]:
        """Views of the parameters, which `step` writes through; notes the parameters themselves."""
        views, self._held = [], []
        for index, key, array in items_of(self._parameters):
            name = f"parameters[{index}][{key!r}]"
            if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
                got = getattr(array, "dtype", type(array).__name__)
                raise TypeError(f"{name}: expected an array of floats, got {got}")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise ValueError(f"{name}: expected a writable C-contiguous array, to be updated in place")
            views.append(array.reshape(-1))
            self._held.append(array)
        return views

    def _zeros(self, group: slice) -> Array:
        values = self._values[group]
        return np.zeros(sum(one.size for one in values), values[0].dtype)

    def __getstate__(self) -> dict[str, Any]:
        # Mappings of layers copy their arrays themselves; those of the caller's own making get theirs back by name.
        own = [{} if isinstance(one, Parameters) else shared(dict(one)) for one in self._parameters]
        rest = {name: value for name, value in self.__dict__.items() if name != "_held"}
        return rest | {"_values": own, "_state": shared(self._state)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for index, (mapping, arrays) in enumerate(zip(self._parameters, state["_values"], strict=True)):
            if isinstance(mapping, MutableMapping):
                mapping.update(arrays)
            elif arrays:
                self._parameters[index] = arrays
        self._values = self._flat_parameters()

    def __copy__(self) -> _Optimizer:
        return copy.deepcopy(self)  # a copy has arrays of its own

    @property
    def lr(self) -> float:
        """The learning rate; may be set between steps."""
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = positive("lr", value, zero=True)

    def step(self, grads: Any) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads
            As the parameters were given: what `backward` returned for each layer, or mappings of the same names.

        Raises
        ------
        TypeError, ValueError
            The gradients do not fit the parameters, or a mapping has other arrays than it had when it was given.
        FloatingPointError
            A gradient is NaN or infinite; the message names it. Whatever the error, nothing has changed.
        """
        with np.errstate(all="ignore"):
            gradients = self._checked(grads)
            self.steps += 1
            for group, setting, gradient, *moments in zip(
                self._groups, self._settings, gradients, *self._state.values(), strict=True
            ):
                self._update(self._values[group], gradient, moments, setting)

    def _update(self, values: Sequence[Array], gradient: Array, moments: Sequence[Array], setting: _Settings) -> None:
        """Update a group in place."""
        lr = self.lr * setting.lr_factor
        decay = self.weight_decay if setting.weight_decay is None else setting.weight_decay
        if len(values) > 1:  # no more than a block
            self._update_block(values, gradient, moments, lr, decay)
            return
        for start in range(0, gradient.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            self._update_block([values[0][block]], gradient[block], [one[block] for one in moments], lr, decay)

    def _update_block(
        self, values: Sequence[Array], gradient: Array, moments: Sequence[Array], lr: float, decay: float
    ) -> None:
        if decay and self._decoupled:
            for value in values:
                value *= 1 - lr * decay
        elif decay:
            gradient = gradient.copy()
            for value, part in zip(values, _split(gradient, values), strict=True):
                part += decay * value
        for value, change in zip(values, _split(self._change(lr, gradient, *moments), values), strict=True):
            value -= change

    @abstractmethod
    def _change(self, lr: float, gradient: Array, *moments: Array) -> Array:
        """What to subtract from a block, whose moments are brought up to date in place."""

    def _checked(self, grads: Any) -> list[Array]:
        """The gradients, a vector for each group."""
        given = mappings_of("grads", grads)
        if len(given) != len(self._parameters):
            raise ValueError(f"grads: expected {len(self._parameters)}, one for each layer, got {len(given)}")
        flat, held = [], iter(self._held)
        for index, (one, parameters) in enumerate(zip(given, self._parameters, strict=True)):
            if one is parameters:
                raise ValueError(f"grads[{index}]: expected gradients, as backward returns, got the parameters")
            if set(one) != set(parameters):
                raise ValueError(f"grads[{index}]: expected the names {sorted(parameters)}, got {sorted(one)}")
            for name, value in parameters.items():
                old = next(held, None)
                if value is not old and not _is_same(value, old):
                    raise ValueError(
                        f"parameters[{index}][{name!r}]: expected the array that the optimizer was given, got another: "
                        "write into that one, as in parameters[name][...] = values"
                    )
                gradient = np.asarray(one[name])
                if gradient.shape != value.shape or gradient.dtype != value.dtype:
                    raise ValueError(
                        f"grads[{index}][{name!r}]: expected {value.dtype} of shape {value.shape}, "
                        f"got {gradient.dtype} of shape {gradient.shape}"
                    )
                flat.append(gradient.reshape(-1))
        if len(flat) < len(self._held):
            raise ValueError(
                f"parameters: expected the {len(self._held)} that the optimizer was given, got {len(flat)}"
            )
        groups = [flat[one] for one in self._groups]
        vectors = [one[0] if len(one) == 1 else np.concatenate(one) for one in groups]
        if not all(map(_all_finite, vectors)):
            bad = next(at for at, one in zip(items_of(self._parameters), flat, strict=True) if not _all_finite(one))
            raise FloatingPointError(
                f"grads[{bad[0]}][{bad[1]!r}]: expected finite values, got NaN or infinity; nothing has changed"
            )
        return vectors

    def _parts(self, moment: str) -> Iterator[Array]:
        """Views into a moment, one for each parameter, flat."""
        for group, vector in zip(self._groups, self._state[moment], strict=True):
            yield from _split(vector, self._values[group])

    def state_dict(self) -> dict[str, Any]:
        """A copy of what the optimizer has gathered, to `save` and to load into one with equal parameters.

        The number of steps, and per kept array a mapping from "<layer>.<name>" to it.
        """
        return {"steps": self.steps} | {
            moment: {
                name: part.reshape(parameter.shape).copy()
                for name, part, (_, _, parameter) in zip(
                    self._names, self._parts(moment), items_of(self._parameters), strict=True
                )
            }
            for moment in self._moments
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; all of it or, with an error, nothing.

        Raises
        ------
        TypeError, ValueError
            A name is missing or unknown, or a shape or dtype differs.
        """
        expected = ("steps", *self._moments)
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a mapping, got {type(state).__name__}")
        if set(state) != set(expected):
            raise ValueError(f"state: expected the names {sorted(expected)}, got {sorted(state)}")
        steps = state["steps"]
        if type(steps) is not int or steps < 0:
            raise ValueError(f"state['steps']: expected an int >= 0, got {steps!r}")
        copies = []
        for moment in self._moments:
            given = state[moment]
            if not isinstance(given, Mapping) or set(given) != set(self._names):
                got = sorted(given) if isinstance(given, Mapping) else type(given).__name__
                raise ValueError(f"state[{moment!r}]: expected the names {sorted(self._names)}, got {got}")
            for name, target, (_, _, parameter) in zip(
                self._names, self._parts(moment), items_of(self._parameters), strict=True
            ):
                value = np.asarray(given[name])
                if value.shape != parameter.shape or value.dtype != parameter.dtype:
                    raise ValueError(
                        f"state[{moment!r}][{name!r}]: expected {parameter.dtype} of shape {parameter.shape}, "
                        f"got {value.dtype} of shape {value.shape}"
                    )
                copies.append((target, value.reshape(-1)))
        for target, value in copies:
            target[...] = value
        self.steps = steps


class SGD(_Optimizer):
    """Stochastic gradient descent, with momentum and weight decay as `torch.optim.SGD` has them.

    v = momentum v + g + weight_decay p, p -= lr v.

    Parameters
    ----------
    parameters
        `layer.parameters`, a layer or a model, or a sequence of such: writable C-contiguous arrays by name.
    lr
        Learning rate >= 0; the attribute `lr` may be set between steps.
    momentum
        In [0, 1).
    weight_decay
        >= 0: the gradient of weight_decay / 2 times the squares of the parameters is added to that of the loss.
    groups
        What is different for some parameters: a mapping from patterns of their names, "<layer>.<name>" as in
        `state_dict` (`*` stands for anything), to mappings with `lr_factor`, which multiplies lr, so that a schedule
        moves all, and `weight_decay`, each >= 0. Of several patterns that fit, the last one stands.

    Raises
    ------
    TypeError, ValueError
        A parameter cannot be updated in place, or an option is out of range.

    Examples
    --------
    >>> parameters = {"weight": np.array([1.0, 2.0])}
    >>> SGD(parameters, lr=0.5).step({"weight": np.array([2.0, 0.0])})
    >>> parameters["weight"].tolist()
    [0.0, 2.0]
    """

    _group_options = ("lr_factor", "weight_decay")

    def __init__(
        self,
        parameters: Any,
        lr: float,
        momentum: float = 0.0,
        *,
        weight_decay: float = 0.0,
        groups: Groups | None = None,
    ) -> None:
        self.momentum = fraction("momentum", momentum)
        self.weight_decay = positive("weight_decay", weight_decay, zero=True)
        self._moments = ("velocity",) if self.momentum else ()
        super().__init__(parameters, lr, groups)

    def _change(self, lr: float, gradient: Array, *moments: Array) -> Array:
        direction = gradient
        if moments:
            (direction,) = moments
            direction *= self.momentum
            direction += gradient
        return lr * direction


class Adam(_Optimizer):
    """Adam (Kingma and Ba 2015) with bias correction, as `torch.optim.Adam`.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr m / (1 - b1^n) / (sqrt(v / (1 - b2^n)) + eps) at step n.

    Parameters
    ----------
    parameters
        `layer.parameters`, a layer or a model, or a sequence of such: writable C-contiguous arrays by name.
    lr
        Learning rate >= 0; the attribute `lr` may be set between steps.
    betas
        b1 and b2, in [0, 1).
    eps
        Positive.
    groups
        As for `SGD`, with `lr_factor`; for weight decay there is `AdamW`.

    Raises
    ------
    TypeError, ValueError
        A parameter cannot be updated in place, or an option is out of range.

    Examples
    --------
    >>> parameters = {"weight": np.array([1.0, 2.0])}
    >>> Adam(parameters, lr=0.5).step({"weight": np.array([100.0, -0.01])})
    >>> parameters["weight"].round(3).tolist()
    [0.5, 2.5]
    """

    _moments = ("mean", "mean_square")

    def __init__(
        self,
        parameters: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        groups: Groups | None = None,
    ) -> None:
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise TypeError(f"betas: expected two numbers, got {betas!r}")
        self.betas = (fraction("betas[0]", betas[0]), fraction("betas[1]", betas[1]))
        self.eps = positive("eps", eps)
        super().__init__(parameters, lr, groups)

    def _change(self, lr: float, gradient: Array, *moments: Array) -> Array:
        mean, mean_square = moments
        b1, b2 = self.betas
        mean += (1 - b1) * (gradient - mean)
        mean_square *= b2
        squared = gradient * gradient
        squared *= 1 - b2
        mean_square += squared
        change: Array = np.sqrt(mean_square)
        change /= math.sqrt(1 - b2**self.steps)
        change += self.eps
        np.divide(mean, change, out=change)
        change *= lr / (1 - b1**self.steps)
        return change


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as `torch.optim.AdamW`.

    The step of `Adam`, and p -= lr weight_decay p: the decay does not go through the moments, so that parameters with
    large gradients decay as fast as others.

    Parameters
    ----------
    parameters, lr, betas, eps
        As for `Adam`.
    weight_decay
        >= 0.
    groups
        As for `SGD`, with `lr_factor` and `weight_decay`.

    Raises
    ------
    TypeError, ValueError
        A parameter cannot be updated in place, or an option is out of range.

    Examples
    --------
    >>> parameters = {"weight": np.array([1.0, 2.0]), "bias": np.array([1.0])}
    >>> optimizer = AdamW(parameters, lr=0.5, weight_decay=0.1, groups={"*.bias": {"weight_decay": 0}})
    >>> optimizer.step({"weight": np.array([100.0, -0.01]), "bias": np.array([0.0])})
    >>> parameters["weight"].round(3).tolist(), parameters["bias"].tolist()
    ([0.45, 2.4], [1.0])
    """

    _group_options = ("lr_factor", "weight_decay")
    _decoupled = True

    def __init__(
        self,
        parameters: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        weight_decay: float = 0.01,
        groups: Groups | None = None,
    ) -> None:
        self.weight_decay = positive("weight_decay", weight_decay, zero=True)
        super().__init__(parameters, lr, betas, eps, groups=groups)


def _settings(groups: Groups | None, names: Sequence[str], options: Sequence[str]) -> list[_Settings]:
    """What `groups` says of each parameter."""
    settings = [_Settings()] * len(names)
    if groups is None:
        return settings
    if not isinstance(groups, Mapping):
        raise TypeError(f"groups: expected a mapping of patterns of names to mappings, got {describe(groups)}")
    for pattern, changes in groups.items():
        chosen = [index for index, name in enumerate(names) if isinstance(pattern, str) and fnmatchcase(name, pattern)]
        if not chosen:
            raise ValueError(f"groups: expected patterns of the names {', '.join(names)}, got {pattern!r}")
        if not isinstance(changes, Mapping) or not set(changes) <= set(options):
            came = ", ".join(map(str, changes)) if isinstance(changes, Mapping) else describe(changes)
            raise ValueError(f"groups[{pattern!r}]: expected a mapping with {' and '.join(options)}, got {came}")
        checked = {key: positive(f"groups[{pattern!r}][{key!r}]", one, zero=True) for key, one in changes.items()}
        for index in chosen:
            settings[index] = replace(settings[index], **checked)
    return settings


def _groups(values: Sequence[Array], settings: Sequence[_Settings]) -> list[slice]:
    """What an optimizer updates together: neighbours of one dtype and of the same settings that fit into a block, else
    each array by itself.
    """
    groups, start, size = [], 0, 0
    for index, value in enumerate(values):
        alike = value.dtype == values[start].dtype and settings[index] == settings[start]
        if index > start and (size + value.size > _BLOCK or not alike):
            groups.append(slice(start, index))
            start, size = index, 0
        size += value.size
    return [*groups, slice(start, len(values))] if values else groups


def _split(vector: Array, like: Sequence[Array]) -> Iterator[Array]:
    """Parts of a vector, one for each array and as long."""
    start = 0
    for one in like:
        yield vector[start : start + one.size]
        start += one.size


def _is_same(array: object, held: Array | None) -> bool:
    """Whether a parameter is the array that is held, or another view of the same memory."""
    if held is None or not isinstance(array, np.ndarray):
        return False
    return array.shape == held.shape and array.strides == held.strides and array.ctypes.data == held.ctypes.data


def _all_finite(array: Array) -> bool:
    """Whether no element is NaN or infinite; the caller ignores floating-point warnings."""
    # Such an element makes the sum one too, of the squares as well. An overflow is looked into.
    total = array.dot(array) if array.size <= _SHORT else np.einsum("i->", array)
    return math.isfinite(total) or bool(np.isfinite(array).all())
