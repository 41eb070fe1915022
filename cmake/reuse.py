"""A launcher of the compiler that compiles equal text once: reuse.py <folder of objects> <compiler> <option>...

An object is named by a hash of the preprocessed text, with every macro, and of the options. Where headers lie does not
count, because the isolated environments of pip, which hold pybind11, lie elsewhere each time. Whatever is wrong with
the folder, the compiler runs as if nothing were in front of it.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

MOST = 64  # objects that are kept, about 12 to a build
PLACES = {"-c", "-o", "-isystem", "-MF", "-MT"}  # options whose value, the next argument, is a path


def main(folder: Path, command: list[str]) -> int:
    target = Path(command[command.index("-o") + 1]) if "-o" in command else None
    # CMake's own tests, whose targets begin with cmTC_, read what the compiler says.
    if "-c" not in command or target is None or name(target).startswith("cmTC_"):
        return subprocess.call(command)
    with suppress(OSError), (folder / "lock").open("a") as lock:
        key = content(command)
        if key is not None:
            # Lock one byte, so that only builds of this very object wait for each other.
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, int(key[:15], 16))
            stored = folder / f"{name(target)}.{key}.o"
            if stored.exists():
                os.utime(stored)
                shutil.copyfile(stored, target)
                return 0
            code = subprocess.call(command)
            if code == 0:
                with suppress(OSError):
                    store(target, stored)
            return code
    return subprocess.call(command)


def content(command: list[str]) -> str | None:
    """Hash of what an object is made of, None where the preprocessor fails; lists the headers for Ninja on the way."""
    rest, options, preprocess, headers = iter(command), [], [], []
    for one in rest:
        if one in PLACES:
            value = next(rest)
            preprocess += {"-c": [value], "-o": []}.get(one, [one, value])
            headers += [value] if one == "-isystem" else []
        else:
            preprocess.append(one)
            (headers if one.startswith("-I") else options).append(one.removeprefix("-I"))
    # -dD shows the macros of the compiler too: its version, and what -march=native stands for.
    run = subprocess.run([*preprocess, "-E", "-P", "-dD"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    text = run.stdout
    for folder in sorted(filter(None, headers), key=len, reverse=True):  # pybind11 has __FILE__ in its messages
        text = text.replace(os.fsencode(folder), b"")
    return hashlib.sha256("\0".join(options).encode() + text).hexdigest() if run.returncode == 0 else None


def name(target: Path) -> str:
    """kernels_avx2 of CMakeFiles/kernels_avx2.dir/csrc/kernels.cpp.o, with the source where it is one of several."""
    folder = next((part.removesuffix(".dir") for part in target.parts if part.endswith(".dir")), "object")
    return f"{folder}.{target.name.split('.')[0]}"


def store(target: Path, stored: Path) -> None:
    temporary = stored.with_suffix(f".{os.getpid()}")
    shutil.copyfile(target, temporary)
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(stored)
    # Count what killed builds have left too: all names but that of the lock have a dot.
    for old in sorted(stored.parent.glob("*.*"), key=lambda path: path.stat().st_mtime)[:-MOST]:
        old.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
