"""Several real `parley serve` over one PostgreSQL: killed, frozen, told to go, cut off, started too early."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

import asyncpg
import httpx2
import pytest

from app.demo import demo_provider
from app.postgres import Connection
from tests.command import PARLEY, Command, answered, running, silent_port, through
from tests.proxy import proxy_to_postgres
from tests.reader import ask, assert_whole, poll, reading, restarts, text_of
from tests.serving import apply_demo, client_of, until_ready

MODELS = {
    "quick": "demo?delay_ms=0&tokens=20",
    "short": "demo?delay_ms=20&tokens=60",
    "steady": "demo?delay_ms=20&tokens=150",
    "slow": "demo?delay_ms=20&tokens=2000&key=long",
    "silent": "demo?delay_ms=20&fault=stall&after=5&key=long",
}
# A takeover after one second instead of six, and readers of another replica's streams who look often.
TIMES = {"PARLEY_LEASE_S": "1", "PARLEY_BEAT_S": "0.2", "PARLEY_SCAN_S": "0.2", "PARLEY_POLL_S": "0.2"}
DEFAULTS = {"PARLEY_LEASE_S": "6", "PARLEY_BEAT_S": "2", "PARLEY_SCAN_S": "1", "PARLEY_POLL_S": "1"}
# What G6 allows with a lease of six seconds; here it takes about two.
TAKEOVER_S = 10


@dataclass(frozen=True, slots=True)
class Replica:
    command: Command
    client: httpx2.AsyncClient

    async def ask(self, chatbot: str, **fields: Any) -> dict[str, Any]:
        return await ask(self.client, chatbot, **fields)


@asynccontextmanager
async def listening(
    database: str, *, command: Sequence[str] = PARLEY, **variables: str
) -> AsyncGenerator[Replica, None]:
    environment = {**TIMES, "PARLEY_PORT": "0", "PARLEY_LOG_FORMAT": "text", "DATABASE_URL": database, **variables}
    async with running("serve", command=command, **environment) as process:
        url = (await process.says("listening")).rpartition("url=")[2]
        async with client_of(url) as client:
            yield Replica(process, client)


@asynccontextmanager
async def replicas(database: str, count: int, **variables: str) -> AsyncGenerator[list[Replica], None]:
    """So many replicas, all of them ready."""
    async with AsyncExitStack() as stack:
        async with asyncio.TaskGroup() as starting:
            contexts = [stack.enter_async_context(listening(database, **variables)) for _ in range(count)]
            tasks = [starting.create_task(context) for context in contexts]
        started = [task.result() for task in tasks]
        for replica in started:
            await until_ready(replica.client)
        yield started


@pytest.fixture
async def demo(database: str) -> AsyncGenerator[str, None]:
    """A provider for all replicas of a test."""
    async with demo_provider() as url:
        await apply_demo(database, url, MODELS)
        yield url


@pytest.fixture
async def look(database: str, demo: str) -> AsyncGenerator[Connection, None]:
    """A look into the database."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def assert_kept(look: Connection, accepted: dict[str, Any], events: list[Any], status: str = "completed") -> None:
    """The rows of an answer: its end once, what readers see of it as its message, its session free."""
    stream = accepted["streaming_session_id"]
    assert await look.fetchval("select max(id) from streaming_events where stream_id = $1", stream) == len(events)
    row = await look.fetchrow("select status, last_event_id from streaming_sessions where id = $1", stream)
    assert row is not None
    assert tuple(row) == (status, len(events))
    answer = await look.fetch(
        "select content, status from messages where chat_id = $1 and role = 'assistant'", accepted["session_id"]
    )
    assert [tuple(row) for row in answer] == [(text_of(events), "complete" if status == "completed" else "partial")]
    session = "select status from conversation_sessions where id = $1"
    assert await look.fetchval(session, accepted["session_id"]) == "idle"


# -- killed


def assert_begun_again(events: list[Any]) -> None:
    """One restart, told, and then a whole answer."""
    assert_whole(events, "completed")
    assert restarts(events) == ["owner_lost"]


async def test_the_survivor_begins_again_what_a_killed_replica_left(database: str, look: Connection) -> None:
    async with replicas(database, 2) as (victim, survivor), AsyncExitStack() as stack:
        whole = await victim.ask("quick")
        whole_events = await poll(survivor.client, whole["streaming_url"])
        left = [await victim.ask("steady") for _ in range(3)]
        readers = [await stack.enter_async_context(reading(survivor.client, one["streaming_url"])) for one in left]
        for reader in readers:
            await reader.has(10)
        victim.command.send(signal.SIGKILL)
        async with asyncio.timeout(TAKEOVER_S):
            ended = [await reader.end() for reader in readers]
        for accepted, events in zip(left, ended, strict=True):
            assert_begun_again(events)
            assert await poll(survivor.client, accepted["streaming_url"]) == events
            await assert_kept(look, accepted, events)
        assert await poll(survivor.client, whole["streaming_url"]) == whole_events, "what had ended stays as it was"
        following = await survivor.ask("quick", session_id=left[0]["session_id"])
        assert_whole(await poll(survivor.client, following["streaming_url"]), "completed")


async def assert_settled(look: Connection, *, messages: int) -> None:
    """What they had reserved of a quota was given back once, and what they cost is used."""
    row = await look.fetchrow("select messages_used, messages_reserved, tokens_used, tokens_reserved from quota_usage")
    assert row is not None
    tokens = await look.fetchval("select sum(prompt_tokens + completion_tokens) from usage_ledger")
    assert tuple(row) == (messages, 0, tokens, 0)
    assert tokens > 0


async def test_messages_that_wait_have_their_turns_although_their_replica_was_killed(
    database: str, look: Connection
) -> None:
    quotas = {"PARLEY_QUOTA_USER_MESSAGES": "4", "PARLEY_QUOTA_USER_TOKENS": "100000"}
    async with replicas(database, 2, **quotas) as (victim, survivor), AsyncExitStack() as stack:
        left = await victim.ask("steady", session_id="chat")
        reader = await stack.enter_async_context(reading(survivor.client, left["streaming_url"]))
        await reader.has(10)
        waiting = [await victim.ask("quick", session_id="chat", message_text=f"number {n}") for n in range(2)]
        readers = [await stack.enter_async_context(reading(survivor.client, one["streaming_url"])) for one in waiting]
        victim.command.send(signal.SIGKILL)
        async with asyncio.timeout(2 * TAKEOVER_S):
            assert_begun_again(await reader.end())
            for one in readers:
                assert_whole(await one.end(), "completed")
        said = await look.fetch("select content from messages where role = 'user' order by position")
        assert [row["content"] for row in said][1:] == ["number 0", "number 1"]
        assert await look.fetchval("select count(*) from queued_messages") == 0
        await assert_settled(look, messages=3)


async def test_a_stop_that_its_replica_did_not_live_to_write_is_written_by_the_survivor(
    database: str, look: Connection
) -> None:
    async with replicas(database, 2) as (victim, survivor), AsyncExitStack() as stack:
        left = await victim.ask("slow")
        reader = await stack.enter_async_context(reading(survivor.client, left["streaming_url"]))
        await reader.has(10)
        victim.command.send(signal.SIGSTOP)
        stopped = (await survivor.client.post(left["streaming_url"] + "/cancel")).json()
        assert (stopped["session_status"], stopped["upstream_closed"]) in (("active", False), ("cancelled", True))
        victim.command.send(signal.SIGKILL)
        async with asyncio.timeout(TAKEOVER_S):
            events = await reader.end()
        assert_whole(events, "cancelled")
        assert await look.fetchval("select status from messages where role = 'assistant'") == "partial"


async def test_two_that_start_after_a_kill_share_the_orphans(database: str, look: Connection) -> None:
    async with replicas(database, 1) as (victim,):
        left = [await victim.ask("steady") for _ in range(6)]
        for one in left:
            async with reading(victim.client, one["streaming_url"]) as reader:
                await reader.has(5)
        await victim.command.stop(signal.SIGKILL)
    async with replicas(database, 2) as heirs:
        for accepted in left:
            events = await poll(heirs[0].client, accepted["streaming_url"])
            assert_begun_again(events)
            await assert_kept(look, accepted, events)
        done = [await heir.command.stop() for heir in heirs]
    taken = [line for one in done for line in one.err if "stream_taken_over" in line]
    assert len(taken) == len(left), "each has one owner"


async def test_g6_a_killed_replica_is_missed_within_two_seconds(database: str, look: Connection) -> None:
    """With the lease and the intervals that are the defaults: its lock tells."""
    async with replicas(database, 2, **DEFAULTS) as (victim, survivor):
        accepted = await victim.ask("steady")
        async with reading(survivor.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            victim.command.send(signal.SIGKILL)
            killed = monotonic()
            await survivor.command.says("stream_taken_over")
            assert monotonic() - killed < 2
            events = await reader.end()
        assert_begun_again(events)
        await assert_kept(look, accepted, events)


async def test_without_the_lock_silence_tells(database: str, look: Connection) -> None:
    async with replicas(database, 2, PARLEY_SUSPECT="false") as (victim, survivor):
        accepted = await victim.ask("steady")
        async with reading(survivor.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            victim.command.send(signal.SIGKILL)
            assert "it is silent" in await survivor.command.says("replica_declared_dead", within_s=TAKEOVER_S)
            assert_begun_again(await reader.end())


async def test_a_server_alone_goes_on_with_what_it_had_when_it_was_told_to_go(database: str, look: Connection) -> None:
    async with replicas(database, 1, PARLEY_DRAIN_S="0.2") as (first,):
        accepted = await first.ask("steady")
        async with reading(first.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            done = await first.command.stop()
    assert done.code == 0
    async with replicas(database, 1, PARLEY_LEASE_S="60") as (again,):
        events = await poll(again.client, accepted["streaming_url"])
    assert_begun_again(events)
    await assert_kept(look, accepted, events)


async def test_g12_an_outage_of_several_leases_costs_no_living_replica_its_answers(
    database: str, look: Connection
) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn), replicas(dsn, 2, PARLEY_LEASE_S="1") as both:
        accepted = [await one.ask("steady") for one in both]
        for one, answer in zip(both, accepted, strict=True):
            async with reading(one.client, answer["streaming_url"]) as reader:
                await reader.has(10)
        proxy.close()
        await asyncio.sleep(3)  # of the outage itself: nobody says that it has lasted long enough
        proxy.open()
        for one, answer in zip(both, accepted, strict=True):
            assert_whole(await poll(one.client, answer["streaming_url"]), "completed")
        assert {row["attempt"] for row in await look.fetch("select attempt from streaming_sessions")} == {1}
        assert await look.fetchval("select count(*) from replicas where alive") == 2
        assert not any("declared_dead" in line for one in both for line in one.command.err)


# -- frozen


async def test_a_zombie_writes_nothing_and_serves_again(database: str, demo: str, look: Connection) -> None:
    # Nothing is begun again, so that what is open at the provider is the zombie's.
    async with replicas(database, 2, PARLEY_OWNERS="1") as (zombie, survivor):
        accepted, silent = await zombie.ask("slow"), await zombie.ask("silent")
        async with (
            reading(survivor.client, accepted["streaming_url"]) as reader,
            reading(survivor.client, silent["streaming_url"]) as other,
        ):
            await reader.has(10)
            await other.has(5)
            zombie.command.send(signal.SIGSTOP)
            async with asyncio.timeout(TAKEOVER_S):
                events = await reader.end()
                assert_whole(await other.end(), "failed", error="owner_lost")
        assert_whole(events, "failed", error="owner_lost")
        zombie.command.send(signal.SIGCONT)
        # By then it has tried to write what the provider had sent meanwhile, and was told.
        await zombie.command.says("replica_renewed")
        await assert_kept(look, accepted, events, "failed")
        assert await poll(survivor.client, accepted["streaming_url"]) == events
        # Also the one that had nothing to say, so that no write was tried for it.
        await _assert_upstreams_closed(demo, 2)
        await until_ready(zombie.client)
        following = await zombie.ask("quick", session_id=accepted["session_id"])
        assert_whole(await poll(survivor.client, following["streaming_url"]), "completed")


async def _assert_upstreams_closed(demo: str, count: int) -> None:
    """By us, before the provider was done."""
    async with client_of(demo.removesuffix("/v1")) as client:
        answer = await client.get("/demo/requests", params={"key": "long", "wait": ""}, timeout=15)
    assert answer.status_code == 200, "one is still open"
    assert [request["closed_at"] is not None for request in answer.json()["requests"]] == [True] * count


async def test_a_freeze_shorter_than_the_lease_changes_nothing(database: str, demo: str) -> None:
    async with replicas(database, 2, PARLEY_LEASE_S="20") as (frozen, other):
        accepted = await frozen.ask("short")
        async with reading(other.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            frozen.command.send(signal.SIGSTOP)
            seen = await poll_for(other.client, accepted["streaming_url"], seconds=1)
            frozen.command.send(signal.SIGCONT)
            events = await reader.end()
    assert len(seen) < len(events)
    assert_whole(events, "completed")


async def poll_for(client: httpx2.AsyncClient, url: str, *, seconds: float) -> list[Any]:
    """What is there after waiting so long for something that does not come."""
    last = (await client.get(url, params={"limit": 5000})).json()["last_event_id"]
    await client.get(url, params={"after": last, "wait": seconds})
    events: list[Any] = (await client.get(url, params={"limit": 5000})).json()["events"]
    return events


# -- told to go


async def test_an_answer_finishes_while_its_replica_drains(database: str, demo: str) -> None:
    async with replicas(database, 2) as (leaving, staying):
        accepted = await leaving.ask("short")
        async with (
            reading(leaving.client, accepted["streaming_url"]) as here,
            reading(staying.client, accepted["streaming_url"]) as there,
        ):
            await here.has(5)
            leaving.command.send(signal.SIGTERM)
            await _until_it_refuses(leaving.client)
            assert (await leaving.client.get("/livez")).status_code == 200
            events = await here.end()
            assert await there.end() == events
        done = await leaving.command.ended()
    assert_whole(events, "completed")
    assert done.code == 0


async def test_what_was_being_accepted_has_its_time_too(database: str, look: Connection) -> None:
    async with replicas(database, 1) as (leaving,):
        session = (await leaving.ask("quick"))["session_id"]
        async with asyncio.timeout(10):
            while await look.fetchval("select count(*) from conversation_sessions where status = 'idle'") == 0:
                pass
        async with look.transaction():
            await look.execute("select from conversation_sessions for update")
            asking = asyncio.create_task(leaving.ask("short", session_id=session))
            async with asyncio.timeout(10):
                while await look.fetchval("select count(*) from pg_locks where not granted") == 0:
                    pass
            leaving.command.send(signal.SIGTERM)
            await _until_it_refuses(leaving.client)
        accepted = await asking
        async with reading(leaving.client, accepted["streaming_url"]) as reader:
            assert_whole(await reader.end(), "completed")
        assert (await leaving.command.ended()).code == 0


async def _until_it_refuses(client: httpx2.AsyncClient) -> None:
    """New work is refused with the remedy; reading goes on."""
    async with asyncio.timeout(10):
        while (await client.get("/readyz")).status_code == 200:
            pass
    body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
    refused = await client.post("/api/process-message", json=body)
    assert (refused.status_code, refused.json()["code"]) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1


async def test_an_answer_longer_than_the_drain_goes_on_elsewhere_at_once(
    database: str, look: Connection, demo: str
) -> None:
    # A lease that nobody lives to see the end of: the leaving one says itself that it goes.
    async with replicas(database, 2, PARLEY_DRAIN_S="0.2", PARLEY_LEASE_S="60") as (leaving, staying):
        accepted = await leaving.ask("steady")
        async with (
            reading(leaving.client, accepted["streaming_url"]) as here,
            reading(staying.client, accepted["streaming_url"]) as there,
        ):
            await here.has(10)
            left = monotonic()
            leaving.command.send(signal.SIGTERM)
            await staying.command.says("stream_taken_over")
            assert monotonic() - left < 0.2 + 1
            done = await leaving.command.ended()
            # Sent away at a frame boundary, and what was said here is what the others read.
            seen = await here.end()
            events = await there.end()
            assert seen == events[: len(seen)]
        assert_begun_again(events)
        await assert_kept(look, accepted, events)
        assert await look.fetchval("select attempt from streaming_sessions") == 1, "a drain is nobody's fault"
    assert done.code == 0


async def test_a_drain_while_the_database_hangs_ends_in_time_all_the_same(database: str, look: Connection) -> None:
    async with proxy_to_postgres(database) as (proxy, dsn):
        async with replicas(dsn, 1, PARLEY_DRAIN_S="0.2") as (leaving,):
            accepted = await leaving.ask("steady")
            async with reading(leaving.client, accepted["streaming_url"]) as reader:
                await reader.has(10)
                proxy.stall()
                done = await leaving.command.stop(within_s=15)
        proxy.open()
    assert done.code == 0
    assert any("goodbye_failed" in line for line in done.err)
    async with replicas(database, 1) as (again,):
        assert_begun_again(await poll(again.client, accepted["streaming_url"]))


async def test_a_second_signal_ends_it_at_once_and_another_replica_begins_its_answers_again(
    database: str, look: Connection
) -> None:
    async with replicas(database, 2) as (leaving, staying):
        accepted = await leaving.ask("steady")
        async with reading(staying.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            leaving.command.send(signal.SIGTERM)
            await _until_it_refuses(leaving.client)
            done = await leaving.command.stop(signal.SIGTERM, within_s=5)
            async with asyncio.timeout(TAKEOVER_S):
                events = await reader.end()
        assert done.code == -signal.SIGTERM
        assert_begun_again(events)
        await assert_kept(look, accepted, events)


class Fleet:
    """Replicas that come and go, and what their users do meanwhile."""

    def __init__(self) -> None:
        self.living: list[Replica] = []

    async def get(self, send: Callable[[Replica], Awaitable[httpx2.Response]]) -> httpx2.Response:
        """Ask one after the other, the oldest first, until one answers, as a balancer and a patient client do."""
        async with asyncio.timeout(TAKEOVER_S):
            while True:
                for replica in [*self.living]:
                    with suppress(httpx2.TransportError):
                        response = await send(replica)
                        if response.status_code != 503:
                            return response

    async def ask(self, number: int) -> dict[str, Any]:
        body = {"user_id": "ann", "chatbot_id": "short", "message_text": "Hello", "session_id": f"chat-{number}"}
        headers = {"Idempotency-Key": f"ask-{number}"}
        response = await self.get(lambda one: one.client.post("/api/process-message", json=body, headers=headers))
        assert response.status_code == 200, response.text
        accepted: dict[str, Any] = response.json()
        return accepted

    async def read(self, url: str) -> list[Any]:
        """Page by page, each from whoever is there."""
        events: list[Any] = []
        while True:
            params = {"after": len(events), "wait": 1}
            page = (await self.get(lambda one: one.client.get(url, params=params))).json()  # noqa: B023
            events += page["events"]
            if not page["has_more"]:
                return events


YOUNG = """
select exists (
    select from streaming_sessions s where status = 'active' and (
        select count(*) from streaming_events e where e.stream_id = s.id) between 5 and 25)
"""


async def test_p8_a_rolling_restart_under_load_loses_and_doubles_nothing(database: str, look: Connection) -> None:
    fleet, codes, answers = Fleet(), list[int](), list[tuple[dict[str, Any], list[Any]]]()
    rolled = asyncio.Event()

    async def talk(first: int) -> None:
        for number in range(first, 1000, 3):
            accepted = await fleet.ask(number)
            answers.append((accepted, await fleet.read(accepted["streaming_url"])))
            if rolled.is_set():
                return

    async with AsyncExitStack() as stack:

        async def start() -> Replica:
            [replica] = await stack.enter_async_context(replicas(database, 1, PARLEY_DRAIN_S="0.3"))
            fleet.living.append(replica)
            return replica

        old = [await start(), await start()]
        async with asyncio.TaskGroup() as users:
            for user in range(3):
                users.create_task(talk(user))
            for leaving in old:
                await start()
                # Somebody has read the beginning of an answer, which has more to come than a drain takes.
                while not await look.fetchval(YOUNG):
                    pass
                done = await leaving.command.stop()
                codes.append(done.code)
                fleet.living.remove(leaving)
            rolled.set()
    assert codes == [0, 0]
    assert len(answers) >= 6
    for accepted, events in answers:
        assert_whole(events, "completed")
        await assert_kept(look, accepted, events)
    assert any(restarts(events) for _, events in answers), "some had to be begun again"
    assert await look.fetchval("select count(*) from streaming_sessions") == len(answers)
    assert await look.fetchval("select count(*) from messages") == 2 * len(answers)


# -- started too early


async def test_a_start_before_the_database_waits_for_it(database: str, demo: str) -> None:
    with silent_port() as port:
        async with listening(through(port, database)) as early:
            await early.command.says("nothing listens")
            assert (await early.client.get("/livez")).status_code == 200
            assert (await early.client.get("/readyz")).status_code == 503
            assert (await early.client.get("/api/conversation-health")).status_code == 503
            body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
            refused = await early.client.post("/api/process-message", json=body)
            assert (refused.status_code, refused.json()["code"]) == (503, "starting")
            assert int(refused.headers["retry-after"]) >= 1
            async with answered(port, database):
                await until_ready(early.client)
                accepted = await early.ask("quick")
                assert_whole(await poll(early.client, accepted["streaming_url"]), "completed")
                done = await early.command.stop()
    assert done.code == 0
    assert len([line for line in done.err if "database_waiting" in line]) == 1, "one line says why"


async def test_a_start_before_the_migrations_waits_for_them(empty_database: str) -> None:
    from app.schema import migrate

    async with listening(empty_database) as early:
        await early.command.says("run `parley migrate`")
        assert (await early.client.get("/readyz")).status_code == 503
        await migrate(empty_database)
        await until_ready(early.client)


# -- two replicas, one truth


async def test_the_same_message_fifty_times_at_once_is_one_run(database: str, demo: str, look: Connection) -> None:
    body = {"user_id": "ann", "chatbot_id": "slow", "message_text": "Hello"}
    headers = {"Idempotency-Key": "once"}
    async with replicas(database, 2) as both:
        clients = [both[number % 2].client for number in range(50)]
        answers = await asyncio.gather(
            *(client.post("/api/process-message", json=body, headers=headers) for client in clients)
        )
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
        assert len({answer.text for answer in answers}) == 1
        assert sum(answer.headers.get("idempotent-replayed") == "true" for answer in answers) == 49
        async with reading(both[0].client, answers[0].json()["streaming_url"]) as reader:
            await reader.has(5)
    for table in ("streaming_sessions", "messages", "conversation_sessions"):
        assert await look.fetchval(f"select count(*) from {table}") == 1
    async with client_of(demo.removesuffix("/v1")) as client:
        assert len((await client.get("/demo/requests")).json()["requests"]) == 1


async def test_every_way_of_reading_on_every_replica_gives_the_same(database: str, demo: str) -> None:
    async with replicas(database, 2) as both:
        clients = [one.client for one in both]
        url = (await both[0].ask("short"))["streaming_url"]
        async with asyncio.TaskGroup() as tasks:
            ways = [way(client, url) for way in (poll, _by_sse) for client in clients]
            readers = [tasks.create_task(way) for way in (*ways, _by_turns(clients, url))]
        first, *others = [reader.result() for reader in readers]
    assert_whole(first, "completed")
    assert all(other == first for other in others)


async def _by_sse(client: httpx2.AsyncClient, url: str) -> list[Any]:
    async with reading(client, url) as reader:
        return await reader.end()


async def _by_turns(clients: list[httpx2.AsyncClient], url: str) -> list[Any]:
    """Three events by SSE from one replica, the next by a poll of the other, and so on to the end."""
    events: list[Any] = []
    while not events or events[-1]["event"] != "stream_end":
        sse, other = clients
        async with reading(sse, url, after=len(events)) as reader:
            await reader.has_or_ended(3)
            events += reader.events
        page = (await other.get(url, params={"after": len(events), "limit": 2, "wait": 5})).json()
        events += page["events"]
        clients = [other, sse]
    return events
