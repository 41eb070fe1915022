"""The PEP 517 backend: scikit-build-core, and a wheel without kernels that says why where they do not compile.

The reason, the last lines of the failed build, is installed as `rnnkern/_build_failure.txt`. `RNNKERN_REQUIRE_NATIVE=1`
makes the failure fatal. There are no prepare_metadata hooks because the wheel's tag is not known before the build.
"""

import os
import sys
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

REASON = Path("build/failure")  # no dot in the name: it becomes part of a dotted setting below


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
    with last_lines(40) as lines:
        try:
            return build(directory, settings)
        except (Exception, SystemExit) as error:  # scikit-build-core turns a failed CMake or compiler into SystemExit
            if os.environ.get("RNNKERN_REQUIRE_NATIVE", "0") not in ("", "0"):
                raise
            problem = error
    REASON.parent.mkdir(exist_ok=True)
    tail = b"".join(lines).decode(errors="replace")
    REASON.write_text(tail if isinstance(problem, SystemExit) else f"{tail}{type(problem).__name__}: {problem}\n")
    print(f"*** The native module could not be built; building rnnkern without it. {REASON.resolve()} says why.")
    pure = {"wheel.cmake": "false", f"wheel.force-include.{REASON}": "rnnkern/_build_failure.txt"}
    return build(directory, {**(settings or {}), **pure})


def build_wheel(wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None) -> str:
    return native_or_pure(skbuild.build_wheel, wheel_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    return native_or_pure(skbuild.build_editable, wheel_directory, config_settings)
