"""The modules of `rnnkern.torch`: what they compute, how autograd and `torch.compile` see them, and `replace`."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest

from rnnkern import backends
from rnnkern.cells import CELLS
from rnnkern.testing import Problem, assert_accurate, inputs, named_states

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from rnnkern.torch import drop_in, kernels  # noqa: E402

torch.set_num_threads(1)

pack_sequence, pack_padded = torch.nn.utils.rnn.pack_sequence, torch.nn.utils.rnn.pack_padded_sequence

# How a module is made for each cell that has one.
MODULES = {
    "rnn_tanh": (rt.RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (rt.RNN, {"nonlinearity": "relu"}),
    "lstm": (rt.LSTM, {}),
    "gru": (rt.GRU, {}),
    "gru_reset_before": (rt.GRU, {"reset_after": False}),
}
OURS_ONLY = "gru_reset_before"
TORCH = {rt.RNN: torch.nn.RNN, rt.LSTM: torch.nn.LSTM, rt.GRU: torch.nn.GRU}
COMMON = [cell for cell in MODULES if cell != OURS_ONLY]

OPTIONS = {
    "plain": {},
    "no_bias": {"bias": False},
    "layers": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "lengths": {"lengths": True},
    "resets": {"resets": True},
    "dropout": {"num_layers": 2, "dropout": 1.0},  # the one probability whose masks do not depend on a generator
    "loss_on_steps": {"loss": "steps"},
    "loss_on_final": {"loss": "final"},
    "all": {"num_layers": 2, "bidirectional": True, "lengths": True, "resets": True},
}
PROBLEMS = [(cell, name) for cell in MODULES for name in OPTIONS]
PROJECTED = {"proj_size": 3}


def made(problem, **options):
    """The module of a problem, with its weights."""
    kind, own = MODULES[problem.cell]
    if problem.proj_size:
        options["proj_size"] = problem.proj_size
    module = kind(
        problem.I, problem.H, problem.num_layers, bias=problem.bias, dropout=problem.dropout,
        bidirectional=problem.bidirectional, dtype=getattr(torch, problem.dtype), **own, **options,
    )  # fmt: skip
    arrays = [array for one in inputs(problem).weights for array in one.values()]
    with torch.no_grad():
        for parameter, array in zip(module.parameters(), arrays, strict=True):
            parameter.copy_(torch.tensor(array))
    return module


def one_or_tuple(state):
    """A state as modules take it."""
    return state[0] if len(state) == 1 else tuple(state)


def tensors(problem, layout):
    """x, the state, lengths and resets of a problem in a layout, as tensors; those of floats want their gradient."""
    drawn = inputs(problem)

    def arranged(array):
        array = {"time_first": array, "batch_first": array.swapaxes(0, 1), "unbatched": array[:, 0]}[layout]
        return torch.tensor(array)

    x = arranged(drawn.x).requires_grad_()
    state = [torch.tensor(one[:, 0] if layout == "unbatched" else one).requires_grad_() for one in drawn.state]
    lengths = None if drawn.lengths is None else torch.tensor(drawn.lengths)
    return x, state, lengths, None if drawn.resets is None else arranged(drawn.resets)


def results_of(problem, layout, call, parameters):
    """Everything a forward and a backward of `call(x, hx, lengths=, resets=)` give, by the names of the references."""
    drawn = inputs(problem)
    x, state, lengths, resets = tensors(problem, layout)
    y, final = call(x, one_or_tuple(state), lengths=lengths, resets=resets)
    final = final if isinstance(final, tuple) else (final,)

    def restored(tensor):
        array = tensor.detach().numpy()
        return {"time_first": array, "batch_first": array.swapaxes(0, 1), "unbatched": array[:, None]}[layout]

    def restored_state(parts):
        return tuple(one.detach().numpy()[:, None] if layout == "unbatched" else one.detach().numpy() for one in parts)

    loss = torch.zeros((), dtype=x.dtype)
    if drawn.dy is not None:
        loss = loss + (restored_tensor(y, layout) * torch.tensor(drawn.dy)).sum()
    if drawn.dstate is not None:
        parts = [one.unsqueeze(1) if layout == "unbatched" else one for one in final]
        loss = loss + sum((one * torch.tensor(d)).sum() for one, d in zip(parts, drawn.dstate, strict=True))
    loss.backward()
    return (
        {"y": restored(y), "dx": restored(x.grad)}
        | named_states(problem, restored_state(final))
        | named_states(problem, restored_state([one.grad for one in state]), "d")
        | {f"d{name}": parameter.grad.numpy() for name, parameter in parameters}
    )


def restored_tensor(tensor, layout):
    """A tensor in a layout, time-major."""
    return {"time_first": tensor, "batch_first": tensor.transpose(0, 1), "unbatched": tensor.unsqueeze(1)}[layout]


def problem_of(cell, options, dtype="float64", layout="time_first"):
    """A problem of one row where the layout has no rows."""
    options = {name: one for name, one in options.items() if name != "lengths" or layout != "unbatched"}
    return Problem(cell, T=7, B=1 if layout == "unbatched" else 4, I=5, H=9, dtype=dtype, **options)


# What they compute.


@pytest.mark.parametrize("layout", ["time_first", "batch_first", "unbatched"])
@pytest.mark.parametrize(
    ("cell", "options"),
    [(cell, OPTIONS[name]) for cell, name in PROBLEMS] + [("lstm", OPTIONS[name] | PROJECTED) for name in OPTIONS],
    ids=["-".join(one) for one in PROBLEMS] + [f"lstm-projection_{name}" for name in OPTIONS],
)
def test_outputs_states_and_gradients_are_accurate(dtype, layout, cell, options):
    """In every layout and with every option, by the one rule."""
    problem = problem_of(cell, options, dtype, layout)
    module = made(problem, batch_first=layout == "batch_first")
    assert_accurate(problem, results_of(problem, layout, module, module.named_parameters()))


def test_every_backend_is_at_hand(backend):
    """By name, as of the layers."""
    problem = problem_of("gru", OPTIONS["all"])
    module = made(problem, backend=backend)
    assert_accurate(problem, results_of(problem, "time_first", module, module.named_parameters()))


@pytest.mark.parametrize("cell", MODULES)
def test_inference_gives_the_bits_of_training(cell):
    """Without gradients, with fresh weights and with frozen ones."""
    problem = problem_of(cell, OPTIONS["all"])
    module = made(problem)
    x, state, lengths, resets = tensors(problem, "time_first")
    y, final = module(x, one_or_tuple(state), lengths=lengths, resets=resets)
    with torch.no_grad():
        for _ in range(2):
            again, final_again = module(x, one_or_tuple(state), lengths=lengths, resets=resets)
            assert torch.equal(again, y)
            for one, other in zip(final_again, final, strict=True):
                assert torch.equal(one, other)
            module.freeze()


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3)])
@pytest.mark.parametrize("cell", MODULES)
def test_no_steps_or_no_rows_are_fine(cell, shape):
    """The state passes through, and its gradient."""
    kind, own = MODULES[cell]
    module = kind(3, 4, **own)
    x = torch.zeros(shape, requires_grad=True)
    state = [torch.rand(1, shape[1], 4, requires_grad=True) for _ in CELLS[cell].states]
    y, final = module(x, one_or_tuple(state))
    final = final if isinstance(final, tuple) else (final,)
    assert y.shape == (*shape[:2], 4)
    (y.sum() + sum((2 * one).sum() for one in final)).backward()
    for one, last in zip(state, final, strict=True):
        assert torch.equal(one, last)
        assert torch.equal(one.grad, torch.full_like(one, 2))
    assert x.grad.shape == shape
    assert all(not parameter.grad.any() for parameter in module.parameters())


def rows_of(lengths):
    return [torch.rand(length, 3, dtype=torch.float64, requires_grad=True) for length in lengths]


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("lengths", [[5, 4, 4, 1], [2, 5, 1, 4, 5]])
@pytest.mark.parametrize("cell", COMMON)
def test_a_packed_sequence_comes_back_as_torch_packs_it(cell, lengths, given_state):
    """Sorted by the caller or by torch; with every tensor of it, the states and the gradients."""
    kind, own = MODULES[cell]
    options = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
    theirs, ours = TORCH[kind](3, 4, **own, **options), kind(3, 4, **own, **options)
    ours.load_state_dict(theirs.state_dict())
    sorted_ = lengths == sorted(lengths, reverse=True)
    rows = rows_of(lengths)
    states = [torch.rand(4, len(rows), 4, dtype=torch.float64) for _ in CELLS[cell].states]

    def run(module):
        packed = pack_sequence(rows, enforce_sorted=sorted_)
        leaves = [one.clone().requires_grad_() for one in states]
        y, final = module(packed, one_or_tuple(leaves) if given_state else None)
        final = final if isinstance(final, tuple) else (final,)
        loss = (y.data * torch.arange(y.data.numel()).view_as(y.data)).sum() + sum((one**2).sum() for one in final)
        wanted = [*rows, *module.parameters(), *(leaves if given_state else [])]
        return y, final, torch.autograd.grad(loss, wanted)

    (y, *ours_rest), (expected, *theirs_rest) = run(ours), run(theirs)
    assert isinstance(y, torch.nn.utils.rnn.PackedSequence)
    for one, other in zip(y[1:], expected[1:], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    torch.testing.assert_close([y.data, *ours_rest], [expected.data, *theirs_rest])


def test_a_negated_view_is_read_with_its_sign():
    """The imaginary part of a conjugate shares its memory, in which the sign is the other one; of one, contiguous."""
    module, x = rt.GRU(1, 4), torch.complex(torch.ones(1, 1, 1), torch.ones(1, 1, 1)).conj().imag
    assert x.is_neg()
    assert x.is_contiguous()
    assert torch.equal(module(x)[0], module(torch.tensor([[[-1.0]]]))[0])


@pytest.mark.parametrize("cell", COMMON)
def test_the_constructor_is_that_of_torch(cell):
    """The same arguments give the same parameters in name, order and shape, and the same seed the values."""
    kind, own = MODULES[cell]
    middle = tuple(own.values())
    arguments = (3, 5, 2, *middle, False, True, 0.5, True, *([2] if kind is rt.LSTM else []))
    made = []
    for one in (kind, TORCH[kind]):
        torch.manual_seed(0)
        made.append(one(*arguments, device="cpu", dtype=torch.float64))
    ours, theirs = (module.state_dict() for module in made)
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    assert repr(made[0]).replace(", nonlinearity=relu", "") == repr(made[1])


# Dropout.


def test_dropout_follows_the_seed_of_torch_and_the_mode():
    """torch.manual_seed makes it reproducible; evaluation has none."""
    module = rt.GRU(3, 8, num_layers=2, dropout=0.5)
    x = torch.rand(5, 2, 3)

    def run(seed):
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    with torch.no_grad():
        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))
    module.eval()
    assert torch.equal(run(0), run(1))


# Weights.


@pytest.mark.parametrize("training", [False, True])
def test_a_write_through_data_is_seen_by_the_next_call(training):
    """It changes neither the version of a tensor nor its address."""
    module, x = rt.LSTM(3, 4), torch.rand(5, 2, 3)
    with torch.set_grad_enabled(training):
        before = module(x)[0]
        module.weight_hh_l0.data.add_(1)
        expected = copy.deepcopy(module)(x)[0]
        assert not torch.equal(module(x)[0], before)
        assert torch.equal(module(x)[0], expected)


MOVES = {
    "to other memory": lambda weight: setattr(weight, "data", weight.data + 1),
    "within its memory": lambda weight: setattr(weight, "data", weight.data.t()),
    "into shared memory": lambda weight: weight.share_memory_().data.add_(1),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_moved_is_found(training, move):
    """By the next call, and what is written to it by the one after."""
    module, x = rt.RNN(4, 4), torch.rand(5, 2, 4)
    with torch.set_grad_enabled(training):
        before = module(x)[0]
        move(module.weight_hh_l0)
        for _ in range(2):
            expected = copy.deepcopy(module)(x)[0]
            assert not torch.equal(module(x)[0], before)
            assert torch.equal(module(x)[0], expected)
            module.weight_hh_l0.data.add_(1)


UNFREEZING = {
    "unfreeze": lambda module: module.unfreeze(),
    "train": lambda module: module.train(),
    "load_state_dict": lambda module: module.load_state_dict(module.state_dict()),
    "to": lambda module: module.to(torch.float32),
    "freeze": lambda module: module.freeze(),
}


@pytest.mark.parametrize("end", UNFREEZING.values(), ids=UNFREEZING)
def test_frozen_weights_stay_until_told(end):
    """A snapshot for calls without gradients."""
    module, x = rt.GRU(3, 4), torch.rand(5, 2, 3)
    assert module.freeze() is module
    assert not module.training
    before = module(x)[0]
    assert not before.requires_grad
    with torch.no_grad():
        module.weight_hh_l0.add_(1)
        assert torch.equal(module(x)[0], before)
        end(module)
        assert not torch.equal(module(x)[0], before)


def test_a_frozen_module_refuses_a_gradient():
    """Instead of losing it."""
    module = rt.GRU(3, 4).freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        module(torch.rand(5, 2, 3, requires_grad=True))


def test_weights_are_packed_once_while_frozen(monkeypatch):
    """That is what it is for."""
    backend = backends.pick()
    packs = []
    for name in ("pack", "run"):
        original = getattr(backend, name)
        monkeypatch.setattr(backend, name, lambda *given, original=original: packs.append(1) or original(*given))
    module, x = rt.GRU(3, 4).freeze(), torch.rand(5, 2, 3)
    for _ in range(3):
        module(x)
    assert len(packs) == 1
    module.unfreeze()
    module(x)
    assert len(packs) == 2


def test_contiguous_tensors_are_not_copied(monkeypatch):
    """The backend reads and writes the memory that the tensors have."""
    backend = backends.pick()
    seen = []
    run = backend.run

    def watched(stack, weights, call):
        seen.append([array.ctypes.data for one in weights for array in one.values()])
        seen.append((call.x.ctypes.data, [one.ctypes.data for one in call.state], call.y.ctypes.data))
        return run(stack, weights, call)

    monkeypatch.setattr(backend, "run", watched)
    module, x, state = rt.LSTM(3, 4), torch.rand(5, 2, 3), (torch.rand(1, 2, 4), torch.rand(1, 2, 4))
    y, _ = module(x, state)
    assert seen[0] == [parameter.data_ptr() for parameter in module.parameters()]
    assert seen[1] == (x.data_ptr(), [one.data_ptr() for one in state], y.data_ptr())


@pytest.mark.parametrize("move", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("cell", MODULES)
def test_copies_compute_the_same(cell, move):
    """deepcopy and pickle, of a frozen module too; their weights are their own."""
    kind, own = MODULES[cell]
    module, x = kind(3, 4, **own), torch.rand(5, 2, 3)
    module.freeze()
    twin = move(module)
    y = module(x)[0]
    assert torch.equal(twin(x)[0], y)
    assert repr(twin) == repr(module)
    with torch.no_grad():
        twin.weight_ih_l0.add_(1)
        assert not torch.equal(twin(x)[0], y)
        assert torch.equal(module(x)[0], y)


def test_a_checkpoint_moves_between_ours_and_torchs():
    """state_dict through torch.save, both ways."""
    ours, theirs = rt.LSTM(3, 4, 2, bidirectional=True), torch.nn.LSTM(3, 4, 2, bidirectional=True)
    for source, target in ((ours, theirs), (theirs, ours)):
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file))
        for one, other in zip(source.parameters(), target.parameters(), strict=True):
            assert torch.equal(one, other)


def test_functional_call_uses_the_weights_it_is_given():
    """And its gradients are theirs."""
    module, other, x = rt.GRU(3, 4), rt.GRU(3, 4), torch.rand(5, 2, 3)
    weights = {name: one.detach().clone().requires_grad_() for name, one in other.named_parameters()}
    y, _ = torch.func.functional_call(module, weights, (x,))
    assert torch.equal(y, other(x)[0])
    y.sum().backward()
    assert all(one.grad is not None for one in weights.values())
    assert all(one.grad is None for one in module.parameters())


def test_eight_threads_may_share_a_module():
    """Each gets the bits of one alone."""
    module, xs = rt.GRU(3, 8, num_layers=2), [torch.rand(20, 4, 3) for _ in range(8)]
    expected = [module(x)[0].detach() for x in xs]
    results = [[] for _ in xs]

    def run(index):
        for _ in range(10):
            y = module(xs[index])[0]
            y.sum().backward()
            results[index].append(y.detach())

    threads = [threading.Thread(target=run, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, all_of_it in zip(expected, results, strict=True):
        assert len(all_of_it) == 10
        assert all(torch.equal(one, other) for other in all_of_it)


# Autograd.


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


def test_only_the_gradients_that_are_wanted_come():
    """Frozen weights have none, an input that needs none neither."""
    module, x = rt.LSTM(3, 4), torch.rand(5, 2, 3)
    module.weight_hh_l0.requires_grad_(False)
    module(x)[0].sum().backward()
    assert x.grad is None
    assert module.weight_hh_l0.grad is None
    assert module.weight_ih_l0.grad is not None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, of forward mode
def test_forward_mode_derivatives():
    """Of `torch.autograd.forward_ad`, also without gradients of the other kind."""
    forward_ad = torch.autograd.forward_ad
    module, x, direction = rt.LSTM(3, 4, dtype=torch.float64), X.double(), torch.rand(X.shape, dtype=torch.float64)
    expected = torch.func.jvp(lambda x: module(x)[0], (x,), (direction,))[1]
    with torch.no_grad(), forward_ad.dual_level():
        found = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))[0]).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_weights_that_need_no_gradient_cost_none(monkeypatch, compiled):
    """The backend is asked for the others alone; their bits stay."""
    torch.compiler.reset()
    module, x = rt.LSTM(3, 4), torch.rand(5, 2, 3, requires_grad=True)
    expected = torch.autograd.grad(module(x)[0].sum(), [x, module.bias_hh_l0])
    module.requires_grad_(False).bias_hh_l0.requires_grad_(True)
    native, asked = backends.get("native"), []
    original = native.backward
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


def test_what_a_transform_left_behind_is_taken_as_torch_takes_it():
    """A tensor that outlives the `torch.func.grad` it was made in."""
    left = []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(torch.rand(5, 2, 3))
    module = rt.GRU(3, 4)
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            assert torch.equal(module(left[0])[0], module(left[0] + 0)[0])


def alive():
    gc.collect()
    return sum(type(one) is kernels.Tape for one in gc.get_objects())


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
    """`is_grads_batched` and `jacobian(vectorize=True)`, as one by one."""
    module, x = kind(3, 4), torch.rand(5, 2, 3, requires_grad=True)
    y = module(x)[0]
    directions = torch.rand(3, *y.shape)
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in directions])
    torch.testing.assert_close(torch.autograd.grad(y, x, directions, is_grads_batched=True)[0], expected)


# Compiled graphs.

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
            torch.library.opcheck(torch.ops.rnnkern.forward, (*arguments, training, *module._stack()))


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("cell", MODULES)
def test_backward_passes_opcheck(cell, need_x):
    """Also with copies, which `opcheck` makes of everything."""
    kind, own = MODULES[cell]
    module, x = kind(3, 4, num_layers=2, bidirectional=True, **own), torch.rand(5, 2, 3)
    state = [torch.rand(4, 2, 4) for _ in CELLS[cell].states]
    call = (x, state, [one.detach() for one in module._weights()], *[None] * 3, 0.0)
    y, *final, tape = torch.ops.rnnkern.forward(*call, True, *module._stack())
    given = (*call, tape, y, y, [None, *final[1:]], need_x, [need_x, True] * 8, *module._stack())
    torch.library.opcheck(torch.ops.rnnkern.backward, given)


# Errors.

X = torch.rand(5, 2, 3)
STATE = torch.rand(1, 2, 4)
RAGGED = torch.nested.nested_tensor_from_jagged(X[0], torch.tensor([0, 1, 2]))
BAD_CALLS = {
    "rank": (rt.GRU, (X[None],), {}, ValueError, r"input: expected shape \(T, B, 3\) or \(T, 3\), got \(1, 5, 2, 3\)"),
    "size": (rt.GRU, (X[..., :2],), {}, ValueError, r"input: expected shape"),
    "dtype": (rt.GRU, (X.double(),), {}, TypeError, r"input: expected torch.float32, .* got torch.float64"),
    "integers": (rt.GRU, (X.long(),), {}, NotImplementedError, r"input: expected one of torch.float32 and .*int64"),
    "sparse": (rt.GRU, (X.to_sparse(),), {}, NotImplementedError, r"input: expected a dense .* torch.sparse_coo"),
    "nested": (rt.GRU, (RAGGED,), {}, NotImplementedError, r"input: expected a dense Tensor, with lengths .* a nested"),
    "device": (rt.GRU, (X.to("meta"),), {}, NotImplementedError, r"input: expected one on cpu, .* got meta"),
    "state": (rt.GRU, (X, STATE[:, :1]), {}, ValueError, r"hx: expected torch.float32 of shape \(1, 2, 4\), got .*1"),
    "state_dtype": (rt.GRU, (X, STATE.double()), {}, ValueError, r"hx: expected torch.float32 .* got torch.float64"),
    "state_rank": (rt.GRU, (X[:, 0], STATE), {}, ValueError, r"hx: expected torch.float32 of shape \(1, 4\)"),
    "no_tuple": (rt.LSTM, (X, STATE), {}, TypeError, r"hx: expected a tuple \(h, c\), got Tensor"),
    "cell_state": (rt.LSTM, (X, (STATE, STATE[..., :1])), {}, ValueError, r"c: expected"),
    "lengths": (rt.GRU, (X,), {"lengths": [5, 6]}, ValueError, r"lengths: expected values from 0 to 5, got 5 to 6"),
    "lengths_shape": (rt.GRU, (X,), {"lengths": [5]}, ValueError, r"lengths: expected integers of shape \(2,\)"),
    "lengths_dtype": (rt.GRU, (X,), {"lengths": [5.0, 1.0]}, TypeError, r"lengths: expected integers"),
    "lengths_rank": (rt.GRU, (X[:, 0],), {"lengths": [5]}, ValueError, r"lengths: expected None with unbatched input"),
    "resets": (rt.GRU, (X,), {"resets": X[..., 0]}, TypeError, r"resets: expected bool of shape \(5, 2\), got float32"),
    "resets_shape": (rt.GRU, (X,), {"resets": X > 0}, ValueError, r"resets: expected bool of shape \(5, 2\), got"),
    "packed": (rt.GRU, (pack_padded(X, [5, 4]),), {"lengths": [5, 4]}, ValueError, r"lengths, resets: expected None"),
    "packed_size": (rt.GRU, (pack_padded(X[..., :2], [5, 4]),), {}, ValueError, r"input: expected data of 3 columns"),
}  # fmt: skip


def test_a_wrong_argument_is_named(subtests):
    """With what was expected and what came."""
    for name, (kind, arguments, options, error, message) in BAD_CALLS.items():
        with subtests.test(name), pytest.raises(error, match=message):
            kind(3, 4)(*arguments, **options)


BAD_MODULES = {
    "cuda": ({"device": "cuda"}, NotImplementedError, r"device and dtype: .* on the CPU, got torch.float32 on cuda"),
    "half": ({"dtype": torch.float16}, NotImplementedError, r"device and dtype: .* got torch.float16 on cpu"),
    "backend": ({"backend": "fast"}, ValueError, r"backend: expected 'auto' or one of"),
    "reset_after": ({"reset_after": 1}, TypeError, r"reset_after: expected a bool"),
    "hidden": ({"hidden_size": 0}, ValueError, r"hidden_size must be greater"),
}


def test_a_wrong_option_is_named(subtests):
    """Before anything is made."""
    for name, (options, error, message) in BAD_MODULES.items():
        with subtests.test(name), pytest.raises(error, match=message):
            rt.GRU(**({"input_size": 3, "hidden_size": 4} | options))


def test_a_module_of_another_dtype_says_what_is_supported():
    """At the call, since `half()` belongs to torch."""
    with pytest.raises(NotImplementedError, match=r"parameters: .*got torch.bfloat16 on cpu"):
        rt.GRU(3, 4).bfloat16()(X.bfloat16())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("data", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [rt.RNN, rt.LSTM, rt.GRU])
def test_autocast_gives_the_dtypes_of_torch(kind, data, state, packed):
    """Of outputs and states, from input and states of either dtype; gradients flow through."""
    torch.manual_seed(0)
    theirs = TORCH[kind](3, 4)
    ours = copy.deepcopy(theirs)
    rt.replace(ours)
    x = X.to(data).requires_grad_()
    hx = None if state is None else (STATE.to(state), STATE.to(state)) if kind is rt.LSTM else STATE.to(state)
    found = []
    for module in (theirs, ours):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, final = module(pack_padded(x, [5, 4]) if packed else x, hx)
        y, final = y.data if packed else y, final if kind is rt.LSTM else (final,)
        (slope,) = torch.autograd.grad(y.float().sum(), x)
        found.append((y, *final, slope))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=0.03, rtol=0.03)


# replace.


class Tagger(torch.nn.Module):
    """A model as people write them."""

    def __init__(self, kind=torch.nn.LSTM, **options):
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 6)
        self.layers = kind(6, 8, num_layers=2, batch_first=True, **options)
        self.head = torch.nn.Linear(8, 11)

    def forward(self, symbols):
        return self.head(self.layers(self.embedding(symbols))[0])


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
        "half": (torch.nn.LSTM(3, 4, dtype=torch.bfloat16), "weight_ih_l0 is torch.bfloat16 on cpu"),
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


def test_restore_leaves_what_torch_has_no_form_for():
    """And says why."""
    model = torch.nn.Sequential(rt.GRU(3, 4, reset_after=False), rt.LSTM(4, 4), Mine(4, 4))
    report = rt.restore(model)
    assert list(report.swapped) == ["1"]
    assert "reset_after" in report.left["0"]
    assert "subclass, Mine" in report.left["2"]
    assert type(model[0]) is rt.GRU


class Mine(rt.LSTM):
    """A subclass of ours."""


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


class Named(torch.Tensor):
    """A subclass without methods of its own."""


def test_a_subclass_of_tensor_keeps_its_class():
    """As through torch.nn."""
    module = rt.GRU(3, 4)
    y, h = module(X.as_subclass(Named))
    assert type(y) is type(h) is Named
    assert torch.equal(y.as_subclass(torch.Tensor), module(X)[0])


def test_threads_are_bounded_by_those_of_torch():
    """In the calls from torch alone."""
    script = (
        "import os, torch, rnnkern as rk, rnnkern.torch as rt\n"
        "torch.set_num_threads(1)\n"
        "module, x, before = rt.LSTM(128, 128), torch.rand(50, 32, 128), rk.num_threads()\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "module(x)[0].sum().backward()\n"
        "assert len(os.listdir('/proc/self/task')) <= threads + 1, 'autograd has one thread of its own'\n"
        "assert rk.num_threads() == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


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


def test_numpy_alone_imports_the_package():
    """`import rnnkern` brings no torch with it."""
    program = "import sys, rnnkern; assert 'torch' not in sys.modules; assert not hasattr(rnnkern, 'torch')"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_masks_scale_what_they_keep():
    """Mean and variance of dropout: what passes is scaled by 1/(1-p)."""
    module = rt.RNN(1, 1, num_layers=2, nonlinearity="relu", bias=False, dropout=0.25)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_(float("ih" in name))
    y = module(torch.ones(100, 100, 1))[0].detach().numpy()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.02


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
    for wrong in ({"dtype": torch.bfloat16}, {"device": "meta"}):
        with pytest.raises(NotImplementedError, match=r"module: expected .* got weight_ih_l0 of"):
            rt.to_layer(torch.nn.GRU(3, 4, **wrong))
