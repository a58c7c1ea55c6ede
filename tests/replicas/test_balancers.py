"""The configurations of docs/examples for load balancers, as they stand there, in front of two real replicas."""

import asyncio
import os
import shutil
import signal
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from app.demo import demo_provider
from tests.command import ROOT, running
from tests.reader import Event, assert_whole, reading
from tests.replicas.test_kill import Replica, replicas
from tests.serving import apply_demo, client_of, until_ready

EXAMPLES = ROOT / "docs/examples"
BALANCERS = {
    "haproxy": ("haproxy.cfg", ("-db", "-f")),
    "nginx": (
        "nginx.conf",
        ("-e", "stderr", "-g", "daemon off; master_process off; pid nginx.pid;", "-p", "{folder}", "-c"),
    ),
}


@pytest.fixture
async def demo(database: str) -> AsyncGenerator[None, None]:
    async with demo_provider() as url:
        await apply_demo(database, url, {"short": "demo?delay_ms=20&tokens=60"})
        yield


def _found(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        assert not os.environ.get("PARLEY_REQUIRE_SERVERS"), f"{name} is not installed"
        pytest.skip(f"{name} is not installed")
    return path


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


@asynccontextmanager
async def balanced(name: str, both: list[Replica], folder: Path) -> AsyncGenerator[httpx2.AsyncClient, None]:
    """A client of the balancer in front of these two, configured as the example has it but for the ports."""
    example, arguments = BALANCERS[name]
    text, port = (EXAMPLES / example).read_text(), _free_port()
    ours = {8080: port, 8081: both[0].client.base_url.port, 8082: both[1].client.base_url.port}
    for theirs, real in ours.items():
        assert f"127.0.0.1:{theirs}" in text
        text = text.replace(f"127.0.0.1:{theirs}", f"127.0.0.1:{real}")
    (folder / example).write_text(text)
    command = (_found(name), *(argument.format(folder=folder) for argument in arguments), str(folder / example))
    async with running(command=command), client_of(f"http://127.0.0.1:{port}") as client:
        await _listening(client)
        await until_ready(client)
        yield client


async def _listening(client: httpx2.AsyncClient) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                await client.get("/livez")
                return
            except httpx2.TransportError:
                await asyncio.sleep(0.02)


async def _asked(client: httpx2.AsyncClient, refusals: list[int]) -> str:
    """Send a message as a good client does: what was refused before anything was written is sent again."""
    body = {"user_id": "ann", "chatbot_id": "short", "message_text": "Hello"}
    async with asyncio.timeout(20):
        while (answer := await client.post("/api/process-message", json=body)).status_code == 503:
            refusals.append(answer.status_code)
            await asyncio.sleep(0.1)
    assert answer.status_code == 200, answer.text
    url: str = answer.json()["streaming_url"]
    return url


async def _read(client: httpx2.AsyncClient, url: str) -> list[Event]:
    """As EventSource does: after every close go on behind the last event."""
    events: list[Event] = []
    async with asyncio.timeout(30):
        while not events or events[-1]["event"] != "stream_end":
            try:
                async with reading(client, url, after=len(events)) as reader:
                    await reader.has_or_ended(1 << 20)
            except httpx2.TransportError:
                pass
            events += reader.events
    return events


@pytest.mark.parametrize("name", BALANCERS)
async def test_answers_stream_through_a_balancer_while_its_replicas_are_drained(
    name: str, database: str, demo: None, tmp_path: Path
) -> None:
    _found(name)
    refusals: list[int] = []
    # Takeovers with as much patience as by default: nobody dies here.
    async with replicas(database, 2, PARLEY_LEASE_S="6") as both, balanced(name, both, tmp_path) as client:
        async with reading(client, await _asked(client, refusals)) as reader:
            await reader.has(5)
            assert all(event["event"] != "stream_end" for event in reader.events), "it comes while it is written"
        async with asyncio.TaskGroup() as tasks:
            asking = []
            for number in range(40):
                asking.append(tasks.create_task(_asked(client, refusals)))
                if number == 10:
                    both[0].command.send(signal.SIGTERM)
                await asyncio.sleep(0.05)
        urls = [asked.result() for asked in asking]
        answers = await asyncio.gather(*(_read(client, url) for url in urls))
        for answer in answers:
            print(answer[-2:])
            assert_whole(answer, "completed")
        assert (await both[0].command.ended()).code == 0
    if name == "haproxy":
        assert refusals == []
