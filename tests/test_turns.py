"""Turns: forwards of two kinds never overlap, whoever asks first goes first, and nobody is forgotten."""

from __future__ import annotations

import random
import threading
import time

import pytest

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
        assert state["stock"] is not stock
        state["stock"] = stock
        switches.append(stock)

    turns, wrong, together = Turns(switch), [], []
    running = {True: 0, False: 0}
    lock = threading.Lock()

    def work(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        for _ in range(60):
            stock = rng.random() < 0.5
            with turns.take(stock=stock), turns.take(stock=not stock):  # the inner one waits for nothing
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
    assert switches == [True, False] * (len(switches) // 2)


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


def test_an_error_gives_the_turn_back_and_an_interrupted_wait_leaves_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(lambda stock: None)
    with pytest.raises(ZeroDivisionError), turns.take(stock=True):
        raise ZeroDivisionError

    def interrupted(holds) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(turns._changed, "wait_for", interrupted)
        with pytest.raises(KeyboardInterrupt), turns.take(stock=False):
            pytest.fail("it had no turn")
    with turns.take(stock=True), turns.take(stock=False):
        pass
    assert not turns._waiting
    assert turns._running == 0
