"""The modules of `rnnkern.torch`: what they compute, their weights, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest

from rnnkern import backends
from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.testing import assert_accurate

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import rnnkern.torch as rt  # noqa: E402
from rnnkern.torch.packing import Packing  # noqa: E402
from torch_modules import (  # noqa: E402
    COMMON,
    MODULES,
    OPTIONS,
    PROBLEMS,
    PROJECTED,
    STATE,
    TORCH,
    X,
    made,
    one_or_tuple,
    problem_of,
    results_of,
    tensors,
)

torch.set_num_threads(1)

pack_sequence, pack_padded = torch.nn.utils.rnn.pack_sequence, torch.nn.utils.rnn.pack_padded_sequence


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
    again, _ = module(x, one_or_tuple(state))
    (slope,) = torch.autograd.grad(again.sum(), x, create_graph=True)  # and in torch's own operations
    assert slope.shape == shape
    assert torch.vmap(module)(torch.zeros(2, *shape))[0].shape == (2, *y.shape)


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


def test_rows_without_padding_are_read_where_they_are(monkeypatch):
    """Offsets and a PackedSequence have the bits of lengths; only second derivatives are taken with padding."""
    lengths, offsets = [2, 5, 1, 4], torch.tensor([0, 2, 7, 8, 12])
    rows = rows_of(lengths)
    x = torch.cat(rows).detach().requires_grad_()
    for cell, options in (("lstm", {"bidirectional": True, "num_layers": 2}), ("gru", {})):
        kind, own = MODULES[cell]
        module = kind(3, 4, **own, **options, dtype=torch.float64)
        padded, final = module(torch.nn.utils.rnn.pad_sequence(rows), lengths=lengths)
        expected = torch.cat([padded[:length, b] for b, length in enumerate(lengths)])
        wanted = [*module.parameters()]
        gradients = torch.autograd.grad(expected.square().sum(), wanted)
        with monkeypatch.context() as patch:
            patch.setattr(Packing, "spread", None)
            y, last = module(x, offsets=offsets)
            packed = module(pack_sequence(rows, enforce_sorted=False))
            found = torch.autograd.grad(y.square().sum(), [*wanted, x])
        of_packed = torch.cat(torch.nn.utils.rnn.unpack_sequence(packed[0]))
        for state in (last, packed[1]):
            assert torch.equal(torch.cat(tuple(state)), torch.cat(tuple(final)))
        assert all(map(torch.equal, [y, of_packed, *found[:-1]], [expected, expected, *gradients]))
        assert torch.autograd.gradgradcheck(lambda x, run=module: run(x, offsets=offsets)[0], x)
    with pytest.raises(ValueError, match="lengths: expected None with offsets"):
        module(x, lengths=lengths, offsets=offsets)


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
    """torch.manual_seed makes it reproducible, vmap says whether all have the same; evaluation has none."""
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
    for randomness in ("same", "different"):
        found = torch.vmap(lambda x: module(x)[0], randomness=randomness)(x.expand(2, *x.shape))
        assert torch.allclose(*found) is (randomness == "same")
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


def misaligned(tensor):
    """A copy at an odd place, as of a buffer from a file or a message."""
    buffer = bytearray(1 + tensor.nbytes)
    return torch.frombuffer(buffer, dtype=tensor.dtype, offset=1).view(tensor.shape).copy_(tensor)


MOVES = {
    "to other memory": lambda weight: setattr(weight, "data", weight.data + 1),
    "within its memory": lambda weight: setattr(weight, "data", weight.data.t()),
    "out of alignment": lambda weight: setattr(weight, "data", misaligned(weight.data + 1)),
    "into shared memory": lambda weight: weight.share_memory_().data.add_(1),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("training", [False, True])
def test_a_weight_that_moved_is_found(training, move):
    """By the next call, and what is written to it by the one after."""
    module, x = rt.RNN(4, 4), torch.rand(5, 2, 4)
    with torch.set_grad_enabled(training):
        before = module(x)[0]
        assert torch.equal(module(misaligned(x))[0], before)
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


RAGGED = torch.nested.nested_tensor_from_jagged(X[0], torch.tensor([0, 1, 2]))
BAD_CALLS = {
    "rank": (rt.GRU, (X[None],), {}, ValueError, r"input: expected shape \(T, B, 3\) or \(T, 3\), got \(1, 5, 2, 3\)"),
    "size": (rt.GRU, (X[..., :2],), {}, ValueError, r"input: expected shape"),
    "dtype": (rt.GRU, (X.double(),), {}, TypeError, r"input: expected torch.float32, .* got torch.float64"),
    "integers": (rt.GRU, (X.long(),), {}, NotImplementedError, r"input: expected one of torch.float32.*int64"),
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
    "packed": (rt.GRU, (pack_padded(X, [5, 4]),), {"lengths": [5, 4]}, ValueError, r"lengths, resets, offsets: exp"),
    "packed_size": (rt.GRU, (pack_padded(X[..., :2], [5, 4]),), {}, ValueError, r"input: expected data of 3 columns"),
}  # fmt: skip


def test_a_wrong_argument_is_named(subtests):
    """With what was expected and what came, within transforms of `torch.func` too."""
    for name, (kind, arguments, options, error, message) in BAD_CALLS.items():
        call = partial(kind(3, 4), *arguments, **options)
        with subtests.test(name), pytest.raises(error, match=message):
            call()
        with subtests.test(f"{name}, transformed"), pytest.raises(error, match=message):
            torch.func.vjp(lambda _, call=call: call(), X)


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


def test_a_module_of_another_dtype_or_device_says_what_is_supported(subtests):
    """At the call, since `half()` belongs to torch; also where some of the parameters are of another, or of a shape."""
    with pytest.raises(NotImplementedError, match=r"parameters: .*got torch.float16 on cpu"):
        rt.GRU(3, 4).half()(X.half())
    with pytest.raises(NotImplementedError, match=r"parameters: expected some on cpu, as input, got .* on meta"):
        rt.GRU(3, 4, device="meta")(X)
    module = rt.GRU(3, 4)
    module.weight_hh_l0.data = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"parameters: expected weight_hh_l0 of shape \(12, 4\), got \(4, 4\)"):
        module(X)
    for kind in (torch.float64, "meta"):
        module = rt.GRU(3, 4)
        module.weight_hh_l0 = torch.nn.Parameter(module.weight_hh_l0.to(kind))
        for call in (module.freeze, partial(module, X)):
            message = rf"parameters: expected all of torch.float32 on cpu, got weight_hh_l0 of .*{kind}"
            with subtests.test(str(kind)), pytest.raises(TypeError, match=message):
                call()


def test_a_module_in_bfloat16_has_the_bits_of_a_layer_in_that_precision():
    """Its own dtype, autocast, frozen, converted, compiled; and the gradients, each rounded to its tensor's dtype."""
    torch.manual_seed(0)
    module = rt.LSTM(3, 40, num_layers=2).bfloat16()
    layer, x = rt.to_layer(module), X.bfloat16()
    assert layer.precision == "bfloat16"
    y, _, tape = layer.forward(x.float().numpy())
    expected = layer.backward(tape, np.ones_like(y))
    found, _ = module(x.requires_grad_())
    assert torch.equal(found, torch.from_numpy(y.copy()).bfloat16())
    found.sum().backward()
    assert torch.equal(x.grad, torch.from_numpy(expected.x).bfloat16())
    for name, one in module.named_parameters():
        assert torch.equal(one.grad, torch.from_numpy(expected.parameters[name]).bfloat16()), name
    with pytest.raises(TypeError, match=r"hx\[1\]: expected torch.bfloat16, as the parameters are, got torch.float32"):
        module(x, (torch.zeros(2, 2, 40, dtype=torch.bfloat16), torch.zeros(2, 2, 40)))
    wide = rt.LSTM(3, 40, num_layers=2)
    wide.load_state_dict(module.state_dict())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(wide(x)[0], found)
        assert torch.equal(torch.compile(wide, backend="eager", fullgraph=True)(x)[0], found)
    with torch.no_grad():
        assert torch.equal(module.freeze()(x)[0], found)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x)[0], found)
        assert not torch.equal(wide(x.float())[0].bfloat16(), found)


def test_a_module_on_a_matrix_engine_computes_what_its_layer_does():
    """Bit for bit, with gradients, frozen, compiled and copied; its repr says so."""
    native = native_module()
    if native is None:
        pytest.skip("the compiled module is missing")
    before = native.use_engine("emulated")
    try:
        if native.engine() != "emulated":
            pytest.skip("there are no kernels for AVX-512")
        module = rt.GRU(5, 33, num_layers=2, arithmetic="amx")
        assert repr(module) == "GRU(5, 33, num_layers=2, arithmetic=amx)"
        x, layer = torch.randn(6, 20, 5), rt.to_layer(module)
        y, _, tape = layer.forward(x.numpy())
        expected = layer.backward(tape, np.ones_like(y), need_x=False)
        found, _ = module(x)
        found.sum().backward()
        assert torch.equal(found, torch.from_numpy(y.copy()))
        for name, one in module.named_parameters():
            assert torch.equal(one.grad, torch.from_numpy(expected.parameters[name])), name
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(module).freeze()(x)[0], found)
            assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x)[0], found)
            assert not torch.equal(copy.deepcopy(module).double()(x.double())[0].float(), found)
    finally:
        native.use_engine(before)
    for options in ({"arithmetic": "amx", "dtype": torch.float64}, {"arithmetic": "amx", "dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match="arithmetic: expected"):
            rt.LSTM(3, 4, **options)


def test_torch_in_bfloat16_and_ours_take_turns():
    """Call by call and from threads, forward and backward: each computes what it does alone, matrix engine or not."""
    torch.manual_seed(0)
    theirs, x = torch.nn.LSTM(48, 64).bfloat16(), torch.randn(5, 20, 48).bfloat16()
    ours, dy = copy.deepcopy(theirs), torch.randn(5, 20, 64).bfloat16()
    rt.replace(ours)

    def results(module):
        leaf = x.clone().requires_grad_()
        y, _ = module(leaf)
        return y.detach(), *torch.autograd.grad(y, (leaf, module.weight_hh_l0), dy)

    alone = [results(module) for module in (theirs, ours)]

    def take_turns(_):
        for _ in range(8):
            for module, expected in zip((theirs, ours), alone, strict=True):
                assert all(map(torch.equal, results(module), expected)), type(module)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(take_turns, range(3)))


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
        "own = 1 + torch.cuda.device_count()\n"
        "assert len(os.listdir('/proc/self/task')) <= threads + own, 'autograd has one thread for each device'\n"
        "assert rk.num_threads() == before\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


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
