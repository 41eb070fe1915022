"""Sequential and the files of models: derivatives, the bits of the pieces, ends of rows, streams, copies."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.sequential import derived_seed

T, B = 6, 4
LENGTHS = [6, 0, 3, 5]


def tagger(dtype: str = "float32", **options: Any) -> rk.Sequential:
    """Symbols in, scores for each step out."""
    return rk.Sequential(
        rk.Embedding(9, 3, dtype=dtype, seed=0),
        rk.LSTM(3, 4, 2, dropout=0.3, dtype=dtype, seed=1, **options),
        rk.Dropout(0.4),
        rk.Linear(8 if options.get("bidirectional") else 4, 2, dtype=dtype, seed=2),
    )


def judge(dtype: str = "float32", batch_first: bool = False, bidirectional: bool = False) -> rk.Sequential:
    """Features in, one answer for each sequence out, by two layers with something between them."""
    return rk.Sequential(
        rk.Linear(3, 5, dtype=dtype, seed=0),
        rk.GRU(5, 4, batch_first=batch_first, dtype=dtype, seed=1),
        rk.Linear(4, 3, bias=False, dtype=dtype, seed=2),
        rk.RNN(3, 4, batch_first=batch_first, bidirectional=bidirectional, dtype=dtype, seed=3),
        rk.Dropout(0.4),
        rk.Last(batch_first, bidirectional),
        rk.Linear(8 if bidirectional else 4, 2, dtype=dtype, seed=4),
    )


def inputs(model: rk.Sequential, *leading: int) -> Any:
    """x with these leading dimensions."""
    random = np.random.default_rng(5)
    if isinstance(model.pieces[0], rk.Embedding):
        return random.integers(9, size=leading)
    return random.standard_normal((*leading, 3)).astype(model.dtype)


def flat(state: Any) -> list[np.ndarray]:
    """The arrays of a state."""
    return [array for one in state for array in flat(one)] if isinstance(state, tuple) else [state]


def same(ours: Any, theirs: Any) -> None:
    """Two nests of arrays have the same bits."""
    ours, theirs = flat(ours), flat(theirs)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other, strict=True)


CASES: dict[str, tuple[Callable[[], rk.Sequential], tuple[int, ...], bool]] = {
    "tagger": (lambda: tagger("float64"), (T, B), True),
    "unbatched": (lambda: tagger("float64"), (T,), False),
    "bidirectional": (lambda: tagger("float64", bidirectional=True, batch_first=True), (B, T), True),
    "judge": (lambda: judge("float64"), (T, B), True),
    "judge_batch_first": (lambda: judge("float64", True, True), (B, T), True),
    "judge_unbatched": (lambda: judge("float64", False, True), (T,), False),
}


@pytest.mark.parametrize(("make", "leading", "ragged"), CASES.values(), ids=CASES.keys())
def test_a_sequential_has_its_derivatives(make: Any, leading: tuple[int, ...], ragged: bool) -> None:
    """Of x, of every parameter and every initial state, with dropout, lengths and resets: by differences of forward."""
    model, random = make(), np.random.default_rng(1)
    x = inputs(model, *leading)
    options: dict[str, Any] = {"lengths": LENGTHS} if ragged else {}
    options |= {"resets": random.random(leading) < 0.2, "seed": 7}

    def like(value: Any) -> Any:
        return tuple(map(like, value)) if isinstance(value, tuple) else random.standard_normal(value.shape)

    y, state, _ = model.forward(x, **options)
    initial, dy, dstate = like(state), like(y), like(state)

    def value() -> float:
        y, state, _ = model.forward(x, initial, **options)
        return float((y * dy).sum() + sum((a * b).sum() for a, b in zip(flat(state), flat(dstate), strict=True)))

    grads = model.backward(model.forward(x, initial, **options)[2], dy, dstate)
    pairs = [(model.parameters[name], grads.parameters[name]) for name in model.parameters]
    pairs += list(zip(flat(initial), flat(grads.state), strict=True))
    if x.dtype.kind == "f":
        pairs.append((x, grads.x))
    for array, gradient in pairs:
        before, direction = array.copy(), random.standard_normal(array.shape)
        differences = []
        for h in (1e-3, 2e-3):
            ends = []
            for sign in (1, -1):
                array[...] = before + sign * h * direction
                ends.append(value())
            differences.append((ends[0] - ends[1]) / (2 * h))
        array[...] = before
        expected = (4 * differences[0] - differences[1]) / 3  # Richardson: the error is of the order h^4
        assert (gradient * direction).sum() == pytest.approx(expected, rel=1e-8, abs=1e-8)


def test_a_sequential_computes_the_bits_of_its_pieces() -> None:
    """In a call, in forward, whose masks come from one seed, and backward, whatever is asked for."""
    model, x = tagger(), inputs(tagger(), T, B)
    embedding, layer, dropout, head = model.pieces
    options: dict[str, Any] = {"lengths": LENGTHS, "resets": np.eye(T, B, dtype=bool)}
    inner, state = layer(embedding(x), **options)
    counts = np.arange(T)[:, None] < LENGTHS
    same(model(x, **options), (np.where(counts[..., None], head(inner), np.float32(0)), (state,)))

    y, (state,), tape = model.forward(x, seed=3)
    vectors, embedding_tape = embedding.forward(x)
    inner, inner_state, layer_tape = layer.forward(vectors, seed=derived_seed(3, 1))
    dropped, dropout_tape = dropout.forward(inner, seed=derived_seed(3, 2))
    scores, head_tape = head.forward(dropped)
    same((y, state), (scores, inner_state))
    assert not y.flags.writeable
    dy, dstate = np.cos(y), tuple(map(np.sin, state))
    of_head = head.backward(head_tape, dy)
    of_layer = layer.backward(layer_tape, dropout.backward(dropout_tape, of_head.x).x, dstate)
    expected = dict(embedding.backward(embedding_tape, of_layer.x).parameters)
    expected = {"0.weight": expected["weight"]} | {f"1.{name}": one for name, one in of_layer.parameters.items()}
    expected |= {f"3.{name}": one for name, one in of_head.parameters.items()}
    grads = model.backward(tape, dy, (dstate,))
    assert list(grads.parameters) == list(expected) == list(model.parameters)
    same((*grads.parameters.values(), grads.state), (*expected.values(), (of_layer.state,)))
    assert grads.x is None

    names = ["1.weight_hh_l1", "3.bias"]
    some = model.backward(tape, dy, (dstate,), parameters=names)
    assert list(some.parameters) == names
    same((*some.parameters.values(), some.state), (*(expected[name] for name in names), grads.state))
    twice = copy.deepcopy(grads)
    assert model.backward(tape, dy, (dstate,), into=twice) is twice
    same(tuple(twice.parameters.values()), tuple(2 * one for one in expected.values()))
    same(model.backward(tape, None, (dstate,)).state, model.backward(tape, np.zeros_like(y), (dstate,)).state)


@pytest.mark.parametrize("make", [tagger, judge])
def test_past_the_end_of_a_row_nothing_is_read(make: Any) -> None:
    """A row of a batch has the bits of that row alone, in both layouts; NaN and unknown symbols past its end, and in dy
    there, change nothing; y and dx are zero there.
    """
    model, first = make(), make(batch_first=True)
    x, dy = inputs(model, T, B), np.ones((T, B, 2), np.float32)
    dy = dy[0] if model.many_to_one else dy
    clean = [model.backward(model.forward(x, lengths=LENGTHS, seed=2)[2], dy), model(x, lengths=LENGTHS)]
    for row, length in enumerate(LENGTHS):
        alone, _ = model(x[:length, row : row + 1])
        if length:
            y = clean[1][0]
            same(y[row : row + 1] if model.many_to_one else y[:length, row : row + 1], alone)
        if not model.many_to_one:
            dy[length:, row] = np.nan
            assert not clean[1][0][length:, row].any()
        x[length:, row] = -1 if x.dtype.kind == "i" else np.nan
    y, _, tape = model.forward(x, lengths=LENGTHS, seed=2)
    grads = model.backward(tape, dy)
    same((*grads.parameters.values(), grads.state), (*clean[0].parameters.values(), clean[0].state))
    if grads.x is not None:
        same(grads.x, clean[0].x)
        assert not grads.x[np.arange(T)[:, None] >= LENGTHS].any()
    same(model(x, lengths=LENGTHS), clean[1])
    y, state = first(x.swapaxes(0, 1), lengths=LENGTHS)
    same((y if first.many_to_one else y.swapaxes(0, 1), state), clean[1])


def test_a_stream_has_the_bits_of_the_call() -> None:
    """Frozen, whole or step by step; the state goes on, in copies too; with `Last` each step is the answer so far."""
    for model in (tagger(), judge()):
        x, frozen = inputs(model, T, B), model.freeze()
        y, state = model(x)
        same(frozen(x), (y, state))
        before = pickle.loads(pickle.dumps(frozen))
        model.load_state_dict({name: 0 * one for name, one in model.parameters.items()})
        same(before(x), frozen(x))
        stream = frozen.stream(batch=B)
        steps = [stream.step(x[t]) for t in range(3)]
        twin = copy.copy(stream)
        steps += [stream.step(x[t]) for t in range(3, T)]
        same([twin.step(x[t]) for t in range(3, T)][-1], steps[-1])
        same((steps[-1] if model.many_to_one else np.stack(steps), stream.state), (y, state))
        same(steps[2], frozen(x[:3])[0][... if model.many_to_one else -1])
        stream.state = frozen(x[:5])[1]
        same(stream.step(x[5]), steps[5])
        stream.reset()
        same(stream.step(x[0]), steps[0])
        with pytest.raises(ValueError, match="state"):
            stream.state = (*stream.state[:-1], (np.zeros(3),) * 2)
        same(stream.step(x[1]), steps[1])
        for wrong in (np.empty(steps[0].shape, "float16"), x[2], steps[0][:1]):
            with pytest.raises((TypeError, ValueError), match="out: expected writable, C-contiguous"):
                stream.step(x[2], out=wrong)
        out = np.empty_like(steps[2])
        assert stream.step(x[2], out) is out
        same(out, steps[2])
    assert "bfloat16" in repr(tagger().freeze("bfloat16").stream()._streams)


def test_a_copied_sequential_stays_connected_with_its_optimizer() -> None:
    """In each copy what the optimizer writes reaches the pieces and the model, and the original stays as it was."""
    model = tagger()
    optimizer, x = rk.Adam(model, lr=0.1), inputs(model, T, B)
    before = model(x)[0]
    for duplicate in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        twin, other = duplicate((model, optimizer))
        same(twin(x), model(x))
        assert repr(twin) == repr(model)
        y, _, tape = twin.forward(x)
        other.step(twin.backward(tape, y))
        assert not np.array_equal(twin(x)[0], before)
        same(twin.pieces[1].parameters["weight_hh_l0"], twin.parameters["1.weight_hh_l0"])
        same(model(x)[0], before)
    same(copy.copy(model)(x), model(x))
    with pytest.raises(TypeError, match="tape: cannot be copied"):
        pickle.dumps(tape)


def test_pieces_that_do_not_fit_are_refused_by_name() -> None:
    """When they are put together; both are named."""
    gru, linear = rk.GRU(3, 4), rk.Linear(4, 2)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((), "pieces: expected an Embedding, a Linear or a recurrent layer, got 0"),
        ((gru, 3), r"pieces\[1\]: expected Embedding, .* or Linear, got int 3"),
        ((gru, gru), r"pieces\[1\]: expected each piece once, got GRU\(3, 4\) again"),
        ((gru, rk.Embedding(4, 2)), r"expected an Embedding in the first place alone, got Embedding\(4, 2\) there"),
        (([gru, linear],), r"pieces\[0\]: expected .*, got a list; give its elements, \*pieces"),
        ((rk.Sequential(gru), linear), r"got a Sequential; give its pieces, \*model.pieces"),
        ((gru, rk.Linear(5, 2)), r"Linear\(5, 2\): expected 4 features, as pieces\[0\], GRU\(3, 4\) gives, got 5"),
        (
            (gru, rk.Dropout(), rk.Linear(4, 2, dtype="float64")),
            r"pieces\[2\], Linear\(.*\): expected float32, as of pieces\[0\], GRU\(3, 4\), got float64",
        ),
        (
            (gru, rk.Last(), rk.GRU(4, 4)),
            r"pieces\[2\], GRU\(4, 4\): expected no piece that goes over steps after .*Last",
        ),
        (
            (gru, rk.Last(batch_first=True)),
            r"Last\(batch_first=True\): expected batch_first=False, as of pieces\[0\], GRU",
        ),
        ((rk.GRU(3, 4, bidirectional=True), rk.Last()), r"Last\(\): expected bidirectional=True, as of GRU"),
        ((gru, rk.Last(bidirectional=True)), r"expected bidirectional=False, as of GRU\(3, 4\), got True"),
    ]
    for pieces, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            rk.Sequential(*pieces)


def test_calls_name_what_is_wrong() -> None:
    """The argument, and in a note the piece."""
    model, dense = tagger(), rk.Sequential(rk.Linear(3, 2))
    x = inputs(model, T, B)
    y, state, tape = model.forward(x)
    calls: list[tuple[Callable[[], Any], str]] = [
        (lambda: model(x, state[0]), "state: expected a tuple of 1, one for each recurrent layer, got 2 elements"),
        (lambda: model(x, (3,)), r"state: expected a tuple \(h, c\), got int 3"),
        (lambda: model(x[:, 0], lengths=[3]), r"lengths: expected None where x has no steps and rows, got x of shape"),
        (lambda: model(x, lengths=[9, 0, 0, 0]), "lengths: expected values from 0 to 6"),
        (lambda: dense(np.ones((2, 3)), resets=[True, False]), "resets: expected None without a recurrent layer"),
        (lambda: model.forward(x, seed=-1), "seed: expected an integer >= 0"),
        (lambda: model.backward(tape, y[0]), r"dy: expected float32 of shape \(6, 4, 2\), got"),
        (lambda: model.backward(state, y), "tape: expected the tape that forward returned, got tuple"),
        (lambda: tagger().backward(tape, y), "tape: expected a tape of Sequential.*, got one of another model"),
        (lambda: model.backward(tape, y, parameters=["weight"]), "parameters: expected names from 0.weight, "),
        (lambda: model.backward(tape, y, into=model.backward(tape, y, parameters=False)), "into.parameters"),
        (lambda: dense.freeze().stream(), r"stream: expected a recurrent layer, got Sequential\(Linear"),
        (lambda: tagger(bidirectional=True).freeze().stream(), "stream: expected a layer of one direction"),
        (lambda: model.load_state_dict({}), "mapping: expected the names 0.weight, 1.weight_ih_l0"),
    ]
    for call, message in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    with pytest.raises(TypeError) as caught:
        model(x, (3,))
    assert caught.value.__notes__ == ["in pieces[1], LSTM(3, 4, num_layers=2, dropout=0.3)"]


def test_last_of_both_directions_is_the_final_state() -> None:
    """In each layout, for a row of no steps zero; without steps zero."""
    for batch_first in (False, True):
        layer, last = rk.GRU(2, 3, batch_first=batch_first, bidirectional=True, seed=0), rk.Last(batch_first, True)
        x = np.random.default_rng(0).standard_normal((B, T, 2) if batch_first else (T, B, 2))
        y, h = layer(x, lengths=LENGTHS)
        same(last(y, lengths=LENGTHS), np.concatenate([h[0], h[1]], axis=1))
        y, h = layer(x[0])
        same(last(y), np.concatenate([h[0], h[1]]))
        same(last(y[:0]), np.zeros(6, np.float32))


MODELS: list[Callable[[], Any]] = [
    tagger,
    lambda: judge("float64", True, True),
    lambda: rk.LSTM(3, 4, proj_size=2, bias=False, seed=0),
    lambda: rk.GRU(3, 4, reset_after=False, dtype="float64", backend="reference", seed=0),
    lambda: rk.RNN(3, 4, nonlinearity="relu", seed=0),
    lambda: rk.Recurrent("lstm_peephole", 3, 4, bidirectional=True, seed=0),
    lambda: rk.Linear(3, 2, bias=False, seed=0),
    lambda: rk.Embedding(9, 3, seed=0),
]


def test_a_saved_model_comes_back(tmp_path: Path) -> None:
    """Configuration and bits; the names in the file are those of `state_dict`, so that others read it."""
    suffixes = ["npz", "safetensors"] if importlib.util.find_spec("safetensors") else ["npz"]
    for suffix, (index, make) in product(suffixes, enumerate(MODELS)):
        model, path = make(), tmp_path / f"{index}.{suffix}"
        rk.save_model(path, model)
        loaded = rk.load_model(path)
        assert type(loaded) is type(model)
        assert repr(loaded) == repr(model)
        same(tuple(loaded.parameters.values()), tuple(model.parameters.values()))
        assert set(rk.load(path)) == {"model", *model.state_dict()}
        assert all(array.flags.carray for array in loaded.parameters.values())
    assert rk.load_model(tmp_path / "3.npz").backend == "reference"


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    """With an error that names the file, before anything large is made and without anything being executed."""
    path = tmp_path / "model.npz"
    layer = rk.GRU(3, 4, seed=0)
    good = layer.state_dict()

    def described(**changes: Any) -> dict[str, Any]:
        return {"class": "GRU", "arguments": {"input_size": 3, "hidden_size": 4} | changes}

    wrong: list[tuple[dict[str, Any], str]] = [
        (good, "without a configuration: make the model and give model.load_state_dict what rnnkern.load"),
        ({"model": 3} | good, "int"),
        ({"model": {"class": "os.system", "arguments": {}}} | good, "class: expected RNN, .* got 'os.system'"),
        ({"model": np.float32(3)} | good, "invalid index"),
        ({"model": {"class": ["GRU"], "arguments": {}}} | good, "list"),
        ({"model": {"class": "GRU"}} | good, "arguments"),
        (
            {"model": described(hidden_size=10**6)} | good,
            "expected parameters of at most 432 bytes, got sizes that make",
        ),
        (
            {"model": described(num_layers=10**9)} | good,
            "expected parameters of at most 432 bytes, got sizes that make",
        ),
        ({"model": described(hidden_size=10**400)} | good, "expected parameters of at most 432 bytes"),
        ({"model": described(hidden_size=2)} | good, "expected float32 of shape"),
        ({"model": described(nonsense=1)} | good, "nonsense"),
        ({"model": described(dtype="(1,")} | good, "never closed"),
        ({"model": described(dtype=["f4"])} | good, "dtype"),
        ({"model": described(dropout="x")} | good, "dropout: expected a number"),
        ({"model": described()} | {"w": np.ones(3)} | good, "unknown w"),
        ({"model": {"class": "Sequential", "pieces": 4}} | good, "int"),
        ({"model": {"class": "Sequential", "pieces": {"class": "GRU"}}} | good, ""),
        ({"model": {"class": "Sequential", "pieces": [{"class": "Sequential", "pieces": []}]}}, "without 'arguments'"),
        ({"model": {"class": "Sequential", "pieces": [described()]}} | good, "weight_ih_l0"),
        (
            {"model": {"class": "Embedding", "arguments": {"num_embeddings": 10**9, "embedding_dim": 9}}},
            "at most 0 bytes",
        ),
        ({"model": {"class": "Linear", "arguments": {"in_features": 10**9, "out_features": 9}}}, "at most 0 bytes"),
    ]
    for state, message in wrong:
        rk.save(path, state)
        with pytest.raises(ValueError, match=f"{path.name}: expected a file written by rnnkern.save_model.*{message}"):
            rk.load_model(path)
    rk.save_model(path, layer)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"expected a whole file written by rnnkern\.save"):
        rk.load_model(path)

    class Own(rk.GRU):
        pass

    for model in (Own(3, 4), layer.freeze(), rk.Sequential(Own(3, 4)), {"weight": np.ones(3)}):
        with pytest.raises(TypeError, match=r"model: expected RNN, LSTM, .* or Sequential, got"):
            rk.save_model(path, model)
