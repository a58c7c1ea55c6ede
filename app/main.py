"""The composition root: every part made once, and wired by hand."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

import asyncpg
import structlog
from starlette.applications import Starlette
from starlette.middleware import Middleware

from app import health, problems
from app.access.anybody import anybody
from app.access.client import trusted_proxies
from app.access.credentials import Credentials, require_safe
from app.access.keys import Keys
from app.access.limits import limits_of
from app.access.links import Links
from app.access.principal import Daily, Principal
from app.access.rates import Rate
from app.access.signing import Signing, given_keys
from app.access.stream_token import SigningKey
from app.access.user_tokens import user_tokens
from app.chats import endpoints as chat_endpoints
from app.chats.allowance import Allowance
from app.chats.decoders import Decoders
from app.chats.images import Images
from app.chats.picture import Limits as PictureLimits
from app.chats.usage import UsageDays
from app.conversations.batch import Bounds as PassBounds
from app.conversations.news import News
from app.conversations.passes import Passes
from app.conversations.reconcile import Reconcile
from app.conversations.upkeep import Upkeep, each_source
from app.conversations.webhook import secrets_of
from app.errors import Misconfigured, Unavailable
from app.flows.abandonment import Abandonment
from app.flows.beginning import Beginning, Memory
from app.flows.call import Means
from app.flows.chatbots import Chatbots
from app.flows.ending import Ending
from app.flows.erasure import Erasure
from app.flows.incoming import Incoming
from app.flows.intake import Intake
from app.flows.queue import Room
from app.flows.quotas import Quotas, settle
from app.flows.runner import Bounds, Runner
from app.flows.stopping import Stopping
from app.flows.takeover import Patience, Takeover
from app.flows.turns import Turns
from app.jobs.retention import Retention
from app.jobs.runs import next_of
from app.jobs.schedule import discovery_cron, expiring, jobs
from app.jobs.scheduler import Scheduler
from app.journal import Journal
from app.postgres import AWAY, Leadership, Pool, open_pool, wait_for_database, warm
from app.providers.provider import Deadlines, Effort
from app.providers.reach import Reach
from app.providers.registry import Providers
from app.routes import State, routes
from app.safe import Safe
from app.schema import require_current
from app.settings import Settings
from app.streams.bus import Bus, NotifyBus, PollBus
from app.streams.hub import Hub
from app.streams.lifeline import Lifeline
from app.streams.log import Limits, Log
from app.streams.partitions import Partitions
from app.streams.replicas import Fenced, Replica
from app.streams.seats import Seats
from app.streams.stream import Streams
from app.streams.tail import Tail
from app.streams.topics import Topics
from app.sync.changes import Changes
from app.sync.figures import Figures
from app.sync.nudges import Nudges
from app.telemetry import Metrics, RequestIds
from app.ticker import every, whenever
from app.wall import Wall

log = structlog.get_logger(__name__)

# How often somebody looks whether a periodic job is due.
_JOBS_S = 10
# How often a replica looks which keys sign: one that was taken away is believed no longer than this.
_SIGNING_S = 30
# How often figures of users' exchanges are written, all of them in one statement.
_FIGURES_S = 30
# How often every replica tells what the sources' states say.
_TELL_S = 30
_LEADER = 0x7061_726C_6579_0003
# How long telling the others that this replica leaves may take, in seconds.
_GOODBYE_S = 1
# Connections for heartbeats and health alone, so that they never wait for anybody's work.
_RESERVE = 2
# Connections behind the wall beside those of readers: for stopping, for what waits, for pictures.
_ORDERS = 2
# Bodies of uploads in memory at once, in largest ones. Each is there twice while it is read and parsed.
_UPLOADS = 3
# Conversations of other programs that are read at once.
_READINGS = 4
# Chats that are exported at once: each holds a connection and a snapshot.
_EXPORTS = 3
# Files that are imported at once: of each some megabytes are in memory, twice.
_IMPORTS = 3
# Bodies of more than a megabyte that are compared at once: their parts are in memory, some ten times as large.
_HISTORIES = 3
# How long a stopping server waits for accepts that were under way, in seconds; longer than one waits for locks.
_ACCEPTS_S = 5
# How long the loops of a server that has drained may take to end, in seconds.
_LAST_S = 1


@dataclass(slots=True)
class Life:
    """What the server's owner and the app tell each other: it serves; it shall leave; it has drained."""

    serving: asyncio.Event = field(default_factory=asyncio.Event)
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    drained: asyncio.Event = field(default_factory=asyncio.Event)


def create_app(settings: Settings, life: Life | None = None) -> Starlette:
    """The gateway over `settings.database_url`, which may still be down: it serves as soon as the database does.

    Raises Misconfigured where it would let everybody in, or lacks a key that a setting names.
    """
    require_safe(settings)
    Reach.parse(settings.provider_networks)
    signing_keys, safe = given_keys(settings), Safe.of(settings.master_key)
    limits_of(settings, Metrics())
    secrets_of(settings)
    app = Starlette(
        routes=routes(settings),
        middleware=[Middleware(RequestIds)],
        exception_handlers=problems.HANDLERS,
        lifespan=partial(_lifespan, settings, life or Life(), signing_keys, safe),
    )
    # A path with a slash too many is an unknown path, not a redirect that drops the body of a POST.
    app.router.redirect_slashes = False
    return app


@asynccontextmanager
async def _lifespan(
    settings: Settings, life: Life, signing_keys: Sequence[SigningKey], safe: Safe, _: Starlette
) -> AsyncGenerator[State, None]:
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(_pool(settings, settings.pool_size))
        reserve = await stack.enter_async_context(_pool(settings, _RESERVE))
        wall = await stack.enter_async_context(_wall(settings, pool))
        providers = Providers(
            deadlines=Deadlines(settings.connect_timeout_s, settings.first_token_timeout_s, settings.gap_timeout_s),
            concurrency=settings.provider_concurrency,
            safe=safe,
            reach=Reach.parse(settings.provider_networks),
        )
        stack.push_async_callback(providers.aclose)
        providers.preload()
        decoders = Decoders(_picture_limits(settings), processes=settings.image_decoders)
        stack.push_async_callback(decoders.aclose)
        async with asyncio.TaskGroup() as tasks:
            gateway = Gateway(
                settings,
                life,
                signing_keys=signing_keys,
                safe=safe,
                pool=pool,
                reserve=reserve,
                wall=wall,
                providers=providers,
                decoders=decoders,
                tasks=tasks,
            )
            loops = [tasks.create_task(loop) for loop in gateway.loops()]
            leaving = tasks.create_task(gateway.drain_when_asked())
            yield gateway.state
            life.leave.set()
            await leaving
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops, timeout=_LAST_S)
            # asyncpg waits for ever until a server that hangs has cancelled what a loop was asking.
            pool.terminate()


@asynccontextmanager
async def _pool(settings: Settings, size: int) -> AsyncGenerator[Pool, None]:
    assert settings.database_url is not None
    pool = await open_pool(settings.database_url, size)
    try:
        yield pool
    finally:
        # Not close(): it waits for ever where the server hangs, and nothing is under way any more.
        pool.terminate()


def _wall(settings: Settings, pool: Pool) -> AbstractAsyncContextManager[Wall]:
    assert settings.database_url is not None
    return Wall(pool, demand=settings.row_security).open(settings.database_url, _share(settings) + _ORDERS)


class Gateway:
    """All parts of one server and the loops that keep them going."""

    def __init__(
        self,
        settings: Settings,
        life: Life,
        *,
        signing_keys: Sequence[SigningKey],
        safe: Safe,
        pool: Pool,
        reserve: Pool,
        wall: Wall,
        providers: Providers,
        decoders: Decoders,
        tasks: asyncio.TaskGroup,
    ) -> None:
        assert settings.database_url is not None
        self._failing: set[str] = set()
        self._settings = settings
        self._life = life
        self._dsn = settings.database_url
        self._pool, self._reserve, self._wall = pool, reserve, wall
        self._metrics = metrics = Metrics()
        self._journal = journal = Journal(pool, metrics)
        self._replica = replica = Replica(pool, reserve=reserve, lease_s=settings.lease_s)
        self._hub = hub = Hub(max_events=settings.reader_events, max_bytes=settings.reader_bytes)
        self._log = event_log = Log(self._dsn, replica, hub, limits=_limits(settings), metrics=metrics)
        self._topics = topics = Topics()
        replica.on_commit = topics.change
        self._nudges = nudges = Nudges(pool, topics)
        self._figures = figures = Figures(pool, metrics)
        self._news = news = News(pool, topics)
        self._bus = bus = self._open_bus()
        self._partitions = Partitions(pool, days_ahead=settings.partition_days)
        self._streams = streams = Streams(pool, replica, settle=settle)
        tail = Tail(wall, hub, event_log, at_once=_share(settings))
        ending = Ending(streams, metrics)
        self._runner = runner = Runner(
            tasks,
            event_log,
            ending=ending,
            means=Means(providers, Effort(settings.provider_retries), journal, metrics, settings.answer_limit),
            bounds=Bounds(settings.max_runs, settings.run_timeout_s),
        )
        tail.user_of = runner.user_of
        chatbots = Chatbots(pool)
        images = Images(wall, decoders)
        memory = Memory(settings.history_limit, settings.history_bytes)
        quotas = _quotas(settings, metrics)
        beginning = Beginning(streams, chatbots=chatbots, images=images, memory=memory)
        self._takeover = Takeover(
            pool,
            replica,
            streams,
            hub=hub,
            event_log=event_log,
            tail=tail,
            beginning=beginning,
            runner=runner,
            ending=ending,
            journal=journal,
            metrics=metrics,
            patience=Patience(settings.owners, settings.restart_age_s),
        )
        self._lifeline = Lifeline(self._dsn, replica, on_gone=bus.gone.set)
        self._intake = intake = Intake(
            pool,
            replica,
            streams,
            bus=bus,
            beginning=beginning,
            runner=runner,
            key_s=self._key_s,
            user_runs=settings.user_runs,
            room=Room(settings.queue_limit, settings.user_queue),
            quotas=quotas,
            at_once=_share(settings),
        )
        self._turns = turns = Turns(
            pool,
            replica,
            wall=wall,
            hub=hub,
            bus=bus,
            streams=streams,
            beginning=beginning,
            runner=runner,
            quotas=quotas,
        )
        runner.on_end = turns.give_next
        self._stopping = stopping = Stopping(wall, streams, bus=bus, tail=tail, runner=runner, turns=turns)
        erasure = Erasure(pool, stopping, turns)
        self._abandonment = Abandonment(hub, streams, runner)
        self._leadership = Leadership(self._dsn, _LEADER)
        retention = Retention(pool, expiring(settings, chatbots=chatbots, turns=turns))
        self._passes = passes = Passes(
            pool=pool,
            bounds=PassBounds(seconds=settings.discovery_pass_s, sessions=settings.discovery_batch),
            metrics=metrics,
            failing=self._failing,
        )
        self._reconcile = Reconcile(pool=pool, passes=passes, metrics=metrics)
        self._scheduler = Scheduler(
            pool=pool,
            replica=replica,
            leadership=self._leadership,
            jobs=jobs(
                replica,
                partitions=self._partitions,
                retention=retention,
                upkeep=Upkeep(self._dsn),
                passes=passes,
                usage_days=UsageDays(pool),
                reconcile=self._reconcile,
                erasure=erasure,
                settings=settings,
            ),
            metrics=metrics,
            failing=self._failing,
        )
        tokens = user_tokens(settings)
        self._issuer = tokens.issuer if tokens else None
        self._signing = Signing(pool, given=signing_keys, safe=safe)
        links = Links(
            None if settings.auth == "open" else self._signing,
            run_s=settings.run_timeout_s,
            queue=settings.queue_limit,
        )
        self._uploads = Allowance(_UPLOADS * settings.upload_limit, of="uploads", each=settings.upload_limit)
        self.state = State(
            passes=passes,
            webhook_secrets=secrets_of(settings),
            discovery_cron=discovery_cron(settings),
            discovery_next=partial(next_of, pool, "discovery"),
            credentials=Credentials(
                settings.auth,
                Keys(pool),
                anybody=anybody(settings),
                tokens=tokens.principal if tokens else None,
                links=links,
            ),
            links=links,
            proxies=trusted_proxies(settings),
            limits=limits_of(settings, metrics),
            settings=settings,
            pool=pool,
            wall=wall,
            discover=partial(each_source, passes),
            probe=health.Probe(reserve, on_silence=self._distrust),
            failing=self._failing,
            metrics=metrics,
            journal=journal,
            error_rows=Rate(problems.ROWS),
            replica=replica,
            hub=hub,
            bus=bus,
            seats=_seats(settings),
            tail=tail,
            runner=runner,
            chatbots=chatbots,
            safe=safe,
            intake=intake,
            turns=turns,
            stopping=stopping,
            images=images,
            uploads=self._uploads,
            readings=Allowance(_READINGS, of="readings of sources", each=1),
            changes=Changes(replica, wall),
            erasure=erasure,
            exports=Allowance(_EXPORTS, of="exports", each=1),
            nudges=nudges,
            figures=figures,
            imports=Allowance(_IMPORTS, of="imports", each=1),
            news=news,
            histories=Allowance(_HISTORIES, of="histories", each=1),
            admit_upload=replica.admit,
            admit_question=partial(_admit_question, intake),
            analyse=partial(_analyse, intake),
        )

    @property
    def _key_s(self) -> float:
        return self._settings.idempotency_hours * 3600

    def _open_bus(self) -> Bus:
        if self._settings.bus == "poll":
            return PollBus()
        return NotifyBus(
            self._settings.listen_url or self._dsn,
            hub=self._hub,
            event_log=self._log,
            metrics=self._metrics,
            failing=self._failing,
            topics=self._topics,
        )

    def loops(self) -> list[Coroutine[None, None, None]]:
        """Everything that runs for as long as the server does."""
        settings = self._settings
        return [
            self._log.run(),
            self._come_up(),
            every(settings.poll_s, self._look_around, name="look around", failing=self._failing),
            every(1, self._journal.run_once, name="journal", failing=self._failing),
            every(_FIGURES_S, self._figures.run_once, name="figures", failing=self._failing),
            whenever(self._topics.wanted, self._topics.tell_once, name="topics", failing=self._failing),
            whenever(self._nudges.wanted, self._nudges.look_once, name="nudges", failing=self._failing),
            whenever(self._news.wanted, self._news.look_once, name="news", failing=self._failing),
            *([self._issuer.run(self._failing)] if self._issuer else []),
        ]

    async def _look_around(self) -> None:
        (self._failing.add if self._log.waiting else self._failing.discard)("log")
        self._hub.look_around(self._log.owns)
        self._nudges.look_around()
        self._news.look_around()

    async def _come_up(self) -> None:
        """Wait for a usable database, register, then keep beating, scanning and making partitions."""
        while not await self._usable():
            await asyncio.sleep(1)
        self._replica.refusal = None
        self._life.serving.set()
        log.info("serving", replica=str(self._replica.id))
        scan_s, failing, bus = self._settings.scan_s, self._failing, self._bus
        async with asyncio.TaskGroup() as tasks:
            for loop in (
                bus.run(),
                every(self._settings.beat_s, self._beat, name="beat", failing=failing),
                every(scan_s, self._takeover.run_once, name="takeover", failing=failing, sooner=bus.gone),
                every(scan_s, self._stopping.run_once, name="stopping", failing=failing, sooner=bus.stop),
                every(scan_s, self._look_after, name="turns", failing=failing),
                every(_TELL_S, self._passes.tell, name="sources", failing=failing),
                every(_TELL_S, self._reconcile.tell, name="rounds", failing=failing),
                every(_SIGNING_S, self._signing.run_once, name="stream keys", failing=failing),
                self._run_jobs(),
            ):
                tasks.create_task(loop)
            if self._settings.suspect:
                tasks.create_task(self._lifeline.run(failing))

    async def _usable(self) -> bool:
        try:
            await wait_for_database(self._dsn, float("inf"), lambda reason: log.warning("database_waiting", why=reason))
            async with self._pool.acquire() as connection:
                await require_current(connection)
                await self._wall.look_for_role(connection)
            await self._signing.run_once()
            await self._partitions.run_once()
            await self._replica.register()
            await warm(self._pool, self._settings.pool_size // 2)
        except (Misconfigured, *AWAY, asyncpg.PostgresError) as error:
            detail = error.detail if isinstance(error, Misconfigured) else str(error)
            log.warning("database_waiting", why=detail)
            self._replica.refusal = Unavailable("starting", f"The server is starting: {detail}", retry_after=2)
            return False
        return True

    async def _run_jobs(self) -> None:
        try:
            await every(_JOBS_S, self._scheduler.run_once, name="jobs", failing=self._failing)
        finally:
            self._leadership.give_up()

    async def _look_after(self) -> None:
        await self._turns.run_once()
        await self._abandonment.run_once()

    async def _beat(self) -> None:
        if self._log.fenced:
            await self._renew()
        try:
            await self._replica.beat()
        except Fenced as fenced:
            # Nothing was written that would have told.
            self._log.fence(fenced)
            await self._renew()
        except TimeoutError:
            await self._distrust()
            raise

    async def _distrust(self) -> None:
        """One connection is dead without a word: none of the others is used again, so that nobody waits in vain."""
        for pool in (self._pool, self._reserve):
            await pool.expire_connections()
        await self._wall.expire()
        self._log.disconnect()

    async def _renew(self) -> None:
        await self._replica.renew()
        self._log.fenced = False
        log.warning("replica_renewed", replica=str(self._replica.id))

    async def drain_when_asked(self) -> None:
        """Refuse new work, let answers and uploads end, leave the others to whoever lives, send the readers away at a
        frame boundary.
        """
        await self._life.leave.wait()
        self._replica.refusal = Unavailable("draining", "The server is stopping; ask another one.", retry_after=1)
        try:
            began = monotonic()
            await self._intake.close(_ACCEPTS_S)
            left = max(0, self._settings.drain_s - (monotonic() - began))
            await asyncio.gather(self._runner.drain(left), self._uploads.settle(left))
            async with asyncio.timeout(_GOODBYE_S):
                await self._streams.let_go()
                await self._replica.retire()
                await self._bus.tell_gone()
                await self._journal.run_once()
                await self._figures.run_once()
        except (*AWAY, asyncpg.PostgresError) as error:
            log.warning("goodbye_failed", error=type(error).__name__)
        finally:
            self._hub.close()
            self._nudges.close()
            self._news.close()
            self._life.drained.set()


async def _analyse(intake: Intake, question: chat_endpoints.Question) -> chat_endpoints.Analysis:
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
    accepted = await intake.accept(incoming)
    return chat_endpoints.Analysis(streaming_session_id=accepted.streaming_session_id)


async def _admit_question(intake: Intake, user_id: str, chatbot_id: str, principal: Principal) -> None:
    await intake.admit(Incoming(user_id, chatbot_id, "", principal=principal))


def _quotas(settings: Settings, metrics: Metrics) -> Quotas:
    user = Daily(settings.quota_user_messages, settings.quota_user_tokens)
    return Quotas(user=user, key=Daily(settings.quota_key_messages, settings.quota_key_tokens), metrics=metrics)


def _picture_limits(settings: Settings) -> PictureLimits:
    return PictureLimits(settings.image_pixels, settings.image_side, settings.image_bytes, settings.image_timeout_s)


def _share(settings: Settings) -> int:
    """Connections for readers, and as many for accepting messages: a flood of either leaves some for all the rest."""
    return max(1, (settings.pool_size - 2) // 2)


def _seats(settings: Settings) -> Seats:
    return Seats(most=settings.max_readers, per_user=settings.user_readers, per_stream=settings.stream_readers)


def _limits(settings: Settings) -> Limits:
    return Limits(
        flush_events=settings.flush_events,
        flush_gap_s=settings.flush_gap_ms / 1000,
        stream_bytes=settings.stream_buffer,
        total_bytes=settings.replica_buffer,
        unsaved_s=settings.unsaved_s,
    )
