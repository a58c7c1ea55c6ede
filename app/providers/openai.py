"""The OpenAI-compatible dialect: chat completions as a stream, as OpenAI, Ollama, vLLM and many others speak it.

A stream is whole when it named a finish_reason, or ended with [DONE] after some text (a few servers never name a
reason). Anything else that ends is truncated, however cleanly the connection closed.
"""

import json
import re
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import orjson

from app.providers.provider import (
    CONCURRENCY,
    Chunk,
    Deadlines,
    Finish,
    FinishReason,
    LimitName,
    Prompt,
    PromptMessage,
    ProviderError,
    Text,
    Usage,
)
from app.providers.refusal import Refusals
from app.providers.transport import Upstream, truncated

# The longest Text, in characters: one event of the log stays small whatever a provider sends at once.
PIECE = 8 * 1024
# How long usage and [DONE] may come after the answer is whole.
_AFTERMATH_S = 5
_CHECK_S = 10
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_DONE = b"[DONE]"
_LARGEST_COUNT = 2**31
_REASONS: Mapping[str, FinishReason] = {
    "length": "length",
    "max_tokens": "length",
    "content_filter": "content_filter",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


class OpenAI:
    """A provider behind an OpenAI-compatible URL (`…/v1`). Key and URL come in resolved.

    `include_usage` asks for token counts; turn it off for servers that refuse `stream_options`. `limit_name` is what
    the server calls a limit of tokens. Raises Misconfigured for an unusable key or URL.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        *,
        api_key: str | None = None,
        include_usage: bool = True,
        limit_name: LimitName = "max_completion_tokens",
        deadlines: Deadlines | None = None,
        concurrency: int = CONCURRENCY,
    ) -> None:
        self._upstream = Upstream(name, base_url, api_key=api_key, deadlines=deadlines, concurrency=concurrency)
        self._extra = {"stream_options": {"include_usage": True}} if include_usage else {}
        self._limit_name = limit_name

    @property
    def full(self) -> bool:
        return self._upstream.full

    async def stream(self, prompt: Prompt) -> AsyncGenerator[Sequence[Chunk], None]:
        body = self._request(prompt)
        answer = _Answer(self._upstream.name, self._upstream.refusals)
        with self._upstream.slot():
            async with self._upstream.post("chat/completions", body) as reading:
                try:
                    async for payloads in reading:
                        if batch := answer.read(payloads):
                            yield batch
                            reading.allow(_AFTERMATH_S if answer.finished else None)
                        if answer.over:
                            break
                except ProviderError:
                    if not answer.finished:  # after it only usage and [DONE] can be missing
                        raise
                if batch := answer.end():
                    yield batch
                await reading.drain()

    async def check(self) -> str:
        listed = _object(await self._upstream.get("models", within_s=_CHECK_S)).get("data")
        count = f"{len(listed)} models" if isinstance(listed, list) else "an unknown number of models"
        return f"Provider '{self._upstream.name}' answers and offers {count}."

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _request(self, prompt: Prompt) -> bytes:
        limit: Mapping[str, Any] = {self._limit_name: prompt.max_tokens} if prompt.max_tokens else {}
        form: Mapping[str, Any] = {"response_format": {"type": "json_object"}} if prompt.json_output else {}
        request = {
            **self._extra,
            **limit,
            **form,
            **prompt.parameters,
            "model": prompt.model,
            "messages": [{"role": message.role, "content": _content(message)} for message in prompt.messages],
            "stream": True,
        }
        try:
            return orjson.dumps(request)
        except orjson.JSONEncodeError:
            detail = "The prompt holds something that JSON cannot carry."
            raise ProviderError("rejected", detail, retryable=False) from None


def _content(message: PromptMessage) -> str | list[dict[str, Any]]:
    """The text alone, or parts where there are pictures, which go in as data URLs."""
    if not message.images:
        return message.content
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:{image.mime};base64,{b64encode(image.data).decode()}"}}
        for image in message.images
    ]
    return [{"type": "text", "text": message.content}, *pictures]


class _Answer:
    """What one stream has said so far: payloads in, chunks out."""

    def __init__(self, name: str, refusals: Refusals) -> None:
        self.finished = False
        self.over = False
        self._name = name
        self._refusals = refusals
        self._spoke = False
        self._half = ""  # a high surrogate whose low half may open the next delta
        self._usage: Usage | None = None
        self._failure: ProviderError | None = None

    def read(self, payloads: Sequence[bytes]) -> list[Chunk]:
        """The chunks of these payloads, those before a failure included; `end` raises the failure."""
        chunks: list[Chunk] = []
        try:
            for payload in payloads:
                self._read(payload, chunks)
                if self.over:
                    break
        except ProviderError as error:
            self._failure = error
            self.over = True
        return chunks

    def end(self) -> list[Chunk]:
        """The last chunks. Raises ProviderError when the answer is not whole."""
        chunks: list[Chunk] = []
        if not self.finished:
            if self._failure is not None:
                raise self._failure
            if not (self.over and self._spoke):
                raise truncated(self._name)
            self._finish("stop", chunks)
        if self._usage is not None:
            chunks.append(self._usage)
        return chunks

    def _read(self, payload: bytes, chunks: list[Chunk]) -> None:
        if payload.startswith(_DONE):
            self.over = True
            return
        event = _object(payload)
        if error := event.get("error"):
            raise self._refusals.told(error)
        if usage := event.get("usage"):
            self._usage = _usage(usage) or self._usage
        choice = _first_choice(event)
        if choice is None or self.finished:
            return
        delta = choice.get("delta")
        if isinstance(delta, dict) and (text := delta.get("content")) and isinstance(text, str):
            self._speak(text, chunks)
        if reason := choice.get("finish_reason"):
            if reason == "error":
                raise self._refusals.told(None)
            self._finish(_REASONS.get(reason, "stop") if isinstance(reason, str) else "stop", chunks)

    def _speak(self, text: str, chunks: list[Chunk]) -> None:
        if self._half or _UNSTORABLE.search(text):
            text = self._storable(text)
        if len(text) > PIECE:
            chunks.extend(Text(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
        elif text:
            chunks.append(Text(text))
        self._spoke = True

    def _storable(self, text: str) -> str:
        """PostgreSQL stores neither U+0000 nor lone surrogates. The halves of an emoji may come in two deltas."""
        text = self._half + text
        self._half = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        text = text.removesuffix(self._half)
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return whole.replace("\x00", "\ufffd")

    def _finish(self, reason: FinishReason, chunks: list[Chunk]) -> None:
        if self._half:
            chunks.append(Text("\ufffd"))
        chunks.append(Finish(reason))
        self.finished = True


def _first_choice(event: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    choice = choices[0]
    return choice if isinstance(choice, dict) and choice.get("index", 0) == 0 else None


def _usage(usage: Any) -> Usage | None:
    if not isinstance(usage, dict):
        return None
    counts = [usage.get(key) or 0 for key in ("prompt_tokens", "completion_tokens")]
    if any(type(count) is not int or not 0 <= count < _LARGEST_COUNT for count in counts):
        return None
    return Usage(*counts)


def _object(payload: bytes) -> Mapping[str, Any]:
    """The JSON object of one event; other JSON counts as an event nobody knows. Raises ProviderError for no JSON."""
    try:
        value = orjson.loads(payload)
    except orjson.JSONDecodeError:
        value = _parsed_leniently(payload)
    return value if isinstance(value, dict) else {}


def _parsed_leniently(payload: bytes) -> Any:
    """orjson refuses lone surrogates and broken UTF-8, which servers do send when they cut text at any byte."""
    if not payload.strip():
        return None
    try:
        return json.loads(payload.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        raise ProviderError("protocol", "The provider sent an event that is not JSON.", retryable=False) from None
