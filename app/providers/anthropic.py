"""Anthropic's Messages as a stream, as Claude and the servers compatible with it speak it."""

from base64 import b64encode
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Unpack

from app.providers.answer import Answer, call, object_of
from app.providers.provider import Chunk, FinishReason, Options, Prompt, PromptMessage
from app.providers.refusal import Refusals
from app.providers.transport import Upstream

# The newer 2026-10-21 streams the same events, but refuses temperature, top_p and top_k, which chatbots may set.
VERSION = "2023-06-01"
# The dialect demands a limit. Every current model takes this one (the first of Claude 3 stopped at 4,096), and it is
# several times the longest usual answer, so that a model which thinks first has room left for the answer.
MAX_TOKENS = 8192
# Where the dialect demands a message of the user with some text, and there is none.
NOTHING = "…"
_CHECK_S = 10
_REASONS: Mapping[str, FinishReason] = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "refusal": "content_filter",
    "tool_use": "tool_calls",
}
_PROMPT_COUNTS = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")


class Anthropic:
    """A provider behind Anthropic's URL, with or without `/v1` at its end. Key and URL come in resolved.

    Without `Prompt.max_tokens` the limit is MAX_TOKENS. The dialect has no JSON mode: `json_output` sends nothing, and
    the flow's text must ask for JSON (a schema can be sent as the parameter `output_config`). `top_k` and `session_id`
    are ignored. Raises Misconfigured for an unusable key or URL.
    """

    def __init__(self, name: str, base_url: str, **options: Unpack[Options]) -> None:
        headers = {"anthropic-version": VERSION}
        self._upstream = Upstream(name, base_url, key_header="x-api-key", headers=headers, **options)
        self._root = "" if base_url.rstrip("/").endswith("/v1") else "v1/"

    @property
    def full(self) -> bool:
        return self._upstream.full

    @property
    def idle(self) -> bool:
        return self._upstream.idle

    def stream(self, prompt: Prompt) -> AsyncGenerator[Sequence[Chunk], None]:
        reader = _Reader(self._upstream.refusals)
        return call(self._upstream, f"{self._root}messages", _request(prompt), read=reader.read)

    async def check(self) -> str:
        listed = object_of(await self._upstream.get(f"{self._root}models?limit=1000", within_s=_CHECK_S)).get("data")
        count = f"{len(listed)} models" if isinstance(listed, list) else "an unknown number of models"
        return f"Provider '{self._upstream.name}' answers and offers {count}."

    async def aclose(self) -> None:
        await self._upstream.aclose()


def _request(prompt: Prompt) -> Mapping[str, Any]:
    told = [message.content for message in prompt.messages if message.role == "system" and message.content.strip()]
    return {
        "max_tokens": prompt.max_tokens or MAX_TOKENS,
        **prompt.parameters,
        **({"system": "\n\n".join(told)} if told else {}),
        "model": prompt.model,
        "messages": _turns(message for message in prompt.messages if message.role != "system"),
        "stream": True,
    }


def _turns(messages: Iterable[PromptMessage]) -> list[dict[str, Any]]:
    """The messages as the dialect wants them: the user first, roles alternating, no turn and no text block blank.

    A blank answer is left out, a blank question becomes NOTHING, and so does the question that is missing before a
    conversation which the assistant opens.
    """
    spoken = [_told(message) for message in messages if message.role == "user" or not _blank(message)]
    if not spoken or spoken[0].role != "user":
        spoken.insert(0, PromptMessage("user", NOTHING))
    turns = groupby(spoken, key=lambda message: message.role)
    return [{"role": role, "content": _content(list(told))} for role, told in turns]


def _told(message: PromptMessage) -> PromptMessage:
    return PromptMessage(message.role, NOTHING) if _blank(message) else message


def _content(messages: Sequence[PromptMessage]) -> str | list[dict[str, Any]]:
    """The text alone where it is one, else blocks: each message's pictures before its text."""
    blocks = [block for message in messages for block in _blocks(message)]
    match blocks:
        case [{"type": "text", "text": text}]:
            return str(text)
        case _:
            return blocks


def _blocks(message: PromptMessage) -> list[dict[str, Any]]:
    pictures: list[dict[str, Any]] = [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": image.mime, "data": b64encode(image.data).decode()},
        }
        for image in message.images
    ]
    return [*pictures, {"type": "text", "text": message.content}] if message.content.strip() else pictures


def _blank(message: PromptMessage) -> bool:
    return not message.content.strip() and not message.images


class _Reader:
    """What the events of one stream mean. The types of events and blocks it does not know are many, and ignored."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._counts: dict[str, int] = {}

    def read(self, payload: bytes, answer: Answer) -> None:
        event = object_of(payload)
        match event:
            case {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}}:
                answer.speak(text)
            case {"type": "content_block_start", "content_block": {"type": "text", "text": text}}:
                answer.speak(text)
            case {"type": "message_start", "message": {"usage": usage}}:
                self._count(usage, answer)
            case {"type": "message_delta"}:
                self._count(event.get("usage"), answer)
                self._finish(event.get("delta"), answer)
            case {"type": "message_stop"}:
                answer.stop()
            case {"type": "error"} | {"error": str() | {}}:
                raise self._refusals.told(event.get("error"))

    def _count(self, usage: Any, answer: Answer) -> None:
        """Counts are totals, and later events repeat only some of them."""
        if not isinstance(usage, dict):
            return
        names = (*_PROMPT_COUNTS, "output_tokens")
        self._counts |= {name: usage[name] for name in names if type(usage.get(name)) is int}
        prompt_tokens = sum(self._counts.get(name, 0) for name in _PROMPT_COUNTS)
        answer.count(prompt_tokens, self._counts.get("output_tokens", 0))

    def _finish(self, delta: Any, answer: Answer) -> None:
        if isinstance(delta, dict) and isinstance(reason := delta.get("stop_reason"), str):
            answer.finish(_REASONS.get(reason, "stop"))
