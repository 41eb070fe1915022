"""ONNX: exported layers, and models that PyTorch exports."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, assert_within_rounding, inputs, layer_of, named_states, state_of

onnx = pytest.importorskip("onnx", reason="onnx is not installed")

import rnnkern.onnx as bridge  # noqa: E402
from onnx_models import H, I, run_runtime  # noqa: E402
from rnnkern.onnx import writer  # noqa: E402

helper, numpy_helper, TensorProto = onnx.helper, onnx.numpy_helper, onnx.TensorProto


EXPORTS = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "all": {"num_layers": 2, "bidirectional": True},
    "all_no_bias": {"num_layers": 2, "bidirectional": True, "bias": False},
}


@pytest.mark.parametrize("batch_first", [False, True], ids=["time_first", "batch_first"])
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
@pytest.mark.parametrize("options", EXPORTS)
@pytest.mark.parametrize("cell", writer.CELL_OPERATORS)
def test_an_exported_layer_gives_the_same_in_onnx_runtime(runtime, tmp_path, cell, options, lengths, batch_first):
    """Held to the reference by the one rule; on our backend the bits are those of the layer."""
    problem = Problem(cell, T=7, B=4, I=5, H=9, lengths=lengths, **EXPORTS[options])
    drawn, path = inputs(problem), tmp_path / "layer.onnx"
    layer = rk.Recurrent(cell, 5, 9, problem.num_layers, problem.bias, batch_first, bidirectional=problem.bidirectional)
    layer.load_state_dict(layer_of(problem).parameters)
    bridge.export(layer, path, state=True, lengths=lengths)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    x = np.ascontiguousarray(drawn.x.swapaxes(0, 1)) if batch_first else drawn.x
    feeds = {"x": x} | {f"{name}_0": part for name, part in zip(CELLS[cell].states, drawn.state, strict=True)}
    feeds |= {"lengths": drawn.lengths} if lengths else {}

    y, state = layer(x, state_of(drawn.state), lengths=drawn.lengths)
    expected = {"y": y} | named_states(problem, state)
    for name, result in zip(expected, bridge.prepare(model).run(feeds), strict=True):
        assert np.array_equal(result, expected[name])

    results = dict(zip(expected, run_runtime(runtime, model, feeds), strict=True))
    if batch_first:
        results["y"] = results["y"].swapaxes(0, 1)
    if lengths:
        for name, initial in zip(CELLS[cell].states, drawn.state, strict=True):
            assert not results[name][:, drawn.lengths == 0].any()  # the one difference: zeros, not the initial state
            results[name][:, drawn.lengths == 0] = initial[:, drawn.lengths == 0]
    assert_accurate(problem, results)


@pytest.mark.parametrize("cell", writer.CELL_OPERATORS)
def test_a_model_without_a_state_starts_from_zeros(runtime, cell):
    """Its outputs have the bits of the model with one."""
    problem = Problem(cell, T=7, B=4, I=5, H=9, num_layers=2, bidirectional=True)
    x, layer = inputs(problem).x, layer_of(problem)
    without = run_runtime(runtime, bridge.to_model(layer), {"x": x})
    zeros = {
        f"{name}_0": np.zeros_like(one) for name, one in zip(CELLS[cell].states, inputs(problem).state, strict=True)
    }
    for one, other in zip(
        without, run_runtime(runtime, bridge.to_model(layer, state=True), {"x": x} | zeros), strict=True
    ):
        assert np.array_equal(one, other)


def test_what_the_standard_cannot_say_is_refused_by_name(monkeypatch):
    """And what is no layer, or no flag."""
    with pytest.warns(UserWarning, match="precision: the model computes in float32"):
        rounding = writer.to_model(rk.GRU(3, 4, precision="bfloat16", seed=0))
    assert rounding == writer.to_model(rk.GRU(3, 4, seed=0))
    with pytest.raises(ValueError, match=r"^layer: expected proj_size=0, .*, got LSTM\(3, 4, proj_size=2\)$"):
        bridge.to_model(rk.LSTM(3, 4, proj_size=2))
    with pytest.raises(TypeError, match=r"^layer: expected a layer of rnnkern or a module of PyTorch, got Frozen$"):
        bridge.to_model(rk.GRU(3, 4).freeze())
    monkeypatch.delitem(writer.CELL_OPERATORS, "rnn_sigmoid")
    with pytest.raises(ValueError, match=r"^layer: expected a cell that ONNX has, rnn_tanh, .*, got 'rnn_sigmoid'$"):
        bridge.to_model(rk.RNN(3, 4, nonlinearity="sigmoid"))
    for name in ("state", "lengths"):
        with pytest.raises(TypeError, match=f"^{name}: expected a bool, got int 1$"):
            bridge.to_model(rk.GRU(3, 4), **{name: 1})


MODULES = {
    "RNN-tanh": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "GRU": ("GRU", {}),
}


def network_of(torch, kind, **options):
    """An embedding, a recurrent network with a length for each row, and a linear layer."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(11, I)
            self.recurrent = getattr(torch.nn, kind)(
                I, H, num_layers=2, bidirectional=True, batch_first=True, **options
            )
            self.linear = torch.nn.Linear(2 * H, 3)

        def forward(self, symbols, lengths=None):
            x = self.embedding(symbols)
            if lengths is not None:
                x = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, state = self.recurrent(x)
            if lengths is not None:
                y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True)
            return self.linear(y), state

    torch.manual_seed(0)
    return Network().eval()


def exported(torch, *arguments, **options):
    """What the exporter makes, which itself warns of much."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(*arguments, **options)


def assert_runs_unchanged(runtime, network, model, given, names):
    """Our outputs are as near to PyTorch's in float64 as those in float32 of PyTorch and of ONNX Runtime."""
    feeds = dict(zip(names, [one.numpy() for one in given], strict=True))

    def flat(result):
        y, state = result
        return [one.detach().numpy() for one in (y, *(state if isinstance(state, tuple) else (state,)))]

    single, exact = flat(network(*given)), flat(network.double()(*given))
    theirs = run_runtime(runtime, model, feeds)
    for index, result in enumerate(bridge.prepare(model).run(feeds)):
        assert_within_rounding(f"output {index}", result, exact[index], [single[index], theirs[index]], network)


def test_a_module_of_pytorch_is_exported_as_the_layer_it_is(torch, runtime, tmp_path):
    """Of torch's own too, with what its exporters do not write: lengths."""
    module, x = torch.nn.GRU(3, 4, batch_first=True), np.ones((2, 5, 3), np.float32)
    bridge.export(module, tmp_path / "module.onnx", lengths=True)
    y, h = run_runtime(runtime, onnx.load(tmp_path / "module.onnx"), {"x": x, "lengths": np.array([5, 3])})
    packed = torch.nn.utils.rnn.pack_padded_sequence(torch.from_numpy(x), [5, 3], batch_first=True)
    expected, state = module(packed)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)
    torch.testing.assert_close(torch.from_numpy(y), padded.detach())
    torch.testing.assert_close(torch.from_numpy(h), state.detach())


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("lengths", [False, True], ids=["", "lengths"])
def test_a_model_that_pytorch_exports_runs_unchanged(torch, runtime, tmp_path, module, lengths):
    """By its TorchScript exporter; no warning says that a node is not on the kernels."""
    kind, options = MODULES[module]
    network, path = network_of(torch, kind, **options), tmp_path / "model.onnx"
    given = (torch.arange(28).reshape(4, 7) % 11, *((torch.tensor([7, 3, 1, 5]),) if lengths else ()))
    names = ["symbols", "lengths"][: len(given)]
    exported(torch, network, given, path, input_names=names, dynamo=False)
    assert_runs_unchanged(runtime, network, onnx.load(path), given, names)


@pytest.mark.parametrize(
    "module", [name if name == "GRU" else pytest.param(name, marks=pytest.mark.exhaustive) for name in MODULES]
)
def test_a_model_that_the_newer_exporter_of_pytorch_makes_runs_unchanged(torch, runtime, module):
    """The one through torch.export, which needs onnxscript."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    kind, options = MODULES[module]
    network, given = network_of(torch, kind, **options), (torch.arange(28).reshape(4, 7) % 11,)
    program = exported(torch, network, given, input_names=["symbols"], dynamo=True, verbose=False)
    assert_runs_unchanged(runtime, network, program.model_proto, given, ["symbols"])
