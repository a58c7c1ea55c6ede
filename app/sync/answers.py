"""What devices are told: what became of their pushes, and a page of what they have not seen."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.postgres import Connection
from app.sync import pages
from app.sync.cursor import Cursor
from app.sync.devices import known_mid
from app.sync.exchange import Answer, Asked, Head, Pushed, Resync
from app.sync.mutations import Done

_LAST_EVENTS = """
select s.id::text as id, coalesce((select max(e.id) from streaming_events e where e.stream_id = s.id), 0) as last
from unnest($1::uuid[]) as s(id)
"""


def _compacted(head: Head, asked: Asked) -> int:
    """How far rows are gone without a word that this device may have."""
    return max(head.gc_seq, head.gc_failed) if asked.failed else head.gc_seq


def start(head: Head, asked: Asked) -> tuple[Resync | None, int]:
    """Why a device has to begin anew, and its cursor's `until`, where 0 is a bootstrap from nothing."""
    cursor = asked.cursor
    if not asked.pull:
        return None, 1
    if cursor is None or (asked.failed and not cursor.failed):
        return None, 0
    if cursor.epoch != head.epoch:
        return "epoch", 0
    if max(cursor.seq, cursor.until) > head.seq:
        return "ahead", 0
    # In a bootstrap: since it began.
    compacted = _compacted(head, asked)
    if cursor.compacted != compacted if cursor.until else cursor.seq < compacted:
        return "compacted", 0
    return None, max(cursor.until, 1)


def is_plain(head: Head, asked: Asked) -> bool:
    """Whether a device reads on from where it was, and is in no bootstrap."""
    cursor = asked.cursor
    return not asked.pull or (cursor is not None and cursor.until <= cursor.seq and start(head, asked)[1] > 0)


def stand(head: Head, asked: Asked, pushed: Pushed) -> Pushed:
    """Note where the device stands now, and thus what its answer is about."""
    pushed.acked, pushed.seq = known_mid(head, asked), head.seq
    pushed.resync, pushed.until = start(head, asked)
    return pushed


def no_news(head: Head, asked: Asked, pushed: Pushed) -> Answer | None:
    """The answer to who has seen everything of others, while no answer of a model is in the making."""
    cursor = asked.cursor
    if head.active or cursor is None or pushed.until == 0:
        return None
    if cursor.seq < pushed.seq and head.unseen != (False, False):
        return None
    return _answer(head, asked, pushed, pages.Page((), (), cursor.at(pushed.seq, failed=asked.failed), False), [])


async def answer(connection: Connection, user_id: str, head: Head, asked: Asked, pushed: Pushed) -> Answer:
    """To one alone, once everything is written."""
    streams = await _streams(connection, head.active)
    page = await _page(connection, user_id, head, asked, pushed)
    return _answer(head, asked, pushed, page, streams)


async def _page(connection: Connection, user_id: str, head: Head, asked: Asked, pushed: Pushed) -> pages.Page:
    if not asked.pull:
        return pages.Page((), (), Cursor(head.epoch, 0), False)
    cursor = asked.cursor
    if pushed.until == 0 or cursor is None:
        cursor = Cursor(head.epoch, 0, pushed.seq, _compacted(head, asked), asked.failed)
    else:
        cursor = cursor.at(cursor.seq, failed=asked.failed)
    return await pages.read(connection, user_id, cursor, client=asked.client, last=pushed.seq, unseen=head.unseen)


async def answers(
    connection: Connection, user_id: str, head: Head, done: Sequence[Done], shared: pages.Shared | None
) -> list[Answer]:
    """To those whose pushes are written now. `shared`: what was there before, for several."""
    if shared is None:
        alone = ((one.push.asked, one.pushed) for one in done)
        return [no_news(head, *one) or await answer(connection, user_id, head, *one) for one in alone]
    streams, told = await _streams(connection, head.active), []
    for one in done:
        shared.write(one.work.found.state, one.work.marks)
        told.append(_answer(head, one.push.asked, one.pushed, _news(shared, one), streams))
    return told


def _news(shared: pages.Shared, one: Done) -> pages.Page:
    """What was there before that the device has not seen, and what those before it have written."""
    cursor = one.push.asked.cursor
    if not one.push.asked.pull or cursor is None:
        return pages.Page((), (), Cursor("", 0), False)
    return shared.page(
        cursor.at(cursor.seq, failed=one.push.asked.failed), client=one.push.asked.client, last=one.pushed.seq
    )


def _answer(head: Head, asked: Asked, pushed: Pushed, page: pages.Page, streams: Sequence[Mapping[str, Any]]) -> Answer:
    chats = pushed.chats | {chat.id: chat for chat in page.chats}
    messages = pushed.messages | {message.id: message for message in page.messages}
    return Answer(
        acked=pushed.acked,
        cursor=page.cursor if asked.pull else asked.cursor,
        server_time=head.now_ms,
        chats=list(chats.values()),
        messages=[one for one in messages.values() if asked.failed or one.status != "failed" or one.is_deleted],
        more=page.more,
        bootstrap=pushed.until == 0,
        resync=pushed.resync,
        results=pushed.results,
        active_streams=streams,
        did=pushed.did,
    )


async def _streams(connection: Connection, active: Sequence[tuple[str, str]]) -> list[Mapping[str, Any]]:
    """Answers in the making, to be followed from any of their events on."""
    if not active:
        return []
    ids = [stream for _, stream in active]
    await connection.execute("select set_config('parley.streams', $1, true)", f"{{{','.join(ids)}}}")
    last = {row["id"]: row["last"] for row in await connection.fetch(_LAST_EVENTS, ids)}
    return [{"chat_id": chat, "streaming_session_id": stream, "last_event_id": last[stream]} for chat, stream in active]
