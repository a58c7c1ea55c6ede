"""Wherever its owner is lost, and its successor too, an answer has one end, and what a reader that obeys flow_restart
has on its screen is what is saved; nothing that had ended is asked again."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.flows.run import answer_id
from app.streams.event import kind_of
from tests.house import House, flow, open_house
from tests.reader import Event, poll

_SAID = "Here [[card:one]] is [[card:two]] all of your money, back."
_BREAKS = {"fault": "reset", "after": 4, "times": 1, "key": "broken", "delay_ms": "1"}
_IF_REFUND = {"flow": "mood", "when": {"output": {"intent": ["refund"]}}}
_REFUSED = flow("x", wishes={"fault": "status", "status": 400})
# Something of everything: a router, a flow whose output the answer uses, an answer with markers that broke once and was
# refused elsewhere, side flows of both kinds, one that uses the answer and one that fails.
BOT: dict[str, Any] = {
    "flows": {
        "intent": flow("refund"),
        "topic": flow("bicycles", stream=True),
        "main": flow("Never said."),
        "refund": flow(
            _SAID, system="They ask about {{output.topic}}.", wishes=_BREAKS, fallbacks=[_REFUSED, flow(_SAID)]
        ),
        "mood": flow('{"mood": "glad"}', output="json"),
        "aside": flow("By the way, this comes as tokens.", stream=True),
        "broken": _REFUSED,
        "follow": flow("And now?", prompt="{{output.answer}}"),
    },
    "router": {"flow": "intent", "outcomes": {"refund": "refund", "other": "main"}, "default": "main"},
    "plan": [
        ["intent", "topic"],
        ["answer", _IF_REFUND, "aside", "broken", {"flow": "never", "when": {"output": {"intent": ["other"]}}}],
        ["follow"],
    ],
    "markers": {"card": {"open": "[[card:", "close": "]]"}},
}
BOT["flows"]["never"] = flow("Only for others.")


class Ward:
    """One answer of a gateway, whose owner dies at any event of it, as often as a test likes."""

    def __init__(self, home: House) -> None:
        self._home = home
        self._database = home.database
        self._stream = UUID(int=0)
        self._request = ""

    async def admit(self) -> None:
        """Have a whole answer."""
        await self._home.apply(shop=BOT)
        answer, frames = await self._home.ask("shop", session_id="chat")
        assert frames[-1].data["data"]["status"] == "completed"
        assert "flow_restart" in [frame.event for frame in frames]
        self._stream = UUID(answer["streaming_session_id"])
        question = await self._database.fetchval("select id from messages where role = 'user'")
        nothing: dict[str, Any] = {"configuration": {}, "history": None, "image_id": None, "request_id": None}
        self._request = orjson.dumps(nothing | {"message_id": question}).decode()

    async def log(self) -> list[str]:
        """The payloads of an answer that has ended."""
        await self.events()
        query = "select payload from streaming_events where stream_id = $1 order by id"
        return [row["payload"] for row in await self._database.fetch(query, self._stream)]

    async def events(self) -> list[Event]:
        return await asyncio.wait_for(poll(self._home.client, f"/api/stream-events/{self._stream}"), 20)

    async def lose(self, log: Sequence[str]) -> None:
        """As if the owner had died behind these events."""
        async with self._database.transaction():
            await self._database.execute("delete from streaming_events where stream_id = $1", self._stream)
            insert = "insert into streaming_events (stream_id, id, payload) values ($1, $2, $3)"
            await self._database.executemany(
                insert, [(self._stream, event_id, payload) for event_id, payload in enumerate(log, 1)]
            )
            if "message" not in map(kind_of, log):
                await self._database.execute("delete from messages where role = 'assistant'")
                await self._database.execute("delete from usage_ledger")
            await self._database.execute("delete from usage_ledger where flow <> 'refund'")
            await self._database.execute("delete from conversation_processing_metrics")
            await self._database.execute(
                "update conversation_sessions set status = 'active', streaming_session_id = $1", self._stream
            )
            await self._database.execute(
                """
                update streaming_sessions set status = 'active', last_event_id = null, ended_at = null, attempt = 1,
                    replica_id = gen_random_uuid(), request = $2 where id = $1
                """,
                self._stream,
                self._request,
            )

    async def check(self, events: Sequence[Event]) -> None:
        assert [event["id"] for event in events] == list(range(1, len(events) + 1))
        kinds = [event["event"] for event in events]
        assert (kinds.count("stream_end"), kinds[-1], kinds.count("message")) == (1, "stream_end", 1)
        assert kinds.count("flow_selected") == 1
        assert events[-1]["data"]["status"] == "completed"
        for name in BOT["flows"]:
            self._check_flow(name, events)
        await self._check_rows(events)

    def _check_flow(self, name: str, events: Sequence[Event]) -> None:
        of_flow = [event for event in events if event["data"].get("flow") == name and event["event"] in OF_A_FLOW]
        kinds = [event["event"] for event in of_flow]
        if name in ("main", "never"):
            assert kinds == []
            return
        assert kinds[-1] == ("flow_error" if name == "broken" else "flow_end"), name
        ends = kinds.count("flow_end") + kinds.count("flow_error")
        # What a router said is not in the log: it is asked again where its owner died before telling what came of it.
        assert ends == 1 or name == "intent", "what has ended is not asked again"
        assert kinds.count("flow_output") == (name in ("mood", "follow"))
        attempts = [event["data"]["attempt"] for event in of_flow if event["event"] == "flow_start"]
        assert attempts == sorted(set(attempts))

    async def _check_rows(self, events: Sequence[Event]) -> None:
        message = await self._database.fetchrow("select * from messages where role = 'assistant'")
        assert message is not None
        text, markers = shown(events, "refund")
        assert (message["id"], message["content"], message["status"]) == (answer_id(self._stream), text, "complete")
        assert text == "Here  is  all of your money, back."
        kept = [(one["name"], one["content"], one["offset"]) for one in orjson.loads(message["attachments"])]
        assert kept == markers == [("card", "one", 5), ("card", "two", 9)]
        row = await self._database.fetchrow("select status, last_event_id, request from streaming_sessions")
        assert row is not None
        assert tuple(row) == ("completed", len(events), None)
        assert await self._database.fetchval("select status from conversation_sessions") == "idle"
        outcomes = await self._database.fetch("select flow, outcome, error_code from usage_ledger order by attempt")
        last = {row["flow"]: row["outcome"] for row in outcomes}
        ended = {"intent", "topic", "refund", "mood", "aside", "follow"}
        assert last == dict.fromkeys(ended, "completed") | {"broken": "failed"}


OF_A_FLOW = ("flow_start", "flow_restart", "token", "flow_output", "flow_end", "flow_error")


def shown(events: Sequence[Event], name: str) -> tuple[str, list[tuple[str, str, int]]]:
    """What a reader that obeys flow_restart has of a flow."""
    text, markers = "", list[tuple[str, str, int]]()
    for event in events:
        data = event["data"]
        if data.get("flow") == name and event["event"] == "flow_restart":
            text, markers = "", []
        elif data.get("flow") == name and event["event"] == "token":
            text += data["token"]
            markers += [(mark, content, len(text)) for mark, found in data["markers"].items() for content in found]
    return text, markers


@asynccontextmanager
async def warded(database: str) -> AsyncGenerator[Ward, None]:
    async with open_house(database, scan_s=0.02, provider_retries=0) as home:
        ward = Ward(home)
        await ward.admit()
        yield ward


async def lost_at(ward: Ward, cuts: Sequence[float]) -> None:
    """Each cut is where in the log that there is by then, from its first event to the last but the end."""
    for cut in cuts:
        log = await ward.log()
        await lost_behind(ward, log[: 1 + round(cut * (len(log) - 2))])


async def lost_behind(ward: Ward, log: Sequence[str]) -> None:
    await ward.lose(log)
    events = await ward.events()
    assert (await ward.log())[: len(log)] == log, "what was said stays"
    await ward.check(events)


async def test_every_event_may_be_the_last_of_its_owner(database: str) -> None:
    async with warded(database) as ward:
        log = await ward.log()
        for kept in range(1, len(log)):
            await lost_behind(ward, log[:kept])


def test_whatever_the_owner_had_said_the_screen_and_the_chat_agree(database: str) -> None:
    with asyncio.Runner() as runner:
        context = warded(database)
        ward = runner.run(context.__aenter__())

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(cuts=st.lists(st.floats(0, 1), min_size=2, max_size=3))
        def lose(cuts: list[float]) -> None:
            runner.run(lost_at(ward, cuts))

        try:
            lose()
        finally:
            runner.run(context.__aexit__(None, None, None))
