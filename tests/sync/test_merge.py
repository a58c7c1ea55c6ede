"""The merge rule, by its vectors, and what must hold of it whatever is said."""

from typing import Any

import pytest

from app.sync.merge import apply, behind, stamp_at
from tests.sync.vectors import cases, op, state


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_the_vectors_hold(case: dict[str, Any]) -> None:
    before, after = state(case["before"]), state(case["after"])
    outcomes = [apply(before, op(one), client=case["client"], now_ms=case.get("now")) for one in case["ops"]]
    assert (before.chats, before.messages) == (after.chats, after.messages)
    assert [outcome.status for outcome in outcomes] == case["outcomes"]


@pytest.mark.parametrize("case", cases(), ids=lambda case: case["name"])
def test_what_is_said_twice_is_said_once(case: dict[str, Any]) -> None:
    given = state(case["before"])
    for one in (*case["ops"], *case["ops"]):
        apply(given, op(one), client=case["client"])
    once = state(case["before"])
    for one in case["ops"]:
        apply(once, op(one), client=case["client"])
    assert (given.chats, given.messages) == (once.chats, once.messages)


def test_stamps_compare_as_texts() -> None:
    assert behind(stamp_at(5, 0xFFFF)) == stamp_at(6)
    assert stamp_at(5) < behind(stamp_at(5)) < stamp_at(6) < stamp_at(1 << 40)
