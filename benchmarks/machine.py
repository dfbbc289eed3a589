"""The machine: what it is, how busy it is, and what its page cache holds."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PACKAGES = ("lorafuse", "torch", "safetensors", "diffusers", "peft", "accelerate", "transformers")
_BLOCK_BYTES = 8 << 20
_SYS_CACHESTAT = 451


class ProcessorTicks(NamedTuple):
    """Seconds since the machine started, of all its processors."""

    busy: float
    stolen: float


def processor_ticks() -> ProcessorTicks:
    """What /proc/stat says now."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    user, nice, system, _, _, irq, softirq, stolen = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in first[:8])
    return ProcessorTicks(user + nice + system + irq + softirq, stolen)


def load_average() -> tuple[float, float, float]:
    """Of the last 1, 5 and 15 minutes."""
    one, five, fifteen = os.getloadavg()
    return round(one, 2), round(five, 2), round(fifteen, 2)


def machine_facts(folder: Path) -> dict[str, object]:
    """What figures depend on; nothing that says whose machine it is."""
    return {
        "processor": _field(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": f"{platform.system()} {platform.release()}",
        "file_system": file_system(folder),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "cp": _first_line(["cp", "--version"]),
        "commit": _first_line(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def _field(path: Path, name: str) -> str | None:
    for line in path.read_text().splitlines():
        if line.startswith(name):
            return line.split(":", 1)[1].strip()
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _first_line(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0]
    except OSError:
        return ""


def file_system(folder: Path) -> str:
    """The type of the file system that a folder lies on, such as ext4."""
    device = folder.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, rest = line.split(" - ")
        if fields.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return rest.split()[0]
    return "unknown"


def available_memory_bytes() -> int:
    """What a process can use before this machine, or this container, runs out."""
    available = int((_field(Path("/proc/meminfo"), "MemAvailable") or "0 kB").split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        return min(available, limit)
    return available


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder."""
    return shutil.disk_usage(folder).free


def files_below(paths: Iterable[Path]) -> list[Path]:
    """The files themselves and those in the folders."""
    found = []
    for path in paths:
        found += [path] if path.is_file() else sorted(below for below in path.rglob("*") if below.is_file())
    return found


def warm(paths: Iterable[Path]) -> None:
    """Read files once, so that the page cache holds what it can of them."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in files_below(paths):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def can_drop_caches() -> bool:
    """Whether this process may empty the machine's page cache."""
    return os.access(_DROP_CACHES, os.W_OK)


def chill(paths: Iterable[Path]) -> None:
    """Empty the page cache: all of it for root, else of these files."""
    os.sync()
    if can_drop_caches():
        _DROP_CACHES.write_text("3\n")
    for path in files_below(paths):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(paths: Iterable[Path]) -> float | None:
    """The part of these files that the page cache holds; None where the kernel (before Linux 6.5) cannot tell."""
    pages = total = 0
    for path in files_below(paths):
        size = path.stat().st_size
        with path.open("rb") as file:
            found = _cached_pages(file.fileno())
        if found is None:
            return None
        pages, total = pages + found, total + -(-size // os.sysconf("SC_PAGE_SIZE"))
    return round(min(1.0, pages / max(total, 1)), 4)


def _cached_pages(handle: int) -> int | None:
    """The `cachestat` system call on a whole file."""
    if sys.platform != "linux":
        return None
    whole, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    failed = ctypes.CDLL(None, use_errno=True).syscall(_SYS_CACHESTAT, handle, whole, counts, 0)
    return None if failed else int(counts[0])
