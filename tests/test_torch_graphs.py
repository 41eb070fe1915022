"""The modules of `rnnkern.torch` in graphs: `torch.compile`, export, traces, `torch.fx`, and shapes without values."""

from __future__ import annotations

import copy
import io

import pytest

from rnnkern.cells import CELLS

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from rnnkern.torch import drop_in  # noqa: E402
from torch_modules import MODULES, Tagger, X, alive, one_or_tuple  # noqa: E402

torch.set_num_threads(1)


CALLS = {
    "plain": ({}, {}),
    "state": ({}, {"hx": True}),
    "ragged": ({"bidirectional": True}, {"lengths": True, "resets": True}),
    "batch_first": ({"batch_first": True, "num_layers": 2}, {"resets": True}),
}


def call_of(cell, name):
    """A module and the arguments of a call."""
    kind, own = MODULES[cell]
    options, wanted = CALLS[name]
    module = kind(3, 4, **own, **options)
    x = torch.rand(5, 2, 3, requires_grad=True)
    if module.batch_first:
        x = x.detach().transpose(0, 1).contiguous().requires_grad_()
    given = {}
    if "hx" in wanted:
        given["hx"] = one_or_tuple([torch.rand(1, 2, 4, requires_grad=True) for _ in CELLS[cell].states])
    if "lengths" in wanted:
        given["lengths"] = torch.tensor([3, 5])
    if "resets" in wanted:
        given["resets"] = torch.rand(x.shape[:-1]) < 0.3
    return module, x, given


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", MODULES)
def test_a_compiled_graph_is_whole_and_gives_the_bits_of_eager_mode(cell, name):
    """Outputs, states and gradients."""
    module, x, given = call_of(cell, name)
    before = alive()

    def run(function):
        y, final = function(x, **given)
        final = final if isinstance(final, tuple) else (final,)
        loss = y.square().sum() + sum(one.sum() for one in final)
        return [y, *final, *torch.autograd.grad(loss, [x, *module.parameters()])]

    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled), run(module), strict=True):
        assert torch.equal(one, other)
    assert alive() == before


@pytest.mark.slow
@pytest.mark.exhaustive  # a compiler of C++ runs some ten seconds; graphs compiled without it are tested above
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # torch's own, of the compiler
def test_a_compiled_training_step_learns_like_an_eager_one(tmp_path, monkeypatch):
    """Inductor and all, with other sizes than at first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch.compiler.reset()
    torch.manual_seed(0)
    models = [torch.nn.ModuleList([rt.LSTM(3, 5), torch.nn.Linear(5, 1)])]
    models.append(copy.deepcopy(models[0]))

    def run(model, x):
        layer, head = model
        return head(layer(x)[0].relu()).square().mean()

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    data = [torch.rand(steps, batch, 3) for steps, batch in ((5, 2), (6, 3), (4, 2))]
    losses = []
    for model, step in zip(models, (run, compiled), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for x in data * 3:
            optimizer.zero_grad()
            loss = step(model, x)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    torch.testing.assert_close(*losses)
    assert losses[0][-1] < losses[0][0]


def test_dropout_in_a_compiled_graph_follows_the_seed_of_torch():
    """Its masks are others than those of eager mode."""
    torch.compiler.reset()
    module, x = rt.GRU(3, 8, num_layers=2, dropout=0.5), torch.rand(5, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def run(seed):
        torch.manual_seed(seed)
        return compiled(x)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_an_exported_program_has_one_node():
    """And runs."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), rt.LSTM(3, 4)).eval()
    x = torch.rand(5, 2, 3)
    program = torch.export.export(model, (x,))
    nodes = [node for node in program.graph.nodes if "rnnkern" in str(node.target)]
    assert len(nodes) == 1
    assert torch.equal(program.module()(x)[0], model(x)[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")
def test_an_exported_program_of_a_replaced_model_has_one_node():
    """As torch.export takes torch's own, which torch.compile does not."""
    model, x = torch.nn.Sequential(torch.nn.LSTM(3, 4)).eval(), torch.rand(5, 2, 3)
    rt.replace(model)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        assert sum("rnnkern" in str(node.target) for node in program.graph.nodes) == 1
        assert torch.equal(program.module()(x)[0], model(x)[0])


def test_an_exporter_to_onnx_that_sees_our_node_is_told_why(monkeypatch):
    """As where torch.onnx.export tries a second time what was refused to it."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with (
        torch._subclasses.fake_tensor.FakeTensorMode(),
        pytest.raises(NotImplementedError, match=r"lengths, .*rnnkern.onnx.export"),
    ):
        rt.GRU(3, 4, reset_after=False)(torch.rand(5, 2, 3), lengths=[5, 2])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", MODULES)
def test_the_operators_pass_opcheck(cell, name):
    """Schema, shapes, autograd registration and the dispatch of compiled graphs."""
    module, x, given = call_of(cell, name)
    hx = given.get("hx", [])
    state = list(hx) if isinstance(hx, tuple | list) else [hx]
    rows = (given.get("lengths"), given.get("resets"))
    x = x.detach().transpose(0, 1).requires_grad_() if module.batch_first else x
    if rows[1] is not None and module.batch_first:
        rows = (rows[0], rows[1].transpose(0, 1))
    arguments = (x, state, module._weights(), *rows, None, 0.0)
    for training in (True, False):
        with torch.set_grad_enabled(training):
            torch.library.opcheck(torch.ops.rnnkern.forward, (*arguments, training, *module._stack("float32")))


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("cell", MODULES)
def test_backward_passes_opcheck(cell, need_x):
    """Also with copies, which `opcheck` makes of everything."""
    kind, own = MODULES[cell]
    module, x = kind(3, 4, num_layers=2, bidirectional=True, **own), torch.rand(5, 2, 3)
    state = [torch.rand(4, 2, 4) for _ in CELLS[cell].states]
    call = (x, state, [one.detach() for one in module._weights()], *[None] * 3, 0.0)
    y, *final, tape = torch.ops.rnnkern.forward(*call, True, *module._stack("float32"))
    given = (*call, tape, y, y, [None, *final[1:]], need_x, need_x, [need_x, True] * 8, *module._stack("float32"))
    torch.library.opcheck(torch.ops.rnnkern.backward, given)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", [rt.RNN, rt.LSTM, rt.GRU])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_trace_holds_the_operations_of_torch(kind, frozen):
    """Right for other lengths and batches; what torch.nn does not have is refused."""
    module, others = kind(3, 4, num_layers=2, batch_first=True).eval(), torch.rand(4, 7, 3)
    if frozen:
        module.freeze()
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.rand(2, 5, 3), check_trace=False)
        torch.testing.assert_close(traced(others)[0], module(others)[0])
        for refused in (
            lambda x: module(x, lengths=[5, 5]),
            rt.GRU(3, 4, reset_after=False),
        ):
            with pytest.raises(NotImplementedError, match=r"lengths|reset_after"):
                torch.jit.trace(refused, torch.rand(2, 5, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_a_lone_module_goes_through_the_torchscript_exporter():
    """Which passes None for every argument that is not given."""
    replaced = torch.nn.GRU(3, 4).eval()
    rt.replace(replaced)
    for module in (rt.GRU(3, 4).eval(), rt.GRU(3, 4).freeze(), replaced):
        file = io.BytesIO()
        torch.onnx.export(module, (torch.rand(5, 2, 3),), file, dynamo=False)
        assert b"GRU" in file.getvalue()


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*quantiz.*:UserWarning:torch"
)
def test_what_cannot_take_our_modules_says_so():
    """Scripting and quantization, instead of an obscure error and of silence."""
    model = Tagger()
    rt.replace(model)
    with pytest.raises(NotImplementedError, match=r"torch.jit.script: .*restore"):
        torch.jit.script(model)
    with pytest.warns(UserWarning, match=r"LSTM is not quantized .*restore"):
        torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM})


def test_torch_fx_sees_a_leaf():
    """By the name of the module."""
    model = Tagger()
    rt.replace(model)
    graph = torch.fx.symbolic_trace(model)
    assert "layers" in [node.target for node in graph.graph.nodes if node.op == "call_module"]
    symbols = torch.randint(11, (4, 9))
    assert torch.equal(graph(symbols), model(symbols))


def test_a_graph_that_breaks_says_so_once(monkeypatch):
    """With the way out, after which it is whole."""
    monkeypatch.setattr(drop_in, "_said", False)
    torch.compiler.reset()
    module, x = torch.nn.GRU(3, 4), torch.rand(5, 2, 3)
    rt.replace(module)
    model = torch.nn.Sequential(torch.nn.Identity(), module)
    compiled = torch.compile(lambda x: model(x)[0].square().sum(), backend="eager")
    with pytest.warns(UserWarning, match=r"torch.compile breaks its graph at GRU.*fullgraph=True"):
        loss = compiled(x)
    expected = model(x)[0].square().sum()
    assert torch.equal(loss, expected)
    assert torch.equal(*[torch.autograd.grad(one, module.weight_hh_l0)[0] for one in (loss, expected)])
    rt.replace(model, fullgraph=True)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x)[0], model(x)[0])


def test_shapes_are_known_without_values():
    """On meta, in FakeTensorMode, and as one operation of a graph that `make_fx` draws."""
    expected, x = rt.LSTM(3, 4)(X)[0], X.to("meta")
    assert rt.LSTM(3, 4, device="meta")(x)[0].shape == expected.shape
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert rt.LSTM(3, 4)(torch.rand(X.shape))[0].shape == expected.shape
    with torch.no_grad():
        graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: rt.LSTM(3, 4)(x)[0])(X)
    assert any("rnnkern" in str(node.target) for node in graph.graph.nodes)
