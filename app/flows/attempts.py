"""Calling a provider again when it failed before it said anything: nobody saw the failed tries (G8)."""

from collections.abc import AsyncGenerator, Callable, Sequence

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential

from app.providers.provider import Chunk, Effort, ProviderError

Call = AsyncGenerator[Sequence[Chunk], None]


async def begun(call: Callable[[], Call], effort: Effort) -> tuple[Sequence[Chunk], Call]:
    """The first batch, and the generator of the others, which the caller closes."""
    retrying = AsyncRetrying(
        stop=stop_after_attempt(1 + effort.retries),
        wait=lambda state: _pause_s(state, effort),
        retry=retry_if_exception(lambda error: isinstance(error, ProviderError) and error.retryable),
        reraise=True,
    )
    return await retrying(_begun, call)


async def _begun(call: Callable[[], Call]) -> tuple[Sequence[Chunk], Call]:
    batches = call()
    return await anext(batches), batches


def _pause_s(state: RetryCallState, effort: Effort) -> float:
    backoff = wait_random_exponential(multiplier=effort.backoff_s, max=effort.longest_wait_s)(state)
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, ProviderError) else None
    return max(backoff, min(asked or 0, effort.longest_wait_s))
