"""Every dialect as the shared tests know it: its provider, and streams as bytes. A new dialect adds itself here."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from app.providers.anthropic import Anthropic
from app.providers.flowise import Flowise
from app.providers.openai import OpenAI
from app.providers.provider import Kind, Provider


@dataclass(frozen=True, slots=True)
class Dialect:
    """`finished` says "Hi" and why it ends; `marker` is the end marker that may follow, if the dialect has one.

    A dialect that names no reason finishes with its marker; one takes a document for an answer. `checked` is how
    `check` goes on after "Provider 'vendor'".
    """

    kind: Kind
    provider: Callable[..., Provider]
    path: str
    finished: bytes
    marker: bytes
    names_reason: bool = True
    takes_documents: bool = False
    checked: str = "answers and offers 3 models."


def event(name: str = "", /, **members: object) -> bytes:
    """A frame; with a name, the event's type is inside the data as well, as Anthropic has it."""
    if not name:
        return b"data: " + json.dumps(members).encode() + b"\n\n"
    return b"event: %s\n" % name.encode() + event(**{"type": name, **members})


OPENAI = Dialect(
    kind="openai",
    provider=OpenAI,
    path="/v1/chat/completions",
    finished=event(choices=[{"delta": {"content": "Hi"}, "finish_reason": "stop"}]),
    marker=b"data: [DONE]\n\n",
)
ANTHROPIC = Dialect(
    kind="anthropic",
    provider=Anthropic,
    path="/v1/messages",
    finished=event("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi"})
    + event("message_delta", delta={"stop_reason": "end_turn"}),
    marker=event("message_stop"),
)
FLOWISE = Dialect(
    kind="flowise",
    provider=Flowise,
    path="/api/v1/prediction/any",
    finished=event(event="token", data="Hi") + event(event="end", data="[DONE]"),
    marker=event(event="end", data="[DONE]"),
    names_reason=False,
    takes_documents=True,
    checked="answers; whether its key fits a chatflow shows when that is asked.",
)
DIALECTS: Mapping[str, Dialect] = {dialect.kind: dialect for dialect in (OPENAI, ANTHROPIC, FLOWISE)}
