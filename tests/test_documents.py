"""What docs/ promises about events, metrics, log lines and queries is what the code does."""

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import get_args
from uuid import UUID

import asyncpg
import pytest
from pydantic import BaseModel

from app.conversations.sources.recognition import parts_of
from app.conversations.sources.shape import Reason
from app.conversations.sources.source import Wanted
from app.demo import demo_provider
from app.errors import Misconfigured
from app.flows import file, shapes
from app.flows.file import parse
from app.flows.markers import Scanner
from app.flows.shapes import SourceShape
from app.flows.templates import Template, TemplateError
from app.streams.event import TERMINAL, Kind, to_frames
from app.telemetry import Metrics
from tests.serving import apply_demo, serving

ROOT = Path(__file__).parent.parent


def _document(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def _section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


def _fenced(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _first_cells(text: str) -> list[str]:
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_kind_of_event_is_documented_with_an_example() -> None:
    kinds = re.findall(r"^### `(\w+)`$", _document("events.md"), re.MULTILINE)
    assert kinds == list(dict.fromkeys(kinds))
    assert set(kinds) == set(get_args(Kind))
    examples = [json.loads(example) for example in _fenced(_document("events.md"), "json")]
    assert [example["event"] for example in examples] == kinds
    assert kinds[-1] == TERMINAL
    assert all(list(example) == ["id", "event", "data", "timestamp"] for example in examples)


def test_the_documented_frame_is_ours() -> None:
    (frame,) = _fenced(_section(_document("events.md"), "Two ways to read"), "")
    stream_id, payload = UUID("0197c1a2-7b3c-7def-8a01-23456789abcd"), frame.splitlines()[-2].removeprefix("data: ")
    assert frame == "retry: 1200\n" + to_frames(stream_id, 4, ["{" + payload.removeprefix('{"id":4,')]).decode()


async def test_events_have_the_documented_members_and_the_python_example_reads_them(database: str) -> None:
    documented = {
        example["event"]: example["data"].keys() for example in map(json.loads, _fenced(_document("events.md"), "json"))
    }
    (script,) = _fenced(_document("events.md"), "python")
    async with demo_provider() as provider:
        faulty = "demo?tokens=5&delay_ms=0&fault=eof"
        await apply_demo(database, provider, {"demo": "demo?tokens=5&delay_ms=0", "faulty": faulty})
        async with serving(database, provider_retries=0) as client:
            url = str(client.base_url).rstrip("/")
            assert (await _run(script, url)).endswith("\ncompleted\n")
            assert (await _run(script.replace('"demo"', '"faulty"'), url)).endswith("\nfailed\n")
    connection = await asyncpg.connect(database)
    rows = await connection.fetch("select payload from streaming_events")
    await connection.close()
    events = [json.loads(row["payload"]) for row in rows]
    assert {event["event"] for event in events} >= {"stream_start", "token", "flow_end", "flow_error", "stream_end"}
    for event in events:
        assert documented[event["event"]] - event["data"].keys() <= {"error"}
        assert event["data"].keys() <= documented[event["event"]]


async def _run(script: str, url: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", script),
        env={**os.environ, "PARLEY_URL": url, "no_proxy": "*"},
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(30):
        said, _ = await process.communicate()
    assert process.returncode == 0
    return said.decode()


def test_every_metric_is_documented() -> None:
    registered = Metrics().registry.collect()
    names = {metric.name + ("_total" if metric.type == "counter" else "") for metric in registered}
    documented = _first_cells(_section(_document("operations.md"), "Metrics"))
    assert len(documented) == len(set(documented))
    assert set(documented) == names


@pytest.mark.parametrize("name", _first_cells(_section(_document("operations.md"), "Logs")))
def test_documented_log_events_are_logged(name: str) -> None:
    logged = re.compile(rf'(?:log\.\w+|level)\(\s*"{name}"')
    assert any(logged.search(path.read_text()) for path in (ROOT / "app").rglob("*.py"))


async def test_documented_queries_run(database: str) -> None:
    blocks = _fenced(_section(_document("operations.md"), "Looking into the database"), "sql")
    queries = [query.strip() for block in blocks for query in block.split(";") if query.strip()]
    connection = await asyncpg.connect(database)
    try:
        for query in queries:
            await connection.fetch(query)
    finally:
        await connection.close()
    assert "SELECT * FROM streaming_sessions WHERE status = 'active'" in queries


def test_the_documented_chatbot_works_and_every_placeholder_is_documented() -> None:
    text = _document("templates.md")
    (example,) = _fenced(text, "yaml")
    shop = parse(example).chatbots["shop"]
    assert shop.flows["main"].system.startswith("You answer for {{value.shop}}")
    pieces = Scanner(shop.markers).feed("Try this: [[card:4711]] It is new.")
    tokens = [{"token": piece.text, "markers": {name: [of] for name, of in piece.markers}} for piece in pieces]
    assert tokens == [
        {"token": "Try this: ", "markers": {"card": ["4711"]}},
        {"token": " It is new.", "markers": {}},
    ]
    names = _first_cells(_section(text, "Placeholders"))
    with pytest.raises(TemplateError, match=re.escape(f"{', '.join(names[:-1])} and {names[-1]};")):
        Template("{{unknown}}")


@pytest.mark.parametrize(
    ("title", "models"),
    [
        ("Providers", [shapes.ProviderShape]),
        ("Chatbots", [shapes.ChatbotShape]),
        ("Flows", [shapes.FlowShape]),
        ("Router", [shapes.RouterShape]),
        ("Steps and conditions", [shapes.StepShape, shapes.ConditionShape]),
        ("What a message may set", [shapes.AllowShape]),
    ],
)
def test_every_member_of_the_chatbots_file_is_documented(title: str, models: list[type[BaseModel]]) -> None:
    cells = re.findall(r"^\| (`[^|]+`) \|", _section(_document("chatbots.md"), title), re.MULTILINE)
    documented = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(documented) == sorted(name for model in models for name in model.model_fields)


def test_sources_are_documented_with_all_kinds_parts_members_and_reasons() -> None:
    text = _document("sources.md")
    names = {title: _cells(_section(text, title)) for title in ("What is recognised", "Members of a source")}
    kinds = get_args(Wanted)[1:]
    assert names["What is recognised"] == list(kinds)
    members = names["Members of a source"]
    assert members[: len(SourceShape.model_fields)] == list(SourceShape.model_fields)
    assert set(_cells(_section(text, "What is skipped"))) == set(get_args(Reason))
    rows = re.findall(r"^\| (`.*`) \| (`.*`) \|$", _section(text, "Members of a source"), re.MULTILINE)
    parts = {kind: re.findall(r"`(\w+)`", told) for of, told in rows for kind in re.findall(r"`([\w-]+)`", of)}
    assert parts == {kind: list(parts_of(kind)) for kind in kinds}
    (example,) = _fenced(text, "yaml")
    assert parse(example).sources[0].table == "n8n_chat_histories"


def _cells(text: str) -> list[str]:
    return re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)


def test_the_first_chatbots_file_works() -> None:
    (example,) = _fenced(_document("chatbots.md"), "yaml")
    assert file.parse(example).chatbots["assistant"].answers == ("main",)


def test_the_documented_put_is_taken_and_the_documented_mistakes_are_told() -> None:
    text = _document("chatbots.md")
    (example,) = _fenced(text, "json")
    taken = file.parse_one("shop", json.loads(example))
    assert taken.templates == {"brief": "Answer in one sentence."}
    assert taken.chatbots["shop"].flows["main"].system == "Answer in one sentence."
    wrong = """providers:
  p: {kind: openai, base_url: "http://h"}
chatbots:
  shop:
    answers: [main]
    flows:
      main: {provider: p, modell: m}
    language: 12
"""
    with pytest.raises(Misconfigured) as error:
        parse(wrong, "chatbots.yaml")
    assert "".join(f"    {line}\n" for line in error.value.detail.splitlines()) in text


def test_links_between_documents_lead_somewhere() -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
