"""The leader's clock: each slot once, whoever looks and whoever dies."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from structlog.testing import capture_logs

from app.jobs import runs
from app.jobs.runs import JobRun
from app.jobs.schedule import SCHEDULE, Job
from app.jobs.scheduler import Scheduler, complaint
from app.postgres import Leadership, open_pool
from app.settings import load
from app.streams.replicas import Replica
from app.telemetry import Metrics
from tests.house import Open

NOON = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


@asynccontextmanager
async def scheduler(database: str, *jobs: Job) -> AsyncGenerator[Scheduler, None]:
    pool = await open_pool(database, 3)
    made = Scheduler(
        pool=pool,
        replica=Replica(pool),
        leadership=Leadership(database, 77),
        jobs=jobs,
        metrics=Metrics(),
        failing=set(),
    )
    try:
        yield made
    finally:
        made.leadership.give_up()
        await made.pool.close()
        await asyncio.sleep(0)  # what was given up is closed in the loop's next turn


def counted(done: list[str], name: str = "retention") -> Job:
    async def run_once() -> int:
        done.append(name)
        return 5

    return Job(name, run_once)


async def at(one: Scheduler, database: str, moment: datetime) -> None:
    """Move the database's clock for all connections to come, and take such."""
    name = database.partition("?")[0].rpartition("/")[2]
    await one.pool.execute(f"alter database {name} set parley.now = '{moment.isoformat()}'")
    await one.pool.close()
    one.pool = await open_pool(database, 3)


async def test_a_job_runs_at_once_and_then_in_every_slot_once(database: str) -> None:
    done: list[str] = []
    async with scheduler(database, counted(done)) as one:
        for minutes, times in ((0, 1), (0, 1), (9, 1), (10, 2), (10, 2), (55, 3), (59, 3)):
            await at(one, database, NOON + timedelta(minutes=minutes))
            await one.run_once()
            assert len(done) == times, minutes
        run = (await runs.all_runs(one.pool))["retention"]
        assert (run.next_at, run.done, run.failures) == (NOON + timedelta(minutes=60), 5, 0)


async def test_t4_a_clock_that_steps_back_repeats_nothing(database: str) -> None:
    done: list[str] = []
    async with scheduler(database, counted(done)) as one:
        for minutes in (0, 10, 5, 9, 10, -60):
            await at(one, database, NOON + timedelta(minutes=minutes))
            await one.run_once()
    assert len(done) == 2


async def test_one_of_many_leads_and_another_when_it_has_gone(database: str) -> None:
    done: list[str] = []
    async with scheduler(database, counted(done)) as one, scheduler(database, counted(done)) as two:
        assert [await one.run_once(), await two.run_once()] == [1, 0]
        assert [await one.leadership.held(), await two.leadership.held()] == [True, False]
        # Killed: its connection ends, and with it the lock.
        await two.pool.execute(
            "select pg_terminate_backend(pid) from pg_locks where locktype = 'advisory' and objid = 77"
        )
        async with asyncio.timeout(10):
            while not await two.leadership.held():
                pass
        assert not await one.leadership.held()


async def test_two_that_both_believe_to_lead_run_a_slot_once(database: str) -> None:
    done: list[str] = []
    async with scheduler(database, counted(done)) as one, scheduler(database, counted(done)) as two:
        two.leadership = Leadership(database, 78)
        for _ in range(3):
            await asyncio.gather(one.run_once(), two.run_once())
    assert len(done) == 1


async def test_a_job_that_fails_is_told_of_and_the_next_one_runs(database: str) -> None:
    done: list[str] = []

    async def broken() -> None:
        raise ValueError("no")

    async with scheduler(database, Job("partitions", broken), counted(done)) as one:
        for hour in range(5):
            await at(one, database, NOON + timedelta(hours=hour))
            await one.run_once()
            assert len(done) == hour + 1
        run = (await runs.all_runs(one.pool))["partitions"]
        assert (run.failures, run.error) == (5, "ValueError: no")
        await one.run_once()
        assert one.failing == {"job partitions"}
        one.jobs = [counted(done, "partitions"), counted(done)]
        await at(one, database, NOON + timedelta(hours=6))
        await one.run_once()
        await one.run_once()
        assert one.failing == set()


@pytest.mark.parametrize(
    ("name", "minutes", "failures", "wrong"),
    [
        ("retention", 19, 0, False),
        ("retention", 21, 0, True),
        ("partitions", 119, 0, False),
        ("partitions", 121, 0, True),
        ("retention", 0, 3, False),
        ("retention", 0, 4, True),
    ],
)
def test_what_is_worth_an_alert(name: str, minutes: int, failures: int, wrong: bool) -> None:
    run = JobRun(NOON, None, None, None, failures, "x")
    assert (complaint(name, run, NOON + timedelta(minutes=minutes)) is not None) == wrong


async def test_every_job_of_the_schedule_runs_in_a_server(house: Open) -> None:
    async with house() as home:
        for name in SCHEDULE:
            row = await home.row(f"select failures, error from job_runs where name = '{name}' and ended_at is not null")
            assert (row["failures"], row["error"]) == (0, None)
        told = (await home.client.get("/metrics")).text
        assert 'parley_job_runs_total{job="retention",outcome="done"} 1.0' in told


async def test_a_job_that_hangs_is_given_up_and_the_next_one_runs(database: str) -> None:
    done: list[str] = []

    async def hangs() -> None:
        await asyncio.Event().wait()

    async with scheduler(database, Job("partitions", hangs), counted(done)) as one:
        one.limit_s = 0.05
        async with asyncio.timeout(10):
            await one.run_once()
        assert done == ["retention"]
        assert (await runs.all_runs(one.pool))["partitions"].failures == 1


async def test_failures_that_never_come_in_a_row_are_told_by_their_share(database: str) -> None:
    passes = 0

    async def every_tenth_fails() -> None:
        nonlocal passes
        passes += 1
        if passes % 10 == 0:
            raise ValueError("no")

    async with scheduler(database, Job("retention", every_tenth_fails)) as one:
        with capture_logs() as logs:
            for _ in range(20):
                await one.pool.execute("update job_runs set next_at = parley_now()")
                await one.run_once()
    told = [line for line in logs if line["event"] == "job_unreliable"]
    assert [(line["error_rate"], line["passes"]) for line in told] == [(0.1, 20)]


async def test_a_job_that_has_never_run_is_told_of(database: str) -> None:
    """As when another process holds the lock and does nothing."""
    async with scheduler(database, counted([])) as one, scheduler(database) as holder:
        assert await holder.leadership.held()
        await one.replica.register()
        await at(one, database, NOON)
        # An older replica, which has led until now, may be of a version without this job.
        await one.pool.execute("update replicas set started_at = $1", NOON - timedelta(days=9))
        await one.run_once()
        assert one.failing == set()
        await at(one, database, NOON + timedelta(minutes=21))
        await one.run_once()
        assert one.failing == {"job retention"}


async def test_every_replica_tells_what_the_table_says(database: str) -> None:
    async with scheduler(database, counted([])) as one, scheduler(database, counted([])) as two:
        await at(one, database, NOON)
        await one.run_once()
        await two.run_once()
        value = two.metrics.registry.get_sample_value
        assert value("parley_job_due_timestamp_seconds", {"job": "retention"}) == NOON.timestamp() + 600
        assert value("parley_job_ended_timestamp_seconds", {"job": "retention"}) == NOON.timestamp()
        assert value("parley_job_failures", {"job": "retention"}) == 0


def test_what_discovery_and_roll_ups_are_switched_by(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENABLE_BACKGROUND_JOBS", "false")
    assert load().enable_background_jobs is False
