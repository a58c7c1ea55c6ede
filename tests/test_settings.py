"""Settings: every mistake at once, frozen, read in one place, and documented in full."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from app.errors import Misconfigured
from app.settings import Settings, load

ROOT = Path(__file__).parent.parent
# Where the environment may be touched: settings, references, and what only hands it on to children.
_READERS = {"app/settings.py", "app/references.py", "app/__main__.py"}
_FIXED = {
    "database_url": "DATABASE_URL",
    "enable_background_jobs": "ENABLE_BACKGROUND_JOBS",
    "discovery_cron": "CONVERSATION_DISCOVERY_CRON",
    "sync_enabled": "SYNC_ENABLED",
    "device_id": "DEVICE_ID",
}


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*_FIXED.values(), *(f"PARLEY_{field.upper()}" for field in Settings.model_fields)):
        monkeypatch.delenv(name, raising=False)


def _default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return "`/var/lib/parley` as root, else `$XDG_DATA_HOME/parley`, else `~/.local/share/parley`"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return "none" if field.default is None else f"`{field.default}`"


def test_the_table_of_settings_is_the_settings() -> None:
    lines = (ROOT / "docs/configuration.md").read_text().splitlines()
    documented = [line for line in lines if re.match(r"\| `[A-Z]", line)]
    actual = [
        f"| `{_FIXED.get(name, f'PARLEY_{name.upper()}')}` | {_default(field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    assert documented == actual


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_read_from_the_variable_in_the_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"data_dir": "/elsewhere", "log_level": "debug", "log_format": "text", "bus": "poll"}
    given |= {"database_url": "postgresql://x", "enable_background_jobs": "false", "sync_enabled": "false"}
    given |= {"search_messages": "true"}
    given |= {"auth": "open", "open_anywhere": "true", "metrics_open": "true", "row_security": "off"}
    value = given.get(name) or ("other" if name == "host" else "60")
    monkeypatch.setenv(_FIXED.get(name, f"PARLEY_{name.upper()}"), value)
    if name == "suspect":
        monkeypatch.setenv("PARLEY_SUSPECT", value := "false")
    if name in ("provider_retries", "pool_size"):
        monkeypatch.setenv(f"PARLEY_{name.upper()}", value := "3")
    if name.endswith(("_limit", "_buffer", "_bytes")):
        monkeypatch.setenv(f"PARLEY_{name.upper()}", value := "70000")
    settings = load()
    assert settings.model_fields_set == {name}
    assert str(getattr(settings, name)).lower() in (value, f"{value}.0")


def test_every_mistake_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mistakes = {"PARLEY_PORT": "http", "PARLEY_LOG_LEVEL": "loud", "PARLEY_LEASE_S": "0", "PARLEY_GAP_TIMEOUT_S": "nan"}
    for name, value in mistakes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Misconfigured) as caught:
        load()
    assert all(name in caught.value.detail for name in mistakes)
    assert "PARLEY_HOST" not in caught.value.detail


def test_an_empty_variable_counts_as_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_PORT", "")
    monkeypatch.setenv("DATABASE_URL", "")
    assert load().port == 8080
    assert load().database_url is None


def test_what_is_given_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_PORT", "81")
    monkeypatch.setenv("DATABASE_URL", "postgresql://environment")
    settings = load(port=82, database_url="postgresql://given")
    assert (settings.port, settings.database_url) == (82, "postgresql://given")


def test_settings_are_frozen_and_keep_the_password_to_themselves() -> None:
    settings = load(database_url="postgresql://parley:canary@host/db")
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]
    assert "canary" not in repr(settings)
    with pytest.raises(Misconfigured) as caught:
        load(database_url=["canary"])
    assert "canary" not in caught.value.detail


def _reads_of_the_environment(source: str) -> Iterator[int]:
    tree = ast.parse(source)
    # `os.environ[…] = …` gives a reference something to lead to; it reads nothing.
    written = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store)
    ]
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr="environ" | "environb" | "getenv" | "getenvb") if node not in written:
                yield node.lineno
            case ast.ImportFrom(module="os", names=names) if {"environ", "getenv"} & {name.name for name in names}:
                yield node.lineno


def test_the_environment_is_read_in_one_place() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "app").rglob("*.py")
        for line in _reads_of_the_environment(path.read_text())
    }
    allowed = {place for place in found if place.split(":")[0] in _READERS or place.startswith("app/embedded/")}
    assert found == allowed
    assert {place.split(":")[0] for place in allowed} >= {"app/settings.py", "app/references.py"}
    assert sorted(_reads_of_the_environment("os.getenv('A')\nos.environ['A'] = ''\nfrom os import environ")) == [1, 3]
