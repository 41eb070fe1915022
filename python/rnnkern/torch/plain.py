"""A call in torch's own operations, step by step: slow, but differentiable in every way that torch knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..reference import Arithmetic
from ..stack import LayerSizes, Stack

__all__ = ["forward"]

MATH = Arithmetic(sigmoid=torch.sigmoid, tanh=torch.tanh, relu=torch.relu)


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
    index = 0
    for layer in range(stack.num_layers):
        if masks is not None and layer > 0:
            x = x * masks[layer - 1]
        if lengths is not None:  # what is past a row's end is not read, NaN neither
            x = torch.where((torch.arange(len(x))[:, None] < lengths)[..., None], x, 0)
        outputs = []
        for _ in stack.directions:
            y, last = _layer(stack.layers[index], weights[index], x, [s[index] for s in states], lengths, resets)
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
) -> tuple[Tensor, Sequence[Tensor]]:
    """One layer-direction; y (T, B, P) and the final state."""
    cell, size, steps = sizes.cell, sizes.hidden_size, len(x)
    math = cell.math(MATH)
    early = (len(cell.gates) - cell.late_gates) * size
    w_hh, b_hh = weights["w_hh"], weights.get("b_hh")

    def recurrent(h: Tensor, rows: slice) -> list[Tensor]:
        return list(linear(h, w_hh[rows], None if b_hh is None else b_hh[rows]).split(size, dim=-1))

    share = linear(x, weights["w_ih"], weights.get("b_ih"))
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
            new[0] = linear(new[0], weights["w_hr"])
        active = None if lengths is None else (t < lengths)[:, None]
        outputs[t] = new[0] if active is None else torch.where(active, new[0], 0)
        state = new if active is None else [torch.where(active, *pair) for pair in zip(new, state, strict=True)]
    return torch.stack(outputs), state
