"""Two readers of the same raw bytes: ours, and as the referee the vendor's own SDK."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from app.providers.provider import Provider
from tests.providers.answers import answered, finish_of, prompt, text_of
from tests.providers.streams import Wire, storable
from tests.providers.wire import as_stream


@dataclass(slots=True)
class Both:
    """The readers of one server, which answers with `response`."""

    ours: Provider
    # The text of an answer.
    by_sdk: Callable[[], Awaitable[str]]
    response: bytes = b""


async def agree_on_a_whole_stream(both: Both, wire: Wire) -> None:
    both.response = as_stream(wire.pieces())
    chunks, error = await answered(both.ours, prompt("any"))
    assert error is None
    assert finish_of(chunks) is not None
    assert text_of(chunks) == storable(await both.by_sdk())


async def agree_on_a_truncated_stream(
    both: Both, wire: Wire, share: float, politely: bool, *, sdk_fails: tuple[type[Exception], ...]
) -> None:
    """`politely`: with the end of the body, so that the SDK takes what there is for an answer, unless it fails."""
    response = as_stream(wire.pieces_before_the_finish(share))
    both.response = response if politely else response.removesuffix(b"0\r\n\r\n")
    chunks, error = await answered(both.ours, prompt("any"))
    assert error is not None
    assert finish_of(chunks) is None
    if politely:
        by_sdk = text_of(chunks)
        with suppress(*sdk_fails):
            by_sdk = storable(await both.by_sdk())
        assert by_sdk.startswith(text_of(chunks))
