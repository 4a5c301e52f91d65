"""HostStore against the plainest model of it: one growing tensor of keys and one of values.

Letters: B sequences, G KV heads, T tokens, D head size, n list entries.
"""

import contextlib
import copy
import gc
import math
import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from attention_predictor.csrc.block_code import decode_reference, encode_reference
from attention_predictor.errors import HostMemoryError, IntegrityError
from attention_predictor.offload.blocks import host_memory
from attention_predictor.offload.blocks.block_codec import BlockCodec, CodedBlocks, stored_bytes
from attention_predictor.offload.blocks.coded_store import CodedStore, new_store
from attention_predictor.offload.blocks.host_memory import HostMemory
from attention_predictor.offload.blocks.host_store import UNSETTLED_TOKENS, HostStore
from attention_predictor.offload.blocks.transfer import SMALL_BYTES, HostCopier, host_copier

SHAPE = {"batch": 2, "kv_heads": 3, "head_dim": 4, "dtype": torch.float32}


def random_kv(tokens: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, tokens, 4).to(dtype), torch.randn(batch, 3, tokens, 4).to(dtype)


def filled(tokens: int, **options) -> tuple[HostStore, Tensor, Tensor]:
    store = HostStore(**(SHAPE | {"slab_blocks": 2} | options))
    key, value = random_kv(tokens, dtype=store.dtype)
    store.append(key, value)
    return store, key, value


def blocks_of(key_BGTD: Tensor, value_BGTD: Tensor, block_size: int) -> Tensor:
    """What gather must return for all rows and blocks: [B*G, blocks, 2, block_size, D]."""
    batch, kv_heads, tokens, head_dim = key_BGTD.shape
    blocks = math.ceil(tokens / block_size)
    padded = torch.zeros(2, batch * kv_heads, blocks * block_size, head_dim, dtype=key_BGTD.dtype)
    padded[0, :, :tokens], padded[1, :, :tokens] = key_BGTD.flatten(0, 1), value_BGTD.flatten(0, 1)
    return padded.unflatten(2, (blocks, block_size)).permute(1, 2, 0, 3, 4)


def stacked(parts: tuple[Tensor, Tensor]) -> Tensor:
    return torch.stack(parts, -3)


class LateHostCopier:
    """The slowest copies there can be: none is made before somebody waits for it."""

    def __init__(self) -> None:
        self.under_way = []
        self.pieces_left = math.inf

    def send(self, pieces, join):
        for piece in pieces:
            if self.pieces_left == 0:
                raise KeyboardInterrupt
            self.pieces_left -= 1
            self.under_way.append((*piece, join))
        return LateCopy(self)

    def drain(self):
        for target, parts, join in self.under_way:
            target.copy_(join(parts))
        self.under_way.clear()


class LateCopy:
    def __init__(self, sender):
        self.wait = sender.drain


class LateStore(HostStore):
    """Appends as from a GPU, to memory that is not pinned."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.host_copier = LateHostCopier()

    def _copier(self, device):
        return self.host_copier

    def __deepcopy__(self, memo):
        twin = super().__deepcopy__(memo)
        twin.host_copier = LateHostCopier()
        return twin


class LateCodedStore(LateStore, CodedStore):
    """The same with coded blocks."""


def as_stored(kv_BGTD: Tensor, side: int, first: int, codec: BlockCodec) -> Tensor:
    """Keys (``side`` 0) or values as a store gives them back, if blocks from ``first`` on have just become complete."""
    T = codec.block_size
    part = slice(first * T, kv_BGTD.shape[2] // T * T)
    whole_BGNTD = kv_BGTD[:, :, part].unflatten(2, (-1, T))
    if not isinstance(codec, CodedBlocks) or not whole_BGNTD.numel():
        return kv_BGTD
    kv_BGTD = kv_BGTD.clone()
    code_BGNz = encode_reference(whole_BGNTD, whole_BGNTD, codec.bits)
    decoded = decode_reference(code_BGNz, T, codec.head_dim, codec.bits, codec.dtype)
    kv_BGTD[:, :, part] = decoded[:, :, :, side].flatten(2, 3)
    return kv_BGTD


class StoreMachine(RuleBasedStateMachine):
    """Any sequence of calls leaves the store equal to the model, bit by bit."""

    store_class = HostStore
    options: ClassVar[dict[str, int]] = {}

    @initialize(block_size=st.sampled_from([1, 3, 16]), slab_blocks=st.integers(1, 4))
    def start(self, block_size, slab_blocks):
        self.sizes = {"block_size": block_size, "slab_blocks": slab_blocks}
        self.store = self.store_class(**SHAPE, **self.sizes, **self.options)
        self.key, self.value = random_kv(0)
        self.copies = []  # with what they hold; they share memory with the store and with each other

    @rule(tokens=st.integers(0, 60), inference=st.booleans())
    def append(self, tokens, inference):
        with torch.inference_mode(inference):
            key, value = random_kv(tokens, self.store.batch)
            self.store.append(key, value)
        self.stored(key, value)

    def stored(self, *new):
        """The model after an append."""
        first = self.key.shape[2] // self.store.block_size
        self.key, self.value = (
            as_stored(torch.cat([old, more], 2), side, first, self.store.codec)
            for side, (old, more) in enumerate(zip((self.key, self.value), new, strict=True))
        )

    @rule(share=st.floats(0, 1))
    def truncate(self, share):
        length = int(self.store.length * share)
        self.store.truncate(length)
        self.key, self.value = self.key[:, :, :length], self.value[:, :, :length]

    @rule(data=st.data())
    def index(self, data):
        batch = self.store.batch
        picks = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=3))
        self.store.index(torch.tensor(picks))
        self.key, self.value = self.key[picks], self.value[picks]

    @rule(data=st.data(), staged=st.booleans())
    def gather(self, data, staged):
        rows, blocks = self.store.batch * self.store.kv_heads, self.store.n_blocks
        entry = st.tuples(st.integers(0, rows - 1), st.integers(0, max(blocks - 1, 0)))
        picks = data.draw(st.lists(entry, max_size=12 if blocks else 0))
        row_n, block_n = torch.tensor(picks, dtype=torch.int64).reshape(-1, 2).unbind(1)
        out = torch.full((20, 2, self.store.block_size, 4), math.nan) if staged else None
        kv = self.store.gather(row_n, block_n, out)
        expected = blocks_of(self.key, self.value, self.store.block_size)[row_n, block_n]
        assert torch.equal(kv, expected)
        assert out is None or torch.equal(out[: len(picks)], expected)

    @rule(data=st.data())
    def read(self, data):
        start = data.draw(st.integers(0, self.store.length))
        stop = data.draw(st.integers(start, self.store.length))
        key, value = self.store.read(start, stop)
        assert torch.equal(key, self.key[:, :, start:stop])
        assert torch.equal(value, self.value[:, :, start:stop])

    @rule(share=st.floats(0, 1), tokens=st.sampled_from([1, 40, 200]))
    def stream(self, share, tokens):
        stop = int(self.store.length * share)
        chunks = [(start, k.clone(), v.clone()) for start, k, v in self.store.stream(stop, tokens, torch.device("cpu"))]
        assert [start for start, *_ in chunks] == [
            sum(len(k[0, 0]) for _, k, _ in chunks[:n]) for n in range(len(chunks))
        ]
        for number, expected in ((1, self.key), (2, self.value)):
            parts = [chunk[number] for chunk in chunks]
            assert torch.equal(torch.cat(parts, 2) if parts else expected[:, :, :0], expected[:, :, :stop])

    @rule(tokens=st.integers(1, 200), calls=st.integers(0, 3))
    def append_with_a_failure(self, tokens, calls):
        """Nothing is left of it, wherever it fails, unless it has nothing left to do by then."""
        key, value = random_kv(tokens, self.store.batch)
        with pytest.MonkeyPatch.context() as patch:
            self.let_fail(patch, calls)
            try:
                self.store.append(key, value)
            except KeyboardInterrupt:
                return
        self.stored(key, value)

    def let_fail(self, patch, calls):
        left, real = iter(range(calls)), torch.stack

        def stack(*args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        patch.setattr(torch, "stack", stack)

    @rule()
    def go_on_with_a_copy(self):
        original, self.store = self.store, copy.deepcopy(self.store)
        original.append(*random_kv(5, original.batch))
        original.truncate(0)

    @rule()
    def keep_a_copy(self):
        if len(self.copies) < 3:
            self.copies.append((copy.deepcopy(self.store), self.key, self.value))

    @rule(data=st.data())
    def change_to_a_copy(self, data):
        if self.copies:
            place = data.draw(st.integers(0, len(self.copies) - 1))
            now = self.store, self.key, self.value
            (self.store, self.key, self.value), self.copies[place] = self.copies[place], now

    @rule()
    def nothing_changed_in_copies(self):
        for store, key, value in self.copies:
            store.check_integrity()
            found = store.read(0, store.length)
            assert torch.equal(found[0], key)
            assert torch.equal(found[1], value)

    @invariant()
    def sizes_agree(self):
        if not hasattr(self, "store"):
            return
        if not issubclass(self.store_class, LateStore):
            self.store.check_integrity()
        length = self.key.shape[2]
        assert self.store.length == length
        assert self.store.n_blocks == math.ceil(length / self.store.block_size)
        slab_tokens = math.prod(self.sizes.values())
        assert self.store.room == math.ceil(length / slab_tokens) * slab_tokens
        rows, size = self.store.batch * 3, self.store.block_size
        open_nbytes = rows * 2 * size * 4 * 4 if isinstance(self.store, CodedStore) else 0
        block_nbytes = stored_bytes(self.options.get("bits"), size, 4, 4)
        slabs_nbytes = self.store.nbytes - open_nbytes
        most_nbytes = rows * block_nbytes * self.store.room // size
        assert slabs_nbytes == most_nbytes if self.store.batch == 1 else slabs_nbytes <= most_nbytes
        self.store.memory.check_integrity()
        assert self.store.memory.held_bytes >= self.store.memory.lent_bytes >= self.store.nbytes


class LateStoreMachine(StoreMachine):
    """The same where every copy is late: whatever reads or changes slabs has to wait for them."""

    store_class = LateStore

    def let_fail(self, patch, calls):
        patch.setattr(self.store.host_copier, "pieces_left", calls)

    @rule(share=st.floats(0, 1))
    def settle(self, share):
        self.store.settle(int(self.store.length * share))

    @rule()
    def check_integrity(self):
        self.store.check_integrity()

    @rule(tokens=st.integers(1, 40))
    def append_from_the_cpu(self, tokens):
        key, value = random_kv(tokens, self.store.batch)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LateStore, "_copier", HostStore._copier)
            self.store.append(key, value)
        self.stored(key, value)


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestStoreMachine = StoreMachine.TestCase
LateStoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
TestLateStoreMachine = LateStoreMachine.TestCase


class CodedStoreMachine(StoreMachine):
    """The same of coded blocks: complete ones are read back as what their codes decode to."""

    store_class = CodedStore
    options: ClassVar[dict[str, int]] = {"bits": 8}


class LateCodedStoreMachine(LateStoreMachine):
    """The same where every copy is late."""

    store_class = LateCodedStore
    options: ClassVar[dict[str, int]] = {"bits": 4}


CodedStoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=20, deadline=None)
TestCodedStoreMachine = CodedStoreMachine.TestCase
LateCodedStoreMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=20, deadline=None)
TestLateCodedStoreMachine = LateCodedStoreMachine.TestCase


def append_from_the_cpu(store):
    torch.manual_seed(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(store), "_copier", HostStore._copier)
        store.append(*random_kv(3))


def fail_to_append(store):
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(store, LateStore):
            patch.setattr(store.host_copier, "pieces_left", 2)
        else:
            patch.setattr(store, "_put", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.append(*random_kv(70))
    assert not (isinstance(store, LateStore) and store.host_copier.under_way)  # nothing arrives later


def interrupt_after_all_was_done(store):
    name = "_send" if isinstance(store, LateStore) else "_write"
    real = getattr(store, name)

    def interrupted(*args):
        real(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.append(*random_kv(70))


def fail_to_settle(store):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_put", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        with contextlib.suppress(KeyboardInterrupt):
            store.settle()


@pytest.mark.parametrize("first", [5, 16, 37, 50])
@pytest.mark.parametrize(
    "then",
    [
        lambda store: store.truncate(3),
        lambda store: store.truncate(store.length - 1),
        lambda store: store.index(torch.tensor([1, 0])),
        lambda store: store.index(torch.tensor([1])),
        lambda store: store.check_integrity(),
        lambda store: store.addresses(torch.device("cpu")),
        lambda store: store.gather(torch.tensor([0]), torch.tensor([store.n_blocks - 1])),
        lambda store: list(store.stream(store.length, 1, torch.device("cpu"))),
        lambda store: copy.deepcopy(store),
        append_from_the_cpu,
        fail_to_append,
        interrupt_after_all_was_done,
        fail_to_settle,
    ],
)
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_late_copies_are_waited_for(first, then, bits):
    """By slabs themselves: whoever looks at them, having called something, finds what an immediate copy would give."""
    slabs = []
    for late in (False, True):
        torch.manual_seed(1)
        options = {} if bits is None else {"bits": bits}
        kinds = (HostStore, LateStore) if bits is None else (CodedStore, LateCodedStore)
        store = kinds[late](**SHAPE, **options, slab_blocks=2, kernel=False)
        store.append(*random_kv(first))
        store.append(*random_kv(1))
        found = then(store)
        if then in (fail_to_append, interrupt_after_all_was_done, fail_to_settle):
            store.settle()
        store = found if isinstance(found, HostStore) else store
        blocks = torch.cat([torch.stack(slabs).movedim(2, 0) for slabs in zip(*store._slabs, strict=True)])
        held = [blocks[: store.n_blocks].nan_to_num(0.0)]
        if bits is not None:
            held = [blocks[: store.length // 16], store.open_BG2TD if store.open_block is not None else blocks[:0]]
        slabs.append((store.length, len(store._slabs[0]), *held))
    assert slabs[0][:2] == slabs[1][:2]
    assert all(torch.equal(*both) for both in zip(slabs[0][2:], slabs[1][2:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_every_bit(dtype):
    store, key, value = filled(70, dtype=dtype)
    assert torch.equal(store.read(0, 70)[0], key)
    assert torch.equal(store.read(0, 70)[1], value)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_is_coded_when_it_is_complete(bits, dtype):
    """However its tokens came; the same tokens always have the same codes."""
    key, value = random_kv(70, dtype=dtype)
    stores = [CodedStore(**SHAPE | {"dtype": dtype}, bits=bits, slab_blocks=2) for _ in range(2)]
    stores[0].append(key, value)
    for token in range(70):
        stores[1].append(key[:, :, token : token + 1], value[:, :, token : token + 1])
    whole, (again, _) = 64, stores[1].read(0, 70)
    assert torch.equal(again, stores[0].read(0, 70)[0])
    assert torch.equal(again[:, :, whole:], key[:, :, whole:])
    for number in range(2):  # slabs of two blocks
        assert all(
            torch.equal(one[number], other[number]) for one, other in zip(*(s._slabs for s in stores), strict=True)
        )
    wanted = encode_reference(key[:, :, :16], value[:, :, :16], bits)
    assert torch.equal(torch.stack([slabs[0][:, 0] for slabs in stores[0]._slabs]), wanted)


def test_a_crop_into_a_coded_block_keeps_what_its_codes_decode_to():
    store = CodedStore(**SHAPE, bits=8, slab_blocks=2)
    store.append(*random_kv(40))
    before, _ = store.read(0, 20)
    store.truncate(20)
    more, value = random_kv(5)
    store.append(more, value)
    assert torch.equal(store.read(0, 25)[0], torch.cat([before, more], 2))
    store.check_integrity()


def test_integrity_check_finds_an_open_block_of_another_kind():
    store = CodedStore(**SHAPE, bits=8, slab_blocks=2)
    store.append(*random_kv(20))
    store.open_BG2TD[0, 0, 0, 9] = 1
    with pytest.raises(IntegrityError, match="4 numbers beyond token 20 are not zero"):
        store.check_integrity()
    store.open_BG2TD = store.open_BG2TD.double() * 0
    with pytest.raises(IntegrityError, match=r"open block: expected torch.float32 .* found torch.float64"):
        store.check_integrity()


def test_nan_is_data():
    store = HostStore(**SHAPE)
    key, value = random_kv(20)
    key[0, 0, 3] = math.nan
    store.append(key, value)
    assert store.read(0, 20)[0].equal(key) is False
    assert torch.equal(store.read(0, 20)[0].isnan(), key.isnan())


def test_takes_keys_that_require_grad():
    store = HostStore(**SHAPE)
    key, value = random_kv(20)
    store.append(key.requires_grad_(), value)
    assert not store.read(0, 20)[0].requires_grad


def test_a_store_made_in_inference_mode_can_be_written_outside_of_it():
    with torch.inference_mode():
        store, key, _ = filled(20)
    more = random_kv(3)
    store.append(*more)
    store.truncate(22)
    store.index(torch.tensor([1, 0]))
    assert torch.equal(store.read(0, 22)[0], torch.cat([key, more[0]], 2)[[1, 0], :, :22])


def test_gather_is_bit_equal_over_many_entries():
    store, key, value = filled(2000, slab_blocks=8)
    row_n, block_n = torch.randint(6, (3000,)), torch.randint(125, (3000,))
    assert torch.equal(store.gather(row_n, block_n), blocks_of(key, value, 16)[row_n, block_n])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            torch.zeros(2, 3, 5, 9),
            torch.zeros(2, 3, 5, 4),
            r"for key: expected torch.float32 \[2, 3, 5, 4\], got",
        ),
        (
            torch.zeros(2, 3, 5, 4),
            torch.zeros(2, 3, 6, 4),
            r"for value: expected .*\[2, 3, 5, 4\], got .*6, 4\]",
        ),
        (torch.zeros(2, 3, 5, 4).half(), torch.zeros(2, 3, 5, 4), r"for key: expected .*, got torch.float16"),
        (
            torch.zeros(3, 5, 4),
            torch.zeros(3, 5, 4),
            r"for key: expected .*\[2, 3, T, 4\], got .*\[3, 5, 4\]",
        ),
    ],
)
def test_append_names_a_wrong_size(key, value, message):
    store, *_ = filled(7)
    with pytest.raises(ValueError, match="size mismatch " + message):
        store.append(key, value)
    assert store.length == 7
    store.check_integrity()


@pytest.mark.parametrize(("row", "block"), [(6, 0), (-1, 0), (0, 2), (0, -1)])
def test_gather_refuses_what_does_not_exist(row, block):
    store, *_ = filled(20)
    with pytest.raises(IndexError, match="must be between 0 and"):
        store.gather(torch.tensor([0, row]), torch.tensor([0, block]))


def test_gather_refuses_a_small_buffer():
    store, *_ = filled(20)
    with pytest.raises(ValueError, match=r"size mismatch for out: expected \[2, 2, 16, 4\], got \[1, 2, 16, 4\]"):
        store.gather(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.empty(1, 2, 16, 4))


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (3, 21), (5, 4)])
def test_read_refuses_what_does_not_exist(start, stop):
    store, *_ = filled(20)
    with pytest.raises(IndexError, match="outside of the 20 tokens"):
        store.read(start, stop)


@pytest.mark.parametrize("length", [-1, 21])
def test_truncate_only_shortens(length):
    store, *_ = filled(20)
    with pytest.raises(ValueError, match="length must be between 0 and 20"):
        store.truncate(length)


@pytest.mark.parametrize("slabs", [0, 1])
def test_no_memory_is_one_clear_error_and_loses_nothing(monkeypatch, slabs):
    """Where the system has none left for the first slab, or for the second."""
    store, key, _ = filled(20)
    answers = [1 << 40] * slabs + [0]
    monkeypatch.setattr(host_memory, "available_memory", lambda: answers.pop(0))
    message = r"^[\d.]+ KiB more of host memory for KV blocks: the system has 0 bytes available, and this engine .*$"
    with pytest.raises(HostMemoryError, match=message):
        store.append(*random_kv(100))
    monkeypatch.undo()
    store.check_integrity()
    store.memory.check_integrity()
    assert torch.equal(store.read(0, store.length)[0], key)


def test_a_copy_that_fails_half_way_leaves_nothing_behind(monkeypatch):
    store, key, value = filled(20)
    real, calls = torch.stack, []

    def third_call_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "stack", third_call_fails)
    with pytest.raises(torch.OutOfMemoryError):
        store.append(*random_kv(100))
    monkeypatch.undo()
    store.check_integrity()
    assert torch.equal(store.gather(torch.tensor([0]), torch.tensor([1])), blocks_of(key, value, 16)[0, 1:2])


class TestHostCopier:
    """What is held and waited for, with events that happen when somebody waits for them."""

    class Event:
        def __init__(self):
            self.waited = False

        def synchronize(self):
            self.waited = True

    @pytest.fixture
    def made(self, monkeypatch):
        out, events = HostCopier(torch.device("cpu")), []

        def event(stream):
            events.append(self.Event())
            return events[-1]

        monkeypatch.setattr(out, "_event", event)
        return out, events

    def piece(self, nbytes):
        key, value = (torch.zeros(1, 1, nbytes // 8, 1) for _ in range(2))
        return torch.empty(1, 1, 2, nbytes // 8, 1), (key, value)

    def test_of_large_ones_only_the_last_is_held(self, made):
        out, events = made
        alive, sent = [], []
        for number in range(4):
            piece = self.piece(2 * SMALL_BYTES)
            alive.append(weakref.ref(piece[1][0]))
            sent.append(out.send([piece], stacked))
            del piece
            assert [event.waited for event in events] == [True] * number + [False]
            assert [one() is not None for one in alive] == [False] * number + [True]

    def test_small_ones_are_neither_held_nor_waited_for(self, made):
        out, events = made
        sent = [out.send([self.piece(2 * SMALL_BYTES)], stacked)]
        for _ in range(20):
            piece = self.piece(SMALL_BYTES)
            alive = weakref.ref(piece[1][0])
            sent.append(out.send([piece], stacked))
            del piece
            assert alive() is None
        assert not any(event.waited for event in events)
        sent[-1].wait()
        assert [event.waited for event in events] == [False] * 20 + [True]

    def test_what_nobody_wants_any_more_is_let_go(self, made):
        out, events = made
        piece = self.piece(2 * SMALL_BYTES)
        alive = weakref.ref(piece[1][0])
        out.send([piece], stacked)  # and its PendingCopy is gone
        del piece
        gc.collect()
        assert alive() is None
        out.send([self.piece(2 * SMALL_BYTES)], stacked)
        assert not events[0].waited

    def test_a_device_has_one(self):
        assert host_copier(torch.device("cpu")) is host_copier(torch.device("cpu"))


def test_late_tokens_do_not_pile_up():
    store = LateStore(**SHAPE)
    store.append(*random_kv(100))
    for _ in range(500):
        store.append(*random_kv(1))
        assert len(store._arrivals) <= UNSETTLED_TOKENS + 1


def test_a_view_of_more_does_not_keep_it_alive():
    """Some models compute queries, keys and values as one tensor."""
    store = LateStore(**SHAPE)
    whole = torch.randn(2, 9, 70, 4)
    alive = weakref.ref(whole)
    key, value = whole[:, 3:6], whole[:, 6:]
    expected = key.clone()
    store.append(key, value)
    del whole, key, value
    gc.collect()
    assert alive() is None
    assert torch.equal(store.read(0, 70)[0], expected)


def damage_tail(store):
    store._slabs[1][-1][2, 1, 1, 15, 3] = 1.0


def damage_count(store):
    del store._slabs[1][-1]


def damage_dtype(store):
    store._slabs[0][0] = store._slabs[0][0].double()


def damage_sharing(store):
    store._slabs[1][1] = store._slabs[0][1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_tail, "1 numbers beyond token 60 are not zero"),
        (damage_count, "60 tokens need 2 slabs, found 1"),
        (damage_dtype, "slab 0 of sequence 0: expected .*float32.* found .*float64"),
        (damage_sharing, "share their memory"),
    ],
)
def test_integrity_check_finds(damage, message):
    store, *_ = filled(60)
    store.check_integrity()
    damage(store)
    with pytest.raises(IntegrityError, match=message):
        store.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_pinned_slabs_take_device_tensors_and_stay_pinned_when_copied(bits):
    store = new_store(bits, **SHAPE, slab_blocks=2, memory=HostMemory([torch.device("cuda")]))
    key, value = random_kv(90)
    for part in (slice(0, 7), slice(7, 60), slice(60, 90)):
        store.append(key[:, :, part].cuda(), value[:, :, part].cuda())
    if bits is not None:
        on_cpu = new_store(bits, **SHAPE, slab_blocks=2)
        on_cpu.append(key, value)
        key, value = on_cpu.read(0, 90)
    streamed = [kv[1:] for kv in ((s, k.cpu(), v.cpu()) for s, k, v in store.stream(90, 40, torch.device("cuda")))]
    assert torch.equal(torch.cat([k for k, _ in streamed], 2), key)
    twin = copy.deepcopy(store)
    twin.index(torch.tensor([1]))
    for held in (store, twin):
        held.check_integrity()
        assert all(slab.is_pinned() for slabs in held._slabs for slab in slabs)
    assert torch.equal(store.read(0, 90)[0], key)
    assert torch.equal(twin.read(0, 90)[1], value[1:])


@pytest.mark.parametrize("kernel", [True, False])
def test_sequences_may_have_different_numbers_of_slabs(kernel):
    """Repeated ones have those in use, the others those reserved too."""
    store, key, value = filled(60, kernel=kernel)  # two slabs of 32 tokens
    store.reserve(150)
    store.index(torch.tensor([1, 1, 0]))
    assert list(map(len, store._slabs)) == [5, 2, 5]
    assert store.room == 64
    store.check_integrity()
    expected = blocks_of(key[[1, 1, 0]], value[[1, 1, 0]], 16).flatten(0, 1)
    row_n, block_n = torch.arange(9).repeat_interleave(4), torch.arange(4).repeat(9)
    assert torch.equal(store.gather(row_n, block_n), expected)
    store.append(*random_kv(40, 3))
    store.check_integrity()
