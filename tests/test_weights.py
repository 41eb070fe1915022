"""Saved state comes back exactly, whole or not at all, and nothing else is taken for it."""

from __future__ import annotations

import copy
import errno
import fcntl
import io
import json
import os
import pickle
import socket
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import rnnkern as rk
from rnnkern import weights

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
    "scalars": [np.float32(1) / 3, np.int8(-3), np.bool_(True), np.str_("a"), np.complex64(1j)],
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


def test_a_long_double_keeps_its_value(tmp_path: Path) -> None:
    """Its padding bytes, which no number depends on, need not."""
    path, third = tmp_path / "state.npz", np.longdouble(1) / 3
    rk.save(path, {"third": third})
    loaded = rk.load(path)["third"]
    assert type(loaded) is np.longdouble
    assert loaded == third


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


def test_what_cannot_be_saved_is_a_type_error(subtests: pytest.Subtests, path: Path) -> None:
    """It is found before anything is written."""
    path.write_text("before")
    wide = np.zeros(2, [(f"column {index}", "f4") for index in range(500)])  # of a dtype too long to be read again
    things = ([1], {1: 2}, {"a": {"b": {1, 2}}}, {"a": len}, {"a": np.array([None])}, {"a": np.ma.ones(3)}, {"a": b"x"})
    things += ({"a": wide},)
    for wrong in things:
        with subtests.test(str(wrong)), pytest.raises(TypeError, match=r"state"):
            rk.save(path, wrong)  # type: ignore[arg-type]
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
    """On a full disk as on Ctrl-C; an OSError names the file, not the temporary one."""
    raised = error(errno.ENOSPC, "No space left on device", "temporary")

    def fail(*_arguments: object) -> None:
        raise raised

    rk.save(path, state)
    with monkeypatch.context() as patch:
        patch.setattr(*failing, fail)
        with pytest.raises(error) as caught:
            rk.save(path, {"other": 1})
    if error is OSError:
        assert str(caught.value) == f"[Errno {errno.ENOSPC}] No space left on device: {str(path)!r}"
    assert same(rk.load(path), state)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_link_stays_a_link(path: Path, state: dict[str, Any], tmp_path: Path) -> None:
    """The file it names is replaced; the name of the link says the format."""
    target = tmp_path / "target"
    target.touch()
    path.symlink_to(target)
    rk.save(path, state)
    assert path.is_symlink()
    assert same(rk.load(path), state)


def test_a_file_keeps_its_permissions(subtests: pytest.Subtests, path: Path) -> None:
    """A private file stays private; a new one has those of any other new file."""
    rk.save(path, {})
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    for mode in (0o600, 0o640, 0o666, 0o4755):
        with subtests.test(oct(mode)):
            path.chmod(mode)
            rk.save(path, {"a": mode})
            assert stat.S_IMODE(path.stat().st_mode) == mode
            assert rk.load(path) == {"a": mode}


def test_a_write_protected_file_is_refused(path: Path) -> None:
    """The directory would allow it, and the superuser may everything."""
    rk.save(path, {"a": 1})
    path.chmod(0o444)
    with pytest.raises(PermissionError, match=r"write-protected: .*state"):
        rk.save(path, {"a": 2})
    assert rk.load(path) == {"a": 1}


@pytest.mark.parametrize("kind", ["a directory", "a FIFO", "a socket", "a device"])
def test_what_is_no_file_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name, by `save` and by `load`, and it stays what it is."""
    monkeypatch.chdir(tmp_path)  # the name of a socket may have about 100 bytes
    path = Path("/dev/null" if kind == "a device" else "here")
    with socket.socket(socket.AF_UNIX) as listener:
        {"a directory": path.mkdir, "a FIFO": lambda: os.mkfifo(path), "a socket": lambda: listener.bind("here")}.get(
            kind, lambda: None
        )()
        before = path.stat()
        for call in (rk.load, lambda path: rk.save(path, {})):
            with pytest.raises(OSError, match=rf"expected a file, got {kind}: '{path}'"):
                call(path)
        assert path.stat().st_ino == before.st_ino
    assert len(list(tmp_path.iterdir())) == (kind != "a device")


def test_a_path_may_be_of_any_kind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A str, bytes or os.PathLike, absolute or not, with a name as long as names can be."""
    monkeypatch.chdir(path.parent)
    longest = path.with_stem("w" * (255 - len(path.suffix)))
    for number, one in enumerate((path, str(path), os.fsencode(path), path.name, longest, longest.name)):
        rk.save(one, {"a": number})
        assert rk.load(one) == {"a": number}
    assert sorted(path.parent.iterdir()) == sorted([path, longest])
    for wrong, error in ((3, TypeError), (None, TypeError), ("", IsADirectoryError), ("new/", IsADirectoryError)):
        for call in (rk.load, lambda path: rk.save(path, {})):
            with pytest.raises(error):
                call(wrong)  # type: ignore[arg-type]


def test_links_that_lead_nowhere(path: Path) -> None:
    """A link to a file that is not there makes it; links in a circle are an error and stay."""
    path.symlink_to(path.with_name("target"))
    rk.save(path, {"a": 1})
    assert path.is_symlink()
    assert rk.load(path) == {"a": 1}
    path.unlink()
    path.symlink_to(path.name)
    for call in (rk.load, lambda path: rk.save(path, {})):
        with pytest.raises(OSError, match="state"):
            call(path)
    assert path.is_symlink()


def test_what_a_killed_save_left_is_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a later save of the same file, unless the save still runs."""

    def fail(*_arguments: object) -> None:
        raise OSError(errno.EIO, "broken")

    def abandon(target: Path) -> Path:
        before = set(target.parent.iterdir())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", fail)
            patch.setattr(Path, "unlink", fail)
            with pytest.raises(OSError, match=r"state|other"):
                rk.save(target, {})
        (left,) = set(target.parent.iterdir()) - before
        return left

    running, of_other = abandon(path), abandon(path.with_stem("other"))
    with running.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        abandon(path)
        rk.save(path, {})
        assert set(path.parent.iterdir()) == {path, running, of_other}
    rk.save(path, {})
    assert set(path.parent.iterdir()) == {path, of_other}


def test_saves_of_one_file_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose new file another takes for abandoned, before or while it locks that file, makes another file."""
    path, lock = tmp_path / "state.npz", weights._lock
    for number, removed in enumerate((True, False)):

        def lock_late(file: Any, removed: bool = removed) -> None:
            monkeypatch.setattr(weights, "_lock", lock)
            with Path(file.name).open("rb") as taken:
                if removed:
                    rk.save(path, {"a": -1})
                else:
                    lock(taken)
                lock(file)

        monkeypatch.setattr(weights, "_lock", lock_late)
        rk.save(path, {"a": number})
        assert rk.load(path) == {"a": number}
        assert list(tmp_path.iterdir()) == [path]


def test_a_thread_that_saves_leaves_nothing_when_the_process_ends(tmp_path: Path) -> None:
    """A daemon thread, which Python does not wait for."""
    code = (
        "import os, sys, threading, rnnkern as rk; waiting = threading.Event();"
        "os.fsync = lambda _: (waiting.set(), threading.Event().wait());"
        "threading.Thread(target=rk.save, args=(sys.argv[1], {}), daemon=True).start(); waiting.wait();"
        "print(len(os.listdir(os.path.dirname(sys.argv[1]))))"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path / "state.npz"], check=True, capture_output=True)
    assert run.stdout == b"1\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("safetensors")
def test_what_is_written_is_what_the_checksum_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a thread trains the arrays on meanwhile."""
    path, array = tmp_path / "state.safetensors", np.ones(3)
    checksum = weights._checksum

    def train_on(*arguments: Any) -> int:
        array[:] += 1
        return checksum(*arguments)

    monkeypatch.setattr(weights, "_checksum", train_on)
    rk.save(path, {"a": array})
    monkeypatch.undo()
    assert same(rk.load(path), {"a": np.ones(3)})
    assert array[0] == 2


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


FOREIGN = [
    b"",
    b"hello",
    _archive(b"\xff"),
    _archive(b"[]"),
    _archive(b'{"format": "rnnkern 2", "state": {"mapping": {}}}'),
    _archive(b'{"format": "rnnkern 1", "state": 3}'),
    _archive(b'{"format": "rnnkern 1", "state": {"mapping": {"a": {"array": "a"}}}}'),
    _archive(b'{"format": "rnnkern 1", "state": {"mapping": {"a": {"pickle": "a"}}}}'),
    _archive(b'{"format": "rnnkern 1", "state": ' + b"[" * 100_000),
]


def test_a_foreign_file_is_refused(subtests: pytest.Subtests, tmp_path: Path) -> None:
    """With the path in the message."""
    path = tmp_path / "state.npz"
    for number, data in enumerate(FOREIGN):
        with subtests.test(number=number):
            path.write_bytes(data)
            with pytest.raises(ValueError, match=r"state\.npz"):
                rk.load(path)


def test_a_file_of_numpy_is_refused(subtests: pytest.Subtests, tmp_path: Path) -> None:
    """It has no structure to return; the message says how to read it."""
    path = tmp_path / "state.npz"
    for writer in (np.savez, np.savez_compressed, np.save):
        with path.open("wb") as file:
            writer(file, np.ones(3))
        message = rf"state\.npz: .* of numpy\.{writer.__name__[:4]}.*numpy\.load\(path\)"
        with subtests.test(writer.__name__), pytest.raises(ValueError, match=message):
            rk.load(path)


def test_a_file_of_another_program_is_refused(path: Path) -> None:
    """Which the message names."""
    for data, message in (
        (b"\x89HDF\r\n\x1a\n", r"Keras: .* rnnkern\.convert\.from_keras"),
        (pickle.dumps([1]), r"a pickle: pickle\.load"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            rk.load(path)


def test_a_file_of_pytorch_is_refused(subtests: pytest.Subtests, path: Path, torch: ModuleType) -> None:
    """Under any name; the message says how to read it."""
    module = torch.nn.Linear(2, 3)
    for kind, target in product(("zip", "legacy", "script"), (path, path.with_suffix(".pth"))):
        if kind == "script":
            with zipfile.ZipFile(target, "w") as archive:
                for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
                    archive.writestr(f"model/{name}", b"")
        else:
            torch.save(module.state_dict(), target, _use_new_zipfile_serialization=kind == "zip")
        message = r"PyTorch: torch\.(jit\.)?load\(path"
        with subtests.test(f"{kind} {target.suffix}"), pytest.raises(ValueError, match=message):
            rk.load(target)


def test_a_small_file_takes_little_memory(tmp_path: Path) -> None:
    """It may be compressed, name an array often, or have members that lie on each other: it is refused."""
    path = tmp_path / "state.npz"
    rk.save(path, {"a": np.zeros(1 << 18)})
    with zipfile.ZipFile(path) as plain:
        members = {name: plain.read(name) for name in plain.namelist()}
    often = json.dumps({"format": "rnnkern 1", "state": {"mapping": {str(k): {"array": "a"} for k in range(64)}}})

    def packed(compression: int, structure: str | bytes, *twins: str) -> bytes:
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", compression) as archive:
            archive.writestr("a.npy", members["a.npy"])
            archive.writestr("structure.json", structure)
            for name in twins:  # entries of the directory that point to the data of the first
                twin = copy.copy(archive.getinfo("a.npy"))
                twin.filename = name
                archive.filelist.append(twin)
        return data.getvalue()

    structure = members["structure.json"]
    for data, reason in (
        (packed(zipfile.ZIP_DEFLATED, structure), "compressed"),
        (packed(zipfile.ZIP_STORED, often), "asked for twice"),
        (packed(zipfile.ZIP_STORED, structure, "b.npy"), "overlap"),
        (packed(zipfile.ZIP_STORED, structure, "a.npy"), "overlap"),
    ):
        path.write_bytes(data)
        tracemalloc.start()
        with pytest.raises(ValueError, match=rf"state\.npz: .*{reason}"):
            rk.load(path)
        assert tracemalloc.get_traced_memory()[1] < len(data) + (6 << 20)  # the file, and a member as bytes and array
        tracemalloc.stop()


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
def test_a_dtype_that_safetensors_has_not_is_refused(subtests: pytest.Subtests, tmp_path: Path) -> None:
    """Where it is, before anything is written."""
    path = tmp_path / "state.safetensors"
    for key in ("record", "scalars"):
        message = rf"state\['{key}'\].*: expected a dtype that \.safetensors files"
        with subtests.test(key), pytest.raises(TypeError, match=message):
            rk.save(path, {key: STATE[key]})
    assert not path.exists()


@pytest.mark.usefixtures("safetensors")
def test_safetensors_turns_big_endian_arrays(tmp_path: Path) -> None:
    """To the one order of bytes that the format has; the values stay."""
    given = {"array": np.array([[1, 2], [3, 4]], ">i4").T, "scalar": np.array(1.5, ">f8"), "complex": np.ones(2, ">c8")}
    rk.save(tmp_path / "state.safetensors", given)
    for name, array in rk.load(tmp_path / "state.safetensors").items():
        assert same(array, given[name].astype(given[name].dtype.newbyteorder("<")))


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
def test_a_foreign_file_of_safetensors_is_refused(subtests: pytest.Subtests, tmp_path: Path) -> None:
    """Without allocating what it claims to hold."""
    path = tmp_path / "state.safetensors"
    for case, (header, size, reason) in WRONG.items():
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        message = rf"state\.safetensors: expected a whole safetensors file: .*{reason}"
        with subtests.test(case), pytest.raises(ValueError, match=message):
            rk.load(path)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a file is read or written."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (rk.load, lambda path: rk.save(path, {})):
        with pytest.raises(ImportError, match=r"\.safetensors: .*python -m pip install safetensors"):
            call(tmp_path / "state.safetensors")
