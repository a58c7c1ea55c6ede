"""The log of answers' events: who writes it, who reads it, and how the replicas hear of each other."""

from app.flows.quotas import settle
from app.gateway.resources import Resources
from app.gateway.watch import Watch
from app.settings import Settings
from app.streams.appending import Appender
from app.streams.bus import Bus, NotifyBus, PollBus
from app.streams.hub import Hub
from app.streams.lifeline import Lifeline
from app.streams.log import Limits, Log
from app.streams.partitions import Partitions
from app.streams.replicas import Replica
from app.streams.seats import Seats
from app.streams.stream import Streams
from app.streams.tail import Tail
from app.streams.topics import Topics


class Streaming:
    """`topics` are told of what the replica commits, `bus.gone` of another replica whose lifeline broke."""

    def __init__(self, settings: Settings, resources: Resources, *, watch: Watch) -> None:
        dsn, pool = resources.dsn, resources.pool
        self.replica = Replica(pool, reserve=resources.reserve, lease_s=settings.lease_s)
        self.hub = Hub(max_events=settings.reader_events, max_bytes=settings.reader_bytes)
        self.appender = Appender(dsn, self.replica)
        self.log = Log(self.appender, self.replica, self.hub, limits=_limits(settings), metrics=watch.metrics)
        self.topics = Topics()
        self.replica.on_commit = self.topics.change
        self.bus = self._bus(settings, dsn, watch=watch)
        self.lifeline = Lifeline(dsn, self.replica, on_gone=self.bus.gone.set)
        self.partitions = Partitions(pool, days_ahead=settings.partition_days)
        self.streams = Streams(pool, self.replica, settle=settle)
        self.tail = Tail(resources.wall, self.hub, self.log, at_once=resources.share)
        self.seats = _seats(settings)

    def _bus(self, settings: Settings, dsn: str, *, watch: Watch) -> Bus:
        if settings.bus == "poll":
            return PollBus()
        return NotifyBus(
            settings.listen_url or dsn,
            hub=self.hub,
            event_log=self.log,
            metrics=watch.metrics,
            failing=watch.failing,
            topics=self.topics,
        )


def _limits(settings: Settings) -> Limits:
    return Limits(
        flush_events=settings.flush_events,
        flush_gap_s=settings.flush_gap_ms / 1000,
        stream_bytes=settings.stream_buffer,
        total_bytes=settings.replica_buffer,
        unsaved_s=settings.unsaved_s,
    )


def _seats(settings: Settings) -> Seats:
    return Seats(most=settings.max_readers, per_user=settings.user_readers, per_stream=settings.stream_readers)
