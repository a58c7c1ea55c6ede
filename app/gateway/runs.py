"""What begins, runs and ends answers, whoever wants them: a message, a turn, or a takeover."""

import asyncio

from app.chats.images import Images
from app.flows.beginning import Beginning, Memory
from app.flows.call import Means
from app.flows.chatbots import Chatbots
from app.flows.ending import Ending
from app.flows.runner import Bounds, Runner
from app.gateway.resources import Resources
from app.gateway.streaming import Streaming
from app.gateway.watch import Watch
from app.providers.provider import Effort
from app.settings import Settings


class Runs:
    """Runs are tasks of `tasks`. What runs here, `streaming.tail` need not look up."""

    def __init__(
        self, settings: Settings, resources: Resources, *, watch: Watch, streaming: Streaming, tasks: asyncio.TaskGroup
    ) -> None:
        streams, metrics = streaming.streams, watch.metrics
        self.chatbots = Chatbots(resources.pool)
        self.images = Images(resources.wall, resources.decoders)
        self.beginning = Beginning(
            streams,
            chatbots=self.chatbots,
            images=self.images,
            memory=Memory(settings.history_limit, settings.history_bytes),
        )
        self.ending = Ending(streams, metrics)
        effort = Effort(settings.provider_retries)
        self.runner = Runner(
            tasks,
            streaming.log,
            ending=self.ending,
            means=Means(resources.providers, effort, watch.journal, metrics, settings.answer_limit),
            bounds=Bounds(settings.max_runs, settings.run_timeout_s),
        )
        streaming.tail.user_of = self.runner.user_of
