"""Search: what has the words is found, by whichever way it is looked for; and whatever is asked, nothing breaks."""

import itertools
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import replace
from datetime import timedelta
from random import Random
from typing import Any

import httpx2
import pytest

from app.conversations import list_statements, listing, pages, search
from app.postgres import Connection, open_connection, open_pool
from app.wall import Reach, Wall, within
from tests.conversations import listed
from tests.conversations.listed import BEGAN, Row
from tests.house import Open, flow
from tests.serving import serving


@pytest.fixture
async def client(database: str) -> AsyncGenerator[httpx2.AsyncClient, None]:
    async with serving(database, drain_s=0, enable_background_jobs=False) as client:  # n8n is no source of ours
        yield client


def _text(first: str, last: str = "", **given: object) -> Row:
    row = listed.rows(Random(1), 1)[0]
    return row | {"first_question": first, "last_question": last or first} | given


async def _found(client: httpx2.AsyncClient, q: str, **params: str) -> set[str]:
    return {entry["conversationId"] for entry in await listed.walk(client, q=q, **params)}


_TEXTS = {
    "order": "Where is my ORDER no. 4711-B?",
    "lease": "What is a lease? And my order?",
    "link": "see https://example.com/a/path?q=1 or mail ann@example.com",
    "tag": "<b>refund</b> of -5.75 &amp; more: C++",
    "chinese": "我的订单在哪里? order",
    "japanese": "返品したいのですが",
    "german": "Straße nach Österreich, größer",
    "emoji": "thanks 👍🏽",
    "facets": "U:ann M:large S:parley C:shop MC:large",
}
_QUERIES = [
    ("order", {"order", "lease", "chinese"}),
    ("ORDER my", {"order", "lease"}),
    ('"my order"', {"order", "lease"}),
    ('"order my"', set()),
    ("my order order my", {"order", "lease"}),
    ("ord*", {"order", "lease", "chinese"}),
    ("o*", set()),
    ('"my ord*"', set()),
    ("4711", {"order"}),
    ("4711-B", {"order"}),
    ("4711-b?", {"order"}),
    ("example.com", {"link"}),
    ("path", {"link"}),
    ("ann@example.com", {"link"}),
    ("refund", {"tag"}),
    ("5.75", {"tag"}),
    ("c++", {"tag", "facets"}),
    ("订单", {"chinese"}),
    ("单订", set()),
    ("我的订单 order", {"chinese"}),
    ("返品", {"japanese"}),
    ("たい", {"japanese"}),
    ("österreich", {"german"}),
    ("STRASSE", set()),
    ("grö*", {"german"}),
    ("👍", set()),
    ("ann", {"link", "facets"}),
    ("U:ann", {"facets"}),
    ("S:parley", {"facets"}),
    ('"refund', {"tag"}),
    ("order | lease", {"lease"}),
    ("!order", {"order", "lease", "chinese"}),
    ("order:*", {"order", "lease", "chinese"}),
    ("'order' & ( lease", {"lease"}),
]


async def test_words_phrases_and_beginnings(client: httpx2.AsyncClient, database: str) -> None:
    await listed.store(database, [_text(text, conversation_id=name) for name, text in _TEXTS.items()])
    for query, expected in _QUERIES:
        assert await _found(client, query) == expected, query


async def test_a_phrase_is_of_one_question(client: httpx2.AsyncClient, database: str) -> None:
    await listed.store(database, [_text("one two", "three four")])
    assert await _found(client, "two three four one")
    assert await _found(client, '"three four"')
    assert not await _found(client, '"two three"')


_ODD = ["?!.", "*", '"', '""', "'", "\\", "&", "!!", "<->", ":*", "\x00", "x\x00y", "' | 'a", "a" * 256]


async def test_odd_queries_find_nothing(client: httpx2.AsyncClient, database: str) -> None:
    await listed.store(database, [_text("something else")])
    for query in _ODD:
        assert await _found(client, query) == set()
        refused = await client.get("/conversations", params={"q": (query * 3_000)[:3_000]})
        assert (refused.status_code, refused.json()["code"]) == (400, "bad_parameter")


def _says(row: Row, *terms: str) -> bool:
    said = f"{row['first_question']} {row['last_question']}".split()
    return all(any(word.startswith(t[:-1]) if t.endswith("*") else word == t for word in said) for t in terms)


def _matching(rows: list[Row], wanted: pages.Wanted) -> set[str]:
    """What Python finds."""
    return {
        row["conversation_id"]
        for row in rows
        if _says(row, *(wanted.query or "").split())
        and all(row[name] == value for name, value in wanted.facets.items())
        and (wanted.since is None or row["last"] >= wanted.since)
        and (wanted.until is None or row["last"] < wanted.until)
    }


_COLUMNS = ("username", "model", "chatbot_id", "source")


async def test_every_way_finds_the_same(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Walking, strolling and asking the index of words, with any filters and pages: what Python finds in the rows."""
    chance = Random(8)
    rows = listed.rows(chance, 300, "rare common common common other ape april apple")
    await listed.store(database, rows)
    connection = await open_connection(database)
    await connection.execute("analyze conversation_words")
    monkeypatch.setattr(search, "_ENOUGH_US", 0.5)  # what more than four of ten have is looked for in the rows
    for _ in range(60):
        terms = chance.choice(
            [("common",), ("rare",), ("common", "other"), ("ap*",), ("rare", "ap*", "common"), ("never",), ()]
        )
        given = {name: chance.choice([row[name] for row in rows]) for name in _COLUMNS if chance.random() < 0.4}
        given = {name: value for name, value in given.items() if value}
        since = BEGAN + timedelta(minutes=chance.randrange(60)) if chance.random() < 0.3 else None
        wanted = pages.Wanted(**given, since=since, query=" ".join(terms) or None, newest_first=chance.random() < 0.5)
        for far in (0, 1, 100, 1000):
            monkeypatch.setattr(listing, "_far", lambda *_, far=far: far)
            assert await _all(connection, wanted, chance.randint(1, 50)) == _matching(rows, wanted)
    await connection.close()


async def test_what_is_near_is_found_without_what_is_far(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of what is not rare, by cursor, with any bounds: looked for among one conversation, some, or all."""
    chance = Random(14)
    rows = listed.rows(chance, 300, "rare common common other")
    await listed.store(database, rows)
    connection = await open_connection(database)
    await connection.execute("analyze conversation_words")
    monkeypatch.setattr(listing, "_far", lambda *_: 0)
    monkeypatch.setattr(listing, "_COUNTED", 3)
    monkeypatch.setattr(search, "_ENOUGH_US", 0.5)  # what more than four of ten have is looked for in the rows
    monkeypatch.setattr(listing, "_near_us", lambda *_: 0.0)
    near, asked, filled = listing._near, Counter[int](), Counter[int]()

    async def noted(*given: Any) -> pages.Page | None:
        page = await near(*given)
        asked[far] += 1
        filled[far] += page is not None
        return page

    monkeypatch.setattr(listing, "_near", noted)
    for _ in range(40):
        terms = chance.choice([("common",), ("rare",), ("common", "other"), ("com*",), ("common", "rare")])
        model = chance.choice([None, "large"])
        since = BEGAN + timedelta(minutes=chance.randrange(40)) if chance.random() < 0.4 else None
        until = BEGAN + timedelta(minutes=chance.randrange(40, 76)) if chance.random() < 0.4 else None
        wanted = pages.Wanted(
            query=" ".join(terms), model=model, since=since, until=until, newest_first=chance.random() < 0.5
        )
        for far in (0, 1, 40, 1000):
            monkeypatch.setattr(listing, "_how_near", lambda *_, far=far: far)
            page = await listing.page(connection, wanted, size=7)
            found, total = list(page.rows), page.total
            while page.behind is not None:
                page = await listing.page(connection, wanted, size=7, after=page.behind)
                found += page.rows
            places = [(row["last_message_at"], row["id"]) for row in found]
            assert places == sorted(places, reverse=wanted.newest_first)
            assert len(places) == len(set(places))
            assert {row["conversation_id"] for row in found} == _matching(rows, wanted)
            assert total.count == len(found) if total.exact else 3 < total.count <= len(found)
    assert 0 < filled[40] < asked[40], (filled, asked)
    assert 0 < filled[1000] == asked[1000], (filled, asked)
    await connection.close()


async def test_all_of_a_user_are_listed_however_many_they_are(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are walked along; of many it depends, and a cursor does not say which it was."""
    rows = listed.rows(Random(3), 200)
    await listed.store(database, rows)
    connection = await open_connection(database)
    await connection.execute("analyze conversation_words")
    expected = sorted(row["conversation_id"] for row in rows if (row["username"], row["model"]) == ("ann", "large"))
    for newest, far in ((1, 0), (1, 10), (20, 0), (20, 100), (1000, 0)):
        monkeypatch.setattr(listing, "_NEWEST", newest)
        monkeypatch.setattr(listing, "_far", lambda *_, far=far: far)
        for size in (3, 40):
            wanted = pages.Wanted(username="ann", model="large")
            page = await listing.page(connection, wanted, size=size)
            found = list(page.rows)
            while page.behind is not None:
                page = await listing.page(connection, wanted, size=size, after=page.behind)
                found += page.rows
            assert sorted(row["conversation_id"] for row in found) == expected
    await connection.close()


async def test_a_user_finds_what_is_theirs(database: str) -> None:
    """Behind the second wall, where the words of others cannot be seen."""
    rows = listed.rows(Random(9), 200, "rare common common")
    await listed.store(database, rows)
    pool = await open_pool(database, 2)
    async with Wall(pool, demand="require").open(database, 2) as wall:
        async with pool.acquire() as connection:
            await connection.execute("analyze conversation_words")
            await wall.look_for_role(connection)
        for terms, model in ((("rare",), None), (("common", "ra*"), "small"), ((), "large")):
            query = " ".join(terms) or None
            with within(Reach("ann")):
                async with wall.connection() as connection:
                    assert await connection.fetchval("select count(*) from conversation_words") == sum(
                        row["username"] == "ann" for row in rows
                    )
                    found = await _all(connection, pages.Wanted(username="ann", query=query, model=model), 7)
                    assert not await _all(connection, pages.Wanted(username="bob", query=query, model=model), 7)
            assert found == {
                row["conversation_id"]
                for row in rows
                if row["username"] == "ann" and model in (None, row["model"]) and _says(row, *terms)
            }
    pool.terminate()


async def test_what_is_said_is_found_at_once(house: Open) -> None:
    async with house() as home:
        await home.apply(one={"flows": {"main": flow("Hello")}})
        for number, text in enumerate(("What is a lease?", "And a fence?", "Or a settled watermark?")):
            await home.ask("one", session_id="s1", message_text=text)
            words = await home.database.fetchval("select words::text from conversation_words")
            assert ("lease" in words, "fence" in words, "watermark" in words) == (True, number == 1, number == 2)
        rows = await home.database.fetch("select words::text from conversation_words")
    assert len(rows) == 1
    assert "'C:one'" in rows[0][0]
    assert "'S:parley'" in rows[0][0]
    assert "'M:" in rows[0][0]


async def _all(connection: Connection, wanted: pages.Wanted, size: int) -> set[str]:
    """Of all pages by cursor, in order; the second page is also what its number gives."""
    page = await listing.page(connection, wanted, size=size)
    second = await listing.page(connection, wanted, size=size, skip=size)
    found, total, number = list(page.rows), page.total, 1
    while page.behind is not None:
        page = await listing.page(connection, wanted, size=size, after=page.behind)
        number += 1
        if number == 2:
            assert (_ids(page), page.total) == (_ids(second), second.total)
        found += page.rows
    places = [(row["last_message_at"], row["id"]) for row in found]
    assert places == sorted(places, reverse=wanted.newest_first)
    assert (len(places), total) == (len(set(places)), pages.Total(len(places)))
    return {row["conversation_id"] for row in found}


def _ids(page: pages.Page) -> list[int]:
    return [row["id"] for row in page.rows]


_MANY = """
insert into conversations (source, username, conversation_id, chatbot_id, model, first_message_at, last_message_at,
    time_source, message_count, total_tokens, first_question, last_question)
select 's' || n % 3, 'u' || n % 3, n, 'b' || n % 3, 'm' || n % 3, now(), now() - n * interval '1 s', 'message', 1, 1,
    'common w' || n % 1000, 'and the last ' || n
from generate_series(1, 20000) n
"""


@pytest.fixture
async def many(database: str) -> AsyncGenerator[Connection, None]:
    connection = await open_connection(database)
    await connection.execute(_MANY)
    await connection.execute(listed.SAVE_WORDS)
    await connection.execute("vacuum analyze conversation_words")
    await connection.execute("vacuum analyze conversations")
    yield connection
    await connection.close()


_WANTED = [
    pages.Wanted(query="x"),
    pages.Wanted(query="x", username="u1"),
    pages.Wanted(query="x", model="m1", since=BEGAN, newest_first=False),
    pages.Wanted(model="m1", chatbot_id="b2"),
    pages.Wanted(username="u1", model="m1"),
]
_AFTER = pages.Place(BEGAN, 7, pages.Total(1))
_LOOK = search.Look(
    "'x'", "'x'", "'x'", 0.1, 0.1, 0.1, 0.1, terms=1, conversations=20_000, blocks=900, is_guess=False, is_bound=False
)


@pytest.mark.parametrize("wanted", _WANTED)
async def test_each_search_has_its_plan(many: Connection, wanted: pages.Wanted) -> None:
    for after in (None, _AFTER):
        slice_, seen = pages.Slice(50, after), replace(_LOOK, words="'x'" if wanted.query else "")
        walked = await listed.plan(many, list_statements.walking(wanted, slice_, words=seen.words))
        strolled = await listed.plan(many, list_statements.strolling(wanted, slice_, seen, far=2000))
        counted = await listed.plan(many, list_statements.counting_newest(wanted, seen, far=2000))
        for plan in (walked, strolled):
            walk = plan[plan.index("CTE page") : plan.index("CTE Scan on page")]
            assert "Sort" not in walk, plan
        by_user, by_words = wanted.username is not None, wanted.query is not None
        index = "conversations_of_user" if by_user else "conversations_of_chatbot"
        if by_words and not by_user:
            index = "conversation_words_said"
        for plan in (strolled, counted):
            assert index in plan, plan
            if not by_words:
                assert f"Index Only Scan using {index}" in plan, plan
        for plan in (walked, strolled, counted):
            assert "Seq Scan" not in plan, plan
            asks = by_words and (by_user or plan is walked)
            assert ("Index Scan using conversation_words_pkey" in plan) == asks, plan
        if by_words:
            seen = replace(seen, query="'x' & 'y'")
        counted = await listed.plan(many, list_statements.counting(wanted, seen, far=1001))
        plan = await listed.plan(many, list_statements.matching(wanted, slice_, seen, far=1001))
        for finding in (counted, plan):
            assert "Bitmap Index Scan on conversation_words_found" in finding, finding
            assert "conversation_words_said" not in finding, finding
        assert "using conversations_pkey" in plan, plan
        assert "Seq Scan" not in plan, plan
        if by_words and not by_user:
            plan = await listed.plan(many, list_statements.near(wanted, slice_, seen, far=2000))
            edge, found = plan[plan.index("CTE edge") :].split("BitmapAnd")
            way = "" if wanted.newest_first else "Backward "
            assert f"Index Only Scan {way}using conversation_words_said" in edge, plan
            assert "Bitmap Index Scan on conversation_words_found" in found, plan
            assert "Bitmap Index Scan on conversation_words_said" in found, plan
            assert "Seq Scan" not in plan, plan


def test_what_is_rarer_than_expected_is_not_looked_for_too_far() -> None:
    """Where it would be just enough for a page, looking near costs what finding all does."""
    seen = replace(_LOOK, rarest=0.01, share=0.01, within=0.01, conversations=1_000_000)
    likely = listing._how_near(pages.Slice(50), seen)
    assert likely == int(51 / 0.01 * listing._LIKELY)
    rare = listing._how_near(pages.Slice(50), replace(seen, rarest=1e-6, share=1e-6, within=1e-6))
    assert likely < rare < 100_000
    assert rare == listing._how_near(pages.Slice(50), replace(seen, rarest=0.0, share=0.0, within=0.0))


async def test_what_is_seen_of_words_before_they_are_looked_for(many: Connection) -> None:
    rare, common = [await search.look(many, query, []) for query in ("w7", "common")]
    assert rare.rarest < 0.01 < 0.9 < common.rarest
    assert (rare.conversations, rare.is_bound) == (20_000, False)


async def test_what_nearly_all_have_is_not_asked_of_the_index(
    many: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where there is something rarer, and reading its list is dear; facets and phrases as well as words."""
    assert (await search.look(many, "common w7", [])).asked == "('common') & ('w7')"
    monkeypatch.setattr(search, "_ENOUGH_US", 20)
    for query, facets, asked in (
        ("w7", [], "('w7')"),
        ("common w7 last", [], "('w7')"),
        ('common "and the" w7*', ["M:m1"], "('w7':*)"),
        ("common", [], "('common')"),
        ("w7 w8", [], "('w7') & ('w8')"),
        ("common", ["M:m1"], "'M:m1'"),
    ):
        seen = await search.look(many, query, facets)
        assert (seen.asked, seen.is_guess) == (asked, False), seen
        assert seen.share <= seen.share_asked <= seen.rarest * 1.01


async def test_statistics_that_do_not_name_a_word_are_not_believed(many: Connection) -> None:
    seen = await search.look(many, "seldom", [])
    assert seen.is_guess
    seen = replace(seen, conversations=1e9)
    assert [listing._is_known(pages.Wanted(query="x"), replace(seen, is_guess=guess)) for guess in (True, False)] == [
        False,
        True,
    ]


@pytest.mark.parametrize("query", ["common", "and last", "w1*"])
async def test_how_common_a_word_is_shows_in_where_it_is_found_first(many: Connection, query: str) -> None:
    """Within a factor of two, from a quarter of it."""
    wanted, seen = pages.Wanted(query=query), await search.look(many, query, [])
    all_of_it = (await listing._matching(many, wanted, pages.Slice(5), seen))[0].total.count
    _, told = await listing._matching(many, wanted, pages.Slice(5), seen, far=all_of_it // 4)
    dense = listing._as_dense_as(told, replace(seen, share=1e-6, share_asked=2e-6, is_guess=True))
    assert all_of_it / 2 < dense.share * 20_000 < all_of_it * 2
    assert dense.share <= dense.share_asked == min(2 * dense.share, 1)
    assert listing._as_dense_as(told, replace(seen, conversations=0)).share == seen.share


@pytest.mark.parametrize(("within", "is_walked"), [(0.3, True), (0.045, False)])
def test_a_first_page_is_walked_to_only_where_that_pays_for_its_total(within: float, is_walked: bool) -> None:
    """What the index of words finds it has counted. A page behind a cursor needs no total."""
    wanted = pages.Wanted(query="x", username="u1")
    seen = replace(_LOOK, rarest=0.02, within=within, terms=2, conversations=1_000_000)
    seen = replace(seen, share=within * 0.02, share_asked=within * 0.02)
    walks = [listing._far(wanted, pages.Slice(50, after), seen) > 0 for after in (None, _AFTER)]
    assert walks == [is_walked, True]


async def test_totals_of_searches_are_counted_so_far(many: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    async def total(**wanted: Any) -> pages.Total:
        page = await listing.page(many, pages.Wanted(**wanted), size=5)
        assert len(page.rows) == min(5, page.total.count)
        return page.total

    assert await total(query="w7") == pages.Total(20)
    assert await total(query="common") == pages.Total(1_001, exact=False)
    assert await total(query="common w7") == pages.Total(20)
    assert await total(query="w7", username="u1") == pages.Total(7)
    assert await total(username="u1", model="m1") == pages.Total(6667)
    assert await total(username="u1", model="m2") == pages.Total(0)
    assert await total(query="common the") == pages.Total(1_001, exact=False)
    monkeypatch.setattr(listing, "_LOOKED", 10)
    assert await total(query="common the") == pages.Total(10_000, exact=False)
    assert await total(query="common last", username="u1") == pages.Total(2500, exact=False)
    monkeypatch.setattr(listing, "_NEWEST", 3)
    assert await total(query="common the") == pages.Total(6, exact=False)
    assert await total(model="m1", chatbot_id="b1") == pages.Total(1_001, exact=False)
    assert await total(model="m1", chatbot_id="b2") == pages.Total(0)
    assert await total(model="m1", chatbot_id="b1", query="w7") == pages.Total(7)


async def test_what_is_found_first_may_all_be_gone(many: Connection) -> None:
    """Or of another name than a facet holds: an empty page of some is no empty page of all."""
    await many.execute("delete from conversations where id <= 15000")
    await many.execute("update conversations set model = repeat('m', 100) || (id > 18000)::int")
    await many.execute(listed.SAVE_WORDS)
    for model in (None, "m" * 100 + "0", "m" * 100 + "1"):
        page = await listing.page(many, pages.Wanted(query="common last", model=model), size=50)
        assert len(page.rows) == 50


async def test_a_page_behind_the_end_has_the_total(many: Connection) -> None:
    await many.execute("update conversations set first_question = 'fresh' where id % 10 = 0")
    await many.execute(listed.SAVE_WORDS)  # which no statistics name
    for since, skip in itertools.product((None, BEGAN), (2_000, 9_000)):
        page = await listing.page(many, pages.Wanted(query="fresh", since=since), size=50, skip=skip)
        assert not page.rows
        assert page.total == pages.Total(2_000) or (page.total.count > 1_000 and not page.total.exact)
    wanted, seen = pages.Wanted(query="fresh"), replace(_LOOK, query="'fresh'", asked="'fresh'")
    for skip, is_looked_at in ((1_990, True), (2_000, False)):
        sql, values = list_statements.matching(wanted, pages.Slice(50, skip=skip), seen)
        rows = await many.fetch(f"explain (analyze, costs off) {sql}", *values)
        (looked,) = [row[0] for row in rows if "using conversations_pkey on conversations c " in row[0]][:1]
        assert ("never executed" not in looked) == is_looked_at, looked


async def test_many_words_are_no_number_too_large(many: Connection) -> None:
    for count in range(50, 129, 3):
        assert not (await listing.page(many, pages.Wanted(query=" ".join(["zz"] * count)), size=50)).rows


async def test_words_of_what_is_gone_leave_no_hole(many: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names longer than a facet are told apart, too."""
    await many.execute("delete from conversations where id % 2 = 0")
    await many.execute("update conversations set model = repeat('m', 100) || id % 3")
    await many.execute(listed.SAVE_WORDS)
    for far in (0, 30_000):
        monkeypatch.setattr(listing, "_far", lambda *_, far=far: far)
        for model in (None, "m" * 100 + "1"):
            page = await listing.page(many, pages.Wanted(query="common", model=model), size=300)
            assert len(page.rows) == 300
            assert page.behind is not None
            assert model is None or {row["model"] for row in page.rows} == {model}
