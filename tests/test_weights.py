"""Saved state comes back exactly, whole or not at all, and nothing else is taken for it."""

from __future__ import annotations

import io
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rnnkern as rk

STATE: dict[str, Any] = {
    "layer": {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.array([np.nan, -0.0, np.inf])},
    "layer/weight": np.float64(0.1),
    "empty": {"mapping": {}, "rows": np.zeros((0, 3), np.int8), "name": "", "list": [], "tuple": ()},
    "": {"": np.array(3.5)},
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big-endian": np.array([1, 2], ">i4"),
    "text": "línea\n\ud800",
    "flags": [True, False, None, (1, 2.5, float("-inf"))],
    "integers": [2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**6000],
    "scalars": [np.float32(1) / 3, np.int8(-3), np.bool_(True), np.longdouble(1) / 3, np.str_("a"), np.complex64(1j)],
    "record": np.zeros(3, [("a", "i4"), ("b", "f8", 2)]),
    "pcg": np.random.default_rng(3).bit_generator.state,
    "mersenne": np.random.MT19937(3).state,
}


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure, dtype, shape and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray | np.generic):
        return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
    return bool(a == b)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.npz"


def test_state_comes_back_exactly(path: Path) -> None:
    """Types, keys and their order, dtypes, shapes and bits survive."""
    rk.save(path, STATE)
    assert same(rk.load(path), STATE)


def test_a_generator_goes_on_where_it_was(path: Path) -> None:
    """Its state holds integers of 128 bits."""
    generator, other = np.random.default_rng(7), np.random.default_rng(8)
    rk.save(str(path), generator.bit_generator.state)
    other.bit_generator.state = rk.load(str(path))
    assert other.random() == generator.random()


def test_numpy_alone_reads_the_arrays(path: Path) -> None:
    """The file is an ordinary .npz."""
    rk.save(path, STATE)
    with np.load(path) as archive:
        assert same(archive["layer/weight"], STATE["layer"]["weight"])


def test_equal_states_give_equal_files(path: Path) -> None:
    """No dates, no random names."""
    rk.save(path, STATE)
    first = path.read_bytes()
    rk.save(path, rk.load(path))
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "state",
    [[1], {1: 2}, {"a": {"b": {1, 2}}}, {"a": object()}, {"a": np.array([None])}, {"a": np.ma.ones(3)}, {"a": b"x"}],
    ids=repr,
)
def test_what_cannot_be_saved_is_a_type_error(path: Path, state: Any) -> None:
    """It is found before anything is written."""
    path.write_text("before")
    with pytest.raises(TypeError, match=r"state"):
        rk.save(path, state)
    assert path.read_text() == "before"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("failing", [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_previous_file(
    path: Path, failing: tuple[Any, str], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk as on Ctrl-C."""

    def fail(*_arguments: object) -> None:
        raise error

    rk.save(path, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        with pytest.raises(error):
            rk.save(path, {"other": 1})
    assert same(rk.load(path), STATE)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(path: Path, tmp_path: Path) -> None:
    """The file it names is replaced, and has the permissions of any new file."""
    target = tmp_path / "target.npz"
    target.touch()
    path.symlink_to(target)
    rk.save(path, STATE)
    assert path.is_symlink()
    assert same(rk.load(target), STATE)
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_missing_file_or_folder_is_an_os_error(tmp_path: Path) -> None:
    """Not a damaged one."""
    with pytest.raises(FileNotFoundError):
        rk.load(tmp_path / "none.npz")
    with pytest.raises(FileNotFoundError):
        rk.save(tmp_path / "none" / "state.npz", {})


def test_a_truncated_file_is_refused(path: Path) -> None:
    """At every length."""
    rk.save(path, STATE)
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"state\.npz: expected a whole file"):
            rk.load(path)


def test_a_damaged_file_is_refused_or_harmless(path: Path) -> None:
    """A flipped bit either raises or lies where nothing reads it; it never changes a value."""
    rk.save(path, STATE)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for at, bit in zip(generator.integers(len(whole), size=300), generator.integers(8, size=300), strict=True):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(bit)
        path.write_bytes(damaged)
        try:
            loaded = rk.load(path)
        except ValueError as error:
            assert "state.npz" in str(error)  # noqa: PT017 (most of the damaged files raise, not all)
        else:
            assert same(loaded, STATE)


def _archive(structure: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("structure.json", structure)
    return data.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        _archive(b"\xff"),
        _archive(b"[]"),
        _archive(b'{"format": "rnnkern 2", "state": {"mapping": {}}}'),
        _archive(b'{"format": "rnnkern 1", "state": 3}'),
        _archive(b'{"format": "rnnkern 1", "state": {"mapping": {"a": {"array": "a"}}}}'),
        _archive(b'{"format": "rnnkern 1", "state": {"mapping": {"a": {"pickle": "a"}}}}'),
        _archive(b'{"format": "rnnkern 1", "state": ' + b"[" * 100_000),
    ],
    ids=range(9),
)
def test_a_foreign_file_is_refused(path: Path, data: bytes) -> None:
    """With the path in the message."""
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.npz"):
        rk.load(path)


def test_an_archive_of_numpy_is_refused(path: Path) -> None:
    """It has no structure to return."""
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match=r"state\.npz"):
        rk.load(path)
