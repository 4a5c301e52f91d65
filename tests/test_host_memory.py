"""HostMemory: exact, back the moment a slab dies, never more than the machine has."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from attention_predictor.errors import HostMemoryError
from attention_predictor.offload.blocks import host_memory
from attention_predictor.offload.blocks.available_memory import left_in_cgroups
from attention_predictor.offload.blocks.host_memory import ALIGNMENT, SMALL_BYTES, HostMemory
from attention_predictor.offload.blocks.room import KVShape, Room
from attention_predictor.offload.config import OffloadConfig
from attention_predictor.offload.ranks import Ranks

PAGE = mmap.PAGESIZE


@pytest.fixture(autouse=True)
def no_garbage_collection() -> Iterator[None]:
    """What dies is free at once, or not at all."""
    gc.disable()
    yield
    gc.enable()


def slab(memory: HostMemory, nbytes: int) -> Tensor:
    return memory.lend((nbytes,), torch.uint8)[0]


class TestLending:
    def test_exact_sizes(self) -> None:
        memory = HostMemory()
        slabs = [slab(memory, 84 << 10) for _ in range(3)]
        assert memory.held_bytes == memory.lent_bytes == 3 * (84 << 10)
        assert [one.nbytes for one in slabs] == [84 << 10] * 3

    def test_what_dies_is_lent_again(self) -> None:
        memory = HostMemory()
        one, other = slab(memory, 10 * PAGE), slab(memory, 10 * PAGE)
        address, held = one.data_ptr(), memory.held_bytes
        del one
        assert memory.free_bytes == 10 * PAGE
        assert slab(memory, 10 * PAGE).data_ptr() == address
        assert memory.held_bytes == held
        assert other.nbytes == 10 * PAGE

    def test_free_neighbours_are_joined(self) -> None:
        memory = HostMemory()
        memory.prepare([(2 * PAGE, 3)])
        slabs = [slab(memory, 2 * PAGE) for _ in range(3)]
        held = memory.held_bytes
        del slabs[0], slabs[0]
        whole = slab(memory, 4 * PAGE) if held == 6 * PAGE else None
        memory.check_integrity()
        assert memory.held_bytes == held
        del whole

    def test_dtypes_and_shapes(self) -> None:
        tensor, pinned = HostMemory().lend((3, 5, 2), torch.bfloat16)
        assert tensor.shape == (3, 5, 2)
        assert tensor.dtype == torch.bfloat16
        assert not pinned
        assert not tensor.is_inference()
        assert HostMemory().lend((3, 0), torch.float32)[0].numel() == 0

    def test_a_limit_counts_living_slabs(self) -> None:
        memory = HostMemory(limit=3 * PAGE)
        slabs = [slab(memory, PAGE) for _ in range(3)]
        with pytest.raises(HostMemoryError, match=r"bytes more of host memory .* host_memory allows .* caches hold"):
            slab(memory, 1)
        assert memory.lent_bytes == 3 * PAGE
        del slabs[0]
        assert memory.lent_bytes == 2 * PAGE
        slabs.append(slab(memory, PAGE))
        memory.check_integrity()

    def test_slabs_never_share_memory(self) -> None:
        memory = HostMemory()
        slabs = [slab(memory, 100 + 37 * number).fill_(number) for number in range(40)]
        for number in range(0, 40, 3):
            slabs[number] = slab(memory, 50).fill_(number)
        assert all(bool((one == number).all()) for number, one in enumerate(slabs))
        assert all(one.data_ptr() % ALIGNMENT == 0 for one in slabs)

    def test_from_several_threads(self) -> None:
        memory, failures = HostMemory(), []

        def work(number: int) -> None:
            for turn in range(50):
                mine = slab(memory, 1000 + 100 * number).fill_(number)
                if not bool((mine == number).all()):
                    failures.append((number, turn))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        memory.check_integrity()
        assert memory.lent_bytes == 0


class TestPreparing:
    def test_what_is_prepared_is_enough(self) -> None:
        memory = HostMemory()
        memory.prepare([(3 * SMALL_BYTES, 5), (2 * SMALL_BYTES, 2)])
        held = memory.held_bytes
        slabs = [slab(memory, 3 * SMALL_BYTES) for _ in range(5)] + [slab(memory, 2 * SMALL_BYTES) for _ in range(2)]
        assert memory.held_bytes == held == sum(one.nbytes for one in slabs)
        assert memory.unready_bytes == 0

    def test_what_is_free_counts(self) -> None:
        memory = HostMemory()
        slabs = [slab(memory, 4 * PAGE) for _ in range(4)]
        del slabs
        memory.prepare([(4 * PAGE, 4)])
        assert memory.held_bytes == 16 * PAGE
        memory.prepare([(4 * PAGE, 5)])
        assert memory.held_bytes == 20 * PAGE


class TestLimits:
    def test_too_little_is_one_line_before_anything_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = HostMemory()
        monkeypatch.setattr(host_memory, "available_memory", lambda: host_memory.SPARE_BYTES + 10 * PAGE)
        with pytest.raises(
            HostMemoryError, match=r"^2\.00 MiB more of host memory .* has 40\.00 KiB available"
        ) as caught:
            memory.prepare([(2 << 20, 1)])
        assert "\n" not in str(caught.value)
        assert memory.held_bytes == 0

    def test_what_is_being_made_is_no_longer_available(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The system counts memory as available until it is touched."""
        memory, hold = HostMemory(), threading.Event()
        monkeypatch.setattr(host_memory, "available_memory", lambda: host_memory.SPARE_BYTES + 3 * SMALL_BYTES)
        monkeypatch.setattr(host_memory.Segment, "_make", lambda self, pin_for: hold.wait(30))
        memory.prepare([(2 * SMALL_BYTES, 1)])
        with pytest.raises(HostMemoryError, match=r"has 1\.00 MiB available"):
            memory.prepare([(2 * SMALL_BYTES, 2)])
        hold.set()

    def test_free_segments_of_other_sizes_give_way(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory = HostMemory()
        small = [slab(memory, 4 * PAGE) for _ in range(8)]
        kept = small.pop()
        del small
        monkeypatch.setattr(
            host_memory, "available_memory", lambda: host_memory.SPARE_BYTES + 32 * PAGE - memory.held_bytes
        )
        large = slab(memory, 20 * PAGE)
        assert memory.held_bytes <= 32 * PAGE
        assert large.nbytes == 20 * PAGE
        assert kept.nbytes == 4 * PAGE

    def test_a_refusal_to_pin_is_noted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        notes: list[str] = []
        memory = HostMemory([torch.device("cuda")], notes.append)
        monkeypatch.setattr(memory, "_collect", lambda: None)  # no device to wait for

        def refused(self: host_memory.Segment, pin_for: object) -> None:
            self.refusal = "out of memory"

        monkeypatch.setattr(host_memory.Segment, "_make", refused)
        assert [memory.lend((PAGE,), torch.uint8)[1] for _ in range(3)] == [False] * 3
        (note,) = notes
        assert note.startswith("host memory can't be pinned (out of memory)")


class TestClosing:
    @pytest.mark.parametrize("closed", [False, True])
    def test_a_slab_may_die_while_others_return(self, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """A finalizer may run at any time, also on the thread that is returning another slab of the segment."""
        memory = HostMemory()
        memory.prepare([(ALIGNMENT, 3)])
        slabs = [memory.lend((ALIGNMENT,), torch.uint8)[0] for _ in range(3)]
        put_back = host_memory.Segment.put_back

        def while_another_dies(segment: host_memory.Segment, start: int, nbytes: int) -> None:
            slabs.clear()
            assert memory.lent_bytes > 0  # and so does whatever asks for memory meanwhile
            put_back(segment, start, nbytes)

        monkeypatch.setattr(host_memory.Segment, "put_back", while_another_dies)
        if closed:
            memory.close()
        del slabs[0]
        assert memory.lent_bytes == 0
        memory.check_integrity()
        assert memory.held_bytes == (0 if closed else mmap.PAGESIZE)

    def test_a_slab_that_dies_while_gpus_are_waited_for_waits_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        memory, waits = HostMemory(), list[int]()
        slabs = [memory.lend((ALIGNMENT,), torch.uint8)[0] for _ in range(2)]

        def wait() -> None:
            waits.append(len(slabs))
            slabs.clear()

        monkeypatch.setattr(memory, "wait_for_gpus", wait)
        del slabs[0]
        assert memory.lent_bytes == 0
        assert waits == [1, 0]

    def test_segments_are_let_go(self) -> None:
        memory = HostMemory()
        memory.prepare([(2 * SMALL_BYTES, 4)])
        one = memory.lend((2 * SMALL_BYTES,), torch.uint8)[0]
        alive = [weakref.ref(segment) for segment in memory._segments]
        memory.close()
        del one
        assert [segment() for segment in alive] == [None] * len(alive)

    def test_gives_back_what_is_free_and_the_rest_later(self) -> None:
        memory = HostMemory()
        one, other = slab(memory, 5 * PAGE), slab(memory, 6 * PAGE)
        del one
        memory.close()
        assert memory.held_bytes == 6 * PAGE
        other.fill_(3)
        del other
        assert memory.held_bytes == 0
        memory.close()


class MemoryMachine(RuleBasedStateMachine):
    """Any sequence of loans and returns: spans stay apart, and contents are the borrower's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.slabs = HostMemory(), {}
        self.number = 0

    @rule(nbytes=st.integers(1, 5 * PAGE))
    def borrow(self, nbytes: int) -> None:
        self.number = (self.number + 1) % 251
        self.slabs[self.number] = slab(self.memory, nbytes).fill_(self.number)

    @rule(nbytes=st.integers(1, 3 * PAGE), count=st.integers(1, 4))
    def prepare(self, nbytes: int, count: int) -> None:
        self.memory.prepare([(nbytes, count)])

    @rule(data=st.data())
    def return_one(self, data: st.DataObject) -> None:
        if self.slabs:
            del self.slabs[data.draw(st.sampled_from(sorted(self.slabs)))]

    @invariant()
    def whole(self) -> None:
        self.memory.check_integrity()
        assert all(bool((one == number).all()) for number, one in self.slabs.items())
        lent = sum(-(-one.nbytes // ALIGNMENT) * ALIGNMENT for one in self.slabs.values())
        assert self.memory.lent_bytes == lent


TestMemoryMachine = MemoryMachine.TestCase
TestMemoryMachine.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("host_kv", "gib", "fit"), [("auto", 16, 6), ("int8", 8.846, 11), ("int4", 4.846, 20)])
def test_sequences_of_128k_in_100_gib(host_kv: str, gib: float, fit: int) -> None:
    """Llama-3.1-8B's shape in bf16, the open blocks included."""
    shapes = dict.fromkeys(range(32), KVShape(kv_heads=8, head_dim=128, itemsize=2))
    room = Room(OffloadConfig(host_kv=host_kv), HostMemory(), shapes, Ranks(), captures=True)
    needed = room.bytes_for(1, 131072)
    assert needed / 2**30 == pytest.approx(gib, abs=1e-3)
    assert 100 * 2**30 // needed == fit


class TestControlGroups:
    def write(self, directory: Path, **files: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name.replace("__", ".")).write_text(text)

    def test_version_2_limits_of_the_group_and_those_around_it(self, tmp_path: Path) -> None:
        root = tmp_path / "cgroup"
        self.write(root / "a", memory__max="1000", memory__current="900", memory__stat="anon 5\ninactive_file 300\n")
        self.write(root / "a/b", memory__max="max", memory__current="100", memory__stat="inactive_file 0")
        (tmp_path / "membership").write_text("0::/a/b\n")
        assert list(left_in_cgroups(root, tmp_path / "membership")) == [400]

    def test_version_1(self, tmp_path: Path) -> None:
        names = {"memory__limit_in_bytes": "5000", "memory__usage_in_bytes": "4000"}
        self.write(tmp_path / "cgroup/memory/job", **names, memory__stat="total_inactive_file 50")
        (tmp_path / "membership").write_text("3:cpu:/job\n4:memory:/job\n")
        assert list(left_in_cgroups(tmp_path / "cgroup", tmp_path / "membership")) == [1050]

    def test_a_container_sees_its_group_at_the_root(self, tmp_path: Path) -> None:
        self.write(tmp_path / "cgroup", memory__max="70", memory__current="20", memory__stat="")
        (tmp_path / "membership").write_text("0::/docker/abc\n")
        assert list(left_in_cgroups(tmp_path / "cgroup", tmp_path / "membership")) == [50]

    def test_no_control_groups(self, tmp_path: Path) -> None:
        assert list(left_in_cgroups(tmp_path, tmp_path / "nothing")) == []
