"""How every run ends, whoever ends it: the answer saved with its `message` event, then exactly one terminal event."""

from collections import defaultdict
from typing import Any

import orjson

from app.chats import store, usage
from app.conversations import index
from app.flows import sessions
from app.flows.run import Attempt, Progress, Result, answer_id
from app.journal import RunFigures, record_run
from app.postgres import Connection
from app.providers.provider import Usage
from app.streams.log import Writer
from app.streams.stream import Stream, Streams
from app.telemetry import Metrics


class Ending:
    """Two fenced commits, each after everything before it is in the log (G5)."""

    def __init__(self, streams: Streams, metrics: Metrics) -> None:
        self._streams = streams
        self._metrics = metrics

    async def save_answer(self, stream: Stream, writer: Writer, answer: Progress) -> None:
        """The assistant's message, what it has cost and the event `message`, in one commit.

        Raises Fenced or StreamLost where this replica may not write any more.
        """

        async def work(connection: Connection) -> None:
            await self._store_answer(connection, stream, answer)
            await usage.record(connection, _entries(stream, answer))

        told = {"message_id": answer_id(stream.id), "flow": answer.flow}
        await self._streams.conclude(writer, "message", told, work=work)

    async def _store_answer(self, connection: Connection, stream: Stream, answer: Progress) -> None:
        new = await store.save_answer(
            connection,
            user_id=stream.user_id,
            chat_id=stream.session_id,
            message_id=answer_id(stream.id),
            content=answer.text,
            attachments=[_attachment(*marker) for marker in answer.markers],
            status="complete" if answer.failure is None else "partial",
        )
        if new:
            await index.answered(connection, _chat(stream), model=_model(answer))

    async def conclude(self, stream: Stream, writer: Writer, result: Result) -> None:
        """The terminal event, in one commit with the status, the session's release and what is left to record.

        Raises Fenced or StreamLost where this replica may not write any more.
        """
        failure = result.failure
        data: dict[str, Any] = {"status": result.status, "usage": result.usage_json()}
        if failure is not None and failure.outcome == "failed":
            data["error"] = {"code": failure.code, "message": failure.message, "error_id": result.answer.error_id}

        async def work(connection: Connection) -> None:
            await sessions.release(
                connection, user_id=stream.user_id, session_id=stream.session_id, stream_id=stream.id
            )
            for progress in result.flows:
                await usage.record(connection, _entries(stream, progress))
            await index.ended(connection, _chat(stream), _shares(result))
            await record_run(connection, _figures(stream, writer.last_id + 1, result))

        await self._streams.conclude(writer, "stream_end", data, work=work, status=result.status)
        self._count(result)

    async def lose(self, stream: Stream, last_id: int, answer: Progress) -> None:
        """End a stream that the log has lost: no event, the session released, the text of the answer kept.

        Raises Fenced where this replica may not write any more.
        """
        result = Result(answer, [answer])

        async def work(connection: Connection) -> None:
            await sessions.release(
                connection, user_id=stream.user_id, session_id=stream.session_id, stream_id=stream.id
            )
            if answer.shown:
                await self._store_answer(connection, stream, answer)
            await usage.record(connection, _entries(stream, answer))
            await index.ended(connection, _chat(stream), _shares(result))
            await record_run(connection, _figures(stream, last_id, result))

        await self._streams.lose(stream.id, last_id, work=work)
        self._count(result)

    def leave(self, stream: Stream) -> None:
        """The end of this stream could not be written; a later takeover shall try."""
        self._streams.doubt(stream.id)

    def _count(self, result: Result) -> None:
        self._metrics.streams_ended.labels(result.status).inc()
        for progress in result.flows:
            for attempt in progress.attempts:
                self._metrics.attempts.labels(attempt.provider, attempt.outcome).inc()
        counted = result.usage_json()
        self._metrics.tokens.labels("input").inc(counted["prompt_tokens"])
        self._metrics.tokens.labels("output").inc(counted["completion_tokens"])


def _chat(stream: Stream) -> index.Chat:
    return index.Chat(stream.user_id, stream.session_id, stream.chatbot_id)


def _shares(result: Result) -> dict[str, index.Share]:
    """By model. The question and the answer are of the model that answered, or should have."""
    shares: defaultdict[str, index.Share] = defaultdict(index.Share)
    for attempt in (attempt for progress in result.flows for attempt in progress.attempts):
        share, counted = shares[attempt.model], attempt.usage or Usage(0, 0)
        share.tokens += counted.prompt_tokens + counted.completion_tokens
        share.duration_ms += attempt.duration_ms
    said = shares[_model(result.answer)]
    said.questions = 1
    said.messages = 2 if result.answer.shown else 1
    return shares


def _model(answer: Progress) -> str:
    return answer.attempts[-1].model if answer.attempts else ""


def _attachment(name: str, content: str, offset: int) -> dict[str, Any]:
    """A marker as it is kept with its message; `offset` counts characters of the text before it."""
    return {"type": "marker", "name": name, "content": content, "offset": offset}


def _entries(stream: Stream, progress: Progress) -> list[usage.Entry]:
    return [_entry(stream, progress.flow, attempt) for attempt in progress.attempts]


def _entry(stream: Stream, flow: str, attempt: Attempt) -> usage.Entry:
    counted = attempt.usage or Usage(0, 0)
    return usage.Entry(
        stream_id=stream.id,
        flow=flow,
        attempt=attempt.number,
        user_id=stream.user_id,
        chatbot_id=stream.chatbot_id,
        provider=attempt.provider,
        model=attempt.model,
        outcome=attempt.outcome,
        error_code=attempt.error_code,
        prompt_tokens=counted.prompt_tokens,
        completion_tokens=counted.completion_tokens,
        first_token_ms=attempt.first_token_ms,
        duration_ms=attempt.duration_ms,
        started_at=attempt.started_at,
        chat_id=stream.session_id,
    )


def _figures(stream: Stream, events: int, result: Result) -> RunFigures:
    answer, counted = result.answer, result.usage_json()
    last = answer.attempts[-1] if answer.attempts else None
    return RunFigures(
        stream_id=stream.id,
        session_id=stream.session_id,
        chatbot_id=stream.chatbot_id,
        flow_type=answer.flow,
        status=result.status,
        error_code=result.failure.code if result.failure else None,
        provider=last.provider if last else "",
        model=last.model if last else "",
        events=events,
        prompt_tokens=counted["prompt_tokens"],
        completion_tokens=counted["completion_tokens"],
        first_token_ms=answer.first_token_ms,
        duration_ms=answer.duration_ms,
        mode=result.mode,
        attempts=sum(len(progress.attempts) for progress in result.flows),
        tokens_per_s=_pace(last),
        flows=orjson.dumps({progress.flow: _times(progress) for progress in result.flows}).decode(),
    )


def _pace(attempt: Attempt | None) -> float | None:
    """Tokens a second behind the first one, as far as the provider has counted them."""
    if attempt is None or attempt.usage is None or attempt.first_token_ms is None:
        return None
    spoken_ms = attempt.duration_ms - attempt.first_token_ms
    return round(attempt.usage.completion_tokens * 1000 / spoken_ms, 1) if spoken_ms > 0 else None


def _times(progress: Progress) -> dict[str, Any]:
    return {
        "outcome": progress.failure.outcome if progress.failure else "completed",
        "error_code": progress.failure.code if progress.failure else None,
        "attempts": len(progress.attempts),
        "first_token_ms": progress.first_token_ms,
        "duration_ms": progress.duration_ms,
        **progress.usage_json(),
    }
