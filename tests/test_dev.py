"""`parley dev` as a real process: what it prints works, it leaves nothing behind, and it survives every kill."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import asyncpg
import httpx2
import psutil
import pytest
import yaml

from tests.command import ROOT, Command, all_gone, processes_of, run, running, silent_port
from tests.reader import ask, assert_whole, poll, reading, restarts, text_of
from tests.serving import client_of

# A replica that was killed is declared dead after a second, so that no test waits for the usual six.
QUICK = {"PARLEY_PORT": "0", "PARLEY_LEASE_S": "1", "PARLEY_BEAT_S": "0.2", "PARLEY_SCAN_S": "0.2"}
MODELS = {"slow": "demo?delay_ms=20&tokens=150", "quick": "demo?delay_ms=0&tokens=20"}
CHATBOTS = {
    "providers": {"demo": {"kind": "openai", "base_url": "env:PARLEY_DEMO_URL"}},
    "chatbots": {name: {"flows": {"main": {"provider": "demo", "model": model}}} for name, model in MODELS.items()},
}


@dataclass(frozen=True, slots=True)
class House:
    """A `parley dev` that is ready."""

    command: Command
    client: httpx2.AsyncClient
    url: str
    data_dir: Path

    @property
    def block(self) -> list[str]:
        """What it printed for its user."""
        return self.command.out

    @property
    def dsn(self) -> str:
        line = next(line for line in self.block if "DATABASE_URL=" in line)
        return line.partition("DATABASE_URL=")[2].strip("'")

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.command.pid), *psutil.Process(self.command.pid).children(recursive=True)]

    def postmaster(self) -> psutil.Process:
        return psutil.Process(int((self.data_dir / "postgres/data/postmaster.pid").read_text().split("\n")[0]))

    def launcher(self) -> psutil.Process:
        launcher = self.postmaster().parent()
        assert launcher is not None
        assert launcher.ppid() == self.command.pid
        return launcher

    async def fetch(self, sql: str, *values: object) -> list[Any]:
        connection = await asyncpg.connect(self.dsn)
        try:
            return [tuple(row) for row in await connection.fetch(sql, *values)]
        finally:
            await connection.close()


@asynccontextmanager
async def dev(data_dir: Path, *arguments: str, **variables: str) -> AsyncGenerator[House, None]:
    environment = {**QUICK, "PARLEY_DATA_DIR": str(data_dir), **variables}
    async with running("dev", *arguments, **environment) as command:
        url = (await command.says("Parley is ready: ")).rpartition(" ")[2]
        async with client_of(url) as client:
            yield House(command, client, url, data_dir)


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder any account can enter (pytest's own are closed to others), in which nothing may be left running."""
    folder = Path(tempfile.mkdtemp(prefix="parley-dev-"))
    folder.chmod(0o755)
    yield folder
    # Whatever a test killed, the rest follows by itself.
    asyncio.run(all_gone(processes_of(folder)))
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def first_start() -> Iterator[tuple[Path, list[str]]]:
    """The folder that a first start made, and what it printed. Tests that need any folder copy it."""
    folder = Path(tempfile.mkdtemp(prefix="parley-dev-"))
    folder.chmod(0o755)
    file = folder / "chatbots.yaml"
    file.write_text(yaml.safe_dump(CHATBOTS))

    async def start() -> list[str]:
        async with dev(folder / "data", "--apply", str(file)) as house:
            done = await house.command.stop()
            assert done.code == 0
            return done.out

    yield folder / "data", asyncio.run(start())
    shutil.rmtree(folder)


@pytest.fixture
def data_dir(place: Path, first_start: tuple[Path, list[str]]) -> Path:
    subprocess.run(["cp", "-a", first_start[0], place / "data"], check=True)
    return place / "data"


# -- the first start


async def test_a_first_start_prints_one_block_that_ends_in_ready(first_start: tuple[Path, list[str]]) -> None:
    data_dir, said = first_start
    url = said[-1].removeprefix("Parley is ready: ")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+", url)
    block = "\n".join(said)
    for shown in (f"{url}/docs", f"{url}/api/conversation-health", str(data_dir), "DATABASE_URL=", "curl "):
        assert shown in block


async def test_everything_it_prints_works(data_dir: Path) -> None:
    async with dev(data_dir) as house:
        for path in ("/docs", "/api/conversation-health"):
            assert (await house.client.get(path)).status_code == 200
            assert f"{house.url}{path}" in "\n".join(house.block)
        assert await house.fetch("select 1") == [(1,)]
        await house.command.stop()


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
@pytest.mark.parametrize("auth", ["open", "keys"])
async def test_the_printed_curl_works_as_it_stands(data_dir: Path, auth: str) -> None:
    async with dev(data_dir, PARLEY_AUTH=auth) as house:
        start = next(number for number, line in enumerate(house.block) if line.endswith("as it comes:"))
        end = next(number for number, line in enumerate(house.block) if "xargs" in line)
        printed = "\n".join(house.block[start + 1 : end + 1])
        done = await run("-c", printed, command=["/bin/sh"])
        await house.command.stop()
    assert done.code == 0
    assert [line for line in done.err if not line.startswith("Keep it where")] == []
    events = [json.loads(line.removeprefix("data: ")) for line in done.out if line.startswith("data: ")]
    assert_whole(events, "completed")
    assert "This is a demo" in text_of(events)


# -- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_it_with_nothing_left(data_dir: Path, number: int) -> None:
    async with dev(data_dir) as house:
        processes, sockets = house.processes(), (data_dir / "postgres/socket").resolve()
        assert len(processes) > 3, "gateway, launcher, postmaster and its workers"
        done = await house.command.stop(number)
        # At once: what it started has ended before it ends.
        assert not processes_of(data_dir)
    assert done.code == 0
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)
    assert not sockets.exists()
    assert not (data_dir / "postgres/data/postmaster.pid").exists()
    assert not [line for line in done.err if "Traceback" in line or "rror" in line]


async def test_it_does_not_end_before_its_database_has(data_dir: Path) -> None:
    async with dev(data_dir) as house:
        server = house.postmaster()
        server.suspend()
        try:
            house.command.send(signal.SIGTERM)
            ending = asyncio.ensure_future(house.command.ended())
            # Nothing to be seen is what is expected here; otherwise it ends in 0.2 s.
            assert not (await asyncio.wait({ending}, timeout=1))[0]
        finally:
            server.resume()
        assert (await ending).code == 0


async def test_a_signal_while_it_starts(place: Path) -> None:
    async with running("dev", **QUICK, PARLEY_DATA_DIR=str(place / "data")) as command:
        await _until((place / "data/postgres/lock").exists)
        done = await command.stop(signal.SIGTERM)
        assert not processes_of(place)
    assert done.code == 0
    assert not any("Parley is ready" in line for line in done.out)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


async def test_an_answer_under_way_when_it_stops_goes_on_at_the_next_start(data_dir: Path) -> None:
    async with dev(data_dir, PARLEY_DRAIN_S="0.1") as house:
        accepted = await ask(house.client, "slow", session_id="cut")
        async with reading(house.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            done = await house.command.stop()
            seen = await reader.end()
    assert done.code == 0
    async with dev(data_dir) as house:
        await _assert_whole_and_free(house, accepted, seen)
        await house.command.stop()


# -- starting again


async def test_a_second_start_is_quick_and_everything_is_still_there(data_dir: Path) -> None:
    async with dev(data_dir) as house:
        accepted = await ask(house.client, "quick", session_id="kept")
        answer = await poll(house.client, accepted["streaming_url"])
        await house.command.stop()
    began = perf_counter()
    async with dev(data_dir) as house:
        took = perf_counter() - began
        assert await poll(house.client, accepted["streaming_url"]) == answer
        page = (await house.client.get(accepted["streaming_url"], params={"after": len(answer)})).json()
        assert (page["events"], page["has_more"], page["session_status"]) == ([], False, "completed")
        headers = {"Accept": "text/event-stream", "Last-Event-ID": f"{accepted['streaming_session_id']}:{len(answer)}"}
        assert (await house.client.get(accepted["streaming_url"], headers=headers)).status_code == 204
        assert await _messages(house, "kept") == [
            ("user", "Hello", "complete"),
            ("assistant", text_of(answer), "complete"),
        ]
        assert await house.fetch("select id, version from chatbots order by id") == [
            ("demo", 1),
            ("quick", 1),
            ("slow", 1),
        ]
        await house.command.stop()
    assert took < 3 * _slack(), f"{took:.1f} s"


def _slack() -> float:
    """How much slower than promised a machine may be that has other things to do: its load per processor."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


async def _messages(house: House, session: str) -> list[Any]:
    return await house.fetch("select role, content, status from messages where chat_id = $1 order by position", session)


# -- not alone


async def test_two_side_by_side(data_dir: Path, place: Path) -> None:
    subprocess.run(["cp", "-a", data_dir, place / "other"], check=True)
    async with dev(data_dir) as one, dev(place / "other") as other:
        for house in (one, other):
            accepted = await ask(house.client, "quick")
            assert_whole(await poll(house.client, accepted["streaming_url"]), "completed")
        assert (await other.client.get(accepted["streaming_url"])).status_code == 200
        assert (await one.client.get(accepted["streaming_url"])).status_code == 404
        await asyncio.gather(one.command.stop(), other.command.stop())


async def test_the_same_folder_twice_is_refused(data_dir: Path) -> None:
    async with dev(data_dir) as house:
        done = await run("dev", **QUICK, PARLEY_DATA_DIR=str(data_dir))
        assert (done.code, done.out, len(done.err)) == (2, [], 1)
        assert f"{data_dir} is in use by another gateway (process {house.command.pid})" in done.err[0]
        assert (await house.client.get("/readyz")).status_code == 200
        await house.command.stop()


async def test_a_taken_port_is_named_and_nothing_is_left(data_dir: Path) -> None:
    with silent_port() as port:
        port.listen()
        number = port.getsockname()[1]
        done = await run("dev", **{**QUICK, "PARLEY_PORT": str(number)}, PARLEY_DATA_DIR=str(data_dir))
        assert not processes_of(data_dir)
    assert (done.code, done.out, len(done.err)) == (2, [], 1)
    assert f"Cannot listen on 127.0.0.1:{number}" in done.err[0]
    assert "set PARLEY_PORT" in done.err[0]


async def test_a_file_that_cannot_be_applied_is_refused_before_anything_starts(place: Path) -> None:
    (place / "bad.yaml").write_text("chatbots: [")
    done = await run("dev", "--apply", str(place / "bad.yaml"), **QUICK, PARLEY_DATA_DIR=str(place / "data"))
    assert (done.code, done.out) == (2, [])
    assert "not valid YAML" in done.err[1]
    assert not (place / "data").exists()


# -- killed


async def test_a_gateway_killed_in_mid_answer_goes_on_with_it_at_the_next_start(data_dir: Path) -> None:
    accepted, before = await _killed_in_mid_answer(data_dir, lambda house: house.command.send(signal.SIGKILL))
    async with dev(data_dir) as house:
        await _assert_whole_and_free(house, accepted, before)
        await house.command.stop()


async def test_a_postmaster_killed_in_mid_answer_is_reported_and_recovered(data_dir: Path) -> None:
    def kill(house: House) -> None:
        house.postmaster().kill()

    accepted, before = await _killed_in_mid_answer(data_dir, kill, sentence="PostgreSQL ended unexpectedly")
    async with dev(data_dir) as house:
        await _assert_whole_and_free(house, accepted, before)
        await house.command.stop()


async def test_a_killed_launcher_is_reported_and_recovered(data_dir: Path) -> None:
    async with dev(data_dir) as house:
        server = house.postmaster()
        house.launcher().kill()
        done = await house.command.ended()
        await all_gone([server])
    assert done.code == 2
    assert "PostgreSQL ended unexpectedly" in done.err[-1]
    async with dev(data_dir) as house:
        accepted = await ask(house.client, "quick")
        assert_whole(await poll(house.client, accepted["streaming_url"]), "completed")
        await house.command.stop()


async def _killed_in_mid_answer(
    data_dir: Path, kill: Any, *, sentence: str | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was accepted, and the events a reader had seen when it happened."""
    async with dev(data_dir, PARLEY_DRAIN_S="0") as house:
        accepted = await ask(house.client, "slow", session_id="cut")
        async with reading(house.client, accepted["streaming_url"]) as reader:
            await reader.has(10)
            kill(house)
            done = await house.command.ended()
            seen = reader.events
    if sentence:
        assert done.code == 2
        assert sentence in done.err[-1]
    else:
        assert done.code == -signal.SIGKILL
    return accepted, seen


async def _assert_whole_and_free(house: House, accepted: dict[str, Any], before: list[dict[str, Any]]) -> None:
    """The answer was begun again behind what was shown, and told so; its session takes messages again."""
    events = await poll(house.client, accepted["streaming_url"])
    assert_whole(events, "completed")
    assert restarts(events) == ["owner_lost"]
    assert events[: len(before)] == before, "what was shown stays"
    question, answer = await _messages(house, "cut")
    assert question == ("user", "Hello", "complete")
    assert answer == ("assistant", text_of(events), "complete")
    assert await house.fetch(
        "select status, last_event_id from streaming_sessions where id = $1", accepted["streaming_session_id"]
    ) == [("completed", len(events))]
    following = await ask(house.client, "quick", session_id="cut")
    assert_whole(await poll(house.client, following["streaming_url"]), "completed")
    assert [status for _, _, status in await _messages(house, "cut")] == ["complete"] * 4


# -- the script


@pytest.mark.skipif(not (ROOT / ".venv/stamp").exists(), reason="scripts/setup was not run here; scripts/test runs it")
async def test_the_script_is_the_gateway(data_dir: Path) -> None:
    """No shell may stand between: it would swallow the signals."""
    script = [str(ROOT / "scripts/dev")]
    async with running(command=script, **QUICK, PARLEY_DATA_DIR=str(data_dir)) as command:
        await command.says("Parley is ready: ")
        assert (
            psutil.Process(command.pid).children()[0]
            == psutil.Process(int((data_dir / "postgres/data/postmaster.pid").read_text().split("\n")[0])).parent()
        )
        done = await command.stop(signal.SIGTERM)
        assert not processes_of(data_dir)
    assert done.code == 0
