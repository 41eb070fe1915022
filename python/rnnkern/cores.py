"""The cores that a process may use, as the operating system tells. Asked once, when the kernels are loaded."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["cgroup_quota", "default_threads", "most_threads", "siblings"]


def siblings(cpu: int) -> str:
    """The CPUs that share the core of a CPU, such as "0,64"; its own number where that is not known."""
    with suppress(OSError):
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    return str(cpu)


def most_threads(siblings: Iterable[str], quota: float) -> int:
    """The threads of a process under a quota of CPUs' worth of time: one for each core.

    `siblings` says of each CPU that it may run on which CPUs share its core; two threads of a core have one set of
    units for multiply-adds.
    """
    return int(max(1, min(len(set(siblings)), math.ceil(quota) if quota < math.inf else math.inf)))


def cgroup_quota(system: Path = Path("/")) -> float:
    """CPUs' worth of time: the tightest quota from this process's cgroup up to the root; infinite for no limit.

    In a container the path may be the host's, and then only the root is there to read.
    """
    tightest = math.inf
    with suppress(OSError, ValueError):  # an import never fails for what a system shows there
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)  # "0::/path" in v2, "4:cpu,cpuacct:/path" in v1
            if controllers and "cpu" not in controllers.split(","):
                continue
            root = system / ("sys/fs/cgroup/cpu" if controllers else "sys/fs/cgroup")
            folder = root / path.lstrip("/")
            folders = [folder, *folder.parents]
            tightest = min(tightest, *map(_quota, folders[: folders.index(root) + 1]))
    return tightest


def _quota(cgroup: Path) -> float:
    """What the cgroup in this folder grants itself."""
    with suppress(OSError, ValueError):
        time, period = (cgroup / "cpu.max").read_text().split()  # v2; "max" is not a number
        return int(time) / int(period)
    with suppress(OSError, ValueError):
        granted = int((cgroup / "cpu.cfs_quota_us").read_text())  # v1; -1 is no limit
        return granted / int((cgroup / "cpu.cfs_period_us").read_text()) if granted > 0 else math.inf
    return math.inf


def _cores_of_a_mac() -> int:
    """On Apple's own processors those of the fast kind alone: a call is divided evenly."""
    import ctypes

    count, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        found = ctypes.CDLL(None).sysctlbyname(name, ctypes.byref(count), ctypes.byref(size), None, ctypes.c_size_t(0))
        if found == 0 and count.value > 0:
            break
    return count.value


def default_threads() -> int:
    """min(physical cores, scheduling affinity, cgroup quota, RNNKERN_NUM_THREADS, OMP_NUM_THREADS), at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = [siblings(cpu) for cpu in os.sched_getaffinity(0)]
    else:
        count = _cores_of_a_mac() if sys.platform == "darwin" else os.cpu_count() or 1
        cores = [str(core) for core in range(count)]
    threads = most_threads(cores, cgroup_quota())
    for name in ("RNNKERN_NUM_THREADS", "OMP_NUM_THREADS"):
        asked = os.environ.get(name, "").partition(",")[0].strip()  # OpenMP's may have one for each level
        if asked.isdecimal() and int(asked) >= 1:
            threads = min(threads, int(asked))
    return threads
