"""The demo provider as Flowise: predictions as the vendor's own SDK reads them, and what goes with them."""

import asyncio
import json
from typing import Any
from urllib.parse import quote

import flowise
import httpx2
import pytest

from app.demo.answers import tokens

FAST = "demo?delay_ms=0&tokens=5"


@pytest.fixture
def root(demo_url: str) -> str:
    return demo_url.removesuffix("/v1")


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """The SDK would use the environment's proxies."""
    monkeypatch.setenv("NO_PROXY", "*")


def path(model: str = FAST) -> str:
    return f"/api/v1/prediction/{quote(model, safe='')}"


def asked(question: Any = "Hi", **more: Any) -> dict[str, Any]:
    return {"question": question, **more}


async def by_sdk(root: str, model: str, *, streaming: bool) -> list[Any]:
    """What the SDK yields: events as JSON texts, or one document."""
    data = flowise.PredictionData(quote(model, safe=""), "Why is the sky blue?", streaming=streaming)
    return await asyncio.to_thread(lambda: list(flowise.Flowise(root, "any").create_prediction(data)))


async def test_the_official_sdk_reads_the_same_answer_streamed_and_whole(root: str) -> None:
    events = [json.loads(event) for event in await by_sdk(root, "demo?delay_ms=0", streaming=True)]
    said = [event["data"] for event in events if event["event"] == "token"]
    assert said == tokens("Why is the sky blue?", None)
    names = [event["event"] for event in events if event["event"] != "token"]
    assert names == ["start", "usageMetadata", "metadata", "end"]
    [whole] = await by_sdk(root, "demo?delay_ms=0", streaming=False)
    assert whole["text"] == "".join(said)
    assert await by_sdk(root, "demo?delay_ms=0&whole=1", streaming=True) == [whole]


async def test_frames_are_written_as_flowise_writes_them(root: str, client: httpx2.AsyncClient) -> None:
    answer = await client.post(root + path("demo?delay_ms=0&say=Hi"), json=asked(streaming=True))
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[0] == 'message:\ndata:{"event":"start","data":"Hi"}'
    assert frames[1] == 'message:\ndata:{"event":"token","data":"Hi"}'
    assert frames[-2:] == ['message\ndata:{"event":"end","data":"[DONE]"}', ""]


async def test_the_session_and_the_chat_come_back(root: str, client: httpx2.AsyncClient) -> None:
    body = asked(chatId="c1", overrideConfig={"sessionId": "s1"})
    answer = (await client.post(root + path(), json=body)).json()
    assert (answer["chatId"], answer["sessionId"], answer["question"]) == ("c1", "s1", "Hi")
    assert (await client.post(root + path(), json=asked(chatId="c1"))).json()["sessionId"] == "c1"


async def test_an_abort_is_recorded_beside_what_it_would_stop(root: str, client: httpx2.AsyncClient) -> None:
    for flow in ("demo?key=here", "demo", "demo?fault=unknown", "other"):
        answer = await client.put(f"{root}/api/v1/chatmessage/abort/{quote(flow, safe='')}/c1")
        assert answer.status_code == 200
    listed = (await client.get(f"{root}/demo/requests", params={"wait": "1"})).json()["requests"]
    assert [record["key"] for record in listed] == ["abort:here", "abort:", "abort:", "abort:"]
    assert {record["body"]["chatId"] for record in listed} == {"c1"}


async def test_it_answers_a_ping(root: str, client: httpx2.AsyncClient) -> None:
    assert (await client.get(f"{root}/api/v1/ping")).text == "pong"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "body"),
        ({}, "question"),
        (asked(7), "question"),
        (asked(history=[{"role": "user", "content": "x"}]), "history"),
        (asked(history=[{"role": "userMessage", "content": None}]), "history"),
        (asked(history=["x"]), "history"),
        (asked(uploads=[{"data": "x"}]), "uploads"),
    ],
)
async def test_what_flowise_refuses_is_refused(root: str, client: httpx2.AsyncClient, body: Any, said: str) -> None:
    answer = await client.post(root + path(), json=body)
    assert answer.status_code == 400
    assert answer.json()["success"] is False
    assert said in answer.json()["message"]


async def test_faults_speak_as_flowise_does(root: str, client: httpx2.AsyncClient) -> None:
    answer = await client.post(root + path("demo?fault=status&status=500"), json=asked())
    assert (answer.status_code, answer.json()["statusCode"], answer.json()["success"]) == (500, 500, False)
    assert (await client.post(root + path("other"), json=asked())).status_code == 404
