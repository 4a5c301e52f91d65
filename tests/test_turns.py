"""Turns: forwards of two kinds never overlap, whoever asks first goes first, and nobody is forgotten."""

from __future__ import annotations

import linecache
import random
import sys
import threading
import time

import pytest

from attention_predictor.offload.hf import turns as turns_module
from attention_predictor.offload.hf.turns import Turns

WAIT_S = 30.0


def begun(work) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_until(holds) -> None:
    end = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("seed", range(3))
def test_kinds_never_overlap(seed: int) -> None:
    state, switches = {"stock": False}, []

    def switch(stock: bool) -> None:
        state["stock"] = stock
        switches.append(stock)

    turns, wrong, together = Turns(switch), [], []
    running = {True: 0, False: 0}
    lock = threading.Lock()

    def work(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        for _ in range(60):
            stock = rng.random() < 0.5
            with turns.take(stock=stock), turns.take(stock=stock, joins=True):  # the inner one waits for nothing
                with lock:
                    running[stock] += 1
                    wrong.extend([1] * (running[not stock] > 0 or state["stock"] is not stock))
                    together.append(running[stock])
                time.sleep(rng.random() * 1e-4)
                with lock:
                    running[stock] -= 1

    threads = [begun(lambda number=number: work(number)) for number in range(6)]
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert not wrong
    assert max(together) > 1
    assert {True, False} == set(switches)
    assert not state["stock"]


def test_first_come_first_served() -> None:
    """A stock forward is not kept waiting by others that come later, however many overlap."""
    turns, order, go_on = Turns(lambda stock: None), [], threading.Event()

    def work(name: str, *, stock: bool) -> None:
        with turns.take(stock=stock):
            order.append(name)
            if name == "first":
                go_on.wait(WAIT_S)

    threads = []
    for name, stock in (("first", False), ("stock", True), ("later", False)):
        threads.append(begun(lambda name=name, stock=stock: work(name, stock=stock)))
        count = len(threads)
        wait_until(lambda count=count: order == ["first"] and len(turns._waiting) == count - 1)
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert order == ["first", "stock", "later"]


def test_what_a_forward_needs_begins_though_others_wait() -> None:
    turns, go_on, joined = Turns(lambda stock: None), threading.Event(), threading.Event()

    def outer() -> None:
        with turns.take(stock=True):
            go_on.wait(WAIT_S)

    def inner() -> None:
        with turns.take(stock=True, joins=True):
            joined.set()

    def other() -> None:
        with turns.take(stock=False):
            assert joined.is_set()

    threads = [begun(outer)]
    wait_until(lambda: len(turns._running) == 1)
    threads.append(begun(other))
    wait_until(lambda: len(turns._waiting) == 1)
    threads.append(begun(inner))
    assert joined.wait(WAIT_S)
    go_on.set()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.mark.parametrize("stock", [True, False])
def test_a_part_of_a_forward_never_waits_for_it(stock: bool) -> None:
    switches = []
    turns = Turns(switches.append)
    with turns.take(stock=stock):
        for kind in (True, False):
            before = list(switches)
            with turns.take(stock=kind, joins=True):
                assert switches == before
    assert not turns._running


def test_an_error_gives_the_turn_back() -> None:
    turns = Turns(lambda stock: None)
    with pytest.raises(ZeroDivisionError), turns.take(stock=True):
        raise ZeroDivisionError
    assert not turns._running


def interrupted_at(line: int, work) -> bool:
    """Runs ``work`` and interrupts it at this line that it executes in ``turns.py``; whether it got so far."""
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != turns_module.__file__:
            return None
        # A signal is not handled where a lock is taken or given back.
        if event == "line" and "with self.lock" not in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
            left -= 1
            if left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return left <= 0


@pytest.mark.parametrize("stock", [True, False])
def test_an_interrupt_at_any_line_is_mended_by_the_next_turn(stock: bool) -> None:
    line, state = 0, {"stock": False}

    def switch(stock: bool) -> None:
        state["stock"] = stock

    while True:
        line += 1
        turns = Turns(switch)

        def work(turns: Turns = turns) -> None:
            with turns.take(stock=stock):
                pass

        if not interrupted_at(line, work):
            break
        for kind in (not stock, stock):

            def again(turns: Turns = turns, kind: bool = kind) -> None:
                with turns.take(stock=kind):
                    assert state["stock"] is kind

            again()
        assert not state["stock"]
        assert not turns._waiting
        assert not turns._running
        thread = begun(again)
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert line > 15
