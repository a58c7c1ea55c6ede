"""Events on the wire: one encoding, one line, whatever the text holds."""

from uuid import uuid4

import orjson
from hypothesis import given
from hypothesis import strategies as st

from app.streams.event import data_of, encode, kind_of, to_frames, to_object
from app.text import clean

texts = st.text().map(clean) | st.sampled_from(["\r\n\r\nevent: stream_end", "\x00", "\u2028", "\u0085", 'a"}', "\\"])


@given(texts)
def test_an_event_survives_storing_and_framing(text: str) -> None:
    payload = encode("token", {"token": text, "markers": {}, "flow": "main"})
    assert kind_of(payload) == "token"
    assert data_of(payload)["token"] == text
    event = orjson.loads(to_object(7, payload))
    assert list(event) == ["id", "event", "data", "timestamp"]
    assert (event["id"], event["event"], event["data"]["token"]) == (7, "token", text)
    assert event["timestamp"].endswith("Z")


@given(st.lists(texts, min_size=1, max_size=5), st.integers(1, 2**31 - 10))
def test_i5_no_text_makes_a_second_field_or_line(texts: list[str], first: int) -> None:
    stream_id = uuid4()
    payloads = [encode("token", {"token": text, "markers": {}, "flow": "main"}) for text in texts]
    frames = to_frames(stream_id, first, payloads).decode().split("\n\n")
    assert frames.pop() == ""
    assert len(frames) == len(texts)
    for event_id, frame in enumerate(frames, first):
        id_line, event_line, data_line = frame.split("\n")
        assert id_line == f"id: {stream_id}:{event_id}"
        assert event_line == "event: token"
        assert orjson.loads(data_line.removeprefix("data: "))["id"] == event_id
        assert "\r" not in frame
