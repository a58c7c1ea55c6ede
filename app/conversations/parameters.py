"""The parameters in the query of a request for conversations."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, TypeVar

from starlette.requests import Request

from app.access.guard import acting_for, owner_of
from app.errors import BadRequest
from app.text import clean

Word = TypeVar("Word", bound=str)
_LONGEST = 256
# Figures cover so many days unless the request says otherwise, and at most.
_DAYS, _MOST_DAYS = 30, 400


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


def one_of(request: Request[Any], name: str, words: Sequence[Word]) -> Word:
    """One of these, the first where none is named. Raises BadRequest for anything else, an empty one as well."""
    given = (word(request, name) or "") if name in request.query_params else words[0]
    for known in words:
        if known == given:
            return known
    raise BadRequest("bad_parameter", f"{name} is one of {', '.join(words)}.")


def days(request: Request[Any]) -> tuple[date, date]:
    """The days from `from` on, before `to`; the last thirty, with today. Raises BadRequest for too many."""
    since, until = moment(request, "from"), moment(request, "to")
    last = until.date() if until else datetime.now(UTC).date() + timedelta(days=1)
    first = since.date() if since else last - min(timedelta(days=_DAYS), last - date.min)
    if not timedelta(0) <= last - first <= timedelta(days=_MOST_DAYS):
        raise BadRequest("bad_parameter", f"from must be at most {_MOST_DAYS} days before to.")
    return first, last
