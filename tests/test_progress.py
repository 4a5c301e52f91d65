"""How far long work has come: a bar on a terminal, elsewhere a line every half minute and one at the end."""

from __future__ import annotations

import io
import re

import pytest

from attention_predictor.progress import Progress


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")


def test_a_line_now_and_then_and_one_at_the_end() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("recording", 40, "documents", stream=stream, clock=clock) as progress:
        for _ in range(40):
            clock.now += 10
            progress.update()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 40 // 3 + 1
    assert lines[0] == "recording: 3 of 40 documents, 10.0 s each, 6 min left"
    assert lines[-1] == "recording: 40 of 40 documents, 10.0 s each, in 7 min"


def test_quick_work_says_one_line() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("decoding", 100, "tokens", stream=stream, clock=clock) as progress:
        for _ in range(100):
            clock.now += 0.02
            progress.update()
    assert stream.getvalue() == "decoding: 100 of 100 tokens, 50.0 tokens a second, in 2 s\n"


def test_what_was_done_before_is_no_work_of_now() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("a", 10, "samples", done=6, stream=stream, clock=clock) as progress:
        clock.now = 60
        progress.reach(8)
        progress.describe("b")
        progress.show(loss="0.5")
        clock.now = 120
        progress.reach(10)
        progress.write("a line of its own")
    first, second, own, *_ = stream.getvalue().splitlines()
    assert first == "a: 8 of 10 samples, 30.0 s each, 60 s left"
    assert second == "b: 10 of 10 samples, 30.0 s each, in 2 min, loss 0.5"
    assert own == "a line of its own"


def test_work_that_is_counted_anew() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress("prefill", 5, "tokens", stream=stream, clock=clock) as progress:
        clock.now = 60
        progress.update()
        progress.describe("decoding", anew=True)
        clock.now = 64
        progress.update(4)
    assert stream.getvalue().splitlines()[-1] == "decoding: 5 of 5 tokens, 1.0 tokens a second, in 4 s"


def test_nothing_to_do_says_nothing() -> None:
    stream = io.StringIO()
    with Progress("a", 3, "samples", done=3, stream=stream):
        pass
    assert stream.getvalue() == ""


def test_whoever_ends_the_work_says_why() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="no"), Progress("a", 3, "samples", stream=stream) as progress:
        progress.update()
        raise ValueError("no")
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    stream = Terminal()
    with Progress("recording", 4, "documents", stream=stream) as progress:
        progress.update(4)
        progress.show(loss="0.5")
        progress.write("beside it")
    text = stream.getvalue()
    assert re.search(r"recording: 100%.* 4/4 \[\d\d:\d\d<00:00", text)
    assert "loss=0.5" in text
    assert "beside it\n" in text


@pytest.mark.parametrize("quiet", [True, False])
def test_a_stream_that_takes_nothing_ends_no_work(quiet: bool) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        with Progress("a", 2, "samples", stream=stream, quiet=quiet, clock=iter(range(0, 1000, 60)).__next__) as one:
            one.update()
            one.update()


def test_quiet_processes_say_nothing() -> None:
    stream = Terminal()
    with Progress("a", 2, "samples", stream=stream, quiet=True) as progress:
        progress.update(2)
        progress.write("x")
    assert stream.getvalue() == ""
