"""Flowise's predictions as a stream: chatflows and agentflows, which have their model, tools and memory inside."""

import asyncio
import json
import re
from base64 import b64encode
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Unpack
from urllib.parse import quote
from uuid import uuid4

from app.providers.answer import Answer, call, object_of
from app.providers.provider import (
    Chunk,
    Image,
    Options,
    Prompt,
    PromptMessage,
    ProviderError,
    is_chatflow,
)
from app.providers.transport import Upstream

_CHECK_S = 10
_ABORT_S = 1
# Requests to abort that are under way at once; what is left without one works on to its own end.
_ABORTS = 100
_ROLES = {"user": "userMessage", "assistant": "apiMessage"}
_VERSION = re.compile(r"(/api)?/v1/?$")
# Inside a stream an error is a sentence, often one that a model's vendor said: "… - 429 Rate limit reached".
_STATUS = re.compile(r"(?:^|: |- |\[)([45]\d\d) ")
_UNAUTHORIZED = re.compile(r"\bUnauthorized$")
_ABORTED = re.compile(r"\bAborted$|\bFlow execution was cancelled$")


class Flowise:
    """A provider behind Flowise's URL, with or without `/api/v1` at its end. Key and URL come in resolved.

    `Prompt.model` is the id of a chatflow. The last message of the user is the question, what was said before it the
    history; `parameters` are members of `overrideConfig`. There is no JSON mode. Raises Misconfigured for an unusable
    key or URL.
    """

    def __init__(self, name: str, base_url: str, **options: Unpack[Options]) -> None:
        self._upstream = Upstream(name, _VERSION.sub("", base_url), **options)
        self._aborts = _Aborts(self._upstream)

    @property
    def full(self) -> bool:
        return self._upstream.full

    @property
    def idle(self) -> bool:
        return self._upstream.idle

    def stream(self, prompt: Prompt) -> AsyncGenerator[Sequence[Chunk], None]:
        flow = _segment(self._upstream.name, prompt.model)
        # Flowise sends what is said in a chat to whoever asked in it last (FlowiseAI/Flowise#3474): one chat per call
        # keeps flows of one session, and a try from the one before it, apart. Memory goes by the session.
        chat = str(uuid4())
        prediction = _Prediction(self._upstream)
        return call(
            self._upstream,
            f"api/v1/prediction/{flow}",
            _request(self._upstream.name, prompt, chat),
            read=prediction.read,
            read_whole=prediction.read_whole,
            abandoned=lambda: self._aborts.ask(f"api/v1/chatmessage/abort/{flow}/{chat}"),
        )

    async def check(self) -> str:
        name = self._upstream.name
        if (await self._upstream.get("api/v1/ping", within_s=_CHECK_S)).strip() != b"pong":
            detail = f"Provider '{name}' answers, but not as Flowise does; is its base_url right?"
            raise ProviderError("protocol", detail, retryable=False)
        return f"Provider '{name}' answers; whether its key fits a chatflow shows when that is asked."

    async def aclose(self) -> None:
        await self._aborts.aclose()
        await self._upstream.aclose()


def _segment(name: str, model: str) -> str:
    """The id of a chatflow as one segment of a path, whatever is in it. Raises ProviderError for what cannot be."""
    if not is_chatflow(model):
        detail = f"Provider '{name}' takes the id of a chatflow for a model, and this is none."
        raise ProviderError("rejected", detail, retryable=False)
    return quote(model, safe="")


def _request(name: str, prompt: Prompt, chat: str) -> Mapping[str, Any]:
    past, question = _divided(name, prompt.messages)
    return {
        "question": question.content,
        "chatId": chat,
        "streaming": True,
        "history": [{"role": _ROLES[message.role], "content": message.content} for message in past],
        "overrideConfig": {**_overrides(prompt), **prompt.parameters},
        "uploads": [_upload(image, number) for number, image in enumerate(question.images, 1)],
    }


def _divided(name: str, messages: Sequence[PromptMessage]) -> tuple[Sequence[PromptMessage], PromptMessage]:
    """What was said before, and the question. What follows the question has no place in the dialect."""
    spoken = [message for message in messages if message.role != "system"]
    last = max((place for place, message in enumerate(spoken) if message.role == "user"), default=None)
    if last is None:
        raise ProviderError("rejected", f"Provider '{name}' was asked nothing.", retryable=False)
    return spoken[:last], spoken[last]


def _overrides(prompt: Prompt) -> Mapping[str, Any]:
    told = [message.content for message in prompt.messages if message.role == "system" and message.content.strip()]
    overrides = {
        "sessionId": prompt.session_id,
        "systemMessage": "\n\n".join(told),
        "topK": prompt.top_k,
        "maxTokens": prompt.max_tokens,
    }
    return {name: value for name, value in overrides.items() if value}


def _upload(image: Image, number: int) -> Mapping[str, str]:
    data = f"data:{image.mime};base64,{b64encode(image.data).decode()}"
    name = f"picture-{number}.{image.mime.removeprefix('image/')}"
    return {"data": data, "type": "file", "name": name, "mime": image.mime}


class _Prediction:
    """What the events of one stream mean, or the document of a flow that cannot stream.

    The dialect has a dozen more events, about tools, agents and sources. `start` repeats the first token; `metadata`
    comes when all is said, but over a queue sooner than the last tokens, so only `end` ends an answer.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._name = upstream.name
        self._refusals = upstream.refusals
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def read(self, payload: bytes, answer: Answer) -> None:
        event = object_of(payload)
        match event.get("event"):
            case "token":
                answer.speak(event.get("data"))
            case "end":
                answer.stop()
            case "error":
                raise self._failure(event.get("data"))
            case "abort":
                raise self._aborted()
            case "usageMetadata":
                self._count(event.get("data"), answer)

    def read_whole(self, payload: bytes, answer: Answer) -> None:
        document = object_of(payload)
        if isinstance(text := document.get("text"), str):
            answer.speak(text)
        elif isinstance(value := document.get("json"), dict | list):  # of a chain with an output parser
            answer.speak(json.dumps(value, ensure_ascii=False))
        elif message := document.get("message") or document.get("error"):
            raise self._refusals.told({"message": message, "code": document.get("statusCode")})
        else:
            detail = f"Provider '{self._name}' answered with a document that holds no text."
            raise ProviderError("protocol", detail, retryable=False)
        answer.stop()

    def _failure(self, said: Any) -> ProviderError:
        if not isinstance(said, str):
            return self._refusals.told(said)
        if _ABORTED.search(said):
            return self._aborted()
        status = 401 if _UNAUTHORIZED.search(said) else int(found[1]) if (found := _STATUS.search(said)) else None
        return self._refusals.told({"message": said, "code": status})

    def _aborted(self) -> ProviderError:
        # Never our own doing: who asks to abort listens no more. It is somebody's will, and not to be undone.
        return ProviderError("unavailable", f"Provider '{self._name}' was told to abort the answer.", retryable=False)

    def _count(self, usage: Any, answer: Answer) -> None:
        """Each model that a flow asks tells its own counts."""
        match usage:
            case {"input_tokens": int(prompt_tokens), "output_tokens": int(completion_tokens)}:
                self._prompt_tokens += prompt_tokens
                self._completion_tokens += completion_tokens
                answer.count(self._prompt_tokens, self._completion_tokens)


class _Aborts:
    """Asks Flowise to stop what nobody hears any more: it does not notice that a connection closed.

    In tasks of its own, so that closing waits for nothing: at most _ABORTS at once, each for at most _ABORT_S.
    """

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._room = _ABORTS
        self._tasks: set[asyncio.Task[None]] = set()

    def ask(self, path: str) -> None:
        if len(self._tasks) < self._room:
            task = asyncio.get_running_loop().create_task(self._put(path), name="flowise abort")
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _put(self, path: str) -> None:
        with suppress(ProviderError):
            await self._upstream.put(path, within_s=_ABORT_S)

    async def aclose(self) -> None:
        """Wait for those under way; no more are asked."""
        self._room = 0
        if self._tasks:
            await asyncio.wait(self._tasks)
