"""A real `parley serve` and its decoders: what hostile pictures cost the gateway, and that nothing outlives it."""

import asyncio
import re
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from tests.chats.pictures import base64_of, bomb, noise, picture, png, slow_jpeg
from tests.command import Command, all_gone, running
from tests.serving import client_of, until_ready

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Served:
    command: Command
    client: httpx2.AsyncClient

    async def upload(self, text: str, **more: Any) -> httpx2.Response:
        body = {"chatbot_id": "demo", "image_data": {"data": text}, **more}
        return await self.client.post("/api/upload-image", json=body, timeout=60)

    def decoders(self) -> list[psutil.Process]:
        return psutil.Process(self.command.pid).children()

    def peak(self) -> int:
        """The most memory the gateway ever held, in bytes."""
        status = Path(f"/proc/{self.command.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024

    def rss(self) -> int:
        return psutil.Process(self.command.pid).memory_info().rss


@asynccontextmanager
async def served(database: str, **variables: str) -> AsyncGenerator[Served, None]:
    environment = {"PARLEY_PORT": "0", "PARLEY_LOG_FORMAT": "text", "DATABASE_URL": database, **variables}
    async with running("serve", **environment) as command:
        url = (await command.says("listening")).rpartition("url=")[2]
        async with client_of(url) as client:
            await until_ready(client)
            yield Served(command, client)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
async def test_no_picture_costs_the_gateway_100_megabytes(database: str) -> None:
    """I6, with the dearest bodies there are, as many at once as come."""
    unpaired = '{"chatbot_id": "\\ud800", "image_data": {"data": "%s"}}' % ("A" * (10 * MIB - 100))
    lists = b'{"image_data": [' + b"[]," * (3 * MIB) + b"[]]}"
    async with served(database) as gateway:
        assert (await gateway.upload(base64_of(picture()))).status_code == 200
        before = gateway.rss()
        largest = base64_of(noise("JPEG", (4000, 2700)))
        assert 7 * MIB < len(largest) < 10 * MIB
        bombs = [bomb(8000, 5000), png(2**31 - 1, 2**31 - 1, b""), noise("PNG", (1400, 1200))]
        texts = [largest, *map(base64_of, bombs), "A" * (10 * MIB - 1000), "[" * (10 * MIB - 1000)]
        async with asyncio.TaskGroup() as tasks:
            uploads = [tasks.create_task(gateway.upload(text)) for text in texts * 2]
            uploads += [tasks.create_task(_post(gateway.client, unpaired.encode())) for _ in range(4)]
            uploads += [tasks.create_task(_post(gateway.client, lists)) for _ in range(4)]
        codes = {upload.result().status_code for upload in uploads}
        assert codes <= {200, 400, 422, 503}
        # On a busy machine some have no turn in time.
        assert {200, 400, 422} <= codes or {200, 503} <= codes
        grown = (gateway.peak() - before) / MIB
        assert grown < 100, f"{grown:.0f} MiB"
        assert (await gateway.upload(base64_of(picture()))).status_code == 200


async def _post(client: httpx2.AsyncClient, content: bytes) -> httpx2.Response:
    return await client.post("/api/upload-image", content=content, timeout=60)


async def _busy(gateway: Served) -> "tuple[asyncio.Task[httpx2.Response], list[psutil.Process]]":
    """An upload that takes long, under way, and the decoders: one has it, another one sleeps."""
    job = asyncio.create_task(gateway.upload(base64_of(slow_jpeg(20_000))))
    async with asyncio.timeout(30):
        while not any(map(_works, gateway.decoders())):
            await asyncio.sleep(0.01)
    assert (await gateway.upload(base64_of(picture()))).status_code == 200
    decoders = gateway.decoders()
    assert len(decoders) == 2
    return job, decoders


def _works(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.cpu_times().user > 1
    return False


async def test_a_killed_gateway_leaves_no_decoder(database: str) -> None:
    async with served(database, PARLEY_IMAGE_TIMEOUT_S="600") as gateway:
        job, decoders = await _busy(gateway)
        gateway.command.send(signal.SIGKILL)
        await all_gone(decoders)
        with pytest.raises(httpx2.TransportError):
            await job


async def test_a_gateway_that_is_told_to_go_leaves_no_decoder(database: str) -> None:
    async with served(database, PARLEY_IMAGE_TIMEOUT_S="6") as gateway:
        job, decoders = await _busy(gateway)
        done = await gateway.command.stop()
        assert done.code == 0
        await all_gone(decoders)
        assert (await job).json()["code"] == "image_too_large", "an upload under way gets its answer"


async def test_a_decoder_that_dies_is_told_to_the_operator(database: str) -> None:
    async with served(database, PARLEY_IMAGE_TIMEOUT_S="600") as gateway:
        job, _ = await _busy(gateway)
        for decoder in gateway.decoders():
            decoder.kill()
        response = await job
        assert (response.status_code, response.json()["code"]) == (503, "decoder_lost")
        assert response.headers["retry-after"] == "1"
        await gateway.command.says("decoder_lost")
        async with asyncio.timeout(10):
            while (await gateway.upload(base64_of(picture()))).status_code != 200:
                pass
        assert len(gateway.decoders()) == 1


async def test_neither_serving_nor_commands_load_what_only_some_need() -> None:
    modules = "sys, app.main, app.doctor, app.dev, app.__main__"
    script = f"import {modules}; sys.exit(bool({{'PIL', 'jwt', 'httpx2'}} & sys.modules.keys()))"
    async with running("-c", script, command=(sys.executable,)) as process:
        assert (await process.ended()).code == 0
