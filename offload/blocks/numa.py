"""NUMA: the CPUs that are next to the same memory as a GPU, from sysfs.

Linux takes a page from the memory next to the CPU that touches it first. A GPU reads the memory of its own node faster
than another node's, which the link between the sockets would carry.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

logger = logging.getLogger(__name__)
SYSFS = Path("/sys")


def cpus_near(bus_ids: Iterable[str | None], root: Path = SYSFS) -> frozenset[int]:
    """CPUs of the one NUMA node of these GPUs that this process may use; empty if unknown, or if nodes differ.

    Args:
        bus_ids: The GPUs' PCI bus ids, such as ``0000:1b:00.0``; ``None`` where unknown.
        root: Where sysfs is mounted.
    """
    nodes = {None if bus_id is None else _node(root / "bus/pci/devices" / bus_id / "numa_node") for bus_id in bus_ids}
    node = nodes.pop() if len(nodes) == 1 else None
    if node is None:
        return frozenset()
    try:
        listed = _parse((root / f"devices/system/node/node{node}/cpulist").read_text())
    except (OSError, ValueError):
        return frozenset()
    return listed & os.sched_getaffinity(0)


def run_on(cpus: frozenset[int]) -> None:
    """Bind this thread, and no other one, to some CPUs; where there are none, or it is refused, it stays as it is."""
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)  # 0: the calling thread
    except OSError as error:
        logger.info("host memory is touched by any CPU: %s", error)


def _node(file: Path) -> int | None:
    """The number of a NUMA node; ``None`` if it is unknown, which the kernel writes as -1."""
    try:
        node = int(file.read_text())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def _parse(text: str) -> frozenset[int]:
    """The numbers of a list such as ``0-3,8,10-11``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)
