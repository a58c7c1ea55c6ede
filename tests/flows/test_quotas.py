"""Daily quotas: never exceeded by any number of replicas, refused before a row is written, exact when all has ended."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count, product
from typing import Any

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.access import keys
from app.access.principal import Daily
from app.chats.chat import Message, estimated_tokens
from app.flows.beginning import Prepared
from app.flows.conditions import Ask
from app.flows.config import ANSWER_TOKENS, Chatbot
from app.flows.file import parse
from app.flows.incoming import Incoming
from app.flows.plan import plan
from app.flows.quotas import Quotas, estimate, usage_expiring
from app.flows.wishes import Wishes
from app.postgres import open_pool
from app.telemetry import Metrics
from tests.flows.test_admission import post, rows
from tests.flows.test_images import inline
from tests.house import House, Open, flow, open_house
from tests.serving import serving

MUTE = flow(wishes={"fault": "silent"})
BOTS: dict[str, Any] = {
    "good": {"flows": {"main": flow("Yes, of course.")}},
    "broken": {"flows": {"main": flow("No.", wishes={"fault": "status", "status": 400})}},
    "mute": {"flows": {"main": MUTE}},
    "small": {"flows": {"main": MUTE}, "daily_messages": 2},
    "seeing": {"flows": {"main": MUTE | {"images": True}}, "daily_messages": 1},
}
_UNFINISHED = "select count(*) from streaming_sessions where status in ('queued', 'active')"
_BLOCKED = """
select count(distinct l.pid) from pg_locks l join pg_stat_activity a using (pid)
where not l.granted and a.datname = current_database()
"""
_SPENT = "select coalesce(sum(prompt_tokens + completion_tokens), 0) from usage_ledger"


async def usage(home: House, subject: str = "user:ann") -> dict[str, int]:
    row = await home.database.fetchrow("select * from quota_usage where subject = $1", subject)
    return {name: row[name] for name in row.keys() if name.endswith(("used", "reserved"))} if row else {}  # noqa: SIM118


async def all_ended(home: House) -> None:
    async with asyncio.timeout(20):
        while await home.database.fetchval(_UNFINISHED):
            await asyncio.sleep(0.01)


def assert_used_up(response: httpx2.Response, subject: str, soon: bool = False) -> None:
    assert (response.status_code, response.json()["code"]) == (429, "quota_exceeded"), response.text
    assert f"This {subject} may have" in response.json()["detail"]
    assert (int(response.headers["retry-after"]) <= 5) == soon


async def test_what_two_replicas_accept_at_once_never_exceeds_a_quota(house: Open, database: str) -> None:
    given: dict[str, Any] = {"quota_user_messages": 7}
    async with house(**given) as home, serving(database, drain_s=0, **given) as other:
        await home.apply(**BOTS)
        before = await rows(home)
        clients = (home.client, other) * 20
        answers = await asyncio.gather(*(post(client, client_message_id=f"m{n}") for n, client in enumerate(clients)))
        accepted = [answer.json() for answer in answers if answer.status_code == 200]
        assert len(accepted) == 7
        for answer in answers:
            if answer.status_code != 200:
                assert_used_up(answer, "user", soon=True)
        after = await rows(home)
        for table in ("conversation_sessions", "streaming_sessions", "messages", "idempotency_keys", "chats"):
            assert after[table] - before[table] == 7
        assert (await usage(home))["messages_reserved"] == 7
        assert (await post(other, user_id="bob")).status_code == 200
        for number, answer in enumerate(accepted):
            await clients[number].post(f"{answer['streaming_url']}/cancel")
        async with asyncio.timeout(10):
            while (await usage(home))["messages_reserved"]:
                await asyncio.sleep(0.01)
        # They had been asked of the provider.
        assert (await usage(home))["messages_used"] == 7
        assert_used_up(await post(home.client), "user")


async def test_a_quota_ends_with_its_day(house: Open) -> None:
    async with house(quota_user_messages=1) as home:
        await home.ask()
        assert_used_up(refused := await home.post(), "user")
        left = """
            select extract(epoch from date_trunc('day', t) + interval '1 day' - t)
            from (select now() at time zone 'utc' as t) now
        """
        assert 0 <= int(refused.headers["retry-after"]) - float(await home.database.fetchval(left)) <= 5
        await home.database.execute("update quota_usage set day = day - 1")
        assert (await home.post()).status_code == 200
        metrics = (await home.client.get("/metrics")).text
        assert 'parley_limited_total{limit="daily_messages",of="user"} 1.0' in metrics


async def test_tokens_are_reserved_by_an_estimate_and_used_as_the_ledger_has_them(house: Open) -> None:
    async with house({"slow": "demo?fault=silent"}, quota_user_tokens=3000) as home:
        stream = (await home.post("slow")).json()["streaming_url"]
        held = (await usage(home))["tokens_reserved"]
        assert ANSWER_TOKENS < held < ANSWER_TOKENS + 100
        assert (await home.post("slow")).status_code == 200
        assert_used_up(await home.post("slow"), "user", soon=True)
        await home.client.post(f"{stream}/cancel")
        await home.ask()
        assert await usage(home) == {
            "messages_used": 2,
            "messages_reserved": 1,
            "tokens_used": await home.database.fetchval(_SPENT),
            "tokens_reserved": held,
        }
        assert (await usage(home))["tokens_used"] > 0
        await home.database.execute("update quota_usage set tokens_used = 3000")
        assert_used_up(await home.post(), "user")


async def test_a_quota_smaller_than_an_estimate_is_used_all_the_same(house: Open) -> None:
    async with house(quota_user_tokens=10) as home:
        assert (await home.ask())[1][-1].data["data"]["status"] == "completed"
        assert (await usage(home))["tokens_reserved"] == 0
        assert_used_up(await home.post(), "user")


async def test_a_key_and_a_chatbot_have_quotas_too_and_the_smallest_counts(database: str) -> None:
    async with open_house(database, auth="keys", quota_key_messages=3, quota_user_messages=100) as home:
        await home.apply(**BOTS)
        own = await keys.create(home.database, "own", ["process"], daily=Daily(messages=1))
        usual = await keys.create(home.database, "usual", ["process"])
        body = {"chatbot_id": "mute", "message_text": "Hello"}

        async def ask(key: str, user: str, **fields: Any) -> httpx2.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return await home.client.post(
                "/api/process-message", json={**body, "user_id": user, **fields}, headers=headers
            )

        assert (await ask(own, "ann")).status_code == 200
        assert_used_up(await ask(own, "bob"), "key", soon=True)
        for number in range(2):
            assert (await ask(usual, f"u{number}", chatbot_id="small")).status_code == 200
        before = await home.database.fetch("select * from quota_usage order by subject")
        assert_used_up(await ask(usual, "cid", chatbot_id="small"), "chatbot", soon=True)
        assert await home.database.fetch("select * from quota_usage order by subject") == before, "all or nothing"
        assert (await ask(usual, "u0")).status_code == 200
        assert_used_up(await ask(usual, "u0"), "key", soon=True)
        assert (await usage(home, "user:u0"))["messages_reserved"] == 2


async def test_what_is_refused_stores_no_picture_either(house: Open) -> None:
    async with house() as home:
        await home.apply(**BOTS)
        assert (await post(home.client, "seeing")).status_code == 200
        before = await rows(home)
        assert_used_up(await post(home.client, "seeing", image_data=inline()), "chatbot", soon=True)
        upload = {"chatbot_id": "seeing", "image_data": inline(), "user_id": "ann", "message_text": "What is it?"}
        assert_used_up(await home.client.post("/api/upload-image", json=upload), "chatbot", soon=True)
        after = await rows(home)
        assert after | {"streaming_events": 0} == before | {"streaming_events": 0}


async def test_g11_a_repetition_takes_nothing_and_is_answered_though_all_is_used_up(house: Open) -> None:
    async with house(quota_user_messages=1) as home:
        first = await home.post(client_message_id="m")
        assert (await home.post(client_message_id="m")).json() == first.json()
        await all_ended(home)
        assert (await home.post(client_message_id="m")).json() == first.json()
        assert (await usage(home))["messages_used"] == 1


async def test_what_waits_holds_its_place_and_gives_it_back_when_it_is_removed(house: Open) -> None:
    async with house(quota_user_messages=3) as home:
        await home.apply(**BOTS)
        first = (await post(home.client, session_id="s")).json()
        waiting = [await post(home.client, "good", session_id="s", client_message_id=f"m{n}") for n in range(2)]
        assert [answer.json()["status"] for answer in waiting] == ["queued"] * 2
        assert_used_up(await post(home.client, session_id="s"), "user", soon=True)
        await home.client.request("DELETE", "/api/sessions/s/queue/m0?user_id=ann")
        assert (await usage(home))["messages_reserved"] == 2
        await home.client.post(f"{first['streaming_url']}/cancel")
        await all_ended(home)
        assert (await usage(home))["messages_used"] == 2
        assert (await usage(home))["messages_reserved"] == 0


async def test_what_waits_holds_tokens_for_its_history_and_for_the_text_that_it_has_now(
    house: Open, database: str
) -> None:
    quotas: dict[str, Any] = {"quota_user_tokens": 12_000}
    async with house(**quotas) as home, serving(database, drain_s=0, **quotas) as other:
        await home.apply(**BOTS)
        said = "word " * 1000
        first = (await post(home.client, session_id="s", message_text=said)).json()
        running = (await usage(home))["tokens_reserved"]
        await post(home.client, "good", session_id="s", client_message_id="m")
        short = (await usage(home))["tokens_reserved"] - running
        assert short > ANSWER_TOKENS + estimated_tokens(said), "what was said before is told to the model again"

        async def edit(client: httpx2.AsyncClient, text: str) -> httpx2.Response:
            return await client.patch("/api/sessions/s/queue/m?user_id=ann", json={"message_text": text})

        assert (await edit(home.client, said)).status_code == 200
        grown = (await usage(home))["tokens_reserved"] - running
        assert grown - short == estimated_tokens(said) - estimated_tokens("Hello")
        queued = "select user_id, text from queued_messages"
        before = (await usage(home), await home.database.fetch(queued))
        assert_used_up(await edit(other, said * 6), "user", soon=True)
        assert (await usage(home), await home.database.fetch(queued)) == before
        assert (await edit(other, "Hello")).status_code == 200
        assert (await usage(home))["tokens_reserved"] - running == short
        await home.client.post(f"{first['streaming_url']}/cancel")
        await all_ended(home)
        assert (await usage(home))["tokens_reserved"] == 0


async def test_of_two_texts_that_grow_at_once_a_quota_has_room_for_one(house: Open, database: str) -> None:
    quotas: dict[str, Any] = {"quota_user_tokens": 12_000}
    async with house(**quotas) as home, serving(database, drain_s=0, **quotas) as other:
        await home.apply(**BOTS)
        text = {"message_text": "word " * 3500}
        for session, message in product("st", ("runs", "waits")):
            answer = await post(home.client, session_id=session, client_message_id=f"{session}-{message}")
            assert answer.status_code == 200
        async with asyncio.TaskGroup() as tasks, home.database.transaction():
            await home.database.execute("select 1 from quota_usage for update")
            edits = [
                tasks.create_task(client.patch(f"/api/sessions/{one}/queue/{one}-waits?user_id=ann", json=text))
                for one, client in (("s", home.client), ("t", other))
            ]
            async with asyncio.timeout(5):
                while await home.database.fetchval(_BLOCKED) < 2:
                    pass
        answers = [edit.result() for edit in edits]
        assert sorted(answer.status_code for answer in answers) == [200, 429]
        assert (await usage(home))["tokens_reserved"] <= 12_000


async def test_at_its_turn_a_message_holds_what_its_history_has_become(house: Open) -> None:
    async with house(quota_user_tokens=4000) as home:
        await home.apply(talks={"flows": {"main": flow(wishes={"tokens": "1500", "first_ms": "500"})}}, **BOTS)
        await post(home.client, "talks", session_id="s")
        held = (await usage(home))["tokens_reserved"]
        waits = (await post(home.client, session_id="s")).json()
        assert waits["status"] == "queued"
        held = (await usage(home))["tokens_reserved"] - held
        turn = f"select 1 from streaming_sessions where status = 'active' and id = '{waits['streaming_session_id']}'"
        await home.row(turn)
        answer = await home.database.fetchval("select content from messages where role = 'assistant'")
        assert (await usage(home))["tokens_reserved"] - held == estimated_tokens(answer) > 1000
        # It was accepted, so it is answered; whoever comes now is told.
        assert_used_up(await post(home.client, session_id="t"), "user", soon=True)
        await home.client.post(f"{waits['streaming_url']}/cancel")
        await all_ended(home)
        assert (await usage(home))["tokens_reserved"] == 0


async def test_an_answer_that_failed_is_given_back(house: Open) -> None:
    async with house(quota_user_messages=1) as home:
        await home.apply(**BOTS)
        for _ in range(2):
            assert (await home.ask("broken"))[1][-1].data["data"]["status"] == "failed"
            assert set((await usage(home)).values()) == {0}


async def test_an_answer_that_the_log_has_lost_is_given_back_too(house: Open) -> None:
    async with house({"slow": "demo?delay_ms=5&tokens=400"}, quota_user_tokens=100_000) as home:
        stream = (await home.post("slow")).json()["streaming_session_id"]
        # Somebody else's event, where one of ours has to be soon.
        await home.database.execute(
            "insert into streaming_events (stream_id, id, payload) select $1, max(id) + 30, '{}'"
            " from streaming_events where stream_id = $1",
            stream,
        )
        await all_ended(home)
        ended = await home.row(f"select error_code from conversation_processing_metrics where stream_id = '{stream}'")
        assert ended["error_code"] == "log_lost"
        held = await usage(home)
        assert (held["messages_reserved"], held["tokens_reserved"], held["messages_used"]) == (0, 0, 0)


async def test_where_nothing_has_a_quota_nothing_is_asked(house: Open) -> None:
    quotas = Quotas(user=Daily(), key=Daily(), metrics=Metrics())
    nobody: Any = None
    assert quotas.of("ann", Chatbot({}, (), ()), chatbot_id="x", principal=None) == []
    await quotas.require(nobody, [])
    async with house() as home:
        await home.ask()
        assert await home.count("quota_usage") == 0
        assert await home.count("streaming_sessions where quota_day is not null") == 0


async def test_old_days_are_forgotten(database: str) -> None:
    pool = await open_pool(database, 1)
    try:
        for days in (0, 20, 40, 400):
            await pool.execute(
                "insert into quota_usage (day, subject) values (current_date - $1::int, 'user:ann')", days
            )
        old = usage_expiring(35 * 86400)
        assert (await old.expired(pool, 100)).rows == 2
        assert await old.clean(pool, 100) == 2
        assert await pool.fetchval("select count(*) from quota_usage") == 2
    finally:
        await pool.close()


# -- whatever happens in whatever order


class Ward:
    """Two replicas and a user with a quota, whatever is done to the messages."""

    QUOTA = 6

    def __init__(self, home: House, other: httpx2.AsyncClient) -> None:
        self.home = home
        self._clients = (home.client, other)
        self._urls: list[str] = []
        self._ids = count()

    async def do(self, act: str, number: int, replica: int) -> None:
        client = self._clients[replica]
        session = {"session_id": f"s{number % 3}", "client_message_id": f"m{next(self._ids)}"}
        if act == "stop":
            if self._urls:
                await client.post(f"{self._urls[number % len(self._urls)]}/cancel")
            return
        if act == "remove":
            queue = (await client.get(f"/api/sessions/s{number % 3}/queue?user_id=ann")).json()
            for waiting in queue.get("messages", [])[:1]:
                path = f"/api/sessions/s{number % 3}/queue/{waiting['message_id']}?user_id=ann"
                await client.request("DELETE", path)
            return
        if act == "edit":
            queue = (await client.get(f"/api/sessions/s{number % 3}/queue?user_id=ann")).json()
            for waiting in queue.get("messages", [])[:1]:
                path = f"/api/sessions/s{number % 3}/queue/{waiting['message_id']}?user_id=ann"
                await client.patch(path, json={"message_text": "word " * (1 + number * 100)})
            return
        fields = session | ({"on_busy": "interrupt"} if act == "interrupt" else {})
        answer = await post(client, "mute" if act == "interrupt" else act, **fields)
        assert answer.status_code in (200, 409) or answer.json()["code"] == "quota_exceeded", answer.text
        if answer.status_code == 200:
            self._urls.append(answer.json()["streaming_url"])

    async def check(self) -> None:
        held = await usage(self.home)
        if held:
            assert min(held.values()) >= 0
            assert held["messages_used"] + held["messages_reserved"] <= self.QUOTA

    async def end(self) -> None:
        async with asyncio.timeout(30):
            while await self.home.database.fetchval(_UNFINISHED):
                rows = await self.home.database.fetch(
                    "select id from streaming_sessions where status in ('queued', 'active')"
                )
                for row in rows:
                    await self._clients[0].post(f"/api/stream-events/{row['id']}/cancel")
        if held := await usage(self.home):
            counted = """
                select count(*) from (select stream_id from usage_ledger group by stream_id
                having bool_or(outcome <> 'failed' or prompt_tokens + completion_tokens > 0)) x
            """
            assert held == {
                "messages_used": await self.home.database.fetchval(counted),
                "messages_reserved": 0,
                "tokens_used": await self.home.database.fetchval(_SPENT),
                "tokens_reserved": 0,
            }
        for table in (
            "quota_usage",
            "usage_ledger",
            "messages",
            "chats",
            "conversation_sessions",
            "streaming_sessions",
        ):
            await self.home.database.execute(f"delete from {table}")
        self._urls.clear()


@asynccontextmanager
async def warded(database: str) -> AsyncGenerator[Ward, None]:
    given: dict[str, Any] = {"quota_user_messages": Ward.QUOTA, "quota_user_tokens": 100_000, "scan_s": 0.05}
    async with open_house(database, **given) as home, serving(database, drain_s=0, **given) as other:
        await home.apply(**BOTS)
        yield Ward(home, other)


_ACT = st.tuples(
    st.sampled_from(["good", "mute", "broken", "interrupt", "stop", "remove", "edit"]),
    st.integers(0, 8),
    st.integers(0, 1),
)


async def live(ward: Ward, batches: Sequence[Sequence[tuple[str, int, int]]]) -> None:
    for batch in batches:
        await asyncio.gather(*(ward.do(*act) for act in batch))
        await ward.check()
    await ward.end()


def test_in_any_order_on_two_replicas_a_quota_holds_and_is_exact_in_the_end(database: str) -> None:
    with asyncio.Runner() as runner:
        context = warded(database)
        ward = runner.run(context.__aenter__())

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(batches=st.lists(st.lists(_ACT, min_size=1, max_size=8), min_size=1, max_size=4))
        def run(batches: list[list[tuple[str, int, int]]]) -> None:
            runner.run(live(ward, batches))

        try:
            run()
        finally:
            runner.run(context.__aexit__(None, None, None))


# -- the estimate

_TALKER = """
providers: {p: {kind: openai, base_url: "http://x/v1"}}
chatbots:
  shop:
    flows:
      intent: {provider: p, model: m, max_tokens: 10}
      main: {provider: p, model: m, max_tokens: 100}
      refund: {provider: p, model: m, max_tokens: 300, history: 0}
      mood: {provider: p, model: m, context_tokens: 2000}
    router: {flow: intent, outcomes: {refund: refund, other: main}, default: main, speculative: %s}
"""


def _estimated(text: str, history: Sequence[Message] = (), *, speculative: bool = False) -> int:
    chatbot = parse(_TALKER % str(speculative).lower()).chatbots["shop"]
    incoming = Incoming("ann", "shop", text)
    return estimate(Prepared(incoming, 1, chatbot, Wishes(), plan(chatbot, Ask(text, False, "", None))), history)


def test_an_estimate_holds_all_flows_that_may_be_asked() -> None:
    alone = _estimated("Hi")
    # The router, the side flow, and the longer of the answers.
    assert 10 + 300 + ANSWER_TOKENS < alone < 10 + 300 + ANSWER_TOKENS + 100
    assert 100 < _estimated("Hi", speculative=True) - alone < 130, "what is dropped is paid for, too"
    assert _estimated("word " * 1000) - alone > 3 * 1000
    past = [Message("user", "word " * 100)]
    assert _estimated("Hi", past) - alone > 2 * 100
    # No model reads and writes more than its budget.
    assert _estimated("Hi", past * 1000) - _estimated("Hi", past * 500) < 500 * 3 * 200


def test_an_estimate_looks_at_a_decided_answer_only() -> None:
    chatbot = parse(_TALKER % "false").chatbots["shop"]
    decided = plan(chatbot, Ask("Hi", False, "", "main"))
    prepared = Prepared(Incoming("ann", "shop", "Hi"), 1, chatbot, Wishes(), decided)
    undecided = replace(prepared, plan=plan(chatbot, Ask("Hi", False, "", None)))
    assert estimate(prepared, ()) < estimate(undecided, ()) - 100


async def test_settling_waits_for_nobody_in_a_circle(database: str) -> None:
    """Accepts and ends of the same two subjects, named the other way round, at once."""
    async with open_house(database, quota_user_messages=1000, quota_user_tokens=10**9) as home:
        await home.apply(aa=BOTS["good"] | {"daily_messages": 1000}, zz=BOTS["good"] | {"daily_tokens": 10**9})
        answers = await asyncio.gather(
            *(home.post(bot, user_id=user) for bot in ("aa", "zz") for user in ("a", "z") for _ in range(15))
        )
        assert {answer.status_code for answer in answers} == {200}
        await all_ended(home)
        for subject in ("user:a", "user:z", "chatbot:aa", "chatbot:zz"):
            held = await usage(home, subject)
            assert (held["messages_used"], held["messages_reserved"], held["tokens_reserved"]) == (30, 0, 0)
        assert not await home.database.fetchval(
            "select deadlocks from pg_stat_database where datname = current_database()"
        )
