"""A call in torch's own operations, step by step: slow, but differentiable in every way that torch knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..reference import Arithmetic
from ..stack import LayerSizes, Stack

__all__ = ["forward"]

MATH = Arithmetic(sigmoid=torch.sigmoid, tanh=torch.tanh, relu=torch.relu)


class _Elementwise(torch.autograd.Function):
    """Of a tensor alone, with derivatives that need nothing of it."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass


class _Operand(_Elementwise):
    """The nearest bfloat16 numbers; what comes back is the result of a product, and stays as it is."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.bfloat16().to(a.dtype)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return _Result.apply(gradient)

    @staticmethod
    def jvp(_: Any, tangent: Tensor) -> Any:
        return _Operand.apply(tangent)


class _Result(_Elementwise):
    """What a product gives, as it is; what comes back is an operand of two products, and is rounded."""

    @staticmethod
    def forward(a: Tensor) -> Tensor:
        return a.view_as(a)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Any:
        return _Operand.apply(gradient)

    @staticmethod
    def jvp(_: Any, tangent: Tensor) -> Any:
        return tangent.view_as(tangent)


def _rounded_linear(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of rounded operands, those of its derivatives of every order too; a bias is not multiplied."""
    product: Tensor = _Result.apply(linear(_Operand.apply(a), _Operand.apply(weight)))
    return product if bias is None else product + bias


def forward(
    stack: Stack,
    weights: Sequence[Mapping[str, Tensor]],
    x: Tensor,
    state: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    masks: Sequence[Tensor] | None,
) -> list[Tensor]:
    """y (T, B, D*P) and the final state; weights of each layer-direction, x (T, B, I), no state is zeros."""
    states = state or [x.new_zeros(shape) for shape in stack.state_shapes(x.shape[1])]
    final: list[list[Tensor]] = [[] for _ in states]
    product = _rounded_linear if stack.rounds else linear
    index = 0
    for layer in range(stack.num_layers):
        if masks is not None and layer > 0:
            x = x * masks[layer - 1]
        if lengths is not None:  # what is past a row's end is not read, NaN neither
            x = torch.where((torch.arange(len(x))[:, None] < lengths)[..., None], x, 0)
        outputs = []
        for _ in stack.directions:
            initial = [one[index] for one in states]
            y, last = _layer(stack.layers[index], weights[index], x, initial, lengths, resets, product)
            outputs.append(y)
            for all_layers, one in zip(final, last, strict=True):
                all_layers.append(one)
            index += 1
        x = torch.cat(outputs, dim=-1)
    return [x, *[torch.stack(one) for one in final]]


def _layer(
    sizes: LayerSizes,
    weights: Mapping[str, Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    product: Callable[..., Tensor],
) -> tuple[Tensor, Sequence[Tensor]]:
    """One layer-direction; y (T, B, P) and the final state."""
    cell, size, steps = sizes.cell, sizes.hidden_size, len(x)
    math = cell.math(MATH)
    early = (len(cell.gates) - cell.late_gates) * size
    w_hh, b_hh = weights["w_hh"], weights.get("b_hh")

    def recurrent(h: Tensor, rows: slice) -> list[Tensor]:
        return list(product(h, w_hh[rows], None if b_hh is None else b_hh[rows]).split(size, dim=-1))

    share = product(x, weights["w_ih"], weights.get("b_ih"))
    outputs = [x] * steps
    for t in reversed(range(steps)) if sizes.reverse else range(steps):
        cut = None
        if resets is not None and not sizes.reverse:
            cut = resets[t, :, None]
        elif resets is not None and t + 1 < steps:  # the link to the step that it comes from
            cut = (resets[t + 1] if lengths is None else resets[t + 1] & (t + 1 < lengths))[:, None]
        prev = state if cut is None else [torch.where(cut, 0, one) for one in state]
        inputs, products = share[t].split(size, dim=-1), recurrent(prev[0], slice(early))
        saved, new = [x] * len(cell.saved), [x] * len(cell.states)
        if math.prepare is not None:
            scaled = [x]
            math.prepare(inputs, products, prev, scaled, saved)
            products += recurrent(scaled[0], slice(early, None))
        math.forward(inputs, products, (), prev, new, saved)
        if "w_hr" in weights:
            new[0] = product(new[0], weights["w_hr"])
        active = None if lengths is None else (t < lengths)[:, None]
        outputs[t] = new[0] if active is None else torch.where(active, new[0], 0)
        state = new if active is None else [torch.where(active, *pair) for pair in zip(new, state, strict=True)]
    return torch.stack(outputs) if outputs else share[..., : state[0].shape[-1]], state
