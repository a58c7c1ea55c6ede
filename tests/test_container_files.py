"""Dockerfile and compose.yaml, read as text: no Docker engine runs in the tests, so what shows is checked here."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).parent.parent
SECRET = re.compile(r"(password|secret|token|api_key)\w*[ \t]*[:=][ \t]*[\"']?[A-Za-z0-9]", re.IGNORECASE)


def _stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage of the Dockerfile, as (name, rest)."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    instructions = [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]
    starts = [index for index, (name, _) in enumerate(instructions) if name == "FROM"]
    return [instructions[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def _said(stage: list[tuple[str, str]], name: str) -> list[str]:
    return [rest for given, rest in stage if given == name]


def _environment(stage: list[tuple[str, str]]) -> dict[str, str]:
    words = " ".join(_said(stage, "ENV")).split()
    return dict(word.split("=", 1) for word in words)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return read


def test_every_base_image_names_a_version() -> None:
    for stage in _stages():
        image = _said(stage, "FROM")[0].split()[0]
        assert re.fullmatch(r"python:3\.\d+-slim", image), image


def test_the_build_verifies_hashes_and_everything_else_stays_offline() -> None:
    commands = [part for run in _said(_stages()[0], "RUN") for part in run.split("&&") if "pip " in part]
    verified = [part for part in commands if "--require-hashes" in part and "-r requirements.lock" in part]
    assert len(verified) == 1
    assert all("--no-index" in part for part in commands if part not in verified and "install" in part)
    assert all("--no-index" in part for part in commands if "--no-build-isolation" in part)


def test_only_runtime_dependencies_are_installed() -> None:
    installs = [run for stage in _stages() for run in _said(stage, "RUN") if "/opt/parley" in run]
    assert len(installs) == 1
    assert installs[0].endswith("--find-links /wheels parley")
    assert not _said(_stages()[-1], "RUN")


def test_the_final_stage_takes_nothing_but_the_installed_program() -> None:
    final = _stages()[-1]
    assert _said(final, "COPY") == ["--from=build /opt/parley /opt/parley"]
    assert not _said(final, "ADD")


def test_it_runs_as_a_numbered_user_other_than_root() -> None:
    final = _stages()[-1]
    user = _said(final, "USER")[-1].split(":")[0]
    assert user.isdigit()
    assert int(user) > 0


def test_health_is_livez_asked_with_the_standard_library() -> None:
    (health,) = _said(_stages()[-1], "HEALTHCHECK")
    words = yaml.safe_load(health.split("CMD", 1)[1])
    assert words[:2] == ["python", "-c"]
    compile(words[2], "healthcheck", "exec")
    assert "'/livez'" in words[2]
    assert "import http.client, os, sys" in words[2]


def test_signals_reach_the_program() -> None:
    final = _stages()[-1]
    assert _said(final, "ENTRYPOINT") == ['["parley"]']
    assert _said(final, "CMD") == ['["serve"]']
    assert _said(final, "STOPSIGNAL") == ["SIGTERM"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert "parley" in scripts


def test_settings_of_the_image_exist() -> None:
    given = [name for name in _environment(_stages()[-1]) if name.startswith("PARLEY_")]
    assert "PARLEY_HOST" in given
    assert all(name.removeprefix("PARLEY_").lower() in Settings.model_fields for name in given)
    assert _said(_stages()[-1], "EXPOSE") == [_environment(_stages()[-1])["PARLEY_PORT"]]


def test_every_copied_file_exists_and_reaches_the_build() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for copied in _said(_stages()[0], "COPY"):
        for source in copied.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed, source


def test_the_build_gets_what_the_wheel_is_made_of() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = {word for copy in _said(_stages()[0], "COPY") for word in copy.split()[:-1]}
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"]}
    assert needed | set(project["project"]["license-files"]) <= copied


def test_the_build_context_is_closed_by_default() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"


def test_no_secret_is_written_down() -> None:
    for name in ("Dockerfile", "compose.yaml", ".dockerignore"):
        assert not SECRET.search((ROOT / name).read_text()), name


def test_nobody_gets_in_without_a_key() -> None:
    assert Settings.model_fields["auth"].default == "keys"
    assert not Settings.model_fields["open_anywhere"].default
    assert not Settings.model_fields["metrics_open"].default
    for name in ("Dockerfile", "compose.yaml"):
        assert not re.search("PARLEY_(AUTH|OPEN_ANYWHERE|METRICS_OPEN)", (ROOT / name).read_text())


@pytest.mark.parametrize("text", ["PASSWORD=hunter2", "POSTGRES_PASSWORD: secret", "OPENAI_API_KEY: 'sk-1'"])
def test_a_written_secret_would_be_found(text: str) -> None:
    assert SECRET.search(text)


def test_images_name_a_version(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        assert re.search(r":[^:/]+$", service["image"])
        assert not service["image"].endswith(":latest")


def test_the_password_has_no_default(compose: dict[str, Any]) -> None:
    gateway, postgres = compose["services"]["gateway"], compose["services"]["postgres"]
    for value in (gateway["environment"]["DATABASE_URL"], postgres["environment"]["POSTGRES_PASSWORD"]):
        assert "${POSTGRES_PASSWORD:?set POSTGRES_PASSWORD" in value


def test_the_database_url_names_the_database_service(compose: dict[str, Any]) -> None:
    postgres = compose["services"]["postgres"]["environment"]
    for name in ("gateway", "migrate"):
        url = compose["services"][name]["environment"]["DATABASE_URL"]
        assert url.startswith(f"postgresql://{postgres['POSTGRES_USER']}:")
        assert url.endswith(f"@postgres:5432/{postgres['POSTGRES_DB']}")


def test_data_is_kept_in_a_named_volume(compose: dict[str, Any]) -> None:
    assert compose["services"]["postgres"]["volumes"] == ["data:/var/lib/postgresql"]
    assert "data" in compose["volumes"]


def test_the_gateway_is_published_on_loopback_only(compose: dict[str, Any]) -> None:
    assert "ports" not in compose["services"]["postgres"]
    for port in compose["services"]["gateway"]["ports"]:
        assert port.startswith("127.0.0.1:")
        assert port.endswith(f":{_environment(_stages()[-1])['PARLEY_PORT']}")


def test_the_gateway_waits_for_a_healthy_and_migrated_database(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["postgres"]["healthcheck"]["test"][:2] == ["CMD", "pg_isready"]
    assert services["migrate"]["command"] == ["migrate"]
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["gateway"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    assert services["gateway"]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_a_stop_leaves_time_to_drain(compose: dict[str, Any]) -> None:
    grace = float(compose["services"]["gateway"]["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings.model_fields["drain_s"].default + 10


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/dev", "scripts/check", "scripts/test", "scripts/lock"])
def test_scripts_are_executable_and_parse(name: str) -> None:
    assert (ROOT / name).stat().st_mode & 0o111 == 0o111
    assert (ROOT / name).read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", ROOT / name], check=True)
