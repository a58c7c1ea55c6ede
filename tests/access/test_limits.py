"""Who is told 429, when, and with what; and that nothing was done for those."""

from collections import Counter
from typing import Any

import httpx2
import pytest

from app.access.client import Proxies
from app.access.limits import Limits, limits_of
from app.access.principal import Principal
from app.access.rates import Rate
from app.errors import Misconfigured, TooMany
from app.settings import load
from app.telemetry import Metrics
from tests.access.test_guard import bearer, key_with
from tests.access.users import as_user, serving_users
from tests.house import House, Open, flow
from tests.serving import serving

_STREAM = "/api/stream-events/0197c1a2-7b3c-7def-8a01-23456789abcd"
_WRONG = f"parley_{'0' * 16}_{'0' * 64}"


def assert_limited(response: httpx2.Response, activity: str, most: int, code: str = "rate_limited") -> None:
    assert (response.status_code, response.json()["code"]) == (429, code), response.text
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.headers["ratelimit-policy"] == f'"{activity}";q={most};w=60'
    assert response.headers["ratelimit"].startswith(f'"{activity}";r=0;t=')


async def rows(home: House) -> list[int]:
    tables = ("streaming_sessions", "messages where role = 'user'", "idempotency_keys")
    return [await home.count(table) for table in tables]


async def test_a_users_messages_are_limited_before_any_row_is_written(house: Open) -> None:
    async with house(rate_user="messages=3") as home:
        for left in (2, 1, 0):
            answer = await home.post(session_id=f"s{left}")
            assert answer.status_code == 200
            assert answer.headers["ratelimit"].startswith(f'"messages";r={left};t=')
        before = await rows(home)
        for number in range(2):
            assert_limited(await home.post(client_message_id=f"m{number}"), "messages", 3)
        assert await rows(home) == before == [3, 3, 0]
        assert (await home.post(user_id="bob")).status_code == 200
        metrics = (await home.client.get("/metrics")).text
        assert 'parley_limited_total{limit="messages",of="user"} 2.0' in metrics


async def test_a_bound_user_is_one_whatever_it_calls_itself_and_every_activity_is_counted_apart(database: str) -> None:
    rates = "messages=1,changes=2,reads=3,uploads=1"
    async with serving_users(database, rate_user=rates) as client:
        for activity, most, method, path in (
            ("messages", 1, "POST", "/api/process-message"),
            ("uploads", 1, "POST", "/api/upload-image"),
            ("changes", 2, "POST", f"{_STREAM}/cancel"),
            ("reads", 3, "GET", _STREAM),
        ):
            for _ in range(most):
                assert (await client.request(method, path, headers=as_user("ann"), content=b"{")).status_code != 429
            assert_limited(await client.request(method, path, headers=as_user("ann"), content=b"{"), activity, most)
            assert (await client.request(method, path, headers=as_user("bob"), content=b"{")).status_code != 429


async def test_a_key_is_limited_as_itself_and_no_other_with_it(database: str) -> None:
    async with serving(database, auth="keys", rate_key="reads=2", rate_address="reads=1") as client:
        ann, bob = [bearer(await key_with(database, "read")) for _ in range(2)]
        for _ in range(2):
            assert (await client.get(_STREAM, headers=ann)).status_code == 404
        assert_limited(await client.get(_STREAM, headers=ann), "reads", 2)
        assert (await client.get(_STREAM, headers=bob)).status_code == 404
        # What needs nothing is for load balancers.
        for _ in range(5):
            assert (await client.get("/readyz", headers=ann)).status_code == 200


async def test_uploads_count_for_the_user_whom_they_name(house: Open) -> None:
    from tests.flows.test_images import inline

    async with house(rate_user="uploads=1") as home:
        body = {"chatbot_id": "quick", "image_data": inline(), "user_id": "ann"}
        assert (await home.client.post("/api/upload-image", json=body)).status_code == 200
        assert_limited(await home.client.post("/api/upload-image", json=body), "uploads", 1)
        assert (await home.client.post("/api/upload-image", json=body | {"user_id": "bob"})).status_code == 200


async def test_a_picture_with_a_question_is_an_upload_and_a_message_whichever_way_it_comes(house: Open) -> None:
    from tests.flows.test_images import inline

    question = {"user_id": "ann", "chatbot_id": "sees", "image_data": inline(), "message_text": "What is it?"}
    paths = ("/api/upload-image", "/api/process-message")
    for of, activity in (("rate_user", "messages"), ("rate_address", "uploads")):
        async with house(**{of: f"{activity}=2"}) as home:
            await home.apply(sees={"flows": {"main": flow("A cat.", images=True)}})
            for path in paths:
                assert (await home.client.post(path, json=question)).status_code == 200
            before = await rows(home)
            for path in paths:
                assert_limited(await home.client.post(path, json=question), activity, 2)
            assert await rows(home) == before


async def test_g14_an_eventsource_is_told_when_to_come_back_and_not_429(house: Open) -> None:
    async with house(rate_address="connects=1,reads=1") as home:
        stream, headers = (await home.post()).json()["streaming_url"], {"Accept": "text/event-stream"}
        assert (await home.client.get(stream, headers=headers)).status_code == 200
        told = await home.client.get(stream, headers=headers)
        assert (told.status_code, told.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert told.text.startswith("retry: ")
        assert 15_000 <= int(told.text.removeprefix("retry: ").strip()) <= 120_000
        assert "id:" not in told.text
        assert (await home.client.get(stream)).status_code == 200
        assert_limited(await home.client.get(stream), "reads", 1)


async def test_bad_credentials_are_counted_by_address_and_good_ones_get_in_all_the_same(database: str) -> None:
    settings: dict[str, Any] = {"auth": "keys", "rate_address": "failures=5", "trusted_proxies": "127.0.0.1"}
    async with serving(database, **settings) as client:
        good, fresh = bearer(await key_with(database, "read")), bearer(await key_with(database, "read"))
        assert (await client.get(_STREAM, headers=good)).status_code == 404
        bad: list[tuple[dict[str, str], str]] = [
            (bearer(_WRONG), ""),
            ({"X-API-Key": "x"}, ""),
            ({}, "?token=" + "A" * 56),
        ]
        told = [await client.get(_STREAM + query, headers=headers) for headers, query in bad * 4]
        assert [answer.status_code for answer in told] == [401] * 5 + [429] * 7
        assert told[-1].json()["code"] == "too_many_failures"
        assert 1 <= int(told[-1].headers["retry-after"]) <= 12
        assert "www-authenticate" not in told[-1].headers
        for headers in (good, fresh):
            assert (await client.get(_STREAM, headers=headers)).status_code == 404
        # Whoever brings none guesses nothing, and others come from elsewhere.
        assert (await client.get(_STREAM)).status_code == 401
        other = bearer(_WRONG) | {"X-Forwarded-For": "192.0.2.7"}
        assert (await client.get(_STREAM, headers=other)).status_code == 401


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:192.0.2.1", "192.0.2.1", True),
    ],
)
def test_whoever_has_a_network_of_ipv6_is_one_address(first: str, second: str, same: bool) -> None:
    limits = Limits({"address": {"reads": Rate(1)}}, Metrics())
    somebody = Principal("open", "open", frozenset())

    def ask(address: str) -> str:
        scope = {"client": (address, 1), "headers": [], "state": {"proxies": Proxies()}}
        try:
            limits.count(scope, "reads", somebody)
        except TooMany as error:
            return error.code
        return "taken"

    assert Counter([ask(first), ask(second)]) == ({"taken": 1, "rate_limited": 1} if same else {"taken": 2})


def test_a_limit_that_makes_no_sense_does_not_start() -> None:
    from app.main import create_app

    with pytest.raises(Misconfigured, match="PARLEY_RATE_KEY"):
        create_app(load(database_url="postgresql://nowhere/x", rate_key="messages=lots"))
    assert limits_of(load(), Metrics())
