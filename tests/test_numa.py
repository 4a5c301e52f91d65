"""NUMA: host memory is touched by CPUs next to the GPU, where sysfs tells which they are."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from attention_predictor.csrc import binding
from attention_predictor.offload.blocks import host_memory, numa
from attention_predictor.offload.blocks.host_memory import SMALL_BYTES, HostMemory
from attention_predictor.offload.blocks.numa import cpus_near, run_on

BUS = "0000:1b:00.0"
OWN = os.sched_getaffinity(0)
SOME = min(OWN)


def sysfs(root: Path, cpus: str, **nodes: str) -> Path:
    """A sysfs whose node 1 has these CPUs, and GPUs by bus id on the given nodes."""
    for bus, node in ({BUS: "1"} | nodes).items():
        (device := root / "bus/pci/devices" / bus).mkdir(parents=True)
        (device / "numa_node").write_text(node + "\n")
    (root / "devices/system/node/node1").mkdir(parents=True)
    (root / "devices/system/node/node1/cpulist").write_text(cpus + "\n")
    return root


def test_the_cpus_of_a_gpus_node(tmp_path: Path) -> None:
    root = sysfs(tmp_path, f"{SOME},100000-100003", same="1", other="0", unknown="-1")
    assert cpus_near([BUS], root) == {SOME}  # of those that this process may use
    assert cpus_near([BUS, "same"], root) == {SOME}
    for unknown in ([], [None], [BUS, None], ["absent"], ["unknown"], ["other"], [BUS, "other"]):
        assert cpus_near(unknown, root) == frozenset(), unknown


@pytest.mark.parametrize(("text", "found"), [("0-3,8,10-11", {0, 1, 2, 3, 8, 10, 11}), ("5\n", {5})])
def test_a_list_of_cpus(text: str, found: set[int]) -> None:
    assert numa._parse(text) == found


def test_an_empty_list_is_of_no_use(tmp_path: Path) -> None:
    assert cpus_near([BUS], sysfs(tmp_path, "")) == frozenset()


def test_only_the_thread_itself_is_bound() -> None:
    found: list[set[int]] = []

    def bound() -> None:
        run_on(frozenset({SOME}))
        run_on(frozenset({100000}))  # refused: stays as it was
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert found == [{SOME}]
    assert os.sched_getaffinity(0) == OWN


@pytest.mark.parametrize("known", [True, False])
def test_the_workers_touch_memory_next_to_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(host_memory.Segment, "_make", lambda *_: seen.append(os.sched_getaffinity(0)))
    monkeypatch.setattr(binding, "pci_bus_id", lambda device: BUS if known else None)
    root = sysfs(tmp_path, str(SOME))
    monkeypatch.setattr(host_memory, "cpus_near", lambda bus_ids: cpus_near(bus_ids, root))
    memory = HostMemory([torch.device("cuda:0")])
    monkeypatch.setattr(memory, "wait_for_gpus", lambda: None)
    slabs = [memory.lend((2 * SMALL_BYTES,), torch.uint8)[0] for _ in range(2)]
    assert seen == [{SOME} if known else OWN] * 2
    assert os.sched_getaffinity(0) == OWN
    del slabs


@pytest.mark.gpu
def test_a_gpus_bus_id_is_that_of_sysfs() -> None:
    bus_id = binding.pci_bus_id(torch.device("cuda:0"))
    assert bus_id is not None
    assert len(bus_id.split(":")) == 3
    if (devices := Path("/sys/bus/pci/devices")).is_dir() and any(devices.iterdir()):
        assert (devices / bus_id).exists()
