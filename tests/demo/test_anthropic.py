"""The demo provider as Anthropic: the vendor's events as its own SDK reads them, and what the vendor refuses."""

import json
from collections.abc import Mapping
from typing import Any

import anthropic
import httpx2
import pytest

from app.demo.answers import tokens

FAST = "demo?delay_ms=0&tokens=5"
VERSION = {"anthropic-version": "2023-06-01"}


def asked(content: Any = "Hi", model: str = FAST, **more: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": content}], **more}


async def post(
    client: httpx2.AsyncClient, body: Mapping[str, Any], headers: Mapping[str, str] = VERSION
) -> httpx2.Response:
    return await client.post("messages", json=body, headers=headers)


async def test_the_official_sdk_reads_the_same_answer_streamed_and_whole(demo_url: str) -> None:
    question: anthropic.types.MessageParam = {"role": "user", "content": "Why is the sky blue?"}
    root = demo_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=root, api_key="any", max_retries=0) as sdk:
        whole = await sdk.messages.create(model="demo?delay_ms=0", messages=[question], max_tokens=100)
        async with sdk.messages.stream(model="demo?delay_ms=0", messages=[question], max_tokens=100) as stream:
            texts = [text async for text in stream.text_stream]
            streamed = await stream.get_final_message()
        models = [model.id async for model in sdk.models.list()]
    assert texts == tokens("Why is the sky blue?", None)
    for message in (streamed, whole):
        assert [block.text for block in message.content if block.type == "text"] == ["".join(texts)]
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", len(texts))
    assert models[0] == "demo"


async def test_events_come_in_the_vendors_order_with_their_names(client: httpx2.AsyncClient) -> None:
    answer = await post(client, asked(model="demo?delay_ms=0&tokens=2", stream=True))
    frames = [frame.split("\n") for frame in answer.text.split("\n\n") if frame]
    names = [name.removeprefix("event: ") for name, _ in frames]
    assert names == [
        "message_start", "content_block_start", "ping", "content_block_delta", "content_block_delta",
        "content_block_stop", "message_delta", "message_stop",
    ]  # fmt: skip
    assert names == [json.loads(data.removeprefix("data: "))["type"] for _, data in frames]


async def test_models_are_listed_in_the_vendors_form_to_who_speaks_it(client: httpx2.AsyncClient) -> None:
    listed = (await client.get("models", headers=VERSION)).json()
    assert (listed["has_more"], listed["data"][0]["type"]) == (False, "model")
    assert "has_more" not in (await client.get("models")).json()


async def test_the_key_is_hashed_in_the_record(demo_url: str, client: httpx2.AsyncClient) -> None:
    await post(client, asked(model=f"{FAST}&key=here"), {**VERSION, "x-api-key": "sk-canary"})
    answer = await client.get(f"{demo_url.removesuffix('/v1')}/demo/requests", params={"key": "here", "wait": "1"})
    [record] = answer.json()["requests"]
    assert record["headers"]["x-api-key"].startswith("sha256:")
    assert "sk-canary" not in answer.text


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [
        ("status=529", 529, "overloaded_error"),
        ("status=429", 429, "rate_limit_error"),
        ("status=500", 500, "api_error"),
    ],
)
async def test_faults_speak_as_the_vendor_does(client: httpx2.AsyncClient, fault: str, status: int, kind: str) -> None:
    answer = await post(client, asked(model=f"demo?fault=status&{fault}"))
    assert answer.status_code == status
    assert (answer.json()["type"], answer.json()["error"]["type"]) == ("error", kind)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "model"),
        ({"messages": []}, "model"),
        (asked() | {"max_tokens": None}, "max_tokens"),
        (asked() | {"messages": []}, "at least one"),
        (asked() | {"messages": [7]}, "role"),
        (asked() | {"messages": [{"role": "system", "content": "x"}]}, "role"),
        (asked() | {"messages": [{"role": "assistant", "content": "x"}]}, "first message"),
        (asked(" "), "non-whitespace"),
        (asked([{"type": "text", "text": ""}]), "non-whitespace"),
        (asked([]), "non-empty"),
        (asked(None), "non-empty"),
        (asked(model="demo?fault=unknown"), "stall"),
    ],
)
async def test_what_the_vendor_refuses_is_refused(client: httpx2.AsyncClient, body: Any, said: str) -> None:
    answer = await post(client, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert said in answer.json()["error"]["message"]


async def test_without_a_version_nothing_is_answered(client: httpx2.AsyncClient) -> None:
    answer = await post(client, asked(), {})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "anthropic-version: header is required")


async def test_another_vendors_model_is_not_found(client: httpx2.AsyncClient) -> None:
    answer = await post(client, asked(model="claude-any"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


async def test_pictures_and_lists_of_texts_are_understood(client: httpx2.AsyncClient) -> None:
    picture = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw=="}}
    answer = await post(client, asked([picture, {"type": "text", "text": "Tea?"}], model="demo?delay_ms=0"))
    assert answer.json()["content"][0]["text"] == "".join(tokens("Tea?", None))
    assert (await post(client, asked([picture]))).status_code == 200
