"""Sizes as people read them, and where they are printed."""

from __future__ import annotations

import pytest

from attention_predictor.offload.stats import Stats
from attention_predictor.sizes import size_text


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (0.4, "0 bytes"),
        (1, "1 byte"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (1536.5, "1.50 KiB"),
        ((1 << 20) - 1, "1.00 MiB"),
        (1 << 20, "1.00 MiB"),
        (16 << 30, "16.00 GiB"),
        (1 << 50, "1024.00 TiB"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text


def shown(device: int, full: int, **figures: object) -> str:
    lines = str(Stats(device_bytes={0: {"pool": device}}, full_bytes={0: full}, **figures)).splitlines()
    (line,) = (line for line in lines if line.startswith("KV on the device"))
    return line


def test_a_share_of_the_cache_or_more_than_it() -> None:
    assert shown(3 << 19, 3 << 20).endswith("1.50 MiB (50.0% of the full cache): pool 1.50 MiB")
    assert shown(100, 100).endswith("100 bytes (100.0% of the full cache): pool 100 bytes")
    more = shown(5 << 19, 32 << 10)
    assert "2.50 MiB, more than the 32.00 KiB of the full cache" in more
    assert "%" not in more
    assert "%" not in shown(0, 0)


def test_little_traffic_is_not_rounded_to_nothing() -> None:
    text = str(Stats(steps=4, ahead_bytes=400, streamed_bytes=40))
    assert "100 bytes (ahead 100 bytes, late 0 bytes)" in text
    assert "10 bytes" in text
