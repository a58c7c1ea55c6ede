"""`parley index messages`: the words of all messages made ready by hand, and how far that is."""

import asyncio
from collections.abc import AsyncGenerator
from time import monotonic

from app.conversations.message_words import MessageWords, status
from app.errors import Misconfigured
from app.postgres import open_connection, open_pool, wait_for_database
from app.schema import require_current
from app.settings import Settings

# Passes are short so that there is something to tell. So many without anything done, and with a pause behind each, are
# the end of it: together longer than the pass of a server that is at the same user.
_PASS_S, _IDLE, _PAUSE_S = 2.0, 12, 2.0
# As many as there is time for: a pass without anything done has looked at everybody, as a rule.
_LOOKS = 10_000


async def fill_messages(settings: Settings) -> AsyncGenerator[tuple[str, bool], None]:
    """Lines, and whether all is ready. Raises Misconfigured where it is not turned on."""
    if not settings.search_messages:
        raise Misconfigured("messages_unsearched", "PARLEY_SEARCH_MESSAGES is not set: only questions are searched.")
    assert settings.database_url is not None
    await wait_for_database(settings.database_url, settings.database_wait_s, lambda _: None)
    connection = await open_connection(settings.database_url)
    try:
        await require_current(connection)
    finally:
        await connection.close()
    pool = await open_pool(settings.database_url, 2)
    try:
        words, done, idle = MessageWords(pool, is_on=True, looks=_LOOKS), 0, 0
        while True:
            some = await words.until(monotonic() + _PASS_S)
            now, done, idle = await status(pool), done + some, 0 if some else idle + 1
            is_end = (now.is_complete and not some) or not now.is_on or idle == _IDLE
            yield f"{done:,} messages; {now.filled:,} of {now.users:,} users are ready", now.is_complete
            if is_end:
                return
            if not some:
                await asyncio.sleep(_PAUSE_S)
    finally:
        await pool.close()
