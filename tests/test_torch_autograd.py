"""The modules of `rnnkern.torch` under autograd: derivatives of every order, transforms, tapes, saved tensors."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rnnkern.backends import native
from rnnkern.cells import CELLS
from rnnkern.testing import assert_accurate

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from rnnkern.torch.autograd import run_plain  # noqa: E402
from rnnkern.torch.kernels import kernels_of  # noqa: E402
from torch_modules import MODULES, OPTIONS, X, alive, made, one_or_tuple, problem_of, results_of  # noqa: E402

torch.set_num_threads(1)


def small(cell):
    """A float64 module with two layers and directions, and a call of it that has everything."""
    kind, own = MODULES[cell]
    module = kind(2, 3, num_layers=2, bidirectional=True, dtype=torch.float64, **own)
    x = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)
    state = [torch.rand(4, 2, 3, dtype=torch.float64, requires_grad=True) for _ in CELLS[cell].states]
    lengths, resets = torch.tensor([3, 2]), torch.tensor([[0, 0], [1, 0], [0, 1]], dtype=torch.bool)

    def call(x, *tensors):
        weights = dict(zip((name for name, _ in module.named_parameters()), tensors[len(state) :], strict=True))
        hx = one_or_tuple(tensors[: len(state)])
        y, final = torch.func.functional_call(module, weights, (x, hx), {"lengths": lengths, "resets": resets})
        return (y, *final) if isinstance(final, tuple) else (y, final)

    return module, call, (x, *state, *module.parameters())


@pytest.mark.parametrize("cell", MODULES)
def test_first_derivatives_are_those_of_gradcheck(cell):
    """Of everything: input, states and weights."""
    torch.manual_seed(0)
    _, call, arguments = small(cell)
    assert torch.autograd.gradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("cell", MODULES)
def test_second_derivatives_are_those_of_gradgradcheck(cell):
    """Of everything."""
    torch.manual_seed(0)
    _, call, arguments = small(cell)
    assert torch.autograd.gradgradcheck(call, arguments, fast_mode=True)


@pytest.mark.parametrize("cell", MODULES)
def test_second_derivatives_know_dropout_and_projection(cell):
    """The recomputed forward has the masks of the first."""
    projection = {"proj_size": 2} if CELLS[cell].projects else {}
    kind, own = MODULES[cell]
    module = kind(2, 3, num_layers=2, dropout=0.5, dtype=torch.float64, **own, **projection)
    x = torch.rand(3, 2, 2, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(1)
        return module(x)[0]

    assert torch.autograd.gradgradcheck(call, (x,))
    y = call(x).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(call(x).sum(), x)
    torch.testing.assert_close(first.detach(), second)


@pytest.mark.parametrize("kind", [rt.RNN, rt.LSTM])
def test_gradients_to_be_differentiated_are_those_of_one_call(kind):
    """What a state has from the same weights, and weights that are one, count once; autocast rounds no more."""
    module, x = kind(3, 3, num_layers=2), torch.rand(5, 2, 3, requires_grad=True)
    module.weight_ih_l1 = module.weight_ih_l0
    for rounded in (False, True):
        with torch.autocast("cpu", enabled=rounded):
            y, state = module(x)
            loss = (module(y.float(), state)[0].float() ** 2).sum()
            wanted = [x, *module.parameters()]
            expected = torch.autograd.grad(loss, wanted, retain_graph=True)
            found = torch.autograd.grad(loss, wanted, create_graph=True)
        tolerance = {"atol": 2e-2, "rtol": 2e-2} if rounded else {}
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_gradient_that_ends_above_is_none(create_graph):
    """Where nothing comes back to the results, nothing is handed on."""

    class End(torch.autograd.Function):
        @staticmethod
        def forward(_, y):
            return y.clone()

        @staticmethod
        def backward(*_):
            return None

    module = rt.LSTM(3, 4)
    loss = End.apply(module(X)[0]).sum()
    found = torch.autograd.grad(loss, [*module.parameters()], create_graph=create_graph, allow_unused=True)
    assert found == (None,) * len(found)


def test_only_the_gradients_that_are_wanted_come(monkeypatch):
    """Frozen weights have none, an input that needs none neither; layers below those that learn take no part."""
    module, x = rt.LSTM(3, 4, num_layers=3, bidirectional=True, dropout=0.5), torch.rand(5, 2, 3)
    state = [torch.rand(6, 2, 4) for _ in range(2)]
    names = [name for name, _ in module.named_parameters() if "_l2" in name and name != "weight_hh_l2"]
    parameters = [getattr(module, name) for name in names]
    torch.manual_seed(0)
    expected = torch.autograd.grad(module(x, state)[0].sum(), parameters)
    module.requires_grad_(False)
    for one in parameters:
        one.requires_grad_(True)
    asked, original = [], native.backward
    monkeypatch.setattr(native, "backward", lambda *given: asked.append(given[-1].lowest(given[0])) or original(*given))
    torch.manual_seed(0)
    module(x, state)[0].sum().backward()
    assert x.grad is module.weight_hh_l2.grad is module.weight_ih_l0.grad is None
    assert all(torch.equal(one.grad, gradient) for one, gradient in zip(parameters, expected, strict=True))
    assert asked == [2]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
def test_forward_mode_derivatives():
    """Of `torch.autograd.forward_ad`, also without gradients of the other kind."""
    forward_ad = torch.autograd.forward_ad
    module, x, direction = rt.LSTM(3, 4, dtype=torch.float64), X.double(), torch.rand(X.shape, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: module(x)[0], (x,), (direction,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))[0]).tangent
    torch.testing.assert_close(found, expected)
    y = module(x.requires_grad_())[0]
    up, tangent = torch.rand(2, *y.shape, dtype=torch.float64)
    with forward_ad.dual_level():  # of the backward of a graph that was there before
        (dual,) = torch.autograd.grad(y, x, forward_ad.make_dual(up, tangent), retain_graph=True)
        found = forward_ad.unpack_dual(dual).tangent
    torch.testing.assert_close(found, torch.autograd.grad(y, x, tangent)[0])


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_need_no_gradient_cost_none(monkeypatch, compiled):
    """The backend is asked for the others alone; their bits stay."""
    torch.compiler.reset()
    module, x = rt.LSTM(3, 4), torch.rand(5, 2, 3, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), [x, module.bias_hh_l0])
    module.requires_grad_(False).bias_hh_l0.requires_grad_(True)
    asked, original = [], native.backward
    monkeypatch.setattr(native, "backward", lambda *given: asked.append(given[-1].wanted) or original(*given))
    call = torch.compile(module, backend="aot_eager") if compiled else module
    found = torch.autograd.grad(call(x)[0].sum(), [x, module.bias_hh_l0])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert asked == [[["b_hh"]]]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
@pytest.mark.parametrize("transform", ["grad", "vjp", "jacrev", "jacfwd", "hessian", "per_sample"])
def test_torch_func_transforms(transform):
    """All of them work; they run torch's own operations."""
    module = rt.GRU(2, 3, dtype=torch.float64)
    x = torch.rand(4, 2, 2, dtype=torch.float64)
    weights = {name: one.detach() for name, one in module.named_parameters()}

    def loss(x):
        return (module(x)[0] ** 2).sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    if transform == "grad":
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    elif transform == "vjp":
        _, pull = torch.func.vjp(loss, x)
        torch.testing.assert_close(pull(torch.ones((), dtype=x.dtype))[0], expected)
    elif transform == "hessian":
        found = torch.func.hessian(loss)(x)
        torch.testing.assert_close(found, torch.autograd.functional.hessian(loss, x))
    elif transform == "per_sample":

        def loss_of(weights, row):
            return (torch.func.functional_call(module, weights, (row,))[0] ** 2).sum()

        each = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 1))(weights, x)
        loss(x).backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(each[name].sum(0), parameter.grad)
    else:
        torch.testing.assert_close(getattr(torch.func, transform)(loss)(x), expected)


def plainly(module):
    """The call of a module in torch's own operations, in bfloat16."""
    kernels, weights = kernels_of(*module._stack("bfloat16"), torch.float32), list(module.parameters())

    def call(x, hx, lengths, resets):
        y, *final = run_plain(kernels, x, hx if isinstance(hx, tuple) else (hx,), weights, lengths, resets, None)
        return y, tuple(final)

    return call


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
def test_torchs_own_operations_round_the_operands_of_products_as_the_kernels_do():
    """Forward and backward of every cell are those of the reference in bfloat16, and transforms go that way."""
    for cell in MODULES:
        projection = {"proj_size": 3} if CELLS[cell].projects else {}
        problem = replace(problem_of(cell, OPTIONS["all"] | projection, "float32"), precision="bfloat16")
        module = made(problem)
        assert_accurate(problem, results_of(problem, "time_first", plainly(module), module.named_parameters()))
    torch.manual_seed(0)
    module, x = rt.GRU(3, 4).bfloat16(), X.bfloat16()

    def loss(x):
        return module(x)[0].float().square().sum()

    (expected,) = torch.autograd.grad(loss(x.requires_grad_()), x)
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss), in_dims=1, out_dims=1)(x), expected)
    once = torch.func.jacfwd(loss)(x), expected.float()  # forward mode multiplies, and rounds, other numbers
    twice = torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x)
    for found, other in (once, twice):
        torch.testing.assert_close(found, other, atol=0.03, rtol=0.03)


def test_what_a_transform_left_behind_is_taken_as_torch_takes_it():
    """A tensor that outlives the `torch.func.grad` it was made in."""
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.rand(5, 2, 3))
    module = rt.GRU(3, 4)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert torch.equal(module(left[0])[0], module(left[0] + 0)[0])


def test_a_tape_dies_with_its_graph():
    """After backward, and without one."""
    module, x = rt.LSTM(3, 4), torch.rand(5, 2, 3)
    before = alive()
    y, _ = module(x)
    assert alive() == before + 1
    y.sum().backward(retain_graph=True)
    assert alive() == before + 1
    y.sum().backward()
    assert alive() == before  # while y lives
    module(x)
    assert alive() == before


def test_a_second_backward_gives_the_same_gradients():
    """With retain_graph=True; without, torch refuses it."""
    module, x = rt.GRU(3, 4), torch.rand(5, 2, 3)
    loss = module(x)[0].sum()
    first = torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss, list(module.parameters()))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("what", ["x", "y", "state", "weight"])
def test_a_write_before_backward_is_refused(what):
    """As torch does with its own: the gradient would be wrong, or is not known to be right."""
    module, x, state = rt.GRU(3, 4), torch.rand(5, 2, 3), torch.rand(1, 2, 4)
    y, _ = module(x, state)
    with torch.no_grad():
        {"x": x, "y": y, "state": state, "weight": module.weight_ih_l0}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_activation_checkpointing_drops_the_tape():
    """And makes it again in backward, for the same gradients."""
    module, x = rt.LSTM(3, 4, dtype=torch.float64), torch.rand(5, 2, 3, dtype=torch.float64)
    expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    before = alive()
    y = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    assert alive() == before
    found = torch.autograd.grad(y.sum(), list(module.parameters()))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("copied", ["all", "large", "tape"])
def test_copies_of_what_autograd_saves_give_the_same_gradients(copied):
    """As hooks make them that compress, or offload to disk: of all tensors, without the tape, of the tape alone."""
    torch.manual_seed(0)
    module, x = rt.GRU(3, 4, num_layers=2, dropout=0.5), torch.rand(5, 2, 3, requires_grad=True)
    given = {"lengths": [5, 2], "resets": torch.rand(5, 2) < 0.3}
    wanted = [x, *module.parameters()]

    def is_copied(tensor):
        return {"all": True, "large": tensor.numel() > 1, "tape": tensor.numel() == 1}[copied]

    def loss():
        torch.manual_seed(1)
        return module(x, **given)[0].square().sum()

    expected = torch.autograd.grad(loss(), wanted)
    hooks = torch.autograd.graph.saved_tensors_hooks
    with hooks(lambda tensor: tensor.clone() if is_copied(tensor) else tensor, lambda tensor: tensor):
        again = loss()
    found = torch.autograd.grad(again, wanted)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [False, True])
def test_storages_are_resized_after_a_call_and_hold_other_values_then(training):
    """Of input, states and weights, as sharding and offloading do."""
    module, x, h = rt.GRU(3, 4), torch.rand(5, 2, 3), torch.rand(1, 2, 4)
    with torch.set_grad_enabled(training):
        expected = module(x, h)[0]
        kept = {one: one.detach().clone() for one in (x, h, *module.parameters())}
        module(x, h)
    for one in kept:
        size = one.untyped_storage().nbytes()
        one.untyped_storage().resize_(0)
        one.untyped_storage().resize_(size)
    with torch.no_grad():
        for one, values in kept.items():
            one.copy_(values)
        assert torch.equal(module(x, h)[0], expected)


def test_a_storage_of_results_is_resized_in_a_clone():
    """That of a result is memory of NumPy, which torch says."""
    module = rt.GRU(3, 4)
    y, h = module(torch.rand(5, 2, 3))
    (y.sum() + h.sum()).backward()
    for one in (y.detach(), h.detach(), module.weight_ih_l0.grad):
        with pytest.raises(RuntimeError, match=r"resize storage that is not resizable"):
            one.untyped_storage().resize_(0)
        one.clone().untyped_storage().resize_(0)


@pytest.mark.parametrize("kind", [rt.GRU, rt.LSTM])
def test_gradients_come_in_batches(kind):
    """`is_grads_batched`, `jacobian(vectorize=True)` and `torch.vmap` of a backward, as one by one."""
    module, x = kind(3, 4), torch.rand(5, 2, 3, requires_grad=True)
    y = module(x)[0]
    directions = torch.rand(3, *y.shape)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in directions])
    torch.testing.assert_close(
        torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)[0], expected
    )
    torch.testing.assert_close(torch.vmap(lambda one: torch.autograd.grad(y, x, one)[0])(directions), expected)
