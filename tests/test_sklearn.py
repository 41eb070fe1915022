"""The scikit-learn estimators: what scikit-learn asks of them, and what sequences of unequal length ask."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

import joblib
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.utils.estimator_checks import (
    check_get_params_invariance,
    check_no_attributes_set_in_init,
    check_parameters_default_constructible,
    check_sample_weight_equivalence_on_dense_data,
    check_set_params,
    parametrize_with_checks,
)

import rnnkern as rk
from rnnkern.sklearn import RNNClassifier, RNNForecaster, RNNRegressor, RNNTagger
from rnnkern.sklearn.network import Network
from rnnkern.sklearn.pooling import Steps

# Most tests end long before the loss does.
pytestmark = pytest.mark.filterwarnings("ignore:training ended after max_iter:sklearn.exceptions.ConvergenceWarning")
BOTH = pytest.mark.parametrize("estimator", [RNNClassifier, RNNRegressor])
EXPECTED_FAILURES = {
    "check_sample_weight_equivalence_on_dense_data": "compares to 1e-7, and in float32 three equal rows added up round "
    "differently from one row times three; a test of its own runs it in float64"
}
POOLINGS = pytest.mark.parametrize("pooling", ["last", "mean"])


def parities(count, seed, least=3, most=12):
    """Sequences of bits, and whether their sum is odd: no linear model of the steps knows it better than chance."""
    generator = np.random.default_rng(seed)
    X = [generator.integers(0, 2, (length, 1)).astype(float) for length in generator.integers(least, most, count)]
    return X, ["odd" if x.sum() % 2 else "even" for x in X]


def sequences(count=40, features=2, outputs=None, seed=0):
    """Random sequences of unequal length, and classes or numbers that depend on them."""
    generator = np.random.default_rng(seed)
    X = [generator.normal(size=(length, features)) for length in generator.integers(1, 9, count)]
    sums = np.array([x[:, 0].sum() for x in X])
    return X, np.where(sums > 0, "up", "down"), sums if outputs is None else sums[:, None] * np.arange(1, outputs + 1)


def data_for(estimator, **options):
    """X and y of `sequences` for an estimator's class."""
    X, labels, numbers = sequences(**options)
    return X, labels if estimator is RNNClassifier else numbers


def parameters(model):
    """Every array that training changes."""
    return [*model.layer_.parameters.values(), *model.output_.parameters.values()]


def outputs(model, X):
    """Everything the model says about X."""
    return model.predict_log_proba(X) if isinstance(model, RNNClassifier) else model.predict(X)


def same_bits(a, b):
    """Both models have the same weights and history, to the last bit."""
    return a.loss_curve_ == b.loss_curve_ and all(map(np.array_equal, parameters(a), parameters(b)))


@parametrize_with_checks([RNNClassifier(16), RNNRegressor(16)], expected_failed_checks=lambda _: EXPECTED_FAILURES)
def test_scikit_learn_finds_an_estimator(estimator, check):
    """Every check that scikit-learn has, with few units and the defaults."""
    check(estimator)


@BOTH
def test_an_integer_weight_counts_as_so_many_copies_of_a_sequence(estimator):
    """scikit-learn's check, to 1e-7, in double precision."""
    check_sample_weight_equivalence_on_dense_data(estimator.__name__, estimator(dtype="float64"))


# What it learns


def test_a_classifier_learns_what_a_linear_model_cannot():
    """The parity of bits, on sequences it has not seen; the linear model sees them padded."""
    (X, y), (X_new, y_new) = parities(1200, seed=0), parities(400, seed=1)
    model = RNNClassifier(32, random_state=0).fit(X, y)

    def padded(X):
        return np.array([np.pad(x[:, 0], (0, 12 - len(x)), constant_values=-1) for x in X])

    linear = LogisticRegression(solver="newton-cholesky")  # the default of scikit-learn 1.6 makes a newer SciPy warn
    assert linear.fit(padded(X), y).score(padded(X_new), y_new) < 0.65
    assert model.score(X_new, y_new) > 0.95
    assert list(model.classes_) == ["even", "odd"]


def test_a_regressor_learns_what_a_linear_model_cannot():
    """The product of two steps, of targets far from mean 0 and deviation 1."""
    X = np.random.default_rng(0).normal(size=(900, 5))
    y = 1e6 + 1e4 * X[:, 1] * X[:, 3]
    assert Ridge().fit(X[:600], y[:600]).score(X[600:], y[600:]) < 0.1
    assert RNNRegressor(32, random_state=0).fit(X[:600], y[:600]).score(X[600:], y[600:]) > 0.8


@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@POOLINGS
def test_every_cell_and_pooling_learns_a_sum(cell, pooling):
    """With two layers in both directions, so that each part of the network takes part."""
    X, _, y = sequences(300)
    model = RNNRegressor(12, cell=cell, pooling=pooling, num_layers=2, bidirectional=True, dropout=0.1, random_state=0)
    assert model.fit(X, y).score(X, y) > 0.9


def test_features_far_from_zero_are_no_hindrance():
    """Scales are those of the training data; a feature that is constant, but for rounding, does no harm."""
    X, labels, _ = sequences(300)
    moved = [np.hstack([1e5 + 1e-2 * x, np.full((len(x), 1), 0.1)]) for x in X]
    assert RNNClassifier(16, random_state=0).fit(moved, labels).score(moved, labels) > 0.95


# What it computes


@BOTH
@POOLINGS
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_prediction_is_that_of_the_layers_on_each_sequence_alone(estimator, pooling, bidirectional, cell, native):
    """`layer_` and `output_` are all there is, and a batch with padding changes no bit of a sequence's outputs."""
    X, y = data_for(estimator)
    options = {"cell": cell, "num_layers": 2, "bidirectional": bidirectional, "pooling": pooling}
    model = estimator(6, **options, max_iter=2, backend=native, random_state=0).fit(X, y)
    for x, found in zip(X, outputs(model, X), strict=True):
        assert np.array_equal(outputs(model, [x])[0], found)
        h, _ = model.layer_(((x - model.input_mean_) / model.input_scale_).astype(np.float32))
        ends = np.concatenate([h[-1, :6], h[0, 6:]]) if pooling == "last" else h.mean(axis=0)
        result = model.output_(ends).astype(np.float64)
        if estimator is RNNClassifier:
            result -= np.log(np.exp(result).sum())
        else:
            result = result[0] * model.target_scale_ + model.target_mean_
        np.testing.assert_allclose(found, result, rtol=1e-5, atol=1e-6)


@POOLINGS
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("ragged", [False, True])
def test_the_gradient_of_what_is_pooled_reaches_y_and_the_state(pooling, cell, ragged):
    """The pooled values are linear in both, so that products with their gradients agree."""
    X, y = data_for(RNNClassifier, count=5)
    model = RNNClassifier(3, cell=cell, pooling=pooling, num_layers=2, bidirectional=True, dtype="float64", max_iter=1)
    model.fit(X, y)
    generator = np.random.default_rng(0)
    x = generator.normal(size=(7, 4, 2))
    lengths = np.array([7, 1, 3, 6]) if ragged else None
    y, state, _ = model.layer_.forward(x, lengths=lengths)
    pooled = model._network.pooling.read(y, state, lengths)
    gradient = generator.normal(size=pooled.shape)
    dy, dstate = model._network.pooling.gradient(gradient, y, state, lengths)
    found = 0.0 if dy is None else (dy * y).sum()
    h, dh = (state[0], dstate and dstate[0]) if cell == "lstm" else (state, dstate)
    found += 0.0 if dh is None else (dh * h).sum()
    assert found == pytest.approx((gradient * pooled).sum(), rel=1e-12)


@BOTH
def test_the_gradient_of_the_outputs_is_the_derivative_of_the_losses(estimator):
    """Central differences in double precision, of one output at a time."""
    X, y = data_for(estimator) if estimator is RNNClassifier else data_for(estimator, outputs=3)
    model = estimator(2, max_iter=1).fit(X, y)
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4, 3))
    targets = np.array([0, 2, 1, 2]) if estimator is RNNClassifier else generator.normal(size=(4, 3))
    _, gradient = model._losses(values, targets)
    for index in np.ndindex(values.shape):
        step = np.zeros_like(values)
        step[index] = 1e-5
        difference = model._losses(values + step, targets)[0] - model._losses(values - step, targets)[0]
        assert gradient[index] == pytest.approx(difference[index[0]] / 2e-5, abs=1e-9)


# What X may be


@BOTH
def test_all_forms_of_the_same_sequences_give_the_same_model(estimator):
    """Arrays, lists of arrays, lists of lists, an array of objects, a generator's tuple; a table has one feature."""
    X = np.random.default_rng(0).normal(size=(30, 5, 2))
    y = X[:, :, 0].sum(axis=1)
    y = y > 0 if estimator is RNNClassifier else y
    objects = np.empty(len(X), object)
    objects[:] = list(X)

    def fitted(X):
        return estimator(4, max_iter=2, random_state=0).fit(X, y)

    expected = fitted(X)
    assert expected.n_features_in_ == 2
    for form in (list(X), tuple(X), X.tolist(), objects, X.astype(object), np.asfortranarray(X)):
        assert same_bits(fitted(form), expected)
        assert np.array_equal(outputs(expected, form), outputs(expected, X))
    expected = fitted(X[:, :, 0])
    assert expected.n_features_in_ == 5
    for form in (X[:, :, :1], list(X[:, :, :1]), list(X[:, :, 0]), X[:, :, 0].tolist()):
        assert same_bits(fitted(form), expected)
        assert np.array_equal(outputs(expected, form), outputs(expected, X[:, :, 0]))


def test_a_model_of_one_feature_takes_sequences_of_any_length():
    """As a list of one-dimensional arrays or of lists, or as a table where it was not fitted with a wider one."""
    X, y = parities(40, seed=0)
    model = RNNClassifier(4, max_iter=2, random_state=0).fit([x[:, 0] for x in X], y)
    expected = model.predict_proba(X)
    assert np.array_equal(model.predict_proba([x[:, 0].tolist() for x in X]), expected)
    assert np.array_equal(model.predict_proba(X[3].T), expected[3:4])
    tabular = RNNClassifier(4, max_iter=2).fit(np.eye(6), np.arange(6))
    assert tabular.predict(X).shape == (40,)
    with pytest.raises(ValueError, match="X has 5 features, but RNNClassifier is expecting 6 features as input"):
        tabular.predict(np.eye(5))


NO_SEQUENCES = [
    ([np.ones((3, 2)), np.ones((0, 2))], r"X\[1\]: expected at least one step, got an empty sequence"),
    (np.ones((2, 0, 3)), r"X: expected sequences of at least one step, got an array of shape \(2, 0, 3\)"),
    ([[1.0], []], r"X\[1\]: expected at least one step, got an empty sequence"),
    ([np.ones((3, 2)), np.ones((3, 1))], r"X\[1\]: expected shape \(T, 2\), got \(3, 1\)"),
    ([np.ones((3, 2, 2)), np.ones((3, 1))], r"X\[0\]: expected shape \(T, I\), got \(3, 2, 2\)"),
    ([np.ones((3, 2)), np.array([[1.0, np.nan]])], r"X\[1\]: expected finite numbers, got NaN at step 0"),
    ([np.ones((3, 2)), np.full((2, 2), np.inf)], r"X\[1\]: .*, got infinity at step 0"),
    ([[1.0, 2.0], [3.0, np.nan]], r"X\[1\]: .* NaN at step 1; .* pass a list of sequences \(T_i, I\)"),
    ([np.ones((2, 3)), np.ones((2, 4))], r"X\[1\]: .*, got \(2, 4\); steps come first: .* pass \[x.T for x in X\]"),
    ([np.ones((3, 2)), np.ones((2, 2)) * 1j], "Complex data not supported"),
    (["anna", "bo"], "X: expected sequences of numbers, got 2 strings; RNNTagger, or rnnkern.data.Vocabulary"),
    ([np.ones(2), np.array(["c"])], r"X\[1\]: expected numbers, got .*: could not convert string to float"),
    ([np.ones((3, 2))], "inconsistent numbers of samples.*: X is read as 1 sequences"),
    ([], "Expected 2D array, got 1D array"),
]


def test_what_is_no_list_of_sequences_is_refused(subtests):
    """By fit and by predict, with what is wrong and where."""
    model = RNNClassifier(2, max_iter=1).fit(np.ones((2, 3, 2)), [0, 1])
    for X, message in NO_SEQUENCES:
        with subtests.test(message):
            with pytest.raises(ValueError, match=message):
                RNNClassifier().fit(X, [0, 1])
            if "samples" not in message:
                with pytest.raises(ValueError, match=message):
                    model.predict(X)


def test_an_iterator_is_refused():
    """It could be read once only."""
    with pytest.raises(TypeError, match=r"X: expected a list of sequences or an array, got generator; pass list\(X\)"):
        RNNClassifier().fit((x for x in [np.ones((3, 2))] * 2), [0, 1])


def test_frames_have_the_columns_of_the_first_in_its_order():
    """In fit, and afterwards those of fit; arrays have no names. A series of sequences is read whatever its index."""
    pandas = pytest.importorskip("pandas")
    X, y, _ = sequences(12)
    frames = [pandas.DataFrame(x, columns=["a", "b"]) for x in X]
    model = RNNClassifier(4, max_iter=2, tol=-1, n_iter_no_change=2, random_state=0).fit(frames, y)
    assert model.feature_names_in_.tolist() == ["a", "b"]
    assert np.array_equal(model.predict(frames), model.predict(X))
    for mixed in ([*frames[:5], frames[5][["b", "a"]]], [frames[0], frames[1].rename(columns={"b": "c"})]):
        with pytest.raises(ValueError, match=r"X\[\d\]: expected the columns \['a', 'b'\], as X\[0\] has, got"):
            model.predict(mixed)
    with pytest.raises(
        ValueError, match=r"X: expected sequences of the columns \['a', 'b'\], as in fit, got \['b', 'a'\]"
    ):
        model.predict([one[["b", "a"]] for one in frames])
    assert not hasattr(model.fit(X, y), "feature_names_in_")
    series = pandas.Series(X, index=range(7, 19))
    assert np.array_equal(clone(model).fit(series, y).predict_proba(series), model.predict_proba(X))
    words, labels = phrases(12)
    series = pandas.Series(words, index=range(7, 19))
    tagger = RNNTagger(4, max_iter=2, random_state=0)
    assert same_bits(clone(tagger).fit(series, labels), tagger.fit(words, labels))


def test_a_frame_of_series_is_refused():
    """With the way to a list of sequences, which fits."""
    pandas = pytest.importorskip("pandas")
    X, y, _ = sequences(12)
    frame = pandas.DataFrame({name: [pandas.Series(x[:, i]) for x in X] for i, name in enumerate("ab")})
    for nested in (frame, frame.to_numpy()):
        with pytest.raises(
            ValueError, match=r"X: expected numbers in a table, got sequences in its cells; pass a list"
        ):
            RNNClassifier(2, max_iter=1).fit(nested, y)
    model = RNNClassifier(2, max_iter=1, random_state=0).fit(
        [np.column_stack(list(row)) for row in frame.to_numpy()], y
    )
    assert same_bits(model, clone(model).fit(X, y))
    numbers = pandas.DataFrame([x[:1, 0] for x in X]).astype(object)
    RNNClassifier(2, max_iter=1).fit(numbers, y)


def test_a_frame_of_several_levels_is_refused():
    """With the way to sequences, which fits: a frame of steps is not read as one of sequences."""
    pandas = pytest.importorskip("pandas")
    X, y = np.random.default_rng(0).normal(size=(12, 5, 2)), np.arange(12) % 2
    rows = pandas.MultiIndex.from_product([range(12), range(5)])
    steps = pandas.DataFrame(X.reshape(60, 2), index=rows)
    with pytest.raises(ValueError, match=r"MultiIndex of 2 levels as its index; .* X.groupby\(level=0, sort=False\)"):
        RNNClassifier(2, max_iter=1).fit(steps, np.repeat(y, 5))
    columns = pandas.MultiIndex.from_product([["a", "b"], range(5)])
    features = pandas.DataFrame(X.transpose(0, 2, 1).reshape(12, 10), columns=columns)
    with pytest.raises(ValueError, match=r"MultiIndex of 2 levels as its columns; .* X.to_numpy"):
        RNNClassifier(2, max_iter=1).fit(features, y)
    model = RNNClassifier(2, max_iter=1, random_state=0).fit(X, y)
    for way_out in (
        [x.to_numpy() for _, x in steps.groupby(level=0, sort=False)],
        features.to_numpy().reshape(12, 2, 5).transpose(0, 2, 1),
    ):
        assert same_bits(model, clone(model).fit(way_out, y))


def test_an_array_that_looks_like_channels_first_is_fitted_with_a_warning(subtests):
    """Also as a list; once, by fit, and not by predict."""
    message = r"X is read as \(N, T, I\): .* pass np.transpose\(X, \(0, 2, 1\)\)"
    for shape in ((20, 1, 10), (20, 3, 200), (20, 12, 120)):
        X, y = np.random.default_rng(0).normal(size=shape), np.arange(20) % 2
        for form in (X, list(X)):
            with subtests.test(f"{type(form).__name__} of shape {shape}"):
                with pytest.warns(UserWarning, match=message):
                    model = RNNClassifier(2, max_iter=1).fit(form, y)
                model.predict(form)


def test_more_features_than_steps_alone_are_no_reason_to_warn(subtests):
    """Nor are long lists of unequal length: their steps are those that differ."""
    for shape in ((20, 3, 29), (20, 13, 200), (20, 100, 100), (20, 1, 1)):
        with subtests.test(str(shape)):
            RNNClassifier(2, max_iter=1).fit(np.ones(shape), np.arange(20) % 2)
    RNNClassifier(2, max_iter=1).fit([np.ones((2, 200)), np.ones((3, 200))], [0, 1])


@BOTH
def test_targets_of_each_step_are_refused(estimator):
    """In lists of unequal length, and one after the other; a classifier's in an array too."""
    X, _ = data_for(estimator, count=8)
    each = [(x[:, 0] > 0).astype(int) for x in X]
    objects = np.empty(8, object)
    objects[:] = each
    message = "each sequence.*; for one at each step take RNNTagger"
    for y in (each, [one.tolist() for one in each], objects, np.concatenate(each)):
        with pytest.raises(ValueError, match=message):
            estimator(2, max_iter=1).fit(X, y)
    if estimator is RNNClassifier:
        with pytest.raises(ValueError, match=rf"got shape \(8, 3\){message[13:]}"):
            estimator(2, max_iter=1).fit(X, np.ones((8, 3), int))


def test_sequences_of_other_features_are_refused():
    """By predict and partial_fit, in every form."""
    model = RNNClassifier(2, max_iter=1).fit(np.ones((2, 3, 2)), [0, 1])
    for X in (np.ones((2, 3, 4)), [np.ones((3, 4)), np.ones((1, 4))]):
        with pytest.raises(ValueError, match="X: expected sequences of 2 features, as in fit, got 4 features"):
            model.partial_fit(X, [0, 1])
    with pytest.raises(ValueError, match="X: expected sequences of 2 features, as in fit, got 1 features"):
        model.predict(np.ones((2, 3)))


WRONG_PARAMETERS = [
    ({"cell": "elman"}, ValueError, "cell: expected one of rnn_tanh"),
    ({"hidden_size": 0}, ValueError, "hidden_size: expected an integer >= 1, got 0"),
    ({"batch_size": 2.5}, TypeError, "batch_size: expected an integer >= 1, got float 2.5"),
    ({"max_iter": 0}, ValueError, "max_iter: expected an integer >= 1, got 0"),
    ({"n_iter_no_change": 0}, ValueError, "n_iter_no_change: expected an integer >= 1, got 0"),
    ({"pooling": "max"}, ValueError, "pooling: expected one of last, mean, got 'max'"),
    ({"learning_rate": 0}, ValueError, "learning_rate: expected a finite number > 0, got 0"),
    ({"max_norm": -1}, ValueError, "max_norm: expected a number > 0, got -1"),
    ({"tol": None}, TypeError, "tol: expected a number, got NoneType"),
    ({"validation_fraction": 1}, ValueError, r"validation_fraction: expected a number in \[0, 1\), got 1"),
    ({"dropout": 2}, ValueError, "dropout: expected a number from 0 to 1, got 2"),
    ({"dtype": "int8"}, ValueError, "dtype: expected float32 or float64, got 'int8'"),
    ({"backend": "best"}, ValueError, "backend: expected 'auto' or one of"),
]  # fmt: skip


@BOTH
def test_a_wrong_parameter_is_named_by_fit(subtests, estimator):
    """And not earlier: scikit-learn sets parameters without a check."""
    X, y = data_for(estimator, count=4)
    for options, error, message in WRONG_PARAMETERS:
        with subtests.test(str(options)):
            model = estimator(**options)
            with pytest.raises(error, match=message):
                model.fit(X, y)
            with pytest.raises(NotFittedError):
                model.predict(X)


def test_several_numbers_at_once():
    """Each output has its own scale, and comes in the shape it was given in."""
    X, _, y = sequences(200, outputs=3)
    y = y * [1, 1e3, 1e-3] + [0, 1e6, 1]
    model = RNNRegressor(16, random_state=0).fit(X, y)
    assert model.score(X, y) > 0.9
    assert model.predict(X).shape == (200, 3)
    assert model.fit(X, y[:, :1]).predict(X).shape == (200, 1)
    with pytest.raises(ValueError, match=r"y: expected shape \(200, 1\), got \(200, 3\)"):
        model.partial_fit(X, y)
    with pytest.raises(
        ValueError, match=r"y: expected targets \(N,\) or \(N, K\), got shape \(200, 3, 1\); for one at each"
    ):
        model.fit(X, y[..., None])


@pytest.mark.parametrize("labels", [(False, True), (-1, 7), ("no", "yes"), (2.0, 3.0)], ids=str)
def test_labels_are_of_any_type(labels):
    """Predictions have the labels' own."""
    X, y, _ = sequences(60)
    y = np.where(y == "up", labels[1], labels[0])
    model = RNNClassifier(8, random_state=0).fit(X, y)
    predicted = model.predict(X)
    assert predicted.dtype == y.dtype
    assert set(predicted.tolist()) == set(labels)


def test_probabilities_of_a_confident_model_stay_finite():
    """Where a probability underflows, its logarithm does not."""
    model = RNNClassifier(4, max_iter=1).fit(*data_for(RNNClassifier))
    X, _ = data_for(RNNClassifier)
    model.output_.parameters["weight"][...] = [[1e4] * 4, [-1e4] * 4]
    assert np.isfinite(model.predict_log_proba(X)).all()
    assert model.predict_proba(X).sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_decision_function_has_the_logits(classes):
    """Of two classes their difference, as scikit-learn has it."""
    X, _, sums = sequences(30)
    model = RNNClassifier(4, max_iter=3, random_state=0).fit(X, np.argsort(sums) % classes)
    found, log_probabilities = model.decision_function(X), model.predict_log_proba(X)
    if classes == 2:
        np.testing.assert_allclose(found, log_probabilities[:, 1] - log_probabilities[:, 0], rtol=1e-6, atol=1e-12)
    else:
        np.testing.assert_allclose(
            found - found[:, :1], log_probabilities - log_probabilities[:, :1], rtol=1e-6, atol=1e-12
        )


# How it trains


@BOTH
@pytest.mark.parametrize("early_stopping", [False, True])
def test_one_seed_gives_one_model(estimator, early_stopping):
    """To the last bit, dropout included, whatever the number of threads; another seed gives another."""
    X, y = data_for(estimator, count=80)
    model = estimator(8, num_layers=2, dropout=0.3, max_iter=4, early_stopping=early_stopping, random_state=3)
    first, second = clone(model).fit(X, y), clone(model)
    before = rk.num_threads()
    rk.set_num_threads(1)
    try:
        second.fit(X, y)
    finally:
        rk.set_num_threads(before)
    assert same_bits(first, second)
    assert not same_bits(first, clone(model).set_params(random_state=4).fit(X, y))
    for seeded in (np.random.RandomState, np.random.default_rng):
        assert same_bits(*(clone(model).set_params(random_state=seeded(5)).fit(X, y) for _ in range(2)))


@BOTH
def test_sequences_of_weight_zero_count_as_left_out(estimator):
    """Whatever they hold; of the others only the ratios matter."""
    X, y = data_for(estimator, count=30)
    weights = np.arange(30) % 3.0
    kept = np.flatnonzero(weights)
    model = estimator(4, max_iter=3, random_state=0)
    without = clone(model).fit([X[index] for index in kept], y[kept], weights[kept])
    spoiled = [x if weight else 1e6 * x for x, weight in zip(X, weights, strict=True)]
    assert without.loss_curve_ == pytest.approx(clone(model).fit(spoiled, y, weights).loss_curve_, rel=1e-5)
    assert same_bits(clone(model).fit(X, y, weights), clone(model).fit(X, y, 4 * weights))


def test_a_class_weight_is_a_weight_of_its_sequences():
    """To the last bit; "balanced" gives each class the same sum, and a class of weight 0 is left out."""
    X, y, _ = sequences(40)
    y = np.where(np.arange(40) < 25, "up", "down")
    model = RNNClassifier(4, max_iter=3, random_state=0)
    up, down = 40 / (2 * 25), 40 / (2 * 15)
    for class_weight, factors in (({"up": 3}, (3, 1)), ("balanced", (up, down)), ({"up": 0, "down": 2}, (0, 2))):
        weighted = clone(model).set_params(class_weight=class_weight).fit(X, y)
        assert same_bits(weighted, clone(model).fit(X, y, np.where(y == "up", *factors)))
    once_more = clone(model).set_params(class_weight={"up": 3}).fit(X, y).partial_fit(X, y)
    assert once_more.n_iter_ == 4


WRONG_CLASS_WEIGHTS = [
    ({"sideways": 1}, r"class_weight: expected labels among \['down', 'up'\], got 'sideways'"),
    ({"up": -1}, r"class_weight\['up'\]: expected a finite number >= 0, got -1"),
    ({"up": 0, "down": 0}, "class_weight: expected a class of y with a weight > 0"),
    ("even", "class_weight: expected a dict, 'balanced' or None, got 'even'"),
    ([1, 2], "class_weight: expected a dict, 'balanced' or None"),
]


def test_wrong_class_weights_are_refused(subtests):
    """By name; "balanced" by partial_fit, which sees a part."""
    X, y, _ = sequences(10)
    for class_weight, message in WRONG_CLASS_WEIGHTS:
        with subtests.test(message), pytest.raises(ValueError, match=message):
            RNNClassifier(2, max_iter=1, class_weight=class_weight).fit(X, y)
    with pytest.raises(ValueError, match="class_weight: expected a dict or None for partial_fit, got 'balanced'"):
        RNNClassifier(2, class_weight="balanced").partial_fit(X, y, classes=["down", "up"])


def test_wrong_weights_are_refused(subtests):
    """By name."""
    X, y = data_for(RNNClassifier, count=4)
    for weights in ([1, -1, 1, 1], [0] * 4, [1] * 3, [1, 1, 1, np.nan]):
        with subtests.test(str(weights)), pytest.raises(ValueError, match="sample_weight"):
            RNNClassifier(2, max_iter=1).fit(X, y, weights)


@BOTH
def test_early_stopping_restores_the_best_weights(estimator):
    """They are the bits of a training that ended with the best epoch."""
    X, y = data_for(estimator, count=60)
    y = np.random.default_rng(0).permutation(y)  # nothing to learn but by heart
    model = estimator(16, early_stopping=True, validation_fraction=0.3, n_iter_no_change=5, random_state=0).fit(X, y)
    assert len(model.validation_scores_) == model.n_iter_ == len(model.loss_curve_) < model.max_iter
    best = int(np.argmax(model.validation_scores_)) + 1
    assert best < model.n_iter_
    assert max(model.validation_scores_[-5:]) <= model.validation_scores_[best - 1] + model.tol
    shorter = clone(model).set_params(max_iter=best).fit(X, y)
    assert all(map(np.array_equal, parameters(shorter), parameters(model)))


def test_every_class_has_its_share_of_the_held_out_sequences():
    """The number that its size asks for, but for one."""
    targets = np.repeat([0, 1, 2], [60, 30, 10])
    model = RNNClassifier(2, max_iter=1, validation_fraction=0.2).fit(np.ones((100, 1)), targets)
    for _ in range(20):
        training, validation = model._split(targets, np.arange(100))
        assert sorted([*training, *validation]) == list(range(100))
        assert np.abs(np.bincount(targets[validation], minlength=3) - [12, 6, 2]).max() <= 1
    with pytest.raises(ValueError, match="validation_fraction: expected to leave sequences to train on"):
        RNNClassifier(early_stopping=True).fit([[1], [2]], [0, 1])


@BOTH
def test_training_ends_when_the_loss_no_longer_falls(estimator):
    """By as much as tol, for as many epochs as n_iter_no_change."""
    X, y = data_for(estimator)
    assert estimator(4, tol=1e9, n_iter_no_change=3, random_state=0).fit(X, y).n_iter_ == 4
    with pytest.warns(ConvergenceWarning, match="training ended after max_iter=7 epochs while it still improved"):
        assert estimator(4, tol=-np.inf, max_iter=7).fit(X, y).n_iter_ == 7


@BOTH
def test_training_goes_on_where_it_stopped(estimator):
    """`fit` with `warm_start`, `partial_fit` and one longer `fit` are the same bits, through a pickle too."""
    X, y = data_for(estimator)
    classes = {"classes": np.unique(y)} if estimator is RNNClassifier else {}
    options = {"num_layers": 2, "dropout": 0.2, "random_state": 0}
    whole = estimator(4, max_iter=4, **options).fit(X, y)
    warm = estimator(4, max_iter=2, warm_start=True, **options).fit(X, y).fit(X, y)
    parts = estimator(4, **options)
    for _ in range(4):
        parts = pickle.loads(pickle.dumps(parts.partial_fit(X, y, **classes)))
    assert same_bits(whole, warm)
    assert same_bits(whole, parts)
    assert whole.n_iter_ == warm.n_iter_ == parts.n_iter_ == 4
    for model, name, other in ((warm, "hidden_size", 5), (parts, "cell", "lstm"), (parts, "pooling", "mean")):
        changed = deepcopy(model).set_params(**{name: other})
        with pytest.raises(ValueError, match=f"{name}: expected {getattr(model, name)}, .*, got {other}; for new ones"):
            changed.partial_fit(X, y)
    assert deepcopy(warm).set_params(dtype=np.float32).fit(X, y).n_iter_ == 6
    assert warm.set_params(warm_start=False).fit(X, y).n_iter_ == 2


def test_the_first_partial_fit_names_the_classes():
    """All of them, whether the first sequences have them or not; a later call may repeat them."""
    X, y, _ = sequences()
    with pytest.raises(ValueError, match="classes: expected all labels in the first call of partial_fit, got None"):
        RNNClassifier().partial_fit(X, y)
    model = RNNClassifier(2).partial_fit(X, y, classes=["up", "level", "down"])
    assert model.predict_proba(X).shape == (40, 3)
    model.partial_fit(X, ["level"] * 40, classes=["down", "level", "up"])
    with pytest.raises(ValueError, match=r"classes: expected \[.*\] as in the first call"):
        model.partial_fit(X, y, classes=["up", "down"])
    with pytest.raises(ValueError, match=r"y: expected labels among \[.*\], got 'sideways'"):
        model.partial_fit(X, ["sideways"] * 40)


@BOTH
def test_ctrl_c_keeps_what_was_learned(estimator):
    """A warning, and a model that predicts and goes on learning."""
    X, y = data_for(estimator, count=200)
    model = estimator(16, max_iter=10**9, tol=-np.inf, random_state=0)

    def interrupt():
        while len(getattr(model, "loss_curve_", ())) < 50:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it would be ignored
    try:
        threading.Thread(target=interrupt).start()
        with pytest.warns(UserWarning, match="training was interrupted in epoch"):
            model.fit(X, y)
    finally:
        signal.signal(signal.SIGINT, before)
    assert 50 <= model.n_iter_ < 10**9
    assert model.score(X, y) > 0.8
    model.partial_fit(X, y)


def test_a_loss_that_is_no_number_ends_the_training():
    """With a warning; the weights stay finite."""
    X = [np.full((3, 1), 1e30), np.full((2, 1), -1e30)]
    model = RNNRegressor(4, cell="rnn_relu", num_layers=4, standardize=False, random_state=0)
    with pytest.warns(ConvergenceWarning, match="the loss of epoch 1 is .*: training ends; lower learning_rate"):
        model.fit(X, [0, 1])
    assert model.n_iter_ == 1
    assert all(np.isfinite(array).all() for array in parameters(model))


def test_verbose_shows_the_last_epoch(capsys):
    """Silent otherwise."""
    X, y, _ = sequences()
    RNNClassifier(2, max_iter=3).fit(X, y)
    assert capsys.readouterr().out == ""
    RNNClassifier(2, max_iter=3, early_stopping=True, verbose=True).fit(X, y)
    assert re.search(r"^epoch 3  loss \S+  validation score \d\.\d+$", capsys.readouterr().out, re.MULTILINE)


# Among the tools of scikit-learn


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("workers", ["loky", "threading", "multiprocessing"])
def test_a_grid_search_runs_in_parallel(workers):
    """In new processes, threads, and forks of a process whose helper threads have run; ragged lists are split."""
    X, y = parities(60, seed=0, least=2, most=5)
    RNNClassifier(64, max_iter=1).fit(X, y)
    search = GridSearchCV(RNNClassifier(16, max_iter=10, random_state=0), {"cell": ["gru", "lstm"]}, cv=2, n_jobs=2)
    with joblib.parallel_config(workers):
        search.fit(X, y)
    alone = GridSearchCV(search.estimator, search.param_grid, cv=2).fit(X, y)
    assert list(search.cv_results_["mean_test_score"]) == list(alone.cv_results_["mean_test_score"])
    assert same_bits(search.best_estimator_, alone.best_estimator_)


def test_cross_validation_takes_a_list_of_sequences():
    """Without a pipeline or a wrapper."""
    X, _, y = sequences(120)
    assert cross_val_score(RNNRegressor(16, random_state=0), X, y, cv=3).min() > 0.7


@BOTH
def test_a_saved_model_predicts_the_same_bits(estimator, tmp_path):
    """Through pickle, joblib, and arrays that joblib maps from a file that cannot be written; no layer keeps memory."""
    X, y = data_for(estimator)
    model = estimator(8, max_iter=2, random_state=0).fit(X, y)
    joblib.dump(model, tmp_path / "model")
    copies = [joblib.load(tmp_path / "model", mmap_mode=mode) for mode in (None, "r")]
    for copy in (pickle.loads(pickle.dumps(model)), *copies):
        assert np.array_equal(outputs(copy, X), outputs(model, X))
        assert copy.layer_._reserve is model.layer_._reserve is None


@pytest.mark.parametrize("estimator", [RNNTagger, RNNForecaster])
def test_parameters_are_as_scikit_learn_wants_them(estimator):
    """The checks that need no X and y: of lists of sequences, and of a series, it has none."""
    for check in (
        check_parameters_default_constructible,
        check_no_attributes_set_in_init,
        check_get_params_invariance,
        check_set_params,
    ):
        check(estimator.__name__, estimator())


def test_the_programs_of_the_page_run():
    """docs/sklearn.md, as printed."""
    text = (Path(__file__).parent.parent / "docs" / "sklearn.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    exec("".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert float(names["accuracy"]) > 0.9
    assert float(names["tagged"]) > 0.9
    assert names["report"]["forecaster"] < 0.9 * min(names["report"]["seasonal_naive"], names["report"]["ridge"])


# A label for each step


def phrases(count=150, seed=0):
    """Words, and whether each is a name: an unknown word is one after "mr", and so is any word that begins large."""
    generator = np.random.default_rng(seed)
    X = [
        [["mr", "a", f"w{generator.integers(1000)}", f"Xy{generator.integers(1000)}"][k] for k in row]
        for row in (generator.integers(4, size=length) for length in generator.integers(2, 9, count))
    ]
    y = [
        ["name" if x[0] == "X" or (x[0] == "w" and before == "mr") else "no" for before, x in pairwise(["", *one])]
        for one in X
    ]
    return X, y


def test_a_tagger_reads_words_that_training_has_not_seen():
    """By what stands beside them and by how they are written; characters, and strings for lists of them, too."""
    (X, y), (X_new, y_new) = phrases(), phrases(60, seed=1)
    model = RNNTagger(16, embedding_size=16, random_state=0).fit(X, y)
    assert model.score(X_new, y_new) > 0.97
    assert [len(one) for one in model.predict(X_new)] == [len(one) for one in X_new]
    texts, labels = ["".join(x[0] for x in one) for one in X], ["".join(label[0] for label in one) for one in y]
    options = {"max_iter": 2, "random_state": 0}
    assert same_bits(
        RNNTagger(4, **options).fit(texts, labels), RNNTagger(4, **options).fit(list(map(list, texts)), labels)
    )


def test_labels_of_a_sequence_do_not_depend_on_its_company():
    """To the last bit; and probabilities are those of the layers, at every step."""
    X, _, _ = sequences()
    y = [x[:, 0] > 0 for x in X]
    model = RNNTagger(6, cell="lstm", max_iter=3, random_state=0).fit(X, y)
    for x, found in zip(X, model.predict_proba(X), strict=True):
        assert np.array_equal(model.predict_proba([x])[0], found)
        h, _ = model.layer_(((x - model.input_mean_) / model.input_scale_).astype(np.float32))
        logits = model.output_(h).astype(np.float64)
        np.testing.assert_allclose(found, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), rtol=1e-5)


@pytest.mark.parametrize("lengths", [None, [5, 2, 4]], ids=str)
def test_the_gradient_of_a_step_reaches_its_symbols(lengths):
    """Of outputs from step `skip` on, by central differences of the vectors; each step has as many symbols."""
    embedding, layer = (
        rk.Embedding(6, 3, dtype="float64", seed=0),
        rk.GRU(3, 4, bidirectional=True, dtype="float64", seed=1),
    )
    network = Network(embedding, layer, rk.Linear(8, 2, dtype="float64", seed=2), Steps(1))
    generator = np.random.default_rng(0)
    x, ends = generator.integers(6, size=(5, 3, 2)), None if lengths is None else np.array(lengths)
    outputs, tape = network.forward(x, ends)
    assert np.array_equal(outputs, network(x, ends))
    assert len(outputs) == (12 if lengths is None else 8)
    doutputs = generator.normal(size=outputs.shape)
    gradient = network.backward(tape, doutputs)[0].parameters["weight"]
    weight = embedding.parameters["weight"]
    for index in np.ndindex(weight.shape):
        values = []
        for step in (1e-6, -1e-6):
            weight[index] += step
            values.append((network(x, ends) * doutputs).sum())
            weight[index] -= step
        assert gradient[index] == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-6, abs=1e-8)


def test_weights_of_a_tagger_are_those_of_steps():
    """Class weights multiply those of the sequences; a sequence of weight 0 changes nothing."""
    X, y = phrases(40)
    model = RNNTagger(4, max_iter=2, min_count=1, early_stopping=False, random_state=0)
    spoiled = [["no"] * len(one) if index % 2 else one for index, one in enumerate(y)]
    weights = np.arange(40) % 2 == 0
    assert same_bits(clone(model).fit(X, y, weights), clone(model).fit(X, spoiled, weights))
    assert same_bits(clone(model).fit(X, y), clone(model).set_params(class_weight={"no": 1, "name": 1.0}).fit(X, y))
    balanced = clone(model).set_params(class_weight="balanced").fit(X, y)
    counts = [sum(one.count(label) for one in y) for label in balanced.classes_]
    by_hand = dict(zip(balanced.classes_, sum(counts) / (2 * np.array(counts)), strict=True))
    assert same_bits(balanced, clone(model).set_params(class_weight=by_hand).fit(X, y))


def test_what_a_tagger_cannot_read_is_refused():
    """With the sequence, and the step where it is one."""
    X, y = phrases(10)
    for X_wrong, y_wrong, error, message in (
        (X, y[:-1], ValueError, "y: expected a sequence of labels for each of the 10 sequences, got 9"),
        (X, [*y[:-1], ["no"]], ValueError, r"y\[9\]: expected \d labels, one for each step, got shape \(1,\)"),
        (X, np.zeros(10), ValueError, r"y\[0\]: expected a label for each step of X\[0\], got"),
        ([*X[:-1], ["a", 3]], y, TypeError, r"X\[9\]\[1\]: expected a string, as X\[0\]\[0\] is, got int"),
        ([*X[:-1], []], y, ValueError, r"X\[9\]: expected at least one step, got an empty sequence"),
    ):
        with pytest.raises(error, match=message):
            RNNTagger(2, max_iter=1).fit(X_wrong, y_wrong)
    model = RNNTagger(2, max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match="X: expected sequences of strings, as in fit, got"):
        model.predict([np.ones((3, 2))])
    with pytest.raises(ValueError, match=r"y\[0\]: expected"):  # with the symbols of other sequences
        deepcopy(model).fit(["other words"], [[1]])
    with pytest.raises(ValueError, match="min_count: expected an integer >= 1, got 0"):
        RNNTagger(min_count=0).fit(X, y)


def test_a_tagger_is_at_home_in_scikit_learn():
    """Cross-validation of lists, `partial_fit`, and bits through a pickle and a clone."""
    X, y = phrases(60)
    model = RNNTagger(8, embedding_size=8, max_iter=4, random_state=0)
    assert cross_val_score(model, X, y, cv=2).shape == (2,)
    model.fit(X, y)
    for other in (clone(model).fit(X, y), pickle.loads(pickle.dumps(model))):
        assert all(map(np.array_equal, other.predict_proba(X), model.predict_proba(X)))
        assert other.partial_fit(X, y).n_iter_ == 5


# The next steps of a series


def days(steps=900, seed=0):
    """Days of 12 steps; today's height gives tomorrow's by the logistic map, which no linear model knows."""
    heights = [0.3]
    for _ in range(steps // 12):
        heights.append(3.8 * heights[-1] * (1 - heights[-1]))
    t, noise = np.arange(steps), np.random.default_rng(seed).normal(size=steps)
    return np.array(heights)[t // 12] * (1 - np.cos(t / 12 * 2 * np.pi)) + 0.02 * noise


def test_a_forecaster_beats_its_baselines_and_keeps_its_coverage():
    """On steps after those that have measured its bands."""
    series = 1e4 + 100 * days(1500)
    model = RNNForecaster(6, 12, hidden_size=32, random_state=0).fit(series[:1100])
    assert model.report_["forecaster"] < 0.5 * min(model.report_["seasonal_naive"], model.report_["ridge"])
    assert model.score(series[1050:]) > 0.8
    inside = []
    for end in range(1100, 1494, 3):
        _, lower, upper = model.predict(series[:end], coverage=0.8)
        inside.append((lower[:, 0] <= series[end : end + 6]) & (series[end : end + 6] <= upper[:, 0]))
    assert np.mean(inside) == pytest.approx(0.8, abs=0.05)


def test_what_measures_the_bands_is_not_trained_on():
    """Whatever the calibration part holds, the weights have the same bits; without it there is none of either."""
    series, other = days(300), days(300)
    other[240:] = 0
    model = RNNForecaster(4, 12, max_iter=2, random_state=0)
    first, second = clone(model).fit(series), clone(model).fit(other)
    assert same_bits(first, second)
    assert first.report_ != second.report_
    whole = clone(model).set_params(calibration_fraction=0).fit(series[:240])
    assert same_bits(first, whole)
    assert whole.report_ is None
    with pytest.raises(ValueError, match="coverage: expected None without a calibration part"):
        whole.predict(coverage=0.5)


def test_a_stream_forecasts_the_bits_of_predict():
    """Step by step, of several values, through a pickle and joblib too; without a history from the series of fit."""
    series = np.stack([days(400), days(400, seed=1)], axis=1)
    model = RNNForecaster(15, 12, window=20, max_iter=2, random_state=0).fit(series[:300])
    assert np.array_equal(model.predict(), model.predict(series[:300]))
    stream = model.stream(series[:350])
    for end in range(351, 355):
        stream.append(series[end - 1])
        for forecaster in (model, pickle.loads(pickle.dumps(model))):
            assert np.array_equal(stream.predict(0.5), forecaster.predict(series[:end], 0.5))
    assert stream.predict().shape == (15, 2)
    naive = model._naive(series, np.array([400]))[0]
    assert np.array_equal(naive, np.concatenate([series[-12:], series[-12:-9]]))


def test_what_a_forecaster_cannot_do_is_refused():
    """With how many steps it takes."""
    model = RNNForecaster(4, 12, max_iter=1, window=20)
    with pytest.raises(ValueError, match=r"series: expected at least 36 steps to train on .*, got 32 and 8"):
        model.fit(days(40))
    with pytest.raises(NotFittedError):
        model.predict(days(40))
    model.fit(days(100))
    for history, coverage, message in (
        (days(31), None, r"history: expected at least 32 steps \(window \+ period\), got 31"),
        (np.ones((40, 2)), None, "history: expected 1 values a step, as in fit, got 2"),
        (None, 1.5, r"coverage: expected a number in \(0, 1\), got 1.5"),
        (None, 0.99, "coverage: expected at most 0.9444 of 17 errors, got 0.99"),
    ):
        with pytest.raises(ValueError, match=message):
            model.predict(history, coverage)
    with pytest.raises(ValueError, match="horizon: expected an integer >= 1, got 0"):
        RNNForecaster(0).fit(days(100))
    before = model.predict()
    model.set_params(horizon=6, period=10, window=30)  # of the next fit
    assert np.array_equal(model.predict(), before)
    with pytest.raises(ValueError, match="series: expected at least 46 steps"):
        model.fit(days(50))
    assert np.array_equal(model.predict(), before)
    assert model.fit(np.stack([days(100), days(100)], axis=1)).predict().shape == (6, 2)
    with pytest.raises(ValueError, match="series: expected at least 46 steps"):
        model.fit([])
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": days(100), "b": days(100, seed=1)})
    assert model.fit(frame).predict(frame).shape == (6, 2)
    with pytest.raises(ValueError, match=r"history: expected the columns \['a', 'b'\], as in fit, got \['b', 'a'\]"):
        model.predict(frame[["b", "a"]])
