"""What a test asks a provider, and what came of it."""

from collections.abc import Callable, Sequence
from contextlib import aclosing

from app.providers.provider import Chunk, Finish, Prompt, PromptMessage, Provider, ProviderError, Text, Usage
from tests.providers.wire import as_stream, raw_server, written


def prompt(model: str, question: str = "Hello", **parameters: object) -> Prompt:
    return Prompt(model, [PromptMessage("user", question)], parameters)


async def answered(provider: Provider, asked: Prompt) -> tuple[list[Chunk], ProviderError | None]:
    """Every chunk, and the failure that ended them."""
    chunks: list[Chunk] = []
    try:
        async with aclosing(provider.stream(asked)) as batches:
            async for batch in batches:
                assert batch, "an empty batch"
                chunks.extend(batch)
    except ProviderError as error:
        return chunks, error
    return chunks, None


async def failed(provider: Provider, asked: Prompt) -> ProviderError:
    chunks, error = await answered(provider, asked)
    assert error is not None, chunks
    return error


def text_of(chunks: Sequence[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, Text))


def finish_of(chunks: Sequence[Chunk]) -> Finish | None:
    """The finish, which must be the last chunk but for usage."""
    last = [chunk for chunk in chunks if not isinstance(chunk, Usage)][-1:]
    assert sum(isinstance(chunk, Finish) for chunk in chunks) <= 1
    return last[0] if last and isinstance(last[0], Finish) else None


async def played(connect: Callable[..., Provider], *events: bytes) -> tuple[str, Finish | None, ProviderError | None]:
    """What comes of a stream of exactly these events."""
    async with raw_server(lambda writer: written(writer, as_stream(list(events)))) as url:
        chunks, error = await answered(connect(url), prompt("any"))
    return text_of(chunks), finish_of(chunks), error
