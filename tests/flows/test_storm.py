"""Chatbots made by chance, whose providers fail by chance, asked and stopped at any moment: what must hold, always."""

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Iterator
from itertools import pairwise
from random import Random
from typing import Any
from uuid import UUID

from httpx2 import AsyncClient, Response

from app.flows.run import answer_id
from tests.conversations.counted import agreed
from tests.flows.events import data_of, text
from tests.house import House, Open, flow
from tests.serving import serving
from tests.sse import Frame, read_stream

RUNS = int(os.environ.get("PARLEY_TEST_STORM", "60"))
SEED = int(os.environ.get("PARLEY_TEST_SEED", "1"))
AT_ONCE = 20

FAULTS = ["reset", "cut", "eof", "stall", "status", "error", "no_finish", "json_error", "garbage", "crlf"]
ENDED = ("flow_end", "flow_error")


def chatbot(chance: Random) -> dict[str, Any]:
    """A chatbot that may be applied: a router or none, one or two answers, side flows here and there."""
    sides = [f"side{number}" for number in range(chance.randrange(3))]
    answers = ["main", "other"][: chance.randint(1, 2)]
    flows = {name: a_flow(chance, streams=True) for name in answers}
    flows |= {name: a_flow(chance, streams=chance.random() < 0.5) for name in sides}
    for name in sides[: chance.randrange(2)]:
        flows[name]["output"] = "json"
    plan: list[list[Any]] = [[], ["answer"], []]
    for name in sides:
        step = {"flow": name, "on_failure": "fail"} if chance.random() < 0.3 else name
        plan[0 if isinstance(step, dict) else chance.randrange(3)].append(step)
    made: dict[str, Any] = {"flows": flows, "answers": answers, "markers": {"card": {"open": "[[", "close": "]]"}}}
    if len(answers) == 2 and chance.random() < 0.7:
        flows["router"] = flow(chance.choice(["other", "main", "neither"]), wishes={"first_ms": chance.randrange(30)})
        plan[0].insert(0, "router")
        speculative = len(plan[0]) == 1 and chance.random() < 0.6
        made["router"] = {"flow": "router", "outcomes": {name: name for name in answers}, "default": "main"}
        made["router"]["speculative"] = speculative
    if sides and chance.random() < 0.4 and sides[0] in plan[0]:
        flows["main"]["system"] = f"They said {{{{output.{sides[0]}}}}}."
        made.get("router", {}).pop("speculative", None)
    return made | {"plan": [stage for stage in plan if stage]}


def a_flow(chance: Random, *, streams: bool) -> dict[str, Any]:
    made = one_choice(chance) | {"stream": streams, "on_break": chance.choice(["restart", "restart", "fail"])}
    made["fallbacks"] = [one_choice(chance) for _ in range(chance.randrange(3))]
    if chance.random() < 0.1:
        made["timeout_s"] = 0.05
    return made


def one_choice(chance: Random) -> dict[str, Any]:
    wishes: dict[str, Any] = {"delay_ms": chance.choice([0, 1, 3]), "tokens": chance.randint(1, 60)}
    if chance.random() < 0.3:
        wishes["say"] = chance.choice(
            ["a [[1]] b [[2]]", "[[open", "]] [[x]]", "{{message}} [[ {{output.main}} ]]", "", "[1]", "[" * 60]
        )
    if chance.random() < 0.5:
        wishes |= {"fault": chance.choice(FAULTS), "after": chance.choice([0, 1, 5, 30])}
    return {**flow(wishes=wishes), "provider": chance.choice(["demo", "demo", "claude", "gone"])}


async def one(home: House, chance: Random, name: str) -> tuple[dict[str, Any], list[Frame]]:
    """Ask, perhaps stop, perhaps leave in between, and read it all."""
    accepted = (await home.post(name, user_id=f"user {chance.randrange(9)}")).json()
    url = accepted["streaming_url"]
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(read_stream(home.client, url))
        if chance.random() < 0.5:
            await asyncio.sleep(chance.random() * 0.15)
            body = {"flow": chance.choice(["main", "side0", "router", "nobody"])} if chance.random() < 0.4 else {}
            for _ in range(chance.randint(1, 2)):
                tasks.create_task(home.client.post(f"{url}/cancel", json=body))
    return accepted, reading.result()


def wrong(frames: list[Frame]) -> Iterator[str]:
    """What no answer may look like, whatever happened to it."""
    kinds = [frame.event for frame in frames]
    if [frame.number for frame in frames] != list(range(1, len(frames) + 1)):
        yield "ids"
    if kinds[0] != "stream_start" or kinds[-1] != "stream_end" or Counter(kinds)["stream_end"] != 1:
        yield "ends"
    if Counter(kinds)["message"] > 1:
        yield "two messages"
    state: dict[str, str] = {}
    selected = None
    for frame in frames:
        name, data = frame.data["data"].get("flow"), frame.data["data"]
        match frame.event:
            case "flow_start":
                if state.get(name) in ENDED:
                    yield f"{name} starts after its end"
                state[name] = "flow_start"
            case "token" | "flow_output":
                if state.get(name) != "flow_start":
                    yield f"{name} speaks, {state.get(name)}"
            case "flow_restart":
                if state.get(name) != "flow_start":
                    yield f"{name} starts again, {state.get(name)}"
            case "flow_end" | "flow_error":
                if state.get(name) in ENDED:
                    yield f"{name} ends twice"
                if name not in state and data.get("finish_reason") != "cancelled" and frame.event == "flow_end":
                    yield f"{name} ends without a start"
                state[name] = frame.event
            case "flow_selected":
                if "router" not in state or state["router"] not in ENDED or {"main", "other"} & state.keys():
                    yield f"selected {name} when {state}"
                selected = name
            case "message":
                if state.get(name) not in ENDED:
                    yield f"saved before {name} has ended"
                if name != (selected or name):
                    yield f"saved {name}, selected {selected}"
    if selected and {"main", "other"} & state.keys() > {selected}:
        yield f"heard {sorted(state)}, selected {selected}"
    yield from (f"{name} never ends" for name, now in state.items() if now not in ENDED)


async def check(home: House, accepted: dict[str, Any], frames: list[Frame]) -> list[str]:
    found = list(wrong(frames))
    stream_id = UUID(accepted["streaming_session_id"])
    status = frames[-1].data["data"]["status"]
    row = await home.database.fetchrow("select status, last_event_id from streaming_sessions where id = $1", stream_id)
    if row is None or tuple(row) != (status, len(frames)):
        found.append(f"row {row} for {status}, {len(frames)}")
    saved = await home.database.fetchrow("select content, status from messages where id = $1", answer_id(stream_id))
    messages = data_of(frames, "message")
    if (saved is None) != (not messages):
        found.append("message without row, or row without message")
    if saved is not None and saved["content"] != text(frames, messages[0]["flow"]):
        found.append(f"saved {saved['content']!r}, shown {text(frames, messages[0]['flow'])!r}")
    if saved is not None and (saved["status"] == "complete") != (status == "completed"):
        found.append(f"saved {saved['status']} of {status}")
    if "[[1" in "".join(text(frames, name) for name in ("main", "other")):
        found.append("a marker in the text")
    return found


class Visitor:
    """Sends messages into one session, gives orders about those that wait, and keeps what it is told."""

    def __init__(self, clients: list[AsyncClient], chance: Random, session: str) -> None:
        self._clients = clients
        self._chance = chance
        self._url = f"/api/sessions/{session}/queue"
        self._session = session
        self.streams: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.removed: set[str] = set()

    async def act(self) -> None:
        for number in range(12):
            await asyncio.sleep(self._chance.random() * 0.05)
            client = self._chance.choice(self._clients)
            match self._chance.randrange(6):
                case 0 | 1 | 2:
                    await self._send(client, f"m{number}")
                case 3:
                    await self._edit(client, number)
                case 4:
                    await self._order(client)
                case 5 if self.streams:
                    url = f"/api/stream-events/{self._chance.choice([*self.streams.values()])}/cancel"
                    assert (await client.post(url)).status_code == 200

    async def _send(self, client: AsyncClient, name: str) -> None:
        body = {"user_id": "ann", "session_id": self._session, "chatbot_id": self._chance.choice(["short", "long"])}
        on_busy = self._chance.choice(["enqueue", "enqueue", "interrupt", "reject"])
        body |= {"message_text": name, "client_message_id": f"{self._session}-{name}", "on_busy": on_busy}
        response = await client.post("/api/process-message", json=body)
        if response.status_code == 200:
            self.streams[body["client_message_id"]] = response.json()["streaming_session_id"]
            self.texts[body["client_message_id"]] = name
        else:
            assert (on_busy, response.json()["code"]) == ("reject", "session_busy"), response.text

    async def _edit(self, client: AsyncClient, number: int) -> None:
        if name := self._some():
            body = {"message_text": f"edited {number}"}
            if await self._told(client.patch(f"{self._url}/{name}", params={"user_id": "ann"}, json=body)):
                self.texts[name] = f"edited {number}"

    async def _order(self, client: AsyncClient) -> None:
        if not (name := self._some()):
            return
        if self._chance.random() < 0.5:
            await self._told(client.post(f"{self._url}/{name}/send-now", params={"user_id": "ann"}))
        elif await self._told(client.delete(f"{self._url}/{name}", params={"user_id": "ann"})):
            self.removed.add(name)

    def _some(self) -> str | None:
        return self._chance.choice([*self.streams]) if self.streams else None

    async def _told(self, asked: Awaitable[Response]) -> bool:
        """Whether it was done; else it waits no more."""
        response = await asked
        assert response.status_code == 200 or response.json()["code"] == "message_not_queued", response.text
        return response.status_code == 200


async def test_whatever_is_done_to_waiting_messages(house: Open, database: str) -> None:
    chance = Random(SEED)
    async with house(scan_s=0.2, user_queue=1000, user_runs=1000) as home, serving(database, drain_s=0) as other:
        long = {"flows": {"main": flow(wishes={"tokens": 40, "delay_ms": 5})}}
        await home.apply(short={"flows": {"main": flow("Yes.")}}, long=long)
        clients = [home.client, other]
        visitors = [Visitor(clients, Random(f"{SEED} {n}"), f"session{n}") for n in range(10)]
        await asyncio.gather(*(visitor.act() for visitor in visitors))
        for visitor in visitors:
            for name, stream_id in visitor.streams.items():
                reading = read_stream(chance.choice(clients), f"/api/stream-events/{stream_id}")
                frames = await asyncio.wait_for(reading, 30)
                asked = await home.database.fetchval("select content from messages where id = $1", name)
                if [frame.event for frame in frames] == ["stream_end"]:
                    assert asked is None, f"{name} was removed and asked"
                else:
                    assert list(wrong(frames)) == []
                    assert (asked, name in visitor.removed) == (visitor.texts[name], False)
        assert await home.count("queued_messages") == 0
        assert await home.database.fetchval("select count(*) from conversation_sessions where status <> 'idle'") == 0
        rows = await home.database.fetch("select role from messages order by chat_id, position")
        assert not any(a == b == "assistant" for a, b in pairwise(row["role"] for row in rows))
        await agreed(home.database)


async def test_whatever_happens(house: Open) -> None:
    chance = Random(SEED)
    async with house(first_token_timeout_s=0.3, gap_timeout_s=0.3, provider_retries=1) as home:
        bots = {f"bot{number}": chatbot(chance) for number in range(RUNS)}
        await home.apply(**bots)
        for first in range(0, RUNS, AT_ONCE):
            names = list(bots)[first : first + AT_ONCE]
            answers = await asyncio.gather(*(one(home, Random(f"{SEED} {name}"), name) for name in names))
            for name, (accepted, frames) in zip(names, answers, strict=True):
                found = await check(home, accepted, frames)
                assert not found, f"{name} of seed {SEED}: {found}\n{bots[name]}\n{[f.data for f in frames]}"
        assert await home.database.fetchval("select count(*) from conversation_sessions where status <> 'idle'") == 0
        assert (await home.client.get("/api/conversation-health")).json()["active_streams"] == 0
        await agreed(home.database)
