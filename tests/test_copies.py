"""Copies: pickle, `copy`, joblib, of layers, optimizers, gradients and streams."""

from __future__ import annotations

import copy
import pickle
import tempfile
from functools import partial
from itertools import product

import numpy as np
import pytest

import rnnkern as rk
from results import given, same


def by_buffers(thing):
    """Pickle with the arrays beside the bytes: those of the copy are at first the memory of the original."""
    buffers = []
    return pickle.loads(pickle.dumps(thing, 5, buffer_callback=buffers.append), buffers=buffers)


def by_joblib(thing, mmap_mode=None):
    """A file of joblib, mapped into memory where asked."""
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    with tempfile.TemporaryDirectory() as folder:
        joblib.dump(thing, f"{folder}/thing")
        return joblib.load(f"{folder}/thing", mmap_mode=mmap_mode)


COPIES = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "pickle_0": lambda thing: pickle.loads(pickle.dumps(thing, 0)),
    "buffers": by_buffers,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "joblib": by_joblib,
    "joblib_read_only": partial(by_joblib, mmap_mode="r"),
    "joblib_mapped": partial(by_joblib, mmap_mode="c"),
}
every_copy = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())


def steps_of(layer, optimizer, head, part=None):
    """The loss after some steps of training; `part`: the names that the optimizer has of the layer."""
    x = np.ones((5, 2, 3), "float32")
    for _ in range(5):
        y, _, tape = layer.forward(x)
        p, head_tape = head.forward(y)
        loss, dp = rk.mse(p, np.zeros_like(p))
        grads = head.backward(head_tape, dp)
        optimizer.step([layer.backward(tape, grads.x, parameters=True if part is None else part), grads])
    return loss


@every_copy
def test_a_copied_trainer_trains_as_the_original(subtests, duplicate):
    """Copied together, optimizer and layers stay connected, also where it has some of the parameters in a dict."""
    makers = (partial(rk.SGD, lr=0.1, momentum=0.9), rk.Adam, partial(rk.SGD, lr=0.1))
    for make, chosen in product(makers, (None, ["weight_hh_l1", "bias_ih_l0"])):
        with subtests.test(f"{make} of {chosen or 'all'}"):
            layer, head = rk.GRU(3, 4, 2, dropout=0.5, seed=0), rk.Linear(4, 1, seed=1)
            own = layer if chosen is None else {name: layer.parameters[name] for name in chosen}
            optimizer = make([own, head.parameters])
            steps_of(layer, optimizer, head, chosen)
            mine = layer, optimizer, head
            twin = copy.deepcopy(mine) if duplicate is copy.copy else duplicate(mine)
            before = layer.state_dict()
            losses = [steps_of(*one, chosen) for one in (twin, twin)]
            same(tuple(layer.state_dict().values()), tuple(before.values()))  # the copy is of its own
            assert losses == [steps_of(*one, chosen) for one in (mine, mine)]
            same(tuple(twin[0].state_dict().values()), tuple(layer.state_dict().values()))


@every_copy
def test_an_optimizer_copied_alone_owns_its_parameters(subtests, duplicate):
    """It takes the same steps, on arrays of its own."""
    for make, whole in product((rk.Adam, partial(rk.SGD, lr=0.1, momentum=0.9)), (True, False)):
        with subtests.test(f"{make} of {'a layer' if whole else 'a dict'}"):
            layer = rk.RNN(3, 4, seed=0)
            optimizer = make(layer if whole else dict(layer.parameters))
            grads = layer.state_dict()
            twin = duplicate(optimizer)
            before = layer.state_dict()
            twin.step(grads)
            same(tuple(layer.parameters.values()), tuple(before.values()))
            optimizer.step(grads)
            same(tuple(twin._parameters[0].values()), tuple(layer.parameters.values()))
            assert repr(twin.state_dict()) == repr(optimizer.state_dict())


@every_copy
def test_gradients_and_parameters_come_back_as_arrays_of_their_own(duplicate):
    """Writable, so that `into` takes them."""
    layer = rk.LSTM(3, 4, seed=0)
    y, _, tape = layer.forward(np.ones((5, 2, 3)))
    grads = layer.backward(tape, y)
    twin, parameters = duplicate(grads), duplicate(layer.parameters)
    same(twin, grads)
    same(tuple(parameters.values()), tuple(layer.parameters.values()))
    layer.backward(tape, y, into=twin)
    same(twin.x, 2 * grads.x)
    parameters["weight_hh_l0"][...] = 0
    assert layer.parameters["weight_hh_l0"].all()


@every_copy
def test_tapes_refuse_to_be_copied(duplicate):
    """A tape is bound to its layer and process; the error says what to do."""
    for module in (rk.GRU(3, 4), rk.Linear(3, 4)):
        tape = module.forward(np.ones((5, 2, 3)))[-1]
        with pytest.raises(TypeError, match=r"tape: cannot be copied .* run `forward` again"):
            duplicate(tape)


@every_copy
@pytest.mark.parametrize("cell", ["lstm_peephole", "gru", "rnn_tanh"])
def test_layers_frozen_layers_and_streams_can_be_copied(cell, backend, duplicate):
    """In every way; the generator of the dropout masks comes along, and what is written reaches the copy's calls."""
    layer = rk.Recurrent(cell, 3, 4, 2, dropout=0.5, seed=0, backend=backend)
    x, state = given(layer)
    expected, frozen = layer(x, state), layer.freeze()
    stream = frozen.stream(3)
    stream.step(x[0])
    next_state = stream.state
    twin, frozen_twin, stream_twin = duplicate(layer), duplicate(frozen), duplicate(stream)
    assert repr(twin) == repr(layer)
    same(twin(x, state), expected)
    same(frozen_twin(x, state), expected)
    same(stream_twin.state, next_state)
    same(stream_twin.step(x[1]), stream.step(x[1]))
    same(twin.forward(x)[0], layer.forward(x)[0])
    twin.load_state_dict({name: np.zeros_like(array) for name, array in layer.parameters.items()})
    assert not np.array_equal(twin(x, state)[0], expected[0])
    same(twin(x, state), twin.freeze()(x, state))
    same(layer(x, state), expected)
    layer.load_state_dict({name: np.zeros_like(array) for name, array in layer.parameters.items()})
    same(duplicate(frozen)(x, state), expected)
