"""The leader's clock: jobs are begun when the database's clock says so, each slot once, and their outcome is recorded.

Every replica looks whether jobs are overdue; only one, under an advisory lock, runs them.
"""

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from time import perf_counter

import structlog

from app.jobs import runs
from app.jobs.runs import JobRun
from app.jobs.schedule import Job, interval
from app.postgres import AWAY, Leadership, Pool
from app.streams.replicas import Replica
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# Worth an operator's look: a pass of so many seconds, so many failures in a row.
_SLOW_S = 30
_FAILURES = 3
_OVERDUE = timedelta(minutes=10)
# And so large a share of failures among so many passes here, or fewer.
_ERROR_RATE = 0.05
_PASSES = (20, 100)
# No job takes nearly as long: each is bounded by itself. One that hangs all the same must not keep the others waiting.
_LIMIT_S = 300


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """`failing` is shared with the health check: a job that is overdue or fails again and again is in it."""

    pool: Pool
    replica: Replica
    leadership: Leadership
    jobs: Sequence[Job]
    metrics: Metrics
    failing: set[str]
    limit_s: float = _LIMIT_S
    # When this replica first looked, by the database's clock.
    _began: datetime | None = None
    # Whether each of the last passes failed, by job.
    _outcomes: defaultdict[str, deque[bool]] = field(
        default_factory=lambda: defaultdict(lambda: deque(maxlen=_PASSES[1]))
    )

    async def run_once(self) -> int:
        """Begin and end every job that is due, where this replica leads; returns how many."""
        now = await runs.now(self.pool)
        known = await runs.all_runs(self.pool)
        self._watch(known, now, await runs.serving_since(self.pool))
        if not await self.leadership.held():
            return 0
        due = [job for job in self.jobs if job.name not in known or known[job.name].next_at <= now]
        for job in due:
            next_at = job.after(now)
            if await runs.begin(self.pool, job.name, next_at, known.get(job.name), self.replica.id):
                await self._run(job, next_at)
        return len(due)

    async def _run(self, job: Job, next_at: datetime) -> None:
        began = perf_counter()
        done, failure = await self._pass(job)
        took = perf_counter() - began
        self.metrics.job_seconds.labels(job.name).set(took)
        self.metrics.job_runs.labels(job.name, "failed" if failure else "done").inc()
        self.metrics.job_rows.labels(job.name).inc(done)
        self._judge(job.name, failed=failure is not None)
        if took > _SLOW_S:
            log.warning("job_slow", job=job.name, seconds=round(took, 1))
        if done:
            log.info("job_done", job=job.name, done=done, seconds=round(took, 3), next_at=next_at.isoformat())
        try:
            await runs.end(self.pool, job.name, done=done, error=failure)
        except AWAY as error:
            log.warning("job_unrecorded", job=job.name, error=type(error).__name__)

    async def _pass(self, job: Job) -> tuple[int, str | None]:
        """How much it did, and why it failed."""
        try:
            async with asyncio.timeout(self.limit_s):
                result = await job.run_once()
        except Exception as error:  # noqa: BLE001  one pass of a job; the next may do better
            log.warning("job_failed", job=job.name, error=type(error).__name__, detail=str(error)[:300])
            return 0, f"{type(error).__name__}: {error}"[:300]
        return result if isinstance(result, int) else len(result) if isinstance(result, list) else 0, None

    def _judge(self, name: str, *, failed: bool) -> None:
        """Single failures that never come in a row are found by their share."""
        outcomes = self._outcomes[name]
        outcomes.append(failed)
        rate = sum(outcomes) / len(outcomes)
        if failed and len(outcomes) >= _PASSES[0] and rate > _ERROR_RATE:
            log.warning("job_unreliable", job=name, error_rate=round(rate, 2), passes=len(outcomes))

    def _watch(self, known: Mapping[str, JobRun], now: datetime, since: datetime | None) -> None:
        # A job that the version before does not know runs once a replica of this one leads.
        self._began = self._began or now
        since = since and max(since, self._began)
        for job in self.jobs:
            name, run = job.name, known.get(job.name)
            wrong = complaint(name, run, now, since=since, cron=job.cron) is not None
            (self.failing.add if wrong else self.failing.discard)(f"job {name}")
            if run is not None:
                self._tell(name, run)

    def _tell(self, name: str, run: JobRun) -> None:
        """Whichever replica ran it: all of them tell what the table says."""
        self.metrics.job_due.labels(name).set(run.next_at.timestamp())
        self.metrics.job_failures.labels(name).set(run.failures)
        if run.ended_at is not None:
            self.metrics.job_ended.labels(name).set(run.ended_at.timestamp())


def complaint(
    name: str, run: JobRun | None, now: datetime, *, since: datetime | None = None, cron: str | None = None
) -> str | None:
    """What is wrong with a job, in a sentence; without a run it is due `since` then, if anybody could run it."""
    if run is not None and run.failures > _FAILURES:
        return f"has failed {run.failures} times in a row: {run.error}"
    due = since if run is None else run.next_at
    if due is not None and now - due > max(_OVERDUE, 2 * interval(name, now, cron)):
        return f"was due at {due:%Y-%m-%d %H:%M} UTC and has not run: is a replica up, and its database?"
    return None
