"""The leader's clock: jobs are begun when the database's clock says so, each slot once, and their outcome is recorded.

Every replica looks whether jobs are overdue; only one, under an advisory lock, runs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from time import perf_counter

import structlog

from app.jobs import runs
from app.jobs.runs import JobRun
from app.jobs.schedule import SCHEDULE, Job, interval
from app.postgres import AWAY, Leadership, Pool
from app.streams.replicas import Replica
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# Worth an operator's look: a pass of so many seconds, so many failures in a row.
_SLOW_S = 30
_FAILURES = 3
_OVERDUE = timedelta(minutes=10)


@dataclass(slots=True, kw_only=True)
class Scheduler:
    """`failing` is shared with the health check: a job that is overdue or fails again and again is in it."""

    pool: Pool
    replica: Replica
    leadership: Leadership
    jobs: Sequence[Job]
    metrics: Metrics
    failing: set[str]

    async def run_once(self) -> int:
        """Begin and end every job that is due, where this replica leads; returns how many."""
        now = await runs.now(self.pool)
        known = await runs.all_runs(self.pool)
        self._watch(known, now)
        if not await self.leadership.held():
            return 0
        due = [job for job in self.jobs if job.name not in known or known[job.name].next_at <= now]
        for job in due:
            if await runs.begin(self.pool, job.name, job.after(now), known.get(job.name), self.replica.id):
                await self._run(job)
        return len(due)

    async def _run(self, job: Job) -> None:
        began = perf_counter()
        done, failure = 0, None
        try:
            result = await job.run_once()
            done = result if isinstance(result, int) else len(result) if isinstance(result, list) else 0
        except Exception as error:  # noqa: BLE001  one pass of a job; the next may do better
            failure = f"{type(error).__name__}: {error}"[:300]
            log.warning("job_failed", job=job.name, error=type(error).__name__, detail=str(error)[:300])
        took = perf_counter() - began
        self.metrics.job_seconds.labels(job.name).set(took)
        self.metrics.job_runs.labels(job.name, "failed" if failure else "done").inc()
        self.metrics.job_rows.labels(job.name).inc(done)
        if took > _SLOW_S:
            log.warning("job_slow", job=job.name, seconds=round(took, 1))
        if done:
            log.info("job_done", job=job.name, done=done, seconds=round(took, 3))
        try:
            await runs.end(self.pool, job.name, done=done, error=failure)
        except AWAY as error:
            log.warning("job_unrecorded", job=job.name, error=type(error).__name__)

    def _watch(self, known: Mapping[str, JobRun], now: datetime) -> None:
        for name, run in known.items():
            wrong = name in SCHEDULE and complaint(name, run, now) is not None
            (self.failing.add if wrong else self.failing.discard)(f"job {name}")


def complaint(name: str, run: JobRun, now: datetime) -> str | None:
    """What is wrong with a job, in a sentence."""
    if run.failures > _FAILURES:
        return f"has failed {run.failures} times in a row: {run.error}"
    if now - run.next_at > max(_OVERDUE, 2 * interval(name, now)):
        return f"was due at {run.next_at:%Y-%m-%d %H:%M} UTC and has not run: is a replica up, and its database?"
    return None
