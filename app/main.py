"""The app: its routes, and a lifespan in which everything is opened, built, run and left, in this order."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.middleware import Middleware

from app import problems
from app.access.credentials import require_safe
from app.access.limits import limits_of
from app.access.signing import given_keys
from app.access.stream_token import SigningKey
from app.conversations.webhook import secrets_of
from app.gateway.loops import loops
from app.gateway.parts import Parts
from app.gateway.presence import Life, Presence
from app.gateway.resources import opened
from app.gateway.state import state_of
from app.providers.reach import Reach
from app.routes import State, routes
from app.safe import Safe
from app.settings import Settings
from app.telemetry import Metrics, RequestIds

# How long the loops of a server that has drained may take to end, in seconds.
_LAST_S = 1


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
    async with opened(settings, safe) as resources, asyncio.TaskGroup() as tasks:
        parts = Parts(settings, resources, signing_keys=signing_keys, tasks=tasks)
        presence = Presence(parts, life)
        running = [tasks.create_task(loop) for loop in loops(parts, presence)]
        leaving = tasks.create_task(presence.leave_when_asked())
        yield state_of(parts, presence)
        life.leave.set()
        await leaving
        for loop in running:
            loop.cancel()
        await asyncio.wait(running, timeout=_LAST_S)
        # asyncpg waits for ever until a server that hangs has cancelled what a loop was asking.
        resources.pool.terminate()
