"""What is kept of a history is a tail of it, fits, and is the longest that does and begins where an exchange begins."""

from hypothesis import given
from hypothesis import strategies as st

from app.chats.chat import Message, Role, estimated_tokens, fitting

roles: st.SearchStrategy[Role] = st.sampled_from(["user", "assistant", "system"])
texts = st.one_of(st.text(max_size=30), st.integers(0, 200).map(lambda size: "x" * size))
histories = st.lists(st.builds(Message, roles, texts), max_size=12)


def _fits(tail: list[Message], limit: int, budget: int) -> bool:
    return len(tail) <= limit and sum(estimated_tokens(message.content) for message in tail) <= budget


@given(histories, st.integers(0, 14), st.integers(-10, 300))
def test_the_longest_tail_that_fits_is_kept(messages: list[Message], limit: int, budget: int) -> None:
    kept = fitting(messages, limit=limit, budget_tokens=budget)
    tails = [messages[start:] for start in range(len(messages) + 1)]
    may_begin = [tail for tail in tails if tail == messages or not tail or tail[0].role != "assistant"]
    assert kept == next((tail for tail in may_begin if _fits(tail, limit, budget)), [])


@given(histories, st.integers(0, 14), st.integers(-10, 300), st.integers(0, 200))
def test_more_room_never_keeps_less(messages: list[Message], limit: int, budget: int, more: int) -> None:
    kept = fitting(messages, limit=limit, budget_tokens=budget)
    assert len(fitting(messages, limit=limit, budget_tokens=budget + more)) >= len(kept)
    assert len(fitting(messages, limit=limit + more, budget_tokens=budget)) >= len(kept)


@given(st.text(), st.text())
def test_a_longer_text_never_counts_less(first: str, second: str) -> None:
    assert estimated_tokens(first + second) >= max(estimated_tokens(first), estimated_tokens(second))
    whole = estimated_tokens(first) + estimated_tokens(second) - estimated_tokens("")
    assert abs(estimated_tokens(first + second) - whole) <= 2
