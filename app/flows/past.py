"""What the log says of a run that somebody else began: which flows are done with, and what readers see of the others.

Bounded by what a run may write: the longest answer, and the outputs of its flows.
"""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from app.flows.plan import Decision
from app.flows.run import CANCELLED, Attempt, Failure, Progress
from app.providers.provider import Usage
from app.streams.event import Kind, kind_of

OWNER_LOST = Failure(
    "owner_lost", "The server that wrote this answer is gone; the text so far is kept.", retryable=True
)


@dataclass(slots=True)
class Past:
    """`flows` holds all that have begun. `over` names those that have ended, well or not: they are not asked again."""

    last_id: int = 1
    flows: dict[str, Progress] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    decision: Decision | None = None
    saved: bool = False
    # What the last owner did not live to say: the end of a flow whose output is there.
    unsaid: list[tuple[Kind, dict[str, Any]]] = field(default_factory=list)
    _whole: set[str] = field(default_factory=set)

    def answer(self, flow: str) -> Progress:
        """The answer, where `flow` is what was decided before any router."""
        name = self.decision.flow if self.decision else flow
        return self.flows.get(name) or Progress(name)

    def begun(self) -> list[Progress]:
        """The flows that were under way."""
        return [progress for name, progress in self.flows.items() if name not in self.over]

    def recall(self, payload: str) -> None:
        """One more event, in the order of their ids."""
        self.last_id += 1
        kind = kind_of(payload)
        if kind in ("stream_start", "stream_end", "gap"):
            return
        event = orjson.loads(payload)
        data = event["data"]
        if kind == "flow_selected":
            self.decision = Decision(data["flow"], data["by"], data["reason"])
        elif kind == "message":
            self.saved = True
        else:
            progress = self.flows.setdefault(data["flow"], Progress(data["flow"]))
            self._recall(kind, progress, data, datetime.fromisoformat(event["timestamp"]))

    def _recall(self, kind: str, progress: Progress, data: dict[str, Any], at: datetime) -> None:
        match kind:
            case "flow_start":
                if progress.flow not in self.over:
                    _fail(progress, None)
                self.over.discard(progress.flow)
                progress.attempts.append(Attempt(data["attempt"], data["provider"], data["model"], at))
            case "flow_restart":
                _fail(progress, data["reason"])
                progress.clear()
            case "token":
                _take(progress, data)
            case "flow_output":
                self._whole.add(progress.flow)
                progress.pieces = [text_of(data["output"])]
            case "flow_error":
                self.over.add(progress.flow)
                progress.failure = Failure(data["code"], data["message"], data["retryable"])
                progress.error_id = data["error_id"]
                _end(progress, at)
            case "flow_end":
                self.over.add(progress.flow)
                _finish(progress, data)
                _end(progress, at)

    def close(self) -> None:
        """After the last event: the attempts that were under way are lost with their owner."""
        for progress in self.begun():
            if progress.flow in self._whole:
                self._say_end(progress)
            else:
                _fail(progress, OWNER_LOST.code)

    def _say_end(self, progress: Progress) -> None:
        self.over.add(progress.flow)
        told = {"finish_reason": "stop", "usage": progress.usage_json(), "ttft_ms": None, "duration_ms": 0}
        _finish(progress, told)
        self.unsaid.append(("flow_end", {"flow": progress.flow, **told}))


def _fail(progress: Progress, code: str | None) -> None:
    """Whatever was tried last has failed, unless it is known already to have."""
    if progress.attempts and progress.attempts[-1].outcome == "completed":
        last = progress.attempts[-1]
        last.outcome, last.error_code = "failed", code


def _take(progress: Progress, data: dict[str, Any]) -> None:
    progress.pieces.append(data["token"])
    progress.length += len(data["token"])
    progress.size += len(data["token"].encode())
    for name, contents in data["markers"].items():
        progress.markers += [(name, content, progress.length) for content in contents]


def _finish(progress: Progress, data: dict[str, Any]) -> None:
    progress.finish_reason = data["finish_reason"]
    progress.first_token_ms, progress.duration_ms = data["ttft_ms"], data["duration_ms"]
    if data["finish_reason"] == "cancelled":
        progress.failure = CANCELLED
    if progress.attempts:
        # Of all its attempts together; nobody knows any more which one took what.
        progress.attempts[-1].usage = Usage(**data["usage"])


def _end(progress: Progress, at: datetime) -> None:
    if progress.attempts:
        last = progress.attempts[-1]
        last.end(progress.failure)
        last.duration_ms = max(0, round((at - last.started_at).total_seconds() * 1000))


def text_of(output: Any) -> str:
    """A flow's output as text: what a model wrote as JSON is kept as JSON."""
    return output if isinstance(output, str) else orjson.dumps(output).decode()
