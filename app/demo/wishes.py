"""What a request asks the demo to do, read from its model name (`demo?tokens=5&fault=reset`) and `X-Demo` header."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl


class Unknown(ValueError):
    """A wish nobody can grant; the text lists what there is."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """`clock` makes every token the monotonic time at which it is sent, in nanoseconds: readers measure latency by it.

    `say` is the whole answer; `whole` gives any answer in one document, as from a flow that cannot stream. `times`
    limits the faults to the first requests that carry the same `key`; `after` counts tokens.
    """

    tokens: int | None = None
    delay_ms: float = 40
    first_ms: float | None = None
    batch: int = 16
    fault: tuple[str, ...] = ()
    after: int = 3
    times: int | None = None
    key: str = ""
    status: int = 503
    retry_after: str = ""
    to: str = "http://127.0.0.1:9/v1/chat/completions"
    echo: bool = False
    say: str | None = None
    whole: bool = False
    clock: bool = False


def _flag(text: str) -> bool:
    return text.lower() in ("1", "true", "yes", "")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


_READ: Mapping[str, Callable[[str], Any]] = {
    "tokens": int,
    "delay_ms": float,
    "first_ms": float,
    "batch": int,
    "fault": _names,
    "after": int,
    "times": int,
    "key": str,
    "status": int,
    "retry_after": str,
    "to": str,
    "echo": _flag,
    "say": str,
    "whole": _flag,
    "clock": _flag,
}


def wished(model: str, header: str) -> Wishes:
    """The wishes of both places, the header's last. Raises Unknown."""
    given: dict[str, Any] = {}
    for query in (model.partition("?")[2], header):
        for name, text in parse_qsl(query, keep_blank_values=True):
            if name not in _READ:
                raise Unknown(f"The demo does not know '{name}'. It knows {', '.join(_READ)}.")
            try:
                given[name] = _READ[name](text)
            except ValueError:
                raise Unknown(f"'{text}' is no value for '{name}'.") from None
    return Wishes(**given)
