"""The example file that shows everything, driven over real HTTP as `scripts/dev` runs it."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from app.flows import chatbots, file
from app.flows.shapes import shape_at
from tests.chats.pictures import picture
from tests.flows.events import data_of, only, text
from tests.flows.test_stopping import until_event
from tests.house import House, Open
from tests.sse import Frame, read_stream

EXAMPLE = Path(__file__).parents[2] / "docs/examples/everything.yaml"


@pytest.fixture
async def home(house: Open, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[House, None]:
    async with house(provider_retries=0) as home:
        monkeypatch.setenv("PARLEY_DEMO_URL", home.demo)
        await chatbots.apply(home.database, file.load(EXAMPLE))
        yield home


def side_flows(frames: list[Frame]) -> dict[str, Any]:
    return {data["flow"]: data["output"] for data in data_of(frames, "flow_output")}


async def test_the_router_the_side_flows_the_markers_and_the_fallback(home: House) -> None:
    answer, frames = await home.ask("shop", message_text="Do you have shoes?")
    assert answer["flow_type"] == "main"
    assert frames[0].data["data"]["plan"] == [["intent", "mood"], ["main", "tags"], ["suggest"]]
    assert only(frames, "flow_selected") == {"flow": "main", "by": "router", "reason": "intent said other"}
    assert [data["provider"] for data in data_of(frames, "flow_start", "main")] == ["elsewhere", "demo"]
    assert text(frames) == "We have shoes  and hats."
    assert [data["markers"] for data in data_of(frames, "token") if data["markers"]] == [{"card": ["shoe 42"]}]
    assert side_flows(frames) == {"mood": "cheerful", "tags": {"tags": ["shop"]}, "suggest": "Ask about hats."}
    order = [(frame.event, frame.data["data"].get("flow")) for frame in frames]
    assert order.index(("message", "main")) < order.index(("flow_output", "tags")), "a side flow delayed the answer"
    assert order.index(("flow_end", "mood")) < order.index(("flow_start", "main"))
    assert only(frames, "stream_end")["status"] == "completed"


async def test_the_template_is_assigned_and_its_version_is_known(home: House) -> None:
    rows = await home.database.fetch(
        "select chatbot_id, flow, template, template_version from flow_template_assignments"
    )
    assert sorted(tuple(row) for row in rows) == [("shop", "main", "support", 1), ("swift", "main", "brief", 1)]


async def test_the_other_answer_restarts_after_a_failure_in_mid_stream(home: House) -> None:
    answer, frames = await home.ask("shop", message_text="I want my money back")
    assert answer["flow_type"] == "refund"
    assert only(frames, "flow_restart")["flow"] == "refund"
    assert text(frames, "refund") == "Here is your money."
    assert only(frames, "stream_end")["status"] == "completed"


async def test_a_picture_is_looked_at(home: House) -> None:
    data = b64encode(picture()).decode()
    answer, frames = await home.ask("shop", image_data={"name": "p.png", "data": data, "mime": "image/png"})
    assert answer["flow_type"] == "look"
    assert text(frames) == "A fine picture."
    assert "suggest" not in side_flows(frames)


async def test_an_interrupt_and_an_edited_queue(home: House) -> None:
    first = (await home.post("guarded", session_id="chat")).json()
    await until_event(home, first["streaming_url"], 8)
    body = {"session_id": "chat", "client_message_id": "later", "on_busy": "enqueue"}
    later = (await home.post("shop", message_text="shoes?", **body)).json()
    assert later["status"] == "queued"
    url, user = "/api/sessions/chat/queue", {"user_id": "ann"}
    assert (await home.client.patch(f"{url}/later", params=user, json={"message_text": "a refund!"})).status_code == 200
    urgent = (await home.post("guarded", session_id="chat", message_text="now")).json()
    cut = await read_stream(home.client, first["streaming_url"])
    assert only(cut, "stream_end")["status"] == "cancelled"
    assert only(cut, "flow_end", "main")["finish_reason"] == "cancelled"
    await until_event(home, urgent["streaming_url"], 8)
    await home.client.post(urgent["streaming_url"] + "/cancel")
    frames = await asyncio.wait_for(read_stream(home.client, later["streaming_url"]), 10)
    assert text(frames, "refund") == "Here is your money."
    said = await home.database.fetch("select content from messages where role = 'user' order by position")
    assert [row["content"] for row in said] == ["Hello", "now", "a refund!"]


async def test_what_a_message_may_set(home: House) -> None:
    allowed = {"temperature": 0.5, "topKSettings": {"main": 7}, "language": "de", "values": {"shop": "Laden"}}
    _, frames = await home.ask("shop", configuration={**allowed, "flow_type": "main"})
    assert text(frames) == "We have shoes  and hats."
    assert data_of(frames, "flow_selected") == []
    for refused in ({"base_url": "http://x"}, {"temperature": 3}, {"language": "fr"}, {"flow_type": "mood"}):
        assert (await home.post("shop", configuration=refused)).status_code == 422


async def test_the_likely_answer_is_dropped_unheard_where_the_router_decides_otherwise(home: House) -> None:
    answer, frames = await home.ask("swift", message_text="Call me")
    assert answer["flow_type"] == "main"
    assert only(frames, "flow_selected") == {"flow": "human", "by": "router", "reason": "intent said person"}
    assert text(frames) == "A person will call you."
    assert side_flows(frames) == {"alert": "called"}
    assert not [frame for frame in frames if frame.data["data"].get("flow") == "main"]
    calls = await home.database.fetch("select flow, outcome from usage_ledger order by flow")
    assert [tuple(call) for call in calls] == [
        ("alert", "completed"),
        ("human", "completed"),
        ("intent", "completed"),
        ("main", "cancelled"),
    ]


def test_every_member_of_the_file_is_in_it() -> None:
    used: dict[type[BaseModel], set[str]] = {}

    def walk(value: Any, place: tuple[str | int, ...]) -> None:
        if isinstance(value, dict):
            if is_shape(place):
                used.setdefault(shape_at(place), set()).update(value)
            for name, member in value.items():
                walk(member, (*place, name))
        elif isinstance(value, list):
            for number, member in enumerate(value):
                walk(member, (*place, number))

    walk(yaml.safe_load(EXAMPLE.read_text()), ())
    # docs/sources.md has examples of its own, which its tests hold complete.
    missing = {shape: set(shape.model_fields) - members - {"sources"} for shape, members in used.items()}
    assert missing == {shape: set() for shape in used}
    assert len(used) == 11


def is_shape(place: tuple[str | int, ...]) -> bool:
    """Whether the members of a place are the file's own, and no names that somebody chose."""
    chosen = {"providers", "templates", "chatbots", "flows", "values", "markers", "outcomes", "output", "parameters"}
    return not place or place[-1] not in chosen
