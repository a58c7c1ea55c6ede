"""What a change to a chatbot or a source changes, as lines of its file."""

import difflib
from typing import TYPE_CHECKING, Any

# Each command imports what it needs: `parley version` should not pay for a web server.
if TYPE_CHECKING:
    from app.conversations.sources.source import SourceChange
    from app.flows.chatbots import Change


def of_chatbot(change: "Change") -> str:
    """A unified diff."""
    from app.flows.config import Chatbot
    from app.flows.export import to_yaml

    def lines(value: dict[str, Any] | None) -> list[str]:
        """The chatbot in the shape of its file."""
        return [] if value is None else to_yaml({change.chatbot_id: Chatbot.from_json(value)}).splitlines()

    title = f"chatbot {change.chatbot_id}"
    names = (f"{title} version {change.version - 1}" if change.before else "(new)", f"{title} version {change.version}")
    return "\n".join(difflib.unified_diff(lines(change.before), lines(change.after), *names, lineterm=""))


def of_source(change: "SourceChange") -> str:
    """A unified diff."""
    from app.flows.export import sources_to_file, to_text

    before = to_text(sources_to_file([change.before])).splitlines() if change.before else []
    after = to_text(sources_to_file([change.after])).splitlines()
    title = f"source {change.after.id}"
    names = (f"{title} before" if before else "(new)", title)
    return "\n".join(difflib.unified_diff(before, after, *names, lineterm=""))
