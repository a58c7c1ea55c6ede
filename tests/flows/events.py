"""Looking at the frames of an answer as its front end would."""

from typing import Any

from tests.sse import Frame


def kinds(frames: list[Frame]) -> list[str]:
    """Event kinds in order, neighbouring tokens once."""
    names = [frame.event for frame in frames]
    return [name for before, name in zip([None, *names], names, strict=False) if name != "token" or before != "token"]


def text(frames: list[Frame], flow: str | None = None) -> str:
    """What a reader that obeys flow_restart shows, of one flow or of all."""
    pieces: list[str] = []
    for frame in frames:
        data = frame.data["data"]
        if flow is None or data.get("flow") == flow:
            if frame.event == "flow_restart":
                pieces.clear()
            elif frame.event == "token":
                pieces.append(data["token"])
    return "".join(pieces)


def data_of(frames: list[Frame], kind: str, flow: str | None = None) -> list[dict[str, Any]]:
    """The data of all events of a kind, of one flow or of all."""
    found = [frame.data["data"] for frame in frames if frame.event == kind]
    return [data for data in found if flow is None or data["flow"] == flow]


def only(frames: list[Frame], kind: str, flow: str | None = None) -> dict[str, Any]:
    """The data of the one event of its kind."""
    [data] = data_of(frames, kind, flow)
    return data
