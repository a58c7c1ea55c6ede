"""One call of any dialect: the loop around its event stream, and what that has said so far.

A stream is whole when it named a reason to finish, or ended with its end marker after some text (a few servers never
name a reason). Anything else that ends is truncated, however cleanly the connection closed.
"""

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, TypeGuard

import orjson

from app.providers.provider import Chunk, Finish, FinishReason, ProviderError, Text, Usage
from app.providers.transport import Upstream, truncated

# The longest Text, in characters: one event of the log stays small whatever a provider sends at once.
PIECE = 8 * 1024
# How long usage and the end marker may come after the answer is whole.
_AFTERMATH_S = 5
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")
_LARGEST_COUNT = 2**31

# What one payload of a dialect means, told to the answer. Raises ProviderError for an error inside the stream.
Read = Callable[[bytes, "Answer"], None]


async def call(
    upstream: Upstream,
    path: str,
    request: Mapping[str, Any],
    *,
    read: Read,
    read_whole: Read | None = None,
    abandoned: Callable[[], None] | None = None,
) -> AsyncGenerator[Sequence[Chunk], None]:
    """`Provider.stream` for a dialect that posts JSON and streams JSON.

    With `read_whole` an answer in one JSON document is accepted as well. `abandoned` is called after the connection was
    closed on a provider that may not have come to its end.
    """
    body = _encoded(request)
    answer: Answer | None = None
    with upstream.slot():
        try:
            async with upstream.post(path, body, documents=read_whole is not None) as reading:
                answer = Answer(upstream.name, read_whole if read_whole and reading.whole else read)
                try:
                    async for payloads in reading:
                        if batch := answer.hear(payloads):
                            yield batch
                            reading.allow(_AFTERMATH_S if answer.finished else None)
                        if answer.over:
                            break
                except ProviderError:
                    if not answer.finished:  # after it only usage and the end marker can be missing
                        raise
                if batch := answer.end():
                    yield batch
                await reading.drain()
        except BaseException as error:
            if abandoned is not None and _may_work_on(answer, error):
                abandoned()
            raise


def _may_work_on(answer: "Answer | None", error: BaseException) -> bool:
    """Whether a provider that does not notice a closed connection still has something to do."""
    if answer is None:  # cancelled or too late before there was a response; everything else is a refusal
        return not isinstance(error, ProviderError) or error.kind == "timeout"
    return not answer.over


def _encoded(request: Mapping[str, Any]) -> bytes:
    try:
        return orjson.dumps(request)
    except orjson.JSONEncodeError:
        detail = "The prompt holds something that JSON cannot carry."
        raise ProviderError("rejected", detail, retryable=False) from None


class Answer:
    """What one stream has said so far: payloads in, chunks out. Holds one batch of chunks and half a character.

    The dialect calls `speak`, `count`, `finish` and `stop` while it reads; what it says after `finish` is ignored, but
    for usage.
    """

    def __init__(self, name: str, read: Read) -> None:
        self.finished = False
        self.over = False
        self._name = name
        self._read = read
        self._chunks: list[Chunk] = []
        self._spoke = False
        self._half = ""  # a high surrogate whose low half may open the next delta
        self._usage: Usage | None = None
        self._told: Usage | None = None
        self._failure: ProviderError | None = None

    def hear(self, payloads: Sequence[bytes]) -> list[Chunk]:
        """The chunks of these payloads, those before a failure included; `end` raises the failure."""
        try:
            for payload in payloads:
                self._read(payload, self)
                if self.over:
                    break
        except ProviderError as error:
            self._failure = error
            self.over = True
        # What is known so early is paid for, even where the answer is stopped before its end.
        if self._chunks and not (self.over or self.finished) and self._usage not in (None, self._told):
            self._told = self._usage
            self._chunks.insert(0, self._usage)
        return self._taken()

    def end(self) -> list[Chunk]:
        """The last chunks. Raises ProviderError when the answer is not whole."""
        if not self.finished:
            if self._failure is not None:
                raise self._failure
            if not (self.over and self._spoke):
                raise truncated(self._name)
            self.finish("stop")
        if self._usage is not None:
            self._chunks.append(self._usage)
        return self._taken()

    def _taken(self) -> list[Chunk]:
        chunks, self._chunks = self._chunks, []
        return chunks

    def speak(self, text: object) -> None:
        """The next piece of the answer; anything but text is ignored."""
        if self.finished or not isinstance(text, str) or not text:
            return
        if self._half or _UNSTORABLE.search(text):
            text = self._storable(text)
        if len(text) > PIECE:
            self._chunks.extend(Text(text[start : start + PIECE]) for start in range(0, len(text), PIECE))
        elif text:
            self._chunks.append(Text(text))
        self._spoke = True

    def _storable(self, text: str) -> str:
        """PostgreSQL stores neither U+0000 nor lone surrogates. The halves of an emoji may come in two deltas."""
        text = self._half + text
        self._half = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
        text = text.removesuffix(self._half)
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        return whole.replace("\x00", "\ufffd")

    def finish(self, reason: FinishReason) -> None:
        """The provider named the reason why the answer ends here."""
        if self.finished:
            return
        if self._half:
            self._chunks.append(Text("\ufffd"))
        self._chunks.append(Finish(reason))
        self.finished = True

    def stop(self) -> None:
        """The end marker: nothing follows."""
        self.over = True

    def count(self, prompt_tokens: object, completion_tokens: object) -> None:
        """The tokens used so far, if these are numbers that can be; the last counts win."""
        if _is_count(prompt_tokens) and _is_count(completion_tokens):
            self._usage = Usage(prompt_tokens, completion_tokens)


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _LARGEST_COUNT


def object_of(payload: bytes) -> Mapping[str, Any]:
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
