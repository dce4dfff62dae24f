"""What a container leaves of a machine."""

import os
from pathlib import Path

import psutil
import pytest

from pipelines.limits import cpu_limit, memory_limit

CPUS, MEMORY = len(os.sched_getaffinity(0)), psutil.virtual_memory().total


def files(root: Path, contents: dict[str, str]) -> Path:
    for name, text in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("contents", "cpus", "memory"),
    [
        ({}, CPUS, MEMORY),
        ({"proc/self/cgroup": "0::/"}, CPUS, MEMORY),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1, MEMORY),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1, MEMORY),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "5000"}, CPUS, 5000),
        (
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/memory.max": "5000",
                "sys/fs/cgroup/a/b/memory.max": "max",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000",
            },
            CPUS,
            5000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n3:cpu,cpuacct:/job",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "7000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "100000",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000",
            },
            1,
            7000,
        ),
        (
            {"proc/self/cgroup": "4:memory:/", "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)},
            CPUS,
            MEMORY,
        ),
    ],
)
def test_a_group_of_processes_has_what_it_is_given(
    contents: dict[str, str], cpus: int, memory: int, tmp_path: Path
) -> None:
    root = files(tmp_path, contents)
    assert (cpu_limit(root), memory_limit(root)) == (cpus, memory)
