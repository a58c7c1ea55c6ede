"""The error tree: every failure a client can see has a stable code, a status and a sentence that says what to do.

`to_problem` in this module is the one place where errors become `application/problem+json` (RFC 9457).
"""

from typing import Any, ClassVar


class ParleyError(Exception):
    """The root. `code` is stable and listed in docs/errors.md; `detail` is safe to show to a client.

    `retry_after` is in seconds and becomes the Retry-After header; `extra` adds members to the problem document.
    """

    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(self, code: str, detail: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail
        self.retry_after = retry_after
        self.extra = extra


class BadRequest(ParleyError):
    status = 400
    title = "Bad request"


class Unauthorized(ParleyError):
    """Nobody known; the answer says in WWW-Authenticate how to become somebody."""

    status = 401
    title = "Unauthorized"


class Forbidden(ParleyError):
    status = 403
    title = "Forbidden"


class NotFound(ParleyError):
    status = 404
    title = "Not found"


class TooSlow(ParleyError):
    status = 408
    title = "Request timeout"


class Conflict(ParleyError):
    status = 409
    title = "Conflict"


class Gone(ParleyError):
    status = 410
    title = "Gone"


class TooLarge(ParleyError):
    status = 413
    title = "Content too large"


class Invalid(ParleyError):
    status = 422
    title = "Unprocessable content"


class TooMany(ParleyError):
    status = 429
    title = "Too many requests"


class HeadTooLarge(ParleyError):
    status = 431
    title = "Request header fields too large"


class UpstreamFailed(ParleyError):
    status = 502
    title = "Bad gateway"


class Unavailable(ParleyError):
    status = 503
    title = "Service unavailable"


class Misconfigured(ParleyError):
    """The operator has to change something; commands print `detail` and exit with 2."""

    title = "Misconfigured"


def to_problem(error: ParleyError, error_id: str) -> dict[str, Any]:
    """The problem document of wire.md; `error_id` finds the row in `error_logs`."""
    return {
        "type": f"urn:parley:error:{error.code}",
        "title": error.title,
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        "error_id": error_id,
        "success": False,
        **error.extra,
    }
