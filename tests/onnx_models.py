"""Nodes and models of ONNX for tests, their inputs, and what runs them."""

from __future__ import annotations

import numpy as np
import pytest

from rnnkern.testing import assert_within_rounding

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

import rnnkern.onnx as bridge  # noqa: E402
from rnnkern.onnx import standard  # noqa: E402

helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto

T, B, I, H = 6, 4, 3, 5
OPSETS = [7, 14, 22, onnx.defs.onnx_opset_version()]
GATES = {name: operator.gates for name, operator in standard.OPERATORS.items()}
OUTPUTS = {"RNN": ["Y", "Y_h"], "GRU": ["Y", "Y_h"], "LSTM": ["Y", "Y_h", "Y_c"]}


def drawn(operator, optional=(), direction="forward", layout=0, scale=0.7):
    """Values for the inputs of a node by name: X, W, R and the optional ones asked for; `scale` is of the weights."""
    generator = np.random.default_rng(0)
    D, G = len(standard.DIRECTIONS[direction]), GATES[operator]
    state = (B, D, H) if layout else (D, B, H)
    shapes = {"X": (B, T, I) if layout else (T, B, I), "W": (D, G * H, I), "R": (D, G * H, H), "B": (D, 2 * G * H)}
    shapes |= {"P": (D, 3 * H), "initial_h": state, "initial_c": state}
    values = {name: generator.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name in ("W", "R", "B", "P"):
        values[name] *= np.float32(scale)
    values["sequence_lens"] = np.array([4, T, 1, 3], np.int32)
    return {name: values[name] for name in standard.OPERATORS[operator].inputs if name in {"X", "W", "R", *optional}}


def node_of(operator, names, outputs=None, **attributes):
    """A node whose inputs and outputs are called what the standard calls them."""
    used = [name if name in names else "" for name in standard.OPERATORS[operator].inputs]
    while not used[-1]:
        used.pop()
    outputs = OUTPUTS[operator] if outputs is None else outputs
    return helper.make_node(operator, used, outputs, name="rec", **{"hidden_size": H} | attributes)


def info(name, dtype, rank):
    """The type of a graph's input or output; its sizes are free."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), [None] * rank)


def model_of(nodes, feeds, outputs, constants=(), opset=17, **more):
    """A model with these inputs and constants, each a mapping of names to arrays; Y is an output of rank 4."""
    dtype = feeds["X"].dtype
    graph = helper.make_graph(
        nodes,
        "graph",
        [info(name, value.dtype, value.ndim) for name, value in feeds.items()],
        [info(name, dtype, 4 if name == "Y" else 3) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in dict(constants).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **more)


def run_node_model(values, operator, opset=17, **attributes):
    """Our outputs of a model of one node, weights as constants, by the names of the standard."""
    weights = {name: value for name, value in values.items() if name in ("W", "R", "B", "P")}
    feeds = {name: value for name, value in values.items() if name not in weights}
    names = OUTPUTS[operator]
    model = model_of([node_of(operator, values, **attributes)], feeds, names, weights, opset)
    prepared = bridge.prepare(model)
    first, second = prepared.run(feeds), prepared.run(feeds)
    for one, again in zip(first, second, strict=True):
        assert one.tobytes() == again.tobytes()  # with the weights packed as without
    return dict(zip(names, first, strict=True))


def run_runtime(runtime, model, feeds):
    """The outputs of ONNX Runtime."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def run_formulas(values, operator, dtype, **attributes):
    """The outputs of the formulas of the standard in a dtype."""
    given = {name: value.astype(dtype) for name, value in values.items() if name != "sequence_lens"}
    checked = standard.Attributes.of(operator, attributes)
    zeros = np.zeros((len(checked.reverse), given["X"].shape[1], H), dtype)
    Y, state = standard.run(
        checked,
        *(given.get(name) for name in ("X", "W", "R", "B", "P")),
        values.get("sequence_lens"),
        [given.get(name, zeros) for name in checked.operator.states],
    )
    return dict(zip(OUTPUTS[operator], (Y.swapaxes(1, 2), *state), strict=True))


def moved(values, seed):
    """The values, each real one moved by up to 2 ulp."""
    generator, eps = np.random.default_rng(seed), np.finfo(np.float32).eps
    return {
        name: (value * (1 + generator.uniform(-2, 2, value.shape) * eps)).astype(value.dtype)
        if value.dtype.kind == "f"
        else value
        for name, value in values.items()
    }


def assert_same(runtime, values, operator, **attributes):
    """Our results and those of ONNX Runtime are those of the formulas in float64, by the one rule of accuracy."""
    ours = run_node_model(values, operator, **attributes)
    model = model_of([node_of(operator, values, **attributes)], values, OUTPUTS[operator])
    theirs = dict(zip(OUTPUTS[operator], run_runtime(runtime, model, values), strict=True))
    exact = run_formulas(values, operator, np.float64, **attributes)
    naive = [run_formulas(values, operator, np.float32, **attributes)]
    naive += [run_formulas(moved(values, seed), operator, np.float32, **attributes) for seed in range(3)]
    for name, tested in ours.items():
        for who, result in (("rnnkern", tested), ("ONNX Runtime", theirs[name])):
            assert_within_rounding(name, result, exact[name], [one[name] for one in naive], (who, operator, attributes))
