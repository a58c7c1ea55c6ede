"""What a database can do to a gateway (D1-D14): go away, come back, hang, fill up, lose what it had confirmed."""

import asyncio
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import asyncpg
import httpx2
import pytest

from app.demo import demo_provider
from app.postgres import Connection
from app.schema import migrate
from scripts.chaos.postgres import Postgres, running_postgres
from tests.proxy import Proxy, proxy_to, proxy_to_postgres
from tests.reader import Reader, ask, assert_whole, poll, reading, text_of
from tests.serving import apply_demo, client_of, serving, until_ready

MODELS = {
    "quick": "demo?delay_ms=0&tokens=20",
    "calm": "demo?delay_ms=20&tokens=100",
    "slow": "demo?delay_ms=20&tokens=2000&key=long",
}
# An outage that a test can wait for.
FAST: dict[str, Any] = {"poll_s": 0.1, "scan_s": 0.2, "beat_s": 0.2, "lease_s": 2, "drain_s": 0}


@dataclass
class Site:
    """A gateway that reaches its database through a proxy, and a look into the database beside it."""

    client: httpx2.AsyncClient
    look: Connection
    proxy: Proxy
    demo: str

    async def ask(self, chatbot: str, **fields: Any) -> dict[str, Any]:
        return await ask(self.client, chatbot, **fields)

    async def post(self) -> tuple[httpx2.Response, float]:
        """An answer to a message, and how long it took."""
        began = monotonic()
        body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
        return await self.client.post("/api/process-message", json=body), monotonic() - began

    async def end_backends(self) -> None:
        """Every connection of the gateway, by the server."""
        await self.look.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )

    async def row(self, accepted: dict[str, Any]) -> asyncpg.Record:
        row = await self.look.fetchrow(
            "select status, last_event_id, attempt from streaming_sessions where id = $1",
            accepted["streaming_session_id"],
        )
        assert row is not None
        return row

    async def assert_works(self) -> None:
        """New answers, from the first to the last event."""
        accepted = await self.ask("quick")
        assert_whole(await poll(self.client, accepted["streaming_url"]), "completed")


Open = Callable[..., Any]


@pytest.fixture
def site(database: str) -> Open:
    @asynccontextmanager
    async def opened(**settings: Any) -> AsyncGenerator[Site, None]:
        async with demo_provider() as demo, proxy_to_postgres(database) as (proxy, dsn):
            await apply_demo(database, demo, MODELS)
            look = await asyncpg.connect(database)
            try:
                async with serving(dsn, **{**FAST, **settings}) as client:
                    yield Site(client, look, proxy, demo)
            finally:
                await look.close()

    return opened


async def until(condition: Callable[[], Awaitable[bool]], *, within_s: float = 10) -> None:
    async with asyncio.timeout(within_s):
        while not await condition():
            await asyncio.sleep(0.02)


# -- D8: a server that has lost what it had confirmed


async def test_d8_a_stream_whose_events_the_database_has_lost_ends_and_every_reader_is_told(site: Open) -> None:
    async with site() as home:
        whole = await home.ask("calm", session_id="whole")
        lost = await home.ask("slow", session_id="lost")
        async with reading(home.client, lost["streaming_url"]) as reader:
            await reader.has(30)
            async with home.look.transaction():
                await home.look.execute("lock table streaming_events in exclusive mode")
                await home.end_backends()
                last = await home.look.fetchval(
                    "delete from streaming_events where stream_id = $1 and id > 20 returning"
                    " (select max(id) from streaming_events where stream_id = $1)",
                    lost["streaming_session_id"],
                )
            seen = await reader.end()
        assert [event["id"] for event in seen] == list(range(1, len(seen) + 1)), "closed at a frame boundary"
        await until(lambda: _ended(home, lost))
        row = await home.row(lost)
        assert row["status"] == "failed"
        assert row["last_event_id"] > max(last, len(seen))
        assert await home.look.fetchval(f"select max(id) from {_EVENTS}", lost["streaming_session_id"]) == 20
        for cursor in (20, len(seen), last):
            await _assert_gone(home.client, lost["streaming_url"], cursor)
        page = (await home.client.get(lost["streaming_url"], params={"after": 0, "limit": 5000})).json()
        assert page["events"] == seen[:20]
        assert page["has_more"], "a poller goes on, and is told"
        kept = await home.look.fetchrow(
            "select content, status from messages where chat_id = 'lost' and role <> 'user'"
        )
        assert kept is not None
        assert kept["content"].startswith(text_of(seen))
        assert kept["status"] == "partial"
        assert_whole(await poll(home.client, whole["streaming_url"]), "completed")
        await _assert_closed(home.demo)
        following = await home.ask("quick", session_id="lost")
        assert_whole(await poll(home.client, following["streaming_url"]), "completed")


_EVENTS = "streaming_events where stream_id = $1"


async def _ended(home: Site, accepted: dict[str, Any]) -> bool:
    return bool((await home.row(accepted))["status"] != "active")


async def _assert_gone(client: httpx2.AsyncClient, url: str, cursor: int) -> None:
    for accept in ("application/json", "text/event-stream"):
        answer = await client.get(url, headers={"Accept": accept, "Last-Event-ID": str(cursor)})
        assert (answer.status_code, answer.json()["code"]) == (410, "stream_cleaned"), accept


async def _assert_closed(demo: str) -> None:
    """By us, before the provider was done."""
    async with client_of(demo.removesuffix("/v1")) as client:
        answer = await client.get("/demo/requests", params={"key": "long", "wait": "1"}, timeout=15)
    assert [request["closed_at"] is not None for request in answer.json()["requests"]] == [True]


# -- D1, D4: it restarts under running answers


@pytest.fixture
async def postgres() -> AsyncGenerator[Postgres, None]:
    """A server that only this test uses, and may end."""
    with tempfile.TemporaryDirectory(prefix="parley-test-", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o711)  # the account of PostgreSQL passes through
        async with running_postgres(Path(folder) / "data", max_connections="50") as postgres:
            await migrate(postgres.dsn)
            yield postgres


@asynccontextmanager
async def over(
    postgres: Postgres, *, user: str = "parley", **settings: Any
) -> AsyncGenerator[tuple[httpx2.AsyncClient, Proxy], None]:
    """A gateway over a server that comes and goes."""
    async with demo_provider() as demo, proxy_to(postgres.dial) as proxy:
        await apply_demo(postgres.dsn, demo, MODELS)
        dsn = f"postgresql://{user}@127.0.0.1:{proxy.port}/parley?sslmode=disable"
        async with serving(dsn, **{**FAST, **settings}) as client:
            yield client, proxy


@pytest.mark.parametrize("way", ["fast", "immediate"])
async def test_d1_a_restart_in_mid_run_is_a_pause(postgres: Postgres, way: str) -> None:
    async with over(postgres) as (client, _):
        accepted = await ask(client, "calm")
        async with reading(client, accepted["streaming_url"]) as reader:
            await reader.has(30)
            await (postgres.stop() if way == "fast" else postgres.crash())
            await postgres.start()
            events = await reader.end()
        assert_whole(events, "completed")
        assert await poll(client, accepted["streaming_url"]) == events, "what was read is what is stored"
        look = await asyncpg.connect(postgres.dsn)
        assert await look.fetchval("select attempt from streaming_sessions") == 1, "nobody was declared dead"
        assert await look.fetchval("select content from messages where role = 'assistant'") == text_of(events)
        await look.close()
        await until_ready(client)


async def test_d4_every_backend_ended_at_once_is_a_hiccup(site: Open) -> None:
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            for count in (20, 50, 80):
                await reader.has(count)
                await home.end_backends()
                began = monotonic()
                await reader.has(count + 10)
                assert monotonic() - began < 2
            events = await reader.end()
        assert_whole(events, "completed")
        assert (await home.row(accepted))["attempt"] == 1
        await home.assert_works()


# -- D2, D3, D6, D13: it is away


async def test_d2_an_outage_shorter_than_the_bounds_is_a_pause_with_heartbeats(site: Open) -> None:
    async with site(sse_heartbeat_s=0.2, unsaved_s=20) as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            home.proxy.close()
            await _assert_away(home)
            beats = reader.beats
            await until(lambda: _more_beats(reader, beats + 5))
            assert not reader.closed, "nobody was sent away"
            home.proxy.open()
            back = monotonic()
            await until_ready(home.client)
            await home.assert_works()
            assert monotonic() - back < 5
            events = await reader.end()
        assert_whole(events, "completed")
        assert (await home.row(accepted))["attempt"] == 1


async def _more_beats(reader: Reader, count: int) -> bool:
    return reader.beats >= count


async def _assert_away(home: Site) -> None:
    """G12: alive, not ready, new work refused soon with the time to come back."""
    await until(lambda: _status(home, "/readyz", 503))
    await until(lambda: _status(home, "/api/conversation-health", 503))
    refused, took = await home.post()
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert took < 2
    assert (await home.client.get("/livez")).status_code == 200
    assert (await home.client.get("/api/conversation-health")).json()["status"] == "unhealthy"


async def _status(home: Site, path: str, status: int) -> bool:
    return (await home.client.get(path)).status_code == status


async def test_d3_a_run_that_could_not_be_saved_in_time_has_failed_when_the_database_is_back(site: Open) -> None:
    async with site(unsaved_s=0.5) as home:
        accepted = await home.ask("slow", session_id="long")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            home.proxy.close()
            await _assert_closed(home.demo)
            await until(lambda: _status(home, "/readyz", 503))
            home.proxy.open()
            back = monotonic()
            await until_ready(home.client)
            assert (await home.post())[0].status_code == 200
            assert monotonic() - back < 5
            events = await reader.end()
        assert_whole(events, "failed", error="log_unavailable")
        kept = await home.look.fetchrow(
            "select content, status from messages where chat_id = 'long' and role <> 'user'"
        )
        assert kept is not None
        assert tuple(kept) == (text_of(events), "partial")
        following = await home.ask("quick", session_id="long")
        assert_whole(await poll(home.client, following["streaming_url"]), "completed")


@pytest.mark.parametrize("reads", ["nothing arrives", "no answer arrives"])
async def test_d6_a_database_that_hangs_is_as_one_that_is_away(site: Open, reads: str) -> None:
    async with site(sse_heartbeat_s=0.2) as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            home.proxy.stall(answers_only=reads == "no answer arrives")
            # Whoever asks before that is known waits no longer, either.
            refused, took = await home.post()
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
            assert took < 2
            began = monotonic()
            assert (await home.client.get("/readyz")).status_code == 503
            assert (await home.client.get("/api/conversation-health")).status_code == 503
            assert monotonic() - began < 3
            await _assert_away(home)
            assert not reader.closed
            home.proxy.cut()
            home.proxy.open()
            back = monotonic()
            await until_ready(home.client)
            await home.assert_works()
            assert monotonic() - back < 5
            events = await reader.end()
        assert_whole(events, "completed")
        assert (await home.row(accepted))["attempt"] == 1


async def test_d6_connections_that_are_dead_without_a_word_are_replaced(site: Open) -> None:
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            home.proxy.forsake()
            forsaken = monotonic()
            await until(lambda: _status(home, "/readyz", 503))
            await until_ready(home.client)
            await home.assert_works()
            assert monotonic() - forsaken < 7
            events = await reader.end()
        assert_whole(events, "completed")
        assert (await home.row(accepted))["attempt"] == 1


async def test_d13_a_read_only_server_is_as_one_that_is_away(site: Open) -> None:
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            name = await home.look.fetchval("select current_database()")
            await home.look.execute(f"alter database {name} set default_transaction_read_only = on")
            await home.end_backends()
            await _assert_away(home)
            assert (await home.client.get(accepted["streaming_url"])).json()["session_status"] == "active", "reads work"
            await home.look.execute(f"alter database {name} reset default_transaction_read_only")
            await home.end_backends()
            await until_ready(home.client)
            events = await reader.end()
        assert_whole(events, "completed")
        await home.assert_works()


# -- D7, D10, D11, D14: it is there and has not all that is asked of it

_FULL = """
create function full_disk() returns trigger language plpgsql as
$$ begin raise exception 'no space left on device' using errcode = '53100'; end $$
"""


async def test_d7_a_full_disk_stops_writing_and_nothing_else(site: Open) -> None:
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            # The SQLSTATE of a full disk, from the server itself.
            await home.look.execute(_FULL)
            for table in ("streaming_events", "messages"):
                await home.look.execute(
                    f"create trigger full_disk before insert on {table} for each row execute function full_disk()"
                )
            await until(lambda: _failing(home, "log"))
            refused, _ = await home.post()
            assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")
            seen = (await home.client.get(accepted["streaming_url"], params={"limit": 5000})).json()
            assert seen["events"] == reader.events, "reads work"
            assert not reader.closed
            for table in ("streaming_events", "messages"):
                await home.look.execute(f"drop trigger full_disk on {table}")
            events = await reader.end()
        assert_whole(events, "completed")
        await home.assert_works()


async def _failing(home: Site, name: str) -> bool:
    return name in (await home.client.get("/readyz?verbose")).json()["failing"]


async def test_d10_connections_that_are_refused_are_tried_again(postgres: Postgres) -> None:
    look = await asyncpg.connect(postgres.dsn)
    await look.execute("create role few login; grant parley to few; alter role few set role = 'parley'")
    async with over(postgres, user="few") as (client, _):
        accepted = await ask(client, "calm")
        async with reading(client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            await look.execute("alter role few connection limit 0")
            await look.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'few'")
            await until_refused(client)
            assert not reader.closed
            await look.execute("alter role few connection limit -1")
            back = monotonic()
            await until_ready(client)
            assert monotonic() - back < 5
            events = await reader.end()
        assert_whole(events, "completed")
        assert await look.fetchval("select attempt from streaming_sessions") == 1
    await look.close()


async def until_refused(client: httpx2.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while (await client.get("/readyz")).status_code == 200:
            await asyncio.sleep(0.02)
    body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello"}
    refused = await client.post("/api/process-message", json=body)
    assert (refused.status_code, refused.json()["code"]) == (503, "database_unavailable")


async def test_d11_a_lock_on_the_log_delays_it(site: Open) -> None:
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            async with home.look.transaction():
                await home.look.execute("lock table streaming_events in exclusive mode")
                # Longer than lock_timeout: at least one flush was refused by then.
                await until(lambda: _failing(home, "log"))
            events = await reader.end()
        assert_whole(events, "completed")


async def test_d14_a_migration_while_answers_run_disturbs_nobody(site: Open) -> None:
    """What migrations do to tables in use: columns, indexes and new tables, in a transaction each."""
    tables = ("replicas", "replica_beats", "streaming_sessions", "streaming_events", "messages", "chats",
              "conversation_sessions", "queued_messages", "usage_ledger", "chatbots", "idempotency_keys")  # fmt: skip
    async with site() as home:
        accepted = await home.ask("calm")
        async with reading(home.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            for number, table in enumerate(tables):
                async with home.look.transaction():
                    await home.look.execute(f"alter table {table} add column later text default 'soon'")
                    await home.look.execute(f"create index later_{number} on {table} (later)")
                answer, _ = await home.post()
                assert answer.status_code == 200, answer.text
            assert not reader.closed
            events = await reader.end()
        assert_whole(events, "completed")
        assert (await home.row(accepted))["attempt"] == 1
        await home.assert_works()
        assert (await home.client.get("/readyz?verbose")).json()["failing"] == []


# -- D9: it has committed, and nobody heard


async def test_d9_commits_whose_answers_are_lost_are_found_not_repeated(postgres: Postgres) -> None:
    """A standby that never answers holds back the answer of each COMMIT, which has happened all the same."""
    look = await asyncpg.connect(postgres.dsn)
    async with over(postgres) as (client, _):
        accepted = await ask(client, "calm")
        async with reading(client, accepted["streaming_url"]) as reader:
            await reader.has(20)
            await look.execute("alter system set synchronous_standby_names = 'nobody'")
            await look.execute("select pg_reload_conf()")
            posting = asyncio.ensure_future(_post_once(client))
            # The flush, and the accept.
            await until(lambda: _waiting(look, 2))
            await look.execute("alter system reset synchronous_standby_names")
            await look.execute("select pg_terminate_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
            await look.execute("select pg_reload_conf()")
            first = await posting
            # Another connection of the pool may have waited, too, and find itself ended when it is used next.
            again = await _post_once(client, again_at=("starting", "database_unavailable"))
            assert (first.status_code, again.status_code) == (503, 200), (first.text, again.text)
            assert again.headers["idempotent-replayed"] == "true"
            events = await reader.end()
        assert_whole(events, "completed")
        # Nobody runs it until it is looked for; whether it is ended or begun again then is the takeover's business.
        late = await poll(client, again.json()["streaming_url"])
        assert [event["id"] for event in late] == list(range(1, len(late) + 1))
        assert late[-1]["event"] == "stream_end"
        assert await look.fetchval("select count(*) from messages where id = 'once'") == 1
    await look.close()


async def _post_once(client: httpx2.AsyncClient, *, again_at: tuple[str, ...] = ("starting",)) -> httpx2.Response:
    body = {"user_id": "ann", "chatbot_id": "quick", "message_text": "Hello", "client_message_id": "once"}
    async with asyncio.timeout(10):
        while (response := await client.post("/api/process-message", json=body)).json().get("code") in again_at:
            await asyncio.sleep(0.01)
    return response


async def _waiting(look: Connection, count: int) -> bool:
    waiting: int = await look.fetchval("select count(*) from pg_stat_activity where wait_event = 'SyncRep'")
    return waiting >= count
