"""The end of an answer that is not begun again: written by another replica than its owner, from what the log holds."""

from app.flows.ending import Ending
from app.flows.past import Past
from app.flows.run import LOG_LOST, Failure, Progress, Result
from app.flows.runner import Runner
from app.journal import About, Journal
from app.streams.appending import StreamLost
from app.streams.log import Log, Writer
from app.streams.stream import Stream


class Closing:
    """Asks no provider: it ends with what is there, and as completed where the answer is whole."""

    def __init__(self, event_log: Log, runner: Runner, *, ending: Ending, journal: Journal) -> None:
        self._log = event_log
        self._runner = runner
        self._ending = ending
        self._journal = journal

    async def end(self, stream: Stream, past: Past, failure: Failure) -> None:
        """`failure`: why it does not go on. Raises Fenced where this replica may not write any more."""
        answer = past.answer(stream.flow_type)
        writer = self._log.open(stream.id, last_id=past.last_id)
        try:
            for kind, data in past.unsaid:
                writer.append(kind, data)
            for progress in past.begun():
                self._report(stream, writer, progress, failure)
            if answer.flow not in past.over | past.flows.keys():
                self._report(stream, writer, answer, failure)
            if answer.shown and not past.saved:
                await self._ending.save_answer(stream, writer, answer)
            flows = past.flows | {answer.flow: answer}
            await self._ending.conclude(stream, writer, Result(answer, [*flows.values()]))
            await self._runner.on_end(stream)
        except StreamLost:
            answer.failure = LOG_LOST
            await self._ending.lose(stream, writer.last_id, answer)
        finally:
            self._log.close(writer)

    def _report(self, stream: Stream, writer: Writer, progress: Progress, failure: Failure) -> None:
        progress.failure = failure
        if failure.outcome == "cancelled":
            _report_stop(writer, progress)
            return
        about = About(None, stream.id, stream.session_id, stream.chatbot_id, progress.flow, len(progress.attempts))
        progress.error_id = self._journal.record(failure.code, failure.message, about=about)
        told = {"code": failure.code, "message": failure.message, "retryable": failure.retryable}
        writer.append("flow_error", {"flow": progress.flow, **told, "error_id": progress.error_id})


def _report_stop(writer: Writer, progress: Progress) -> None:
    if progress.attempts:
        times = {"ttft_ms": progress.first_token_ms, "duration_ms": progress.duration_ms}
        told = {"finish_reason": "cancelled", "usage": progress.usage_json(), **times}
        writer.append("flow_end", {"flow": progress.flow, **told})
