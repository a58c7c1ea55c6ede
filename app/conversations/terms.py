"""What the statements of all lists have in common: conditions with their values, and what is read of an entry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from app.conversations.pages import Place, Wanted

# Ids of messages that an entry of ours names; those of other sources are as many as the index keeps.
_IDS = 100
# Always true, and what the index for lists without filters asks for.
EVERY = "message_count >= 0"
# Of the conversation `c` at its place of `page`, with whether there is an index at all; and the newest messages of one
# of our own.
ENTRY = """
    c.id, c.source, c.username, c.conversation_id, c.chatbot_id, c.model, c.client_ip, c.first_message_at,
    c.last_message_at, c.message_count, c.total_tokens, c.first_question, c.last_question, c.created_at, c.updated_at,
    page.at, (select is_there from conversation_index) as index_is_there"""
OWN_IDS = f"""array(
        select m.id from messages m where m.user_id = c.username and m.chat_id = c.conversation_id and not m.is_deleted
        order by m.position desc limit {_IDS})"""


@dataclass(slots=True)
class Terms:
    """Conditions and their values. The texts are ours, and few: one statement per combination of filters."""

    values: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> str:
        self.values.append(value)
        return f"${len(self.values)}"

    def named(self, facets: Mapping[str, str], of: str = "") -> list[str]:
        return [f"{of}{column} = {self.add(value)}" for column, value in facets.items()]

    def between(self, wanted: Wanted, after: Place | None, at: str = "last_message_at", id_: str = "id") -> list[str]:
        """Where a list begins is said once: of two conditions PostgreSQL might begin at the farther one."""
        since, until = wanted.since, wanted.until
        if after is not None and wanted.newest_first and until is not None:
            after, until = (after, None) if after.at < until else (None, until)
        if after is not None and not wanted.newest_first and since is not None:
            after, since = (after, None) if after.at >= since else (None, since)
        conditions = []
        if since is not None:
            conditions.append(f"{at} >= {self.add(since)}")
        if until is not None:
            conditions.append(f"{at} < {self.add(until)}")
        if after is not None:
            than = "<" if wanted.newest_first else ">"
            conditions.append(f"({at}, {id_}) {than} ({self.add(after.at)}, {self.add(after.id)})")
        return conditions

    def all_of(self, *conditions: Sequence[str]) -> str:
        return " and ".join(chain.from_iterable(conditions)) or "true"
