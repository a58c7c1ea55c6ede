"""Streams of dead replicas: declare the silent ones dead, claim what they left, and begin it again or end it.

The two steps are separate commits (G6, G7). What the log says of a run is read back, so that nothing that has ended
is paid for twice and nothing is shown twice without a word (G8).
"""

import asyncio
from dataclasses import dataclass

import structlog

from app.errors import Invalid, NotFound
from app.flows.beginning import Beginning
from app.flows.closing import Closing
from app.flows.past import OWNER_LOST, Past
from app.flows.run import CANCELLED, Failure, Run
from app.flows.runner import Runner
from app.postgres import Pool
from app.streams.hub import Hub
from app.streams.replicas import Fenced, Replica
from app.streams.stream import Orphan, Stream, Streams
from app.streams.tail import Tail
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

# Streams claimed per pass, how many of them are seen to at once, and events read at once.
_CLAIMED = 50
_AT_ONCE = 4
_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Patience:
    """How many replicas may own an answer one after the other, and until which age in seconds it is begun again."""

    owners: int = 3
    age_s: float = 3600


class Takeover:
    """A pass looks for silent replicas and claims this one's share of their streams, as many as it can run."""

    def __init__(
        self,
        pool: Pool,
        replica: Replica,
        streams: Streams,
        *,
        hub: Hub,
        tail: Tail,
        beginning: Beginning,
        runner: Runner,
        closing: Closing,
        metrics: Metrics,
        patience: Patience,
    ) -> None:
        self._pool = pool
        self._replica = replica
        self._streams = streams
        self._hub = hub
        self._tail = tail
        self._beginning = beginning
        self._runner = runner
        self._closing = closing
        self._metrics = metrics
        self._patience = patience
        self._places = asyncio.Semaphore(_AT_ONCE)
        # A claim got no answer: there may be streams of ours that nobody runs.
        self._unsure = False

    async def run_once(self) -> int:
        """Returns how many streams were taken over. Nothing happens on a replica that is leaving."""
        if self._serving and self._replica.may_fence():
            for replica_id in await self._replica.fence_silent():
                log.warning("replica_declared_dead", replica=str(replica_id), because="it is silent")
        taken = 0
        while self._serving and (orphans := await self._claim()):
            async with asyncio.TaskGroup() as tasks:
                for orphan in orphans:
                    tasks.create_task(self._take(orphan))
            taken += len(orphans)
        return taken

    @property
    def _serving(self) -> bool:
        return self._replica.refusal is None

    async def _claim(self) -> list[Orphan]:
        under_way = self._runner.under_way
        if self._unsure:
            await self._streams.doubt_all_but(under_way)
        room = self._runner.room
        self._unsure = True
        orphans = await self._streams.claim(
            min(_CLAIMED, room) or _CLAIMED, owners=self._patience.owners, ends_only=not room, under_way=under_way
        )
        self._unsure = False
        return orphans

    async def _take(self, orphan: Orphan) -> None:
        stream = orphan.stream
        async with self._places:
            try:
                # What is stopping here still, under the fence of an earlier incarnation, is found by a later pass.
                if not self._runner.runs(stream.id):
                    await self._go_on(orphan)
                    self._streams.settle(stream.id)
            except Fenced:
                log.warning("run_lost", streaming_session_id=str(stream.id), reason="Fenced")
            except Exception:  # around one stream: the others of this pass must be seen to all the same
                log.exception("takeover_failed", streaming_session_id=str(stream.id))

    async def _go_on(self, orphan: Orphan) -> None:
        stream, past = orphan.stream, await self._recall(orphan.stream)
        outcome = self._end_of(orphan) or await self._run(orphan)
        if isinstance(outcome, Run):
            self._runner.start(outcome, past)
            for flow in orphan.stop or ():
                self._runner.stop(stream.id, CANCELLED, flow)
            # What was committed before it was ours was not published here.
            self._hub.stir(stream.id)
        else:
            await self._closing.end(stream, past, outcome)
        self._metrics.takeovers.labels("restarted" if isinstance(outcome, Run) else "ended").inc()
        how = "begun again" if isinstance(outcome, Run) else f"ended: {outcome.code}"
        log.info("stream_taken_over", streaming_session_id=str(stream.id), owner=orphan.attempt, how=how)

    def _end_of(self, orphan: Orphan) -> Failure | None:
        """Why it is not begun again."""
        if orphan.stop == []:
            return CANCELLED
        lost = orphan.attempt > self._patience.owners or orphan.age_s > self._patience.age_s
        return OWNER_LOST if lost or orphan.request is None else None

    async def _run(self, orphan: Orphan) -> Run | Failure:
        try:
            return await self._beginning.again(self._pool, orphan)
        except (NotFound, Invalid) as gone:
            return Failure(gone.code, gone.detail)

    async def _recall(self, stream: Stream) -> Past:
        """What the log holds of it."""
        past = Past(last_id=0)
        while payloads := await self._tail.read(stream.id, past.last_id, _PAGE):
            for payload in payloads:
                past.recall(payload)
        past.close()
        return past
