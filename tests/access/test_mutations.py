"""Credentials that somebody has tampered with, through the whole gateway: refused in words, whatever was done."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.demo.server import demo_provider
from tests.access.test_guard import key_with
from tests.access.users import as_user, serving_users
from tests.serving import apply_demo


@dataclass
class _Held:
    """What one may hold, and what it opens."""

    client: httpx2.AsyncClient
    key: str
    token: str
    url: str

    async def status(self, how: str, given: str) -> int:
        path, _, _ = self.url.partition("?")
        headers = {b"Authorization": f"Bearer {given}".encode("latin-1")} if how != "url" else {}
        query = f"?token={quote(given, encoding='latin-1')}" if how == "url" else ""
        answer = await self.client.get(path + query, headers=headers)
        if answer.status_code != 200:
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.json()["code"] in ("credentials_missing", "credentials_invalid", "token_invalid")
        return answer.status_code

    def whole(self, how: str) -> str:
        return {"key": self.key, "user": self.token, "url": self.url.partition("token=")[2]}[how]


@asynccontextmanager
async def _holding(database: str) -> AsyncGenerator[_Held, None]:
    async with demo_provider() as demo, serving_users(database, rate_address="none", rate_user="none") as client:
        await apply_demo(database, demo, {"quick": "demo?tokens=1&ttft=0&gap=0"})
        ann = as_user("ann")
        body = {"chatbot_id": "quick", "message_text": "Hello"}
        answer = await client.post("/api/process-message", json=body, headers=ann)
        yield _Held(
            client,
            await key_with(database, "read"),
            ann["Authorization"].removeprefix("Bearer "),
            answer.json()["streaming_url"],
        )


# What they are made of; and anything that a header can hold: no control characters, and no blanks around it.
_OWN = st.text("0123456789abcdef", min_size=1, max_size=2) | st.text("ABCXYZ-_.=", max_size=4)
_WRITTEN = _OWN | st.text(st.characters(min_codepoint=33, max_codepoint=255, exclude_characters="\x7f"), max_size=4)


@st.composite
def _changed(draw: st.DrawFn) -> tuple[str, list[tuple[float, int | None, str]]]:
    edits = st.tuples(st.floats(0, 1) | st.just(1.0), st.none() | st.integers(0, 3), _WRITTEN)
    return draw(st.sampled_from(["key", "user", "url"])), draw(st.lists(edits, min_size=1, max_size=3))


def test_what_was_tampered_with_is_401_and_never_500(database: str) -> None:
    with asyncio.Runner() as runner:
        context = _holding(database)
        held = runner.run(context.__aenter__())
        for how in ("key", "user", "url"):
            assert runner.run(held.status(how, held.whole(how))) == 200

        @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
        @given(_changed())
        def run(case: tuple[str, list[tuple[float, int | None, str]]]) -> None:
            how, edits = case
            whole = text = held.whole(how)
            for share, gone, written in edits:
                at = round(share * len(text))
                text = text[:at] + written + text[at + (len(written) if gone is None else gone) :]
            status = runner.run(held.status(how, text))
            # A user's token can be written differently and say the same; nothing else can.
            same = text == whole or how == "user" or (how == "url" and set(text.split(",")) <= {whole, ""})
            assert status == 401 or (status == 200 and same)

        try:
            run()
        finally:
            runner.run(context.__aexit__(None, None, None))
