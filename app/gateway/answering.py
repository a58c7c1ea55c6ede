"""From a message that is sent to the end of its answer: accepted, queued, taken over, stopped, or erased."""

from app.access.principal import Daily, Principal
from app.chats.endpoints import Analysis, Question
from app.flows.abandonment import Abandonment
from app.flows.closing import Closing
from app.flows.erasure import Erasure
from app.flows.incoming import Incoming
from app.flows.intake import Intake
from app.flows.queue import Room
from app.flows.quotas import Quotas
from app.flows.stopping import Stopping
from app.flows.takeover import Patience, Takeover
from app.flows.turns import Turns
from app.flows.waiting import Waiting
from app.gateway.resources import Resources
from app.gateway.runs import Runs
from app.gateway.streaming import Streaming
from app.gateway.watch import Watch
from app.settings import Settings
from app.telemetry import Metrics

_HOUR_S = 3600.0


class Answering:
    """Each of these begins runs, or ends them; at the end of a run the next message has its turn."""

    def __init__(
        self, settings: Settings, resources: Resources, *, watch: Watch, streaming: Streaming, runs: Runs
    ) -> None:
        pool, wall = resources.pool, resources.wall
        replica, hub, bus = streaming.replica, streaming.hub, streaming.bus
        streams, tail = streaming.streams, streaming.tail
        beginning, runner = runs.beginning, runs.runner
        quotas = _quotas(settings, watch.metrics)
        self.intake = Intake(
            pool,
            replica,
            streams,
            bus=bus,
            beginning=beginning,
            runner=runner,
            quotas=quotas,
            key_s=settings.idempotency_hours * _HOUR_S,
            user_runs=settings.user_runs,
            room=Room(settings.queue_limit, settings.user_queue),
            at_once=resources.share,
        )
        self.waiting = Waiting(
            replica, wall, hub=hub, bus=bus, streams=streams, beginning=beginning, runner=runner, quotas=quotas
        )
        self.turns = Turns(
            pool, replica, hub=hub, streams=streams, beginning=beginning, runner=runner, waiting=self.waiting
        )
        runner.on_end = self.turns.give_next
        self.takeover = Takeover(
            pool,
            replica,
            streams,
            hub=hub,
            tail=tail,
            beginning=beginning,
            runner=runner,
            closing=Closing(streaming.log, runner, ending=runs.ending, journal=watch.journal),
            metrics=watch.metrics,
            patience=Patience(settings.owners, settings.restart_age_s),
        )
        self.stopping = Stopping(wall, streams, bus=bus, tail=tail, runner=runner, waiting=self.waiting)
        self.abandonment = Abandonment(hub, streams, runner)
        self.erasure = Erasure(pool, self.stopping, self.waiting)

    async def admit_question(self, user_id: str, chatbot_id: str, principal: Principal) -> None:
        """Before its picture is read: raises what accepting it would."""
        await self.intake.admit(Incoming(user_id, chatbot_id, "", principal=principal))

    async def analyse(self, question: Question) -> Analysis:
        """A question about an uploaded picture is a message like any other; without a user it is nobody's."""
        incoming = Incoming(
            question.user_id or "",
            question.chatbot_id,
            question.text,
            configuration=question.configuration,
            image_id=str(question.image.id),
            request_id=question.request_id,
            principal=question.principal,
        )
        accepted = await self.intake.accept(incoming)
        return Analysis(streaming_session_id=accepted.streaming_session_id)


def _quotas(settings: Settings, metrics: Metrics) -> Quotas:
    user = Daily(settings.quota_user_messages, settings.quota_user_tokens)
    return Quotas(user=user, key=Daily(settings.quota_key_messages, settings.quota_key_tokens), metrics=metrics)
