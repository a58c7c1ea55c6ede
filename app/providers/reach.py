"""Which addresses providers may have: public ones, and those of private networks that the settings name.

Asked of the address a connection is made to, not of a name: a name may lead elsewhere a moment later (DNS rebinding).
"""

import errno
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from app.errors import Misconfigured

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# Where clouds tell machines their secrets, and what only this link can reach: a larger network does not mean them.
_METADATA: tuple[Network, ...] = (
    IPv4Network("169.254.0.0/16"),
    IPv4Network("100.100.100.200/32"),
    IPv4Network("192.0.0.192/32"),
    IPv6Network("fe80::/10"),
    IPv6Network("fd00:ec2::254/128"),
)
_NAT64 = IPv6Network("64:ff9b::/96")


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
        address = _address(host)
        return address is None or self._allows(address)

    def allows_url(self, url: str) -> bool:
        host = urlsplit(url).hostname or ""
        return self.allows("127.0.0.1" if host.rstrip(".") == "localhost" else host)

    def _allows(self, address: Address) -> bool:
        named = [network for network in self.networks if address in network]
        special = next((network for network in _METADATA if address in network), None)
        if special is not None:
            return any(network.version == special.version and network.subnet_of(special) for network in named)  # type: ignore[arg-type]
        return bool(named) or (address.is_global and not address.is_multicast)


def _address(host: str) -> Address | None:
    """What is meant in the end by those that hold another one."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        if (inner := address.ipv4_mapped or address.sixtofour) is not None:
            return inner
        if address in _NAT64:
            return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _network(word: str) -> Network:
    try:
        return ip_network(word)
    except ValueError as error:
        detail = f"PARLEY_PROVIDER_NETWORKS takes networks, like 10.0.0.0/8,192.168.1.7: {error}."
        raise Misconfigured("provider_networks", detail) from None


# This machine's own addresses: a model server beside the gateway, the demo provider.
ANYWHERE_NEAR = Reach.parse("127.0.0.0/8,::1")
