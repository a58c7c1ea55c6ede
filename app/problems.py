"""Where failures become answers, and only here: `application/problem+json` (RFC 9457), each noted in the journal."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypedDict

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app.errors import BadRequest, NotFound, ParleyError, TooLarge, Unavailable, to_problem
from app.journal import Journal
from app.postgres import AWAY, why
from app.telemetry import request_id

log = structlog.get_logger(__name__)


class Needs(TypedDict):
    journal: Journal


class _MethodNotAllowed(ParleyError):
    status = 405
    title = "Method not allowed"


def _of_http(error: HTTPException) -> ParleyError:
    match error.status_code:
        case 404:
            return NotFound("route_unknown", "There is nothing at this path; /docs lists what there is.")
        case 405:
            return _MethodNotAllowed("method_not_allowed", "This path does not take that method.")
        case 413:
            return TooLarge("body_too_large", "The request body is larger than this route takes.")
        case _:
            return BadRequest("bad_request", "The request could not be understood.")


async def answer(request: Request[Any], error: Exception) -> Response:
    """The response for any failure of a route."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if isinstance(error, HTTPException) and error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    return _respond(request, _translate(error), headers)


def _translate(error: Exception) -> ParleyError:
    match error:
        case ParleyError():
            return error
        case HTTPException():
            return _of_http(error)
        case _ if isinstance(error, AWAY):
            return Unavailable("database_unavailable", f"The database is away: {why(error)}", retry_after=2)
        case _:
            log.error("request_crashed", exc_info=error)
            return ParleyError("internal_error", "Something went wrong here; the error_id names it.")


def _respond(request: Request[Any], error: ParleyError, headers: dict[str, str]) -> Response:
    journal: Journal = request.state["journal"]
    error_id = journal.record(error.code, error.detail, request_id=request_id(request.scope), category="REQUEST_ERROR")
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, round(error.retry_after)))
    body = orjson.dumps(to_problem(error, error_id))
    return Response(body, error.status, {**headers, "Cache-Control": "no-store"}, "application/problem+json")


Handler = Callable[[Request[Any], Exception], Awaitable[Response]]

HANDLERS: Mapping[Any, Handler] = dict.fromkeys(
    (ParleyError, HTTPException, ClientDisconnect, *AWAY, Exception), answer
)
