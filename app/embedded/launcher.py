"""The launcher: owns one PostgreSQL and stops it when the gateway that started it is gone.

Run by path with `python -I -S`, so it imports the standard library only and is ready in 30 ms. It has a single thread,
because PR_SET_PDEATHSIG fires when the creating *thread* exits. One JSON line on stdout says how the start went.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any, NoReturn

_PORT_FILE = ".s.PGSQL.5432"
_LONGEST_SOCKET_FOLDER = 88  # sun_path holds 104 bytes on macOS, 108 on Linux; the file name takes 15
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789/._+-")
_STOPPING = ((signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 5.0))
_PATIENCE_S = 60.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class Refused(Exception):
    """The start cannot go on; the sentence is for the operator."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class Abandoned(Exception):
    """The gateway went away before PostgreSQL was ready."""


class Watch:
    """What ends the launcher: the pipe from the gateway closes, another parent than the gateway, or a signal."""

    def __init__(self) -> None:
        self.over = False
        self._parent = os.getppid()
        self._wake, wake = os.pipe()
        os.set_blocking(self._wake, False)
        os.set_blocking(wake, False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._asked)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)

    def _asked(self, *_: object) -> None:
        self.over = True

    def pause(self, seconds: float) -> None:
        """Return after `seconds`, or at once when something happened."""
        watched = [self._wake] if self.over else [self._wake, 0]
        ready, _, _ = select.select(watched, [], [], seconds)
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 512)
        # The parent is looked at too: a process forked by the gateway may hold our pipe open after its death.
        if (0 in ready and not os.read(0, 512)) or os.getppid() != self._parent:
            self.over = True


class Cluster:
    """The part of the data folder that PostgreSQL's account owns: `data`, `socket` and `lock` below `root`."""

    def __init__(self, plan: dict[str, Any], watch: Watch) -> None:
        self.root: str = plan["root"]
        self.data = self.root + "/data"
        self._bin: str = plan["bin"]
        self._settings: dict[str, str] = plan["settings"]
        self._temporary: list[str] = plan["temporary"]
        self._watch = watch
        self._lock = -1

    def check_reach(self, account: str | None) -> None:
        """Raise when the account cannot reach or write the folder. Modes of parents are the operator's."""
        who = f"PostgreSQL may not run as root, so it runs as {account!r}, which" if account else "This user"
        for parent in _parents(self.root):
            if not os.access(parent, os.X_OK):
                raise Refused("embedded_unreachable", f"{who} may not enter {parent}. {_ELSEWHERE}")
        if not os.access(self.root, os.W_OK):
            raise Refused("embedded_unreachable", f"{who} may not write in {self.root}. {_ELSEWHERE}")

    def lock(self) -> None:
        """Wait until an earlier launcher has stopped its server; it holds the lock until then."""
        self._lock = os.open(self.root + "/lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        until = time.monotonic() + _PATIENCE_S
        while not _locked(self._lock):
            if time.monotonic() > until:
                raise Refused("embedded_busy", f"An earlier PostgreSQL in {self.root} does not stop.")
            self._pause(0.02)

    def recover(self) -> int:
        """Stop a server that outlived its launcher. Returns the pid in a stale lock file, if a stranger has it now."""
        pid = self._lock_file_pid()
        if pid and _is_postmaster(pid, self.data):
            self._stop_orphan(pid)
            return 0
        self._clear_sockets()
        return pid if pid and _alive(pid) else 0

    def _lock_file_pid(self) -> int:
        try:
            with open(self.data + "/postmaster.pid", encoding="utf-8") as file:
                return abs(int(file.readline()))
        except FileNotFoundError:
            return 0
        except ValueError:
            # Empty after a power cut or on a full disk. PostgreSQL refuses to start with it; we hold the launcher's
            # lock, and a server that still runs would answer on its socket.
            self._refuse_if_answering()
            os.unlink(self.data + "/postmaster.pid")
            return 0

    def _stop_orphan(self, pid: int) -> None:
        for number, grace in _STOPPING[:2]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            until = time.monotonic() + grace
            while _is_postmaster(pid, self.data) and time.monotonic() < until:
                self._pause(0.02)
            if not _is_postmaster(pid, self.data):
                self._clear_sockets()
                return
        raise Refused(
            "embedded_busy", f"PostgreSQL (pid {pid}) still runs in {self.data} and does not stop; end it first."
        )

    def initialise(self) -> None:
        """Make the cluster and its database beside, then rename: `data` is never half made."""
        self._clear_half_made()
        if os.path.exists(self.data + "/PG_VERSION"):
            return
        if os.path.exists(self.data) and os.listdir(self.data):
            raise Refused("embedded_folder", f"{self.data} holds something that is not PostgreSQL's. {_ELSEWHERE}")
        # A name of its own: an initdb that outlived a killed launcher must not meet this one.
        fresh = f"{self.root}/data.new-{os.getpid()}"
        self._initdb(fresh)
        os.rename(fresh, self.data)
        _fsync_folder(self.root)

    def _clear_half_made(self) -> None:
        for name in os.listdir(self.root):
            if name.startswith("data.new"):
                # Its initdb may still be dying and add a file; then the next start removes the rest.
                with contextlib.suppress(OSError):
                    _remove_tree(os.path.join(self.root, name))

    def _initdb(self, folder: str) -> None:
        # The built-in provider is the same on every platform; macOS has no C.UTF-8 of its own.
        locale = ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        unsynced = ["--no-sync"] if self._settings.get("fsync") == "off" else []
        self._run("initdb", "-D", folder, "-U", "parley", "-A", "trust", "--encoding=UTF8", *locale, *unsynced)
        self._run("postgres", "--single", "-j", "-D", folder, "postgres", said="CREATE DATABASE parley;\n")

    def _run(self, program: str, *args: str, said: str = "") -> None:
        done = subprocess.Popen(  # noqa: S603
            [f"{self._bin}/{program}", *args],
            stdin=subprocess.PIPE,
            stdout=2,
            env=_environment(),
            preexec_fn=_die_with_us,
        )
        done.communicate(said.encode())
        if done.returncode != 0:
            raise Refused("embedded_failed", f"{program} failed with exit code {done.returncode}.")

    def make_socket_folder(self) -> str:
        """A private folder with a short, plain path: below the data folder, or else a temporary one linked there."""
        link = self.root + "/socket"
        if _fits(link):
            os.mkdir(link, 0o700)
            return link
        for place in self._temporary:
            folder = f"{place}/parley-{os.urandom(6).hex()}"
            if _fits(folder):
                with contextlib.suppress(OSError):
                    os.mkdir(folder, 0o700)
                    os.symlink(folder, link)
                    return folder
        raise Refused("embedded_unreachable", f"No short writable folder for a socket in {', '.join(self._temporary)}.")

    def remove_sockets(self) -> None:
        link = self.root + "/socket"
        folder = os.path.realpath(link)
        for name in (_PORT_FILE, _PORT_FILE + ".lock"):
            with contextlib.suppress(OSError):
                os.unlink(f"{folder}/{name}")
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        with contextlib.suppress(OSError):
            os.unlink(link)

    def _clear_sockets(self) -> None:
        self._refuse_if_answering()
        self.remove_sockets()

    def _refuse_if_answering(self) -> None:
        path = os.path.realpath(self.root + "/socket") + "/" + _PORT_FILE
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(path)
            raise Refused("embedded_busy", f"A PostgreSQL that is not ours answers at {path}; end it first.")

    def start(self, sockets: str, stranger: int) -> "subprocess.Popen[bytes]":
        """The running server, ready for connections. Crash recovery may take long and is not cut short."""
        until = time.monotonic() + _PATIENCE_S
        while True:
            mark = os.fstat(2).st_size
            server = self._spawn(sockets, stranger)
            if self._ready(server):
                return server
            said = os.pread(2, 65536, mark).decode(errors="replace")
            # Backends need a moment to notice that their postmaster was killed.
            if "pre-existing shared memory block" not in said or time.monotonic() > until:
                raise Refused("embedded_failed", f"PostgreSQL did not start: {_reason(said)}")
            self._pause(0.1)

    def _spawn(self, sockets: str, stranger: int) -> "subprocess.Popen[bytes]":
        settings = {**self._settings, "unix_socket_directories": sockets}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        environment = _environment()
        if stranger:
            # A pid PostgreSQL disregards in a lock file, so it takes that file over and still checks for old backends'
            # shared memory. Deleting the file would skip that check.
            environment["PG_GRANDPARENT_PID"] = str(stranger)
        return subprocess.Popen(  # noqa: S603
            [f"{self._bin}/postgres", "-D", self.data, *options],
            stdin=subprocess.DEVNULL, stdout=2, env=environment, preexec_fn=_die_with_us,
        )  # fmt: skip

    def _ready(self, server: "subprocess.Popen[bytes]") -> bool:
        while server.poll() is None:
            with contextlib.suppress(OSError), open(self.data + "/postmaster.pid", encoding="utf-8") as file:
                lines = file.read().split("\n")
                if lines[0] == str(server.pid) and len(lines) > 7 and lines[7].strip() == "ready":
                    return True
            self._watch.pause(0.005)
            if self._watch.over:
                self.stop(server)
                raise Abandoned
        return False

    def stop(self, server: "subprocess.Popen[bytes]") -> None:
        """Fast shutdown, then harder; returns when the server is gone."""
        for number, grace in _STOPPING:
            server.send_signal(number)
            until = time.monotonic() + grace
            while server.poll() is None and time.monotonic() < until:
                self._watch.pause(max(0.0, until - time.monotonic()))
            if server.poll() is not None:
                return

    def _pause(self, seconds: float) -> None:
        self._watch.pause(seconds)
        if self._watch.over:
            raise Abandoned


_ELSEWHERE = "Set PARLEY_DATA_DIR to another folder, or DATABASE_URL to a PostgreSQL of your own."


def _drop_privileges(uid: int, gid: int) -> None:
    try:
        os.setgroups([])
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise Refused(
            "embedded_account",
            f"PostgreSQL may not run as root, and switching to uid {uid} failed ({error.strerror}). "
            "Start as a normal user, or set DATABASE_URL to a PostgreSQL of your own.",
        ) from None


def _die_with_us() -> None:
    """In the child: a fast shutdown when the launcher is killed. Linux only; elsewhere the next start recovers."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)


def _environment() -> dict[str, str]:
    # Nothing of the caller's: PGDATA, PGPORT, LC_ALL and others would change what the programs do.
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) or "/" for n in range(1, len(parts) + 1)]


def _fits(folder: str) -> bool:
    return len(os.fsencode(folder)) <= _LONGEST_SOCKET_FOLDER and _PLAIN.issuperset(folder)


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return error.errno == errno.EPERM
    return True


def _is_postmaster(pid: int, data: str) -> bool:
    """Whether this living process is the server of this data folder, and not a stranger that was given its pid."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
            return file.read().strip() == "postgres" and os.path.samefile(f"/proc/{pid}/cwd", data)
    except OSError:
        if os.path.exists("/proc/self"):
            return False
    command = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    shown = subprocess.run(command, capture_output=True, check=False)  # noqa: S603
    return f"/postgres -D {data} " in shown.stdout.decode(errors="replace")


def _reason(said: str) -> str:
    fatal = [line for line in said.splitlines() if "FATAL" in line or "ERROR" in line or "PANIC" in line]
    return (fatal or said.splitlines() or ["it said nothing"])[-1]


def _remove_tree(folder: str) -> None:
    for parent, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(parent, name))
        for name in folders:
            os.rmdir(os.path.join(parent, name))
    os.rmdir(folder)


def _fsync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _report(**said: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(1, json.dumps(said).encode() + b"\n")


def _serve(plan: dict[str, Any], watch: Watch) -> int:
    """0 when asked to stop, 1 when the server died by itself."""
    if plan["uid"] is not None:
        _drop_privileges(plan["uid"], plan["gid"])
    cluster = Cluster(plan, watch)
    cluster.check_reach(plan["account"])
    cluster.lock()
    stranger = cluster.recover()
    cluster.initialise()
    sockets = cluster.make_socket_folder()
    try:
        server = cluster.start(sockets, stranger)
        _report(socket=sockets)
        while server.poll() is None and not watch.over:
            watch.pause(1.0)
        cluster.stop(server)
    finally:
        cluster.remove_sockets()
    return 0 if watch.over else 1


def main() -> NoReturn:
    watch = Watch()
    try:
        code = _serve(json.loads(sys.argv[1]), watch)
    except Abandoned:
        code = 0
    except Refused as refused:
        _report(code=refused.code, detail=str(refused))
        code = 1
    except OSError as error:
        _report(code="embedded_failed", detail=f"PostgreSQL did not start: {error}.")
        code = 1
    sys.exit(code)


if __name__ == "__main__":
    main()
