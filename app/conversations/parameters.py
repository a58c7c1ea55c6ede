"""The parameters in the query of a request for conversations."""

from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from app.access.guard import acting_for, owner_of
from app.errors import BadRequest
from app.text import clean

_LONGEST = 256


def whose(request: Request[Any]) -> str | None:
    """Whose conversations, as `username` says it or `user_id`; None: anybody's."""
    owner, username = owner_of(request), acting_for(request, word(request, "username"))
    if None not in (owner, username) and owner != username:
        raise BadRequest("bad_parameter", "username and user_id name two users; say one of them.")
    return username if owner is None else owner


def word(request: Request[Any], name: str) -> str | None:
    """A parameter of the query; an empty one is none. Raises BadRequest for one that no name is as long as, or that is
    there twice.
    """
    every = request.query_params.getlist(name)
    if len(every) > 1:
        raise BadRequest("bad_parameter", f"{name} is there more than once.")
    given = clean("".join(every))
    if len(given) > _LONGEST:
        raise BadRequest("bad_parameter", f"{name} is longer than {_LONGEST} characters.")
    return given or None


def whole_number(request: Request[Any], name: str, default: int, *, least: int = 1, most: int = (1 << 31) - 1) -> int:
    """A whole number within its bounds. Raises BadRequest for anything else."""
    given = word(request, name)
    if given is None:
        return default
    if not (given.isascii() and given.isdecimal() and least <= int(given) <= most):
        raise BadRequest("bad_parameter", f"{name} must be a whole number from {least} to {most}.")
    return int(given)


def moment(request: Request[Any], name: str) -> datetime | None:
    """A time, or a day, which begins at midnight; without a zone it is UTC. Raises BadRequest for anything else."""
    given = word(request, name)
    if given is None:
        return None
    try:
        told = datetime.fromisoformat(given.replace(" ", "+"))
        return told.replace(tzinfo=told.tzinfo or UTC).astimezone(UTC)
    except (ValueError, OverflowError):
        detail = f"{name} must be a date or a time as in ISO 8601, like 2026-01-31 or 2026-01-31T12:00:00Z."
        raise BadRequest("bad_parameter", detail) from None
