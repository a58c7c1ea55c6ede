"""What must hold after every trial: asked of the tables, and of what each reader saw."""

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import asyncpg
import orjson

from app.demo.answers import tokens
from scripts.chaos.faults import Fault
from scripts.chaos.trial import Answer, Trial

_EVENTS = "select id, payload, writer, created_at from streaming_events where stream_id = $1 order by id"
_STREAM = "select status, last_event_id from streaming_sessions where id = $1"
_MESSAGES = """
select m.content, m.status from messages m where m.user_id = 'chaos' and m.chat_id = $1 and m.role = 'assistant'
order by position
"""
_BUSY = """
select (select count(*) from conversation_sessions where status <> 'idle')
     + (select count(*) from queued_messages)
     + (select count(*) from streaming_sessions where status in ('queued', 'active'))
"""
_TWICE = "select count(*) from messages where user_id = 'chaos' and id = $1"


@dataclass
class Findings:
    """Counts that must be 0, with a sentence for each, and times of takeovers in seconds."""

    answers: int = 0
    connections: int = 0
    failed: int = 0
    lost: int = 0
    doubled: int = 0
    reordered: int = 0
    zombie: int = 0
    wrong: list[str] = field(default_factory=list)
    takeovers: list[float] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return not (self.lost or self.doubled or self.reordered or self.zombie or self.wrong)

    def add(self, other: "Findings") -> None:
        for name in ("answers", "connections", "failed", "lost", "doubled", "reordered", "zombie"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.wrong += other.wrong
        self.takeovers += other.takeovers


async def look_at(trial: Trial, fault: Fault) -> Findings:
    """After all readers have stopped."""
    found = Findings(wrong=list(trial.complaints))
    for answer in trial.answers:
        await _look_at_answer(trial, answer, fault, found)
    chats: dict[str, list[Answer]] = {}
    for answer in trial.answers:
        chats.setdefault(answer.session_id, []).append(answer)
    for chat, answers in chats.items():
        await _look_at_chat(trial, chat, answers, found)
    if busy := await trial.site.look.fetchval(_BUSY):
        found.wrong.append(f"{busy} sessions, messages or streams are left busy")
    return found


async def _look_at_answer(trial: Trial, answer: Answer, fault: Fault, found: Findings) -> None:
    rows = await trial.site.look.fetch(_EVENTS, answer.stream_id)
    row = await trial.site.look.fetchrow(_STREAM, answer.stream_id)
    assert row is not None
    events = [{"id": event["id"], **orjson.loads(event["payload"])} for event in rows]
    found.answers += 1
    if not events:
        found.wrong.append(f"{answer.stream_id} is {row['status']} and has no events")
        return
    found.failed += row["status"] == "failed"
    _check_log(answer, events, row, found)
    # Its own owner may take it up again: an accept whose COMMIT got no answer is looked for.
    if len({event["writer"] for event in rows}) > 1 and not fault.takes_over:
        found.wrong.append(f"{answer.stream_id} was taken over from a living replica")
    if fault.family == "stop":
        found.zombie += _returns(rows)
    for seen in answer.readers:
        found.connections += seen.connections
        found.lost, found.doubled = found.lost + seen.lost, found.doubled + seen.doubled
        found.reordered += seen.reordered
        found.wrong += [f"{seen.kind} of {answer.stream_id}: {refusal}" for refusal in seen.refusals]
        if seen.ended and seen.events != events:
            found.wrong.append(f"{seen.kind} of {answer.stream_id} saw something else than the log has")
    if trial.struck is not None and (taken := _taken_after(rows, trial.owner.role)) is not None:
        found.takeovers.append(taken - trial.struck)


def _check_log(answer: Answer, events: list[dict[str, Any]], row: asyncpg.Record, found: Findings) -> None:
    """Gapless ids, one end and it is last, the status says the same, and the text is the provider's."""
    ids, kinds = [event["id"] for event in events], [event["event"] for event in events]
    if ids != list(range(1, len(ids) + 1)):
        found.wrong.append(f"{answer.stream_id} has the ids {ids}")
    if kinds.count("stream_end") != 1 or kinds[-1] != "stream_end" or kinds.count("stream_start") != 1:
        found.wrong.append(f"{answer.stream_id} does not have one beginning and one end: {kinds}")
        return
    if (events[-1]["data"]["status"], len(ids)) != (row["status"], row["last_event_id"]):
        found.wrong.append(f"{answer.stream_id} ends as {events[-1]['data']['status']}, its row as {tuple(row)}")
    expected = "".join(tokens(answer.question, answer.length))
    if row["status"] == "completed" and text_of(events) != expected:
        found.wrong.append(f"{answer.stream_id} says {text_of(events)!r} instead of {expected!r}")
    if row["status"] == "failed" and not expected.startswith(text_of(events)):
        found.wrong.append(f"{answer.stream_id} failed with {text_of(events)!r}, no beginning of {expected!r}")


def text_of(events: list[dict[str, Any]]) -> str:
    """What a client shows behind the last event."""
    shown: list[str] = []
    for event in events:
        match event["event"]:
            case "flow_restart":
                shown.clear()
            case "token":
                shown.append(event["data"]["token"])
    return "".join(shown)


async def _look_at_chat(trial: Trial, chat: str, answers: list[Answer], found: Findings) -> None:
    """The saved answers are what the logs say, in the order of the messages; each message was taken once."""
    expected = []
    for answer in answers:
        rows = await trial.site.look.fetch(_EVENTS, answer.stream_id)
        events = [orjson.loads(row["payload"]) for row in rows]
        text, whole = text_of(events), bool(events) and events[-1]["data"].get("status") == "completed"
        if text:
            expected.append((text, "complete" if whole else "partial"))
        if await trial.site.look.fetchval(_TWICE, answer.key) != 1:
            found.wrong.append(f"the message {answer.key} was not stored once")
    saved = [tuple(row) for row in await trial.site.look.fetch(_MESSAGES, chat)]
    if saved != expected:
        found.wrong.append(f"{chat} has saved {saved} instead of {expected}")


def _returns(rows: list[asyncpg.Record]) -> int:
    """Events by a replica that another one had written behind before."""
    runs = [(writer, len(list(events))) for writer, events in groupby(rows, key=lambda row: row["writer"])]
    return sum(count for number, (writer, count) in enumerate(runs) if writer in dict(runs[:number]))


def _taken_after(rows: list[asyncpg.Record], role: str) -> float | None:
    """When somebody else went on with what this replica had begun."""
    if not rows or rows[0]["writer"] != role:
        return None
    moments = [row["created_at"].timestamp() for row in rows if row["writer"] != role]
    return moments[0] if moments else None
