"""The derivative of a call: an `autograd.Function` for eager mode, operators for compiled graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import plain
from .kernels import Kernels, Rows, kernels_of, tape_of, tensor_of, threads_of_torch
from .packing import Packing
from .uncompiled import uncompiled

__all__ = ["apply", "run_plain"]


def run_plain(
    kernels: Kernels,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Any] | None,
) -> list[Tensor]:
    """What `Kernels.infer` computes, in torch's own operations."""
    by_layer = kernels.by_layer(weights)
    tensors = None if masks is None else [torch.as_tensor(one) for one in masks]
    return plain.forward(kernels.signature.stack, by_layer, x, state, lengths, resets, tensors)


def _run_unpadded(
    kernels: Kernels,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Tensor | None,
    masks: Sequence[Any] | None,
    packing: Packing,
) -> list[Tensor]:
    """The same of rows without padding."""
    places = packing.places()
    cuts = None if resets is None else packing.spread(resets, places)
    spread = None if masks is None else [packing.spread(torch.from_numpy(one), places).numpy() for one in masks]
    y, *final = run_plain(kernels, packing.spread(x, places), state, weights, places[0], cuts, spread)
    return [packing.gather(y, places), *final]


_BATCHES = torch._C._parse_dispatch_key("VmapMode")  # is_grads_batched=True, jacobian(vectorize=True)


class Eager(torch.autograd.Function):
    """A call whose backward is wanted. The tensors are the initial state and the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: Kernels,
        call: tuple[Any, ...],  # one argument, for each takes autograd its time
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        arrays, state, lengths, resets, packing, seed, dropout = call
        rows = kernels.rows(x, lengths, resets, packing, seed, dropout)
        results, tape = kernels.forward(arrays, x, state, rows)
        # The masks are with the tape, to be dropped with it.
        ctx.call = kernels, len(state), rows if seed is None else rows._replace(masks=None), seed, dropout
        ctx.set_materialize_grads(False)
        # The tape refers to the memory of x and y; autograd refuses a backward when they, the state or the weights were
        # written to. It is saved as a tensor, so that activation checkpointing drops it with the others.
        ctx.save_for_backward(tensor_of(tape), results[0], x, *tensors)
        return tuple(results)

    @staticmethod
    @uncompiled()
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        tensor, y, x, *tensors = ctx.saved_tensors
        kernels, states, rows, seed, dropout = ctx.call
        needs = ctx.needs_input_grad[2:]
        if not any(one is not None for one in gradients):
            return (None,) * len(ctx.needs_input_grad)
        tape = tape_of(tensor, x, y)
        again = (
            torch.is_grad_enabled()
            or torch._C._dispatch_tls_is_dispatch_key_included(_BATCHES)
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        )
        if again or tape is None:
            rows = rows._replace(masks=kernels.masks(x, seed, dropout))
            if again:
                return (None, None, *_again(kernels, rows, x, tensors[:states], tensors[states:], gradients, needs))
            # Keep y, in whose memory the tape is.
            (y, *_), tape = kernels.again(x, tensors[:states], tensors[states:], rows)
        return (None, None, *kernels.backward(tape, x, gradients, needs[0], needs[1 : 1 + states], needs[1 + states :]))


# Skips the search of `Eager.apply` for transforms of torch.func, which the modules have done by then.
apply = super(torch.autograd.Function, Eager).apply


def _again(
    kernels: Kernels,
    rows: Rows,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients to be differentiated, many at once or with tangents, of the same call in torch's own operations."""
    create_graph = torch.is_grad_enabled()
    ends, cuts, offsets, sizes = [None if one is None else torch.tensor(one) for one in (*rows[:2], *rows[3:])]
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Differentiate by views of this call alone: a state may come from x or the weights, and one may come twice.
        tensors = [one.view_as(one) for one in (x, *state, *weights)]
        x, state, weights = tensors[0], tensors[1 : 1 + len(state)], tensors[1 + len(state) :]
        if offsets is None and sizes is None:
            results = run_plain(kernels, x, state, weights, ends, cuts, rows.masks)
        else:
            results = _run_unpadded(kernels, x, state, weights, cuts, rows.masks, Packing(offsets, sizes))
    seen = [(one, d) for one, d in zip(results, gradients, strict=True) if d is not None and one.requires_grad]
    if not seen:  # no steps, and a state that needs nothing
        return [None] * len(needs)
    outputs, directions = zip(*seen, strict=True)
    wanted = [one for one, need in zip(tensors, needs, strict=True) if need]
    found = iter(torch.autograd.grad(outputs, wanted, directions, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needs]


# The operators are one node each of a graph. Only tensors pass from the one to the other: the tape is one. The
# arguments of forward go along, for hooks of saved tensors may hand over copies.

_STACK = (
    "str cell, int input_size, int hidden_size, int proj_size, int num_layers, bool bidirectional, bool bias, "
    "str backend, str precision, str arithmetic"
)
_CALL = "Tensor x, Tensor[] state, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? seed, float dropout"
torch.library.define("rnnkern::forward", f"({_CALL}, bool training, {_STACK}) -> Tensor[]")
torch.library.define(
    "rnnkern::backward",
    f"({_CALL}, Tensor tape, Tensor y, Tensor? dy, Tensor?[] dfinal, bool need_x, "
    f"bool need_state, bool[] need_weights, {_STACK}) -> Tensor[]",
)


@torch.library.impl("rnnkern::forward", "CPU")
@torch.no_grad()
def _forward_operator(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    training: bool,
    *stack: Any,
) -> list[Tensor]:
    """y, the final state and the tape, which is an empty tensor unless training."""
    kernels = kernels_of(*stack, x.dtype)
    arrays, rows = kernels.arrays(weights), kernels.rows(x, lengths, resets, None, seed, dropout)
    with threads_of_torch():
        if not training:
            return [*kernels.infer(arrays, x, state, rows), x.new_empty(0, dtype=torch.uint8)]
        results, tape = kernels.forward(arrays, x, state, rows)
        return [*results, tensor_of(tape)]


@torch.library.register_fake("rnnkern::forward")
def _forward_shapes(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    training: bool,
    *stack: Any,
) -> list[Tensor]:
    if torch.onnx.is_in_onnx_export():  # what torch.nn has never comes here
        raise NotImplementedError(
            "lengths, resets, reset_after=False: expected none while torch exports to ONNX, for torch.nn has none; "
            "rnnkern.onnx.export(module, path, lengths=True) exports a module"
        )
    sizes = kernels_of(*stack, x.dtype).signature.stack
    steps, batch, _ = x.shape
    shapes = [(steps, batch, sizes.output_size), *sizes.state_shapes(batch)]
    return [*[x.new_empty(shape) for shape in shapes], x.new_empty(int(training), dtype=torch.uint8)]


@torch.library.impl("rnnkern::backward", "CPU")
@torch.no_grad()
def _backward_operator(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    tape: Tensor,
    y: Tensor,
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    need_x: bool,
    need_state: bool,
    need_weights: Sequence[bool],
    *stack: Any,
) -> list[Tensor]:
    """Gradients of x, of the initial state and of the weights; empty tensors where not needed."""
    kernels = kernels_of(*stack, x.dtype)
    known = tape_of(tape, x, y)
    if known is None:
        (y, *_), known = kernels.again(x, state, weights, kernels.rows(x, lengths, resets, None, seed, dropout))
    found = kernels.backward(known, x, (dy, *dfinal), need_x, [need_state] * len(dfinal), need_weights)
    return [x.new_empty(0) if one is None else one for one in found]


@torch.library.register_fake("rnnkern::backward")
def _backward_shapes(
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    seed: Tensor | None,
    dropout: float,
    tape: Tensor,
    y: Tensor,
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    need_x: bool,
    need_state: bool,
    need_weights: Sequence[bool],
    *stack: Any,
) -> list[Tensor]:
    kernels = kernels_of(*stack, x.dtype)
    states = [shape if need_state else 0 for shape in kernels.signature.stack.state_shapes(x.shape[1])]
    slopes = [shape if need else 0 for shape, need in zip(kernels.weight_shapes, need_weights, strict=True)]
    return [x.new_empty(shape) for shape in (x.shape if need_x else 0, *states, *slopes)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, state, weights, lengths, resets, seed, ctx.dropout, _, *ctx.stack = inputs
    ctx.states = len(state)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, lengths, resets, seed, output[-1], output[0], *state, *weights)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    x, lengths, resets, seed, tape, y, *tensors = ctx.saved_tensors
    state, weights = tensors[: ctx.states], tensors[ctx.states :]
    dy, *dfinal, _ = gradients
    need_x, need_states, needs, *_ = ctx.needs_input_grad
    call = (x, state, weights, lengths, resets, seed, ctx.dropout)
    dx, *rest = torch.ops.rnnkern.backward(*call, tape, y, dy, dfinal, need_x, any(need_states), needs, *ctx.stack)
    dstate = [one if need else None for one, need in zip(rest, need_states, strict=False)]
    dweights = [one if need else None for one, need in zip(rest[len(dfinal) :], needs, strict=True)]
    return (dx if need_x else None, dstate, dweights, *[None] * (5 + len(ctx.stack)))


def _differentiate_again(ctx: Any, gradients: Sequence[Tensor | None]) -> Any:
    raise NotImplementedError(
        "rnnkern::backward: a compiled graph, or a call under a TorchDispatchMode, has no second derivatives; "
        "in eager mode, without such a mode, there are"
    )


torch.library.register_autograd("rnnkern::forward", _differentiate, setup_context=_keep)
torch.library.register_autograd("rnnkern::backward", _differentiate_again)
