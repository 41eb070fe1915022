"""From data to what layers take: nothing is lost, nothing leaks, and what is wrong is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import rnnkern as rk


def test_batches_have_every_sequence_once_with_its_like() -> None:
    """Bitwise as it was, in an order of the seed, with an eighth of the padding of batches in random order."""
    random = np.random.default_rng(13)
    sequences = [random.standard_normal((n, 2)).astype("f") for n in random.integers(0, 100, size=1_000)]
    seen, orders = [], []
    for options in ({"seed": 3}, {"seed": 3, "batch_first": True}, {"seed": 4}, {"shuffle": False}, {}):
        found, padded = [], 0
        for x, lengths, indices in rk.data.batches(sequences, 8, value=np.nan, **options):
            time_major = x.swapaxes(0, 1) if options.get("batch_first") else x
            assert time_major.dtype == np.float32
            assert time_major.shape == (lengths.max(), len(indices), 2)
            for b, index in enumerate(indices):
                np.testing.assert_array_equal(time_major[: lengths[b], b], sequences[index], strict=True)
                assert np.isnan(time_major[lengths[b] :, b]).all()
            found += indices.tolist()
            padded += time_major[..., 0].size - lengths.sum()
        assert sorted(found) == list(range(1_000))
        assert padded < 1_000 * 50 / 8  # in random order nearly as much as there are steps
        seen.append(found)
        orders.append(tuple(found))
    assert orders[0] == orders[1]
    assert len(set(orders)) == 4


def test_windows_do_not_leak() -> None:
    """What a window is to say lies in its part alone, and no earlier part has seen it; every step is said once."""
    steps, length, horizon = 101, 7, 3
    series = np.stack([np.arange(steps), -np.arange(steps)], axis=1)
    parts = rk.data.time_split(steps, 0.2, 0.25)
    assert [len(series[part]) for part in parts] == [56, 20, 25]
    known = -1
    for part in parts:
        x, y = rk.data.windows(series, length, horizon, part=part)
        assert x.shape[0] == length
        assert y.shape[0] == horizon
        np.testing.assert_array_equal(np.diff(np.concatenate([x, y])[..., 0], axis=0), 1)  # each without a gap
        assert y[..., 0].min() > known
        assert set(y[..., 0].ravel()) == set(range(max(part.start, length), part.stop))
        known = part.stop - 1
        assert max(x.max(), y.max()) <= known
        np.testing.assert_array_equal(y[..., 1], -y[..., 0])
        rows = rk.data.windows(series, length, horizon, part=part, stride=4, batch_first=True)
        for one, whole in zip(rows, (x, y), strict=True):
            np.testing.assert_array_equal(one, whole[:, ::4].swapaxes(0, 1), strict=True)
    assert rk.data.windows(series[:9, 0], length, horizon)[0].shape == (length, 0, 1)


def test_data_names_what_is_wrong() -> None:
    """Argument, expectation and what came."""
    data = rk.data
    letters = data.Vocabulary.count(["hello", "hi"], least=2)
    assert letters.symbols == ("h", "l")
    assert letters.decode(letters.encode("lh")) == ["l", "h"]
    again = data.Vocabulary(letters.symbols, unknown="h")
    assert again.encode("lo").tolist() == [1, 0]
    assert letters.encode("").shape == (0,)
    for sequences, dtype in (([[1], []], np.int64), ([[], [0.5], [1]], np.float64), ([[], []], np.float64)):
        assert {x.dtype for x, *_ in data.batches(sequences, 1)} == {np.dtype(dtype)}
    calls: list[tuple[Any, str]] = [
        (lambda: data.pad([]), "sequences: expected at least one, got none"),
        (lambda: data.pad(np.ones((2, 3))), r"sequences: expected a list of arrays \(T_b, ...\), got float64 of shape"),
        (lambda: data.pad([[[1, 2]], [[1]]]), r"sequences\[1\]: expected shape \(T_b, 2\), got \(1, 1\)"),
        (lambda: data.pad([[1]], value=0.5), "value: expected one that int64 has, as the sequences, got 0.5"),
        (lambda: data.pad([["a"]]), r"sequences\[0\]: expected numbers of shape \(T_b, ...\), got <U1"),
        (lambda: data.batches([[1]], 0), "batch_size: expected an integer >= 1, got 0"),
        (lambda: data.batches([[1]], 1, shuffle=1), "shuffle: expected a bool, got int 1"),
        (lambda: data.time_split(10, 0.5, 0.5), "fractions: expected less than 1 in all, got 1"),
        (lambda: data.time_split(10, 1.0), r"fractions\[0\]: expected a number in \[0, 1\), got 1.0"),
        (lambda: data.windows(["a"], 1), r"series: expected numbers of shape \(T, F\) or \(T,\), got <U1"),
        (lambda: data.windows([1, 2], 0), "length: expected an integer >= 1, got 0"),
        (
            lambda: data.windows([1, 2], 1, part=slice(0, 2, 2)),
            "part: expected a slice of steps that follow one another",
        ),
        (lambda: data.Vocabulary(""), "symbols: expected at least one, got none"),
        (lambda: data.Vocabulary("aba"), "symbols: expected each once, got 'a' twice"),
        (lambda: data.Vocabulary("ab", unknown="c"), "unknown: expected one of the symbols, got 'c'"),
        (lambda: letters.encode("ho"), "sequence: expected known symbols, got 'o'"),
        (lambda: letters.decode([2]), "indices: expected values from 0 to 1, got 2 to 2"),
        (lambda: letters.decode([0.5]), r"indices: expected integers of shape \(T,\), got float64 of shape \(1,\)"),
    ]
    for call, message in calls:
        with pytest.raises((TypeError, ValueError), match=message):
            call()
