"""The chatbots file: what it may say, and what its mistakes are answered with."""

from pathlib import Path

import asyncpg
import pytest

from app.errors import Misconfigured
from app.flows import chatbots, file

ROOT = Path(__file__).parents[2]
EXAMPLES = [*sorted((ROOT / "docs/examples").glob("*.yaml")), ROOT / "app/demo/chatbots.yaml"]
GOOD = """
providers:
  p: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: env:KEY}
chatbots:
  a: {flows: {main: {provider: p, model: m}}}
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_can_be_applied(path: Path) -> None:
    assert file.load(path)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("kind: openai", "kind: other", "providers.p.kind"),
        ("http://127", "ftp://127", "http(s) URL"),
        ("env:KEY", "sk-123456", "never the key itself"),
        ("provider: p", "provider: q", "no provider is named 'q' (p)"),
        ("model: m", "models: m", "chatbots.a.flows.main.model: Field required"),
        ("model: m", "model: m, parameters: {stream: false}", "stream cannot be set here"),
        ("  a:", "  'a b':", "chatbots.a b"),
        ("chatbots:", "chatbots: [", "not valid YAML"),
        ("chatbots:", "chatbot:", "chatbots: Field required"),
    ],
)
def test_mistakes_are_named(old: str, new: str, told: str) -> None:
    with pytest.raises(Misconfigured) as error:
        file.parse(GOOD.replace(old, new, 1), "bots.yaml")
    assert told in error.value.detail
    assert "sk-123456" not in error.value.detail


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(Misconfigured) as error:
        file.parse("providers: {p: {kind: x, base_url: y}}\nchatbots: {a: {}}")
    assert error.value.detail.count("\n") >= 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    for name in ("none.yaml", "large.yaml", "binary.yaml", "."):
        with pytest.raises(Misconfigured):
            file.load(tmp_path / name)


async def test_a_version_is_added_only_where_something_changes(database: str) -> None:
    connection = await asyncpg.connect(database)
    wanted = file.parse(GOOD)
    assert [change.version for change in await chatbots.apply(connection, wanted, dry_run=True)] == [1]
    assert [change.version for change in await chatbots.apply(connection, wanted)] == [1]
    assert await chatbots.apply(connection, wanted) == []
    changed = file.parse(GOOD.replace("model: m", "model: n, parameters: {temperature: 0.5}"))
    assert [change.version for change in await chatbots.apply(connection, changed)] == [2]
    assert await chatbots.all_newest(connection) == changed.chatbots
    await connection.close()


async def test_temperature_within_the_bounds_a_chatbot_allows(database: str) -> None:
    from app.errors import Invalid
    from app.flows.wishes import allowed

    chatbot = file.parse(GOOD.replace("model: m}}", "model: m}}, allow: {temperature: [0, 1]}")).chatbots["a"]
    assert allowed({"temperature": 0.5}, chatbot).temperature == 0.5
    for wrong in (2, -1, True, "0.5", float("nan")):
        with pytest.raises(Invalid, match="between 0 and 1"):
            allowed({"temperature": wrong}, chatbot)
    with pytest.raises(Invalid, match="not top_p"):
        allowed({"top_p": 1}, chatbot)
