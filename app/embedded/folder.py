"""The data folder of an embedded PostgreSQL: made, owned by the right account, and held by one gateway at a time.

`lock` says who holds it, `postgres/` belongs to PostgreSQL's account, `postgres.log` is its log.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.embedded.account import Account, account_for
from app.errors import Misconfigured

_LOG_LIMIT = 8 * 1024 * 1024
_ELSEWHERE = "Set PARLEY_DATA_DIR to another folder"


@dataclass(frozen=True, slots=True)
class Folder:
    """A data folder that this process holds."""

    path: Path
    account: Account
    log_fd: int

    @property
    def cluster(self) -> Path:
        return self.path / "postgres"

    @property
    def log(self) -> Path:
        return self.path / "postgres.log"

    def made_by(self) -> int | None:
        """The major version of PostgreSQL that made the data, None when none is to be read."""
        try:
            return int((self.cluster / "data" / "PG_VERSION").read_text())
        except (OSError, ValueError):
            return None


@contextmanager
def held_folder(path: Path) -> Iterator[Folder]:
    """Make the folder if need be and hold its lock. Raises Misconfigured when it is taken or cannot be written."""
    path = path.absolute()
    try:
        _make(path)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        _hold(lock, path)
        folder = _prepare(path)
        try:
            yield folder
        finally:
            os.close(folder.log_fd)
    finally:
        os.close(lock)


def _make(path: Path) -> None:
    """Make the missing folders, and give modes to these only: as root another account has to pass through them."""
    missing = [parent for parent in (path, *path.parents) if not parent.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755 if os.geteuid() == 0 or folder != path else 0o700)


def _hold(lock: int, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise Misconfigured(
            "embedded_busy",
            f"The data folder {path} is in use by another gateway (process {holder}). Stop that one, or set "
            "PARLEY_DATA_DIR to another folder.",
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)


def _prepare(path: Path) -> Folder:
    cluster = path / "postgres"
    account = account_for(cluster)
    try:
        cluster.mkdir(mode=0o700, exist_ok=True)
        if not account.is_ours:
            os.chown(cluster, account.uid, account.gid)
        return Folder(path, account, _open_log(path / "postgres.log"))
    except OSError as error:
        raise _unusable(path, error) from None


def _open_log(log: Path) -> int:
    if log.exists() and log.stat().st_size > _LOG_LIMIT:
        log.replace(log.with_suffix(".log.1"))
    # Read as well: the launcher finds there why a server did not start.
    return os.open(log, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)


def _unusable(path: Path, error: OSError) -> Misconfigured:
    return Misconfigured(
        "embedded_unreachable",
        f"The data folder {path} cannot be used ({error.strerror}: {error.filename or path}). {_ELSEWHERE}.",
    )
