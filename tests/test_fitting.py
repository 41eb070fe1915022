"""`fit`: the steps of a loop written by hand, checkpoints, early stopping, Ctrl-C, what it says."""

from __future__ import annotations

import copy
import io
import signal
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern.sequential import derived_seed

T, N = 7, 12
RANDOM = np.random.default_rng(3)
X = RANDOM.standard_normal((T, N, 2)).astype(np.float32)
TARGET = RANDOM.integers(3, size=(T, N))
LENGTHS = RANDOM.integers(1, T + 1, size=N)
RESETS = RANDOM.random((T, N)) < 0.3


def model_of(*, last: bool = False) -> rk.Sequential:
    """A small model with dropout."""
    pieces = [rk.GRU(2, 5, seed=0), rk.Dropout(0.2), rk.Last(), rk.Linear(5, 3, seed=1)]
    return rk.Sequential(*(one for one in pieces if last or not isinstance(one, rk.Last)))


def batches(epoch: int, resets: bool = False) -> Iterator[tuple[Any, ...]]:
    """Three of an epoch, in an order of its own."""
    for part in np.array_split(np.random.default_rng(epoch).permutation(N), 3):
        yield X[:, part], TARGET[:, part], LENGTHS[part], *([RESETS[:, part]] if resets else [])


def values(model: Any) -> list[Any]:
    """All parameters, to be compared bit by bit."""
    return [array.tolist() for array in model.parameters.values()]


def training(model: rk.Sequential, epochs: int, **options: Any) -> rk.History:
    """With all that has a state."""
    optimizer = rk.AdamW(model, lr=0.05)
    schedule = rk.CosineSchedule(optimizer, total_steps=30)
    options = {"metrics": {"accuracy": lambda y, target: (y.argmax(-1) == target).mean()}} | options
    return rk.fit(
        model, batches, loss=rk.cross_entropy, epochs=epochs, optimizer=optimizer, schedule=schedule, max_norm=0.5,
        validation=[(X, TARGET, LENGTHS)], **options,
    )  # fmt: skip


def test_fit_takes_the_steps_of_a_loop_by_hand() -> None:
    """To the same bits, carrying the state or not, with resets; losses are means by rows, metrics see no padding."""
    for carry, resets in ((False, None), (True, None), (True, RESETS)):
        data = partial(batches, resets=resets is not None)
        model, own = model_of(), model_of()
        optimizer, losses, steps = rk.SGD(own, lr=0.1), [], 0
        for epoch in range(2):
            state, total = None, 0.0
            for x, target, lengths, *cut in data(epoch):
                seed, cuts = derived_seed(9, steps), cut[0] if cut else None
                y, state, tape = own.forward(x, state if carry else None, lengths=lengths, resets=cuts, seed=seed)
                loss, dy = rk.cross_entropy(y, target, lengths)
                grads = own.backward(tape, dy)
                rk.clip_grad_norm(grads, 0.5)
                optimizer.step(grads)
                total, steps = total + loss * lengths.sum(), steps + 1
            losses.append(total / LENGTHS.sum())
        seen = []
        history = rk.fit(
            model, data, loss=rk.cross_entropy, epochs=2, optimizer=rk.SGD(model, lr=0.1), max_norm=0.5, seed=9,
            carry_state=carry, validation=[(X, TARGET, LENGTHS, resets)],
            metrics={"rows": lambda y, target, seen=seen: seen.append(y) or len(target)},
        )  # fmt: skip
        assert history.best_epoch == 1
        assert values(model) == values(own)
        assert history.loss == pytest.approx(losses, rel=1e-12)
        y, _ = model(X, lengths=LENGTHS, resets=resets)
        np.testing.assert_array_equal(seen[1], y[np.arange(T)[:, None] < LENGTHS])
        assert history.metrics == {"rows": [LENGTHS.sum()] * 2}
        assert history.validation_loss[1] == rk.cross_entropy(y, TARGET, LENGTHS)[0]
        assert history.ended == "all epochs"


def test_a_resumed_training_has_the_bits_of_one_that_went_through(tmp_path: Path) -> None:
    """Weights, losses, learning rates and metrics; also where the seed was drawn."""
    for seed in (4, None):
        path, whole, part = tmp_path / f"{seed}.npz", model_of(), model_of()
        first = training(part, 2, seed=seed, checkpoint=path, resume=True)
        drawn = rk.load(path)["seed"]
        expected = training(whole, 5, seed=drawn)
        part = model_of()  # another process
        history = training(part, 5, seed=seed, checkpoint=path, resume=True)
        assert values(part) == values(whole)
        assert history.seconds[:2] == first.seconds
        expected.seconds = history.seconds
        assert history == expected
        again = training(model_of(), 5, seed=seed, checkpoint=path, resume=True)
        assert again == history
    for options, message in (({"seed": 5}, "with the seed"), ({"metrics": None}, "other metrics")):
        with pytest.raises(ValueError, match=f"checkpoint .*{path.name}: expected one of this training: .*{message}"):
            training(model_of(), 6, checkpoint=path, resume=True, **options)


def test_training_ends_early_with_the_best_weights() -> None:
    """`patience` epochs after the best one, whose validation loss the model has again; a plateau sees that loss."""
    model = model_of(last=True)
    optimizer = rk.Adam(model, lr=0.1)
    schedule = rk.PlateauSchedule(optimizer, factor=0.5, patience=0)
    labels = TARGET[0]
    validation = [(X[:, 8:], labels[8:], LENGTHS[8:])]
    data = [(X[:, :8], labels[:8], LENGTHS[:8])]
    history = rk.fit(
        model, data, loss=rk.cross_entropy, epochs=200, schedule=schedule, validation=validation, patience=3, seed=0
    )
    best = history.best_epoch
    assert best is not None
    assert len(history.loss) == len(history.lr) == len(history.seconds) == best + 4
    assert history.ended == "no better validation for 3 epochs"
    assert history.validation_loss[best] == min(history.validation_loss)
    y, _ = model(*validation[0][:1], lengths=validation[0][2])
    assert rk.cross_entropy(y, validation[0][1])[0] == history.validation_loss[best]
    assert history.lr[-1] < 0.1
    assert f"in epoch {best + 1}" in str(history)

    def in_one_array(_: int) -> Iterator[tuple[Any, ...]]:
        target = np.empty(2, labels.dtype)
        for at in (8, 10):
            target[:] = labels[at : at + 2]
            yield X[:, at : at + 2], target, LENGTHS[at : at + 2]

    seen: list[list[int]] = []
    metrics = {"none": lambda _, target: seen.append(target.tolist()) or 0.0}
    rk.fit(model, data, loss=rk.cross_entropy, epochs=1, validation=in_one_array, metrics=metrics)
    assert seen == [labels[8:].tolist()]


def test_ctrl_c_ends_after_the_step_and_keeps_the_best_weights() -> None:
    """A second one raises KeyboardInterrupt; what a program does of its own on the signal stays."""
    model, taken = model_of(), []
    calls = iter(range(100))

    def loss(y: Any, target: Any, lengths: Any) -> tuple[float, Any]:
        number = next(calls)
        if number == 10:  # three steps and a validation an epoch
            signal.raise_signal(signal.SIGINT)
        taken.append(number)
        return rk.cross_entropy(y, target, lengths)

    before = signal.getsignal(signal.SIGINT)
    optimizer = rk.Adam(model)
    history = rk.fit(
        model, batches, loss=loss, epochs=50, optimizer=optimizer, validation=[(X, TARGET, LENGTHS)], seed=0
    )
    assert history.ended == "interrupted in epoch 3"
    assert (len(history.loss), len(taken), optimizer.steps) == (2, 11, 9)
    assert signal.getsignal(signal.SIGINT) is before
    again = model_of()
    expected = rk.fit(again, batches, loss=rk.cross_entropy, epochs=2, validation=[(X, TARGET, LENGTHS)], seed=0)
    assert values(model) == values(again)
    assert history.validation_loss == expected.validation_loss

    def impatient(*_: Any, **__: Any) -> tuple[float, Any]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        rk.fit(model, batches, loss=impatient, epochs=1)
    assert signal.getsignal(signal.SIGINT) is before
    results = []
    thread = threading.Thread(
        target=lambda: results.append(rk.fit(model_of(), batches, loss=rk.cross_entropy, epochs=1))
    )
    thread.start()
    thread.join()
    assert results[0].ended == "all epochs"


def test_fit_shows_progress_where_it_is_asked_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in a pipe or without a stdout; a single layer is a model too, its batches may be of either layout."""
    layer = rk.LSTM(2, 3, batch_first=True, seed=0)
    data = [(X.swapaxes(0, 1), np.zeros((N, T, 3)), LENGTHS)]
    rk.fit(layer, data, loss=rk.mse, epochs=2)
    assert capsys.readouterr().out == ""
    history = rk.fit(layer, data, loss=rk.mse, epochs=2, validation=data, verbose=True)
    assert history.loss[1] < history.loss[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("epoch 1/2  step 1  loss 0.")
    assert lines[-1] == str(history)
    assert lines[-1].startswith("all epochs: training loss 0.")
    closed = io.StringIO()
    closed.close()
    for stdout, verbose in ((None, None), (None, True), (closed, None), (closed, True), (object(), None)):
        monkeypatch.setattr("sys.stdout", stdout)
        assert rk.fit(layer, data, loss=rk.mse, epochs=1, verbose=verbose).ended == "all epochs"


def test_fit_names_what_is_wrong(tmp_path: Path) -> None:
    """Before it trains, or at the batch."""
    model, single = model_of(), [(X, TARGET)]
    optimizer = rk.Adam(model)
    sequences = [np.ones((3, 2))]
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": rk.Linear(2, 3)}, r"model: expected Sequential or a recurrent layer, got Linear"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"optimizer": rk.Adam(copy.deepcopy(model))}, r"optimizer: expected one of the parameters of the model"),
        ({"optimizer": rk.Adam(list(model.pieces))}, r"optimizer: expected one of the parameters of the model"),
        (
            {"optimizer": rk.Adam(model), "schedule": rk.StepSchedule(optimizer, 3)},
            "schedule: expected one of the optim",
        ),
        ({"patience": 3}, "patience: expected None without validation"),
        ({"metrics": {"a": len}}, "metrics: expected None without validation"),
        ({"max_norm": 0}, "max_norm: expected a finite number > 0, got 0"),
        ({"resume": True}, "checkpoint: expected a path to resume from, got None"),
        ({"data": iter(single)}, "data: expected a list or a function of the epoch, .* got list_iterator"),
        ({"data": (X, TARGET)}, r"data: expected batches \(x, target\) .*got float32 of shape .* is \[\(x, target\)\]"),
        ({"data": []}, "data: expected at least one batch, got none in epoch 0"),
        ({"data": lambda epoch: rk.data.batches(sequences, 1, seed=epoch)}, "give x, labels.indices., lengths"),
        ({"validation": [(X,)]}, r"validation: expected batches \(x, target\) .*, got tuple"),
        ({"data": [(X, [[1, 2], [1]])]}, "target: expected an array, got list: .* rnnkern.data.pad makes one array"),
        ({"data": [(X[:, :0], TARGET[:, :0])]}, "data: expected batches with rows, got only empty ones in epoch 0"),
        ({"validation": [(X[:, :0], TARGET[:, :0])]}, "validation: expected batches with rows, got only"),
        ({"loss": "mse"}, "loss: expected a function, such as rnnkern.mse, got str 'mse'"),
        ({"loss": lambda y, _: y.mean()}, "loss: expected a function that returns the loss and its gradient, got"),
        ({"optimizer": "adam"}, r"optimizer: expected one such as rnnkern.Adam\(model\), got str 'adam'"),
        ({"schedule": "cosine"}, "schedule: expected one of rnnkern, such as CosineSchedule, got str 'cosine'"),
        ({"metrics": ["accuracy"], "validation": single}, "metrics: expected a mapping of names to func.* got list"),
    ]
    for changes, message in cases:
        arguments = {"model": model, "data": single, "loss": rk.cross_entropy, "epochs": 1} | changes
        with pytest.raises((TypeError, ValueError), match=message):
            rk.fit(arguments.pop("model"), arguments.pop("data"), **arguments)
    rk.save(tmp_path / "other.npz", {"a": 1})
    with pytest.raises(ValueError, match=r"other\.npz: expected one of this training"):
        rk.fit(model, single, loss=rk.cross_entropy, epochs=1, checkpoint=tmp_path / "other.npz", resume=True)
    written, other = tmp_path / "adam.npz", rk.Sequential(rk.GRU(2, 3, seed=4))
    rk.fit(rk.Sequential(rk.GRU(2, 3, seed=3)), single, loss=rk.cross_entropy, epochs=1, checkpoint=written)
    before, options = other.state_dict(), {"optimizer": rk.SGD(other, 0.1), "checkpoint": written, "resume": True}
    with pytest.raises(ValueError, match=r"adam\.npz: expected one of this training: state: expected the names"):
        rk.fit(other, single, loss=rk.cross_entropy, epochs=1, **options)
    assert all(np.array_equal(one, before[name]) for name, one in other.state_dict().items())
    with pytest.raises(FloatingPointError, match=r"finite values.*\. x and target of this batch are finite: try"):
        rk.fit(model, single, loss=lambda y, _: (np.nan, np.full_like(y, np.nan)), epochs=1)


def test_fit_says_what_of_a_batch_is_not_finite() -> None:
    """Where NaN is read, not past a row's end; in the validation it warns."""
    layer, short = rk.RNN(2, 3, seed=0), np.full(N, T - 1)
    finite, broken, zeros = X.copy(), X.copy(), np.zeros((T, N, 3))
    broken[-1, 0, 0] = np.nan
    for x, target, message in (
        (broken, zeros, "expected finite values, .* x of this batch has NaN or infinity: fill"),
        (finite, zeros + np.nan, "target of this batch has NaN or infinity: leave"),
    ):
        with pytest.raises(FloatingPointError, match=message):
            rk.fit(layer, [(x, target)], loss=rk.mse, epochs=1)
    with pytest.raises(FloatingPointError, match="target of this batch"):
        rk.fit(layer, [(broken, zeros + np.nan, short)], loss=rk.mse, epochs=1)
    with pytest.warns(UserWarning, match="validation: the loss is NaN"):
        history = rk.fit(layer, [(broken, zeros, short)], loss=rk.mse, epochs=2, validation=[(broken, zeros)])
    assert history.best_epoch is None
