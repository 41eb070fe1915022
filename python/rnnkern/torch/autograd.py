"""The derivative of a call: an `autograd.Function` for eager mode, operators for compiled graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from . import plain
from .kernels import Kernels, Tape, kernels_of, tape_of, tensor_of

__all__ = ["Eager", "run_plain"]

Array = NDArray[Any]


def run_plain(
    kernels: Kernels,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Array] | None,
) -> list[Tensor]:
    """What `Kernels.infer` computes, in torch's own operations."""
    by_layer = kernels.by_layer(weights)
    tensors = None if masks is None else [torch.from_numpy(one) for one in masks]
    return plain.forward(kernels.signature.stack, by_layer, x, state, lengths, resets, tensors)


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
        arrays, state, lengths, resets, masks = call
        results, tape = kernels.forward(kernels.pack(arrays, True), x, state, lengths, resets, masks, True)
        ctx.kernels, ctx.states = kernels, len(state)
        ctx.set_materialize_grads(False)
        # The tape refers to the memory of x, y and the state; autograd refuses a backward when they were written to. It
        # is saved as a tensor, so that activation checkpointing drops it with the others.
        ctx.save_for_backward(tensor_of(tape), results[0], x, *tensors)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> tuple[Tensor | None, ...]:
        tape, _, x, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():  # with create_graph=True
            gradients = _again(ctx, tape_of(tape), x, tensors, [dy, *dfinal])
        else:
            need_x, need_state = ctx.needs_input_grad[2], ctx.states > 0
            dx, dstate, dweights = ctx.kernels.backward(tape_of(tape), x, dy, dfinal, need_x, need_state)
            gradients = [dx, *dstate, *dweights]
        return (None, None, *gradients)


def _again(
    ctx: Any, tape: Tape, x: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients that can be differentiated, of the same call in torch's own operations."""
    ends, cuts = [None if one is None else torch.from_numpy(one) for one in (tape.lengths, tape.resets)]
    results = run_plain(ctx.kernels, x, tensors[: ctx.states], tensors[ctx.states :], ends, cuts, tape.masks)
    seen = [(one, d) for one, d in zip(results, gradients, strict=True) if d is not None]
    outputs, directions = zip(*seen, strict=True)
    wanted = [one for one in (x, *tensors) if one.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, directions, create_graph=True, allow_unused=True))
    return [next(found) if one.requires_grad else None for one in (x, *tensors)]


# The operators are one node each of a graph. Only tensors pass from the one to the other: the tape is one, and x, y and
# the state go along so that their memory is not used for something else before.

_STACK = (
    "str cell, int input_size, int hidden_size, int proj_size, int num_layers, bool bidirectional, bool bias, "
    "str backend"
)
torch.library.define(
    "rnnkern::forward",
    "(Tensor x, Tensor[] state, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? seed, float dropout, "
    f"bool training, {_STACK}) -> Tensor[]",
)
torch.library.define(
    "rnnkern::backward",
    f"(Tensor tape, Tensor x, Tensor y, Tensor[] state, Tensor? dy, Tensor?[] dfinal, bool need_x, {_STACK}) "
    "-> Tensor[]",
)


@torch.library.impl("rnnkern::forward", "CPU")
@torch.no_grad()
def _forward(
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
    arrays, masks = kernels.arrays(weights), kernels.masks(x, dropout, seed)
    if not training:
        return [*kernels.infer(arrays, x, state, lengths, resets, masks), x.new_empty(0, dtype=torch.uint8)]
    results, tape = kernels.forward(kernels.pack(arrays, True), x, state, lengths, resets, masks, True)
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
    sizes = kernels_of(*stack, x.dtype).signature.stack
    steps, batch, _ = x.shape
    shapes = [(steps, batch, sizes.output_size), *sizes.state_shapes(batch)]
    return [*[x.new_empty(shape) for shape in shapes], x.new_empty(int(training), dtype=torch.uint8)]


@torch.library.impl("rnnkern::backward", "CPU")
@torch.no_grad()
def _backward(
    tape: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    need_x: bool,
    *stack: Any,
) -> list[Tensor]:
    """Gradients of x (empty unless needed), of the initial state and of the weights."""
    dx, dstate, dweights = kernels_of(*stack, x.dtype).backward(tape_of(tape), x, dy, dfinal, need_x, True)
    return [x.new_empty(0) if dx is None else dx, *dstate, *dweights]


@torch.library.register_fake("rnnkern::backward")
def _backward_shapes(
    tape: Tensor,
    x: Tensor,
    y: Tensor,
    state: Sequence[Tensor],
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    need_x: bool,
    *stack: Any,
) -> list[Tensor]:
    kernels = kernels_of(*stack, x.dtype)
    shapes = [*kernels.signature.stack.state_shapes(x.shape[1]), *kernels.weight_shapes()]
    return [x.new_empty(x.shape if need_x else 0), *[x.new_empty(shape) for shape in shapes]]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, state = inputs[:2]
    ctx.stack = inputs[8:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[-1], x, output[0], *state)


def _differentiate(ctx: Any, gradients: Sequence[Tensor | None]) -> tuple[Any, ...]:
    tape, x, y, *state = ctx.saved_tensors
    dy, *dfinal, _ = gradients
    need_x = ctx.needs_input_grad[0]
    dx, *rest = torch.ops.rnnkern.backward(tape, x, y, state, dy, dfinal, need_x, *ctx.stack)
    return (dx if need_x else None, rest[: len(state)], rest[len(dfinal) :], *[None] * (5 + len(ctx.stack)))


def _differentiate_again(ctx: Any, gradients: Sequence[Tensor | None]) -> Any:
    raise NotImplementedError("rnnkern::backward: a compiled graph has no second derivatives; in eager mode there are")


torch.library.register_autograd("rnnkern::forward", _differentiate, setup_context=_keep)
torch.library.register_autograd("rnnkern::backward", _differentiate_again)
