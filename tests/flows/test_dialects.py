"""One answer over several dialects: a provider breaks in mid stream, and one that speaks otherwise takes over."""

import httpx2
import yaml

from app.flows import chatbots, file
from tests.flows.events import only, text
from tests.house import House, Open

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
    async with httpx2.AsyncClient(trust_env=False) as client:
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
