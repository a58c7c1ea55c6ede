"""What is built: every part of one server once, those before others that these others need."""

import asyncio
from collections.abc import Sequence

from app.access.stream_token import SigningKey
from app.conversations.news import News
from app.gateway.allowances import Allowances
from app.gateway.answering import Answering
from app.gateway.door import Door
from app.gateway.periodic import Periodic
from app.gateway.resources import Resources
from app.gateway.runs import Runs
from app.gateway.streaming import Streaming
from app.gateway.watch import Watch
from app.settings import Settings
from app.sync.changes import Changes
from app.sync.figures import Figures
from app.sync.nudges import Nudges


class Parts:
    """Nothing of it runs yet, and nothing has asked the database."""

    def __init__(
        self, settings: Settings, resources: Resources, *, signing_keys: Sequence[SigningKey], tasks: asyncio.TaskGroup
    ) -> None:
        pool = resources.pool
        self.settings = settings
        self.resources = resources
        self.watch = watch = Watch(pool)
        self.door = Door(settings, resources, watch=watch, signing_keys=signing_keys)
        self.allowances = Allowances(settings)
        self.streaming = streaming = Streaming(settings, resources, watch=watch)
        self.runs = runs = Runs(settings, resources, watch=watch, streaming=streaming, tasks=tasks)
        self.answering = answering = Answering(settings, resources, watch=watch, streaming=streaming, runs=runs)
        self.periodic = Periodic(settings, resources, watch=watch, streaming=streaming, runs=runs, answering=answering)
        self.changes = Changes(streaming.replica, resources.wall)
        self.figures = Figures(pool, watch.metrics)
        self.nudges = Nudges(pool, streaming.topics)
        self.news = News(pool, streaming.topics)
