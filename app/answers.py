"""Answers in JSON as routes give them: of nobody's business but the asker's, and times as the contract has them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic import BaseModel
from starlette.responses import Response

_PRIVATE = {"Cache-Control": "no-store"}


def private_json(told: BaseModel | Mapping[str, Any], *, status: int = 200) -> Response:
    """An answer that no cache keeps."""
    body = told.model_dump_json() if isinstance(told, BaseModel) else orjson.dumps(told)
    return Response(body, status, _PRIVATE, "application/json")


def time_of(moment: datetime) -> str:
    """In UTC, to the millisecond: 2024-01-01T12:00:00.000Z."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
