"""Gradients one can see: gates of a tape, the seven numbers, and what initial weights do to them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import reference
from rnnkern.cells import CELLS
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


def test_a_tape_gives_the_gates(backend):
    """Of all layers and directions, with lengths, resets and dropout: those of the reference, read-only."""
    for cell in ("rnn_tanh", "lstm", "gru", "gru_reset_before"):  # one of each shape of a step
        problem = Problem(cell, num_layers=2, bidirectional=True, lengths=True, resets=True, dropout=0.3)
        drawn, layer = inputs(problem), layer_of(problem, backend)
        options = {"lengths": drawn.lengths, "resets": drawn.resets, "seed": problem.seed}
        exact = gates_by_hand(problem, np.float64, EXACT)
        naive = [gates_by_hand(problem, np.float32, one) for one in naive_arithmetics(problem.seed)]
        for save in ("gates", "checkpoint"):
            gates = layer.forward(drawn.x, state_of(drawn.state), **options, save=save)[2].gates
            assert list(gates) == list(exact)
            for name, gate in gates.items():
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


# The seven numbers

STEP = 1e-30  # of the complex step


def step_of(problem: Problem, weights: dict[str, Any], x: Any, state: list[Any]) -> list[Any]:
    """The states after a step of one row, complex; x (I,)."""
    sizes, y = problem.stack.layers[0], np.empty((1, 1, problem.stack.state_size), np.clongdouble)
    given = tuple(one[None] for one in state)
    new, _ = reference.forward_layer(sizes, weights, x[None, None].astype(y.dtype), given, None, None, y)
    return [one[0] for one in new]


def plain_numbers(problem: Problem, x: Any, length: int, u: Any, q: Any) -> dict[str, Any]:
    """Of one row of a single layer, from complex steps of the forward alone: Jacobians, and the gradient's square."""
    (drawn,) = inputs(problem).weights
    weights = {name: one.astype(np.clongdouble) for name, one in drawn.items()}
    sizes = [shape[-1] for shape in problem.stack.state_shapes(1)]
    state, jacobians = [np.zeros(size, np.clongdouble) for size in sizes], []
    for t in range(length):
        columns = []
        for one in state:
            for j in range(len(one)):
                one[j] += 1j * STEP
                columns.append(np.concatenate(step_of(problem, weights, x[t], state)).imag / STEP)
                one[j] = one[j].real
        jacobians.append(np.stack(columns, 1))
        state = [one.real.astype(one.dtype) for one in step_of(problem, weights, x[t], state)]
    square = 0
    for one in weights.values():
        for index in np.ndindex(one.shape):
            one[index] += 1j * STEP
            moved = [np.zeros(size, np.clongdouble) for size in sizes]
            for t in range(length):
                moved = step_of(problem, weights, x[t], moved)
            square += (u @ moved[0].imag / STEP) ** 2
            one[index] = one[index].real
    return {"jacobians": jacobians, "square": square, "u": u, "q": q, "P": sizes[0]}


def from_jacobians(rows: list[dict[str, Any]], dtype: Any, every: int) -> dict[str, Any]:
    """Flow and growth of all rows in a dtype; made orthonormal every so many steps, by Gram and Schmidt."""
    longest = max(len(row["jacobians"]) for row in rows)
    squares, counts, growths = np.zeros((2, longest), dtype), np.zeros(longest, dtype), []
    for row in rows:
        v = np.zeros(row["q"].shape[1], dtype)
        v[: row["P"]] = row["u"]
        q, grown = row["q"].astype(dtype), np.zeros(len(row["q"]), dtype)
        for lag, jacobian in enumerate(reversed(row["jacobians"])):
            squares[:, lag] += (v**2).sum(), (v[: row["P"]] ** 2).sum()
            counts[lag] += 1
            v, q = v @ jacobian.astype(dtype), q @ jacobian.astype(dtype)
            if (lag + 1) % every and lag + 1 < len(row["jacobians"]):
                continue
            for i in range(len(q)):
                for j in range(i):
                    q[i] -= (q[j] @ q[i]) * q[j]
                norm = np.sqrt((q[i] ** 2).sum())
                grown[i] += np.log(norm)
                q[i] /= norm
        growths.append(grown)
    lengths = np.array([len(row["jacobians"]) for row in rows])
    exponents = -np.sort(-np.mean([grown / n for grown, n in zip(growths, lengths, strict=True)], axis=0))
    apart = np.mean([grown.max() - grown.min() for grown in growths]) / np.log(dtype(10))
    flow, flow_of_h = np.sqrt(squares / counts)
    lags = np.arange(longest, dtype=dtype) - dtype(longest - 1) / 2
    slope = (lags @ np.log(flow)) / (lags @ lags)
    sensitivity = np.sqrt(np.mean([row["square"] for row in rows]))
    numbers = {"flow": flow, "flow_of_h": flow_of_h, "half_life": -np.log(dtype(2)) / slope}
    return numbers | {"exponents": exponents, "conditioning": apart, "sensitivity": dtype(sensitivity)}


def test_the_numbers_are_those_of_plain_derivatives():
    """Of a ragged batch in float64, against complex steps of the forward, element by element."""
    for cell in CELLS:
        problem, lengths, k = Problem(cell, T=6, B=2, I=2, H=4, dtype="float64", seed=3), [4, 6], 2
        layer, x = layer_of(problem), inputs(problem).x
        found = rk.diagnose(layer, x, lengths=lengths, exponents=k, seed=5)["l0"]
        generator = np.random.default_rng(5)
        u = generator.standard_normal((2, 4))
        u /= np.linalg.norm(u, axis=-1, keepdims=True)
        width = sum(shape[-1] for shape in problem.stack.state_shapes(1))
        q = np.linalg.qr(generator.standard_normal((2, width, k)))[0].swapaxes(1, 2)
        rows = [plain_numbers(problem, x[:, b], lengths[b], u[b], q[b]) for b in range(2)]
        exact = from_jacobians(rows, np.longdouble, 1)
        naive = [from_jacobians(rows, np.float64, every) for every in (1, 2, 3)]
        for name, number in exact.items():
            tested = np.asarray(getattr(found, name), np.float64)
            assert_within_rounding(name, tested, number, [one[name] for one in naive], problem)
        assert found.reach == np.flatnonzero(exact["flow"] > 0.01).max()


def test_what_backward_sees_is_what_diagnose_says():
    """The flow of one row by lag, and how many units of each gate are saturated, of all layers and directions."""
    for cell in CELLS:
        problem = Problem(cell, T=9, B=1, H=8, dtype="float64", num_layers=2, bidirectional=True, loss="steps")
        drawn, layer = inputs(problem), layer_of(problem, "reference")
        flow = layer.backward(layer.forward(drawn.x)[2], drawn.dy, diagnostics=True).flow
        for one in rk.diagnose(layer, drawn.x, drawn.dy).layers:
            order = slice(None, None, 1 if "reverse" in one.name else -1)
            squares = [np.square(flow.norms[f"{state}_{one.name}"][order, 0]) for state in CELLS[cell].states]
            np.testing.assert_array_max_ulp(one.flow_of_h, np.sqrt(squares[0]), 2)
            np.testing.assert_array_max_ulp(one.flow, np.sqrt(sum(squares)), 2)
            for gate, share in one.saturation.items():
                assert share == flow.saturation[f"{gate}_{one.name}"].mean()


def test_layers_are_diagnosed_as_if_alone():
    """A stack of both directions: each layer as by itself with the gradient that comes from above."""
    stack = rk.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2, batch_first=True, dtype="float64", seed=0)
    below, above = (
        rk.LSTM(size, 4, bidirectional=True, proj_size=2, batch_first=True, dtype="float64") for size in (3, 4)
    )
    for index, one in enumerate((below, above)):
        weights = {name.replace("_l0", f"_l{index}"): array for name, array in one.parameters.items()}
        for name, array in weights.items():
            array[...] = stack.parameters[name]
    generator = np.random.default_rng(0)
    x, dy, lengths = generator.standard_normal((3, 7, 3)), generator.standard_normal((3, 7, 4)), [7, 0, 5]
    y, _ = below(x, lengths=lengths)
    _, _, tape = above.forward(y, lengths=lengths)
    found = rk.diagnose(stack, x, dy, lengths=lengths)
    assert [one.name for one in found.layers] == ["l0", "l0_reverse", "l1", "l1_reverse"]
    alone = (
        rk.diagnose(below, x, above.backward(tape, dy).x, lengths=lengths),
        rk.diagnose(above, y, dy, lengths=lengths),
    )
    for one in found.layers:
        same = alone[int(one.name[1])][one.name.replace("l1", "l0")]
        np.testing.assert_allclose(one.flow, same.flow)
        assert one.saturation == same.saturation
        np.testing.assert_allclose(one.memory, same.memory)
        assert one.sensitivity == pytest.approx(same.sensitivity)
        assert one.exponents[0] == pytest.approx(same.exponents[0], rel=0.5)


def test_between_resets_are_rows_of_their_own():
    """With the state where it enters a row, in both directions; a reset past a row's end cuts nothing."""
    layer, generator = rk.LSTM(3, 4, 2, bidirectional=True, dtype="float64", seed=0), np.random.default_rng(2)
    x, dy, state = (generator.standard_normal(size) for size in ((7, 2, 3), (7, 2, 8), (2, 4, 2, 4)))
    lengths, resets = np.array([7, 4]), np.zeros((7, 2), bool)
    resets[[0, 2, 5], 0] = resets[[4, 6], 1] = True
    pieces = [(0, 0, 2), (0, 2, 5), (0, 5, 7), (1, 0, 4)]
    alone = {"x": np.zeros((4, 4, 3)), "dy": np.zeros((4, 4, 8)), "state": np.zeros((2, 4, 4, 4))}
    for n, (row, start, end) in enumerate(pieces):
        alone["x"][: end - start, n], alone["dy"][: end - start, n] = x[start:end, row], dy[start:end, row]
    alone["state"][:, 1::2, 2], alone["state"][:, :, 3] = state[:, 1::2, 0], state[:, :, 1]
    expected = rk.diagnose(layer, **alone | {"state": tuple(alone["state"])}, lengths=[2, 3, 2, 4])
    found = rk.diagnose(layer, x, dy, state=tuple(state), lengths=lengths, resets=resets)
    assert str(found).splitlines()[1:] == str(expected).splitlines()[1:]
    for one, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(one.flow, other.flow)
        np.testing.assert_array_equal(one.exponents, other.exponents)
        assert one.sensitivity == other.sensitivity
    same = layer.forward(x, tuple(state), lengths=lengths, resets=resets)[0][2:5, 0]
    np.testing.assert_array_equal(same, layer(alone["x"], tuple(alone["state"]), lengths=[2, 3, 2, 4])[0][:3, 1])


def test_gates_are_counted_as_they_are():
    """Saturation and memory against the gates of a tape; the activations that a cell declares have these ranges."""
    for cell in CELLS:
        layer = rk.Recurrent(cell, 3, 5, dtype="float64", seed=0)
        x, lengths = 20 * np.random.default_rng(0).standard_normal((9, 4, 3)), np.array([9, 2, 0, 5])
        taken = np.arange(9)[:, None] < lengths
        gates = {name: gate[taken] for name, gate in layer.forward(x, lengths=lengths)[2].gates.items()}
        found, declared = rk.diagnose(layer, x, lengths=lengths)["l0"], CELLS[cell]
        for name, activation in zip(declared.gates, declared.activations, strict=True):
            gate = gates[f"{name}_l0"]
            assert (gate.min() < 0) == (activation == "tanh")
            assert (gate.max() > 1) == (activation == "relu")
            low, high = {"sigmoid": (0.1, 0.9), "tanh": (-0.9, 0.9), "relu": (np.nextafter(0, 1), np.inf)}[activation]
            assert found.saturation[name] == np.mean((gate < low) | (gate > high))
        if found.memory is None:
            assert len(declared.gates) == 1
        else:
            mean = gates[f"{declared.keeps or declared.renews}_l0"].mean(0)
            np.testing.assert_array_equal(found.memory, 1 / (1 - (mean if declared.keeps else 1 - mean)))


def test_a_diagnosis_says_what_it_means():
    """Each number with a sentence, for each layer and direction, and what is wrong in an argument."""
    layer = rk.GRU(3, 4, num_layers=2, bidirectional=True, seed=0)
    printed = str(rk.diagnose(layer, np.ones((9, 3))))
    for name in ("half-life", "Lyapunov", "conditioning", "saturation", "memory", "sensitivity", "reach"):
        assert printed.count(f"\n  {name} ") == 4
    assert printed == repr(rk.diagnose(layer, np.ones((9, 3))))
    exploding = rk.RNN(3, 4, nonlinearity="relu", bias=False, seed=0)
    rk.init.identity(exploding, gain=2)
    assert "explodes" in str(rk.diagnose(exploding, np.ones((99, 3))))
    for arguments, options, message in (
        ((None, np.ones((9, 3))), {}, "layer: expected an RNN"),
        ((layer, np.ones((9, 2))), {}, "x: expected shape"),
        ((layer, np.ones((9, 3)), np.ones((9, 3))), {}, "dy: expected float32 of shape"),
        ((layer, np.ones((0, 3))), {}, "x: expected at least one row of at least one step"),
        ((layer, np.ones((9, 3))), {"exponents": 0}, "exponents: expected an integer >= 1"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            rk.diagnose(*arguments, **options)


# Initial weights


def without_weights(cell: str, hidden_size: int = 50) -> rk.Recurrent:
    """A layer whose gates see their biases alone."""
    layer = rk.Recurrent(cell, 2, hidden_size, num_layers=2, bidirectional=True, dtype="float64", seed=0)
    for array in layer.parameters.values():
        array[...] = 0
    return layer


def test_recurrent_weights_set_the_growth_of_gradients():
    """Orthogonal: log(gain) of tanh near zero, whose gradient is gain**lag. The identity: 0 of relu that is active."""
    for cell in CELLS:
        for gain in (1.0, 0.8):
            layer = rk.Recurrent(cell, 2, 6, num_layers=2, bias=False, dtype="float64", seed=0)
            rk.init.orthogonal(layer, gain, seed=1)
            for l in range(2):
                for block in layer.parameters[f"weight_hh_l{l}"].reshape(-1, 6, 6):
                    np.testing.assert_allclose(block.T @ block, gain**2 * np.eye(6), atol=1e-14)
            if cell == "rnn_tanh":
                found = rk.diagnose(layer, np.zeros((30, 2, 2)), exponents=6)["l1"]
                np.testing.assert_allclose(found.exponents, np.log(gain), atol=1e-14)
                np.testing.assert_allclose(found.flow, gain ** np.arange(30.0))
                assert abs(found.conditioning) < 1e-12
    layer = rk.RNN(2, 6, nonlinearity="relu", dtype="float64", seed=0)
    rk.init.identity(layer)
    layer.parameters["weight_ih_l0"][...] = 0.1
    found = rk.diagnose(layer, np.ones((30, 2, 2)))["l0"]
    assert found.half_life == np.inf or abs(found.half_life) > 1e12
    np.testing.assert_allclose(found.exponents, 0, atol=1e-14)
    with pytest.raises(ValueError, match="expected one of the cells rnn_tanh, rnn_relu, got lstm"):
        rk.init.identity(rk.LSTM(2, 6))


def test_biases_of_the_gate_that_keeps_set_the_memory():
    """1 + exp(bias) steps for one bias; from 2 to the longest lag for chrono, which reaches farther; even shares."""
    for cell in CELLS:
        layer = without_weights(cell)
        if not CELLS[cell].keeps and not CELLS[cell].renews:
            for write in (rk.init.forget_bias, partial(rk.init.chrono, longest=9), rk.init.uniform_gate):
                with pytest.raises(
                    ValueError, match="expected one of the cells lstm, lstm_peephole, gru, gru_reset_before"
                ):
                    write(layer)
            continue
        x = np.zeros((9, 1, 2))
        rk.init.forget_bias(layer, 2.0)
        for one in rk.diagnose(layer, x).layers:
            np.testing.assert_allclose(one.memory, 1 + np.exp(2.0))
            if len(CELLS[cell].states) == 1:  # else h, which is not kept, takes part in the first step
                np.testing.assert_allclose(one.exponents, -np.log1p(np.exp(-2.0)))
            if one.name.startswith("l1"):
                np.testing.assert_allclose(one.flow[2:] / one.flow[1:-1], 1 / (1 + np.exp(-2.0)))
        rk.init.chrono(layer, longest=500, seed=0)
        for one in rk.diagnose(layer, x).layers:
            assert 2 <= one.memory.min() < 50
            assert 450 < one.memory.max() <= 500
        gates = layer.forward(x)[2].gates
        if CELLS[cell].admits:
            np.testing.assert_allclose(gates["i_l0"], 1 - gates["f_l0"])
        rk.init.uniform_gate(layer, seed=0)
        for one in rk.diagnose(layer, x).layers:
            shares = np.sort(1 - 1 / one.memory)
            assert shares[0] >= 0.02
            assert shares[-1] <= 0.98
            assert np.abs(shares - np.linspace(0, 1, 50)).max() < 0.23  # Kolmogorov and Smirnov, at 1 %
        with pytest.raises(ValueError, match="layer: expected one with biases"):
            rk.init.forget_bias(rk.Recurrent(cell, 2, 2, bias=False))
    x = np.random.default_rng(0).standard_normal((300, 2, 3))
    for name, cell in CELLS.items():
        if not cell.keeps and not cell.renews:
            continue
        layer = rk.Recurrent(name, 3, 16, seed=0)
        before = rk.diagnose(layer, x)["l0"]
        rk.init.chrono(layer, longest=300, seed=0)
        after = rk.diagnose(layer, x)["l0"]
        assert after.half_life > 3 * before.half_life
        assert after.reach > 3 * before.reach
