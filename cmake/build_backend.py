"""The PEP 517 backend: scikit-build-core, and a wheel without kernels that says why where they do not compile.

The reason, the last lines of the failed build, is installed as `rnnkern/_build_failure.txt`. `RNNKERN_REQUIRE_NATIVE=1`
makes the failure fatal. There are no prepare_metadata hooks because the wheel's tag is not known before the build.

Each build has a folder of its own, so that builds at the same time do not meet; what they share are objects, see
`reuse.py`.
"""

import os
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scikit_build_core import build as skbuild
from scikit_build_core.build import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
]

Settings = dict[str, str | list[str]] | None


def share_objects() -> None:
    """Let the builds from this tree reuse each other's objects, unless a launcher is set."""
    if os.name != "posix":  # without locks
        return
    mine = Path(tempfile.gettempdir()) / f"rnnkern-objects-{os.getuid()}"
    for folder in (Path("build/objects").absolute(), mine):
        try:
            folder.mkdir(mode=0o700 if folder == mine else 0o777, parents=True, exist_ok=True)
            # Trust no folder that somebody else has made in a place where everybody writes.
            usable = os.access(folder, os.W_OK) and (folder != mine or mine.lstat().st_uid == os.getuid())
        except OSError:
            continue
        if usable:
            launcher = [sys.executable, "-IS", str(Path(__file__).with_name("reuse.py")), str(folder)]
            os.environ.setdefault("CMAKE_CXX_COMPILER_LAUNCHER", ";".join(launcher))
            return


@contextmanager
def last_lines(count: int) -> Iterator[deque[bytes]]:
    """The last lines that this process and its children print; they are printed all the same."""
    lines: deque[bytes] = deque(maxlen=count)
    read_end, write_end = os.pipe()
    terminal = os.dup(1), os.dup(2)

    def copy() -> None:
        with os.fdopen(read_end, "rb") as stream:
            for line in stream:
                lines.append(line)
                os.write(terminal[0], line)

    copier = threading.Thread(target=copy)
    copier.start()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(terminal[0], 1)
        os.dup2(terminal[1], 2)
        copier.join()
        os.close(terminal[0])
        os.close(terminal[1])


def native_or_pure(build: Callable[..., str], directory: str, settings: Settings) -> str:
    share_objects()
    with last_lines(40) as lines:
        try:
            return build(directory, settings)
        except (Exception, SystemExit) as error:  # scikit-build-core turns a failed CMake or compiler into SystemExit
            if os.environ.get("RNNKERN_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            problem = error
    print("*** The native module could not be built; building rnnkern without it. `rnnkern doctor` will say why.")
    with tempfile.TemporaryDirectory() as folder:
        reason = Path(folder, "failure")
        tail = b"".join(lines).decode(errors="replace")
        reason.write_text(tail if isinstance(problem, SystemExit) else f"{tail}{type(problem).__name__}: {problem}\n")
        pure = {"wheel.cmake": "false", f"wheel.force-include.{reason}": "rnnkern/_build_failure.txt"}
        return build(directory, {**(settings or {}), **pure})


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return native_or_pure(skbuild.build_wheel, wheel_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return native_or_pure(skbuild.build_editable, wheel_directory, config_settings)
