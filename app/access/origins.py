"""Which web pages may ask from a browser: those of the origins that the settings name (CORS), and nobody's else."""

from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from app.errors import Misconfigured
from app.settings import Settings

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
_ASKED = (
    "Authorization",
    "Cache-Control",
    "Idempotency-Key",
    "If-None-Match",
    "Last-Event-ID",
    "X-API-Key",
    "X-Request-Id",
)
_SHOWN = (
    "ETag",
    "Idempotent-Replayed",
    "Location",
    "RateLimit",
    "RateLimit-Limit",
    "RateLimit-Policy",
    "RateLimit-Remaining",
    "RateLimit-Reset",
    "Retry-After",
    "WWW-Authenticate",
    "X-Request-Id",
)
# How long a browser remembers what it was told, in seconds.
_REMEMBERED_S = 600
_PORTS = {"http": 80, "https": 443}


def origins(settings: Settings) -> frozenset[str]:
    """As browsers write them. Raises Misconfigured."""
    words = (word.strip() for word in (settings.cors_origins or "").split(","))
    return frozenset(_origin(word) for word in words if word)


def _origin(word: str) -> str:
    try:
        parts = urlsplit(word)
        port = parts.port
    except ValueError:
        raise _refused(word) from None
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host
    named = f"{parts.scheme}://{name}" + (f":{port}" if port and port != _PORTS.get(parts.scheme) else "")
    # Browsers write a host in ASCII and small letters: another spelling would never be met.
    if (
        parts.scheme not in _PORTS
        or not host
        or not host.isascii()
        or "*" in host
        or word not in (named, f"{named}:{port}")
    ):
        raise _refused(word)
    return named


def _refused(word: str) -> Misconfigured:
    return Misconfigured(
        "cors_origins",
        "PARLEY_CORS_ORIGINS takes origins as a browser writes them, like https://chat.example.org,"
        f"http://localhost:3000, each by its name and none with a path or a star: {word[:100]!r} is none.",
    )


def cors(app: ASGIApp, settings: Settings) -> ASGIApp:
    """The app behind the answers that browsers want, failures included; without origins the app itself.

    Cookies play no part: who asks is in a header that only the page itself can set.
    """
    if not (allowed := origins(settings)):
        return app
    return CORSMiddleware(
        app,
        allow_origins=allowed,
        allow_methods=_METHODS,
        allow_headers=_ASKED,
        expose_headers=_SHOWN,
        allow_private_network=True,  # who names an origin means its pages, from wherever they were loaded
        max_age=_REMEMBERED_S,
    )
