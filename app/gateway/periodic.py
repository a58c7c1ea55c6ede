"""What one replica does now and then for all of them; and the passes over sources, which others ask for too."""

from app.chats.usage import UsageDays
from app.conversations.batch import Bounds
from app.conversations.message_words import MessageWords
from app.conversations.passes import Passes
from app.conversations.reconcile import Reconcile
from app.conversations.upkeep import Upkeep
from app.gateway.answering import Answering
from app.gateway.resources import Resources
from app.gateway.runs import Runs
from app.gateway.streaming import Streaming
from app.gateway.watch import Watch
from app.jobs.retention import Retention
from app.jobs.schedule import expiring, jobs
from app.jobs.scheduler import Scheduler
from app.postgres import Leadership
from app.settings import Settings

_LEADER = 0x7061_726C_6579_0003


class Periodic:
    """`leadership` says whether this replica is the one."""

    def __init__(
        self,
        settings: Settings,
        resources: Resources,
        *,
        watch: Watch,
        streaming: Streaming,
        runs: Runs,
        answering: Answering,
    ) -> None:
        pool = resources.pool
        self.passes = Passes(
            pool=pool,
            bounds=Bounds(seconds=settings.discovery_pass_s, sessions=settings.discovery_batch),
            metrics=watch.metrics,
            failing=watch.failing,
        )
        self.reconcile = Reconcile(pool=pool, passes=self.passes, metrics=watch.metrics)
        self.leadership = Leadership(resources.dsn, _LEADER)
        expired = expiring(settings, chatbots=runs.chatbots, waiting=answering.waiting)
        work = {
            "partitions": streaming.partitions.run_once,
            "retention": Retention(pool, expired).run_once,
            "index": Upkeep(pool, resources.dsn).run_once,
            "replicas": streaming.replica.forget_dead,
            "usage": UsageDays(pool).run_once,
            "erasure": answering.erasure.run_once,
            "discovery": self.passes.run_once,
            "reconcile": self.reconcile.run_once,
            "messages": MessageWords(pool, settings.search_messages).run_once,
        }
        self.scheduler = Scheduler(
            pool=pool,
            replica=streaming.replica,
            leadership=self.leadership,
            jobs=jobs(settings, work),
            metrics=watch.metrics,
            failing=watch.failing,
        )
