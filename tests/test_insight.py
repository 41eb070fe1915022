"""Gradients one can see: gates of a tape, the seven numbers, and what initial weights do to them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import reference
from rnnkern.reference import EXACT
from rnnkern.stack import Forward, forward_by_layer
from rnnkern.testing import Problem, assert_within_rounding, inputs, layer_of, naive_arithmetics, state_of

# Gates


def gates_by_hand(problem: Problem, dtype: Any, arithmetic: Any) -> dict[str, Any]:
    """Those of the reference in a dtype and an arithmetic, zero past a row's end."""
    stack, drawn = problem.stack, inputs(problem)
    weights = [{name: one.astype(dtype) for name, one in of_layer.items()} for of_layer in drawn.weights]
    masks = None if drawn.masks is None else [mask.astype(dtype) for mask in drawn.masks]
    y = np.empty((problem.T, problem.B, stack.output_size), dtype)
    state = tuple(one.astype(dtype) for one in drawn.state)
    call = Forward(drawn.x.astype(dtype), state, y, "gates", drawn.lengths, drawn.resets, masks)
    _, saved = forward_by_layer(partial(reference.forward_layer, arithmetic=arithmetic), stack, weights, call)
    gates = {}
    for index, (sizes, (_, kept)) in enumerate(zip(stack.layers, saved, strict=True)):
        suffix = f"_l{index // len(stack.directions)}" + "_reverse" * sizes.reverse
        for v, name in enumerate(stack.cell.saved):
            if name in (*stack.cell.gates, *stack.cell.states):
                values = np.array([one[v] for one in kept.values])
                values[np.arange(problem.T)[:, None] >= drawn.lengths] = 0
                gates[name + suffix] = values
    return gates


def test_a_tape_gives_the_gates(cell, backend):
    """Of all layers and directions, with lengths, resets and dropout: those of the reference, read-only."""
    problem = Problem(cell, num_layers=2, bidirectional=True, lengths=True, resets=True, dropout=0.3)
    drawn, layer = inputs(problem), layer_of(problem, backend)
    _, _, tape = layer.forward(
        drawn.x, state_of(drawn.state), lengths=drawn.lengths, resets=drawn.resets, seed=problem.seed
    )
    exact = gates_by_hand(problem, np.float64, EXACT)
    naive = [gates_by_hand(problem, np.float32, one) for one in naive_arithmetics(problem.seed)]
    assert list(tape.gates) == list(exact)
    for name, gate in tape.gates.items():
        assert gate.dtype == np.float32
        assert not gate.flags.writeable
        assert_within_rounding(name, gate, exact[name], [one[name] for one in naive], problem)


def test_gates_are_those_of_the_forward_or_none():
    """Of unbatched rows and the functional pair too; where they are recomputed, moved parameters are noticed."""
    layer, x = rk.LSTM(3, 4, batch_first=True, seed=0), np.random.default_rng(0).standard_normal((2, 5, 3))
    gates = layer.forward(x)[2].gates
    assert {name: gate.shape for name, gate in gates.items()} == {f"{name}_l0": (5, 2, 4) for name in "ifgoc"}
    _, _, tape = layer.forward(x[0])
    np.testing.assert_array_equal(tape.gates["f_l0"], gates["f_l0"][:, 0], strict=True)
    weights = {"w_ih": layer.parameters["weight_ih_l0"], "w_hh": layer.parameters["weight_hh_l0"]}
    assert list(rk.forward("lstm", x, weights)[2].gates) == list("ifgoc")
    assert rk.GRU(3, 4, num_layers=2).forward(np.ones((5, 0, 3)))[2].gates["z_l1"].shape == (5, 0, 4)
    layer.parameters["bias_ih_l0"][0] += 1
    if layer.backend == "native":
        with pytest.raises(ValueError, match="gates: expected the parameters and x of the forward"):
            _ = tape.gates
