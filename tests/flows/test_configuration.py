"""Looking at chatbots and replacing them over HTTP: no secret leaves, and nothing that cannot work is taken."""

import asyncio
from typing import Any

import pytest

from tests.flows.events import only, text
from tests.house import Open, flow
from tests.serving import serving

URL = "/api/conversation-config/shop"


def body(demo: str, say: str = "Hello.", **fields: Any) -> dict[str, Any]:
    return {
        "providers": {"demo": {"kind": "openai", "base_url": demo, "api_key": "env:SHOP_KEY"}},
        "chatbot": {"flows": {"main": flow(say, **fields)}},
    }


# In open mode an administrator is who asks under a loopback address.
NO_ADMIN = {"Host": "front-end.example"}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


async def test_what_a_front_end_sees_holds_no_secret(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
    async with house(allowed_hosts=NO_ADMIN["Host"]) as home:
        wanted = body(home.demo, top_k=5, system="The secret prompt.", images=True)
        wanted["chatbot"] |= {"language": "en", "allow": {"temperature": [0, 1], "languages": ["en", "de"]}}
        wanted["chatbot"]["flows"]["side"] = flow("x")
        assert (await home.client.put(URL, json=wanted)).json()["changed"] is True
        response = await home.client.get(URL, headers=NO_ADMIN)
        assert response.json().keys() == {"success", "configuration"}
        shown = response.json()["configuration"]
        assert (shown["chatbot_id"], shown["version"], shown["image_enabled"]) == ("shop", 1, True)
        assert (shown["topKSettings"], shown["language"]) == ({"main": 5}, "en")
        assert shown["flowApiKeys"] == {"main": "configured", "side": "configured"}
        assert shown["allowed"]["temperature"] == [0, 1]
        for secret in ("canary", "SHOP_KEY", "secret prompt", home.demo, "127.0.0.1"):
            assert secret not in response.text
        monkeypatch.delenv("SHOP_KEY")
        assert (await home.client.get(URL)).json()["configuration"]["flowApiKeys"]["main"] == ""
        missing = await home.client.get("/api/conversation-config/none")
        assert (missing.status_code, missing.json()["code"]) == (404, "chatbot_unknown")


async def test_a_replaced_chatbot_is_in_use_everywhere_within_a_second(
    house: Open, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
    async with house() as home, serving(database, drain_s=0) as other:
        assert (await home.client.put(URL, json=body(home.demo, "one"))).json()["version"] == 1
        _, frames = await home.ask("shop")
        assert text(frames) == "one"
        replaced = (await other.put(URL, json=body(home.demo, "two"))).json()
        assert (replaced["version"], replaced["changed"]) == (2, True)
        again = (await other.put(URL, json=body(home.demo, "two"))).json()
        assert (again["version"], again["changed"]) == (2, False)
        async with asyncio.timeout(2):
            while text((await home.ask("shop"))[1]) != "two":
                pass
        assert await home.database.fetchval("select max(chatbot_version) from streaming_sessions") == 2


async def test_an_answer_under_way_keeps_its_version(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
    async with house() as home:
        slow = body(home.demo, "one", wishes={"first_ms": 300})
        await home.client.put(URL, json=slow)
        asked = asyncio.ensure_future(home.ask("shop"))
        async with asyncio.timeout(5):
            while not await home.count("streaming_sessions"):
                pass
        await home.client.put(URL, json=body(home.demo, "two"))
        _, frames = await asked
        assert text(frames) == "one"
        assert only(frames, "stream_end")["status"] == "completed"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"chatbot": None}, "chatbots.shop: "),
        ({"chatbot": {}}, "chatbots.shop.flows: is missing"),
        ({"chatbot": {"flows": {"main": {"provider": "nobody", "model": "m"}}}}, "no provider is named 'nobody'"),
        ({"chatbot": {"flows": {"main": flow("x", system="{{nothing}}")}}}, "nothing"),
        ({"chatbot": {"flows": {"main": flow("x", template="none")}}}, "no template none"),
        ({"chatbot": {"flows": {"main": flow("x")}, "answers": ["other"]}}, "no flow named 'other'"),
        ({"providers": {"demo": {"kind": "openai", "base_url": "http://x", "api_key": "sk-1"}}}, "never the key"),
        ({"providers": [1]}, "providers"),
        ({"surprise": 1}, "surprise"),
        ({"templates": {"t": "a\0b"}}, "templates.t: holds U+0000"),
        ({"chatbot": {"flows": {"main": flow("x", parameters={"seed": 1 << 63})}}}, "is a number that is too large"),
        ({"chatbot": {"flows": {"main": flow("x", parameters={"a": nested(70)})}}}, "is nested too deeply"),
        ({"chatbot": {"flows": {"main": flow("x", parameters={"a": nested(90)})}}}, "is nested too deeply"),
    ],
)
async def test_what_cannot_work_is_refused_with_its_place(house: Open, change: dict[str, Any], told: str) -> None:
    async with house() as home:
        response = await home.client.put(URL, json=body(home.demo) | change)
        assert (response.status_code, response.json()["code"]) == (422, "configuration_invalid")
        assert told in response.json()["detail"]
        assert await home.database.fetchval("select count(*) from chatbots where id = 'shop'") == 0


async def test_i3_bodies_that_are_none(house: Open) -> None:
    async with house() as home:
        for content in (b"", b"[]", b"{", b"[" * 100_000, b'{"chatbot": 7}', b"\xff", b'{"providers": {"x": ' * 5000):
            response = await home.client.put(URL, content=content)
            assert response.status_code in (400, 422), response.text
        for name in ("a%20b", "x" * 200, "%00"):
            response = await home.client.put(f"/api/conversation-config/{name}", json=body(home.demo))
            assert response.status_code in (404, 422), response.text


async def test_what_is_there_twice_or_too_large(house: Open) -> None:
    async with house() as home:
        double = b'{"chatbot": {"flows": {"main": {"provider": "p", "model": "a", "model": "b"}}}}'
        response = await home.client.put(URL, content=double)
        assert (response.status_code, response.json()["mistakes"]) == (422, ["the member 'model' is there twice"])
        response = await home.client.put(URL, content=b" " * ((1 << 20) + 1))
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


async def test_every_mistake_is_listed(house: Open) -> None:
    async with house() as home:
        wrong = {"flows": {"main": flow("x", max_tokens=0, history="all"), "side": flow("x", provider="q")}}
        mistakes = (await home.client.put(URL, json=body(home.demo) | {"chatbot": wrong})).json()["mistakes"]
        assert [text.partition(":")[0] for text in mistakes] == [
            "chatbots.shop.flows.main.history",
            "chatbots.shop.flows.main.max_tokens",
        ]


async def test_a_front_end_that_has_it_is_told_so(house: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
    async with house() as home:
        await home.client.put(URL, json=body(home.demo))
        first = await home.client.get(URL)
        has = {"If-None-Match": first.headers["etag"]}
        again = await home.client.get(URL, headers=has)
        assert (again.status_code, again.content) == (304, b"")
        monkeypatch.delenv("SHOP_KEY")
        assert (await home.client.get(URL, headers=has)).status_code == 200
        monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
        await home.client.put(URL, json=body(home.demo, "other"))
        async with asyncio.timeout(5):
            while (await home.client.get(URL, headers=has)).status_code != 200:
                await asyncio.sleep(0.02)


async def test_replaced_by_many_at_once_each_is_a_version(house: Open, database: str) -> None:
    async with house() as home, serving(database, drain_s=0) as other:
        texts = [f"say {number}" for number in range(12)]
        clients = [home.client, other] * 6
        puts = [client.put(URL, json=body(home.demo, text)) for client, text in zip(clients, texts, strict=True)]
        answers = [(await put).json() for put in asyncio.as_completed(puts)]
        assert sorted(answer["version"] for answer in answers) == [*range(1, 13)]
        assert all(answer["changed"] for answer in answers)


async def test_an_admin_sees_a_definition_that_put_takes_back_unchanged(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOP_KEY", "sk-canary-1234567890")
    async with house(allowed_hosts=NO_ADMIN["Host"]) as home:
        wanted = body(home.demo, template="brief", max_tokens=50)
        wanted["templates"] = {"brief": "Answer {{message}} in one sentence."}
        wanted["chatbot"]["allow"] = {"languages": ["en", "de"]}
        made = await home.client.put(URL, json=wanted)
        assert made.status_code == 200, made.text
        response = await home.client.get(URL)
        definition = response.json()["definition"]
        assert definition["providers"]["demo"] == {"kind": "openai", "base_url": home.demo, "api_key": "env:SHOP_KEY"}
        assert definition["templates"] == wanted["templates"]
        assert definition["chatbot"]["flows"]["main"]["template"] == "brief"
        assert "canary" not in response.text
        again = await home.client.put(URL, json=definition)
        assert (again.json()["version"], again.json()["changed"]) == (1, False)
        other = await home.client.get(URL, headers={**NO_ADMIN, "If-None-Match": response.headers["etag"]})
        assert (other.status_code, "definition" in other.json()) == (200, False)
        assert "authorization" in other.headers["vary"].lower()


async def test_a_page_that_was_pointed_at_this_machine_replaces_nothing(house: Open) -> None:
    async with house() as home:
        for host in ("rebound.example", "127.0.0.1.rebound.example", "", "[::1", "10.0.0.1:8080"):
            response = await home.client.put(URL, json=body(home.demo), headers={"Host": host})
            assert (response.status_code, response.json()["code"]) == (403, "host_unknown")
