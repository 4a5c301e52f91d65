"""Host memory that this process may still allocate, limited by the machine and by control groups (containers)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Files of a control group with its limit, its usage, and the entry of memory.stat with file pages it can drop.
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_memory() -> int:
    """The least, in bytes, of what the system reports as available and what each limited control group has left.

    A process that allocates more is killed, in a container usually by its control group.
    """
    return max(min([psutil.virtual_memory().available, *left_in_cgroups(CGROUPS, MEMBERSHIP)]), 0)


def left_in_cgroups(root: Path, membership: Path) -> Iterator[int]:
    """Bytes left in each limited control group of this process, of either version of Linux's control groups."""
    for line in (_read(membership) or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left_up_to(root, path, VERSION_2)
        elif "memory" in controllers.split(","):
            yield from _left_up_to(root / "memory", path, VERSION_1)


def _left_up_to(root: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    """Bytes left in a group and in the groups that contain it."""
    limit_name, usage_name, droppable = names
    group = root / path.strip("/")
    if not group.is_dir():  # in a container the path may be the host's, and the root is the container's own group
        group = root
    for directory in (group, *group.parents):
        limit, usage = _read(directory / limit_name), _read(directory / usage_name)
        if limit is not None and usage is not None and limit.strip() != "max":
            entries = [line.split() for line in (_read(directory / "memory.stat") or "").splitlines()]
            can_drop = sum(int(value) for name, value in entries if name == droppable)
            yield int(limit) - int(usage) + can_drop
        if directory == root:
            return


def _read(file: Path) -> str | None:
    """The text of a file; ``None`` if unreadable: some are missing on other systems and in the root group."""
    try:
        return file.read_text("ascii")
    except OSError:
        return None
