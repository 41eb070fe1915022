"""ONNX: the operators against onnx's own cases and ONNX Runtime, and whole models."""

from __future__ import annotations

import unittest
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.testing import assert_within_rounding

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

import rnnkern.onnx as bridge  # noqa: E402
from onnx_models import (  # noqa: E402
    OPSETS,
    OUTPUTS,
    B,
    H,
    I,
    T,
    assert_same,
    drawn,
    info,
    model_of,
    node_of,
    run_formulas,
    run_node_model,
    run_runtime,
)
from rnnkern.onnx import operators, standard, writer  # noqa: E402

helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


# What a node of each operator may have beside what all have.
VARIANTS = [("RNN", (), {})]
VARIANTS += [("GRU", (), {"linear_before_reset": switch}) for switch in (0, 1)]
VARIANTS += [("LSTM", names, {"input_forget": switch}) for names in ((), ("P",)) for switch in (0, 1)]


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("direction", standard.DIRECTIONS)
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}], ids=["", "clip"])
@pytest.mark.parametrize("biases", [(), ("B",)], ids=["", "biases"])
@pytest.mark.parametrize("lengths", [(), ("sequence_lens",)], ids=["", "lengths"])
@pytest.mark.parametrize("state", [(), ("initial_h", "initial_c")], ids=["", "state"])
@pytest.mark.parametrize(("operator", "own_inputs", "own_attributes"), VARIANTS)
def test_every_combination_of_inputs_and_attributes_gives_what_onnx_runtime_gives(
    runtime, operator, own_inputs, own_attributes, state, lengths, biases, clip, direction
):
    """Direction, lengths, initial states, biases, peepholes, clip, input_forget and linear_before_reset."""
    names = biases + lengths + state + own_inputs  # those that the operator has
    attributes = {"direction": direction} | clip | own_attributes
    assert_same(runtime, drawn(operator, names, direction), operator, **attributes)


def with_activation(operator, name, slot, direction="bidirectional"):
    """Attributes with one activation in one place of the last direction, alpha and beta as it takes them."""
    default = list(standard.OPERATORS[operator].activations)
    names = default * len(standard.DIRECTIONS[direction])
    names[slot - len(default)] = name
    values = {"alpha": 0.3, "beta": 0.7}
    return {"direction": direction, "activations": names} | {
        f"activation_{key}": [values[key]] for key in standard.ACTIVATIONS[name][1]
    }


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize(
    ("operator", "slot"), [(one.name, at) for one in standard.OPERATORS.values() for at in range(len(one.activations))]
)
def test_every_activation_in_every_place_gives_what_onnx_runtime_gives(runtime, operator, slot):
    """In the reverse direction, beside the default ones in the forward direction."""
    # Small weights: with gates that have no bound, the states of a GRU grow until ONNX Runtime's Softplus gives NaN.
    inputs = drawn(operator, ("B", "initial_h"), "bidirectional", scale=0.2)
    for name in standard.ACTIVATIONS:
        assert_same(runtime, inputs, operator, **with_activation(operator, name, slot))


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
def test_alpha_and_beta_go_in_order_to_the_activations_that_take_them(runtime):
    """Three functions of which two take alpha and one beta, in two directions."""
    attributes = {
        "direction": "bidirectional",
        "activations": ["HardSigmoid", "Tanh", "LeakyRelu", "Sigmoid", "Elu", "ScaledTanh"],
        "activation_alpha": [0.25, 0.1, 0.5, 1.5],
        "activation_beta": [0.4, 0.8],
    }
    assert_same(runtime, drawn("LSTM", ("B", "P"), "bidirectional"), "LSTM", **attributes)


def test_an_rnn_of_one_direction_may_name_the_activations_of_two(runtime):
    """As the default of the schema does; the second is that of no direction."""
    assert_same(runtime, drawn("RNN", direction="reverse"), "RNN", activations=["Relu", "Tanh"], direction="reverse")


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("name", ["LeakyRelu", "HardSigmoid", "Elu"])
def test_default_alpha_and_beta_are_those_of_onnx_runtime(runtime, name):
    """The ones on which it agrees with the standard; its ThresholdedRelu has alpha=0 instead of 1."""
    assert_same(runtime, drawn("RNN"), "RNN", activations=[name])


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
def test_the_default_alpha_of_thresholded_relu_is_that_of_its_operator():
    """1: what is below is 0."""
    values = drawn("RNN")
    Y = run_node_model(values, "RNN", activations=["ThresholdedRelu"])["Y"]
    assert np.array_equal(
        Y, run_node_model(values, "RNN", activations=["ThresholdedRelu"], activation_alpha=[1.0])["Y"]
    )
    assert ((Y == 0) | (Y >= 1)).all()
    assert (Y == 0).any()
    assert (Y >= 1).any()


def test_the_cases_of_onnx_pass():
    """All of its node tests of the three operators, by its own runner and tolerance."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it makes the cases of all operators, some of which overflow
        import onnx.backend.test

        cases = onnx.backend.test.BackendTest(bridge.Backend, __name__)
    result, passed = unittest.TestResult(), []
    result.addSuccess = passed.append  # testsRun counts what is skipped in some versions of Python, and not in 3.12.1
    cases.include("_(rnn|lstm|gru)_.*_cpu").test_suite.run(result)
    assert result.errors == []
    assert result.failures == []
    assert len(passed) >= 12  # as many as onnx 1.17 has


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}], ids=["kernels", "formulas"])
@pytest.mark.parametrize("direction", standard.DIRECTIONS)
@pytest.mark.parametrize("operator", standard.OPERATORS)
def test_layout_1_gives_the_bits_of_layout_0_with_the_batch_first(operator, direction, clip):
    """ONNX Runtime has only layout 0."""
    names = ("B", "sequence_lens", "initial_h", "initial_c", "P")
    values = drawn(operator, names, direction)
    swapped = {
        name: value.swapaxes(0, 1).copy() if name in ("X", "initial_h", "initial_c") else value
        for name, value in values.items()
    }
    expected = run_node_model(values, operator, direction=direction, **clip)
    given = run_node_model(swapped, operator, direction=direction, layout=1, **clip)
    assert np.array_equal(given["Y"], expected["Y"].transpose(2, 0, 1, 3))
    for name in OUTPUTS[operator][1:]:
        assert np.array_equal(given[name], expected[name].swapaxes(0, 1))


@pytest.mark.parametrize("operator", standard.OPERATORS)
def test_every_opset_gives_the_same(subtests, operator):
    """From the first whose operators are these to the newest."""
    values = drawn(operator, ("B", "initial_h"))
    expected = run_node_model(values, operator)
    for opset in OPSETS:
        with subtests.test(f"opset {opset}"):
            for name, result in run_node_model(values, operator, opset=opset).items():
                assert np.array_equal(result, expected[name])


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}], ids=["kernels", "formulas"])
@pytest.mark.parametrize("operator", standard.OPERATORS)
def test_float64_is_computed_in_float64(operator, clip):
    """To within the rounding of float64 where float32 would be far outside."""
    values = drawn(operator, ("B", "P", "initial_h", "initial_c"))
    values = {name: value.astype(np.float64) for name, value in values.items()}
    exact = run_formulas(values, operator, np.longdouble, **clip)
    naive = [run_formulas(values, operator, np.float64, **clip)]
    for name, result in run_node_model(values, operator, **clip).items():
        assert result.dtype == np.float64
        assert_within_rounding(name, result, exact[name], [one[name] for one in naive], operator)


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}], ids=["kernels", "formulas"])
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("operator", standard.OPERATORS)
def test_half_precision_is_float32_rounded_once(operator, kind, clip):
    """Of the same values."""
    half = helper.tensor_dtype_to_np_dtype(getattr(TensorProto, kind.upper()))
    values = {name: value.astype(half) for name, value in drawn(operator, ("B", "P", "initial_h")).items()}
    single = {name: value.astype(np.float32) for name, value in values.items()}
    expected = run_node_model(single, operator, **clip)
    for name, result in run_node_model(values, operator, opset=22, **clip).items():
        assert result.dtype == half
        assert np.array_equal(result, expected[name].astype(half))


@pytest.mark.parametrize(("operator", "cell"), [("RNN", "rnn_tanh"), ("LSTM", "lstm"), ("GRU", "gru_reset_before")])
def test_a_usual_node_gives_the_bits_of_the_layer(operator, cell):
    """The kernels run it, and no warning comes (it would be an error here)."""
    values = drawn(operator, ("B", "sequence_lens"), "bidirectional")
    layer = rk.Recurrent(cell, I, H, bidirectional=True)
    layer.load_state_dict(rk.convert.from_onnx(cell, [{name: values[name] for name in ("W", "R", "B")}]))
    y, state = layer(values["X"], lengths=values["sequence_lens"])
    results = run_node_model(values, operator, direction="bidirectional")
    assert np.array_equal(results["Y"].swapaxes(1, 2).reshape(y.shape), y)
    for name, part in zip(OUTPUTS[operator][1:], state if isinstance(state, tuple) else (state,), strict=True):
        assert np.array_equal(results[name], part)


@pytest.mark.parametrize("operator", standard.OPERATORS)
def test_the_nodes_run_on_the_backend_that_is_chosen(monkeypatch, runtime, operator):
    """By RNNKERN_BACKEND, for all of the package."""
    monkeypatch.setenv("RNNKERN_BACKEND", "reference")
    made = counting(monkeypatch)
    assert_same(runtime, drawn(operator, ("B", "sequence_lens"), "bidirectional"), operator, direction="bidirectional")
    assert [one.backend for one in made] == ["reference"]


def test_a_clip_without_effect_leaves_a_node_on_the_kernels():
    """The largest float32, which is how some say that there is none, gives no warning and no other bits."""
    values = drawn("LSTM")
    expected = run_node_model(values, "LSTM")
    for name, result in run_node_model(values, "LSTM", clip=float(np.finfo(np.float32).max)).items():
        assert np.array_equal(result, expected[name])


@pytest.mark.parametrize(
    ("operator", "attributes", "reason"),
    [
        ("GRU", {"clip": 0.5}, "clip=0.5"),
        ("LSTM", {"input_forget": 1}, "input_forget=1"),
        ("RNN", {"activations": ["Softsign"]}, r"activations=\['Softsign'\]"),
        (
            "RNN",
            {"activations": ["tanh", "Relu"], "direction": "bidirectional"},
            r"activations=\['Tanh', 'Relu'\]",
        ),
    ],
)
def test_what_the_kernels_lack_is_said_once_with_the_node(operator, attributes, reason):
    """When the model is prepared, and not at each run."""
    values = drawn(operator, (), attributes.get("direction", "forward"))
    model = model_of([node_of(operator, values, **attributes)], values, OUTPUTS[operator])
    message = rf"^{operator} node 'rec' runs step by step in NumPy: the kernels have no {reason}$"
    with pytest.warns(UserWarning, match=message) as said:
        prepared = bridge.prepare(model)
    assert len(said) == 1
    prepared.run(values)
    prepared.run(values)


def test_a_sequence_of_length_0_keeps_its_initial_state():
    """As everywhere in this package; ONNX Runtime gives zeros."""
    values = drawn("LSTM", ("sequence_lens", "initial_h", "initial_c"))
    values["sequence_lens"] = np.array([0, T, 0, 1], np.int32)
    results = run_node_model(values, "LSTM")
    for final, initial in (("Y_h", "initial_h"), ("Y_c", "initial_c")):
        assert np.array_equal(results[final][:, [0, 2]], values[initial][:, [0, 2]])
    assert not results["Y"][:, :, [0, 2]].any()


@pytest.mark.filterwarnings("ignore:.*runs step by step in NumPy")
@pytest.mark.parametrize("clip", [{}, {"clip": 0.5}], ids=["kernels", "formulas"])
@pytest.mark.parametrize(("steps", "rows"), [(0, B), (T, 0)])
def test_empty_inputs_give_empty_outputs_of_the_right_shape(steps, rows, clip):
    """No steps: the final state is the initial one."""
    values = drawn("GRU", ("initial_h",), "bidirectional")
    values["X"], values["initial_h"] = values["X"][:steps, :rows], values["initial_h"][:, :rows]
    results = run_node_model(values, "GRU", direction="bidirectional", **clip)
    assert results["Y"].shape == (steps, 2, rows, H)
    assert np.array_equal(results["Y_h"], values["initial_h"])


def test_an_output_that_a_node_leaves_out_is_no_input_of_others():
    """The name "" stands for both: here the bounds of a Clip that has none."""
    values = drawn("LSTM", ("B",))
    first = node_of("LSTM", values, ["", "H"])
    last = helper.make_node("Clip", ["H", "", ""], ["Y_h"])
    (Y_h,) = bridge.prepare(model_of([first, last], values, ["Y_h"])).run(values)
    assert np.array_equal(Y_h, run_node_model(values, "LSTM")["Y_h"])


def test_an_output_that_another_node_leaves_out_is_no_input():
    """The bias is none, and not the indices that nobody asked Unique for."""
    values = drawn("LSTM", ("initial_h",))
    unique = helper.make_node("Unique", ["X"], ["unique", "", "inverse"])
    model = model_of([unique, node_of("LSTM", values)], values, ["Y"])
    assert np.array_equal(bridge.prepare(model).run(values)[0], run_node_model(values, "LSTM")["Y"])


def counting(monkeypatch):
    """A list that grows with each layer that nodes make of their weights."""
    made = []
    frozen = operators.Frozen
    monkeypatch.setattr(operators, "Frozen", lambda *arguments: made.append(frozen(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize("where", ["raw", "float_data", "Constant"])
def test_constant_weights_are_packed_once(monkeypatch, where):
    """Initializers however they are stored, and the results of Constant."""
    made = counting(monkeypatch)
    values = drawn("GRU", ("B",))
    weights = {name: value for name, value in values.items() if name != "X"}
    node = node_of("GRU", values)
    if where == "Constant":
        nodes = [
            helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))
            for name, value in weights.items()
        ]
        model = model_of([*nodes, node], {"X": values["X"]}, ["Y"])
    else:
        model = model_of([node], {"X": values["X"]}, ["Y"], weights)
    if where == "float_data":
        for tensor, value in zip(model.graph.initializer, weights.values(), strict=True):
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, value.shape, value.ravel()))
    prepared = bridge.prepare(model)
    first, second = (prepared.run([values["X"]])[0] for _ in range(2))
    assert len(made) == 1
    assert np.array_equal(first, second)
    assert np.array_equal(first, run_node_model(values, "GRU")["Y"])


@pytest.mark.parametrize("opset", [10, 13, 19, 21, onnx.defs.onnx_opset_version()])
def test_weights_that_the_graph_computes_are_packed_once(monkeypatch, opset):
    """Out of quantized parts, under an If, which all are constants."""
    made = counting(monkeypatch)
    values = drawn("GRU")
    W, zero = np.random.default_rng(1).integers(-127, 127, values["W"].shape).astype(np.int8), np.int8(3)
    scales = np.linspace(0.001, 0.01, 3 * H, dtype=np.float32)
    scale = scales[:, None] if opset >= 13 else scales[0]
    constants = {"q": W, "scale": scales if opset >= 13 else scales[0], "yes": np.array(True), "R": values["R"]}
    constants |= {"zero": np.full(3 * H, zero) if opset >= 13 else zero}
    axis = {"axis": 1} if opset >= 13 else {}
    inner = helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dequantized"], **axis)
    branch = helper.make_graph([inner], "branch", [], [info("dequantized", np.float32, 3)])
    choice = helper.make_node("If", ["yes"], ["W"], then_branch=branch, else_branch=branch)
    constants = {name: np.asarray(value) for name, value in constants.items()}
    model = model_of([choice, node_of("GRU", values)], {"X": values["X"]}, ["Y"], constants, opset=opset)
    prepared = bridge.prepare(model)
    first, second = (prepared.run([values["X"]])[0] for _ in range(2))
    assert len(made) == 1
    assert np.array_equal(first, second)
    expected = run_node_model(values | {"W": (W.astype(np.float32) - 3) * scale}, "GRU")["Y"]
    assert np.array_equal(first, expected)


@pytest.mark.parametrize("cell", writer.CELL_OPERATORS)
def test_the_recurrent_nodes_of_a_model_come_as_layers(cell):
    """With the weights of the layers that were exported; what a layer is not is refused by the name of the node."""
    layer = rk.Recurrent(cell, 3, 4, bidirectional=True, seed=0)
    ((name, again),) = bridge.layers(bridge.to_model(layer)).items()
    assert (name, again.cell) == (f"{cell}_l0", cell)
    x = np.ones((5, 2, 3), np.float32)
    assert np.array_equal(again(x)[0], layer(x)[0])
    values = drawn("GRU")
    constants = {"W": values["W"], "R": values["R"]}
    reverse = model_of([node_of("GRU", values, direction="reverse")], {"X": values["X"]}, ["Y"], constants)
    with pytest.raises(ValueError, match=r"^GRU node 'rec': expected direction='forward' or"):
        bridge.layers(reverse)
    with pytest.raises(ValueError, match=r"^GRU node 'rec': expected constants for W, got 'W'"):
        bridge.layers(model_of([node_of("GRU", values)], values, ["Y"]))
    inputs = ["X", "W", "R"]
    named, other = helper.make_node("GRU", inputs, ["Y"], name="one"), helper.make_node("GRU", inputs, ["one"])
    with pytest.raises(ValueError, match=r"^GRU node 'one': expected a name that no other such node goes by"):
        bridge.layers(model_of([named, other], {"X": values["X"]}, ["Y", "one"], constants))


def test_blocks_of_quantized_values_are_spread():
    """The last of three values has a block of its own; int4 too."""
    dtype = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    node = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"], axis=1, block_size=2)
    (y,) = bridge.run_node(node, [np.array([[-8, 7, 3]]).astype(dtype), np.array([[0.5, 2.0]], np.float32)])
    assert np.array_equal(y, np.array([[-4, 3.5, 6]], np.float32))


def test_an_operator_outside_the_standard_is_refused_by_name_and_domain():
    """Models that ONNX Runtime has optimized have such."""
    node = helper.make_node("DynamicQuantizeLSTM", ["X"], ["Y"], "rec", domain="com.microsoft", hidden_size=H)
    model = model_of([node], {"X": drawn("LSTM")["X"]}, ["Y"])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    with pytest.raises(NotImplementedError, match=r"^DynamicQuantizeLSTM node 'rec': .*'com\.microsoft'; export"):
        bridge.prepare(model)


def test_weights_that_are_inputs_are_read_at_each_run():
    """Written to in place, also through a view that is read-only itself."""
    values = drawn("GRU", ("B",))
    prepared = bridge.prepare(model_of([node_of("GRU", values)], values, ["Y"]))
    locked = values["R"].view()
    locked.flags.writeable = False
    feeds = values | {"R": locked}
    prepared.run(feeds)
    for name in ("W", "R", "B"):
        values[name] *= 2
        assert np.array_equal(prepared.run(feeds)[0], run_node_model(values, "GRU")["Y"])


def test_an_initializer_that_is_an_input_may_be_replaced():
    """By name, for one run."""
    values = drawn("RNN", ("B",))
    constants = {"W": values["W"], "R": values["R"]}
    model = model_of([node_of("RNN", values)], values, ["Y"], constants)
    prepared = bridge.prepare(model)
    expected = run_node_model(values, "RNN")["Y"]
    assert np.array_equal(prepared.run([values["X"], values["B"]])[0], expected)
    other = {"X": values["X"], "B": values["B"], "W": 2 * values["W"]}
    assert np.array_equal(prepared.run(other)[0], run_node_model(values | other, "RNN")["Y"])
    assert np.array_equal(prepared.run([values["X"], values["B"]])[0], expected)


def test_many_threads_may_run_one_model():
    """Each gets what one alone gets."""
    values = drawn("LSTM", ("B",))
    weights = {name: value for name, value in values.items() if name != "X"}
    prepared = bridge.prepare(model_of([node_of("LSTM", values)], {"X": values["X"]}, ["Y"], weights))
    many = [values["X"] * factor for factor in np.arange(16, dtype=np.float32)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda X: prepared.run([X])[0], many))
    for X, result in zip(many, results, strict=True):
        assert np.array_equal(result, run_node_model(values | {"X": X}, "LSTM")["Y"])


def test_nodes_in_a_branch_run_on_the_kernels_and_pack_once(monkeypatch):
    """The weights come from the graph around the branch."""
    made = counting(monkeypatch)
    values = drawn("LSTM", ("B",))
    weights = {name: value for name, value in values.items() if name != "X"}
    branches = {
        way: helper.make_graph([node_of("LSTM", values, [way], direction=way)], way, [], [info(way, np.float32, 4)])
        for way in ("forward", "reverse")
    }
    choice = helper.make_node("If", ["back"], ["Y"], then_branch=branches["reverse"], else_branch=branches["forward"])
    model = model_of([choice], {"X": values["X"], "back": np.array(True)}, ["Y"], weights)
    prepared = bridge.prepare(model)
    for back, direction in ((True, "reverse"), (False, "forward")) * 2:
        (Y,) = prepared.run([values["X"], np.array(back)])
        assert np.array_equal(Y, run_node_model(values, "LSTM", direction=direction)["Y"])
    assert len(made) == 2 + 4  # two nodes, and the model of each comparison


def test_an_if_on_a_constant_gives_way_to_its_branch(monkeypatch):
    """Two of them, whose branches call their own constants alike; what is read no more is dropped."""
    made = counting(monkeypatch)
    values = drawn("GRU")
    R = helper.make_node("Mul", ["twice", "R"], ["recurrence"])
    node = helper.make_node("GRU", ["X", "W", "recurrence"], ["inner"], name="rec", hidden_size=H)
    choices = []
    for way, factor in (("Y", 2), ("other", 3)):
        initializer = [numpy_helper.from_array(np.array(factor, np.float32), "twice")]
        branch = helper.make_graph([R, node], "branch", [], [info("inner", np.float32, 4)], initializer)
        choices.append(helper.make_node("If", ["yes"], [way], then_branch=branch, else_branch=branch))
    total = helper.make_node("Sub", ["Y", "other"], ["difference"])
    constants = {"W": values["W"], "R": values["R"], "yes": np.array(False)}
    model = model_of([*choices, total], {"X": values["X"]}, ["Y", "difference"], constants)
    model.graph.output[1].CopyFrom(info("difference", np.float32, 4))
    prepared = bridge.prepare(model)
    (Y, _), (again, difference) = prepared.run([values["X"]]), prepared.run([values["X"]])
    assert len(made) == 2
    expected, other = (run_node_model(values | {"R": values["R"] * np.float32(by)}, "GRU")["Y"] for by in (2, 3))
    assert np.array_equal(Y, expected)
    assert np.array_equal(again, expected)
    assert np.array_equal(difference, expected - other)
    assert [one.op_type for one in prepared._evaluator.rt_nodes_] == ["GRU", "GRU", "Sub"]
    assert not prepared._evaluator.rt_inits_.keys() & {"R", "yes"}
    assert list(bridge.layers(model)) == ["rec", "other"]  # two nodes of one name


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("condition", ["", "yes"])
def test_a_node_in_a_loop_packs_once_and_its_outputs_are_stacked(monkeypatch, runtime, steps, condition):
    """Along a new axis, of size 0 where the loop does not run."""
    values = drawn("GRU")
    node = helper.make_node("GRU", ["X", "W", "R", "", "", "h"], ["y", "h_n"], name="rec", hidden_size=H)
    kinds = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    kinds += [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "on")]
    shape = values["X"].shape[0], 1, values["X"].shape[1], H
    mean = helper.make_node("ReduceMean", ["y"], ["mean"], keepdims=0)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in (("y", shape), ("mean", ()))]
    body = helper.make_graph(
        [node, mean, helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [*kinds[:2], info("h", np.float32, 3)],
        [kinds[2], info("h_n", np.float32, 3), *ends],
    )
    loop = helper.make_node("Loop", ["steps", condition, "h_0"], ["Y_h", "all", "means"], body=body)
    constants = {"W": values["W"], "R": values["R"], "steps": np.array(steps, np.int64), "yes": np.array(True)}
    feeds = {"X": values["X"], "h_0": np.ones((1, B, H), np.float32)}
    model = model_of([loop], feeds, ["Y_h", "all", "means"], constants)
    model.graph.output[1].CopyFrom(info("all", np.float32, 5))
    model.graph.output[2].CopyFrom(info("means", np.float32, 1))
    made = counting(monkeypatch)
    prepared = bridge.prepare(model)
    ours = prepared.run(feeds) and prepared.run(feeds)
    assert len(made) == min(steps, 1)
    for one, theirs in zip(ours, run_runtime(runtime, model, feeds), strict=True):
        assert one.shape == theirs.shape
    h = feeds["h_0"]
    for y in ours[1]:
        expected = run_node_model(values | {"initial_h": h}, "GRU")
        assert np.array_equal(y, expected["Y"])
        h = expected["Y_h"]
    assert np.array_equal(ours[0], h)


def test_nodes_in_a_function_take_attributes_from_its_call():
    """An attribute of the node may refer to one of the function."""
    values = drawn("LSTM", ("B",))
    node = helper.make_node("LSTM", ["X", "W", "R", "B"], ["Y"], hidden_size=H)
    reference = onnx.AttributeProto(name="direction", ref_attr_name="way", type=onnx.AttributeProto.STRING)
    node.attribute.append(reference)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    function = helper.make_function("local", "Memory", ["X", "W", "R", "B"], ["Y"], [node], opsets[:1], ["way"])
    calls = [
        helper.make_node("Memory", ["X", "W", "R", "B"], [way], domain="local", way=way)
        for way in ("forward", "reverse")
    ]
    total = helper.make_node("Sub", ["forward", "reverse"], ["Y"])
    weights = {name: value for name, value in values.items() if name != "X"}
    graph = model_of([*calls, total], {"X": values["X"]}, ["Y"], weights).graph
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=8)
    forward, reverse = (run_node_model(values, "LSTM", direction=way)["Y"] for way in ("forward", "reverse"))
    assert np.array_equal(bridge.prepare(model).run([values["X"]])[0], forward - reverse)


def test_weights_may_lie_beside_the_file(tmp_path):
    """In the external data of a model given by its path."""
    layer = rk.LSTM(I, 64, seed=0)
    path, X = tmp_path / "model.onnx", drawn("LSTM")["X"]
    onnx.save(bridge.to_model(layer), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size > path.stat().st_size
    assert np.array_equal(bridge.prepare(path).run([X])[0], layer(X)[0])


def test_the_backend_interface(tmp_path):
    """run_node, run_model, bytes, a path, and the device."""
    values = drawn("GRU", ("B", "initial_h"))
    node, expected = node_of("GRU", values), run_node_model(values, "GRU")
    model = model_of([node], values, OUTPUTS["GRU"])
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert issubclass(bridge.Backend, onnx.backend.base.Backend)
    assert isinstance(bridge.prepare(model), onnx.backend.base.BackendRep)
    given = list(values.values())
    for results in (
        bridge.run_model(model, given),
        bridge.run_node(node, given),
        bridge.run_node(node, given, opset_version=7),
        bridge.prepare(path).run(given),
        bridge.prepare(model.SerializeToString()).run(values),
    ):
        assert isinstance(results, tuple)
        for name, result in zip(OUTPUTS["GRU"], results, strict=True):
            assert np.array_equal(result, expected[name])
    assert bridge.supports_device("CPU")
    assert not bridge.supports_device("CUDA")
