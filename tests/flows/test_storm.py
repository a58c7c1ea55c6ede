"""Chatbots made by chance, whose providers fail by chance, asked and stopped at any moment: what must hold, always."""

import asyncio
import os
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any
from uuid import UUID

from app.flows.run import answer_id
from tests.flows.events import data_of, text
from tests.house import House, Open, flow
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
