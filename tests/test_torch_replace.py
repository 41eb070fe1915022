"""`rnnkern.torch.replace`, `restore` and `to_layer`: modules of torch.nn that become ours, and back."""

from __future__ import annotations

import copy
import pickle
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from torch_modules import MODULES, Tagger  # noqa: E402

torch.set_num_threads(1)


def losses_of(model, optimizer, steps=20):
    """Of learning to name the symbol before the last."""
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        symbols = torch.randint(11, (4, 9), generator=generator)
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(symbols)[:, 1:].flatten(0, 1), symbols[:, :-1].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize("kind", [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU])
def test_a_replaced_model_has_the_loss_curve_it_had(kind):
    """With the optimizer made before, which holds the same parameters."""
    torch.manual_seed(0)
    before = Tagger(kind).double()
    after = copy.deepcopy(before)
    parameters = [weakref.ref(one) for one in after.parameters()]
    first, second = (torch.optim.Adam(one.parameters(), lr=0.01) for one in (before, after))
    report = rt.replace(after)
    assert list(report.swapped) == ["layers"]
    assert not report.left
    assert isinstance(after.layers, getattr(rt, kind.__name__))
    assert isinstance(after.layers, kind)
    assert all(one() is other for one, other in zip(parameters, after.parameters(), strict=True))
    expected, found = losses_of(before, first), losses_of(after, second)
    torch.testing.assert_close(found, expected)
    assert found[-5:].mean() < found[:5].mean()


def test_replace_reaches_shared_nested_and_lone_modules():
    """Every name is reported; a module of two names stays one; the model itself may be one."""
    shared = torch.nn.GRU(3, 3)
    model = torch.nn.ModuleDict(
        {"a": shared, "b": torch.nn.Sequential(shared, torch.nn.RNN(3, 3, nonlinearity="relu"))}
    )
    report = rt.replace(model)
    assert list(report.swapped) == ["a", "b.0", "b.1"]
    assert model["a"] is model["b"][0]
    assert isinstance(model["b"][1], rt.RNN)
    assert str(rt.replace(model)) == "no RNN, LSTM or GRU found"
    lone = torch.nn.LSTM(3, 4)
    assert str(rt.replace(lone)) == "swapped  (the model): LSTM(3, 4)"
    assert isinstance(lone, rt.LSTM)
    rt.replace(lone, fullgraph=True)
    assert type(lone) is rt.LSTM


class Own(torch.nn.LSTM):
    """A subclass."""


def lefts():
    """What is left, and a word of the reason."""
    parametrized = torch.nn.GRU(3, 4)
    torch.nn.utils.parametrizations.weight_norm(parametrized, "weight_hh_l0")
    patched = torch.nn.GRU(3, 4)
    patched.forward = lambda x: x
    return {
        "subclass": (Own(3, 4), "subclass, Own"),
        "parametrized": (parametrized, "parametrized: weight_hh_l0"),
        "half": (torch.nn.LSTM(3, 4, dtype=torch.float16), "weight_ih_l0 is torch.float16 on cpu"),
        "cell": (torch.nn.LSTMCell(3, 4), "it is a cell"),
        "quantized": (torch.ao.nn.quantized.dynamic.GRU(3, 4), "it is quantized"),
        "scripted": (torch.jit.script(torch.nn.LSTM(3, 4)), "compiled by TorchScript"),
        "patched": (patched, "forward"),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own
@pytest.mark.parametrize("name", ["subclass", "parametrized", "half", "cell", "quantized", "scripted", "patched"])
def test_replace_leaves_what_it_cannot_take_and_says_why(name):
    """Untouched."""
    module, word = lefts()[name]
    kind = type(module)
    report = rt.replace(torch.nn.Sequential(module))
    assert not report.swapped
    assert word in report.left["0"]
    assert "left     0: " in str(report)
    assert type(module) is kind


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU])
def test_restore_undoes_replace(kind, fullgraph):
    """Also of frozen, copied and pickled models: same objects and mode, and nothing names rnnkern any more."""
    model = Tagger(kind).eval()
    parameters, symbols = list(model.parameters()), torch.randint(11, (4, 9))
    expected = model(symbols)
    rt.replace(model, fullgraph=fullgraph)
    model.layers.freeze()
    with torch.no_grad():
        torch.testing.assert_close(model(symbols), expected.detach())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert list(rt.restore(one).swapped) == ["layers"]
        assert type(one.layers) is kind
        assert not one.layers.training
        assert b"rnnkern" not in pickle.dumps(one)
        torch.testing.assert_close(one(symbols), expected)
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


class Mine(rt.LSTM):
    """A subclass of ours."""


def test_restore_leaves_what_torch_has_no_form_for():
    """And says why."""
    model = torch.nn.Sequential(rt.GRU(3, 4, reset_after=False), rt.LSTM(4, 4), Mine(4, 4))
    report = rt.restore(model)
    assert list(report.swapped) == ["1"]
    assert "reset_after" in report.left["0"]
    assert "subclass, Mine" in report.left["2"]
    assert type(model[0]) is rt.GRU


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_hooks_stay():
    """On a replaced module: of the caller, and those that an older weight_norm works by."""
    module, x = torch.nn.GRU(3, 4), torch.rand(5, 2, 3)
    torch.nn.utils.weight_norm(module, "weight_hh_l0")
    expected, _ = module(x)
    seen = []
    module.register_forward_hook(lambda *arguments: seen.append(arguments))
    rt.replace(module)
    y, _ = module(x)
    assert len(seen) == 1
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert module.weight_hh_l0_g.grad is not None


def test_replace_wants_a_module():
    """By name."""
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got list"):
        rt.replace([])


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_made_of_a_module_computes_the_same(cell, options, dtype):
    """With the bits of the module, and on the weights that it had."""
    kind, own = MODULES[cell]
    module, x = kind(3, 4, **own, **options, dtype=dtype), torch.rand(5, 2, 3, dtype=dtype)
    layer, (y, _) = rt.to_layer(module), module(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert layer.cell == cell
    assert np.array_equal(layer(x.numpy())[0], y.detach().numpy())


def test_a_layer_is_made_of_torchs_own_modules_and_of_no_others():
    """Other types, dtypes and devices are refused by name."""
    module, x = torch.nn.RNN(3, 4, nonlinearity="relu"), torch.rand(5, 2, 3)
    torch.testing.assert_close(torch.from_numpy(rt.to_layer(module)(x.numpy())[0]), module(x)[0].detach())
    with pytest.raises(TypeError, match=r"module: expected an RNN, LSTM or GRU .*, got Linear"):
        rt.to_layer(torch.nn.Linear(3, 4))
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    torch.testing.assert_close(torch.from_numpy(rt.to_layer(module)(x.numpy())[0]), module(x)[0].detach())
    prune = pytest.importorskip("torch.nn.utils.prune")
    with pytest.raises(NotImplementedError, match="module: expected weight_ih_l0 as a parameter, got one that a hook"):
        rt.to_layer(prune.l1_unstructured(torch.nn.GRU(3, 4), "weight_ih_l0", 0.5))
    for wrong in ({"dtype": torch.float16}, {"device": "meta"}):
        with pytest.raises(NotImplementedError, match=r"module: expected .* got weight_ih_l0 of"):
            rt.to_layer(torch.nn.GRU(3, 4, **wrong))
