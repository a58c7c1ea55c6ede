"""What LiteLLM's proxy writes: its migrations' table, and rows made by its own code of calls that ask nobody.

Argument: the DSN. Only the insert is ours; the proxy's goes through Prisma.
"""

import asyncio
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import litellm
import litellm_proxy_extras
import psycopg
from litellm.integrations.custom_logger import CustomLogger
from litellm.proxy.spend_tracking.spend_tracking_utils import get_logging_payload

DSN = sys.argv[1]
MIGRATIONS = Path(litellm_proxy_extras.__file__).parent / "migrations"


class Keeper(CustomLogger):
    """Stands where the proxy's own callback stands."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, Any]] = []

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        self._keep(kwargs, response_obj, start_time, end_time)

    async def async_log_failure_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        kwargs["litellm_params"]["metadata"]["status"] = "failure"
        self._keep(kwargs, response_obj, start_time, end_time)

    def _keep(self, kwargs: Any, response_obj: Any, start_time: datetime, end_time: datetime) -> None:
        self.rows.append(dict(get_logging_payload(kwargs, response_obj, start_time, end_time)))


def request(messages: list[dict[str, Any]], session: str, *, end_user: str | None = None) -> dict[str, Any]:
    """As the proxy calls the library for one of its users."""
    body = {"model": "gpt-5-mini", "messages": messages, "litellm_session_id": session}
    metadata = {
        "user_api_key_user_id": "ann",
        "user_api_key_end_user_id": end_user,
        "requester_ip_address": "192.0.2.7",
    }
    return {
        "model": "openai/gpt-5-mini",
        "messages": messages,
        "litellm_trace_id": session,
        "litellm_session_id": session,
        "metadata": metadata,
        "proxy_server_request": {"url": "/v1/chat/completions", "method": "POST", "headers": {}, "body": body},
    }


async def calls(keeper: Keeper) -> None:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How tall is the Eiffel tower?"}]
    await litellm.acompletion(**request(first, "trace-1", end_user="customer-9"), mock_response="330 m.")
    second = [*first, {"role": "assistant", "content": "330 m."}, {"role": "user", "content": "And in feet?"}]
    chunks = await litellm.acompletion(
        **request(second, "trace-1", end_user="customer-9"), mock_response="1,083 ft.", stream=True
    )
    async for _ in chunks:
        pass
    parts = [{"type": "text", "text": "Hello"}]
    await litellm.acompletion(**request([{"role": "user", "content": parts}], "trace-2"), mock_response="Hello!")
    await litellm.aembedding(
        model="openai/text-embedding-3-small", input=["x"], mock_response=[0.1], metadata={}, litellm_trace_id="trace-3"
    )
    async with asyncio.timeout(20):
        while len(keeper.rows) < 4:
            await asyncio.sleep(0.05)


def migrate(connection: Any) -> None:
    for path in sorted(MIGRATIONS.glob("*/migration.sql")):
        connection.execute(path.read_text())


def main() -> None:
    keeper = Keeper()
    litellm.callbacks = [keeper]
    asyncio.run(calls(keeper))
    with psycopg.connect(DSN, autocommit=True) as connection:
        migrate(connection)
        for row in keeper.rows:
            names = ", ".join(f'"{name}"' for name in row)
            places = ", ".join(["%s"] * len(row))
            # The proxy's times are UTC in columns without a zone.
            values = [value.replace(tzinfo=None) if isinstance(value, datetime) else value for value in row.values()]
            connection.execute(f'insert into "LiteLLM_SpendLogs" ({names}) values ({places})', values)


main()
