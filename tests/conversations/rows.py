"""Random rows of a source, few enough of each kind that they meet."""

from datetime import UTC, datetime, timedelta
from random import Random

from app.conversations.summary import Said

_NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)


def random_row(chance: Random, number: int) -> Said:
    """The same numbers give the same rows, in the order of the calls."""
    return Said(
        conversation_id=chance.choice("aaaaaaab") if chance.random() < 0.6 else f"c{chance.randrange(40)}",
        username=chance.choice(["", "ann", "Zoë"]),
        rank=chance.randrange(500),
        key=str(number),
        role=chance.choice(["user", "assistant", "other"]),
        at=_NOON + timedelta(hours=chance.randrange(-60, 60)),
        question=chance.choice(["", "Why?", "why?", "über"]),
        model=chance.choice(["", "M", "m", "é"]),
        client_ip=chance.choice(["", "::1", "10.0.0.1"]),
        chatbot_id=chance.choice(["", "bot", "Bot"]),
        tokens=chance.randrange(100),
        duration_ms=chance.randrange(100),
        messages=chance.choice([1, 2]),
    )
