"""Weights move to other frameworks and back: judged by what those frameworks compute with them."""

from __future__ import annotations

import numpy as np
import pytest

from rnnkern import convert
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, inputs, layer_of

PROBLEMS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "all": {"num_layers": 2, "bidirectional": True},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


@pytest.fixture(params=PROBLEMS)
def options(request):
    """The sizes and options that say how many arrays there are."""
    return PROBLEMS[request.param]


def problem_of(cell, options, **more):
    """A problem whose sizes all differ."""
    return Problem(cell, T=7, B=3, I=4, H=6, **options, **more)


def directions(array, problem):
    """y (T, B, D*H) as (T, B, D, H)."""
    return array.reshape(*array.shape[:2], -1, problem.H)


ONNX_OPERATORS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    "rnn_sigmoid": ("RNN", {"activations": ["Sigmoid"]}),
    "lstm": ("LSTM", {}),
    "lstm_peephole": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {}),
}


def run_onnx(problem, layers):
    """y of a chain of operators in ONNX Runtime."""
    helper = pytest.importorskip("onnx.helper", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    operator, attributes = ONNX_OPERATORS[problem.cell]
    count = 2 if problem.bidirectional else 1
    attributes = (
        attributes | {"activations": attributes["activations"] * count} if "activations" in attributes else attributes
    )
    drawn = inputs(problem)
    y = drawn.x
    for index, layer in enumerate(layers):
        states = [part[index * count : (index + 1) * count] for part in drawn.state]
        given = {"X": y} | layer | dict(zip(["initial_h", "initial_c"], states, strict=False))
        order = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")
        node = helper.make_node(
            operator,
            [name if name in given else "" for name in order[: 8 if operator == "LSTM" else 6]],
            ["Y"],
            hidden_size=problem.H,
            direction="bidirectional" if problem.bidirectional else "forward",
            **attributes,
        )
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info(name, 1, array.shape) for name, array in given.items()],
            [helper.make_tensor_value_info("Y", 1, None)],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
        (output,) = runtime.InferenceSession(model.SerializeToString()).run(None, given)
        y = output.transpose(0, 2, 1, 3).reshape(*y.shape[:2], -1)
    return y


@pytest.mark.parametrize("cell", CELLS)
def test_onnx_runtime_computes_the_same_with_converted_weights(cell, options):
    """Every cell has its operator and attributes."""
    problem = problem_of(cell, options)
    layer = layer_of(problem)
    layers = convert.to_onnx(cell, layer.parameters)
    assert_accurate(problem, {"y": run_onnx(problem, layers)})
    back = convert.from_onnx(cell, layers)
    assert list(back) == list(layer.parameters)
    assert all(np.array_equal(back[name], array) for name, array in layer.parameters.items())
