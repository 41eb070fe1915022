"""Weights move to other frameworks and back: judged by what those frameworks compute with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rnnkern as rk
from rnnkern import convert
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, assert_within_rounding, inputs, layer_of

# Keras's own, from `get_weights` with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "layers": {"num_layers": 3},
    "all": {"num_layers": 2, "bidirectional": True},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


@pytest.fixture(params=OPTIONS)
def options(request):
    """What says how many arrays there are, and of which shapes."""
    return OPTIONS[request.param]


def problem_of(cell, options):
    """A problem whose sizes all differ."""
    return Problem(cell, T=7, B=3, I=4, H=6, **options)


def by_layer(problem):
    """The initial state of each layer: for each direction h, or h and c."""
    count = len(problem.stack.directions)
    one = list(zip(*inputs(problem).state, strict=True))
    return [one[at : at + count] for at in range(0, len(one), count)]


def assert_same(weights, others):
    """Equal names, in order, and equal bits."""
    assert list(weights) == list(others)
    for name, array in weights.items():
        assert np.array_equal(array, others[name]), name


def assert_loads(problem, weights):
    """The weights make a layer that solves the problem."""
    layer = rk.Recurrent(
        problem.cell,
        problem.I,
        problem.H,
        problem.num_layers,
        "bias_ih_l0" in weights,
        bidirectional=problem.bidirectional,
        proj_size=problem.proj_size,
    )
    layer.load_state_dict(weights)
    state = inputs(problem).state
    y, _ = layer(inputs(problem).x, state[0] if len(state) == 1 else state)
    assert_accurate(problem, {"y": y})


# PyTorch

TORCH = {
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    ("cell", "more"), [*((cell, {}) for cell in TORCH), ("lstm", {"proj_size": 3})], ids=[*TORCH, "lstm_projection"]
)
def test_torch_computes_the_same_with_converted_weights(torch, cell, options, more):
    """Inside a model, whose other weights are left alone."""
    problem = problem_of(cell, options | more)
    name, arguments = TORCH[cell]
    rnn = getattr(torch.nn, name)(problem.I, problem.H, **arguments, **options, **more)
    model = torch.nn.ModuleDict({"rnn": rnn, "head": torch.nn.Linear(2, 2)})
    weights = convert.to_torch(cell, layer_of(problem).parameters, prefix="rnn.")
    model.load_state_dict({key: torch.from_numpy(array) for key, array in weights.items()}, strict=False)
    drawn = inputs(problem)
    state = tuple(torch.tensor(part) for part in drawn.state)
    y, _ = rnn(torch.tensor(drawn.x), state[0] if len(state) == 1 else state)
    assert_accurate(problem, {"y": y.detach().numpy()})
    assert_same(convert.from_torch(cell, model.state_dict(), prefix="rnn."), layer_of(problem).parameters)


def test_a_prefix_that_no_name_has_is_refused():
    """With the names there are."""
    weights = rk.GRU(3, 4).parameters
    with pytest.raises(ValueError, match=r"prefix: expected what some of weight_ih_l0, .* begin with, got 'rnn\.'"):
        convert.from_torch("gru", weights, prefix="rnn.")
    with pytest.raises(TypeError, match=r"prefix: expected a str, got NoneType"):
        convert.from_torch("gru", weights, prefix=None)


def test_tensors_of_dtypes_that_numpy_lacks_are_refused(torch):
    """With the name of the weight."""
    weights = torch.nn.GRU(3, 4).to(torch.bfloat16).state_dict()
    with pytest.raises(TypeError, match=r"weights\['weight_ih_l0'\]: .*Tensor"):
        convert.from_torch("gru", weights)


# Keras

KERAS = {
    "rnn_tanh": ("SimpleRNN", {}),
    "rnn_relu": ("SimpleRNN", {"activation": "relu"}),
    "rnn_sigmoid": ("SimpleRNN", {"activation": "sigmoid"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
}


@pytest.fixture(scope="session")
def keras(tmp_path_factory):
    """Keras on PyTorch, with its configuration in a folder of its own; skips where it is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        patch.setenv("KERAS_HOME", str(tmp_path_factory.mktemp("keras")))
        pytest.importorskip("torch", reason="PyTorch, on which Keras runs here, is not installed")
        return pytest.importorskip("keras", reason="Keras is not installed")


def keras_layers(keras, problem, **more):
    """Built layers for a problem."""
    name, arguments = KERAS[problem.cell]
    layers = []
    size = problem.I
    for _ in range(problem.num_layers):
        layer = getattr(keras.layers, name)(
            problem.H, return_sequences=True, use_bias=problem.bias, **arguments, **more
        )
        if problem.bidirectional:
            layer = keras.layers.Bidirectional(layer)
        layer.build((None, None, size))
        layers.append(layer)
        size = problem.stack.output_size
    return layers


@pytest.mark.parametrize("cell", KERAS)
def test_keras_computes_the_same_with_converted_weights(keras, cell, options):
    """Every layer it has, with both of its forms of GRU, from the layer and from its weights."""
    problem = problem_of(cell, options)
    layers = keras_layers(keras, problem)
    y = keras.ops.convert_to_tensor(inputs(problem).x.swapaxes(0, 1))
    for layer, weights, state in zip(
        layers, convert.to_keras(cell, layer_of(problem).parameters), by_layer(problem), strict=True
    ):
        layer.set_weights(weights)
        y = layer(y, initial_state=[keras.ops.convert_to_tensor(part) for one in state for part in one])
    assert_accurate(problem, {"y": keras.ops.convert_to_numpy(y).swapaxes(0, 1)})
    assert_loads(problem, convert.from_keras(cell, layers))
    weights = [layer.get_weights() for layer in layers]
    assert_same(convert.from_keras(cell, weights), convert.from_keras(cell, layers))
    again = convert.to_keras(cell, convert.from_keras(cell, weights))
    assert all(
        np.array_equal(a, b)
        for ours, theirs in zip(again, weights, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


KERAS_OPTIONS = [
    ("lstm", "activation", "relu"),
    ("lstm", "recurrent_activation", "hard_sigmoid"),
    ("gru", "activation", "elu"),
    ("gru", "recurrent_dropout", 0.1),
    ("gru_reset_before", "dropout", 0.1),
    ("rnn_tanh", "go_backwards", True),
    ("rnn_relu", "activation", "tanh"),
]


def test_an_option_of_keras_that_is_not_ours_is_refused_by_name(subtests, keras):
    """Its weights alone convert."""
    for cell, option, value in KERAS_OPTIONS:
        with subtests.test(f"{cell} {option}"):
            name, arguments = KERAS[cell]
            layer = getattr(keras.layers, name)(5, **(arguments | {option: value}))
            layer.build((None, None, 3))
            message = rf"layers\[0\]: .*{option}=.*for the cell '{cell}', got {value!r}"
            with pytest.raises(ValueError, match=message) as error:
                convert.from_keras(cell, [layer])
            assert ("get_weights" in str(error.value)) == ("dropout" in option)
            assert convert.from_keras(cell, [layer.get_weights()])["weight_hh_l0"].shape[1] == 5


@pytest.mark.parametrize(("cell", "order"), [("lstm", "ifgo"), ("gru", "zrn")])
def test_weights_of_the_cudnn_layers_of_keras_2_convert(cell, order):
    """Their kernels are the memory of cuDNN's matrices under another shape, their biases both halves."""
    layer = rk.Recurrent(cell, 3, 4, bidirectional=True)
    weights, parts = layer.state_dict(), []
    for end in ("", "_reverse"):
        gates = [CELLS[cell].gates.index(gate) for gate in order]
        w_ih, w_hh, b_ih, b_hh = (
            weights[f"{name}_l0{end}"].reshape(len(gates), 4, -1)[gates]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        parts += [np.hstack([one.reshape(3, 4) for one in w_ih]), np.hstack(list(w_hh))]
        parts.append(np.concatenate([b_ih.ravel(), b_hh.ravel()]))
        if cell == "lstm":
            weights[f"bias_ih_l0{end}"] += weights[f"bias_hh_l0{end}"]
            weights[f"bias_hh_l0{end}"][...] = 0
    assert_same(convert.from_keras(cell, [parts]), weights)
    other = {"lstm": "rnn_tanh", "gru": "gru_reset_before"}[cell]
    count = len(CELLS[other].gates)
    cudnn = [np.ones((3, count * 4)), np.ones((4, count * 4)), np.ones(2 * count * 4)]
    with pytest.raises(ValueError, match=r"layers\[0\]\[2\]: .*CuDNNLSTM and CuDNNGRU, got the cell"):
        convert.from_keras(other, [cudnn])


def test_a_cell_with_the_gates_of_another_is_refused(monkeypatch):
    """What a framework has is told by the names of cells, and not by those of their gates."""
    for name, like in (("other_gru", "gru"), ("rnn_other", "rnn_tanh")):
        monkeypatch.setitem(CELLS._cells, name, replace(CELLS[like], name=name))
        weights = rk.Recurrent(like, 3, 4).parameters
        for to in (convert.to_onnx, convert.to_keras, convert.to_flax, convert.to_torch):
            with pytest.raises(ValueError, match=rf"cell: expected one that .* has \(.*lstm.*\), got '{name}'"):
                to(name, weights)


def test_a_layer_of_another_class_or_merge_mode_is_refused(keras):
    """Keras's own name for what came."""
    layer = keras.layers.Bidirectional(keras.layers.LSTM(4), merge_mode="sum")
    with pytest.raises(ValueError, match=r"merge_mode='concat'.*got 'sum'"):
        convert.from_keras("lstm", [layer])
    with pytest.raises(ValueError, match=r"class='LSTM'.*got 'GRU'"):
        convert.from_keras("lstm", [keras.layers.GRU(4)])
    with pytest.raises(ValueError, match=r"activation='tanh'.*got a custom one"):
        convert.from_keras("lstm", [keras.layers.LSTM(4, activation=keras.ops.square)])
    with pytest.raises(ValueError, match=r"reset_after=True for the cell 'gru', got False"):
        convert.from_keras("gru", [keras.layers.GRU(4, reset_after=False)])
    with pytest.raises(ValueError, match=r"class='LSTM'.*got 'GRU'"):
        convert.from_keras("lstm", [keras.layers.Bidirectional(keras.layers.GRU(4))])
    with pytest.raises(ValueError, match=r"layers\[0\]: expected kernel, .*got 0 arrays"):
        convert.from_keras("lstm", [keras.layers.LSTM(4)])


# ONNX

ONNX = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"activations": ["Relu"]}),
    "rnn_sigmoid": ("RNN", {"activations": ["Sigmoid"]}),
    "lstm": ("LSTM", {}),
    "lstm_peephole": ("LSTM", {}),
    "gru": ("GRU", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", {}),
}
ONNX_INPUTS = {"RNN": 6, "GRU": 6, "LSTM": 8}


def run_onnx(problem, layers):
    """y of a chain of operators in ONNX Runtime."""
    helper = pytest.importorskip("onnx.helper", reason="onnx is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    operator, attributes = ONNX[problem.cell]
    attributes = {
        key: value * (1 + problem.bidirectional) if isinstance(value, list) else value
        for key, value in attributes.items()
    }
    order = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")[: ONNX_INPUTS[operator]]
    y = inputs(problem).x
    for layer, state in zip(layers, by_layer(problem), strict=True):
        states = [np.stack(parts) for parts in zip(*state, strict=True)]
        given = {"X": y} | layer | dict(zip(["initial_h", "initial_c"], states, strict=False))
        node = helper.make_node(
            operator,
            [name if name in given else "" for name in order],
            ["Y"],
            hidden_size=problem.H,
            direction="bidirectional" if problem.bidirectional else "forward",
            **attributes,
        )
        values = [helper.make_tensor_value_info(name, 1, array.shape) for name, array in given.items()]
        graph = helper.make_graph([node], "layer", values, [helper.make_tensor_value_info("Y", 1, None)])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
        (output,) = runtime.InferenceSession(model.SerializeToString()).run(None, given)
        y = output.transpose(0, 2, 1, 3).reshape(*y.shape[:2], -1)
    return y


@pytest.mark.parametrize("cell", convert._ONNX.cells)
def test_onnx_runtime_computes_the_same_with_converted_weights(cell, options):
    """Every cell that the standard has."""
    problem = problem_of(cell, options)
    layers = convert.to_onnx(cell, layer_of(problem).parameters)
    assert_accurate(problem, {"y": run_onnx(problem, layers)})
    assert_same(convert.from_onnx(cell, layers), layer_of(problem).parameters)


# Flax

FLAX = ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "lstm", "gru")
FLAX_CELLS = [
    *(("linen", name, cell) for cell, name in zip(FLAX, [*["SimpleCell"] * 3, "LSTMCell", "GRUCell"], strict=True)),
    ("linen", "OptimizedLSTMCell", "lstm"),
    *(
        ("nnx", name, cell)
        for cell, name in zip(FLAX, [*["SimpleCell"] * 3, "OptimizedLSTMCell", "GRUCell"], strict=True)
    ),
    ("nnx.LSTMCell", "LSTMCell", "lstm"),
]


def flax_cell(module, name, cell, sizes):
    """A function (params, carry, x_t) -> (carry, y_t), and the parameters of a fresh cell."""
    flax = pytest.importorskip("flax", reason="Flax is not installed")
    activation = {"activation_fn": getattr(flax.linen, cell.removeprefix("rnn_"))} if cell.startswith("rnn_") else {}
    if module == "linen":
        linen = getattr(flax.linen, name)(sizes[1], **activation)
        return lambda params, carry, x_t: linen.apply({"params": params}, carry, x_t)
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    made = getattr(nnx, name)(*sizes, **activation, rngs=nnx.Rngs(0))

    def step(params, carry, x_t):
        nnx.update(made, params)
        return made(carry, x_t)

    return step


def run_flax(module, name, problem, layers):
    """y of a chain of cells, step by step."""
    size, y = problem.I, inputs(problem).x
    for layer, state in zip(layers, by_layer(problem), strict=True):
        step = flax_cell(module, name, problem.cell, (size, problem.H))
        outputs = []
        for reverse, (params, (h, *c)) in enumerate(
            zip(layer if problem.bidirectional else [layer], state, strict=True)
        ):
            carry = (c[0], h) if c else h
            order = range(problem.T)[::-1] if reverse else range(problem.T)
            steps = {}
            for t in order:
                carry, steps[t] = step(params, carry, y[t])
            outputs.append(np.stack([steps[t] for t in range(problem.T)]))
        y, size = np.concatenate(outputs, axis=-1), problem.stack.output_size
    return y


@pytest.mark.parametrize(("module", "name", "cell"), FLAX_CELLS, ids=["-".join(one) for one in FLAX_CELLS])
def test_flax_computes_the_same_with_converted_weights(module, name, cell, options):
    """Cells of linen and nnx, in their three layouts."""
    problem = problem_of(cell, options)
    if (module, cell) == ("nnx", "gru"):
        problem = problem_of(cell, options | {"bias": False})
    layers = convert.to_flax(cell, layer_of(problem).parameters, module)
    assert_accurate(problem, {"y": run_flax(module, name, problem, layers)})
    assert_loads(problem, convert.from_flax(cell, layers))


def test_the_one_bias_of_a_gru_of_nnx_is_read_and_one_more_refused():
    """It computes W_hn h without a bias of its own."""
    nnx = pytest.importorskip("flax.nnx", reason="Flax is not installed")
    problem = Problem("gru", T=7, B=3, I=4, H=6)
    made = nnx.GRUCell(4, 6, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    weights = convert.from_flax("gru", [nnx.state(made, nnx.Param)])
    drawn = inputs(problem)
    carry, steps = drawn.state[0][0], []
    for x_t in drawn.x:
        carry, y_t = made(carry, x_t)
        steps.append(y_t)

    def run(dtype, backend):
        layer = rk.GRU(4, 6, dtype=dtype, backend=backend)
        layer.load_state_dict(weights)
        return layer(drawn.x, drawn.state[0])[0]

    naive = [run("float32", "reference"), run("float32", "auto")]
    assert_within_rounding("y", np.stack(steps), run("float64", "reference"), naive, problem)
    [again] = convert.to_flax("gru", weights, "nnx")
    assert np.array_equal(again["dense_i"]["bias"], made.dense_i.bias[...])
    weights["bias_hh_l0"][-1] = 1
    with pytest.raises(ValueError, match=r"weights: expected zeros in .*bias_hh .*gate n.*Flax nnx"):
        convert.to_flax("gru", weights, "nnx")
    convert.to_flax("gru", weights)


# Errors

REFUSED = [
    ("keras", "lstm_peephole"),
    ("flax", "lstm_peephole"),
    ("flax", "gru_reset_before"),
    ("torch", "lstm_peephole"),
    ("torch", "gru_reset_before"),
    ("torch", "rnn_sigmoid"),
]


def test_a_cell_that_a_framework_does_not_have_is_refused(subtests):
    """Both ways, with those it has."""
    for framework, cell in REFUSED:
        with subtests.test(f"{framework} {cell}"):
            message = rf"cell: expected one that \w+.* has \(.*lstm.*\), got '{cell}'"
            with pytest.raises(ValueError, match=message):
                getattr(convert, f"to_{framework}")(cell, rk.Recurrent(cell, 3, 4).parameters)
            with pytest.raises(ValueError, match=message):
                getattr(convert, f"from_{framework}")(cell, [])


def test_a_projection_is_refused_where_there_is_none(subtests):
    """By the name of its weight."""
    layer = rk.LSTM(3, 4, proj_size=2)
    message = r"weights: expected no projection, which .* does not have, got weight_hr_l0"
    for framework in ("keras", "onnx", "flax"):
        with subtests.test(framework), pytest.raises(ValueError, match=message):
            getattr(convert, f"to_{framework}")("lstm", layer.parameters)


def ones(*shape):
    return np.ones(shape, np.float32)


LSTM_ONNX = {"W": ones(1, 16, 3), "R": ones(1, 16, 4), "B": ones(1, 32)}
WRONG = {
    "no layers": ("onnx", "lstm", [], ValueError, r"layers: expected a list .*empty"),
    "no list": ("onnx", "lstm", LSTM_ONNX, TypeError, r"layers: expected a list .*dict"),
    "no mapping": ("onnx", "lstm", [3], TypeError, r"layers\[0\]: expected a mapping"),
    "missing": ("onnx", "lstm", [{"W": ones(1, 16, 3)}], ValueError, r"layers\[0\]: .*without R"),
    "unknown": ("onnx", "lstm", [LSTM_ONNX | {"P": ones(1, 12)}], ValueError, r"layers\[0\]: .*unknown P"),
    "rows": ("onnx", "gru", [LSTM_ONNX], ValueError, r"layers\[0\]\['W'\]: expected shape \(D, 3\*H, I\), got"),
    "hidden": (
        "onnx",
        "lstm",
        [LSTM_ONNX | {"R": ones(1, 16, 5)}],
        ValueError,
        r"\['R'\]: expected shape \(D, 4\*H, H\) with D=1, H=4, I=3, got \(1, 16, 5\)",
    ),
    "directions": (
        "onnx",
        "lstm",
        [{"W": ones(3, 16, 3), "R": ones(3, 16, 4)}],
        ValueError,
        r"layers\[0\]: expected one or two directions, got 3",
    ),
    "inputs of the second": ("onnx", "lstm", [LSTM_ONNX] * 2, ValueError, r"layers\[1\]\['W'\]: .*with .*I=4.*got"),
    "complex": ("onnx", "lstm", [LSTM_ONNX | {"W": 1j * ones(1, 16, 3)}], TypeError, r"\['W'\]: expected numbers"),
    "no hidden unit": ("onnx", "lstm", [{"W": ones(1, 0, 3), "R": ones(1, 0, 0)}], ValueError, r"\['W'\]: expected"),
    "biases in some": (
        "keras",
        "lstm",
        [[ones(3, 16), ones(4, 16), ones(16)], [ones(4, 16), ones(4, 16)]],
        ValueError,
        r"layers\[1\]: expected biases in all .*got them in some",
    ),
    "directions of the second": (
        "keras",
        "rnn_tanh",
        [[ones(3, 4), ones(4, 4)], [ones(4, 4), ones(4, 4)] * 2],
        ValueError,
        r"layers\[1\]: expected 1 direction.*got 2",
    ),
    "arrays": ("keras", "lstm", [[ones(3, 16)] * 5], ValueError, r"layers\[0\]: .*got 5 arrays"),
    "a number": ("keras", "lstm", [3], TypeError, r"layers\[0\]: expected a Keras layer or a list .*int"),
    "one bias": (
        "keras",
        "gru",
        [[ones(3, 12), ones(4, 12), ones(12)]],
        ValueError,
        r"\[2\]: expected shape \(2, 3\*H\)",
    ),
    "dense": ("flax", "rnn_tanh", [{"i": {"kernel": ones(3, 4)}}], ValueError, r"layers\[0\]: .*without h"),
    "bias": (
        "flax",
        "rnn_tanh",
        [{"i": {"kernel": ones(3, 4)}, "h": {"kernel": ones(4, 4)}}],
        ValueError,
        r"layers\[0\]\['i'\]: .*without bias",
    ),
    "reverse": (
        "flax",
        "rnn_tanh",
        [[{"dense_i": {"kernel": ones(3, 4), "bias": ones(4)}, "dense_h": {"kernel": ones(4, 4)}}, {}]],
        ValueError,
        r"layers\[0\]\[1\]: .*without",
    ),
    "no weights": ("torch", "lstm", {}, ValueError, r"weights: .*without weight_ih_l0"),
}


def test_what_does_not_fit_is_refused_by_name(subtests):
    """The argument, what was expected, what came."""
    for case, (framework, cell, wrong, error, message) in WRONG.items():
        with subtests.test(case), pytest.raises(error, match=message):
            getattr(convert, f"from_{framework}")(cell, wrong)


def test_a_state_dict_that_is_none_is_refused_by_name():
    """On the way out, too."""
    good = dict(rk.LSTM(3, 4, num_layers=2).parameters)
    for name, array, message in [
        ("weight_hh_l1", ones(16, 5), r"weights\['weight_hh_l1'\]: expected shape \(4\*H, H\) with .*H=4"),
        ("weight_ih_l1", ones(16, 3), r"weights\['weight_ih_l1'\]: expected shape \(4\*H, I\) with .*I=4"),
        ("bias_hh_l2", ones(16), r"weights: .*unknown bias_hh_l2"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.to_onnx("lstm", good | {name: array})
    with pytest.raises(TypeError, match=r"weights: expected a mapping"):
        convert.to_keras("lstm", [good])
    with pytest.raises(ValueError, match=r"module: expected one of linen, nnx, nnx\.LSTMCell, got str 'haiku'"):
        convert.to_flax("lstm", good, "haiku")
    with pytest.raises(ValueError, match=r"cell: expected one that Flax nnx\.LSTMCell has \(lstm\), got 'gru'"):
        convert.to_flax("gru", rk.GRU(3, 4).parameters, "nnx.LSTMCell")


# Round trips without a framework


FRAMEWORKS = {
    "torch": TORCH,
    "keras": KERAS,
    "onnx": ONNX,
    "flax": FLAX,
}


@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_any_stack_comes_back_from_every_framework_that_has_it(data):
    """Matrices and peepholes in every bit, the two biases where the framework has two, else their sum."""
    framework = data.draw(st.sampled_from(list(FRAMEWORKS)))
    cell = data.draw(st.sampled_from(list(FRAMEWORKS[framework])))
    inputs_, hidden, layers = (data.draw(st.integers(1, most)) for most in (4, 5, 3))
    bias, bidirectional = data.draw(st.booleans()), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    projection = data.draw(st.integers(0, hidden - 1)) if (framework, cell) == ("torch", "lstm") else 0
    options = {"bidirectional": bidirectional, "proj_size": projection, "dtype": dtype, "backend": "reference"}
    layer = rk.Recurrent(cell, inputs_, hidden, layers, bias, seed=0, **options)
    there, back = getattr(convert, f"to_{framework}"), getattr(convert, f"from_{framework}")
    more = {}
    if framework == "flax":
        modules = (
            ["linen"] if cell == "gru" else ["linen", "nnx", "nnx.LSTMCell"] if cell == "lstm" else ["linen", "nnx"]
        )
        more = {"module": data.draw(st.sampled_from(modules))}
    converted = there(cell, layer.parameters, **more)
    again = back(cell, converted)
    other = rk.Recurrent(cell, inputs_, hidden, layers, bias or framework == "flax", seed=1, **options)
    other.load_state_dict(again)
    for name, array in other.parameters.items():
        assert again[name].dtype == dtype
        assert not any(np.shares_memory(again[name], one) for one in layer.parameters.values())
        if not name.startswith("bias"):
            assert np.array_equal(array, layer.parameters[name])
        elif name.startswith("bias_ih") and bias:
            pair = name.replace("_ih_", "_hh_")
            total = layer.parameters[name] + layer.parameters[pair]
            assert np.array_equal(array + other.parameters[pair], total)
    np.testing.assert_equal(there(cell, again, **more), converted)


# The page


@pytest.mark.usefixtures("torch", "keras")
def test_the_programs_of_the_page_run(tmp_path, monkeypatch):
    """As printed, and what they compare is equal but for rounding."""
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    page = Path(__file__).parent.parent / "docs" / "convert.md"
    of_keras, of_torch = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # as the program sets it: so that it is unset again
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(of_keras, names)
    assert abs(names["head"](names["y"]) - names["model"].predict(names["x"], verbose=0)).max() < 1e-6
    assert_same(names["state"]["rnn"], names["layer"].parameters)
    assert names["state"]["epoch"] == 3
    names = {}
    exec(of_torch, names)
    for name, array in names["layer"].parameters.items():
        assert np.array_equal(names["model"].state_dict()[f"encoder.{name}"].numpy(), array)
