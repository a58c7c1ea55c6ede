"""Where a request comes from: what a client writes of itself is never believed, what a trusted proxy writes is."""

from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from app.access.client import Proxies, client_address, trusted_proxies
from app.errors import Misconfigured
from app.server import serving
from app.settings import load
from tests.serving import client_of

_TRUSTED = trusted_proxies(load(trusted_proxies="10.0.0.0/8, 2001:db8::/32"))


def _scope(peer: str | None, *forwarded: str, proxies: Proxies = _TRUSTED) -> dict[str, Any]:
    headers = [(b"host", b"x"), *((b"x-forwarded-for", value.encode("latin-1", "replace")) for value in forwarded)]
    return {"client": peer and (peer, 1), "headers": headers, "state": {"proxies": proxies}}


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("192.0.2.1", [], "192.0.2.1"),
        ("192.0.2.1", ["198.51.100.1"], "192.0.2.1"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["1.1.1.1", "198.51.100.1 ,10.0.0.2"], "198.51.100.1"),
        ("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("10.0.0.1", ["[2001:db9::1]:4711"], "2001:db9::1"),
        ("10.0.0.1", ["[2001:DB9:0::1]"], "2001:db9::1"),
        ("10.0.0.1", ["2001:db9::1"], "2001:db9::1"),
        ("2001:db8::7", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, "], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1:x"], "10.0.0.1"),
        ("10.0.0.1", ["[2001:db9::1]x"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, unix:, 10.0.0.2"], "10.0.0.2"),
        ("fe80::1%eth0", [], "fe80::1"),
        (None, ["198.51.100.1"], ""),
        ("", ["198.51.100.1"], ""),
    ],
)
def test_the_client_is_the_nearest_that_is_no_proxy_of_ours(
    peer: str | None, forwarded: list[str], client: str
) -> None:
    assert client_address(_scope(peer, *forwarded)) == client


def test_without_trusted_proxies_the_peer_is_the_client() -> None:
    assert client_address(_scope("127.0.0.1", "198.51.100.1", proxies=Proxies())) == "127.0.0.1"


@given(st.lists(st.text(max_size=30) | st.ip_addresses().map(str), max_size=5), st.ip_addresses(), st.booleans())
def test_nothing_that_a_client_writes_changes_its_address(lies: list[str], client: Any, twice: bool) -> None:
    stranger = str(client) if not _TRUSTED.trust(client) and not getattr(client, "ipv4_mapped", None) else "192.0.2.1"
    assert client_address(_scope(stranger, *lies)) == stranger
    path = [*lies, stranger, "10.0.0.2"]
    assert client_address(_scope("10.0.0.1", *(path if twice else [",".join(path)]))) == stranger


@given(st.none() | st.text(max_size=20), st.lists(st.text(max_size=80), max_size=5))
def test_whatever_comes_the_answer_is_an_address_or_nothing(peer: str | None, forwarded: list[str]) -> None:
    found = client_address(_scope(peer, *forwarded))
    assert found == "" or str(ip_address(found)) == found


def test_a_list_of_many_proxies_is_followed_for_a_bounded_way() -> None:
    everybody = ",".join(f"10.1.{n // 256}.{n % 256}" for n in range(5000))
    assert client_address(_scope("10.0.0.1", f"198.51.100.1,{everybody}")) == "10.1.19.120"


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "proxy", "*", "0.0.0.0/0", "::/0", "10.0.0.1;10.0.0.2", "10.0.0.300"])
def test_what_is_no_network_or_all_of_them_stops_the_start(wrong: str) -> None:
    with pytest.raises(Misconfigured) as caught:
        trusted_proxies(load(trusted_proxies=f"10.0.0.0/8,{wrong}"))
    assert "PARLEY_TRUSTED_PROXIES" in caught.value.detail
    assert wrong.split(";")[0] in caught.value.detail


async def test_the_server_leaves_it_to_us_whom_to_believe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "*")
    trusting = Proxies((ip_network("127.0.0.1/32"),))
    said = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        answer: Response = PlainTextResponse(Request(scope).client.host)  # type: ignore[union-attr]
        said.append(client_address({**scope, "state": {"proxies": trusting}}))
        await answer(scope, receive, send)

    headers = {"X-Forwarded-For": "198.51.100.1", "X-Forwarded-Proto": "https"}
    async with serving(app, "127.0.0.1", 0) as url, client_of(url) as client:
        assert (await client.get("/", headers=headers)).text == "127.0.0.1"
    assert said == ["198.51.100.1"]
