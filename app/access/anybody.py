"""Open mode, in which nobody is asked who they are: under which names of the server, and for which web pages.

A web page whose name was pointed at this machine (DNS rebinding) is to its browser the server's own. What gives it away
is that name, which the browser sends as `Host`.
"""

import ipaddress
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from app.access.origins import origins
from app.access.principal import SCOPES, Principal
from app.errors import Forbidden, Misconfigured
from app.settings import Settings

Headers = Iterable[tuple[bytes, bytes]]

_ANYBODY = Principal("open", "open", frozenset(SCOPES) - {"admin"})
_ADMIN = Principal("open", "open", frozenset(SCOPES))
# Of a Host header that has more than a name and a port nobody can say what it names.
_ELSE = re.compile(r"[^A-Za-z0-9._:\[\]-]")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*")


@dataclass(frozen=True, slots=True)
class Anybody:
    """`local`: the server listens on its own machine only. `exposed`: something in front of it asks. `hosts`: names
    beside this machine's own. `pages`: origins of web pages that may ask it.
    """

    local: bool = True
    exposed: bool = False
    hosts: Collection[str] = ()
    pages: Collection[str] = ()

    def principal(self, headers: Headers) -> Principal:
        """Raises Forbidden for a name that is not the server's, and for a page from elsewhere."""
        host, origin = _first(headers, b"host"), _first(headers, b"origin")
        name = _name(host)
        near = _is_near(name)
        any_name = self.exposed and not self.hosts
        if not (near or any_name or name in self.hosts):
            raise Forbidden(
                "host_unknown",
                "Without authentication this server is asked under a name of its own machine only, like 127.0.0.1 or "
                "localhost; PARLEY_ALLOWED_HOSTS names others.",
            )
        if self.local and origin:
            self._require_near(origin, host)
        return _ADMIN if near and self.local and not self.exposed else _ANYBODY

    def _require_near(self, origin: str, host: str) -> None:
        """Any page that a browser shows can send a message to its own machine, if not read the answer."""
        if origin not in self.pages and origin.partition("://")[2] != host and not _is_near(_hostname(origin)):
            raise Forbidden(
                "origin_unknown",
                "Without authentication only web pages of this machine may ask; PARLEY_CORS_ORIGINS names others.",
            )


ANYBODY_HERE = Anybody()


def anybody(settings: Settings) -> Anybody:
    """As the settings say. Raises Misconfigured."""
    local = is_loopback(settings.host)
    return Anybody(local, settings.open_anywhere, allowed_hosts(settings), origins(settings))


def _first(headers: Headers, name: bytes) -> str:
    return next((value for given, value in headers if given == name), b"").decode("latin-1")


def _name(host: str) -> str:
    """Of a Host header, as `allowed_hosts` writes it; empty for what is none."""
    return "" if _ELSE.search(host) else _hostname(f"//{host}").rstrip(".")


def _hostname(url: str) -> str:
    """The name of the host in it, in small letters, empty where there is none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_near(name: str) -> bool:
    # Browsers take these for this machine and ask no name server (RFC 6761, 6.3).
    return is_loopback(name) or name.endswith(".localhost")


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Names as `Host` says them, without ports. Raises Misconfigured."""
    words = (word.strip() for word in (settings.allowed_hosts or "").split(","))
    return frozenset(_allowed(word) for word in words if word)


def _allowed(word: str) -> str:
    name = word.lower().rstrip(".")
    try:
        return str(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        if _NAME.fullmatch(name):
            return name
    raise Misconfigured(
        "allowed_hosts",
        "PARLEY_ALLOWED_HOSTS takes names and addresses, like chat.example.org,192.0.2.7, without a scheme, a port "
        f"or a star: {word[:100]!r} is none.",
    )
