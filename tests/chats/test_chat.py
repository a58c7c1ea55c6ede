"""How much of a chat a model is shown, and how many tokens a text may cost it."""

import pytest

from app.chats.chat import Message, Role, estimated_tokens, fitting

EMPTY = estimated_tokens("")


def chat(*roles: Role) -> list[Message]:
    return [Message(role, f"{number:03}") for number, role in enumerate(roles)]


COST = estimated_tokens("000")


def test_the_newest_messages_within_the_budget_are_kept() -> None:
    messages = chat("user", "assistant", "user", "assistant", "user", "assistant")
    assert fitting(messages, limit=200, budget_tokens=4 * COST) == messages[2:]
    assert fitting(messages, limit=200, budget_tokens=6 * COST) == messages
    assert fitting(messages, limit=4, budget_tokens=6 * COST) == messages[2:]
    assert fitting(messages, limit=0, budget_tokens=6 * COST) == []
    assert fitting(messages, limit=200, budget_tokens=-1) == []


def test_a_message_too_long_ends_the_history_even_where_older_ones_would_fit() -> None:
    messages = [Message("user", "short"), Message("assistant", "long " * 1000), *chat("user", "assistant")]
    assert fitting(messages, limit=200, budget_tokens=500) == messages[2:]


def test_an_answer_goes_with_its_question() -> None:
    messages = chat("user", "assistant", "user", "assistant")
    assert fitting(messages, limit=200, budget_tokens=3 * COST) == messages[2:]
    assert fitting(messages, limit=3, budget_tokens=100 * COST) == messages[2:]
    assert fitting(messages, limit=1, budget_tokens=100 * COST) == []


def test_a_greeting_that_opens_the_chat_stays_while_everything_fits() -> None:
    messages = chat("assistant", "user", "assistant")
    assert fitting(messages, limit=200, budget_tokens=3 * COST) == messages
    assert fitting(messages, limit=200, budget_tokens=3 * COST - 1) == messages[1:]


# One sentence each, at no less than what common tokenizers take: a quarter of a token per letter of the Latin script,
# a third in others that have letters, and one token per syllable or character where each is one.
@pytest.mark.parametrize(
    ("text", "per_character"),
    [
        ("The library opens at nine and closes at half past six in the evening.", 1 / 4),
        ("Die Bücherei öffnet um neun und schließt abends um halb sieben.", 1 / 4),
        ("La bibliothèque ouvre à neuf heures et ferme à six heures et demie.", 1 / 4),
        ("Thư viện mở cửa lúc chín giờ sáng và đóng cửa lúc sáu giờ rưỡi chiều.", 1 / 2),
        ("Библиотека открывается в девять и закрывается в половине седьмого.", 1 / 2),
        ("تفتح المكتبة أبوابها في التاسعة وتغلق في السادسة والنصف مساءً.", 3 / 4),
        ("पुस्तकालय नौ बजे खुलता है और शाम साढ़े छह बजे बंद होता है।", 1),
        ("图书馆早上九点开门，晚上六点半关门。", 1.25),
        ("図書館は朝九時に開き、夕方六時半に閉まります。", 1.25),
        ("도서관은 아침 아홉 시에 열고 저녁 여섯 시 반에 닫습니다.", 1),
        ("🙂👍🏽🎉", 2),
    ],
)
def test_the_estimate_is_no_less_than_what_tokenizers_take(text: str, per_character: float) -> None:
    assert estimated_tokens(text) >= per_character * len(text)
    assert estimated_tokens(text) <= len(text.encode()) / 2 + EMPTY


def test_half_a_character_is_counted_too() -> None:
    assert estimated_tokens("\ud83d") >= EMPTY
