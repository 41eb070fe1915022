"""ONNX: what is refused, with the node, what was expected and what came."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

import rnnkern.onnx as bridge  # noqa: E402
from onnx_models import H, drawn, model_of, node_of  # noqa: E402
from rnnkern.onnx import standard  # noqa: E402

helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


WRONG_ATTRIBUTES = [
    ({"direction": "sideways"}, "direction: expected one of forward, reverse, bidirectional, got 'sideways'"),
    ({"clip": -1.0}, "clip: expected a positive number, got -1"),
    ({"layout": 2}, "layout: expected 0 or 1, got 2"),
    ({"input_forget": 2}, "input_forget: expected 0 or 1, got 2"),
    ({"activations": ["Tanh"]}, "activations: expected 3 for each direction, 3, got ['Tanh']"),
    (
        {"activations": ["Sigmoid", "Gelu", "Tanh"]},
        f"activations: expected names out of {', '.join(standard.ACTIVATIONS)}, got 'Gelu'",
    ),
    (
        {"activations": ["Sigmoid", "Affine", "Tanh"], "activation_alpha": [2.0]},
        "activation_beta: expected a value for Affine, which has no default, got none",
    ),
    (
        {"activations": ["Sigmoid", "Elu", "Tanh"], "activation_alpha": [1.0, 2.0, 3.0]},
        "activation_alpha: expected one value for each of the activations ['Sigmoid', 'Elu', 'Tanh'] that take it, 1, "
        "got 3",
    ),
]


def test_a_wrong_attribute_is_named_with_its_node_when_the_model_is_prepared(subtests):
    """And what was expected, and what came."""
    values = drawn("LSTM")
    for attributes, message in WRONG_ATTRIBUTES:
        with subtests.test(message):
            with pytest.raises(ValueError, match=r"^LSTM node 'rec': ") as error:
                bridge.prepare(model_of([node_of("LSTM", values, **attributes)], values, ["Y"]))
            assert str(error.value) == f"LSTM node 'rec': {message}"


WRONG_INPUTS = [
    ("X", lambda X: X[0], "shape (T, B, I), got float32 of shape (4, 3)"),
    ("X", lambda X: X[..., :0], "shape (T, B, I), got float32 of shape (6, 4, 0)"),
    ("R", lambda R: R[0], "shape (1, 4*H, H), got float32 of shape (20, 5)"),
    ("R", lambda R: R[:, 1:], "shape (1, 20, 5), got float32 of shape (1, 19, 5)"),
    ("R", lambda R: np.concatenate([R, R]), "shape (1, 20, 5), got float32 of shape (2, 20, 5)"),
    ("X", lambda X: X[..., :2], "3 features, as W has, got float32 of shape (6, 4, 2)"),
    ("B", lambda b: b[:, :20], "shape (1, 40), got float32 of shape (1, 20)"),
    ("P", lambda P: P[:, :5], "shape (1, 15), got float32 of shape (1, 5)"),
    ("initial_h", lambda h: h[:, :1], "shape (1, 4, 5), got float32 of shape (1, 1, 5)"),
    ("initial_c", lambda c: c[:, :1], "shape (1, 4, 5), got float32 of shape (1, 1, 5)"),
    ("W", lambda W: W.astype(np.float64), "float32, which X has, got float64 of shape (1, 20, 3)"),
    ("X", lambda X: X.astype(int), "one of float16, bfloat16, float32, float64, got int64 of shape (6, 4, 3)"),
    ("sequence_lens", lambda n: n + 1, "values from 0 to 6, got 2 to 7"),
    ("sequence_lens", lambda n: n - 2, "values from 0 to 6, got -1 to 4"),
    ("sequence_lens", lambda n: n[:1], "shape (4,), got int32 of shape (1,)"),
    ("sequence_lens", lambda n: n / 2, "integers, got float64 of shape (4,)"),
]


def test_a_wrong_input_is_named_with_its_node(subtests):
    """By the names of the standard and of the graph."""
    for name, edit, message in WRONG_INPUTS:
        with subtests.test(f"{name}: {message}"):
            values = drawn("LSTM", ("B", "P", "sequence_lens", "initial_h", "initial_c"))
            node = node_of("LSTM", values)
            values[name] = edit(values[name])
            with pytest.raises(ValueError, match=r"^LSTM node 'rec': ") as error:
                bridge.run_node(node, list(values.values()))
            assert str(error.value) == f"LSTM node 'rec': input {name} ({name!r}): expected {message}"


def test_a_wrong_input_is_named_once_the_weights_are_packed_too(subtests):
    """Right inputs go straight to the packed layer; nothing else passes because they do."""
    values = drawn("LSTM", ("B", "P", "sequence_lens", "initial_h", "initial_c"))
    constants = {key: values.pop(key) for key in ("W", "R", "B", "P")}
    model = model_of([node_of("LSTM", values | constants)], values, ["Y"], constants)
    for name, edit, message in WRONG_INPUTS:
        if name in constants:
            continue
        with subtests.test(f"{name}: {message}"):
            evaluator = bridge.prepare(model)._evaluator
            evaluator.run(None, values)
            with pytest.raises(ValueError, match=r"^LSTM node 'rec': ") as error:
                evaluator.run(None, values | {name: edit(values[name])})
            assert str(error.value) == f"LSTM node 'rec': input {name} ({name!r}): expected {message}"


def test_hidden_size_is_held_to_the_weights():
    """It says nothing that they do not."""
    values = drawn("GRU")
    with pytest.raises(ValueError, match=r"^GRU node 'rec': hidden_size: expected 5, as R has, got 4$"):
        bridge.run_node(node_of("GRU", values, hidden_size=4), list(values.values()))


def test_a_node_without_a_name_is_called_by_its_outputs():
    """Exporters often give none."""
    values = drawn("RNN")
    node = helper.make_node("RNN", ["X", "W", "R"], ["Y"], clip=-1.0, hidden_size=H)
    with pytest.raises(ValueError, match=r"^RNN node with the outputs \['Y'\]: clip: "):
        bridge.prepare(model_of([node], values, ["Y"]))


def test_operators_before_opset_7_are_refused():
    """They had other attributes."""
    values = drawn("RNN")
    with pytest.raises(ValueError, match=r"^RNN node 'rec': expected opset 7 or newer, got 6$"):
        bridge.prepare(model_of([node_of("RNN", values)], values, ["Y"], opset=6))


def test_an_opset_that_onnx_does_not_know_is_refused():
    """Also the standard twice, or by its other name, which the evaluator does not know."""
    values = drawn("RNN")
    newest = onnx.defs.onnx_opset_version()
    for came in ([("", newest + 1)], [("", 17), ("", 16)], [("ai.onnx", 17)]):
        model = model_of([node_of("RNN", values)], values, ["Y"])
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(*one) for one in came)
        with pytest.raises(
            ValueError, match=rf"^model: expected one opset_import of the domain '', of at most {newest}"
        ):
            bridge.prepare(model)


def test_wrong_calls_are_refused():
    """Device, model, options, and inputs by number, name and dtype."""
    values = drawn("RNN")
    model = model_of([node_of("RNN", values)], values, ["Y"])
    prepared = bridge.prepare(model)
    with pytest.raises(ValueError, match=r"^device: expected 'CPU', got str 'CUDA'$"):
        bridge.prepare(model, "CUDA")
    with pytest.raises(TypeError, match=r"^model: expected an onnx.ModelProto, bytes or a path, got GraphProto$"):
        bridge.prepare(model.graph)
    with pytest.raises(TypeError, match=r"^expected no further options, got fast$"):
        bridge.prepare(model, fast=True)
    with pytest.raises(ValueError, match=r"^inputs: expected 3 arrays, X, W, R, got 1$"):
        prepared.run([values["X"]])
    with pytest.raises(ValueError, match=r"^inputs: expected X, W, R, got X, W$"):
        prepared.run({"X": values["X"], "W": values["W"]})
    with pytest.raises(ValueError, match=r"^inputs: expected X, W, R, got X, W, R, Z$"):
        prepared.run(values | {"Z": values["X"]})
    with pytest.raises(TypeError, match=r"^inputs\['X'\]: expected float32, got float64 of shape \(6, 4, 3\)$"):
        prepared.run(values | {"X": values["X"].astype(np.float64)})
    with pytest.raises(TypeError, match=r"^inputs: expected a list of arrays or a mapping, got float32 of shape"):
        prepared.run(values["X"])
