"""Which addresses providers may have: public ones, and those of private networks that the settings name.

Asked of the address a connection is made to, not of a name: a name may lead elsewhere a moment later (DNS rebinding).
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from app.errors import Misconfigured

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Where clouds tell machines their secrets, and what only this link can reach: a larger network does not mean them.
_METADATA: tuple[Network, ...] = (
    IPv4Network("169.254.0.0/16"),
    IPv4Network("100.100.100.200/32"),  # Alibaba
    IPv4Network("168.63.129.16/32"),  # Azure
    IPv4Network("192.0.0.192/32"),  # Oracle
    IPv6Network("fe80::/10"),
    IPv6Network("fec0::/10"),
    IPv6Network("fd00:ec2::/32"),  # Amazon
    IPv6Network("fd20:ce::/32"),  # Google
    IPv6Network("64:ff9b:1::/48"),  # a local NAT64: where in it an IPv4 address is, only its operator knows (RFC 8215)
)
_LOOPBACK = IPv6Address("::1")
# All that was ever given out of IPv6. Python takes whatever it does not know for public.
_GIVEN_OUT = IPv6Network("2000::/3")
# Not public, though older releases of Python say so.
_SPECIAL: tuple[Network, ...] = (
    IPv4Network("192.0.0.0/24"),
    IPv4Network("192.88.99.0/24"),
    IPv6Network("3fff::/20"),
)
# Their last 32 bits are the IPv4 address that is meant: mapped (RFC 4291), by a NAT64 (RFC 6052).
_MEAN_IPV4 = (IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96"))
# So they were once: IPv4-compatible (RFC 4291), IPv4-translated (RFC 2765). Nothing public is there.
_MEANT_IPV4 = (IPv6Network("::/96"), IPv6Network("::ffff:0:0:0/96"))


class OutOfReach(OSError):
    """A connection that was not made."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "its address is in a private network, which PARLEY_PROVIDER_NETWORKS lacks")


@dataclass(frozen=True, slots=True)
class Reach:
    """`networks`: the private ones."""

    networks: tuple[Network, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Reach":
        """Networks with a comma between two. Raises Misconfigured."""
        words = (word.strip() for word in text.split(","))
        return cls(tuple(_network(word) for word in words if word and word != "none"))

    def allows(self, host: str) -> bool:
        """Of an address. A name is allowed: what it leads to is asked when it is known."""
        return all(self._allows(address) for address in _meant(host))

    def allows_url(self, url: str) -> bool:
        host = urlsplit(url).hostname or ""
        return self.allows("127.0.0.1" if host.rstrip(".") == "localhost" else host)

    def _allows(self, address: Address) -> bool:
        named = [network for network in self.networks if address in network]
        special = next((network for network in _METADATA if address in network), None)
        if special is not None:
            return any(network.version == special.version and network.subnet_of(special) for network in named)  # type: ignore[arg-type]
        return bool(named) or _is_public(address)


def _is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address) and address not in _GIVEN_OUT:
        return False
    return address.is_global and not address.is_multicast and not any(address in network for network in _SPECIAL)


def _meant(host: str) -> Sequence[Address]:
    """Where a connection to it may lead in the end; nothing for a name."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return ()
    if isinstance(address, IPv4Address) or address == _LOOPBACK:
        return (address,)
    last = IPv4Address(int(address) & 0xFFFF_FFFF)
    if any(address in network for network in _MEAN_IPV4):
        return (last,)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return (address, *address.teredo)
    return (address, last) if any(address in network for network in _MEANT_IPV4) else (address,)


def _network(word: str) -> Network:
    try:
        return ip_network(word)
    except ValueError as error:
        detail = f"PARLEY_PROVIDER_NETWORKS takes networks, like 10.0.0.0/8,192.168.1.7: {error}."
        raise Misconfigured("provider_networks", detail) from None


# This machine's own addresses: a model server beside the gateway, the demo provider.
ANYWHERE_NEAR = Reach.parse("127.0.0.0/8,::1")
