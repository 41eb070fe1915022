"""What the layers promise beside accuracy: shapes, parameters, tapes, lengths, resets, dropout, inputs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import signal
import threading
import time
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import numpy as np
import pytest

import rnnkern as rk
from results import agree, given, parts, same
from rnnkern import backends
from rnnkern.cells import CELLS
from rnnkern.functional import SAVES, dropout_masks
from rnnkern.stack import Backward
from rnnkern.testing import Problem, assert_accurate, inputs, layer_of, run, state_of


def rows(state, chosen):
    """Some rows of a state."""
    return tuple(part[:, chosen] for part in state) if isinstance(state, tuple) else state[:, chosen]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("proj_size", [0, 2])
def test_shapes_are_those_of_torch(cell, backend, bidirectional, proj_size):
    """y (T, B, D*P), h (L*D, B, P), c (L*D, B, H)."""
    proj_size *= CELLS[cell].projects
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=bidirectional, proj_size=proj_size, backend=backend, seed=0)
    D, P = 1 + bidirectional, proj_size or 4
    y, state = layer(np.zeros((5, 6, 3)))
    assert y.shape == (5, 6, D * P)
    assert [part.shape for part in parts(state)] == [(2 * D, 6, P), (2 * D, 6, 4)][: len(CELLS[cell].states)]
    assert isinstance(state, tuple) == (len(CELLS[cell].states) > 1)


def test_batch_first_only_swaps_the_axes_of_x_y_and_resets(cell, backend):
    """With `batch_first` x, y, resets and their gradients are transposed; states are not."""
    one = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, seed=0, backend=backend)
    other = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, batch_first=True, seed=0, backend=backend)
    x, state = given(one)
    resets = np.random.default_rng(1).random((5, 3)) < 0.3
    swapped = x.swapaxes(0, 1)
    y, final, tape = one.forward(x, state, lengths=[5, 2, 0], resets=resets)
    other_y, other_final, other_tape = other.forward(swapped, state, lengths=[5, 2, 0], resets=resets.T)
    same((other_y, other_final), (y.swapaxes(0, 1), final))
    grads, other_grads = one.backward(tape, y), other.backward(other_tape, other_y)
    same(other_grads.x.swapaxes(0, 1), grads.x)
    same((other_grads.state, *other_grads.parameters.values()), (grads.state, *grads.parameters.values()))
    out = np.empty_like(other_y)
    assert other(swapped, state, lengths=[5, 2, 0], resets=resets.T, out=out)[0] is out
    same(out, other_y)
    assert all(part.flags.c_contiguous for part in parts((other_y, other_final, other_grads)))


def test_unbatched_is_a_batch_of_one_without_its_axis(cell, backend):
    """x (T, I) gives y (T, D*P) and states (L*D, P), and takes resets (T,)."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, seed=0, backend=backend)
    x, state = given(layer, T=5, B=1)
    resets = np.array([False, True, False, False, True])
    y, final, tape = layer.forward(x, state, resets=resets[:, None])
    alone = tuple(part[:, 0] for part in parts(state))
    alone = alone if len(alone) > 1 else alone[0]
    y1, final1, tape1 = layer.forward(x[:, 0], alone, resets=resets)
    same((y1, final1), (y[:, 0], rows(final, 0)))
    grads, grads1 = layer.backward(tape, y, final), layer.backward(tape1, y1, final1)
    same((grads1.x, grads1.state, *grads1.parameters.values()),
         (grads.x[:, 0], rows(grads.state, 0), *grads.parameters.values()))  # fmt: skip
    same(layer(x[:, 0], alone, resets=resets, out=np.empty_like(y1)), (y1, final1))
    batch_first = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, batch_first=True, seed=0, backend=backend)
    same(batch_first(x[:, 0], alone, resets=resets), (y1, final1))


@pytest.mark.parametrize(("T", "B"), [(0, 3), (5, 0), (0, 0)])
def test_no_steps_and_no_rows_give_empty_results(cell, backend, T, B):
    """T = 0 passes the state and its gradient through; the gradients of the parameters are zeros."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, dropout=0.5, backend=backend, seed=0)
    x, state = given(layer, T, B)
    y, final, tape = layer.forward(x, state, lengths=[0] * B, resets=np.zeros((T, B), bool))
    assert y.shape == (T, B, 8)
    same(final, state)
    grads = layer.backward(tape, np.ones_like(y), state)
    assert grads.x.shape == x.shape
    same(grads.state, state)
    assert all((gradient == 0).all() for gradient in grads.parameters.values())
    same(layer(x, state, out=np.empty_like(y)), (y, state))


def test_no_state_is_a_state_of_zeros(cell, backend):
    """`state=None` stands for zeros."""
    layer = rk.Recurrent(cell, 3, 4, 2, backend=backend, seed=0)
    x, state = given(layer)
    zeros = tuple(np.zeros_like(part) for part in parts(state))
    same(layer(x), layer(x, zeros if len(zeros) > 1 else zeros[0]))


@pytest.mark.parametrize("T", [0, 1, 5])
def test_results_alias_nothing(cell, backend, T):
    """Neither the arguments nor each other."""
    layer = rk.Recurrent(cell, 3, 4, dtype="float64", backend=backend, seed=0)
    x, state = given(layer, T)
    y, final, tape = layer.forward(x, state)
    dy = np.ones_like(y)
    grads = layer.backward(tape, dy, state)
    results = parts((y, final, grads)) + parts(layer(x, state))
    arguments = [x, dy, *parts(state), *layer.parameters.values()]
    for index, one in enumerate(results):
        for other in [*results[index + 1 :], *arguments]:
            assert not np.shares_memory(one, other)


@pytest.mark.parametrize("bias", [True, False])
def test_parameters_have_the_names_and_shapes_of_torch(bias):
    """weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, weight_hr_l0, *_reverse, in this order."""
    layer = rk.LSTM(3, 4, 2, bias, bidirectional=True, proj_size=2)
    shapes = {}
    for suffix, inputs_ in (("l0", 3), ("l0_reverse", 3), ("l1", 4), ("l1_reverse", 4)):
        shapes |= {f"weight_ih_{suffix}": (16, inputs_), f"weight_hh_{suffix}": (16, 2)}
        if bias:
            shapes |= {f"bias_ih_{suffix}": (16,), f"bias_hh_{suffix}": (16,)}
        shapes |= {f"weight_hr_{suffix}": (2, 4)}
    assert {name: array.shape for name, array in layer.parameters.items()} == shapes
    assert list(layer.parameters) == list(shapes)


def test_extras_of_a_cell_are_parameters(cell):
    """An extra is a vector (H,) called <extra>_l0."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True)
    for extra in CELLS[cell].extras:
        for suffix in ("l0", "l0_reverse", "l1", "l1_reverse"):
            assert layer.parameters[f"{extra}_{suffix}"].shape == (4,)


def test_parameters_are_a_read_only_mapping_of_writable_arrays(cell):
    """A name cannot be assigned or removed, an array can be written into."""
    layer = rk.Recurrent(cell, 3, 4)
    with pytest.raises(TypeError):
        layer.parameters["weight_ih_l0"] = np.zeros((4, 3), np.float32)
    with pytest.raises(TypeError):
        del layer.parameters["weight_ih_l0"]
    with pytest.raises(AttributeError):
        layer.parameters = {}
    assert all(array.flags.carray and array.dtype == np.float32 for array in layer.parameters.values())


def test_the_next_call_sees_written_parameters(cell, backend):
    """Writing into a parameter is how one trains."""
    layer, other = (rk.Recurrent(cell, 3, 4, seed=seed, backend=backend) for seed in (0, 1))
    x, state = given(layer)
    for name, array in layer.parameters.items():
        array[...] = other.parameters[name]
    same(layer(x, state), other(x, state))


def test_initial_parameters_are_uniform_draws_of_the_seed(cell, dtype):
    """U(-1/sqrt(H), 1/sqrt(H)) in float64 from default_rng(seed), one parameter after the other, then cast."""
    layer = rk.Recurrent(cell, 3, 16, 2, dtype=dtype, seed=7)
    generator = np.random.default_rng(7)
    for array in layer.parameters.values():
        same(array, generator.uniform(-0.25, 0.25, array.shape).astype(dtype))


def test_large_parameters_are_drawn_in_pieces_of_the_same_values():
    """Bits are those of one draw; at no time is there much more memory than for the parameters."""
    tracemalloc.start()
    layer = rk.LSTM(300, 300, seed=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    expected = np.random.default_rng(3).uniform(-1 / 300**0.5, 1 / 300**0.5, (1200, 300)).astype("float32")
    same(layer.parameters["weight_ih_l0"], expected)
    assert peak <= 1.6 * sum(array.nbytes for array in layer.parameters.values())


def test_state_dict_copies_and_load_state_dict_copies_back(cell, backend):
    """Neither shares memory with the layer; float64 values are cast to the layer's dtype."""
    layer, other = (rk.Recurrent(cell, 3, 4, seed=seed, backend=backend) for seed in (0, 1))
    weights = {name: array.astype(np.float64) for name, array in layer.state_dict().items()}
    arrays = dict(other.parameters)
    other.load_state_dict(weights)
    assert all(other.parameters[name] is array for name, array in arrays.items())
    x, _ = given(layer)
    same(other(x), layer(x))
    for array in (*layer.state_dict().values(), *weights.values()):
        array[...] = 0
    same(other(x), layer(x))


def test_a_layer_may_load_its_own_parameters_in_other_places():
    """All are read before the first is written."""
    layer = rk.GRU(3, 4, bidirectional=True, seed=0)
    before = layer.state_dict()
    exchanged = {name: name.removesuffix("_reverse") + "_reverse" * (not name.endswith("_reverse")) for name in before}
    layer.load_state_dict({name: layer.parameters[other] for name, other in exchanged.items()})
    for name, other in exchanged.items():
        same(layer.parameters[name], before[other])


def test_y_and_state_of_forward_are_read_only(cell, backend):
    """`y *= mask` is an error and not a wrong gradient."""
    for batch_first, x in ((False, np.zeros((5, 3, 3))), (True, np.zeros((5, 3, 3))), (False, np.zeros((5, 3)))):
        y, state, _ = rk.Recurrent(cell, 3, 4, batch_first=batch_first, backend=backend, seed=0).forward(x)
        for array in (y, *parts(state)):
            with pytest.raises(ValueError, match="read-only"):
                array *= 0
    y, state = rk.Recurrent(cell, 3, 4, backend=backend, seed=0)(np.zeros((5, 3, 3)))
    assert all(array.flags.writeable for array in (y, *parts(state)))


def test_backward_belongs_to_the_parameters_of_its_forward(cell, backend):
    """The tape owns what it needs: parameters, lengths and resets may change before backward."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, backend=backend, seed=0)
    x, state = given(layer)
    lengths, resets = np.array([5, 2, 4]), np.random.default_rng(1).random((5, 3)) < 0.3
    y, final, tape = layer.forward(x, state, lengths=lengths, resets=resets)
    expected = layer.backward(tape, y, final)
    for array in layer.parameters.values():
        array[...] = np.nan
    lengths[:] = 0
    resets[:] = ~resets
    same(layer.backward(tape, y, final), expected)


def test_a_tape_keeps_lengths_and_resets_as_they_were(backend):
    """They are copied, as offsets are: the caller may write into them before backward."""
    layer = rk.GRU(3, 4, backend=backend, seed=0)
    x, _ = given(layer)
    for rows, ends in ((x, {"lengths": np.array([5, 2, 4])}), (x[:, 0], {"offsets": np.array([0, 3, 5])})):
        resets = np.eye(5, 3, -1, bool) if rows.ndim == 3 else (np.arange(10) == 2)[::2]  # with gaps
        y, _, tape = layer.forward(rows, **ends, resets=resets)
        expected = layer.backward(tape, np.ones_like(y))
        for array in (*ends.values(), resets):
            array[...] = 1
        same(layer.backward(tape, np.ones_like(y)), expected)


def test_backward_may_run_from_several_threads(cell, backend):
    """It only reads the tape."""
    layer = rk.Recurrent(cell, 3, 4, 2, backend=backend, seed=0)
    x, state = given(layer)
    y, final, tape = layer.forward(x, state)
    expected = layer.backward(tape, y, final)
    with ThreadPoolExecutor(4) as pool:
        for grads in pool.map(lambda _: layer.backward(tape, y, final), range(8)):
            same(grads, expected)


def test_no_gradient_is_a_gradient_of_zeros(cell, backend):
    """For dy, for dstate, and for either half of the state of a cell with two."""
    layer = rk.Recurrent(cell, 3, 4, 2, backend=backend, seed=0)
    x, state = given(layer)
    y, _, tape = layer.forward(x, state)
    zeros = tuple(np.zeros_like(part) for part in parts(state))
    zero_state = zeros if len(zeros) > 1 else zeros[0]
    same(layer.backward(tape, None, state), layer.backward(tape, np.zeros_like(y), state))
    same(layer.backward(tape, y), layer.backward(tape, y, zero_state))
    same(layer.backward(tape), layer.backward(tape, np.zeros_like(y), zero_state))
    for index in range(len(zeros) if len(zeros) > 1 else 0):
        half = [None if other == index else part for other, part in enumerate(state)]
        filled = tuple(zeros[other] if part is None else part for other, part in enumerate(half))
        same(layer.backward(tape, None, tuple(half)), layer.backward(tape, None, filled))


def test_gradients_are_structured_like_what_they_belong_to(cell, backend, dtype):
    """grads.x as x, grads.state as the state, grads.parameters with the keys, shapes and dtype of parameters."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, dtype=dtype, backend=backend, seed=0)
    x, state = given(layer)
    y, _, tape = layer.forward(x, state)
    grads = layer.backward(tape, y)
    assert grads.x.shape == x.shape
    assert isinstance(grads.state, tuple) == isinstance(state, tuple)
    assert [part.shape for part in parts(grads.state)] == [part.shape for part in parts(state)]
    assert list(grads.parameters) == list(layer.parameters)
    for name, array in layer.parameters.items():
        assert grads.parameters[name].shape == array.shape
    assert all(part.dtype == layer.dtype and part.flags.carray for part in parts(grads))


def test_both_biases_get_their_gradient(backend):
    """bias_ih and bias_hh; for an LSTM they are equal."""
    layer = rk.LSTM(3, 4, backend=backend)
    y, _, tape = layer.forward(given(layer)[0])
    grads = layer.backward(tape, y).parameters
    same(grads["bias_ih_l0"], grads["bias_hh_l0"])
    assert np.abs(grads["bias_hh_l0"]).min() > 0


def test_the_gradient_of_x_is_left_out_on_request(cell, backend):
    """`need_x=False` changes nothing else."""
    layer = rk.Recurrent(cell, 3, 4, 2, backend=backend, seed=0)
    y, _, tape = layer.forward(given(layer)[0])
    with_x, without = layer.backward(tape, y), layer.backward(tape, y, need_x=False)
    assert without.x is None
    same((without.state, *without.parameters.values()), (with_x.state, *with_x.parameters.values()))


def choices(names):
    """What may be asked for: nothing, each kind of parameter alone and all but that, and all."""
    kinds = {name.split("_l")[0] for name in names}
    for kind in sorted(kinds):
        yield [name for name in names if name.startswith(kind)]
        yield (name for name in names if not name.startswith(kind))
    yield from (False, True, [], names, list(names)[-1:])


def test_parameters_that_are_not_asked_for_have_no_gradient(cell, backend):
    """`parameters` leaves out the rest and changes no bit of what it names, with `into` too."""
    proj_size = 2 * CELLS[cell].projects
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, proj_size=proj_size, backend=backend, seed=0)
    x, state = given(layer)
    y, _, tape = layer.forward(x, state, lengths=[5, 0, 3])
    full = layer.backward(tape, y, state)
    for need_x, chosen in enumerate(choices(layer.parameters)):
        names = {True: list(full.parameters), False: []}[chosen] if isinstance(chosen, bool) else list(chosen)
        ask = {"need_x": need_x % 2 == 0, "parameters": chosen if isinstance(chosen, bool) else iter(names)}
        grads = layer.backward(tape, y, state, **ask)
        assert set(grads.parameters) == set(names)
        assert (grads.x is None) == (not ask["need_x"])
        expected = rk.Grads(
            full.x if ask["need_x"] else None, full.state, {n: full.parameters[n] for n in grads.parameters}
        )
        same(grads, expected)
        total = layer.backward(tape, y, state)
        layer.backward(tape, y, state, need_x=False, parameters=names, into=total)
        same(total.x, full.x)
        for name, gradient in total.parameters.items():
            same(gradient, full.parameters[name] * (2 if name in names else 1))


def test_layers_below_the_lowest_that_is_asked_for_take_no_part(backend):
    """Nor is the gradient of the initial state there, unless asked for; no bit of the others changes."""
    for cell, bidirectional, (H, B) in product(CELLS, (False, True), ((4, 40), (20, 3))):
        layer = rk.Recurrent(cell, 3, H, 3, bidirectional=bidirectional, dropout=0.5, backend=backend, seed=0)
        x, state = given(layer, 5, B)
        y, final, tape = layer.forward(x, state, lengths=5 - np.arange(B) % 6, seed=1)
        call = partial(layer._backend.backward, layer._signature.stack, tape.packed, tape.saved, tape.call)
        asked = Backward(y, tuple(parts(final)), False)
        _, dstate, gradients = call(asked)
        for lowest, need_state in product(range(4), (False, True)):
            wanted = [["w_hh"] * (index // (1 + bidirectional) >= lowest) for index in range(len(gradients))]
            dx, initial, found = call(asked._replace(wanted=wanted, need_state=need_state))
            assert dx is None
            same(initial, dstate if need_state else ())
            assert [list(one) for one in found] == wanted
            same(
                [one["w_hh"] for one in found if one],
                [one["w_hh"] for one in gradients[lowest * (1 + bidirectional) :]],
            )


@pytest.mark.parametrize("shape", [(0, 2, 3), (4, 0, 3)])
def test_the_same_where_there_is_nothing_to_sum(backend, shape):
    """No step or no row: zeros for what is asked for alone."""
    layer = rk.GRU(3, 4, backend=backend, seed=0)
    _, _, tape = layer.forward(np.zeros(shape))
    assert list(layer.backward(tape, parameters=["weight_hh_l0"]).parameters) == ["weight_hh_l0"]


def test_the_functional_pair_gives_what_is_asked_for():
    """`need_x`, `parameters` and `into` are those of the layers."""
    layer = rk.LSTM(3, 4, seed=0)
    weights = {key: layer.parameters[name] for key, name in layer._names[0].items()}
    x, state = given(layer)
    y, _, tape = rk.forward("lstm", x, weights, state)
    full = rk.backward(tape, y)
    part = rk.backward(tape, y, need_x=False, parameters=["w_hh"])
    assert part.x is None
    assert list(part.parameters) == ["w_hh"]
    same(part.parameters["w_hh"], full.parameters["w_hh"])
    assert rk.backward(tape, y, need_x=False, parameters=False, into=full) is full
    same(full.state, tuple(2 * one for one in part.state))
    same(full.parameters["w_hh"], part.parameters["w_hh"])


@pytest.mark.parametrize("need_x", [True, False])
def test_gradients_add_up_in_place(cell, backend, need_x):
    """`into=grads` adds to the arrays of grads and returns it."""
    layer = rk.Recurrent(cell, 3, 4, 2, backend=backend, seed=0)
    x, state = given(layer)
    y, final, tape = layer.forward(x, state)
    total = layer.backward(tape, y, need_x=need_x)
    arrays = parts(total)
    added = parts(layer.backward(tape, None, final, need_x=need_x))
    expected = tuple(one + other for one, other in zip(arrays, added, strict=True))
    assert layer.backward(tape, None, final, need_x=need_x, into=total) is total
    assert all(one is other for one, other in zip(parts(total), arrays, strict=True))
    same(total, expected)


@pytest.mark.parametrize("kind", [list, np.int8, np.uint64, np.int64, ">i4"])
def test_each_row_of_given_length_is_that_row_run_alone(cell, backend, kind):
    """y, its final state and its gradients; past its end y and grads.x are zero. Any integers, in any order."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, dtype="float64", backend=backend, seed=0)
    x, state = given(layer, 5, 4)
    lengths = [2, 5, 0, 3]
    y, final, tape = layer.forward(x, state, lengths=lengths if kind is list else np.array(lengths, kind))
    dy = np.random.default_rng(1).normal(size=y.shape)
    grads = layer.backward(tape, dy, state)
    total = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    for row, length in enumerate(lengths):
        own = slice(row, row + 1)
        y1, final1, tape1 = layer.forward(x[:length, own], rows(state, own))
        grads1 = layer.backward(tape1, dy[:length, own], rows(state, own))
        agree((y[:length, own], rows(final, own)), (y1, final1))
        agree((grads.x[:length, own], rows(grads.state, own)), (grads1.x, grads1.state))
        assert not y[length:, row].any()
        assert not grads.x[length:, row].any()
        for name, gradient in grads1.parameters.items():
            total[name] += gradient
    for name, gradient in grads.parameters.items():
        agree(gradient, total[name])


def test_a_row_of_length_zero_passes_its_state_through(cell, backend):
    """The initial state comes back, and dstate goes through to grads.state."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, backend=backend, seed=0)
    x, state = given(layer)
    y, final, tape = layer.forward(x, state, lengths=[5, 0, 5])
    grads = layer.backward(tape, y, state)
    same((rows(final, 1), rows(grads.state, 1)), (rows(state, 1), rows(state, 1)))


def test_each_piece_between_resets_is_that_piece_run_alone(cell, backend):
    """In every layer and direction; the initial state enters the first piece forward and the last in reverse."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, dtype="float64", backend=backend, seed=0)
    x, state = given(layer, 7, 2)
    resets = np.zeros((7, 2), bool)
    resets[[2, 5]] = True
    y, final, tape = layer.forward(x, state, resets=resets)
    dy = np.random.default_rng(1).normal(size=y.shape)
    grads = layer.backward(tape, dy, state)
    total = {name: np.zeros_like(array) for name, array in layer.parameters.items()}
    for first, last in ((0, 2), (2, 5), (5, 7)):
        # Index l*D + d: even forward, odd reverse. A state enters and leaves only at the ends of the sequence.
        enters = np.array([first == 0, last == 7] * 2)[:, None, None]
        leaves = np.array([last == 7, first == 0] * 2)[:, None, None]
        piece = slice(first, last)
        y1, final1, tape1 = layer.forward(x[piece], masked(state, enters))
        grads1 = layer.backward(tape1, dy[piece], masked(state, leaves))
        agree((y[piece], grads.x[piece]), (y1, grads1.x))
        agree(
            (masked(final, leaves), masked(grads.state, enters)), (masked(final1, leaves), masked(grads1.state, enters))
        )
        for name, gradient in grads1.parameters.items():
            total[name] += gradient
    for name, gradient in grads.parameters.items():
        agree(gradient, total[name])


def masked(state, where):
    """A state with zeros elsewhere."""
    return tuple(part * where for part in state) if isinstance(state, tuple) else state * where


def test_a_reset_at_the_start_drops_the_initial_state(cell, backend):
    """Its gradient is zero, forward; in reverse the same link is cut, so that the state there stays."""
    layer = rk.Recurrent(cell, 3, 4, bidirectional=True, backend=backend, seed=0)
    x, state = given(layer)
    resets = np.zeros((5, 3), bool)
    resets[0] = True
    y, final, tape = layer.forward(x, state, resets=resets)
    dropped = masked(state, np.array([False, True])[:, None, None])
    same((y, final), layer(x, dropped))
    for part in parts(layer.backward(tape, y, final).state):
        assert not part[0].any()
        assert part[1].any()


def test_a_reset_selects_and_does_not_multiply(cell, backend):
    """NaN before a reset does not pass it, in either direction nor backward."""
    layer = rk.Recurrent(cell, 3, 4, bidirectional=True, backend=backend, seed=0)
    x, _ = given(layer)
    resets = np.zeros((5, 3), bool)
    resets[2] = True
    poisoned = x.copy()
    poisoned[:2] = np.nan
    y, _, tape = layer.forward(x, resets=resets)
    other, _, other_tape = layer.forward(poisoned, resets=resets)
    same(other[2:], y[2:])
    dy = np.where(np.arange(5)[:, None, None] < 2, np.nan, y)
    same(layer.backward(other_tape, dy.astype(np.float32)).x[2:], layer.backward(tape, y).x[2:])


@pytest.mark.filterwarnings("ignore:dropout. has no effect on a single layer")
def test_dropout_is_only_in_forward_and_between_layers(cell, backend):
    """A call has none, and a single layer has none."""
    for num_layers in (1, 2):
        layer, plain = (
            rk.Recurrent(cell, 3, 16, num_layers, dropout=dropout, seed=0, backend=backend) for dropout in (0.5, 0.0)
        )
        x, _ = given(layer)
        same(layer(x), plain(x))
        y, _, _ = layer.forward(x, seed=1)
        expected, _, _ = plain.forward(x)
        assert np.array_equal(y, expected) == (num_layers == 1)


def test_dropout_masks_are_zero_or_scaled():
    """Elements are 0 with probability p, else 1/(1-p); drawn from Philox; p = 1 drops all."""
    stack = Problem("gru", H=50, num_layers=3, dtype="float64").stack
    first, second = dropout_masks(stack, 40, 30, 0.25, 5)
    assert set(np.unique(first)) == {0.0, 1 / 0.75}
    assert not np.array_equal(first, second)
    deviation = np.sqrt(0.25 * 0.75 / first.size)
    assert abs((first == 0).mean() - 0.25) < 5 * deviation
    drawn = np.random.Generator(np.random.Philox(5)).random(first.shape, np.float32)
    same(first, (drawn >= 0.25) / 0.75)
    assert not dropout_masks(stack, 2, 2, 1.0, 5)[0].any()


def test_the_same_dropout_seed_gives_the_same_bits(cell, backend):
    """seed=None draws from the layer's own generator: differently each time, reproducibly with the layer's seed."""
    layer, twin = (rk.Recurrent(cell, 3, 8, 2, dropout=0.5, seed=0, backend=backend) for _ in range(2))
    x, _ = given(layer)
    same(layer.forward(x, seed=3)[:2], layer.forward(x, seed=3)[:2])
    first, second = layer.forward(x)[0], layer.forward(x)[0]
    assert not np.array_equal(first, second)
    same((first, second), (twin.forward(x)[0], twin.forward(x)[0]))


class OnCpu:
    """Nothing but the DLPack protocol."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def misaligned(array):
    """A copy one byte off alignment."""
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    result = memory.view(array.dtype).reshape(array.shape)
    result[...] = array
    assert not result.flags.aligned
    return result


CONVERSIONS = {
    "list": np.ndarray.tolist,
    "float64": lambda x: x.astype(np.float64),
    "longdouble": lambda x: x.astype(np.longdouble),
    "float16": lambda x: x.astype(np.float16),
    "int8": lambda x: x.astype(np.int8),
    "uint64": lambda x: abs(x).astype(np.uint64),
    "bool": lambda x: x.astype(bool),
    "swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
    "reversed": lambda x: x[::-1].copy()[::-1],
    "fortran": np.asfortranarray,
    "misaligned": misaligned,
    "read_only": lambda x: np.broadcast_to(x, x.shape),
    "dlpack": OnCpu,
}


@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_whatever_casts_to_the_dtype_is_an_input(backend, dtype, convert):
    """Array-likes, other real dtypes, byte orders and layouts, and DLPack, for every argument that holds numbers."""
    layer = rk.LSTM(3, 4, dtype=dtype, backend=backend)
    generator = np.random.default_rng(0)
    x, h, c, dy = (
        generator.integers(-3, 4, size).astype(dtype) for size in ((5, 2, 3), (1, 2, 4), (1, 2, 4), (5, 2, 4))
    )
    converted = [convert(array.copy()) for array in (x, h, c, dy)]
    x, h, c, dy = (np.asarray(getattr(one, "array", one)).astype(dtype) for one in converted)
    y, state, tape = layer.forward(x, (h, c))
    y1, state1, tape1 = layer.forward(converted[0], (converted[1], converted[2]))
    same((y1, state1), (y, state))
    same(layer.backward(tape1, converted[3], (converted[1], converted[2])), layer.backward(tape, dy, (h, c)))


def test_out_receives_y(cell, backend, dtype):
    """The result is `out` itself, with the bits of a call without it."""
    layer = rk.Recurrent(cell, 3, 4, bidirectional=True, dtype=dtype, backend=backend, seed=0)
    x, state = given(layer)
    out = np.full((5, 3, 8), np.nan, dtype)
    for call in (layer, layer.freeze()):
        y, final = call(x, state, lengths=[5, 2, 0], out=out)
        assert y is out
        same((y, final), layer(x, state, lengths=[5, 2, 0]))


def test_a_frozen_layer_gives_the_bits_of_the_layer_it_was(cell, backend, dtype):
    """Also after the layer's parameters have changed."""
    layer = rk.Recurrent(cell, 3, 4, 2, bidirectional=True, dropout=0.5, dtype=dtype, backend=backend, seed=0)
    x, state = given(layer)
    resets = np.random.default_rng(1).random((5, 3)) < 0.3
    expected = layer(x, state, lengths=[5, 0, 2], resets=resets)
    frozen = layer.freeze()
    for array in layer.parameters.values():
        array[...] = np.nan
    same(frozen(x, state, lengths=[5, 0, 2], resets=resets), expected)
    assert frozen.backend == layer.backend == backend
    assert frozen.dtype == layer.dtype


@pytest.mark.parametrize("lead", [(5, 3), (1, 1), (1, 3), (5, 1), (5,), (0, 3), (5, 0)], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_frozen_call_gives_the_same_of_exact_arrays_and_of_others(cell, backend, dtype, lead, batch_first):
    """Exact arrays may go a shorter way; batched or not, with a state and `out` or without."""
    layer = rk.Recurrent(
        cell, 3, 4, 3, bidirectional=True, batch_first=batch_first, dtype=dtype, backend=backend, seed=0
    )
    generator = np.random.default_rng(0)
    x = generator.normal(size=(*lead, 3)).astype(dtype)
    frozen = layer.freeze()
    _, zeros = frozen(x)
    drawn = tuple(generator.normal(size=part.shape).astype(dtype) for part in parts(zeros))
    state = drawn if len(drawn) > 1 else drawn[0]
    for initial in (None, state):
        exact, other = frozen(x, initial), frozen(np.asfortranarray(x.astype(np.longdouble)), initial)
        same(exact, other)
        assert [part.shape for part in parts(exact)] == [part.shape for part in parts(other)]
        out = np.full_like(exact[0], np.nan)
        y, final = frozen(x, initial, out=out)
        assert y is out
        same((y, final), exact)
    for part in parts(exact):
        assert part.flags.carray
        assert not any(np.may_share_memory(part, one) for one in (x, *drawn))


def test_a_stream_is_the_sequence_step_by_step(cell, backend, dtype):
    """`step` carries the state; `state` copies it both ways; `reset` makes it zero; `gates` are of the last step."""
    layer = rk.Recurrent(cell, 3, 4, 2, dtype=dtype, backend=backend, seed=0)
    x, state = given(layer)
    frozen = layer.freeze()
    stream = frozen.stream(batch=3)
    with pytest.raises(ValueError, match="gates: expected a step before"):
        _ = stream.gates
    y, final = frozen(x, state)
    stream.state = state
    agree((np.stack([stream.step(x_t) for x_t in x]), stream.state), (y, final))
    stream.state = state  # the gates are those of the step, whatever the state is now
    gates = layer.forward(x, state)[2].gates
    assert list(stream.gates) == list(gates)
    for name, gate in stream.gates.items():
        assert not gate.flags.writeable
        agree(gate, gates[name][-1])
    for part in parts(stream.state):
        part[...] = np.nan
    stream.state = given_state = copy.deepcopy(state)
    for part in parts(given_state):
        part[...] = np.nan
    out = np.empty((3, 4), dtype)
    assert stream.step(x[0], out) is out
    agree(out, y[0])
    stream.reset()
    same(stream.state, tuple(np.zeros_like(part) for part in parts(state)))
    agree(np.stack([stream.step(x_t.tolist()) for x_t in x]), frozen(x)[0])


def test_a_stream_refuses_a_second_thread(backend):
    """While a step runs, another thread's step, look at the state or change of it raises RuntimeError."""
    stream, x_t = rk.GRU(64, 256, backend=backend).freeze().stream(64), np.ones((64, 64), np.float32)
    over = threading.Event()

    def keep_stepping():
        while not over.is_set():
            with contextlib.suppress(RuntimeError):
                stream.step(x_t)

    def refused(use):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                use()
            except RuntimeError as error:
                return str(error)
        return "never"

    thread = threading.Thread(target=keep_stepping)
    thread.start()
    try:
        for use in (lambda: stream.step(x_t), lambda: stream.state, stream.reset):
            expected = "stream: used by two threads at once; give each thread its own `frozen.stream()`"
            assert refused(use) == expected
    finally:
        over.set()
        thread.join()
    assert np.isfinite(stream.step(x_t)).all()


@pytest.mark.skipif(backends.get("native").unavailable() is not None, reason="the compiled module is missing")
@pytest.mark.parametrize("other", ["numba", "reference"])
def test_other_backends_save_in_every_way(other):
    """By the accuracy rule: sums over segments are sums of rounded numbers."""
    if (reason := backends.get(other).unavailable()) is not None:
        pytest.skip(reason)
    for name in ("lstm", "gru_reset_before"):
        problem = Problem(name, T=30, B=4, num_layers=2, dropout=0.3, lengths=True, resets=True)
        for save in SAVES[1:]:
            assert_accurate(problem, run(problem, other, save))


def test_truncated_gradients_go_back_to_the_chunk_before(cell, native):
    """With k1 = T they are the whole gradients; with k2 = 2 k1 those of both chunks as a sequence of their own."""
    problem = Problem(cell, T=12, B=3, lengths=True, resets=True, num_layers=2)
    drawn, layer = inputs(problem), layer_of(problem, native)
    state, rows = state_of(drawn.state), {"lengths": drawn.lengths, "resets": drawn.resets}
    y, _, tape = layer.forward(drawn.x, state, **rows)
    ((steps, all_of_y, backward),) = rk.tbptt(layer, drawn.x, state, k1=12, **rows)
    assert steps == slice(0, 12)
    same((all_of_y, backward(drawn.dy)), (y, layer.backward(tape, drawn.dy)))
    chunks = {}
    for steps, part, backward in rk.tbptt(layer, drawn.x, state, k1=3, k2=6, **rows):
        same(part, y[steps])
        chunks[steps.start] = backward(drawn.dy[steps])
    middle = layer(drawn.x[:3], state, lengths=np.clip(drawn.lengths, 0, 3), resets=drawn.resets[:3])[1]
    both = layer.forward(drawn.x[3:9], middle, lengths=np.clip(drawn.lengths - 3, 0, 6), resets=drawn.resets[3:9])[2]
    dy = drawn.dy[3:9].copy()
    dy[:3] = 0
    expected = layer.backward(both, dy)
    same((chunks[6].x, chunks[6].state), (expected.x[3:], expected.state))
    agree(tuple(chunks[6].parameters.values()), tuple(expected.parameters.values()))


def test_truncated_rows_end_where_those_of_a_call_do(subtests):
    """Lengths, and a seed, may be of any integers; what a call refuses is refused before the first chunk."""
    layer, x = rk.GRU(3, 4, seed=0), np.random.default_rng(0).standard_normal((20, 2, 3)).astype(np.float32)
    for dtype in (np.uint8, np.int8, np.uint64):
        lengths = np.array([3, 20], dtype)
        chunks = [part for _, part, _ in rk.tbptt(layer, x, k1=5, lengths=lengths)]
        same(np.concatenate(chunks), layer(x, lengths=lengths)[0])
    for wrong in ({"lengths": [3, 25]}, {"lengths": [-3, 20]}, {"lengths": [3]}, {"resets": np.zeros((30, 2), bool)}):
        with pytest.raises(ValueError, match="expected") as caught:
            layer(x, **wrong)
        with subtests.test(str(caught.value)), pytest.raises(ValueError, match=re.escape(str(caught.value))):
            next(rk.tbptt(layer, x, k1=5, **wrong))
    with pytest.raises(ValueError, match="lengths: expected None"):
        next(rk.tbptt(layer, x[:, 0], k1=5, lengths=[3]))
    layer = rk.GRU(3, 4, 2, dropout=0.5, seed=0)
    chunks = [[part for _, part, _ in rk.tbptt(layer, x, k1=10, seed=seed)] for seed in (np.uint8(255), 255)]
    same(*chunks)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_signal_ends_a_long_call(bidirectional):
    """Ctrl-C, or what a handler raises, comes before the last step: a call of seconds cannot be waited for."""
    layer, steps = rk.LSTM(1, 512, bidirectional=bidirectional, backend="native", seed=0), 25_000
    out = np.full((steps, 1, 512 * (1 + bidirectional)), np.nan, np.float32)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        with pytest.raises(KeyboardInterrupt):
            layer(np.zeros((steps, 1, 1), np.float32), out=out)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert np.isnan(out[-1, :, :512]).all()
    assert np.isnan(out[0, :, 512:]).all()


def test_a_bidirectional_layer_has_no_stream():
    """Its reverse direction starts at the end."""
    with pytest.raises(ValueError, match="one direction"):
        rk.GRU(3, 4, bidirectional=True).freeze().stream()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_the_functional_pair_is_a_layer_of_one_direction(cell, backend, dtype, reverse, bias, monkeypatch):
    """`reverse` is the reverse direction of a bidirectional layer; absent biases are no biases."""
    monkeypatch.setenv("RNNKERN_BACKEND", backend)
    problem = Problem(cell, dtype=dtype, bias=bias, bidirectional=True, lengths=True, resets=True)
    drawn = inputs(problem)
    expected = run(problem, backend)
    own, index = slice(reverse * problem.H, (reverse + 1) * problem.H), slice(int(reverse), reverse + 1)
    weights = drawn.weights[reverse]
    y, state, tape = rk.forward(
        cell, drawn.x, weights, state_like(cell, tuple(part[index] for part in drawn.state)),
        lengths=drawn.lengths, resets=drawn.resets, reverse=reverse,
    )  # fmt: skip
    agree((y, state), (expected["y"][..., own], *(expected[name][index] for name in CELLS[cell].states)))
    grads = rk.backward(tape, drawn.dy[..., own], state_like(cell, tuple(part[index] for part in drawn.dstate)))
    suffix = "_l0" + "_reverse" * reverse
    names = {"w_ih": "weight_ih", "w_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh"}
    assert list(grads.parameters) == list(weights)
    for name, gradient in grads.parameters.items():
        agree(gradient, expected[f"d{names.get(name, name)}{suffix}"])
    agree(grads.state, tuple(expected[f"d{name}"][index] for name in CELLS[cell].states))


def state_like(cell, state):
    """A tuple as layers take it."""
    return state if len(CELLS[cell].states) > 1 else state[0]


@pytest.mark.parametrize("given_bias", ["b_ih", "b_hh"])
def test_one_bias_alone_is_the_other_at_zero(cell, backend, given_bias, monkeypatch):
    """Only the given one has a gradient."""
    monkeypatch.setenv("RNNKERN_BACKEND", backend)
    problem = Problem(cell)
    drawn = inputs(problem)
    both = dict(drawn.weights[0])
    other = "b_hh" if given_bias == "b_ih" else "b_ih"
    both[other] = np.zeros_like(both[other])
    alone = {name: array for name, array in both.items() if name != other}
    y, state, tape = rk.forward(cell, drawn.x, alone)
    same((y, state), rk.forward(cell, drawn.x, both)[:2])
    assert set(rk.backward(tape, y).parameters) == set(alone)


def test_the_functional_pair_projects(backend, monkeypatch):
    """w_hr (P, H) beside w_hh (G*H, P) is a projection."""
    monkeypatch.setenv("RNNKERN_BACKEND", backend)
    problem = Problem("lstm", proj_size=2)
    drawn = inputs(problem)
    y, state, tape = rk.forward("lstm", drawn.x, drawn.weights[0], drawn.state)
    expected = run(problem, backend)
    same((y, state), (expected["y"], expected["h"], expected["c"]))
    same(rk.backward(tape, drawn.dy, drawn.dstate).parameters["w_hr"], expected["dweight_hr_l0"])


def test_a_named_backend_is_used_or_refused(monkeypatch):
    """BackendUnavailableError says why and what mends it."""
    monkeypatch.setattr(backends.get("reference"), "unavailable", lambda: "gone; `pip install it`")
    with pytest.raises(rk.BackendUnavailableError, match=r"'reference'.*gone; `pip install it`"):
        rk.GRU(3, 4, backend="reference")


def test_auto_takes_the_best_and_warns_once_when_it_steps_down(monkeypatch):
    """And the environment variable RNNKERN_BACKEND names it."""
    monkeypatch.delenv("RNNKERN_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_stepped_down", False)
    monkeypatch.setattr(backends, "AUTOMATIC", ("reference",))
    assert rk.GRU(3, 4).backend == "reference"
    real = backends.get

    def get(name):
        if name == "native":
            return types.SimpleNamespace(unavailable=lambda: "no compiler")
        return real(name)

    monkeypatch.setattr(backends, "get", get)
    monkeypatch.setattr(backends, "AUTOMATIC", ("native", "reference"))
    with pytest.warns(UserWarning, match="'reference', because native: no compiler") as warned:
        assert rk.GRU(3, 4).backend == "reference"
    assert [one.filename for one in warned] == [__file__]
    assert rk.GRU(3, 4).backend == "reference"
    monkeypatch.setenv("RNNKERN_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="nonsense"):
        rk.GRU(3, 4)


PRINTED = [
    (lambda: rk.RNN(3, 4), "RNN(3, 4)"),
    (lambda: rk.RNN(3, 4, nonlinearity="relu"), "RNN(3, 4, nonlinearity='relu')"),
    (
        lambda: rk.LSTM(3, 4, 2, proj_size=2, dtype="float64"),
        "LSTM(3, 4, num_layers=2, proj_size=2, dtype='float64')",
    ),
    (lambda: rk.GRU(3, 4, batch_first=True, reset_after=False), "GRU(3, 4, batch_first=True, reset_after=False)"),
    (lambda: rk.Recurrent("gru", 3, 4, bias=False), "Recurrent('gru', 3, 4, bias=False)"),
    (lambda: rk.GRU(3, 4, backend="reference").freeze(), "GRU(3, 4, backend='reference').freeze()"),
    (lambda: rk.GRU(3, 4).freeze().stream(2), "GRU(3, 4).freeze().stream(batch=2)"),
]


def test_layers_print_as_the_call_that_makes_them(subtests):
    """Without the options left at their defaults, as in torch."""
    for layer, text in PRINTED:
        with subtests.test(text):
            assert repr(layer()) == text


@pytest.mark.parametrize("layer", [rk.RNN, rk.LSTM, rk.GRU])
def test_the_help_of_a_layer_describes_its_parameters(layer):
    """Each once, of its own and of `Recurrent`, in the order of the call; and no others."""
    section = inspect.getdoc(layer).partition("Parameters\n----------\n")[2].partition("\n\nRaises\n")[0]
    names = [name for line in section.split("\n") if not line.startswith(" ") for name in line.split(", ")]
    assert names == list(inspect.signature(layer).parameters)
    assert "See `Recurrent`" not in layer.__doc__


def test_tapes_and_gradients_print_their_sizes():
    """And not their arrays."""
    layer = rk.LSTM(3, 4, backend="reference")
    y, _, tape = layer.forward(np.zeros((5, 2, 3)))
    assert repr(tape) == "Tape(lstm, T=5, B=2, float32, reference)"
    assert repr(layer.backward(tape, y)).startswith("Grads(x: (5, 2, 3), state: ((1, 2, 4), (1, 2, 4)), parameters: ")


def test_a_call_keeps_nothing_for_backward(monkeypatch, backend):
    """It packs for inference, where a backend does both in one, too."""
    module, seen = backends.get(backend), []
    name = "run" if hasattr(module, "run") else "forward"
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: seen.append(original(*given)) or seen[-1])
    rk.LSTM(3, 4, backend=backend, seed=0)(np.ones((5, 2, 3)))
    assert [results[-1] for results in seen] == [None]
