"""What is done in the background, how often, and how it is bounded: one table."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from cronsim import CronSim, CronSimError

from app.access.audit import audit_expiring
from app.chats.images import images_expiring
from app.expiry import Expiring
from app.flows.chatbots import Chatbots
from app.flows.idempotency import keys_expiring
from app.flows.quotas import usage_expiring
from app.flows.sessions import Sessions
from app.flows.waiting import Forgotten, Waiting
from app.journal import errors_expiring, figures_expiring
from app.settings import Settings
from app.streams.retention import Events
from app.streams.stream import streams_expiring
from app.sync.compaction import DeletedChats, FailedMessages
from app.sync.figures import hours_expiring

log = structlog.get_logger(__name__)

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S


# Name, when (cron, UTC), and what bounds a pass.
SCHEDULE = {
    "partitions": "7 * * * *",  # PARLEY_PARTITION_DAYS days ahead
    "retention": "*/10 * * * *",  # seconds per pass, rows per statement
    "index": "*/5 * * * *",  # what a killed rebuild left; one rebuild where its schema is old
    "replicas": "17 * * * *",  # one row for each start in a week
    "usage": "*/5 * * * *",  # seconds per pass, rows per statement
    "erasure": "* * * * *",  # twenty users and a minute per pass, rows per statement
    "discovery": "*/5 * * * *",  # CONVERSATION_DISCOVERY_CRON; seconds per source, and sources at once
    "reconcile": "*/5 1-4 * * *",  # PARLEY_RECONCILE_CRON; seconds per source and pass
    "messages": "* * * * *",  # seconds per pass, rows per statement; nothing where all messages are not searched
}
# What ENABLE_BACKGROUND_JOBS=false stops; the others keep tables from growing, or promises.
OPTIONAL = frozenset({"usage", "discovery", "reconcile"})

Work = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Job:
    """Periodic work. `run_once` is bounded in time and rows, and returns how much it did."""

    name: str
    run_once: Work
    # When, instead of what the schedule says.
    cron: str | None = None

    def after(self, moment: datetime) -> datetime:
        """When it is due next."""
        return next(CronSim(self.cron or SCHEDULE[self.name], moment.astimezone(UTC)))


def discovery_cron(settings: Settings) -> str:
    """When discovery runs: as the setting says, or as the schedule does where nobody can read that."""
    return crons(settings)["discovery"]


def crons(settings: Settings) -> dict[str, str]:
    """When those jobs run that settings say it of."""
    return {name: cron if is_cron(cron) else SCHEDULE[name] for name, (_, cron) in _given(settings).items()}


def misread(settings: Settings) -> dict[str, str]:
    """The variables that cannot be read, with what is used instead."""
    used = crons(settings)
    return {variable: used[name] for name, (variable, cron) in _given(settings).items() if used[name] != cron}


def _given(settings: Settings) -> dict[str, tuple[str, str]]:
    return {
        "discovery": ("CONVERSATION_DISCOVERY_CRON", settings.discovery_cron),
        "reconcile": ("PARLEY_RECONCILE_CRON", settings.reconcile_cron),
    }


def is_cron(expression: str) -> bool:
    """Whether it can be read, and ever comes true."""
    try:
        next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
    except (CronSimError, StopIteration):
        return False
    return True


def interval(name: str, moment: datetime, cron: str | None = None) -> timedelta:
    """Between the next two slots of a job."""
    slots = CronSim(cron or SCHEDULE[name], moment.astimezone(UTC))
    first = next(slots)
    return next(slots) - first


def jobs(settings: Settings, work: Mapping[str, Work]) -> list[Job]:
    """What runs here of the work of all jobs, by their names: everything, or what always does."""
    assert work.keys() == SCHEDULE.keys(), "every job has its time and its work"
    when, enabled = crons(settings), settings.enable_background_jobs
    for variable, used in misread(settings).items():
        log.warning("cron_invalid", variable=variable, used=used)
    log.info("discovery_scheduled", cron=when["discovery"], enabled=enabled)
    every = [Job(name, run_once, cron=when.get(name)) for name, run_once in work.items()]
    return [job for job in every if enabled or job.name not in OPTIONAL]


def expiring(settings: Settings, *, chatbots: Chatbots, waiting: Waiting | None = None) -> Sequence[Expiring]:
    """Everything that goes after a time. Waiting messages only with `waiting`: their streams are ended by a replica."""
    assert settings.database_url is not None
    forgotten = [Forgotten(waiting, settings.keep_streams_days * _DAY_S)] if waiting else []
    return [
        *forgotten,
        Sessions(chatbots, settings.keep_sessions_days * _DAY_S),
        Events(settings.database_url, settings.keep_events_hours * _HOUR_S),
        streams_expiring(settings.keep_streams_days * _DAY_S),
        keys_expiring(settings.idempotency_hours * _HOUR_S),
        errors_expiring(settings.keep_errors_days * _DAY_S),
        figures_expiring(settings.keep_metrics_days * _DAY_S),
        hours_expiring(settings.keep_metrics_days * _DAY_S),
        audit_expiring(settings.keep_audit_days * _DAY_S),
        usage_expiring(settings.keep_quotas_days * _DAY_S),
        images_expiring(settings.keep_images_days * _DAY_S),
        DeletedChats(settings.keep_deleted_days * _DAY_S),
        FailedMessages(settings.keep_failed_days * _DAY_S),
    ]
