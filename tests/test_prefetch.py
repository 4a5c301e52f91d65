"""Prefetchers: order, errors on the waiting thread, and no way to hang."""

import copy
import ctypes
import gc
import signal
import threading
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from attention_predictor.errors import ConfigError, FetchError, IntegrityError
from attention_predictor.offload.blocks.prefetch import (
    Prefetcher,
    SyncPrefetcher,
    ThreadPrefetcher,
    make_prefetcher,
)

pytestmark = pytest.mark.timeout(20)
NAME = "attention-predictor-prefetch"
SOON_S = 2.0  # a dead worker is noticed within 0.2 s; the rest is for machines whose cores are busy


class BrokenDiskError(Exception):
    """What the jobs here fail with."""


def fail() -> None:
    raise BrokenDiskError("sector 7")


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == NAME}


def inject_exit(thread: threading.Thread) -> None:
    """What kills a thread from outside: SystemExit at its next bytecode."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def assert_soon(start: float) -> None:
    assert time.perf_counter() - start < SOON_S


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = workers()
    yield
    gc.collect()
    for thread in workers() - before:
        thread.join(5)
    assert not workers() - before


@pytest.fixture(params=["thread", "none"])
def prefetcher(request):
    with make_prefetcher(request.param, "cpu") as made:
        yield made


@pytest.fixture
def threaded():
    with ThreadPrefetcher("cpu", depth=2) as made:
        yield made


class PrefetchMachine(RuleBasedStateMachine):
    """Any sequence of calls: jobs run once and in order until one fails; then every call says so."""

    @initialize(depth=st.sampled_from([None, 1, 2]))
    def start(self, depth):
        self.prefetcher: Prefetcher = SyncPrefetcher() if depth is None else ThreadPrefetcher("cpu", depth=depth)
        self.ran: list[int] = []
        self.tickets: list = []
        self.expected: list[int] = []
        self.failed = self.closed = False

    @rule(sleep_ms=st.sampled_from([0, 0, 1]))
    def submit(self, sleep_ms):
        number = len(self.expected)

        def job():
            time.sleep(sleep_ms / 1e3)
            self.ran.append(number)

        if self.closed:
            with pytest.raises(FetchError):
                self.prefetcher.submit(job)
            return
        try:
            ticket = self.prefetcher.submit(job)
        except FetchError:
            assert self.failed
            return
        if not self.failed:
            self.expected.append(number)
        self.tickets.append((ticket, not self.failed))

    @rule()
    def submit_failing(self):
        if self.closed or self.failed:
            return
        self.tickets.append((self.prefetcher.submit(fail), False))
        self.failed = True

    @rule(data=st.data())
    def wait(self, data):
        if not self.tickets:
            return
        ticket, good = data.draw(st.sampled_from(self.tickets))
        cause = None
        try:
            assert self.prefetcher.wait(ticket) >= 0
        except FetchError as error:
            cause = error.__cause__
        if cause is None:
            assert good
            assert ticket.done
        else:
            assert self.failed
            assert isinstance(cause, BrokenDiskError)

    @invariant()
    def is_whole(self):
        if hasattr(self, "prefetcher"):
            self.prefetcher.check_integrity()

    @rule()
    def copied_prefetchers_are_the_same(self):
        assert copy.deepcopy({"held": self.prefetcher})["held"] is self.prefetcher

    @rule()
    def close(self):
        self.prefetcher.close()
        self.closed = True
        assert self.ran == self.expected

    def teardown(self):
        if hasattr(self, "prefetcher"):
            self.close()


PrefetchMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
TestPrefetchMachine = PrefetchMachine.TestCase


def overfill(prefetcher):
    prefetcher._unfinished.extend([prefetcher._unfinished[0]] * 2)


def finish_out_of_order(prefetcher):
    prefetcher._unfinished[1].done = True


def queue_unasked(prefetcher):
    for _ in range(3):
        prefetcher._mailbox.jobs.put(prefetcher._unfinished[0])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (overfill, "at most 2 jobs may be unfinished, found 4"),
        (finish_out_of_order, "a job is done before one submitted earlier"),
        (queue_unasked, "2 jobs are not done, found 4 in the queue"),
    ],
)
def test_integrity_is_checked(threaded, break_it, message):
    running, release = threading.Event(), threading.Event()
    threaded.submit(lambda: (running.set(), release.wait(10)))
    threaded.submit(lambda: None)
    assert running.wait(10)
    threaded.check_integrity()
    with pytest.raises(IntegrityError, match=message):
        break_it(threaded)
        threaded.check_integrity()
    threaded._unfinished.clear()
    release.set()


def test_jobs_run_in_order(prefetcher):
    ran: list[int] = []
    tickets = [prefetcher.submit(lambda number=number: ran.append(number)) for number in range(200)]
    assert prefetcher.wait(tickets[-1]) >= 0
    assert ran == list(range(200))
    assert all(ticket.done for ticket in tickets)


def test_wait_reports_the_exposed_time_in_ms(prefetcher):
    ticket = prefetcher.submit(lambda: time.sleep(0.05))
    assert 20 < prefetcher.wait(ticket) < 2000
    assert prefetcher.wait(ticket) < 20


def test_the_worker_runs_beside_the_caller(threaded):
    release = threading.Event()
    ticket = threaded.submit(lambda: release.wait(10))
    assert not ticket.done
    release.set()
    threaded.wait(ticket)


def test_jobs_have_no_grad_and_the_submitters_inference_mode(prefetcher):
    seen: list[tuple[bool, bool]] = []

    def job():
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with torch.inference_mode():
        prefetcher.wait(prefetcher.submit(job))
    with torch.enable_grad():
        prefetcher.wait(prefetcher.submit(job))
        assert torch.is_grad_enabled()
    assert seen == [(False, True), (False, False)]


def test_a_job_may_write_to_what_inference_mode_made(prefetcher):
    with torch.inference_mode():
        pool = torch.zeros(3)
        prefetcher.wait(prefetcher.submit(lambda: pool.fill_(1)))
    assert pool.sum() == 3


def test_an_error_surfaces_from_its_cause_and_poisons(prefetcher):
    ran: list[int] = []
    good = prefetcher.submit(lambda: ran.append(1))
    prefetcher.wait(good)
    bad = prefetcher.submit(fail)
    for ticket in (bad, good, bad):
        with pytest.raises(FetchError, match=r"a fetch failed: BrokenDiskError\('sector 7'\)") as caught:
            prefetcher.wait(ticket)
        assert isinstance(caught.value.__cause__, BrokenDiskError)
    with pytest.raises(FetchError):
        prefetcher.submit(lambda: ran.append(2))
    prefetcher.close()
    with pytest.raises(FetchError):
        prefetcher.wait(bad)
    assert ran == [1]


def test_no_job_behind_a_failed_one_runs(threaded):
    release, ran = threading.Event(), []

    def fail_later():
        release.wait(10)
        fail()

    threaded.submit(fail_later)
    behind = threaded.submit(lambda: ran.append(1))
    release.set()
    with pytest.raises(FetchError):
        threaded.wait(behind)
    threaded.close()
    assert not ran
    assert not behind.done


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_a_job_that_ends_its_thread_is_an_error(threaded, error):
    def end():
        raise error

    start = time.perf_counter()
    with pytest.raises(FetchError) as caught:
        threaded.wait(threaded.submit(end))
    assert isinstance(caught.value.__cause__, error)
    assert_soon(start)


def test_a_worker_killed_in_a_job_is_noticed_while_waiting(threaded):
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            time.sleep(0.001)

    ticket = threaded.submit(spin)
    threading.Timer(0.05, inject_exit, [threaded._thread]).start()
    start = time.perf_counter()
    with pytest.raises(FetchError):
        threaded.wait(ticket)
    assert_soon(start)
    threaded.close()


def test_a_worker_killed_while_idle_is_noticed_by_the_next_step(threaded):
    threaded.wait(threaded.submit(lambda: None))
    time.sleep(0.1)
    inject_exit(threaded._thread)
    start = time.perf_counter()
    ticket = threaded.submit(lambda: None)
    with pytest.raises(FetchError):
        threaded.wait(ticket)
    with pytest.raises(FetchError):
        threaded.submit(lambda: None)
    assert_soon(start)


def test_a_worker_that_vanished_without_a_word_is_noticed(threaded):
    ticket = threaded.submit(lambda: None)
    threaded.wait(ticket)
    unrun = copy.copy(ticket)
    unrun.done, unrun._undone = False, threading.Lock()
    unrun._undone.acquire()
    threaded._mailbox.jobs.put(None)
    threaded._thread.join(5)
    with pytest.raises(IntegrityError, match="the prefetch thread is gone, and left no error"):
        threaded.check_integrity()
    start = time.perf_counter()
    for stale in (unrun, ticket):
        with pytest.raises(FetchError, match="the prefetch thread is gone"):
            threaded.wait(stale)
    with pytest.raises(FetchError, match="the prefetch thread is gone"):
        threaded.submit(lambda: None)
    assert_soon(start)


def test_a_full_queue_blocks_until_there_is_room(threaded):
    release, ran = threading.Event(), []
    for number in range(2):
        threaded.submit(lambda number=number: (release.wait(10), ran.append(number)))
    threading.Timer(0.1, release.set).start()
    start = time.perf_counter()
    ticket = threaded.submit(lambda: ran.append(2))
    assert time.perf_counter() - start > 0.05
    threaded.wait(ticket)
    assert ran == [0, 1, 2]


def test_a_full_queue_notices_a_dead_worker(threaded):
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            time.sleep(0.001)

    threaded.submit(spin)
    threaded.submit(spin)
    threading.Timer(0.05, inject_exit, [threaded._thread]).start()
    start = time.perf_counter()
    with pytest.raises(FetchError):
        threaded.submit(spin)
    assert_soon(start)


@pytest.mark.usefixtures("interruptible")
def test_keyboard_interrupt_while_waiting_leaves_it_usable_and_closable(threaded):
    release = threading.Event()
    ticket = threaded.submit(lambda: release.wait(10))
    main = threading.main_thread().ident
    threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        threaded.wait(ticket)
    release.set()
    threaded.wait(ticket)
    threaded.close()
    assert not threaded._thread.is_alive()


def test_close_finishes_what_was_submitted_and_can_be_called_again(prefetcher):
    ran: list[int] = []
    tickets = [prefetcher.submit(lambda: (time.sleep(0.002), ran.append(1))) for _ in range(10)]
    prefetcher.close()
    prefetcher.close()
    assert len(ran) == 10
    prefetcher.wait(tickets[-1])
    with pytest.raises(FetchError, match="the prefetcher is closed"):
        prefetcher.submit(fail)


def test_close_before_any_job_starts_no_thread():
    before = workers()
    prefetcher = ThreadPrefetcher("cpu")
    assert workers() == before
    prefetcher.close()
    assert workers() == before


def test_close_from_other_threads_and_from_a_job(threaded):
    ticket = threaded.submit(threaded.close)
    closers = [threading.Thread(target=threaded.close) for _ in range(4)]
    for closer in closers:
        closer.start()
    for closer in closers:
        closer.join(5)
    threaded.wait(ticket)
    assert not threaded._thread.is_alive()


def test_close_gives_up_on_a_job_that_does_not_end(monkeypatch, threaded):
    monkeypatch.setattr("attention_predictor.offload.blocks.prefetch.CLOSE_S", 0.1)
    release, ran = threading.Event(), []
    threaded.submit(lambda: release.wait(10))
    behind = threaded.submit(lambda: ran.append(1))
    start = time.perf_counter()
    threaded.close()
    assert_soon(start)
    with pytest.raises(FetchError, match="the prefetcher is closed"):
        threaded.wait(behind)
    release.set()
    threaded._thread.join(5)
    assert not ran


def test_a_prefetcher_that_nobody_closed_leaves_no_thread():
    prefetcher = ThreadPrefetcher("cpu")
    prefetcher.wait(prefetcher.submit(lambda: None))
    thread = prefetcher._thread
    del prefetcher
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_a_finished_job_is_let_go(prefetcher):
    class Held:
        pass

    held = Held()
    seen = [held]
    ticket = prefetcher.submit(lambda held=held: None)
    prefetcher.wait(ticket)
    del held
    prefetcher.close()
    gc.collect()
    assert len(gc.get_referrers(seen[0])) == 1


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_make_prefetcher(device):
    assert isinstance(make_prefetcher("thread", device), ThreadPrefetcher)
    assert isinstance(make_prefetcher("none", device), SyncPrefetcher)
    with pytest.raises(ConfigError, match="depth must be at least 1, got 0"):
        ThreadPrefetcher(device, depth=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_are_ordered_both_ways():
    source = torch.empty(1 << 20, pin_memory=True)
    target, copies = torch.zeros(1 << 20, device="cuda"), []
    with ThreadPrefetcher("cuda") as prefetcher:
        for step in range(50):

            def job(step=step):
                source.fill_(step)  # one staging buffer: the last job's copy has to be through
                assert torch.cuda.current_stream() != torch.cuda.default_stream()
                target.copy_(source, non_blocking=True)

            torch.cuda._sleep(200_000)  # the job must not overwrite what this stream still reads
            copies.append(target.clone())
            prefetcher.wait(prefetcher.submit(job))
            copies.append(target.clone())
    expected = [float(number) for step in range(50) for number in (max(step - 1, 0), step)]
    assert [copied.unique().tolist() for copied in copies] == [[number] for number in expected]
