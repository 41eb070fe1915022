"""The kernels give the bits that they have always given: a sample of what `tools/bits check` compares."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rnnkern import show_config

bits = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "tools" / "bits")))


@pytest.mark.usefixtures("native")
def test_results_have_the_recorded_bits():
    """A fifth of the configurations; what changes a bit is recorded anew on purpose, or is a mistake."""
    isa = show_config(mode="dicts")["isa"]
    if not bits.recorded().tensors(isa):
        pytest.skip(f"nothing is recorded for {isa} on this machine")
    assert bits.changes(isa, list(bits.recorded().inputs)[::5]) == []


def test_the_hash_tells_all_bits_but_those_of_nan():
    """The last digit and the sign of a zero count, the sign of a NaN, which compilers choose, does not."""
    value = np.ones((2, 3), np.float32)
    for other in (np.nextafter(value, 2), value.astype(np.float64), value.T):
        assert bits.hashed(value) != bits.hashed(other)
    assert bits.hashed(0 * value) != bits.hashed(-0.0 * value)
    assert bits.hashed(np.nan * value) == bits.hashed(np.negative(np.nan * value))
