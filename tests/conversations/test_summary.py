"""A conversation's figures do not depend on the order and the groups in which its rows are read."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta, timezone
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from app.conversations.summary import Figures, Said, Summaries, Summary, fold

NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
SAID = st.builds(
    Said,
    conversation_id=st.sampled_from("abc"),
    username=st.sampled_from(["", "ann"]),
    rank=st.integers(0, 20),  # few, so that some are equal
    key=st.integers(0, 9999).map(str),
    role=st.sampled_from(["user", "assistant", "other"]),
    at=st.none() | st.integers(-5, 5).map(lambda days: NOON + timedelta(days=days)),
    question=st.sampled_from(["", "Why?", "x" * 299 + "yz", "x" * 299 + "yy"]),
    model=st.sampled_from(["", "m", "n"]),
    client_ip=st.sampled_from(["", "::1"]),
    chatbot_id=st.sampled_from(["", "bot", "bat"]),
    tokens=st.integers(0, 99),
    duration_ms=st.integers(0, 99),
    messages=st.integers(1, 2),
)


def merged(one: Summaries, other: Summaries) -> Summaries:
    for name, summary in other.items():
        one.setdefault(name, Summary(summary.most_keys)).merge(summary)
    return one


@given(st.lists(SAID, max_size=30), st.randoms(), st.integers(0, 5))
def test_any_order_and_grouping_gives_the_same(rows: list[Said], chance: Random, most_keys: int) -> None:
    expected = fold(rows, most_keys=most_keys)
    shuffled = list(rows)
    chance.shuffle(shuffled)
    cuts = sorted(chance.sample(range(len(rows) + 1), min(3, len(rows))))
    groups = [shuffled[start:end] for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    summaries = [fold(group, most_keys=most_keys) for group in groups]
    left: Summaries = {}
    for summary in summaries:
        left = merged(left, summary)
    right: Summaries = {}
    for group in reversed(groups):
        right = merged(fold(group, most_keys=most_keys), right)
    assert left == right == expected
    assert fold(shuffled, most_keys=most_keys) == expected


@given(st.lists(SAID, max_size=30))
def test_figures_are_what_a_count_says(rows: list[Said]) -> None:
    for (username, conversation_id), summary in fold(rows).items():
        own = [row for row in rows if (row.username, row.conversation_id) == (username, conversation_id)]
        asked = sorted((row.rank, row.question[:300]) for row in own if row.role == "user" and row.question)
        assert summary.messages == sum(row.messages for row in own)
        assert summary.tokens == sum(row.tokens for row in own)
        assert (summary.first_question, summary.last_question) == ((asked[0], asked[-1]) if asked else (None, None))
        assert summary.model == max(((row.rank, row.model) for row in own if row.model), default=None)
        assert summary.keys == sorted((row.rank, row.key) for row in own)
        assert sum(day.messages for day in summary.days.values()) == summary.messages
        assert sum(day.questions for day in summary.days.values()) == sum(row.role == "user" for row in own)


def one(rows: Sequence[Said]) -> Summary:
    (summary,) = fold(rows).values()
    return summary


def test_only_the_newest_keys_are_kept() -> None:
    summary = one([Said("c", "", rank, f"k{rank}", "user") for rank in (*range(150, 300), *range(150))])
    assert summary.keys == [(rank, f"k{rank}") for rank in range(100, 300)]


def test_days_are_those_of_utc() -> None:
    late = datetime(2026, 11, 21, 23, tzinfo=timezone(timedelta(hours=-5)))
    summary = one([Said("c", "", 1, "1", "user", late, tokens=3), Said("c", "", 2, "2", "user", model="m")])
    assert summary.days == {(date(2026, 11, 22), "", ""): Figures(1, 1, 3, 0), (None, "", "m"): Figures(1, 1, 0, 0)}
