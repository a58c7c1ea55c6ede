"""One trial: answers under way, readers of every kind on them, and what a fault needs to know of both."""

import asyncio
import random
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from time import time
from typing import Any
from uuid import UUID, uuid4

import httpx2

from scripts.chaos.browser import Browser
from scripts.chaos.readers import Seen, any_of, first_of, read_polling, read_sse
from scripts.chaos.site import LENGTHS, Failed, Replica, Site

# Answers before the fault; further ones are asked for while it happens.
_ANSWERS = 3
_FURTHER = 2
# A message is sent again and again until it is accepted; an answer has to end within this, in seconds.
_ACCEPT_S = 40
_END_S = 90


@dataclass
class Answer:
    """What was asked, where it streams, and what each reader has got of it."""

    stream_id: UUID
    session_id: str
    key: str
    question: str
    length: int
    path: str
    readers: list[Seen] = field(default_factory=list)


class Trial:
    """`owner` writes the first answers, `neighbour` has readers of them."""

    def __init__(self, site: Site, chance: random.Random, browser: Browser | None, tasks: asyncio.TaskGroup) -> None:
        self.site = site
        self.chance = chance
        self.owner, self.neighbour = chance.sample(list(site.replicas), 2)
        self.answers: list[Answer] = []
        # The wall clock's time of a death, and the ids of the replicas, by role, when the trial began.
        self.struck: float | None = None
        self.ids: dict[str, UUID] = {}
        self.complaints: list[str] = []
        self._browser = browser
        self._tasks = tasks
        self._reading: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Return when every answer is under way and read."""
        for replica in self.site.replicas:
            self.ids[replica.role] = await _id_of(replica)
        for number in range(_ANSWERS):
            await self.ask(self.owner, browse=number == 0)
        # The same chat again: waits for its turn.
        await self.ask(self.owner, session_id=self.answers[0].session_id)
        async with asyncio.timeout(_ACCEPT_S):
            for answer in self.answers[:_ANSWERS]:
                await answer.readers[0].has(self.chance.randint(1, 12))

    async def ask(self, first: Replica, *, session_id: str | None = None, browse: bool = False) -> None:
        """Send a message, to this replica first, until it is accepted; its readers begin at once."""
        length, key = self.chance.choice(LENGTHS), str(uuid4())
        question = f"What happens to {key}?"
        body: dict[str, Any] = {"user_id": "chaos", "chatbot_id": f"of{length}", "message_text": question}
        body |= {"session_id": session_id or f"chat-{key}", "client_message_id": key}
        accepted = await self._accepted(body, first)
        stream_id, path = UUID(accepted["streaming_session_id"]), accepted["streaming_url"]
        answer = Answer(stream_id, accepted["session_id"], key, question, length, path)
        self.answers.append(answer)
        self._read(answer, browse=browse)

    async def _accepted(self, body: dict[str, Any], first: Replica) -> dict[str, Any]:
        pick = first_of([first.url, *(other.url for other in self.site.replicas if other is not first)])
        async with asyncio.timeout(_ACCEPT_S):
            while True:
                try:
                    async with httpx2.AsyncClient(base_url=pick(), trust_env=False, timeout=4) as client:
                        response = await client.post("/api/process-message", json=body)
                except httpx2.HTTPError:
                    continue
                if response.status_code == 200:
                    accepted: dict[str, Any] = response.json()
                    return accepted
                if response.status_code not in (429, 503):
                    raise Failed(f"a message was refused: {response.status_code} {response.text}")
                await asyncio.sleep(0.1)

    def _read(self, answer: Answer, *, browse: bool) -> None:
        origins = [replica.url for replica in self.site.replicas]
        near, far = Seen("sse"), Seen("poll")
        answer.readers += [near, far]
        self._start(read_sse(near, answer.path, first_of([self.neighbour.url, self.site.origin])))
        self._start(read_polling(far, answer.path, any_of(origins, self.chance)))
        if browse and self._browser is not None:
            page = Seen("EventSource")
            answer.readers.append(page)
            self._start(self._browser.read(page, answer.path))

    def _start(self, reading: Coroutine[Any, Any, None]) -> None:
        self._reading.append(self._tasks.create_task(reading))

    async def go_on(self) -> None:
        """Further messages, as somebody sends them who knows nothing of faults."""
        for _ in range(_FURTHER):
            await asyncio.sleep(self.chance.uniform(0, 0.3))
            await self.ask(self.chance.choice(self.site.replicas))

    async def end(self) -> None:
        """Return when every reader has stopped by itself; those that do not are a complaint."""
        _, pending = await asyncio.wait(self._reading, timeout=_END_S)
        for task in pending:
            task.cancel()
        for answer in self.answers:
            for seen in answer.readers:
                if not seen.ended:
                    self.complaints.append(f"{seen.kind} of {answer.stream_id} has no end, {seen.last} events")

    # -- for faults

    async def pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.chance.uniform(least_s, most_s))

    def strike(self) -> None:
        """Note the moment from which a takeover is counted."""
        self.struck = time()

    async def declared_dead(self, replica: Replica) -> None:
        """Wait until the others have fenced a replica off."""
        async with asyncio.timeout(30):
            while await self.site.look.fetchval("select alive from replicas where id = $1", self.ids[replica.role]):
                await asyncio.sleep(0.05)


async def _id_of(replica: Replica) -> UUID:
    async with httpx2.AsyncClient(base_url=replica.url, trust_env=False, timeout=5) as client:
        return UUID((await client.get("/readyz?verbose")).json()["replica"])


@asynccontextmanager
async def trying(site: Site, chance: random.Random, browser: Browser | None) -> AsyncGenerator[Trial, None]:
    """A trial that has begun, on a site where everybody is well."""
    await site.heal()
    if browser is not None:
        await browser.open(site.origin)
    async with asyncio.TaskGroup() as tasks:
        trial = Trial(site, chance, browser, tasks)
        await trial.begin()
        yield trial
