"""Decoding in other processes: a few of them, started when first needed, replaced when one dies or hangs."""

import asyncio
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import orjson
import structlog

from app.chats.allowance import Allowance
from app.chats.picture import Limits, Picture
from app.errors import Invalid, Unavailable

log = structlog.get_logger(__name__)

# How long a process that says nothing more may take to end, in seconds.
_DYING_S = 1
# What is copied at a time on the way to a process.
_CHUNK = 256 << 10
# -I -S: no environment, no start-up files; our own search path goes behind the standard library's.
_START = "import sys; sys.path += sys.argv[2:]; from app.chats.decoder import serve; serve()"
# How a process ends when the picture is at fault: a decoder of Pillow's broke.
_BROKEN = frozenset({-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGBUS, -signal.SIGILL, -signal.SIGFPE})


class Decoders:
    """At most `processes` pictures are decoded at once; each process takes one after the other.

    Those that wait are bounded in bytes by whoever holds the requests' bodies.
    """

    def __init__(self, limits: Limits, *, processes: int) -> None:
        self._limits = limits
        self._turns = Allowance(processes, of="pictures", each=max(1, processes - 1))
        self._idle: list[_Decoder] = []
        self._all: set[_Decoder] = set()

    async def develop(self, text: str, mime: str, *, user_id: str = "") -> Picture:
        """The picture in ASCII `text` (base64 or a data: URL), declared as `mime`, decoded and encoded anew.

        One user leaves a process to the others.

        Raises Invalid for what is no picture or too large a one, Unavailable where no process can take it.
        """
        async with self._turns.take(user=user_id):
            decoder = await self._take()
            try:
                async with asyncio.timeout(self._limits.seconds):
                    return await decoder.develop(text, mime)
            except TimeoutError:
                raise _too_slow() from None
            except (EOFError, OSError):
                raise _died(await decoder.end(patience_s=_DYING_S)) from None
            finally:
                await self._give_back(decoder)

    async def _take(self) -> "_Decoder":
        while self._idle:
            decoder = self._idle.pop()
            if decoder.lives:
                return decoder
            await self._drop(decoder)
        try:
            decoder = await _start(self._limits)
        except OSError as error:
            log.warning("decoder_lost", why=str(error))
            raise _lost() from None
        self._all.add(decoder)
        return decoder

    async def _give_back(self, decoder: "_Decoder") -> None:
        if decoder.ready and decoder.lives:
            self._idle.append(decoder)
        else:
            await self._drop(decoder)

    async def _drop(self, decoder: "_Decoder") -> None:
        self._all.discard(decoder)
        await decoder.end()

    async def aclose(self) -> None:
        """End all processes. A picture that is still in one gets Unavailable, and its process is seen off there."""
        idle, self._idle = self._idle, []
        for decoder in self._all.difference(idle):
            decoder.kill()
        for decoder in idle:
            await self._drop(decoder)


class _Decoder:
    """One process. It is `ready` unless a job has begun whose answer was not read to its end."""

    def __init__(self, process: Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._jobs = process.stdin
        self._answers = process.stdout
        self.ready = True

    @property
    def lives(self) -> bool:
        return self._process.returncode is None

    async def develop(self, text: str, mime: str) -> Picture:
        """Raises Invalid, or OSError or EOFError where the process is gone."""
        self.ready = False
        await self._send(text, mime)
        line = await self._answers.readline()
        if not line:
            raise EOFError
        told = orjson.loads(line)
        data = await self._answers.readexactly(told.pop("length", 0))
        self.ready = True
        if "code" in told:
            raise Invalid(told["code"], told["detail"])
        return Picture(**told, data=data)

    async def _send(self, text: str, mime: str) -> None:
        self._jobs.write(orjson.dumps({"length": len(text), "mime": mime}) + b"\n")
        for start in range(0, len(text), _CHUNK):
            self._jobs.write(text[start : start + _CHUNK].encode("ascii"))
            await self._jobs.drain()

    def kill(self) -> None:
        """It has nothing to lose."""
        with suppress(ProcessLookupError):
            self._process.kill()

    async def end(self, *, patience_s: float = 0) -> int:
        """Give the process so long to end by itself, kill it otherwise, and return how it ended."""
        with suppress(TimeoutError):
            # To kill one that has died already would lose its exit code: asyncio collects it behind its own back.
            async with asyncio.timeout(patience_s):
                await self._process.wait()
        self.kill()
        # Reads what is left, so that the pipes are closed as well.
        await self._process.communicate()
        return await self._process.wait()


async def _start(limits: Limits) -> _Decoder:
    paths = [str(Path(__file__).parents[2]), *filter(None, sys.path)]
    # A session of its own: Ctrl-C at a terminal must reach the gateway only. No environment: it holds secrets.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-I", "-S", "-c", _START, orjson.dumps(asdict(limits)).decode(), *paths),
        stdin=PIPE, stdout=PIPE, stderr=DEVNULL, start_new_session=True, cwd="/", env={},
    )  # fmt: skip
    return _Decoder(process)


def _too_slow() -> Invalid:
    return Invalid("image_too_large", "The picture takes too long to decode; send a smaller one.")


def _died(code: int) -> Invalid | Unavailable:
    if code == -signal.SIGALRM:
        return _too_slow()
    log.warning("decoder_lost", why=f"it ended with {code}")
    return Invalid("image_invalid", "The picture breaks its decoder.") if code in _BROKEN else _lost()


def _lost() -> Unavailable:
    return Unavailable("decoder_lost", "The process that decodes pictures was lost; try again.", retry_after=1)
