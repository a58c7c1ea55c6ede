"""Where a reader stands: the last id it has of a stream, or of each of several, as URLs and Last-Event-ID carry it."""

import re
from collections.abc import Mapping
from uuid import UUID

from starlette.datastructures import Headers, QueryParams

from app.errors import BadRequest
from app.streams.identity import stream_id_of

_HEADER = "Last-Event-ID"
_NAMES = ("after", "last_event_id", "starting_after")
_NUMBER = re.compile(r"[0-9]{1,10}")


def cursor_of(headers: Headers, query: QueryParams, stream_id: UUID) -> int:
    """The last id the reader has: the header wins over the query (an EventSource repeats its URL when it resumes).

    Raises BadRequest for what is no cursor of this stream.
    """
    for name, given in ((_HEADER, headers.get(_HEADER) or None), *((name, query.get(name)) for name in _NAMES)):
        if given is not None:
            prefix, _, number = given.rpartition(":")
            if prefix and prefix.lower() != str(stream_id):
                raise BadRequest("bad_cursor", f"{name} belongs to another stream.")
            return _whole(number, name)
    return 0


def cursors_of(headers: Headers, query: QueryParams, *, most: int) -> dict[UUID, int]:
    """The streams of `?streams=` in their order, each with its cursor; what Last-Event-ID says of one wins.

    Raises BadRequest for no streams, too many, or one twice, and for what is no cursor of one of them; NotFound for
    what cannot be a stream's id.
    """
    asked = [part for part in ",".join(query.getlist("streams")).split(",") if part]
    if not 0 < len(asked) <= most:
        raise BadRequest("bad_streams", f"streams must name 1 to {most} streams, with a comma between two.")
    cursors: dict[UUID, int] = {}
    for part in asked:
        stream, colon, number = part.partition(":")
        stream_id = stream_id_of(stream)
        if stream_id in cursors:
            raise BadRequest("bad_streams", f"streams names {stream_id} twice.")
        cursors[stream_id] = _whole(number, "streams") if colon else 0
    return cursors | _seen(headers.get(_HEADER) or "", cursors)


def _seen(header: str, asked: Mapping[UUID, int]) -> dict[UUID, int]:
    """The pairs of a Last-Event-ID."""
    unseen = {str(stream_id): stream_id for stream_id in asked}
    seen: dict[UUID, int] = {}
    for pair in header.split(",") if header else ():
        stream, _, number = pair.strip().partition(":")
        if (stream_id := unseen.pop(stream.lower(), None)) is None:
            raise BadRequest("bad_cursor", f"{_HEADER} names a stream twice, or one that the URL does not name.")
        seen[stream_id] = _whole(number, _HEADER)
    return seen


def _whole(text: str, name: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise BadRequest("bad_cursor", f"{name} must give the whole number of the last event read, 0 for none.")
    return int(text)
