"""Where a request comes from, however many proxies it came through: only those that the settings name are believed."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TypedDict

from starlette.types import Scope

from app.errors import Misconfigured
from app.settings import Settings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# The most proxies a request is followed back through; who sends a longer list is no nearer to being believed.
_HOPS = 16


@dataclass(frozen=True, slots=True)
class Proxies:
    """Those whose word for the address before them is taken."""

    networks: tuple[Network, ...] = ()

    def trust(self, address: Address) -> bool:
        return any(address in network for network in self.networks)


class Needs(TypedDict):
    proxies: Proxies


def client_address(scope: Scope) -> str:
    """The nearest address that is no proxy of ours, normalised, without a port; empty where the peer has none.

    X-Forwarded-For is read from the right, for as long as a trusted proxy has written it: what a client made up
    stands left of that, and is never reached. A word that is no address ends the way, too: the proxy that wrote it
    is the client then. RFC 7239's `Forwarded` is not read: two headers that may differ are one too many.
    """
    peer = scope.get("client")
    address = _address(peer[0]) if peer else None
    if address is None:
        return ""
    proxies: Proxies = scope["state"]["proxies"]
    if proxies.networks:
        address = _nearest_stranger(address, proxies, scope)
    return str(address)


def _nearest_stranger(address: Address, proxies: Proxies, scope: Scope) -> Address:
    hops = _hops(scope)
    for _ in range(_HOPS):
        if not proxies.trust(address) or (before := _address(next(hops, ""))) is None:
            break
        address = before
    return address


def _hops(scope: Scope) -> Iterator[str]:
    """From the right. Several fields are one list, in their order (RFC 9110, 5.3)."""
    for name, value in reversed(scope["headers"]):
        if name == b"x-forwarded-for":
            rest = value.decode("latin-1")
            while rest:
                rest, _, last = rest.rpartition(",")
                yield last


@lru_cache(maxsize=4096)  # parsing takes 8 µs
def _address(text: str) -> Address | None:
    """Of an address with or without a port: 192.0.2.1:80, 2001:db8::1, [2001:db8::1]:80. None for anything else."""
    host = text.strip(" \t")
    if host.startswith("["):
        host, _, port = host[1:].partition("]")
        port = port[1:] if port.startswith(":") else port and "none"
    elif host.count(":") == 1:
        host, _, port = host.partition(":")
    else:
        port = ""
    # A zone is this machine's own business; two spellings of one address would be two clients.
    return None if port and not port.isdecimal() else _parsed(host.partition("%")[0])


def _parsed(host: str) -> Address | None:
    try:
        address = ip_address(host)
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def trusted_proxies(settings: Settings) -> Proxies:
    """Raises Misconfigured."""
    words = (word.strip() for word in (settings.trusted_proxies or "").split(","))
    return Proxies(tuple(_network(word) for word in words if word))


def _network(word: str) -> Network:
    try:
        network = ip_network(word)
    except ValueError as error:
        raise _refused(f"{error}.") from None
    if not network.prefixlen:
        raise _refused(f"{word} is everybody: then any client could say it is any other.")
    return network


def _refused(why: str) -> Misconfigured:
    return Misconfigured(
        "trusted_proxies",
        f"PARLEY_TRUSTED_PROXIES takes addresses and networks, like 10.0.0.5,10.1.0.0/16: {why}",
    )
