"""Where failures become answers, and only here: `application/problem+json` (RFC 9457), each noted in the journal."""

from collections.abc import Awaitable, Callable, Mapping
from math import ceil
from typing import Any, TypedDict

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from app.access.limits import headers_of
from app.access.principal import Principal
from app.access.rates import Rate
from app.errors import BadRequest, NotFound, ParleyError, TooSlow, Unavailable, to_problem
from app.journal import About, Journal
from app.postgres import AWAY, CONFLICT, why
from app.settings import Settings
from app.streams.sse import come_back_later
from app.telemetry import request_id

log = structlog.get_logger(__name__)

_CHALLENGE = 'Bearer realm="parley"'
# How much of a path an error row holds.
_LONGEST_PATH = 300
# Error rows of each principal in a minute; beyond it its errors are only counted.
ROWS = 120


class Needs(TypedDict):
    journal: Journal
    error_rows: Rate
    settings: Settings


class _MethodNotAllowed(ParleyError):
    status = 405
    title = "Method not allowed"


async def answer(request: Request[Any], error: Exception) -> Response:
    """The response for any failure of a route."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)
    if isinstance(error, HTTPException) and error.status_code == 405 and request.method == "OPTIONS":
        return Response(status_code=204, headers=error.headers)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    told = _translate(error)
    if (isinstance(told, Unavailable) or told.code == "rate_limited") and _follows_events(request):
        # Browsers give up for ever on a 429 or 503 to an EventSource (G14).
        wait_ms = 0 if isinstance(told, Unavailable) else ceil((told.retry_after or 0) * 1000)
        return come_back_later(max(wait_ms, request.state["settings"].sse_retry_ms))
    return _respond(request, told, headers, cause=error)


async def answer_crash(request: Request[Any], error: Exception) -> Response:
    """As `answer`; Starlette asks outside of all middleware, where nobody else names the request any more."""
    given = request_id(request.scope) or ""
    with structlog.contextvars.bound_contextvars(request_id=given):
        response = await answer(request, error)
    response.headers["X-Request-Id"] = given
    # uvicorn closes it, as Starlette raises the error again; who is not told sends the next request into the void.
    response.headers["Connection"] = "close"
    return response


def _follows_events(request: Request[Any]) -> bool:
    return request.method == "GET" and "text/event-stream" in request.headers.get("accept", "")


def _translate(error: Exception) -> ParleyError:
    match error:
        case ParleyError():
            return error
        case HTTPException():
            return _of_http(error)
        case _ if isinstance(error, CONFLICT):
            return Unavailable("database_busy", "Others hold the rows this needs; try again.", retry_after=1)
        case _ if isinstance(error, AWAY):
            return Unavailable("database_unavailable", f"The database is away: {why(error)}", retry_after=2)
        case _:
            log.error("request_crashed", exc_info=error)
            return ParleyError("internal_error", "Something went wrong here; the error_id names it.")


def _of_http(error: HTTPException) -> ParleyError:
    match error.status_code:
        case 404:
            return NotFound("route_unknown", "There is nothing at this path; /docs lists what there is.")
        case 405:
            return _MethodNotAllowed("method_not_allowed", "This path does not take that method.")
        case _:
            return BadRequest("bad_request", "The request could not be understood.")


def _respond(request: Request[Any], error: ParleyError, headers: dict[str, str], *, cause: Exception) -> Response:
    error_id = _noted(request, error, cause=cause)
    headers |= headers_of(request.scope)
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, ceil(error.retry_after)))
    if challenge := _challenge(error):
        headers["WWW-Authenticate"] = challenge
    if isinstance(error, TooSlow):
        # The rest of the request may still be on its way; nobody waits for it (RFC 9110, 15.5.9).
        headers["Connection"] = "close"
    body = orjson.dumps(to_problem(error, error_id))
    return Response(body, error.status, {**headers, "Cache-Control": "no-store"}, "application/problem+json")


def _noted(request: Request[Any], error: ParleyError, *, cause: Exception) -> str:
    """The id of an error. It has a row where an operator can do something about it: where it is a bug, or happened to
    somebody who was let in. A stranger, who may ask anything any number of times, fills no table, and neither does
    whoever is told to ask less often.
    """
    journal: Journal = request.state["journal"]
    principal: Principal | None = request.scope.get("principal")
    if error.status != 500 and (principal is None or error.status == 429):
        return journal.count(error.code)
    who = principal.id if principal else ""
    rows: Rate = request.state["error_rows"]
    # Bugs apart, so that no number of other errors keeps one from being told.
    if rows.take(f"bug {who}" if error.status == 500 else who).wait_s:
        return journal.drop(error.code)
    context = {
        "method": request.method,
        "path": request.url.path[:_LONGEST_PATH],
        **({"principal": who} if who else {}),
    }
    about = About(request_id=request_id(request.scope), context=context)
    stack_of = cause if error.status >= 500 else None
    return journal.record(error.code, error.detail, about=about, error=stack_of, category="REQUEST_ERROR")


def _challenge(error: ParleyError) -> str | None:
    """RFC 6750, 3."""
    match error.code:
        case "credentials_missing":
            return _CHALLENGE
        case "credentials_invalid" | "token_invalid" | "token_expired":
            return f'{_CHALLENGE}, error="invalid_token"'
        case "scope_missing":
            return f'{_CHALLENGE}, error="insufficient_scope", scope="{error.extra["scope"]}"'
    return None


Handler = Callable[[Request[Any], Exception], Awaitable[Response]]

HANDLERS: Mapping[Any, Handler] = {
    **dict.fromkeys((ParleyError, HTTPException, ClientDisconnect, *AWAY, *CONFLICT), answer),
    Exception: answer_crash,
}
