"""The functions of `rnnkern.jax`, and what they accept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import backends
from ..arguments import as_array, check_names, describe, flag
from ..backends.native import native_module
from ..cells import CELLS, Cell, cell_of_nonlinearity
from ..formats import check_arithmetic, check_precision
from ..functional import Parameters
from ..layers import parameter_names
from ..stack import Stack
from .calls import Call
from .handlers import registered
from .primitive import bind

__all__ = ["gru", "lstm", "recurrent", "rnn"]

Array = Any  # a jax.Array, or what JAX traces in its place


def rnn(
    params: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    precision: str = "float32",
    arithmetic: str = "fma",
) -> tuple[Array, Array]:
    """`rnnkern.RNN` as a function; see `recurrent`. `nonlinearity` is tanh, relu or sigmoid."""
    cell = cell_of_nonlinearity(nonlinearity)
    rows = {"lengths": lengths, "resets": resets, "reverse": reverse}
    return recurrent(cell, params, x, state, **rows, precision=precision, arithmetic=arithmetic)


def lstm(
    params: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    precision: str = "float32",
    arithmetic: str = "fma",
) -> tuple[Array, tuple[Array, Array]]:
    """`rnnkern.LSTM` as a function; see `recurrent`. The state is (h, c)."""
    rows = {"lengths": lengths, "resets": resets, "reverse": reverse}
    return recurrent("lstm", params, x, state, **rows, precision=precision, arithmetic=arithmetic)


def gru(
    params: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    reset_after: bool = True,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    precision: str = "float32",
    arithmetic: str = "fma",
) -> tuple[Array, Array]:
    """`rnnkern.GRU` as a function; see `recurrent`. `reset_after` as there."""
    cell = "gru" if flag("reset_after", reset_after) else "gru_reset_before"
    rows = {"lengths": lengths, "resets": resets, "reverse": reverse}
    return recurrent(cell, params, x, state, **rows, precision=precision, arithmetic=arithmetic)


def recurrent(
    cell: str,
    params: Mapping[str, Any],
    x: Any,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    reverse: bool = False,
    precision: str = "float32",
    arithmetic: str = "fma",
) -> tuple[Array, Any]:
    """A stack of layers of any cell of the registry.

    Parameters
    ----------
    cell
        Name of the cell, such as `"lstm"`.
    params
        `weight_ih_l0` (G*H, I), `weight_hh_l0` (G*H, P) and so on, as in `docs/conventions.md`: with `_l1`, ... for
        more layers, with `_reverse` too for both directions, with or without biases and `weight_hr_l0`. All float32,
        or all float64, which is also the dtype of the results.
    x
        (T, B, I), or (T, I) unbatched; numbers of any real dtype.
    state
        h (L*D, B, P), for an LSTM (h, c) with c (L*D, B, H), unbatched without B; None is zeros.
    lengths, resets
        As for the layers: integers (B,) and bool (T, B), unbatched no lengths and (T,). They have no gradient.
    reverse
        Run one direction from the last step to the first.
    precision
        As for the layers: `"bfloat16"` rounds the operands of products, forward and backward, with params in float32.
    arithmetic
        As for the layers: `"amx"` makes products of float32 on the matrix engine of the CPU, and where there is none by
        multiply-adds, with a warning once.

    Returns
    -------
    y, state
        y (T, B, D*P) and the final state, structured like the initial one; unbatched without B.

    Raises
    ------
    ValueError, TypeError
        An argument is not as above; the message names it. A length below 0 or above T is one where the lengths are
        no array of JAX. A TypeError is also what a second derivative and forward mode end in.
    jax.errors.JaxRuntimeError
        When the results are waited for: a length in an array of JAX is below 0 or above T. JAX itself wraps integers
        of 64 bits around where they become its arrays without `jax_enable_x64`, as the arguments of `jit` do.

    Notes
    -----
    A `vmap` over x, the state, lengths or resets puts its axis into the batch. One over params runs element by element,
    and so does a `vmap` of gradients, whose elements have weight gradients of their own.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, rnnkern as rk, rnnkern.jax
    >>> params = rk.LSTM(3, 4, bidirectional=True, seed=0).parameters
    >>> y, (h, c) = jax.vmap(rk.jax.lstm, in_axes=(None, 0))(params, jnp.ones((6, 5, 3)))
    >>> y.shape, h.shape
    ((6, 5, 8), (6, 2, 4))
    """
    stack, bias, names = _structure(CELLS[cell], params, flag("reverse", reverse))
    precision = check_precision(precision, stack.dtype)
    stack = replace(stack, precision=precision, arithmetic=check_arithmetic(arithmetic, precision, stack.dtype))
    weights = _weights(stack, bias, names, params)
    x = _floats("x", x, stack.dtype)
    unbatched = x.ndim == 2
    if x.ndim not in (2, 3) or x.shape[-1] != stack.input_size:
        raise ValueError(f"x: expected shape (T, B, {stack.input_size}) or (T, {stack.input_size}), got {x.shape}")
    if unbatched:
        x = x[:, None]
    steps, batch, _ = x.shape
    states = _states(stack, state, batch, unbatched)
    rows = []
    if lengths is not None:
        rows.append(_lengths(lengths, steps, batch, unbatched))
    if resets is not None:
        rows.append(_resets(resets, steps, batch, unbatched))
    compiled = registered()
    backends.pick("native" if compiled else "auto", stack.precision, stack.arithmetic)  # or refuses, or warns
    isa = native_module().isa() if compiled else None
    call = Call(stack, bias, lengths is not None, resets is not None, isa)
    y, *final = bind(call, x, states, rows, weights)
    if unbatched:
        y, *final = y[:, 0], *(one[:, 0] for one in final)
    return y, final[0] if len(final) == 1 else tuple(final)


# Arguments, while JAX traces.


def _describe(value: Any) -> str:
    return f"{value.dtype} of shape {value.shape}" if isinstance(value, jax.Array) else describe(value)


def _array(name: str, value: Any) -> Array:
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name}: expected an array, got {_describe(value)}: {error}") from None


def _floats(name: str, value: Any, dtype: np.dtype[Any]) -> Array:
    array = _array(name, value)
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
        raise TypeError(f"{name}: expected numbers that convert to {dtype}, got {_describe(array)}")
    return array.astype(dtype)


def _shaped(name: str, array: Array, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    if array.dtype != dtype or array.shape != shape:
        error = TypeError if array.dtype != dtype else ValueError
        raise error(f"{name}: expected {dtype} of shape {shape}, got {_describe(array)}")
    return array


def _structure(cell: Cell, params: Mapping[str, Any], reverse: bool) -> tuple[Stack, bool, list[dict[str, str]]]:
    """The stack that the names and the first shapes of params imply, whether it has biases, and all its names."""
    if not isinstance(params, Mapping):
        raise TypeError(f"params: expected a mapping of names to arrays, got {describe(params)}")
    both = "weight_ih_l0_reverse" in params
    if both and reverse:
        raise ValueError("reverse: expected False with params of both directions, got True")
    layers = 1
    while f"weight_ih_l{layers}" in params:
        layers += 1
    bias = "bias_ih_l0" in params
    projected = cell.projects and "weight_hr_l0" in params
    # Only the names matter yet.
    shape = Stack(cell, 1, 2, int(projected), layers, (False, True) if both else (False,))
    names = parameter_names(shape, bias)
    check_names("params", params, [name for one in names for name in one.values()])
    w_ih, w_hh = (_array(f"params[{name!r}]", params[name]) for name in ("weight_ih_l0", "weight_hh_l0"))
    gates = len(cell.gates)
    if w_ih.dtype not in (np.float32, np.float64):
        raise TypeError(f"params['weight_ih_l0']: expected float32 or float64, got {_describe(w_ih)}")
    if w_ih.dtype != jax.dtypes.canonicalize_dtype(w_ih.dtype):
        raise TypeError(
            f"params['weight_ih_l0']: expected float32 where jax_enable_x64 is not set, got {_describe(w_ih)}, made "
            f"where it was"
        )
    if w_ih.ndim != 2 or not w_ih.size or w_ih.shape[0] % gates:
        raise ValueError(f"params['weight_ih_l0']: expected shape ({gates}*H, I), got {w_ih.shape}")
    hidden = w_ih.shape[0] // gates
    proj_size = 0
    if projected:
        proj_size = w_hh.shape[1] if w_hh.ndim == 2 else 0
        if not 0 < proj_size < hidden:
            raise ValueError(
                f"params['weight_hh_l0']: expected shape ({gates * hidden}, P) with 0 < P < {hidden} beside "
                f"weight_hr_l0, got {w_hh.shape}"
            )
    directions = (False, True) if both else (reverse,)
    return Stack(cell, w_ih.shape[1], hidden, proj_size, layers, directions, np.dtype(w_ih.dtype)), bias, names


def _weights(stack: Stack, bias: bool, names: Sequence[Mapping[str, str]], params: Mapping[str, Any]) -> list[Array]:
    weights = []
    for sizes, one in zip(stack.layers, names, strict=True):
        for key, shape in sizes.weight_shapes(bias, stack.proj_size > 0).items():
            name = f"params[{one[key]!r}]"
            weights.append(_shaped(name, _array(name, params[one[key]]), shape, stack.dtype))
    return weights


def _states(stack: Stack, state: Any, batch: int, unbatched: bool) -> list[Array]:
    shapes, parts = stack.state_shapes(batch), stack.cell.states
    if state is None:
        return [jnp.zeros(shape, stack.dtype) for shape in shapes]
    if len(parts) == 1:
        named = {"state": state}
    else:
        expected = f"state: expected a tuple ({', '.join(parts)})"
        if not isinstance(state, tuple | list):
            raise TypeError(f"{expected}, got {_describe(state)}")
        if len(state) != len(parts):
            raise ValueError(f"{expected}, got {len(state)} elements")
        named = {f"state[{index}]": one for index, one in enumerate(state)}
    states = []
    for (name, value), shape in zip(named.items(), shapes, strict=True):
        array = _floats(name, value, stack.dtype)
        given = shape[::2] if unbatched else shape
        states.append(_shaped(name, array, given, stack.dtype).reshape(shape))
    return states


def _lengths(lengths: Any, steps: int, batch: int, unbatched: bool) -> Array:
    """int32; what is out of range in an array of JAX stays so, for the kernels to refuse."""
    if unbatched:
        raise ValueError(f"lengths: expected None with unbatched x, got {_describe(lengths)}")
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lengths)):
        # Looks before JAX may cut the values to 32 bits.
        lengths = as_array("lengths", lengths)
        if lengths.dtype.kind in "iu" and lengths.size and (lengths.min() < 0 or lengths.max() > steps):
            raise ValueError(f"lengths: expected values from 0 to {steps}, got {lengths.min()} to {lengths.max()}")
    array = _array("lengths", lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"lengths: expected integers of shape ({batch},), got {_describe(array)}")
    _shaped("lengths", array, (batch,), array.dtype)
    limits = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    if steps > limits[1].max:
        raise ValueError(f"lengths: expected None with 2**31 steps or more, got {steps} steps")
    low, high = max(one.min for one in limits), min(one.max for one in limits)
    return jnp.clip(array, low, high).astype(jnp.int32)


def _resets(resets: Any, steps: int, batch: int, unbatched: bool) -> Array:
    shape = (steps,) if unbatched else (steps, batch)
    array = _shaped("resets", _array("resets", resets), shape, np.dtype(bool))
    return array[:, None] if unbatched else array


def _flatten(parameters: Parameters) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(jax.tree_util.DictKey(name), array) for name, array in parameters.items()], tuple(parameters)


# `layer.parameters` as an argument of `jit` and `grad`.
jax.tree_util.register_pytree_with_keys(
    Parameters, _flatten, lambda names, arrays: Parameters(dict(zip(names, arrays, strict=True)))
)
