"""Exports of Open WebUI: a list of chats, each with its messages as a tree and, in old ones, as a list alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.sync.imports.conversation import (
    Conversation,
    Said,
    Unreadable,
    derived,
    member,
    ms_of_seconds,
    name_of,
    text_of,
    title_of,
)

NAME = "open_webui"


def recognises(given: Mapping[str, Any]) -> bool:
    chat = given.get("chat", given)
    return isinstance(chat, dict) and (isinstance(chat.get("history"), dict) or "chat" in given)


def read(given: Mapping[str, Any]) -> Conversation:
    """The branch that was shown last; the others are left out. Raises Unreadable."""
    chat = member(given, "chat", dict, "") if "chat" in given else given
    branch, every = _messages(chat)
    at = ms_of_seconds(given.get("created_at")) or ms_of_seconds(chat.get("timestamp"))
    name = name_of(given.get("id"), chat.get("id"), at)
    said: list[Said] = []
    for one in branch:
        message = _said(one, name, said[-1].id if said else None, len(said))
        said += [message] if message else []
    title = title_of(given.get("title")) or title_of(chat.get("title"))
    return Conversation(NAME, derived(NAME, name), title, at, said, left_out=every - len(said))


def _messages(chat: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], int]:
    """Those of the branch, and how many there are in all."""
    history = chat.get("history")
    tree = history.get("messages") if isinstance(history, dict) else None
    if isinstance(history, dict) and isinstance(tree, dict) and tree:
        return _branch(tree, history.get("currentId")), len(tree)
    listed = member(chat, "messages", list, "chat.")
    if not all(isinstance(one, dict) for one in listed):
        raise Unreadable("chat.messages has something that is no object")
    return listed, len(listed)


def _branch(tree: Mapping[str, Any], leaf: Any) -> Sequence[Mapping[str, Any]]:
    if not isinstance(leaf, str) or leaf not in tree:
        leaf = max(tree, key=lambda name: _at(tree[name]))
    branch: dict[str, Mapping[str, Any]] = {}
    while isinstance(leaf, str) and leaf in tree:
        if leaf in branch:
            raise Unreadable(f"chat.history.messages.{leaf[:64]} is its own ancestor")
        branch[leaf] = member(tree, leaf, dict, "chat.history.messages.")
        leaf = branch[leaf].get("parentId")
    return list(branch.values())[::-1]


def _at(message: Any) -> int:
    return (ms_of_seconds(message.get("timestamp")) or 0) if isinstance(message, dict) else 0


def _said(given: Mapping[str, Any], chat: str, parent_id: str | None, index: int) -> Said | None:
    role, content = given.get("role"), _text(given.get("content"))
    if role not in ("user", "assistant") or not content:
        return None
    name = text_of(given.get("id")) or str(index)
    return Said(derived(NAME, chat, name), role, content, ms_of_seconds(given.get("timestamp")), parent_id)


def _text(content: Any) -> str:
    """A text, or parts of which some are texts."""
    parts = content if isinstance(content, list) else [content]
    texts = [text_of(part.get("text") if isinstance(part, dict) else part) for part in parts]
    return "\n".join(text for text in texts if text).strip()
