"""CPUs and memory that this process may use: a container or a batch system (Linux's cgroups) gives it a share."""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def cpu_limit(root: Path = _ROOT) -> int:
    """CPUs that this process may use: those it is bound to, or, of a quota, as many as it amounts to, at least 1."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quotas = [bound * 1.0]
    for group in _groups("cpu", root):
        old = [*_read(group / "cpu.cfs_quota_us"), *_read(group / "cpu.cfs_period_us")]
        for each in (_read(group / "cpu.max"), old):  # of version 2, and of version 1
            if len(each) == 2 and each[0].isdigit():  # else "max", or -1
                quotas.append(int(each[0]) / int(each[1]))
    return max(1, int(min(quotas)))


def memory_limit(root: Path = _ROOT) -> int:
    """Bytes of memory that this process may use: the machine's, or what its group is given of it."""
    sizes = [psutil.virtual_memory().total]
    for group in _groups("memory", root):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (size := _read(group / name)) and size[0].isdigit():
                sizes.append(int(size[0]))
    return min(sizes)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """The directories of this process's group and of those around it, in both versions; in a container, its root."""
    mounts = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = mounts / controller if controllers else mounts
        inner = mount / path.lstrip("/")
        yield from (place for place in (inner, *inner.parents) if place == mount or mount in place.parents)


def _read(path: Path) -> list[str]:
    """The words of a file's first line; none where there is no such file."""
    return next((line.split() for line in _lines(path)), [])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
