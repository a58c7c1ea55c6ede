"""Marks are settled when nobody is left who could still commit an id below them, and not before."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from app.conversations.ranges import GREATEST, Ranges
from app.conversations.watermark import MOST_MARKS, Look, Mark, marked, settle

NOW = Look(100.0, False, frozenset({"3/1"}), 700, 710)


def looked(*writers: str, at: float = 200.0, **fields: object) -> Look:
    return replace(NOW, at=at, writers=frozenset(writers), **fields)  # type: ignore[arg-type]


def test_a_mark_waits_for_its_own_writers_alone() -> None:
    marks = marked([], 10, NOW, grace_s=0)
    assert settle(marks, looked("3/1"), grace_s=0)[0] is None
    assert settle(marks, looked("4/9"), grace_s=0)[0] == 10


def test_a_mark_waits_for_its_grace() -> None:
    marks = marked([], 10, NOW, grace_s=30)
    assert settle(marks, looked(at=129), grace_s=30)[0] is None
    assert settle(marks, looked(at=130), grace_s=30)[0] == 10


def test_whoever_went_with_a_restart_may_be_prepared_under_another_name() -> None:
    marks = marked([], 10, NOW, grace_s=0)
    highest, marks = settle(marks, looked("-1/700", "-1/701"), grace_s=0)
    assert highest is None
    assert settle(marks, looked("-1/701", "-1/702"), grace_s=0)[0] is None
    assert settle(marks, looked("-1/702"), grace_s=0)[0] == 10, "one that is prepared later was none of them"


def test_on_a_standby_every_older_transaction_must_have_ended() -> None:
    standby = replace(NOW, is_standby=True, writers=frozenset())
    marks = marked([], 10, standby, grace_s=0)
    assert settle(marks, replace(standby, at=200, oldest=709), grace_s=0)[0] is None
    assert settle(marks, replace(standby, at=200, oldest=710), grace_s=0)[0] == 10
    assert settle(marks, looked(), grace_s=0) == (None, []), "a primary knows nothing of a standby's marks"


def test_marks_are_bounded_and_the_oldest_stay() -> None:
    marks: list[Mark] = []
    for hi in range(100):
        marks = marked(marks, hi, replace(NOW, at=float(hi)), grace_s=0)
    assert [mark.hi for mark in marks] == [*range(MOST_MARKS - 1), 99]
    assert marked(marks, 99, NOW, grace_s=0) == marks
    assert Mark.from_json(marks[0].to_json()) == marks[0]


NUMBERS = st.sets(st.integers(-30, 30))


@given(NUMBERS, NUMBERS, st.integers(-31, 31))
def test_ranges_are_sets(one: set[int], other: set[int], floor: int) -> None:
    ranges = Ranges().with_numbers(one).with_numbers(other)
    numbers = one | other
    assert {number for number in range(-40, 40) if number in ranges} == numbers
    assert all(after[0] > before[1] + 1 for before, after in zip(ranges.spans, ranges.spans[1:], strict=False))
    assert ranges.above(floor) == Ranges().with_numbers(number for number in numbers if number > floor)
    gaps = ranges.gaps(floor)
    assert gaps[-1] == (max([floor, *numbers]), GREATEST)
    missing = {number for after, before in gaps for number in range(after + 1, min(before, 40))}
    assert missing == {number for number in range(floor + 1, 40) if number not in numbers}
