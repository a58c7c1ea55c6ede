"""Which addresses providers may have: however they are written or resolved, no private one that was not named."""

import socket
from ipaddress import ip_address
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.demo.server import demo_provider
from app.errors import Misconfigured
from app.flows.file import parse, require_reachable
from app.providers.aio import AioHTTPTransport, unreachable_because
from app.providers.openai import OpenAI
from app.providers.provider import ProviderError
from app.providers.reach import ANYWHERE_NEAR, OutOfReach, Reach
from tests.access.test_guard import bearer, key_with
from tests.providers.answers import prompt
from tests.serving import serving

_PRIVATE = Reach.parse("10.0.0.0/8, fd12::/16")


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "192.168.0.1",
        "192.0.0.192",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.0.8",
        "192.88.99.1",
        "::",
        "::1",
        "::10.0.0.1",
        "::8.8.8.8",
        "::ffff:0:10.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:10.0.0.1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2002:a83f:8110::1",
        "2001:0:808:808::f7f7:f7f7",
        "2001:0:808:808::f5ff:fffe",
        "2001:db8::1",
        "3fff::1",
        "4000::1",
        "5f00::1",
        "64:ff9b::a83f:8110",
        "64:ff9b:1::808:808",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
    ],
)
def test_without_a_network_only_public_addresses_are_reached(address: str) -> None:
    assert not Reach().allows(address)
    host = f"[{address}]" if ":" in address else address
    assert not Reach().allows_url(f"http://{host}:8080/v1")


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses_are_reached(address: str) -> None:
    assert Reach().allows(address)


@pytest.mark.parametrize(
    ("networks", "address", "allowed"),
    [
        ("10.0.0.0/8", "10.9.9.9", True),
        ("10.0.0.0/8", "::ffff:10.9.9.9", True),
        ("10.0.0.0/8", "192.168.0.1", False),
        ("0.0.0.0/0,::/0", "192.168.0.1", True),
        ("0.0.0.0/0,::/0", "169.254.169.254", False),
        ("0.0.0.0/0,::/0", "::ffff:169.254.169.254", False),
        ("168.63.0.0/16", "168.63.129.16", False),
        ("168.63.129.16", "168.63.129.16", True),
        ("0.0.0.0/0,::/0", "::169.254.169.254", False),
        ("0.0.0.0/0,::/0", "::ffff:0:169.254.169.254", False),
        ("0.0.0.0/0,::/0", "2002:a83f:8110::1", False),
        ("0.0.0.0/0,::/0", "2001:0:808:808::5601:5601", False),
        ("0.0.0.0/0,::/0", "2001:0:808:808::f7f7:f7f7", True),
        ("::/0", "2001:0:808:808::f5ff:fffe", False),
        ("::/0", "::10.0.0.1", False),
        ("::/0", "64:ff9b:1::a9fe:a9fe", False),
        ("64:ff9b:1:7::/96", "64:ff9b:1:7::808:808", True),
        ("::/0", "fec0::1", False),
        ("fc00::/7", "fd20:ce::254", False),
        ("fd20:ce::254", "fd20:ce::254", True),
        ("fd00::/8", "fd00:ec2::23", False),
        ("fd00::/8", "fd00:ec2::254", False),
        ("fd00:ec2::254", "fd00:ec2::254", True),
        ("169.254.0.0/16", "169.254.169.254", True),
        ("169.254.10.0/24", "169.254.169.254", False),
        ("none", "127.0.0.1", False),
        ("127.0.0.0/8,::1", "127.0.0.1", True),
    ],
)
def test_a_named_network_is_reached_but_only_by_its_own_name_where_clouds_keep_secrets(
    networks: str, address: str, allowed: bool
) -> None:
    assert Reach.parse(networks).allows(address) is allowed


@given(st.ip_addresses())
def test_what_is_reached_is_public_or_named(address: Any) -> None:
    if _PRIVATE.allows(str(address)):
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        assert inner.is_global or any(inner in network for network in _PRIVATE.networks)
        assert not inner.is_loopback
        assert not inner.is_link_local


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "everything", "*", "10.0.0.0/8;"])
def test_what_is_no_network_stops_the_start(wrong: str) -> None:
    with pytest.raises(Misconfigured, match="PARLEY_PROVIDER_NETWORKS"):
        Reach.parse(wrong)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "provider.example"])
async def test_no_connection_is_made_to_an_address_out_of_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it was found: written in the URL, or by a name server that changed its mind."""

    def resolved(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    async with demo_provider() as url:
        asked = url.replace("127.0.0.1", name)
        for reach, reached in ((Reach(), False), (ANYWHERE_NEAR, True)):
            client = httpx2.AsyncClient(transport=AioHTTPTransport(reach=reach), trust_env=False)
            async with client:
                if reached:
                    assert (await client.get(f"{asked}/models")).status_code < 500
                    continue
                with pytest.raises(httpx2.ConnectError) as caught:
                    await client.get(f"{asked}/models")
                assert "PARLEY_PROVIDER_NETWORKS" in unreachable_because(caught.value)
                assert isinstance(caught.value.__cause__.__cause__, OutOfReach)  # type: ignore[union-attr]


async def test_an_answer_says_why_its_provider_was_not_asked() -> None:
    provider = OpenAI("inner", "http://169.254.169.254/latest")
    try:
        with pytest.raises(ProviderError, match="PARLEY_PROVIDER_NETWORKS") as caught:
            await anext(provider.stream(prompt("demo")))
        assert "169.254" not in caught.value.detail
    finally:
        await provider.aclose()


def test_an_address_in_a_file_is_checked_with_its_line() -> None:
    file = parse(
        "providers:\n  inner: {kind: openai, base_url: 'http://10.1.2.3/v1'}\n"
        "  named: {kind: openai, base_url: env:X}\n"
        "chatbots:\n  a: {flows: {main: {provider: inner, model: x}, next: {provider: named, model: x}}}\n"
    )
    with pytest.raises(Misconfigured, match=r"line 2.*PARLEY_PROVIDER_NETWORKS"):
        require_reachable(file, ANYWHERE_NEAR)
    require_reachable(file, _PRIVATE)


async def test_an_administrator_over_the_network_reaches_no_further(database: str) -> None:
    async with serving(database, auth="keys", drain_s=0) as client:
        admin = bearer(await key_with(database, "admin"))
        for host in ("169.254.169.254", "10.0.0.1", "[::ffff:a9fe:a9fe]"):
            definition = {
                "providers": {"inner": {"kind": "openai", "base_url": f"http://{host}/v1"}},
                "chatbot": {"flows": {"main": {"provider": "inner", "model": "x"}}},
            }
            answer = await client.put("/api/conversation-config/x", json=definition, headers=admin)
            assert (answer.status_code, answer.json()["code"]) == (422, "configuration_invalid")
            assert "PARLEY_PROVIDER_NETWORKS" in answer.json()["mistakes"][0]
        user = bearer(await key_with(database, "process", "read"))
        refused = await client.put("/api/conversation-config/x", json=definition, headers=user)
        assert refused.status_code == 403


def test_the_addresses_tried_are_what_they_look_like() -> None:
    assert ip_address("64:ff9b::a9fe:a9fe").is_global  # to Python, and so to whoever asks nothing else
