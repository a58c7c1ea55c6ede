"""A gateway whose users are signed in by real tokens: `as_user("ann")` is ann, and an API key is itself."""

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from tempfile import NamedTemporaryFile
from typing import Any

import httpx2

from app.access.keys import PREFIX
from tests.access.issuer import AUDIENCE, NAME, jwk, token
from tests.serving import serving

_KID, _ALGORITHM = "two", "ES256"


def as_user(name: str) -> dict[str, str]:
    given = name if name.startswith(PREFIX) else token(_KID, _ALGORITHM, sub=name)
    return {"Authorization": f"Bearer {given}"}


@asynccontextmanager
async def serving_users(database: str, **settings: Any) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of a gateway that is ready and takes API keys and users."""
    with NamedTemporaryFile("w", suffix=".json") as keys:
        json.dump({"keys": [jwk(_KID, _ALGORITHM)]}, keys)
        keys.flush()
        expected = {"auth": "keys,jwt", "jwt_issuer": NAME, "jwt_audience": AUDIENCE, "jwt_key_file": keys.name}
        expected["jwt_scopes"] = "process,read,index,sync"
        async with serving(database, **{"drain_s": 0, **expected, **settings}) as client:
            yield client
