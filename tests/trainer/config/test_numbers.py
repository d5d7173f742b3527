"""Numbers for people have one form everywhere, also where rounding reaches the next unit."""

import math

import pytest

from tandem.trainer.config.numbers import format_bytes, format_count, format_duration


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_499, "999k"), (999_500, "1M"), (999_600, "1M"),
     (6_291_456, "6.29M"), (627_700_000_000, "628B"), (4e12, "4T"), (9.996e14, "1000T"), (-1500, "-1.5k"), (0.25, "0.25"),
     (math.nan, "nan")],
)  # fmt: skip
def test_counts(value: float | int, text: str) -> None:
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "0.98 KiB"), (1023, "1.00 KiB"), (1024, "1.00 KiB"),
     (1536, "1.50 KiB"), (10_240, "10.0 KiB"), (102_400, "100 KiB"), (999 * 1024, "999 KiB"), (1000 * 1024, "0.98 MiB"),
     (19_000_000, "18.1 MiB"), (37_000_000_000, "34.5 GiB"), (170 * 2**30, "170 GiB"), (2**40, "1.00 TiB"),
     (5000 * 2**50, "5,000 PiB"), (-2048, "-2.00 KiB"), (16_777_216.4, "16.0 MiB")],
)  # fmt: skip
def test_bytes(value: float | int, text: str) -> None:
    assert format_bytes(value) == text


def test_durations() -> None:
    found = [format_duration(value) for value in (59.6, 3723, 200_000, None, math.inf)]
    assert found == ["0:01:00", "1:02:03", "2d 07h", "-", "-"]
