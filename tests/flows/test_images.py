"""Pictures in messages: stored once, sent to the flows that can see them, in each provider's own form."""

from base64 import b64encode
from typing import Any

from tests.chats.pictures import picture
from tests.flows.events import only, text
from tests.house import House, Open, flow
from tests.sse import read_stream

PICTURE = picture(size=(8, 6))
SHOP: dict[str, Any] = {
    "flows": {"main": flow("No picture."), "look": flow(wishes={"echo": "1"}, images=True)},
    "answers": ["main", "look"],
}


def inline(content: bytes = PICTURE, mime: str = "image/png") -> dict[str, str]:
    return {"name": "p.png", "data": b64encode(content).decode(), "mime": mime}


async def upload(home: House, **fields: Any) -> dict[str, Any]:
    body = {"chatbot_id": "shop", "image_data": inline(), "user_id": "ann", **fields}
    response = await home.client.post("/api/upload-image", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


async def test_a_picture_in_a_message_goes_to_the_flow_that_sees(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SHOP)
        answer, frames = await home.ask("shop", image_data=inline(), message_text="What is it?")
        assert answer["flow_type"] == "look"
        assert "data:image/png;base64," in text(frames)
        assert "What is it?" in text(frames)
        kept = await home.database.fetchrow("select content, attachments from messages where role = 'user'")
        image_id = await home.database.fetchval("select id from images")
        assert kept is not None
        assert tuple(kept) == ("What is it?", f'[{{"type":"image","id":"{image_id}"}}]')
        _, frames = await home.ask("shop", message_text="And now?")
        assert text(frames) == "No picture."


async def test_an_uploaded_picture_is_named_by_its_id_and_stored_once(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SHOP)
        first, second = await upload(home), await upload(home)
        assert first["image"] == second["image"]
        assert first["streaming_session_id"] is None
        _, frames = await home.ask("shop", image_id=first["image"]["id"])
        assert "data:image/png;base64," in text(frames)
        await home.ask("shop", image_data=inline())
        assert await home.count("images") == 1


async def test_a_question_about_an_upload_streams_like_any_other(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SHOP)
        for user in ({"user_id": "ann"}, {"user_id": None}):
            answer = await upload(home, message_text="What is it?", **user)
            frames = await read_stream(home.client, f"/api/stream-events/{answer['streaming_session_id']}")
            assert only(frames, "stream_end")["status"] == "completed"
            assert "What is it?" in text(frames)


async def test_pictures_that_are_not_taken(house: Open) -> None:
    async with house() as home:
        await home.apply(shop=SHOP)
        image_id = (await upload(home))["image"]["id"]
        refusals = [
            (await home.post(image_data=inline()), 422, "images_unsupported"),
            (await home.post("shop", image_id=image_id, user_id="bob"), 404, "image_unknown"),
            (await home.post("shop", image_id="%00"), 404, "image_unknown"),
            (await home.post("shop", image_data=inline(b"GIF89a junk")), 422, "image_invalid"),
            (await home.post("shop", image_data={"data": "***"}), 422, "image_invalid"),
            (await home.post("shop", image_data={}), 422, "invalid_request"),
            (await home.post("shop", image_data=inline(), image_id=image_id), 422, "invalid_request"),
        ]
        for response, status, code in refusals:
            assert (response.status_code, response.json()["code"]) == (status, code), response.text
        assert await home.count("streaming_sessions") == 0


async def test_a_picture_waits_with_its_message(house: Open) -> None:
    async with house() as home:
        slow = SHOP | {"flows": SHOP["flows"] | {"main": flow(wishes={"tokens": 2000, "delay_ms": 50})}}
        await home.apply(shop=slow)
        before = (await home.post("shop", session_id="chat")).json()
        waiting = (await home.post("shop", session_id="chat", image_data=inline())).json()
        assert (waiting["status"], waiting["flow_type"]) == ("queued", "look")
        await home.client.post(f"{before['streaming_url']}/cancel")
        frames = await read_stream(home.client, waiting["streaming_url"])
        assert "data:image/png;base64," in text(frames)


async def test_a_picture_that_has_gone_while_its_message_waited_is_told(house: Open) -> None:
    async with house() as home:
        slow = SHOP | {"flows": SHOP["flows"] | {"main": flow(wishes={"tokens": 60, "delay_ms": 50})}}
        await home.apply(shop=slow)
        before = (await home.post("shop", session_id="chat")).json()
        waiting = (await home.post("shop", session_id="chat", image_data=inline())).json()
        last = (await home.post("shop", session_id="chat")).json()
        await home.database.execute("delete from images")
        await home.client.post(f"{before['streaming_url']}/cancel")
        frames = await read_stream(home.client, waiting["streaming_url"])
        assert [frame.event for frame in frames] == ["stream_end"]
        assert only(frames, "stream_end")["error"]["code"] == "image_unknown"
        assert only(await read_stream(home.client, last["streaming_url"]), "stream_end")["status"] == "completed"


async def test_an_anthropic_flow_gets_the_picture_in_its_own_form(house: Open) -> None:
    async with house() as home:
        await home.apply(shop={"flows": {"look": flow(wishes={"echo": "1"}, images=True) | {"provider": "claude"}}})
        _, frames = await home.ask("shop", image_data=inline())
        assert '"media_type": "image/png"' in text(frames)
