"""`conversations.json` of ChatGPT: each conversation is a tree, of which `current_node` ends the branch shown."""

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

NAME = "chatgpt"
# Of contents, those that people see; the others are calls of tools, thoughts and the like.
_SHOWN = {"text", "multimodal_text"}


def recognises(given: Mapping[str, Any]) -> bool:
    return isinstance(given.get("mapping"), dict)


def read(given: Mapping[str, Any]) -> Conversation:
    """The branch that was shown last; the others are left out. Raises Unreadable."""
    nodes = member(given, "mapping", dict, "")
    names = (given.get("conversation_id"), given.get("id"), given.get("create_time"))
    name = name_of(*names, min(nodes, default=""))
    branch = _branch(nodes, given.get("current_node"))
    said: list[Said] = []
    for node in branch:
        message = _said(nodes[node], name, node, said[-1].id if said else None)
        said += [message] if message else []
    every = sum(isinstance(node, dict) and _speaks(node.get("message")) for node in nodes.values())
    title, at = title_of(given.get("title")), ms_of_seconds(given.get("create_time"))
    return Conversation(NAME, derived(NAME, name), title, at, said, left_out=every - len(said))


def _branch(nodes: Mapping[str, Any], leaf: Any) -> Sequence[str]:
    """From the root to the leaf; without a leaf, to the one that was written last."""
    if not isinstance(leaf, str) or leaf not in nodes:
        leaf = max(nodes, key=lambda name: _at(nodes[name]), default=None)
    branch: dict[str, None] = {}
    while isinstance(leaf, str) and leaf in nodes:
        if leaf in branch:
            raise Unreadable(f"mapping.{leaf[:64]} is its own ancestor")
        branch[leaf] = None
        leaf = member(nodes, leaf, dict, "mapping.").get("parent")
    return list(branch)[::-1]


def _at(node: Any) -> int:
    message = node.get("message") if isinstance(node, dict) else None
    return (ms_of_seconds(message.get("create_time")) or 0) if isinstance(message, dict) else 0


def _speaks(message: Any) -> bool:
    """Whether it is one that people see."""
    if not isinstance(message, dict) or not isinstance(message.get("author"), dict):
        return False
    hidden = isinstance(message.get("metadata"), dict) and message["metadata"].get(
        "is_visually_hidden_from_conversation"
    )
    to_all = message.get("recipient") in (None, "all")
    return message["author"].get("role") in ("user", "assistant") and to_all and not hidden and bool(_text(message))


def _text(message: Mapping[str, Any]) -> str:
    """The texts of its parts; pictures and sounds are not in the file."""
    content = message.get("content")
    if not isinstance(content, dict) or content.get("content_type") not in _SHOWN:
        return ""
    parts = content.get("parts")
    texts = [
        part if isinstance(part, str) else text_of(part.get("text")) if isinstance(part, dict) else ""
        for part in (parts if isinstance(parts, list) else [])
    ]
    return "\n".join(text for text in texts if text).strip()


def _said(node: Mapping[str, Any], conversation: str, name: str, parent_id: str | None) -> Said | None:
    message = node.get("message")
    if not _speaks(message):
        return None
    assert isinstance(message, dict)
    at = ms_of_seconds(message.get("create_time"))
    return Said(derived(NAME, conversation, name), message["author"]["role"], _text(message), at, parent_id)
