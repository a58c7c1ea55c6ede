"""The demo provider: OpenAI's wire format as OpenAI's own SDK reads it, deterministic, honest, and easy to stop."""

import asyncio
import json
import signal
import time
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx2
import openai
import pytest

from app.demo import demo_provider, faults
from app.demo.answers import cut, tokens
from app.demo.wishes import Wishes
from tests.serving import client_of


def asked(question: str, model: str = "demo?delay_ms=0", **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": question}], **more}


async def frames(client: httpx2.AsyncClient, body: dict[str, Any], **headers: str) -> list[bytes]:
    response = await client.post("chat/completions", json={**body, "stream": True}, headers=headers)
    assert response.status_code == 200
    return [frame for frame in response.content.split(b"\n\n") if frame]


async def text(client: httpx2.AsyncClient, body: dict[str, Any]) -> str:
    response = await client.post("chat/completions", json=body)
    content = response.json()["choices"][0]["message"]["content"]
    assert isinstance(content, str)
    return content


async def test_the_official_sdk_reads_the_same_answer_streamed_and_whole(demo_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=demo_url, api_key="any", max_retries=0) as sdk:
        whole = await sdk.chat.completions.create(
            model="demo?delay_ms=0", messages=[{"role": "user", "content": "Why is the sky blue?"}]
        )
        stream = await sdk.chat.completions.create(
            model="demo?delay_ms=0",
            messages=[{"role": "user", "content": "Why is the sky blue?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    said = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert said == whole.choices[0].message.content
    assert "Why is the sky blue?" in said
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage == whole.usage


async def test_models_are_listed(demo_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=demo_url, api_key="any", max_retries=0) as sdk:
        names = [model.id async for model in sdk.models.list()]
    assert names[0] == "demo"


async def test_usage_comes_only_when_asked_for(client: httpx2.AsyncClient) -> None:
    without = await frames(client, asked("Hello"))
    with_usage = await frames(client, asked("Hello", stream_options={"include_usage": True}))
    assert len(with_usage) == len(without) + 1
    assert b'"usage":{' in with_usage[-2]


async def test_answers_say_that_they_are_a_demo_and_depend_on_the_question(client: httpx2.AsyncClient) -> None:
    first, again, other = [await text(client, asked(question)) for question in ("Tea?", "Tea?", "Coffee?")]
    assert first == again
    assert first != other
    assert all(answer.startswith("**This is a demo**") for answer in (first, other))


@pytest.mark.parametrize("question", ["", "Hi", "{question} {0} %s", "émoji 🙂" * 100, "a\nb\x00c\u2028d"])
def test_tokens_join_to_the_whole_text_and_come_in_any_number(question: str) -> None:
    whole = tokens(question, None)
    assert len(whole) > 50
    assert max(len(token) for token in whole) <= 9
    assert tokens(question, 7) == whole[:7]
    assert len(tokens(question, 1000)) == 1000


async def test_one_token_per_frame_at_full_speed(client: httpx2.AsyncClient) -> None:
    sent = await frames(client, asked("Hi", "demo?tokens=100&delay_ms=0"))
    contents = [json.loads(frame.removeprefix(b"data: "))["choices"][0]["delta"] for frame in sent[:-1]]
    assert [delta["content"] for delta in contents[1:-1]] == tokens("Hi", 100)
    assert sent[-1] == b"data: [DONE]"


async def test_tokens_keep_the_pace_they_were_asked_for(client: httpx2.AsyncClient) -> None:
    started = time.monotonic()
    await frames(client, asked("Hi", "demo?tokens=10"), **{"X-Demo": "delay_ms=10&first_ms=100"})
    assert 0.1 + 10 * 0.01 <= time.monotonic() - started < 2


async def test_faults_end_after_the_wished_number_of_tries_per_key(client: httpx2.AsyncClient) -> None:
    def model(key: str) -> str:
        return f"demo?tokens=1&delay_ms=0&fault=status&status=429&retry_after=2&times=2&key={key}"

    answers = [
        await client.post("chat/completions", json=asked("Hi", model(key))) for key in ("a", "a", "b", "a", "b", "b")
    ]
    assert [answer.status_code for answer in answers] == [429, 429, 429, 200, 429, 200]
    assert answers[0].headers["retry-after"] == "2"


async def test_the_record_shows_what_was_sent_but_no_key(demo_url: str, client: httpx2.AsyncClient) -> None:
    body = asked("Hi", "demo?tokens=1&delay_ms=0&key=here", temperature=0.5)
    await client.post("chat/completions", json=body, headers={"Authorization": "Bearer sk-canary"})
    answer = await client.get(f"{demo_url.removesuffix('/v1')}/demo/requests", params={"key": "here", "wait": "1"})
    [record] = answer.json()["requests"]
    assert record["body"] == body
    assert record["headers"]["authorization"].startswith("sha256:")
    assert record["closed_at"] is None
    assert "sk-canary" not in answer.text


async def test_an_echo_returns_the_request(client: httpx2.AsyncClient) -> None:
    body = asked("Hi", "demo?echo=1&delay_ms=0")
    assert json.loads(await text(client, body)) == body


@pytest.mark.parametrize(
    "said", ["", " ", "refund", '{"title": "A & B",\n "n": [1, 2]}\n', "a <<card:1>>  b\t\n\n\x00 ü🙂 \u2028"]
)
async def test_a_scripted_answer_comes_as_it_is(client: httpx2.AsyncClient, said: str) -> None:
    body = asked("Hi", f"demo?delay_ms=0&tokens=2&{urlencode({'say': said})}")
    assert await text(client, body) == said
    streamed = [json.loads(frame.removeprefix(b"data: ")) for frame in (await frames(client, body))[1:-2]]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in streamed] == cut(said)


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (asked("Hi", "gpt-4o"), 404, "model_not_found"),
        (asked("Hi", "demo?fault=unknown"), 400, "stall"),
        (asked("Hi", "demo?speed=9"), 400, "delay_ms"),
        (asked("Hi", "demo?tokens=many"), 400, "tokens"),
        ({"messages": []}, 400, "model"),
    ],
)
async def test_wishes_it_cannot_grant_are_refused_with_what_there_is(
    client: httpx2.AsyncClient, body: dict[str, Any], status: int, said: str
) -> None:
    answer = await client.post("chat/completions", json=body)
    assert answer.status_code == status
    assert said in answer.text


@pytest.mark.parametrize("body", [b"", b"[" * 100_000, b"\xff", b"null", b'{"model":"demo","messages":7}'])
async def test_no_body_is_an_accident(client: httpx2.AsyncClient, body: bytes) -> None:
    answer = await client.post("chat/completions", content=body)
    assert answer.status_code in (200, 400)


async def test_two_demo_providers_live_in_one_loop_and_remember_apart() -> None:
    async with demo_provider() as one, demo_provider() as other, client_of() as client:
        assert one != other
        await client.post(f"{one}/chat/completions", json=asked("Hi", "demo?tokens=1&delay_ms=0"))
        counts = [
            len((await client.get(f"{url.removesuffix('/v1')}/demo/requests")).json()["requests"])
            for url in (one, other)
        ]
    assert counts == [1, 0]


async def test_it_stops_at_once_under_open_streams_and_frees_its_port() -> None:
    async with client_of() as client:
        async with demo_provider() as url:
            body = {**asked("Hi", "demo?fault=stall&delay_ms=0"), "stream": True}
            request = client.build_request("POST", f"{url}/chat/completions", json=body)
            response = await client.send(request, stream=True)
            started = time.monotonic()
        assert time.monotonic() - started < 1
        await response.aclose()
        port = int(url.split(":")[2].split("/")[0])
        async with demo_provider(port=port) as again:
            assert again == url


async def test_signal_handlers_and_current_task_are_left_alone() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    tasks = asyncio.all_tasks()
    async with demo_provider() as url, client_of() as client:
        await client.get(f"{url}/models")
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert asyncio.all_tasks() == tasks


async def test_a_reset_is_a_tcp_reset(demo_url: str) -> None:
    body = json.dumps({**asked("Hi", "demo?fault=reset&delay_ms=0"), "stream": True}).encode()
    port = int(demo_url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: demo\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    with pytest.raises(ConnectionResetError):
        await reader.read(-1)
    writer.close()


def test_fault_names_are_unambiguous() -> None:
    assert len(set(faults.NAMES)) == len(faults.NAMES)


@pytest.mark.parametrize("name", [*faults.NAMES, *(field.name for field in fields(Wishes))])
def test_every_wish_and_fault_is_in_the_manual(name: str) -> None:
    manual = Path(__file__).parents[2] / "docs/demo-provider.md"
    assert any(f"`{name}`" in line.split("|")[1] for line in manual.read_text().splitlines() if line.startswith("|"))


async def test_a_clock_tells_when_each_token_was_sent(client: httpx2.AsyncClient) -> None:
    before = time.monotonic_ns()
    sent = await frames(client, asked("Hi", "demo?clock=1&tokens=3&delay_ms=1"))
    stamps = [int(json.loads(frame[6:])["choices"][0]["delta"]["content"]) for frame in sent[1:4]]
    assert before < stamps[0] < stamps[1] < stamps[2] < time.monotonic_ns()
