"""The reference client at a real gateway: its exchanges over HTTP, and the nudges that make it pull."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from time import time
from typing import Any

import httpx2
import orjson

from app.sync import cursor
from app.sync.exchange import Answer, Asked
from app.sync.merge import AddMessage, DeleteChat, DeleteMessage, Message, Op, PutChat
from tests.sync.device import Device, shown
from tests.sync.vectors import state

Json = dict[str, Any]
_PATH = "/api/chat/sync"
_OPS: Mapping[type[Op], str] = {
    PutChat: "chat.put",
    DeleteChat: "chat.del",
    AddMessage: "msg.add",
    DeleteMessage: "msg.del",
}
_PATIENCE_S = 30


@dataclass(slots=True)
class Phone:
    """A device of a user, and the gateway that it asks. `told` is what became of its operations."""

    user: str
    gateway: httpx2.AsyncClient
    device: Device = field(default_factory=Device)
    told: list[Mapping[str, Any]] = field(default_factory=list)
    streams: list[Mapping[str, Any]] = field(default_factory=list)

    def say(self, *ops: Op) -> None:
        """Here and now; the server hears of it with the next exchange."""
        self.device.say(*ops)

    def stamp(self) -> str:
        return self.device.stamp(round(time() * 1000))

    def sees(self) -> dict[str, Any]:
        return shown(self.device.view())

    def messages(self, chat: str) -> list[Message]:
        """Of a chat, in their order."""
        found = [one for one in self.sees().values() if isinstance(one, Message) and one.chat_id == chat]
        return sorted(found, key=lambda one: (one.stamp, one.id))

    async def sync(self) -> Answer:
        """Exchange until there is nothing more to do; the last answer."""
        while True:
            answer = await self.exchange()
            if answer is not None and not answer.more and not self.device.outbox:
                return answer

    async def exchange(self) -> Answer | None:
        """One of them; None where the server did not know how far this device is, and it begins anew."""
        response = await self.gateway.post(_PATH, json={**body(self.device.ask()), "user_id": self.user})
        if response.status_code == 409:
            self.device.begin_anew()
            return None
        answer = read(response.raise_for_status().json())
        self.device.take(answer)
        self.told += answer.results
        self.streams = list(answer.active_streams)
        return answer

    @asynccontextmanager
    async def listening(self) -> AsyncGenerator["Ear", None]:
        """Nudges, as they come."""
        ear = Ear(self)
        hearing = asyncio.create_task(ear.hear())
        try:
            yield ear
        finally:
            hearing.cancel()


@dataclass(slots=True)
class Ear:
    """Pulls whenever the server says that there is something to pull, and only then."""

    phone: Phone
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def hear(self) -> None:
        query = {"user_id": self.phone.user, "client": self.phone.device.client}
        headers = {"Accept": "text/event-stream"}
        async with self.phone.gateway.stream("GET", f"{_PATH}/events", params=query, headers=headers) as response:
            async for line in response.aiter_lines():
                if line == "event: changed":
                    self.news.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until this holds after a pull."""
        async with asyncio.timeout(_PATIENCE_S):
            while not holds():
                await self.news.wait()
                self.news.clear()
                await self.phone.sync()


def body(asked: Asked) -> Json:
    """What a device asks, as it goes over the wire."""
    push = [{"mid": mutation.mid, "ops": [_op(op) for op in mutation.ops]} for mutation in asked.push]
    return {"client": asked.client, "cursor": str(asked.cursor) if asked.cursor else None, "push": push}


def _op(op: Op) -> Json:
    told = {one.name: getattr(op, one.name) for one in fields(op)}
    if isinstance(op, AddMessage):
        told["attachments"] = orjson.loads(op.attachments)
    return {"op": _OPS[type(op)], **told}


def read(told: Json) -> Answer:
    """An answer as it came over the wire."""
    rows = state(told)
    given: Json = {**told, "chats": list(rows.chats.values()), "messages": list(rows.messages.values())}
    return Answer(**{**given, "cursor": cursor.read(told["cursor"])})
