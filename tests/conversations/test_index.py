"""The index of our own chats: after anything that happens to them it is what a count over their messages says."""

from tests.conversations.counted import agreed
from tests.house import Open, flow


async def test_every_message_is_counted_in_the_transaction_that_saves_it(house: Open) -> None:
    async with house() as home:
        await home.apply(two={"flows": {"main": flow("Hello"), "mood": flow("fine")}})
        for text in ("What is a lease?", "And a fence?"):
            await home.ask("two", session_id="s1", message_text=text)
        await home.ask("two", session_id="s2", message_text="x" * 5000)
        rows = await agreed(home.database)
    assert [row["conversation_id"] for row in rows] == ["s1", "s2"]
    assert rows[0]["count"] == 4
    assert rows[0]["first_question"] == "What is a lease?"
    assert rows[0]["last_question"] == "And a fence?"
    assert rows[1]["last_question"] == "x" * 300
    assert all(row["total_tokens"] > 0 and row["chatbot_id"] == "two" for row in rows)
