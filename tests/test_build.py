"""What the compiler made: code of one ISA stays in its object, and the compiled cells are those of cells.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rnnkern import config
from rnnkern.backends import native as native_backend
from rnnkern.cells import CELLS
from rnnkern.config import use_isa

native: Any = native_backend.native_module()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled module is missing")

ROOT = Path(__file__).parents[1]
# `pip install .` leaves its objects here, the last ones for each ISA among others; those of the sanitizers differ.
OBJECTS = {
    path.name.split(".")[0]: path
    for path in sorted(ROOT.glob("build/objects/kernels_*.o"), key=lambda path: path.stat().st_mtime)
}


def output(tool: str, *arguments: str) -> list[str]:
    """What a tool of the binutils says, line by line."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and demangled name of each symbol, as `nm` has them."""
    lines = output("nm", "--demangle", *options, str(path))
    return [(kind, name) for kind, name in (line[17:].split(" ", 1) for line in lines)]


@pytest.fixture(params=list(OBJECTS.values()) or [None], ids=lambda path: path.name.split(".")[0] if path else "none")
def kernels(request: pytest.FixtureRequest) -> Path:
    """The object of kernels.cpp for each ISA."""
    if request.param is None:
        pytest.skip("there is no build folder: install from the checkout with `pip install .`")
    path: Path = request.param
    return path


def test_kernels_define_one_global_symbol(kernels: Path) -> None:
    """The linker could take a weak function of a wide ISA for all callers, and crash machines without that ISA."""
    isa = kernels.name.split(".")[0].removeprefix("kernels_")
    assert [name for kind, name in symbols(kernels) if kind.isupper() and kind != "U"] == [f"rnnkern::{isa}::table"]
    assert not {kind for kind, _ in symbols(kernels)} & set("vwu"), "a weak or a unique symbol"


def test_kernels_call_nothing_but_memory_functions(kernels: Path) -> None:
    """No exception, no lock, no libm, and no allocation but that of how a thread's tiles are shaped (amx.h)."""
    needed = {name for kind, name in symbols(kernels) if kind == "U"}
    assert needed <= {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_", "__tls_get_addr"}


def test_kernels_have_no_static_initialiser(kernels: Path) -> None:
    """It would run at import, on machines without the ISA too."""
    sections = "\n".join(output("readelf", "--sections", "--wide", str(kernels)))
    assert ".text" in sections
    for section in (".init_array", ".ctors", ".text.startup"):
        assert section not in sections


def test_module_exports_nothing_of_the_namespace() -> None:
    """Two extensions in one process never take each other's functions."""
    exported = {name for _, name in symbols(Path(native.__file__), "--dynamic", "--defined-only")}
    assert "PyInit__rnnkern_native" in exported
    ours = {name for name in exported if "rnnkern" in name}
    assert ours == {
        "PyInit__rnnkern_native",
        "rnnkern_abi",
        "rnnkern_get_num_threads",
        "rnnkern_set_num_threads",
    }


def test_what_pybind11_keeps_to_itself_is_used_in_one_file() -> None:
    """An upgrade of pybind11 that breaks it breaks nothing else."""
    inside = re.compile(r"py(bind11)?::detail|\btp_new\b|get_value_and_holder")
    sources = {path.name for path in (ROOT / "csrc").glob("*") if inside.search(path.read_text())}
    assert sources == {"pybind11_inside.h"}


def test_compiled_cells_are_those_of_python() -> None:
    """cells.h and cells.py list the same cells in the same order, and every constant of one follows from the other.

    The compiled cells read h from y: it takes no slot of theirs, and a cell that saves nothing else saves nothing."""
    assert native.cells() == [
        {
            "name": cell.name,
            "gates": len(cell.gates),
            "states": len(cell.states),
            "saved": len([value for value in cell.saved if value != "h"]),
            "kept": [-1 if state == "h" else cell.saved.index(state) for state in cell.states],
            "extras": len(cell.extras),
            "late_gates": cell.late_gates,
            "projects": cell.projects,
            "separate_recurrent": bool(cell.separate_gates),
            "bounded": cell.bounded,
        }
        for cell in CELLS.values()
    ]


def test_use_isa_ends_with_the_isa_before() -> None:
    """Also when what runs in it raises."""
    before = native.isa()
    with pytest.raises(ValueError, match="isa: expected one of"), use_isa("baseline"):
        use_isa("none").__enter__()
    assert native.isa() == before


def test_an_old_threadpoolctl_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before 3.2, where nothing can be registered; and a module that is of no file ends no `show_config`."""
    monkeypatch.setitem(sys.modules, "threadpoolctl", ModuleType("threadpoolctl"))
    config._register_with_threadpoolctl()
    assert config.show_config("dicts")["optional"]["threadpoolctl"]


def test_isas_end_with_one_for_all() -> None:
    """The last ISA is the one that every machine runs which can load the module."""
    assert native.isas()[-1][1]
    assert native.isa() in dict(native.isas())


def test_no_header_has_the_name_of_a_standard_one() -> None:
    """Whoever has csrc/ among the include folders still gets the compiler's own."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not installed")
    headers = [path.name for path in (Path(__file__).parents[1] / "csrc").glob("*.h")]
    lines = "".join(f"#if __has_include(<{name}>)\n#error {name}\n#endif\n" for name in headers)
    run = subprocess.run([compiler, "-E", "-x", "c++", "-"], input=lines, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("record", "source"),
    [
        (None, "rnnkern"),
        ('{"url": "file:///a%20b/rnnkern-1.tar.gz", "archive_info": {}}', "'/a b/rnnkern-1.tar.gz'"),
        ('{"url": "file:///tree", "dir_info": {"editable": true}}', "--editable /tree"),
        ('{"url": "https://host/rnnkern-1.tar.gz", "archive_info": {}}', "https://host/rnnkern-1.tar.gz"),
    ],
)
def test_what_mends_a_build_names_its_source(
    record: str | None, source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As pip has noted it; and not what the compiler said, which `rnnkern doctor` shows."""
    monkeypatch.setattr(native_backend, "_native", None)
    monkeypatch.setattr(native_backend, "build_failure", lambda: "line\n" * 40)
    (tmp_path / "METADATA").touch()
    if record is not None:
        (tmp_path / "direct_url.json").write_text(record)
    monkeypatch.setattr(metadata, "distribution", lambda _: metadata.PathDistribution(tmp_path))
    reason = native_backend.unavailable()
    assert reason is not None
    assert reason.endswith(f": python -m pip install --force-reinstall --no-deps --no-cache-dir {source}")
    assert "rnnkern doctor" in reason
    assert "\n" not in reason


class Project:
    """A source and a header, compiled through cmake/reuse.py by a compiler that writes down each run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.objects, self.log = folder, folder / "objects", folder / "log"
        self.objects.mkdir()
        self.compiler = folder / "compiler"
        self.compiler.write_text(f'#!/bin/sh\ncase "$*" in *-E*) ;; *) echo run >> {self.log};; esac\nexec g++ "$@"\n')
        self.compiler.chmod(0o755)
        (folder / "a.cpp").write_text('#include "a.h"\nint f() { return VALUE; }\n')
        self.log.touch()

    def start(self, build: str, value: str, *options: str) -> subprocess.Popen[bytes]:
        """Compile in a folder of its own, where the header lies too."""
        folder = self.folder / build
        folder.mkdir()
        (folder / "a.h").write_text(f"#define VALUE {value}\ninline const char* where() {{ return __FILE__; }}\n")
        command = [
            sys.executable, "-IS", str(ROOT / "cmake" / "reuse.py"), str(self.objects), str(self.compiler),
            f"-I{folder}", *options, "-MD", "-MT", "a.o", "-MF", "a.d", "-o", "a.o", "-c", str(self.folder / "a.cpp"),
        ]  # fmt: skip
        return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)

    def runs(self) -> int:
        """How often the compiler has run."""
        return len(self.log.read_text().splitlines())


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Skips where there is no g++."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return Project(tmp_path)


def test_builds_reuse_objects_by_content(project: Project, tmp_path: Path) -> None:
    """Wherever headers lie, at the same time too; another text or option is compiled, and an error stays one."""
    both = [project.start(build, "1") for build in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    assert project.runs() == 1
    assert (tmp_path / "one/a.o").read_bytes() == (tmp_path / "two/a.o").read_bytes()
    for build in ("one", "two"):
        assert f"{tmp_path / build}/a.h" in (tmp_path / build / "a.d").read_text()
    assert project.start("three", "2").wait() == 0
    assert project.start("four", "1", "-O1").wait() == 0
    assert project.runs() == 3
    assert project.start("five", "nothing").wait() == 1
    assert project.start("six", "nothing").wait() == 1
    assert len(list(project.objects.glob("*.o"))) == 3


def test_a_build_needs_no_folder_of_objects(project: Project, tmp_path: Path) -> None:
    """It compiles as if nothing were in front of the compiler."""
    project.objects.rmdir()
    assert project.start("one", "1").wait() == 0
    assert (tmp_path / "one/a.o").exists()
    assert not project.objects.exists()


@pytest.mark.exhaustive
def test_two_builds_of_one_tree_at_the_same_time_have_kernels(tmp_path: Path) -> None:
    """And a third, after them, compiles nothing."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", "build", "*.so", ".venv"))
    environment = os.environ | {"CMAKE_ARGS": "-DRNNKERN_ISAS=baseline", "RNNKERN_REQUIRE_NATIVE": "1"}

    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path / name), str(tree)]
        return subprocess.Popen(command, env=environment)

    both = [start(name) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    objects = {path: path.stat().st_ino for path in tree.glob("build/objects/*.o")}
    assert len(objects) == 10
    assert start("three").wait() == 0
    assert {path: path.stat().st_ino for path in tree.glob("build/objects/*.o")} == objects
