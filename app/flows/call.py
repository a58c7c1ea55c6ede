"""One flow of a run: asked of its choices, again and elsewhere, until one answer is whole (G8).

Nobody sees the tries that failed before their first token. One that fails later is announced by `flow_restart` as soon
as another has something to say; until then the reader keeps the partial text. Bounded by the choices times the tries of
each, the flow's deadline, and the length of an answer.
"""

import asyncio
import random
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from app.errors import Misconfigured, ParleyError
from app.flows.config import Choice, Flow
from app.flows.markers import Piece, Scanner
from app.flows.prompts import Asked, asked, memory_id, prompt
from app.flows.run import Attempt, Failure, FlowFailed, Progress, Run, ms_since
from app.flows.voice import Voice
from app.journal import About, Journal
from app.providers.provider import Chunk, Effort, Finish, Prompt, ProviderError, Text, Usage
from app.providers.registry import Providers
from app.streams.appending import StreamLost
from app.streams.replicas import Fenced
from app.telemetry import Metrics

log = structlog.get_logger(__name__)

_BROKEN = Failure("internal_error", "Something went wrong inside; the error_id names it.")
_LATE = Failure("flow_timeout", "The flow took longer than its configuration allows.", retryable=True)


@dataclass(frozen=True, slots=True)
class Means:
    """What every call needs."""

    providers: Providers
    effort: Effort
    journal: Journal
    metrics: Metrics
    answer_bytes: int


class Call:
    """`progress` holds what came of it: the answer is whole when `run` has returned and `progress.failure` is None."""

    def __init__(self, run: Run, name: str, *, voice: Voice, means: Means, progress: Progress | None = None) -> None:
        self.voice = voice
        # With what an owner before us has left: its attempts, and the text that readers still see.
        self.progress = progress or Progress(name)
        self._run = run
        self._flow: Flow = run.chatbot.flows[name]
        self._means = means
        self._answers = name in run.chatbot.answers
        # What a router says is for us alone; flow_selected tells what came of it.
        self._routes = run.plan.router == name
        self._streams = self._flow.stream and not self._routes
        self._announced: Choice | None = None
        self._spoke = False
        self._scanner: Scanner | None = None
        self._task: asyncio.Task[Any] | None = None
        self._stopped: Failure | None = None
        self._error: Exception | None = None
        # Set when nothing more is asked and no connection is open.
        self.over = asyncio.Event()

    def stop(self, why: Failure) -> None:
        """Have it end now with this failure, whatever it is doing; its provider's connection is closed."""
        if self._stopped is None and self.progress.failure is None:
            self._stopped = why
            if self._task is not None:
                self._task.cancel()

    async def run(self, outputs: Mapping[str, str]) -> None:
        """Ask until there is an answer or no way left. Raises Fenced or StreamLost; all else is a failure."""
        progress = self.progress
        self._task = asyncio.current_task()
        try:
            progress.failure = self._stopped or await self._outcome(outputs)
        finally:
            self._task = None
            self.over.set()
        progress.duration_ms = ms_since(self._run.started)
        if progress.failure is None or progress.failure.outcome == "cancelled":
            self._report_end()
        else:
            self._report_failure(progress.failure)

    async def _outcome(self, outputs: Mapping[str, str]) -> Failure | None:
        try:
            async with asyncio.timeout(self._flow.timeout_s):
                await self._ask(asked(self._flow, self._run.inputs, outputs, name=self.progress.flow))
            return None
        except TimeoutError:
            return _LATE
        except asyncio.CancelledError:
            return self._cancelled()
        except (Fenced, StreamLost):
            raise
        except Exception as error:  # noqa: BLE001  around one flow: its bug must not leave the stream without an end
            self._error = error
            return _failure(error)

    def _cancelled(self) -> Failure:
        if self._stopped is None or self._task is None:
            raise asyncio.CancelledError
        self._task.uncancel()
        return self._stopped

    # -- attempts

    async def _ask(self, said: Asked) -> None:
        """Raises what the last attempt failed with."""
        last = self._flow.choices[-1]
        failure: ParleyError | None = None
        for choice in self._flow.choices:
            for again in range(1 + self._means.effort.retries):
                if again:
                    await asyncio.sleep(self._pause_s(failure, again))
                try:
                    await self._attempt(choice, said)
                    return
                except (ProviderError, Misconfigured) as error:
                    failure = error
                    log.info("attempt_failed", flow=self.progress.flow, provider=choice.endpoint.name, code=error.code)
                    if self._broke and self._flow.on_break == "fail":
                        raise
                    if not _again(error) or (self._broke and choice is not last):
                        break
        assert failure is not None
        raise failure

    @property
    def _broke(self) -> bool:
        """Whether the attempt that has failed had been heard."""
        return self._spoke and self._streams

    def _pause_s(self, failure: ParleyError | None, again: int) -> float:
        effort = self._means.effort
        backoff = random.uniform(0, min(effort.backoff_s * 2 ** (again - 1), effort.longest_wait_s))
        asked_for = failure.retry_after if failure is not None else None
        return max(backoff, min(asked_for or 0, effort.longest_wait_s))

    async def _attempt(self, choice: Choice, said: Asked) -> None:
        attempts = self.progress.attempts
        number = attempts[-1].number + 1 if attempts else 1
        attempt = Attempt(number, choice.endpoint.name, choice.model)
        attempts.append(attempt)
        self._spoke = False
        try:
            if attempt.number == 1:
                self._announce(choice, attempt, said)
            await self._read(choice, attempt, said)
            attempt.end(None)
        except asyncio.CancelledError:
            attempt.end(self._stopped or _LATE)
            raise
        except (Fenced, StreamLost):
            attempt.end(_BROKEN)
            raise
        except Exception as error:
            attempt.end(_failure(error))
            raise

    def _announce(self, choice: Choice, attempt: Attempt, said: Asked) -> None:
        self._announced = choice
        told: dict[str, Any] = {"flow": self.progress.flow, "provider": attempt.provider, "model": attempt.model}
        told["attempt"] = attempt.number
        if said.dropped:
            told["history_dropped"] = said.dropped
        self.voice.say("flow_start", told)

    async def _read(self, choice: Choice, attempt: Attempt, said: Asked) -> None:
        voice, provider = self.voice, self._means.providers.get(choice.endpoint)
        async with aclosing(provider.stream(self._prompt(choice, said))) as batches:
            async for batch in batches:
                if not self._spoke:
                    self._begin(choice, attempt, said)
                if not self._take(batch, attempt):
                    break
                if voice.crowded():
                    await voice.room()
        if self._scanner is not None:
            self._show(self._scanner.end())
        if self._flow.output == "json" and not self._streams:
            _parsed(self.progress.text, choice.endpoint.name)

    def _prompt(self, choice: Choice, said: Asked) -> Prompt:
        stream = self._run.stream
        session_id = memory_id(stream.user_id, stream.session_id)
        return prompt(self._flow, choice, said, self._run.inputs, name=self.progress.flow, session_id=session_id)

    def _begin(self, choice: Choice, attempt: Attempt, said: Asked) -> None:
        """The first chunk of an attempt: what an earlier one said is void from here on."""
        progress = self.progress
        if progress.shown and self._streams:
            reason = progress.attempts[-2].error_code
            self.voice.say("flow_restart", {"flow": progress.flow, "attempt": attempt.number, "reason": reason})
            self._announce(choice, attempt, said)
        elif choice is not self._announced:
            self._announce(choice, attempt, said)
        progress.clear()
        self._spoke = True
        markers = self._run.chatbot.markers
        self._scanner = Scanner(markers) if markers and self._streams else None
        attempt.first_token_ms = ms_since(attempt.began)
        if progress.first_token_ms is None:
            progress.first_token_ms = ms_since(self._run.started)
            if self._answers:
                self._means.metrics.first_token.observe(progress.first_token_ms / 1000)

    def _take(self, batch: Sequence[Chunk], attempt: Attempt) -> bool:
        """Take a batch in; false when the answer is as long as it may be."""
        progress = self.progress
        for chunk in batch:
            match chunk:
                case Text(text):
                    if self._scanner is not None:
                        self._show(self._scanner.feed(text))
                    else:
                        self._say(text)
                    progress.size += len(text.encode())
                    if progress.size >= self._means.answer_bytes:
                        progress.finish_reason = "length"
                        return False
                case Finish(reason):
                    progress.finish_reason = reason
                case Usage():
                    attempt.usage = chunk
        return True

    def _say(self, text: str) -> None:
        self.progress.pieces.append(text)
        if self._streams:
            self.voice.say("token", {"token": text, "markers": {}, "flow": self.progress.flow})

    def _show(self, pieces: Sequence[Piece]) -> None:
        progress = self.progress
        for piece in pieces:
            if not piece.markers:
                progress.length += len(piece.text)
                self._say(piece.text)
                continue
            progress.pieces.append(piece.text)
            progress.length += len(piece.text)
            progress.markers += [(name, content, progress.length) for name, content in piece.markers]
            token = {"token": piece.text, "markers": _by_name(piece.markers), "flow": progress.flow}
            self.voice.say("token", token)

    # -- its end

    def _report_end(self) -> None:
        progress = self.progress
        if progress.failure is not None:
            progress.finish_reason = "cancelled"
        elif not self._streams and not self._routes:
            output = _parsed(progress.text, "") if self._flow.output == "json" else progress.text
            self.voice.say("flow_output", {"flow": progress.flow, "output": output})
        told = {
            "flow": progress.flow,
            "finish_reason": progress.finish_reason,
            "usage": progress.usage_json(),
            "ttft_ms": progress.first_token_ms,
            "duration_ms": progress.duration_ms,
        }
        self.voice.say("flow_end", told)

    def _report_failure(self, failure: Failure) -> None:
        progress = self.progress
        about = self._about()
        progress.error_id = self._means.journal.record(failure.code, failure.message, about=about, error=self._error)
        told = {"code": failure.code, "message": failure.message, "retryable": failure.retryable}
        self.voice.say("flow_error", {"flow": progress.flow, **told, "error_id": progress.error_id})

    def _about(self) -> About:
        stream, attempts = self._run.stream, self.progress.attempts
        context = {
            "attempts": [[attempt.provider, attempt.model, attempt.error_code] for attempt in attempts],
            "text_length": self.progress.size,
        }
        return About(
            self._run.request_id,
            stream.id,
            stream.session_id,
            stream.chatbot_id,
            self.progress.flow,
            len(attempts),
            context,
        )


def _again(error: ParleyError) -> bool:
    return isinstance(error, ProviderError) and error.retryable


def _failure(error: Exception) -> Failure:
    match error:
        case FlowFailed():
            return error.failure
        case ProviderError():
            return Failure(error.code, error.detail, error.retryable)
        case Misconfigured():
            log.error("flow_misconfigured", detail=error.detail)
            return Failure("flow_misconfigured", "The chatbot's provider is not configured on this server.")
        case ParleyError():
            return Failure(error.code, error.detail, retryable=error.status >= 500)
        case _:
            log.error("flow_crashed", exc_info=error)
            return _BROKEN


def _parsed(text: str, provider: str) -> Any:
    """The JSON a model wrote, also inside the fence that models like to put around it. Raises ProviderError."""
    body = text.strip()
    if body.startswith("```"):
        body = body.partition("\n")[2].rpartition("```")[0]
    try:
        value = orjson.loads(body)
        # It reads deeper than it writes, and an event has to go around this.
        orjson.dumps({"data": {"output": value}})
        return value
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        detail = f"Provider '{provider}' was asked for JSON and sent none, or nested it too deeply."
        raise ProviderError("protocol", detail, retryable=True) from None


def _by_name(markers: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, content in markers:
        found.setdefault(name, []).append(content)
    return found
