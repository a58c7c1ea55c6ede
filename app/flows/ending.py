"""How every run ends, whoever ends it: the answer saved with its `message` event, then exactly one terminal event."""

from typing import Any

from app.chats import store, usage
from app.flows import sessions
from app.flows.run import Result, answer_id
from app.journal import Journal, RunFigures, record_run
from app.postgres import Connection
from app.streams.log import Writer
from app.streams.stream import Stream, Streams
from app.telemetry import Metrics


class Ending:
    """Two fenced commits, each after everything before it is in the log (G5)."""

    def __init__(self, streams: Streams, journal: Journal, metrics: Metrics) -> None:
        self._streams = streams
        self._journal = journal
        self._metrics = metrics

    async def conclude(self, stream: Stream, writer: Writer, result: Result, *, answer_saved: bool = False) -> None:
        """Raises Fenced or StreamLost where this replica may not write the end any more."""
        error_id = self._report(stream, writer, result)
        if result.progress.pieces and not answer_saved:
            await self._save_answer(stream, writer, result)
        await self._end(stream, writer, result, error_id)
        self._count(result)

    def leave(self, stream: Stream) -> None:
        """The end of this stream could not be written; a later takeover shall try."""
        self._streams.doubt(stream.id)

    def _report(self, stream: Stream, writer: Writer, result: Result) -> str | None:
        if (failure := result.failure) is None:
            return None
        error_id = self._journal.record(failure.code, failure.message, stream_id=stream.id)
        told = {"code": failure.code, "message": failure.message, "retryable": failure.retryable, "error_id": error_id}
        writer.append("flow_error", {"flow": stream.flow_type, **told})
        return error_id

    async def _save_answer(self, stream: Stream, writer: Writer, result: Result) -> None:
        message_id = answer_id(stream.id)
        text = result.progress.text

        async def work(connection: Connection) -> None:
            await store.save_answer(
                connection,
                user_id=stream.user_id,
                chat_id=stream.session_id,
                message_id=message_id,
                content=text,
                status="complete" if result.failure is None else "partial",
            )
            await usage.record(connection, _attempt(stream, result))

        data = {"message_id": message_id, "flow": stream.flow_type}
        await self._streams.conclude(writer, "message", data, work=work)

    async def _end(self, stream: Stream, writer: Writer, result: Result, error_id: str | None) -> None:
        failure = result.failure
        data: dict[str, Any] = {"status": result.status, "usage": result.progress.usage_json()}
        if failure is not None:
            data["error"] = {"code": failure.code, "message": failure.message, "error_id": error_id}

        async def work(connection: Connection) -> None:
            await sessions.release(
                connection, user_id=stream.user_id, session_id=stream.session_id, stream_id=stream.id
            )
            await usage.record(connection, _attempt(stream, result))
            await record_run(connection, _figures(stream, writer, result))

        await self._streams.conclude(writer, "stream_end", data, work=work, status=result.status)

    def _count(self, result: Result) -> None:
        self._metrics.streams_ended.labels(result.status).inc()
        counted = result.progress.usage_json()
        self._metrics.tokens.labels("input").inc(counted["prompt_tokens"])
        self._metrics.tokens.labels("output").inc(counted["completion_tokens"])


def _attempt(stream: Stream, result: Result) -> usage.Attempt:
    progress = result.progress
    counted = progress.usage_json()
    return usage.Attempt(
        stream_id=stream.id,
        flow=stream.flow_type,
        attempt=progress.attempt,
        user_id=stream.user_id,
        chatbot_id=stream.chatbot_id,
        provider=progress.provider,
        model=progress.model,
        outcome=result.outcome,
        prompt_tokens=counted["prompt_tokens"],
        completion_tokens=counted["completion_tokens"],
        first_token_ms=progress.first_token_ms,
        duration_ms=progress.duration_ms,
    )


def _figures(stream: Stream, writer: Writer, result: Result) -> RunFigures:
    progress = result.progress
    counted = progress.usage_json()
    return RunFigures(
        stream_id=stream.id,
        session_id=stream.session_id,
        chatbot_id=stream.chatbot_id,
        flow_type=stream.flow_type,
        status=result.status,
        error_code=result.failure.code if result.failure else None,
        provider=progress.provider,
        model=progress.model,
        events=writer.last_id + 1,
        prompt_tokens=counted["prompt_tokens"],
        completion_tokens=counted["completion_tokens"],
        first_token_ms=progress.first_token_ms,
        duration_ms=progress.duration_ms,
    )
