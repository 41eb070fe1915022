"""Saved state comes back exactly, whole or not at all, and nothing else is taken for it."""

from __future__ import annotations

import io
import json
import os
import stat
import sys
import zipfile
from pathlib import Path
from types import ModuleType
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


# What a file of safetensors cannot hold is refused; see below.
PLAIN = {key: value for key, value in STATE.items() if key not in ("big-endian", "record", "scalars")} | {
    "scalars": [np.float32(1) / 3, np.int8(-3), np.bool_(True), np.complex64(1j), np.uint64(2**64 - 1)],
    "names": {"a.b": np.zeros(1), "a": {"b": np.ones(1)}, "__metadata__": np.ones(2), "\ud800": np.ones(3)},
    "a.b'": np.ones(4),
}


@pytest.fixture(params=["state.npz", "state.safetensors"])
def path(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A path of each format."""
    if request.param.endswith(".safetensors"):
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return tmp_path / request.param


@pytest.fixture
def state(path: Path) -> dict[str, Any]:
    """One of everything that the format holds."""
    return STATE if path.suffix == ".npz" else PLAIN


def test_state_comes_back_exactly(path: Path, state: dict[str, Any]) -> None:
    """Types, keys and their order, dtypes, shapes and bits survive."""
    rk.save(path, state)
    assert same(rk.load(path), state)


def test_a_generator_goes_on_where_it_was(path: Path) -> None:
    """Its state holds integers of 128 bits."""
    generator, other = np.random.default_rng(7), np.random.default_rng(8)
    rk.save(str(path), generator.bit_generator.state)
    other.bit_generator.state = rk.load(str(path))
    assert other.random() == generator.random()


def test_numpy_alone_reads_the_arrays(tmp_path: Path) -> None:
    """The file is an ordinary .npz."""
    path = tmp_path / "state.npz"
    rk.save(path, STATE)
    with np.load(path) as archive:
        assert same(archive["layer/weight"], STATE["layer"]["weight"])


def test_equal_states_give_equal_files(path: Path, state: dict[str, Any]) -> None:
    """No dates, no random names."""
    rk.save(path, state)
    first = path.read_bytes()
    rk.save(path, rk.load(path))
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    "wrong",
    [[1], {1: 2}, {"a": {"b": {1, 2}}}, {"a": object()}, {"a": np.array([None])}, {"a": np.ma.ones(3)}, {"a": b"x"}],
    ids=repr,
)
def test_what_cannot_be_saved_is_a_type_error(path: Path, wrong: Any) -> None:
    """It is found before anything is written."""
    path.write_text("before")
    with pytest.raises(TypeError, match=r"state"):
        rk.save(path, wrong)
    assert path.read_text() == "before"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("failing", [(os, "fsync"), (Path, "replace")], ids=["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_previous_file(
    path: Path,
    state: dict[str, Any],
    failing: tuple[Any, str],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a full disk as on Ctrl-C."""

    def fail(*_arguments: object) -> None:
        raise error

    rk.save(path, state)
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        with pytest.raises(error):
            rk.save(path, {"other": 1})
    assert same(rk.load(path), state)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(path: Path, state: dict[str, Any], tmp_path: Path) -> None:
    """The file it names is replaced, and has the permissions of any new file; the name of the link says the format."""
    target = tmp_path / "target"
    target.touch()
    path.symlink_to(target)
    rk.save(path, state)
    assert path.is_symlink()
    assert same(rk.load(path), state)
    other = tmp_path / "other"
    other.touch()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_a_missing_file_or_folder_is_an_os_error(path: Path) -> None:
    """Not a damaged one."""
    with pytest.raises(FileNotFoundError):
        rk.load(path)
    with pytest.raises(FileNotFoundError):
        rk.save(path.parent / "none" / path.name, {})


def test_a_truncated_file_is_refused(path: Path, state: dict[str, Any]) -> None:
    """At many lengths."""
    rk.save(path, state)
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path.name}: expected a whole "):
            rk.load(path)


def test_a_small_file_is_refused_at_every_length_but_its_own(path: Path) -> None:
    """There is no length at which half of it is taken for all."""
    rk.save(path, {"w": np.ones(2, np.float32), "n": 3})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"{path.name}: expected a whole "):
            rk.load(path)


def test_a_damaged_file_is_refused_or_harmless(path: Path) -> None:
    """Any other value of any byte either raises or lies where nothing reads it; it never changes a value."""
    small = {"layer": {"w": np.arange(6, dtype=np.float32).reshape(3, 2)}, "n": (3, np.float64(0.1), "a", None)}
    rk.save(path, small)
    whole = path.read_bytes()
    generator = np.random.default_rng(0)
    for at, flip in enumerate(generator.integers(1, 256, len(whole)).tolist()):
        damaged = bytearray(whole)
        damaged[at] ^= flip
        path.write_bytes(damaged)
        try:
            loaded = rk.load(path)
        except ValueError as error:
            assert path.name in str(error)  # noqa: PT017 (most of the damaged files raise, not all)
        else:
            assert same(loaded, small)


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
def test_a_foreign_file_is_refused(tmp_path: Path, data: bytes) -> None:
    """With the path in the message."""
    path = tmp_path / "state.npz"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"state\.npz"):
        rk.load(path)


def test_an_archive_of_numpy_is_refused(tmp_path: Path) -> None:
    """It has no structure to return."""
    path = tmp_path / "state.npz"
    np.savez(path, a=np.ones(3))
    with pytest.raises(ValueError, match=r"state\.npz"):
        rk.load(path)


# The format of safetensors


@pytest.fixture
def safetensors() -> ModuleType:
    """The package; skips where it is not installed."""
    module: ModuleType = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    return module


def test_safetensors_and_torch_read_the_arrays(tmp_path: Path, torch: ModuleType, safetensors: ModuleType) -> None:
    """By their keys, joined by dots: the names of a model's state dict."""
    layer = rk.LSTM(3, 4, num_layers=2, bidirectional=True)
    path = tmp_path / "state.safetensors"
    rk.save(path, {"rnn": layer.state_dict(), "epoch": 3, "loss": np.float64(0.5)})
    arrays = safetensors.load_file(path)
    assert set(arrays) == {f"rnn.{name}" for name in layer.parameters} | {"loss"}
    model = torch.nn.ModuleDict({"rnn": torch.nn.LSTM(3, 4, num_layers=2, bidirectional=True)})
    read = pytest.importorskip("safetensors.torch").load_file(path)
    del read["loss"]
    model.load_state_dict(read)
    for name, array in layer.parameters.items():
        assert np.array_equal(model.state_dict()[f"rnn.{name}"].numpy(), array)


def test_a_file_of_another_program_is_a_flat_mapping(
    tmp_path: Path, torch: ModuleType, safetensors: ModuleType
) -> None:
    """With the metadata that PyTorch's users write, with others and with none; its arrays are writable."""
    path = tmp_path / "model.safetensors"
    module = torch.nn.GRU(3, 4)
    for metadata in (None, {"format": "pt"}, {"made_with": "rnnkern"}):
        pytest.importorskip("safetensors.torch").save_file(module.state_dict(), path, metadata)
        loaded = rk.load(path)
        layer = rk.GRU(3, 4)
        layer.load_state_dict(loaded)
        for name, tensor in module.state_dict().items():
            assert np.array_equal(layer.parameters[name], tensor.numpy())
            assert loaded[name].flags.writeable
    assert safetensors.load_file(path).keys() == loaded.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_dtype_that_numpy_has_not_is_refused(tmp_path: Path, torch: ModuleType, dtype: str) -> None:
    """By the name of the array."""
    writer = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    writer.save_file({"rnn.weight": torch.ones(3).to(getattr(torch, dtype))}, path)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*'rnn\.weight' is of dtype (BF16|F8_E4M3)"):
        rk.load(path)


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize("key", ["big-endian", "record", "scalars"])
def test_a_dtype_that_safetensors_has_not_is_refused(tmp_path: Path, key: str) -> None:
    """Where it is, before anything is written."""
    path = tmp_path / "state.safetensors"
    with pytest.raises(TypeError, match=rf"state\['{key}'\].*: expected a dtype that \.safetensors files"):
        rk.save(path, {key: STATE[key]})
    assert not path.exists()


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
WRONG = {
    "overflow": ({"a": TENSOR | {"shape": [2**62, 2**62]}}, 4, ""),
    "dimension": ({"a": TENSOR | {"shape": [2**63, 0], "data_offsets": [0, 0]}}, 0, ""),
    "dimensions": ({"a": TENSOR | {"shape": [1] * 100}}, 4, "dimension"),
    "beyond": ({"a": TENSOR | {"shape": [2**38], "data_offsets": [0, 2**40]}}, 4, ""),
    "backwards": ({"a": TENSOR | {"data_offsets": [4, 0]}}, 4, ""),
    "more data": ({"a": TENSOR}, 5, ""),
    "no structure": ({"__metadata__": {"rnnkern": "["}}, 0, "Expecting value"),
    "a later version": ({"__metadata__": {"rnnkern": '{"format": "rnnkern 2"}'}}, 0, "format 'rnnkern 2'"),
    "deep": ({"__metadata__": {"rnnkern": '{"format": "rnnkern 1", "state": ' + "[" * 100_000}}, 0, "recursion"),
    "checksum": ({"__metadata__": {"rnnkern": '{"format": "rnnkern 1", "crc32": 1, "state": 2}'}}, 0, "checksum"),
    "key": ({"__metadata__": {"rnnkerm": '{"format": "rnnkern 1", "crc32": 1, "state": 2}'}}, 0, "'rnnkern'"),
    "no mapping": ([], 0, ""),
}


@pytest.mark.usefixtures("safetensors")
@pytest.mark.parametrize("case", WRONG)
def test_a_foreign_file_of_safetensors_is_refused(tmp_path: Path, case: str) -> None:
    """Without allocating what it claims to hold."""
    header, size, reason = WRONG[case]
    path = tmp_path / "state.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(ValueError, match=rf"state\.safetensors: expected a whole safetensors file: .*{reason}"):
        rk.load(path)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a file is read or written."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (rk.load, lambda path: rk.save(path, {})):
        with pytest.raises(ImportError, match=r'\.safetensors: .*python -m pip install safetensors'):
            call(tmp_path / "state.safetensors")
