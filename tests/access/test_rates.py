"""The buckets: never more than their rate, never less, and of bounded number."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.access.rates import ACTIVITIES, WINDOW_S, Rate, rates_of
from app.errors import Misconfigured
from app.settings import Settings


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(most=st.integers(1, 50), pauses=st.lists(st.floats(0, 90), max_size=200))
def test_no_window_holds_more_than_twice_the_rate_and_the_long_run_holds_the_rate(
    most: int, pauses: list[float]
) -> None:
    clock = Clock()
    rate, taken = Rate(most, clock=clock), list[float]()
    for pause in pauses:
        clock.now += pause
        standing = rate.take("ann")
        assert 0 <= standing.left <= most
        assert 0 <= standing.full_s <= WINDOW_S + 1e-6
        if not standing.wait_s:
            taken.append(clock.now)
    for end in taken:
        # A full bucket, and what has come in since.
        since = [moment for moment in taken if moment <= end]
        for number, begin in enumerate(since):
            assert len(since) - number <= most + (end - begin) * most / WINDOW_S + 1e-3


@given(most=st.integers(1, 10_000))
def test_all_of_a_minute_may_come_at_once_and_the_next_when_it_was_said(most: int) -> None:
    clock = Clock()
    rate = Rate(most, clock=clock)
    assert [rate.take("ann").left for _ in range(min(most, 500))] == list(range(most - 1, -1, -1))[:500]
    for _ in range(most - 500):
        assert not rate.take("ann").wait_s
    for _ in range(3):  # what is refused costs nothing
        refused = rate.take("ann")
    assert refused.left == 0
    assert 0 < refused.wait_s <= WINDOW_S / most + 1e-6
    assert not rate.take("bob").wait_s
    clock.now += refused.wait_s
    assert not rate.take("ann").wait_s
    assert rate.take("ann").wait_s


def test_however_many_ask_a_rate_remembers_so_many_and_those_used_last() -> None:
    rate = Rate(1, remembered=100, clock=Clock())
    assert not rate.take("ann").wait_s
    for number in range(10_000):
        rate.take(f"stranger {number}")
        if number % 50 == 0:
            assert rate.take("ann").wait_s, "whoever goes on asking is not forgotten"
    assert len(rate._full_at) == 100


def test_the_headers_are_those_of_the_draft() -> None:
    rate = Rate(2, clock=Clock())
    assert rate.take("ann").headers("messages") == {
        "RateLimit-Policy": '"messages";q=2;w=60',
        "RateLimit": '"messages";r=1;t=30',
    }
    rate.take("ann")
    assert rate.take("ann").headers("reads")["RateLimit"] == '"reads";r=0;t=30'


def test_a_setting_names_what_is_limited() -> None:
    assert rates_of(" messages = 120,reads=1, ", "rate_user") == {"messages": 120, "reads": 1}
    assert rates_of("none", "rate_user") == rates_of("", "rate_user") == {}
    for wrong in (
        "messages",
        "messages=0",
        "messages=-1",
        "messages=x",
        "letters=3",
        "messages=1.5",
        "messages=9999999",
    ):
        with pytest.raises(Misconfigured, match="PARLEY_RATE_USER takes"):
            rates_of(f"reads=1,{wrong}", "rate_user")


def test_the_defaults_are_usable() -> None:
    for setting in ("rate_user", "rate_key", "rate_address"):
        told = Counter(rates_of(Settings.model_fields[setting].default, setting).keys())
        assert set(told) <= set(ACTIVITIES)
