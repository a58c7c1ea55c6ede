"""Streams that nobody runs any more are ended, whatever kept the first one from it."""

import asyncio

from tests.house import House, Open
from tests.sse import read_stream


async def _status(home: House, stream_id: str) -> str:
    status: str = await home.database.fetchval("select status from streaming_sessions where id = $1", stream_id)
    return status


async def test_a_run_whose_end_could_not_be_written_is_ended_by_a_later_pass(house: Open) -> None:
    async with house(scan_s=0.1) as home:
        # Not a database that is away, which is waited for, but one that refuses what it is told.
        await home.database.execute("alter table messages add constraint odd check (role <> 'assistant') not valid")
        answer = (await home.post(session_id="s")).json()
        other = (await home.post(session_id="other")).json()
        async with asyncio.timeout(5):
            while (
                await home.database.fetchval("select count(*) from streaming_events where payload like '%flow_end%'")
                < 2
            ):
                pass
        assert await _status(home, answer["streaming_session_id"]) == "active"
        await home.database.execute("alter table messages drop constraint odd")
        for accepted in (answer, other):
            frames = await asyncio.wait_for(read_stream(home.client, accepted["streaming_url"]), 30)
            assert [frame.number for frame in frames] == list(range(1, len(frames) + 1))
            assert [frame.event for frame in frames].count("stream_end") == 1
            assert frames[-1].data["data"]["status"] == "completed"
        assert (await home.post(session_id="s")).status_code == 200


async def test_the_takeover_of_one_stream_does_not_hinder_the_others(house: Open) -> None:
    async with house(scan_s=0.1, lease_s=0.3, beat_s=0.1) as home:
        await home.ask()
        await home.database.execute("insert into replicas (id, version, alive) values (gen_random_uuid(), 'x', false)")
        make = """
            with s as (
                insert into streaming_sessions
                    (id, user_id, session_id, chatbot_id, chatbot_version, flow_type, status, replica_id)
                select ($1 || substr(gen_random_uuid()::text, 9))::uuid, 'u', 's', 'quick', $2, 'main', 'active', r.id
                from replicas r where not alive returning id)
            insert into streaming_events (stream_id, id, payload)
            select s.id, 1, $3 from s returning stream_id
        """
        day = (await home.database.fetchval("select max(id::text) from streaming_sessions"))[:8]
        broken = await home.database.fetchval(make, day, 1, '{"event":"token","da')
        whole = await home.database.fetchval(make, day, 99, '{"event":"stream_start","data":{}}')
        async with asyncio.timeout(20):
            while await _status(home, whole) == "active":
                await asyncio.sleep(0.05)
        assert await _status(home, whole) == "failed"
        assert await _status(home, broken) == "active"
