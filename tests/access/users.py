"""A gateway whose users are signed in: `Bearer ann` is ann, by the same way in that a real token takes."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.applications import Starlette

from app.access.credentials import Credentials
from app.access.keys import Keys
from app.access.principal import Principal
from app.main import State, create_app
from app.server import serving
from app.settings import Settings, load
from tests.serving import UNLIMITED, client_of, until_ready


async def signed_in(token: str) -> Principal:
    return Principal("user", f"user:{token}", frozenset({"process", "read", "sync"}), token)


def as_user(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@asynccontextmanager
async def serving_users(database: str, **settings: Any) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of a gateway that is ready and takes API keys and users."""
    app = _with_users(load(**{"drain_s": 0, **UNLIMITED, **settings}, database_url=database, port=0))
    async with serving(app, "127.0.0.1", 0) as url, client_of(url) as client:
        await until_ready(client)
        yield client


def _with_users(settings: Settings) -> Starlette:
    app = create_app(settings)
    usual = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[State, None]:
        async with usual(app) as state:
            assert state is not None
            keys = Keys(state["pool"])
            yield State(**{**state, "credentials": Credentials("keys", keys, local=True, tokens=signed_in)})  # type: ignore[typeddict-item]

    app.router.lifespan_context = lifespan
    return app
