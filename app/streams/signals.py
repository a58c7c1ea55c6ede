"""What replicas tell each other in notifications: names and positions only, never a text of anybody's.

Any role of the database may listen and notify, so what is heard is checked, and what cannot be read is nothing.
A replica's own channel carries `wake ID:LAST …` and `echo NUMBER`; the common one `want BUS ID …`, `ask BUS` and
`poke BUS NAME`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal
from uuid import UUID

COMMON = "parley"
Poke = Literal["gone", "stop"]

# PostgreSQL takes payloads below 8,000 bytes; a position has up to 53 (of a stream 44) and a stream up to 33.
_WAKES, _WANTS = 150, 235


@dataclass(frozen=True, slots=True)
class Wake:
    """These streams have events up to these ids, these topics have changed."""

    positions: Mapping[UUID, int]


@dataclass(frozen=True, slots=True)
class Want:
    """A replica has readers of these streams, which it does not write, and of these topics."""

    bus: UUID
    streams: list[UUID]


@dataclass(frozen=True, slots=True)
class Ask:
    """A replica may have missed what others want: they say it again."""

    bus: UUID


@dataclass(frozen=True, slots=True)
class Poked:
    """Look at once: a replica has gone, or a run shall stop."""

    bus: UUID
    why: Poke


@dataclass(frozen=True, slots=True)
class Echo:
    number: int


Signal = Wake | Want | Ask | Poked | Echo
Message = tuple[str, str]


def channel_of(bus: UUID) -> str:
    return f"{COMMON}_{bus.hex}"


def wakes(channel: str, positions: Mapping[UUID, int]) -> Iterator[Message]:
    words = iter([f"{stream_id.hex}:{last}" for stream_id, last in positions.items()])
    while piece := " ".join(islice(words, _WAKES)):
        yield channel, f"wake {piece}"


def wants(bus: UUID, streams: Iterable[UUID]) -> Iterator[Message]:
    words = iter([stream_id.hex for stream_id in streams])
    while piece := " ".join(islice(words, _WANTS)):
        yield COMMON, f"want {bus.hex} {piece}"


def ask(bus: UUID) -> Message:
    return COMMON, f"ask {bus.hex}"


def poke(bus: UUID, why: Poke) -> Message:
    return COMMON, f"poke {bus.hex} {why}"


def echo(bus: UUID, number: int) -> Message:
    return channel_of(bus), f"echo {number}"


def read(payload: str) -> Signal | None:
    """None for what is none of ours."""
    try:
        match payload.split(" "):
            case ["wake", *words]:
                return Wake(dict(map(_position, words)))
            case ["want", bus, *streams]:
                return Want(UUID(bus), [UUID(stream_id) for stream_id in streams])
            case ["ask", bus]:
                return Ask(UUID(bus))
            case ["poke", bus, "gone" | "stop" as why]:
                return Poked(UUID(bus), why)
            case ["echo", number]:
                return Echo(int(number))
    except ValueError:
        pass
    return None


def _position(word: str) -> tuple[UUID, int]:
    stream_id, _, last = word.partition(":")
    return UUID(stream_id), int(last)
