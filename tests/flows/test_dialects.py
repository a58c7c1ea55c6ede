"""One answer over several dialects: a provider breaks in mid stream, and one that speaks otherwise takes over."""

import asyncio
from typing import Any

import yaml

from app.flows import chatbots, file
from tests.flows.events import only, text
from tests.house import House, Open
from tests.serving import client_of

CHATBOT = {
    "flows": {
        "main": {
            "provider": "one",
            "model": "demo?delay_ms=0&fault=reset&after=3",
            "system": "Be brief.",
            "parameters": {"temperature": 0.5},
            "fallbacks": [{"provider": "other", "model": "demo?delay_ms=0&say=Here+I+am.&key=other"}],
        },
        "mood": {"provider": "other", "model": 'demo?delay_ms=0&say={"mood":"glad"}', "output": "json"},
    }
}


async def asked_of(home: House, key: str) -> dict[str, object]:
    root = home.demo.removesuffix("/v1")
    async with client_of() as client:
        answer = await client.get(f"{root}/demo/requests", params={"key": key, "wait": "1"})
    [record] = answer.json()["requests"]
    body: dict[str, object] = record["body"]
    return body


async def test_anthropic_takes_over_from_openai_and_answers_in_json(house: Open) -> None:
    async with house(provider_retries=0) as home:
        providers = {
            "one": {"kind": "openai", "base_url": home.demo},
            "other": {"kind": "anthropic", "base_url": home.demo},
        }
        wanted = file.parse(yaml.safe_dump({"providers": providers, "chatbots": {"shop": CHATBOT}}))
        await chatbots.apply(home.database, wanted)
        _, frames = await home.ask("shop")
        assert text(frames, "main") == "Here I am."
        assert only(frames, "flow_restart")["flow"] == "main"
        assert only(frames, "flow_output")["output"] == {"mood": "glad"}
        assert only(frames, "stream_end")["status"] == "completed"
        assert only(frames, "flow_end", "main")["usage"]["completion_tokens"] == 3
        asked = await asked_of(home, "other")
        assert (asked["system"], asked["messages"]) == ("Be brief.", [{"role": "user", "content": "Hello"}])


FLOW = {
    "provider": "flowise",
    "model": "demo?delay_ms=0&say=Here+I+am.&key=asked",
    "system": "Be brief.",
    "history": 0,
    "top_k": 3,
}


async def test_flowise_is_told_what_to_retrieve_and_nothing_of_the_history(house: Open) -> None:
    async with house() as home:
        await apply_flowise(home, FLOW)
        for _ in range(2):
            _, frames = await home.ask("shop", session_id="chat")
        assert (text(frames, "main"), only(frames, "stream_end")["status"]) == ("Here I am.", "completed")
        _, again = await recorded(home, "asked")
        assert (again["body"]["question"], again["body"]["history"]) == ("Hello", [])
        overrides = again["body"]["overrideConfig"]
        assert {name: overrides[name] for name in ("systemMessage", "topK")} == {
            "systemMessage": "Be brief.",
            "topK": 3,
        }


async def test_g19_flowise_remembers_for_each_user_apart(house: Open) -> None:
    async with house() as home:
        await apply_flowise(home, FLOW)
        for user, session in (("ann", "chat"), ("ann", "chat"), ("ann", "other"), ("bob", "chat")):
            await home.ask("shop", user_id=user, session_id=session)
        sessions = [record["body"]["overrideConfig"]["sessionId"] for record in await recorded(home, "asked")]
        assert sessions[0] == sessions[1]
        assert len(set(sessions)) == 3


async def test_stopping_an_answer_aborts_it_at_flowise(house: Open) -> None:
    async with house() as home:
        await apply_flowise(home, FLOW | {"model": "demo?tokens=5000&delay_ms=10&key=endless"})
        answer = (await home.post("shop")).json()
        [asked] = await recorded(home, "endless")
        stopped = await home.client.post(f"{answer['streaming_url']}/cancel", json={})
        assert stopped.json()["upstream_closed"] is True
        aborts = await recorded(home, "abort:endless")
        assert aborts[0]["body"]["chatId"] == asked["body"]["chatId"]


async def apply_flowise(home: House, flow: dict[str, object]) -> None:
    providers = {"flowise": {"kind": "flowise", "base_url": home.demo.removesuffix("/v1")}}
    chatbots_wanted = {"shop": {"flows": {"main": flow}}}
    wanted = file.parse(yaml.safe_dump({"providers": providers, "chatbots": chatbots_wanted}))
    await chatbots.apply(home.database, wanted)


async def recorded(home: House, key: str) -> list[dict[str, Any]]:
    """The demo's records with this key, as soon as there is one; those under way count."""
    listed: list[dict[str, Any]] = []
    async with client_of() as client, asyncio.timeout(10):
        while not listed:
            answer = await client.get(f"{home.demo.removesuffix('/v1')}/demo/requests", params={"key": key})
            listed = answer.json()["requests"]
    return listed
