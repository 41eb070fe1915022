"""What JAX sees of a call: one primitive, with its rules for `vmap` and for gradients.

Only a primitive can have a rule for `vmap` that comes before the one for gradients: the gradient of a vmapped call is
then that of one larger batch, whose weight gradients the kernels sum, and not a batch of gradients. Operands are x, the
states, lengths and resets where given, and the weights.

Two more make the gradients. `_linear` stands for the derivative of a forward and can only be transposed, into a
backward; `_once` passes arrays on and refuses to be differentiated, so that a second derivative ends in our words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .calls import Call, Compiled, ThroughPython, vary_alike

__all__ = ["bind"]


def bind(call: Call, x: Any, states: Sequence[Any], rows: Sequence[Any], weights: Sequence[Any]) -> list[Any]:
    """y and the final state, where JAX traces with all it is told."""
    results: list[Any] = _recurrent.bind(*vary_alike([x, *states, *rows, *weights]), call=call)
    return results


def _parts(call: Call, operands: Sequence[Any]) -> tuple[Any, tuple[Any, ...], Any, Any, tuple[Any, ...]]:
    x, *rest = operands
    states = len(call.stack.cell.states)
    state, rest = tuple(rest[:states]), rest[states:]
    lengths = rest.pop(0) if call.lengths else None
    resets = rest.pop(0) if call.resets else None
    return x, state, lengths, resets, tuple(rest)


def _way(call: Call) -> Any:
    return ThroughPython if call.isa is None else Compiled


def _expanded(*operands: Any, call: Call) -> list[Any]:
    x, state, lengths, resets, weights = _parts(call, operands)
    if not x.size:
        return [jnp.zeros((*x.shape[:2], call.stack.output_size), x.dtype), *state]
    return list(_way(call).infer(call, x, state, lengths, resets, weights))


def _abstract(*operands: Any, call: Call) -> list[Any]:
    x, state, *_ = _parts(call, operands)
    return [x.update(shape=(*x.shape[:2], call.stack.output_size)), *state]


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> Any:
    call = replace(call, need_x=not isinstance(tangents[0], ad.Zero))
    x, state, lengths, resets, weights = _parts(call, primals)
    dx, dstate, _, _, dweights = _parts(call, tangents)
    if not x.size:
        results = _expanded(*primals, call=call)
        return results, [jnp.zeros_like(results[0]), *dstate]
    results, residuals = _way(call).forward(call, *_first_order((x, state, lengths, resets, weights)))
    leaves, tree = jax.tree.flatten(residuals)
    moving = [*([dx] if call.need_x else []), *map(ad.instantiate_zeros, (*dstate, *dweights))]
    return list(results), _linear.bind(*leaves, *moving, call=call, tree=tree)


def _linear_abstract(*operands: Any, call: Call, tree: Any) -> list[Any]:
    x, state, *_ = jax.tree.unflatten(tree, operands[: tree.num_leaves])
    return [x.update(shape=(*x.shape[:2], call.stack.output_size)), *state]


def _linear_transpose(gradients: Sequence[Any], *operands: Any, call: Call, tree: Any) -> list[Any]:
    residuals = jax.tree.unflatten(tree, operands[: tree.num_leaves])
    dy, *dstate = map(ad.instantiate_zeros, gradients)
    residuals, dy, dstate = _first_order((residuals, dy, tuple(dstate)))
    dx, dinitial, dweights = _way(call).backward(call, residuals, dy, dstate)
    return [*[None] * tree.num_leaves, *([dx] if call.need_x else []), *dinitial, *dweights]


def _first_order(arrays: Any) -> Any:
    """The arrays of a tree as they are, where nothing differentiates through them again."""
    leaves, tree = jax.tree.flatten(arrays)
    return jax.tree.unflatten(tree, _once.bind(*leaves))


def _forward_mode(*_: Any, **__: Any) -> Any:
    raise TypeError(
        "rnnkern.jax has no forward-mode derivatives (jvp, jacfwd, hessian); take jax.grad, jax.vjp or jax.jacrev"
    )


def _second_order(*_: Any, **__: Any) -> Any:
    raise TypeError(
        "rnnkern.jax has no second derivatives: expected one jax.grad, jax.vjp or jax.jacrev around a call, got "
        "another derivative of its gradient; write the step of the cell in jax.lax.scan for those"
    )


def _batched(operands: Sequence[Any], axes: Sequence[int | None], *, call: Call) -> Any:
    (size,) = {one.shape[axis] for one, axis in zip(operands, axes, strict=True) if axis is not None}
    mapped = {i: axis for i, axis in enumerate(axes) if axis is not None}
    if any(axis is not None for axis in _parts(call, axes)[-1]):
        return _one_by_one(operands, mapped, call)

    def into_batch(i: int, axis: int) -> Any:
        """Operand i with the mapped axis before that of the batch, and both as one."""
        array = operands[i]
        if i in mapped:
            array = jnp.moveaxis(array, mapped[i], axis)
        else:
            array = jnp.broadcast_to(jnp.expand_dims(array, axis), (*array.shape[:axis], size, *array.shape[axis:]))
        return array.reshape(*array.shape[:axis], size * array.shape[axis + 1], *array.shape[axis + 2 :])

    x, state, lengths, resets, weights = _parts(call, range(len(operands)))
    rows = [] if lengths is None else [into_batch(lengths, 0)]
    rows += [] if resets is None else [into_batch(resets, 1)]
    states = [into_batch(i, 1) for i in state]
    results = bind(call, into_batch(x, 1), states, rows, [operands[i] for i in weights])
    _, batch, _ = (length for axis, length in enumerate(operands[x].shape) if axis != mapped.get(x))
    return [one.reshape(len(one), size, batch, one.shape[2]) for one in results], [1] * len(results)


def _one_by_one(operands: Sequence[Any], mapped: Mapping[int, int], call: Call) -> Any:
    def one_element(values: Sequence[Any]) -> Any:
        given = list(operands)
        for i, value in zip(mapped, values, strict=True):
            given[i] = value
        return _recurrent.bind(*given, call=call)

    results = jax.lax.map(one_element, [jnp.moveaxis(operands[i], axis, 0) for i, axis in mapped.items()])
    return results, [0] * len(results)


_recurrent = Primitive("rnnkern")
_recurrent.multiple_results = True
_recurrent.def_impl(jax.jit(_expanded, static_argnames="call"))
_recurrent.def_abstract_eval(_abstract)
ad.primitive_jvps[_recurrent] = _jvp
batching.primitive_batchers[_recurrent] = _batched
mlir.register_lowering(_recurrent, mlir.lower_fun(_expanded, multiple_results=True), platform="cpu")

_linear = Primitive("rnnkern_linear")
_linear.multiple_results = True
_linear.def_impl(_forward_mode)
_linear.def_abstract_eval(_linear_abstract)
ad.primitive_transposes[_linear] = _linear_transpose
ad.primitive_jvps[_linear] = _forward_mode
batching.primitive_batchers[_linear] = _forward_mode
mlir.register_lowering(_linear, _forward_mode)

_once = Primitive("rnnkern_once")
_once.multiple_results = True
_once.def_impl(lambda *arrays: arrays)
_once.def_abstract_eval(lambda *arrays: arrays)
ad.primitive_jvps[_once] = _second_order
batching.primitive_batchers[_once] = lambda arrays, axes: (_once.bind(*arrays), axes)
mlir.register_lowering(_once, lambda _, *arrays: arrays)
