"""A real PostgreSQL from a wheel, supervised as our child: for one machine, for trying out and for tests.

A launcher process (launcher.py) owns the server and stops it when its pipe from us closes, whatever ends us.
"""

import asyncio
import json
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from app.embedded.binaries import find_binaries, reachable
from app.embedded.folder import Folder, held_folder
from app.errors import Misconfigured

_LAUNCHER = Path(__file__).with_name("launcher.py")
_SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "shared_buffers": "128MB",
    "max_connections": "100",
    "max_logical_replication_workers": "0",
    "lc_messages": "C",
    "logging_collector": "off",
    "log_checkpoints": "off",
    # People's messages are in statements and in DETAIL lines; they do not belong in a log.
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
}
_NO_SETTINGS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class EmbeddedPostgres:
    """A running server. `dsn` names the database `parley` and is ready for asyncpg."""

    dsn: str
    data_dir: Path
    _launcher: Process = field(repr=False)

    async def wait(self) -> None:
        """Return when the server, or the launcher that watches it, has died. The next start recovers."""
        await self._launcher.wait()


@asynccontextmanager
async def embedded_postgres(
    data_dir: Path, *, settings: Mapping[str, str] = _NO_SETTINGS
) -> AsyncIterator[EmbeddedPostgres]:
    """PostgreSQL on a Unix socket, with its data in `data_dir`, stopped on the way out.

    `settings` are further options of the server. Raises Misconfigured with what to do when it cannot start.
    """
    with held_folder(data_dir) as folder:
        plan = await asyncio.to_thread(_plan, folder, settings)
        launcher = await _launch(plan, folder)
        try:
            dsn = _dsn(await _report(launcher, folder))
            yield EmbeddedPostgres(dsn, folder.path, launcher)
        finally:
            await _stop(launcher)


def _plan(folder: Folder, settings: Mapping[str, str]) -> dict[str, Any]:
    """What launcher.py is told."""
    account = folder.account
    binaries = reachable(find_binaries(folder.made_by()), account, data_dir=folder.path)
    return {
        "root": str(folder.cluster),
        "bin": str(binaries.bin),
        "settings": {**_SETTINGS, **settings},
        "temporary": list(dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp"))),  # noqa: S108
        "uid": None if account.is_ours else account.uid,
        "gid": None if account.is_ours else account.gid,
        "account": None if account.is_ours else account.name,
    }


async def _launch(plan: dict[str, Any], folder: Folder) -> Process:
    # A session of its own: Ctrl-C at a terminal must reach the gateway only, which still needs the database.
    return await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(_LAUNCHER), json.dumps(plan),
        stdin=PIPE, stdout=PIPE, stderr=folder.log_fd, start_new_session=True, cwd="/",
    )  # fmt: skip


async def _report(launcher: Process, folder: Folder) -> str:
    """The folder of the socket, once the server is ready."""
    assert launcher.stdout is not None
    line = await launcher.stdout.readline()
    if not line:
        raise Misconfigured("embedded_failed", f"PostgreSQL's launcher died; see {folder.log}.")
    said: dict[str, str] = json.loads(line)
    if "detail" in said:
        raise Misconfigured(said["code"], f"{said['detail']} The log is {folder.log}.")
    return said["socket"]


def _dsn(socket_folder: str) -> str:
    # The port is named because asyncpg would else take PGPORT from the environment.
    return f"postgresql://parley@/parley?host={socket_folder}&port=5432"


async def _stop(launcher: Process) -> None:
    """Close the pipe, which is what a death of ours would do, and wait until the server is down."""
    assert launcher.stdin is not None
    launcher.stdin.close()
    await asyncio.shield(launcher.wait())
