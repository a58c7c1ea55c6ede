"""What is opened before anything is built, and closed when nothing runs any more."""

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from app.chats.decoders import Decoders
from app.chats.picture import Limits
from app.postgres import Pool, open_pool
from app.providers.provider import Deadlines
from app.providers.reach import Reach
from app.providers.registry import Providers
from app.safe import Safe
from app.settings import Settings
from app.wall import Wall

# Connections for heartbeats and health alone, so that they never wait for anybody's work.
_RESERVE = 2
# Connections behind the wall beside those of readers: for stopping, for what waits, for pictures.
_ORDERS = 2


class Resources:
    """`share`: connections for readers, and as many for accepting messages, so that a flood of either leaves some for
    all the rest.
    """

    def __init__(self, settings: Settings, safe: Safe, *, dsn: str, pool: Pool, reserve: Pool) -> None:
        self.dsn = dsn
        self.share = max(1, (settings.pool_size - 2) // 2)
        self.pool = pool
        self.reserve = reserve
        self.wall = Wall(pool, demand=settings.row_security)
        self.safe = safe
        self.providers = _providers(settings, safe)
        self.decoders = Decoders(_limits(settings), processes=settings.image_decoders)

    async def distrust(self) -> None:
        """Use no connection again that is open now: one of them is dead without a word, and others may be."""
        for pool in (self.pool, self.reserve):
            await pool.expire_connections()
        await self.wall.expire()


@asynccontextmanager
async def opened(settings: Settings, safe: Safe) -> AsyncGenerator[Resources, None]:
    """Everything open while the block runs, whether the database is there or not."""
    assert settings.database_url is not None
    dsn = settings.database_url
    async with AsyncExitStack() as stack:
        pool = await stack.enter_async_context(_pool(dsn, settings.pool_size))
        reserve = await stack.enter_async_context(_pool(dsn, _RESERVE))
        resources = Resources(settings, safe, dsn=dsn, pool=pool, reserve=reserve)
        await stack.enter_async_context(resources.wall.open(dsn, resources.share + _ORDERS))
        stack.push_async_callback(resources.providers.aclose)
        resources.providers.preload()
        stack.push_async_callback(resources.decoders.aclose)
        yield resources


@asynccontextmanager
async def _pool(dsn: str, size: int) -> AsyncGenerator[Pool, None]:
    pool = await open_pool(dsn, size)
    try:
        yield pool
    finally:
        # Not close(): it waits for ever where the server hangs, and nothing is under way any more.
        pool.terminate()


def _providers(settings: Settings, safe: Safe) -> Providers:
    return Providers(
        deadlines=Deadlines(settings.connect_timeout_s, settings.first_token_timeout_s, settings.gap_timeout_s),
        concurrency=settings.provider_concurrency,
        safe=safe,
        reach=Reach.parse(settings.provider_networks),
    )


def _limits(settings: Settings) -> Limits:
    return Limits(settings.image_pixels, settings.image_side, settings.image_bytes, settings.image_timeout_s)
