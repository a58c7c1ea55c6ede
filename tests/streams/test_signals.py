"""What replicas tell each other fits into notifications, and strangers' notifications are nothing."""

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.streams import signals
from app.streams.hub import SOMEWHERE
from app.streams.interests import Interests
from app.streams.signals import Ask, Echo, Poked, Wake, Want

BUS = UUID("0197c1a2-7b3c-4def-8a01-23456789abcd")


@given(st.dictionaries(st.uuids(), st.integers(0, SOMEWHERE), max_size=500))
def test_positions_arrive_as_they_were_told(positions: dict[UUID, int]) -> None:
    heard: dict[UUID, int] = {}
    for channel, payload in signals.wakes("x", positions):
        assert channel == "x"
        assert len(payload.encode()) < 8000
        told = signals.read(payload)
        assert isinstance(told, Wake)
        heard |= told.positions
    assert heard == positions


@given(st.lists(st.uuids(), max_size=700))
def test_interests_arrive_as_they_were_told(streams: list[UUID]) -> None:
    heard: list[UUID] = []
    for channel, payload in signals.wants(BUS, streams):
        assert channel == signals.COMMON
        assert len(payload.encode()) < 8000
        told = signals.read(payload)
        assert isinstance(told, Want)
        assert told.bus == BUS
        heard += told.streams
    assert heard == streams


def test_the_longest_payloads_fit() -> None:
    longest = {uuid4(): SOMEWHERE for _ in range(1000)}
    payloads = [payload for _, payload in (*signals.wakes("x", longest), *signals.wants(BUS, longest))]
    assert 7000 < max(map(len, payloads)) < 8000
    assert len(signals.channel_of(BUS)) < 64, "PostgreSQL would cut it"


def test_the_small_ones() -> None:
    assert signals.read(signals.ask(BUS)[1]) == Ask(BUS)
    assert signals.read(signals.poke(BUS, "gone")[1]) == Poked(BUS, "gone")
    assert signals.read(signals.echo(BUS, 7)[1]) == Echo(7)
    assert signals.echo(BUS, 7)[0] == signals.channel_of(BUS)


@given(st.text() | st.sampled_from(["", "wake", "wake x", "wake :1", "want", "want x y", "poke", "echo", "echo x"]))
def test_what_cannot_be_read_is_nothing(payload: str) -> None:
    assert signals.read(payload) is None or payload.split(" ")[0] in ("wake", "want", "ask", "poke", "echo")


@pytest.mark.parametrize("payload", ["wake abc", f"wake {BUS.hex}", "want x", "ask", f"poke {BUS.hex} rm", "echo 1 2"])
def test_half_a_signal_is_nothing(payload: str) -> None:
    assert signals.read(payload) is None


# -- interests


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_interests_are_new_once_and_forgotten_unless_repeated() -> None:
    clock = Clock()
    interests = Interests(lasts_s=30, most=10, clock=clock)
    one, two = uuid4(), uuid4()
    assert interests.note("a", [one, two]) == [one, two]
    assert interests.note("b", [one]) == [one]
    clock.now = 20
    assert interests.note("a", [one]) == []
    clock.now = 31
    interests.forget_old()
    assert {stream: set(channels) for stream, channels in interests.channels.items()} == {one: {"a"}}
    assert interests.note("a", [two]) == [two], "as if it had never been wanted"


def test_interests_are_bounded() -> None:
    clock = Clock()
    interests = Interests(lasts_s=30, most=3, clock=clock)
    streams = [uuid4() for _ in range(5)]
    assert interests.note("a", streams) == streams[:3]
    assert interests.note("b", streams) == []
    assert set(interests.channels) == set(streams[:3])
    clock.now = 31
    interests.forget_old()
    assert interests.note("b", streams) == streams[:3], "there is room again"
