"""The merge rule's test vectors, and chats, messages and operations as JSON has them."""

from pathlib import Path
from typing import Any

import orjson

from app.sync.merge import AddMessage, Chat, DeleteChat, DeleteMessage, Message, Op, PutChat, State

FOLDER = Path(__file__).parent.parent / "vectors" / "sync"
_OPS: dict[str, type[Op]] = {
    "chat.put": PutChat,
    "chat.del": DeleteChat,
    "msg.add": AddMessage,
    "msg.del": DeleteMessage,
}


def cases() -> list[dict[str, Any]]:
    return [case for path in sorted(FOLDER.glob("*.json")) for case in orjson.loads(path.read_bytes())]


def op(given: dict[str, Any]) -> Op:
    return _OPS[given["op"]](**_flat({name: value for name, value in given.items() if name != "op"}))


def state(given: dict[str, Any]) -> State:
    return State(
        {one["id"]: Chat(**one) for one in given["chats"]},
        {one["id"]: Message(**_flat(one)) for one in given["messages"]},
    )


def _flat(given: dict[str, Any]) -> dict[str, Any]:
    if "attachments" not in given:
        return given
    return {**given, "attachments": orjson.dumps(given["attachments"]).decode()}
