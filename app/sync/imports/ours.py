"""Files that `GET /api/chats/export` has given."""

import re
from collections.abc import Mapping
from typing import Any, get_args

import orjson

from app.chats.chat import MessageStatus
from app.sync.imports.conversation import Conversation, Said, Unreadable, derived, member, ms_of_text, title_of

NAME = "parley"
_ID = re.compile(r"[A-Za-z0-9._~:-]{1,128}", re.ASCII)
_ROLES = ("user", "assistant")
# Attachments of a message.
_MOST = 100


def recognises(given: Mapping[str, Any]) -> bool:
    return isinstance(given.get("messages"), list) and isinstance(given.get("id"), str) and "mapping" not in given


def read(given: Mapping[str, Any]) -> Conversation:
    """Ids stay as they are. Instructions are left out: what is imported is told to models. Raises Unreadable."""
    every = member(given, "messages", list, "")
    messages = [_said(one, f"messages[{index}].") for index, one in enumerate(every)]
    said = [one for one in messages if one is not None]
    return Conversation(
        NAME,
        _id(given["id"]),
        title_of(given.get("title")),
        ms_of_text(given.get("createdAt")),
        said,
        _named(given.get("parentChatId")),
        _named(given.get("branchFromMessageId")),
        len(every) - len(said),
    )


def _said(given: Any, where: str) -> Said | None:
    if not isinstance(given, dict):
        raise Unreadable(f"{where.rstrip('.')} is no object")
    name, content = member(given, "id", str, where), member(given, "content", str, where)
    role, status = member(given, "role", str, where), given.get("status", "complete")
    if role not in _ROLES or status == "failed":
        return None
    if status not in get_args(MessageStatus):
        raise Unreadable(f"{where}status is none that a message has")
    attachments = given.get("attachments", [])
    if (
        not isinstance(attachments, list)
        or len(attachments) > _MOST
        or not all(isinstance(a, dict) for a in attachments)
    ):
        raise Unreadable(f"{where}attachments are no list of at most {_MOST} objects")
    at = ms_of_text(given.get("timestamp"))
    kept = orjson.dumps(attachments).decode()
    return Said(_id(name), role, content, at, _named(given.get("parentId")), status, kept)


def _id(given: str) -> str:
    return given if _ID.fullmatch(given) else derived(NAME, given)


def _named(given: Any) -> str | None:
    return _id(given) if isinstance(given, str) and given else None
