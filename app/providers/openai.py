"""The OpenAI-compatible dialect: chat completions as a stream, as OpenAI, Ollama, vLLM and many others speak it."""

from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Unpack

from app.providers.answer import Answer, call, object_of
from app.providers.provider import Chunk, FinishReason, LimitName, Options, Prompt, PromptMessage
from app.providers.transport import Upstream

_CHECK_S = 10
_DONE = b"[DONE]"
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
        include_usage: bool = True,
        limit_name: LimitName = "max_completion_tokens",
        **options: Unpack[Options],
    ) -> None:
        self._upstream = Upstream(name, base_url, **options)
        self._extra = {"stream_options": {"include_usage": True}} if include_usage else {}
        self._limit_name = limit_name

    @property
    def full(self) -> bool:
        return self._upstream.full

    @property
    def idle(self) -> bool:
        return self._upstream.idle

    def stream(self, prompt: Prompt) -> AsyncGenerator[Sequence[Chunk], None]:
        return call(self._upstream, "chat/completions", self._request(prompt), read=self._read)

    async def check(self) -> str:
        listed = object_of(await self._upstream.get("models", within_s=_CHECK_S)).get("data")
        count = f"{len(listed)} models" if isinstance(listed, list) else "an unknown number of models"
        return f"Provider '{self._upstream.name}' answers and offers {count}."

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _request(self, prompt: Prompt) -> Mapping[str, Any]:
        limit: Mapping[str, Any] = {self._limit_name: prompt.max_tokens} if prompt.max_tokens else {}
        form: Mapping[str, Any] = {"response_format": {"type": "json_object"}} if prompt.json_output else {}
        return {
            **self._extra,
            **limit,
            **form,
            **prompt.parameters,
            "model": prompt.model,
            "messages": [{"role": message.role, "content": _content(message)} for message in prompt.messages],
            "stream": True,
        }

    def _read(self, payload: bytes, answer: Answer) -> None:
        if payload.startswith(_DONE):
            answer.stop()
            return
        event = object_of(payload)
        if error := event.get("error"):
            raise self._upstream.refusals.told(error)
        if isinstance(usage := event.get("usage"), dict):
            answer.count(usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        if (choice := _first_choice(event)) is None:
            return
        if isinstance(delta := choice.get("delta"), dict):
            answer.speak(delta.get("content"))
        if reason := choice.get("finish_reason"):
            if reason == "error" and not answer.finished:
                raise self._upstream.refusals.told(None)
            answer.finish(_REASONS.get(reason, "stop") if isinstance(reason, str) else "stop")


def _content(message: PromptMessage) -> str | list[dict[str, Any]]:
    """The text alone, or parts where there are pictures, which go in as data URLs."""
    if not message.images:
        return message.content
    pictures = [
        {"type": "image_url", "image_url": {"url": f"data:{image.mime};base64,{b64encode(image.data).decode()}"}}
        for image in message.images
    ]
    return [{"type": "text", "text": message.content}, *pictures]


def _first_choice(event: Mapping[str, Any]) -> dict[str, Any] | None:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    choice = choices[0]
    return choice if isinstance(choice, dict) and choice.get("index", 0) == 0 else None
