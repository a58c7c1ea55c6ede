"""The `parley` command as a user runs it: in a process of its own, judged by what it says and its exit code."""

import asyncio
import signal
import socket
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx2
import pytest
import yaml

import app
from app.__main__ import main
from app.demo import demo_provider
from app.embedded import embedded_postgres
from app.jobs.schedule import SCHEDULE
from app.schema import wanted
from tests.command import ROOT, Command, answered, run, running, silent_port, through
from tests.conftest import Server
from tests.house import Open, flow
from tests.serving import apply_demo, client_of, until_ready

REVISIONS = ", ".join(wanted())


def chatbots_file(folder: Path, **flow: Any) -> Path:
    """A chatbots file with one chatbot, `one`."""
    path = folder / "chatbots.yaml"
    providers = {"here": {"kind": "openai", "base_url": "http://127.0.0.1:9/v1", "api_key": "env:PARLEY_TEST_KEY"}}
    flows = {"main": {"provider": "here", "model": "first", **flow}}
    path.write_text(yaml.safe_dump({"providers": providers, "chatbots": {"one": {"flows": flows}}}))
    return path


def url_of(port: socket.socket) -> str:
    return f"postgresql://parley@127.0.0.1:{port.getsockname()[1]}/parley?sslmode=disable"


async def versions(database: str) -> list[tuple[str, int]]:
    connection = await asyncpg.connect(database)
    try:
        rows = await connection.fetch("select id, version from chatbots order by id, version")
    finally:
        await connection.close()
    return [(row["id"], row["version"]) for row in rows]


# -- the command itself


async def test_version() -> None:
    done = await run("version")
    assert (done.code, done.out, done.err) == (0, [f"parley {app.__version__}"], [])


@pytest.mark.parametrize("name", ["", *main.commands])
async def test_help(name: str) -> None:
    done = await run(*([name] if name else []), "--help")
    assert done.code == 0
    assert done.out[0].startswith(f"Usage: parley {name or '[OPTIONS]'}")
    assert done.out[2].strip(), "a sentence says what it does"


async def test_a_command_that_does_not_exist() -> None:
    done = await run("frobnicate")
    assert done.code == 2
    assert "No such command 'frobnicate'" in done.err[-1]


async def test_the_script_that_a_user_types_is_this_command() -> None:
    entry = (ROOT / "pyproject.toml").read_text()
    assert 'parley = "app.__main__:main"' in entry


# -- settings


@pytest.mark.parametrize("name", ["serve", "migrate", "apply"])
async def test_without_a_database_it_refuses_in_one_sentence(name: str, tmp_path: Path) -> None:
    done = await run(name, *([str(chatbots_file(tmp_path))] if name == "apply" else []))
    assert (done.code, done.out) == (2, [])
    assert len(done.err) == 1
    assert done.err[0].startswith("parley: DATABASE_URL is not set.")
    assert "parley dev" in done.err[0]


async def test_every_wrong_setting_is_reported_at_once() -> None:
    done = await run("serve", PARLEY_PORT="99999", PARLEY_LOG_LEVEL="loud", PARLEY_LEASE_S="-1")
    assert (done.code, len(done.err)) == (2, 1)
    assert all(name in done.err[0] for name in ("PARLEY_PORT", "PARLEY_LOG_LEVEL", "PARLEY_LEASE_S"))


@pytest.mark.parametrize("name", ["serve", "migrate"])
async def test_a_database_url_of_another_kind_is_refused_without_repeating_it(name: str) -> None:
    done = await run(name, DATABASE_URL="mysql://parley:hunter2@127.0.0.1/parley")
    assert (done.code, len(done.err)) == (2, 1)
    assert "postgresql://" in done.err[0]
    assert "hunter2" not in done.err[0]


# -- migrate


async def test_migrate_and_its_check(empty_database: str) -> None:
    missing = await run("migrate", "--check", DATABASE_URL=empty_database)
    assert (missing.code, missing.out) == (1, [f"Missing: {REVISIONS}. Run `parley migrate`."])
    assert not await _tables(empty_database), "a check changes nothing"

    done = await run("migrate", DATABASE_URL=empty_database)
    assert (done.code, done.out, done.err) == (0, [f"Applied: {REVISIONS}."], [])

    for arguments in (["migrate"], ["migrate", "--check"]):
        again = await run(*arguments, DATABASE_URL=empty_database)
        assert (again.code, again.out) == (0, ["The schema is up to date."])


async def _tables(database: str) -> int:
    connection = await asyncpg.connect(database)
    try:
        count: int = await connection.fetchval("select count(*) from pg_tables where schemaname = 'public'")
    finally:
        await connection.close()
    return count


async def test_two_migrations_at_once(empty_database: str) -> None:
    both = await asyncio.gather(*(run("migrate", DATABASE_URL=empty_database) for _ in range(2)))
    assert [done.code for done in both] == [0, 0], [done.err for done in both]
    assert sorted(done.out[0] for done in both) == [f"Applied: {REVISIONS}.", "The schema is up to date."]


async def test_a_database_of_a_newer_parley_is_left_alone(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("update alembic_version set version_num = '9999'")
    await connection.close()
    done = await run("migrate", DATABASE_URL=database)
    assert done.code == 2
    assert "run the newer Parley" in done.err[0]


# -- a database that is not there yet


async def test_it_waits_for_a_database_and_says_once_per_reason_why(empty_database: str) -> None:
    with silent_port() as port:
        async with running("migrate", DATABASE_URL=through(port, empty_database)) as process:
            await process.says("nothing listens")
            async with _slammed(port) as slammed:
                await slammed(3)
            async with answered(port, empty_database):
                done = await process.ended()
    assert (done.code, done.out) == (0, [f"Applied: {REVISIONS}."])
    assert all(line.startswith("Waiting for PostgreSQL: ") for line in done.err)
    assert len(done.err) == len(set(done.err)) == 2


@asynccontextmanager
async def _slammed(port: socket.socket) -> AsyncGenerator[Any, None]:
    """Connections that are closed as soon as they are made; yields a wait for some of them."""
    slammed = asyncio.Semaphore(0)

    def slam(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        slammed.release()

    async def wait(times: int) -> None:
        async with asyncio.timeout(20):
            for _ in range(times):
                await slammed.acquire()

    async with await asyncio.start_server(slam, sock=port.dup()):
        yield wait


async def test_it_gives_up_in_the_end() -> None:
    with silent_port() as port:
        done = await run("migrate", DATABASE_URL=url_of(port), PARLEY_DATABASE_WAIT_S="0.5")
    assert done.code == 2
    assert [line.partition(":")[0] for line in done.err] == ["Waiting for PostgreSQL", "parley"]
    assert "Gave up after 0.5 s: nothing listens at the host and port of DATABASE_URL" in done.err[1]


async def test_a_server_that_is_too_old_is_refused_at_once() -> None:
    async with _old_postgres() as url:
        done = await run("migrate", DATABASE_URL=url)
    assert (done.code, done.err) == (2, ["parley: PostgreSQL 14 is too old: Parley needs 15 or newer."])


@asynccontextmanager
async def _old_postgres() -> AsyncIterator[str]:
    """As much of PostgreSQL 14 as a client sees before its first query."""

    def message(kind: bytes, body: bytes) -> bytes:
        return kind + (len(body) + 4).to_bytes(4, "big") + body

    def parameter(name: str, value: str) -> bytes:
        return message(b"S", f"{name}\0{value}\0".encode())

    welcome = (
        message(b"R", bytes(4))
        + parameter("server_version", "14.9")
        + parameter("client_encoding", "UTF8")
        + message(b"K", bytes(8))
        + message(b"Z", b"I")
    )

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(4), "big")
        await reader.readexactly(size - 4)
        writer.write(welcome)
        # What comes next, a goodbye or a query, is answered by leaving.
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield f"postgresql://parley@127.0.0.1:{server.sockets[0].getsockname()[1]}/parley?sslmode=disable"


# -- clean


async def test_clean_deletes_only_when_it_is_told_to(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "insert into error_logs (id, category, code, message, created_at)"
        " values (gen_random_uuid(), 'x', 'x', 'x', now() - interval '92 days')"
    )
    for options in ([], ["--dry-run"], ["--dry-run", "--yes"]):
        done = await run("clean", *options, DATABASE_URL=database)
        assert done.code == 0
        assert next(line for line in done.out if "error_logs" in line).endswith("1 rows, due for up to 2.0 days")
        assert await connection.fetchval("select count(*) from error_logs") == 1
    done = await run("clean", "--yes", DATABASE_URL=database)
    assert (done.code, done.out[-1]) == (0, "Done.")
    assert await connection.fetchval("select count(*) from error_logs") == 0
    await connection.close()


# -- doctor


async def diagnosis(**variables: str) -> tuple[int, dict[str, str]]:
    """The exit code, and for each subject what the doctor says, `ok` or `FAIL` first. Nothing else may be said."""
    done = await run("doctor", **variables)
    assert done.err == []
    findings = [(line[6:].partition("  ") if len(line) > 6 else ("", "", "")) for line in done.out]
    return done.code, {
        subject.strip(): f"{line[:4].strip()} {said.strip()}"
        for line, (subject, _, said) in zip(done.out, findings, strict=True)
    }


async def test_doctor_of_a_healthy_installation(database: str) -> None:
    async with demo_provider() as url:
        await apply_demo(database, url, {"one": "demo"})
        code, found = await diagnosis(DATABASE_URL=database)
    assert code == 0
    assert list(found) == [
        "versions",
        "configuration",
        "database",
        "schema",
        "access",
        "master key",
        "row security",
        "answers",
        "jobs",
        "provider demo",
    ]
    assert all(said.startswith("ok ") for said in found.values())
    assert app.__version__ in found["versions"]


async def test_doctor_says_who_gets_in(database: str) -> None:
    _, found = await diagnosis(DATABASE_URL=database, PARLEY_AUTH="open")
    assert found["access"].startswith("ok anybody who reaches 127.0.0.1")
    code, found = await diagnosis(DATABASE_URL=database, PARLEY_AUTH="keys")
    assert (code, found["access"].partition(":")[0]) == (1, "FAIL nobody gets in")
    for name in ("one", "two"):
        (key,) = (await run("keys", "create", name, "--scope", "read", DATABASE_URL=database)).out
    await run("keys", "revoke", key, DATABASE_URL=database)
    _, found = await diagnosis(DATABASE_URL=database, PARLEY_AUTH="keys")
    assert found["access"] == "ok PARLEY_AUTH=keys, API keys that are valid: 1"
    _, found = await diagnosis(DATABASE_URL=database, PARLEY_AUTH="open", PARLEY_HOST="0.0.0.0")
    assert "PARLEY_OPEN_ANYWHERE" in found["configuration"]


async def test_doctor_sums_up_the_last_day(database: str, house: Open) -> None:
    async with house(provider_retries=0) as home:
        await home.apply(shop={"flows": {"main": flow("Hello."), "side": {"provider": "gone", "model": "m"}}})
        await home.ask("shop")
        await home.ask()
        await home.row("select * from error_logs")
        code, found = await diagnosis(DATABASE_URL=database)
    assert code == 1, "nobody listens where one of the providers should be"
    assert found["answers"].startswith("ok 2 answers in 24 hours, 0 failed, 3 calls of providers; half of the first")
    assert found["errors"] == "ok most frequent: upstream_unavailable (1)"


async def test_doctor_names_jobs_that_have_not_run(database: str) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute(
        "insert into replicas (id, version, started_at) values (gen_random_uuid(), '1', now() - interval '3 hours')"
    )
    await connection.execute(
        "insert into job_runs (name, next_at) values ('retention', now()), ('replicas', now() - interval '3 hours')"
    )
    await connection.close()
    code, found = await diagnosis(DATABASE_URL=database)
    assert code == 1
    # What is done at night only is not overdue at any time of the day.
    names = [name for name in SCHEDULE if name not in ("retention", "reconcile")]
    overdue = {subject: said[:12] for subject, said in found.items() if "job" in subject and "reconcile" not in subject}
    assert overdue == {f"job {name}": "FAIL was due" for name in names}


async def test_doctor_names_schedules_that_cannot_be_read(database: str) -> None:
    wrong = {"CONVERSATION_DISCOVERY_CRON": "often", "PARLEY_RECONCILE_CRON": "99 * * * *"}
    done = await run("doctor", DATABASE_URL=database, **wrong)
    told = [line for line in done.out if "cannot be read" in line]
    assert [name in line for name, line in zip(wrong, told, strict=True)] == [True, True]
    assert not [
        line
        for line in (await run("doctor", DATABASE_URL=database, ENABLE_BACKGROUND_JOBS="false", **wrong)).out
        if "cannot be read" in line
    ]


async def test_doctor_without_a_database() -> None:
    code, found = await diagnosis()
    assert code == 1
    assert "DATABASE_URL is not set" in found["database"]
    assert list(found) == ["versions", "configuration", "database"]


async def test_doctor_where_nothing_listens() -> None:
    with silent_port() as port:
        code, found = await diagnosis(DATABASE_URL=url_of(port))
    assert (code, found["database"]) == (
        1,
        "FAIL nothing listens at the host and port of DATABASE_URL; start it or correct the URL.",
    )


async def test_doctor_where_the_url_is_none() -> None:
    code, found = await diagnosis(DATABASE_URL="parley:hunter2@somewhere")
    assert code == 1
    assert "postgresql://" in found["database"]
    assert "hunter2" not in found["database"]


async def test_doctor_where_there_is_no_such_database(server: Server) -> None:
    code, found = await diagnosis(DATABASE_URL=server.dsn_of("parley_test_no_such"))
    assert code == 1
    assert "does not exist; create it" in found["database"]


async def test_doctor_of_a_server_that_is_too_old() -> None:
    async with _old_postgres() as url:
        code, found = await diagnosis(DATABASE_URL=url)
    assert (code, found["database"]) == (1, "FAIL PostgreSQL 14.9 is too old: 15 or newer is needed.")
    assert "schema" not in found


async def test_doctor_where_migrations_are_missing(empty_database: str) -> None:
    code, found = await diagnosis(DATABASE_URL=empty_database)
    assert code == 1
    assert found["schema"] == f"FAIL The database lacks migrations {REVISIONS}: run `parley migrate`."


async def test_doctor_where_the_account_may_not_look(database: str, server: Server) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("create role parley_test_stranger login")
    try:
        code, found = await diagnosis(DATABASE_URL=database.replace("//parley@", "//parley_test_stranger@"))
        assert code == 1
        assert "permission denied" in found["database"]
    finally:
        await connection.execute("drop role parley_test_stranger")
        await connection.close()


async def test_doctor_where_there_are_no_chatbots(database: str) -> None:
    code, found = await diagnosis(DATABASE_URL=database)
    assert code == 1
    assert "parley apply FILE" in found["chatbots"]


async def test_doctor_where_a_provider_cannot_be_reached(database: str) -> None:
    with silent_port() as port:
        await apply_demo(database, f"http://127.0.0.1:{port.getsockname()[1]}/v1", {"one": "demo"})
        code, found = await diagnosis(DATABASE_URL=database)
    assert code == 1
    assert found["provider demo"].startswith("FAIL ")


async def test_doctor_where_the_key_is_missing(database: str, tmp_path: Path) -> None:
    await run("apply", str(chatbots_file(tmp_path)), DATABASE_URL=database)
    code, found = await diagnosis(DATABASE_URL=database)
    assert (code, found["provider here"]) == (1, "FAIL The environment variable PARLEY_TEST_KEY is not set.")


@pytest.fixture
def cluster_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    # Up to the folder for everybody's: each process of the tests has a folder of its own, one deeper.
    for parent in (folder, *folder.parents[:3]):
        if not parent.stat().st_mode & 0o005:
            parent.chmod(0o755)
    return folder


async def test_a_wrong_password(cluster_folder: Path) -> None:
    rules = cluster_folder / "hba"
    rules.write_text("local all parley trust\nlocal all all scram-sha-256\n")
    rules.chmod(0o644)
    settings = {"hba_file": str(rules), "fsync": "off", "log_min_messages": "panic"}
    async with embedded_postgres(cluster_folder / "data", settings=settings) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        await connection.execute("create role guarded login password 'right'")
        await connection.close()
        wrong = postgres.dsn.replace("//parley@", "//guarded:wrong@")
        code, found = await diagnosis(DATABASE_URL=wrong)
        waiting = await run("migrate", DATABASE_URL=wrong, PARLEY_DATABASE_WAIT_S="0.3")
        right = await run("migrate", "--check", DATABASE_URL=wrong.replace("wrong", "right"))
    refused = "it refuses the user or password in DATABASE_URL; correct them."
    assert (code, found["database"]) == (1, f"FAIL {refused}")
    assert (waiting.code, waiting.err[0]) == (2, f"Waiting for PostgreSQL: {refused}")
    assert right.code == 1, "the right password gets as far as the schema"


# -- plan and export


async def test_plan_says_what_would_run_and_calls_nobody(tmp_path: Path) -> None:
    example = str(ROOT / "docs/examples/everything.yaml")
    done = await run("plan", "shop", "Do you have shoes?", "--file", example)
    assert done.code == 0, done.err
    assert done.out[0] == "Answer: intent decides (refund -> refund, other -> main; anything else -> main)."
    assert "Stage 1" in done.out
    assert "      waits for intent, mood" in done.out
    assert "      nobody waits for it" in done.out
    fixed = await run("plan", "shop", "my money back", "--file", example)
    assert fixed.out[0] == "Answer: refund, because rule 1 holds."
    assert fixed.out[-1] == "Not needed for this message: intent."
    seen = await run("plan", "shop", "look", "--file", example, "--image")
    assert not any(line.startswith("  suggest") for line in seen.out)
    for wrong in (("none", "x"), ("shop", "x", "--flow-type", "mood")):
        refused = await run("plan", *wrong, "--file", example)
        assert (refused.code, len(refused.err)) == (2, 1)


async def test_an_exported_file_applies_without_a_change(database: str, tmp_path: Path) -> None:
    example = str(ROOT / "docs/examples/everything.yaml")
    assert (await run("apply", example, DATABASE_URL=database)).code == 0
    exported = await run("export", DATABASE_URL=database)
    assert exported.code == 0, exported.err
    path = tmp_path / "exported.yaml"
    path.write_text("\n".join(exported.out))
    again = await run("apply", str(path), DATABASE_URL=database)
    assert (again.code, again.out) == (0, ["Nothing to change."])
    assert "    You answer for {{value.shop}}, in {{language}}. They sound {{output.mood}}." in exported.out
    one = await run("export", "guarded", DATABASE_URL=database)
    assert "  guarded:" in one.out
    assert "  shop:" not in one.out
    missing = await run("export", "none", DATABASE_URL=database)
    assert (missing.code, missing.out) == (2, [])
    planned = await run("plan", "shop", "Hello", DATABASE_URL=database)
    assert planned.code == 0


# -- apply


async def test_apply_adds_versions_and_shows_what_changes(database: str, tmp_path: Path) -> None:
    first = await run("apply", str(chatbots_file(tmp_path)), DATABASE_URL=database)
    assert first.code == 0, first.err
    assert first.out[:2] == ["--- (new)", "+++ chatbot one version 1"]
    assert "+        model: first" in first.out
    assert first.out[-1] == "1 of 1 chatbots changed."

    again = await run("apply", str(chatbots_file(tmp_path)), DATABASE_URL=database)
    assert (again.code, again.out) == (0, ["Nothing to change."])
    assert await versions(database) == [("one", 1)]

    changed = chatbots_file(tmp_path, model="second")
    dry = await run("apply", "--dry-run", str(changed), DATABASE_URL=database)
    assert (dry.code, dry.out[-1]) == (0, "1 of 1 chatbots would change.")
    assert await versions(database) == [("one", 1)]

    second = await run("apply", str(changed), DATABASE_URL=database)
    assert second.code == 0
    assert second.out[:-1] == dry.out[:-1]
    assert second.out[:2] == ["--- chatbot one version 1", "+++ chatbot one version 2"]
    assert {"-        model: first", "+        model: second"} <= set(second.out)
    assert await versions(database) == [("one", 1), ("one", 2)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chatbots: [", "not valid YAML"),
        ("hello", "file:"),
        ("{providers: {}, chatbots: {one: {flows: {main: {provider: gone, model: m}}}}}", "'gone'"),
        (
            "{providers: {here: {kind: openai, base_url: 'http://x/v1', api_key: sk-canary}}, chatbots: {}}",
            "providers.here.api_key",
        ),
        ("{providers: {here: {kind: magic, base_url: 'ftp://x'}}, chatbots: {}}", "providers.here.base_url"),
    ],
    ids=["broken", "no file of ours", "unknown provider", "plain key", "two mistakes"],
)
async def test_apply_refuses_a_file_it_cannot_use(database: str, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    done = await run("apply", str(tmp_path / "file.yaml"), DATABASE_URL=database)
    assert (done.code, done.out) == (2, [])
    assert done.err[0].startswith("parley: ")
    assert any(said in line for line in done.err)
    assert not any("sk-canary" in line for line in done.err)
    assert await versions(database) == []


async def test_apply_of_a_file_that_is_not_there(database: str, tmp_path: Path) -> None:
    done = await run("apply", str(tmp_path / "none.yaml"), DATABASE_URL=database)
    assert (done.code, len(done.err)) == (2, 1)
    assert "none.yaml cannot be read" in done.err[0]


async def test_apply_to_a_database_without_tables(empty_database: str, tmp_path: Path) -> None:
    done = await run("apply", str(chatbots_file(tmp_path)), DATABASE_URL=empty_database)
    assert (done.code, len(done.err)) == (2, 1)
    assert "run `parley migrate`" in done.err[0]


# -- demo-provider


async def test_demo_provider() -> None:
    async with running("demo-provider", "--port", "0") as process:
        url = (await process.says("The demo provider is ready: ")).rpartition(" ")[2]
        async with client_of() as client:
            answer = await client.get(f"{url}/models")
        assert "demo" in [model["id"] for model in answer.json()["data"]]
        done = await process.stop(signal.SIGTERM)
    assert (done.code, done.err) == (0, [])


async def test_demo_provider_on_a_taken_port() -> None:
    with silent_port() as port:
        port.listen()
        done = await run("demo-provider", "--port", str(port.getsockname()[1]))
    assert (done.code, len(done.err)) == (2, 1)
    assert "--port" in done.err[0]


# -- serve


@asynccontextmanager
async def served(database: str, **variables: str) -> AsyncGenerator[tuple[Command, httpx2.AsyncClient], None]:
    async with running(
        "serve", DATABASE_URL=database, PARLEY_PORT="0", PARLEY_LOG_FORMAT="text", **variables
    ) as process:
        url = (await process.says("listening")).rpartition("url=")[2]
        async with client_of(url) as client:
            yield process, client


async def test_serve_says_where_and_stops_on_a_signal(database: str) -> None:
    async with served(database) as (process, client):
        await until_ready(client)
        assert (await client.get("/api/conversation-health")).json()["status"] == "healthy"
        done = await process.stop(signal.SIGINT)
    assert (done.code, done.out) == (0, [])


async def test_serve_on_a_taken_port(database: str) -> None:
    with silent_port() as port:
        port.listen()
        done = await run("serve", DATABASE_URL=database, PARLEY_PORT=str(port.getsockname()[1]))
    assert (done.code, len(done.err)) == (2, 1)
    assert "set PARLEY_PORT" in done.err[0]
