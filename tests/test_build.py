"""What the compiler made: code of one ISA stays in its object, and the compiled cells are those of cells.py."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rnnkern.backends.native import native_module
from rnnkern.cells import CELLS
from rnnkern.config import use_isa

native: Any = native_module()
pytestmark = pytest.mark.skipif(native is None, reason="the compiled module is missing")

# `pip install .` leaves its objects in build/<wheel tag>; those of the sanitizers, in folders of their own, differ.
OBJECTS = sorted(Path(__file__).parents[1].glob("build/cp*/CMakeFiles/kernels_*.dir/csrc/kernels.cpp.o"))


def output(tool: str, *arguments: str) -> list[str]:
    """What a tool of the binutils says, line by line."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout.splitlines()


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """Kind and demangled name of each symbol, as `nm` has them."""
    lines = output("nm", "--demangle", *options, str(path))
    return [(kind, name) for kind, name in (line[17:].split(" ", 1) for line in lines)]


@pytest.fixture(params=OBJECTS or [None], ids=lambda path: path.parts[-3] if path else "none")
def kernels(request: pytest.FixtureRequest) -> Path:
    """The object of kernels.cpp for each ISA."""
    if request.param is None:
        pytest.skip("there is no build folder: install from the checkout with `pip install .`")
    path: Path = request.param
    return path


def test_kernels_define_one_global_symbol(kernels: Path) -> None:
    """The linker could take a weak function of a wide ISA for all callers, and crash machines without that ISA."""
    isa = kernels.parts[-3].removeprefix("kernels_").removesuffix(".dir")
    assert [name for kind, name in symbols(kernels) if kind.isupper() and kind != "U"] == [f"rnnkern::{isa}::table"]
    assert not {kind for kind, _ in symbols(kernels)} & set("vwu"), "a weak or a unique symbol"


def test_kernels_call_nothing_but_memory_functions(kernels: Path) -> None:
    """No allocation, no exception, no lock, no libm."""
    needed = {name for kind, name in symbols(kernels) if kind == "U"}
    assert needed <= {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_"}


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


def test_the_abi_refuses_another_version() -> None:
    """Null, and not functions that take other structs."""
    abi = ctypes.CDLL(native.__file__).rnnkern_abi
    abi.restype = ctypes.c_void_p
    assert [abi(version) is None for version in (0, 1, 2)] == [True, False, True]


def test_compiled_cells_are_those_of_python() -> None:
    """cells.h and cells.py list the same cells in the same order, with the same traits."""
    assert native.cells() == [
        {
            "name": cell.name,
            "gates": len(cell.gates),
            "states": len(cell.states),
            "extras": len(cell.extras),
            "projects": cell.projects,
            "two_products": cell.late_gates > 0,
        }
        for cell in CELLS.values()
    ]


def test_use_isa_ends_with_the_isa_before() -> None:
    """Also when what runs in it raises."""
    before = native.isa()
    with pytest.raises(ValueError, match="isa: expected one of"), use_isa("baseline"):
        use_isa("none").__enter__()
    assert native.isa() == before


def test_isas_end_with_the_baseline() -> None:
    """The last ISA is the one that every machine runs which can load the module."""
    assert native.isas()[-1] == ("baseline", True)
    assert native.isa() in dict(native.isas())
