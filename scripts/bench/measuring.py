"""One scenario against one subject: fresh processes, a warm-up, the load, and what it cost while it was steady."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic_ns
from urllib.parse import urlsplit

import orjson

from scripts.bench import processes
from scripts.bench.answer import Answer, Subject
from scripts.bench.load import Job
from scripts.bench.scenarios import WARM_UP, Scenario, chatbots, thinking

_PASSTHROUGHS: dict[Subject, str] = {"passthrough": "/chat", "relay": "/relay"}
# From starting the load process to its first request.
_LEAD_S = 0.6
_SETTLE_S = 0.3


@dataclass(slots=True)
class Measurement:
    """Figures by name (milliseconds, microseconds of CPU per token, KiB, tokens per second), and what went wrong."""

    figures: dict[str, float] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class _Target:
    """Where the load goes; `pid` is the Python process whose cost counts, none for the provider alone.

    `reader` is another one where answers are read, at `reading_port`.
    """

    subject: Subject
    port: int
    path: str
    pid: int | None = None
    reader: int | None = None
    reading_port: int | None = None


@dataclass(frozen=True, slots=True)
class _Weights:
    at: int
    python_s: float
    postgres_s: float
    reader_s: float


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements share: the provider, the database, and a folder for logs."""

    provider: str
    dsn: str
    postgres: int
    folder: Path

    async def measure(self, scenario: Scenario, subject: Subject) -> Measurement:
        async with self._serving(subject) as target:
            await self._load(target, WARM_UP)
            await asyncio.sleep(_SETTLE_S)
            empty = processes.memory_bytes(target.pid) if target.pid else 0
            start = _start()
            async with asyncio.TaskGroup() as tasks:
                load = tasks.create_task(self._load(target, scenario, start))
                before, after, full = await self._weigh(target, scenario, start, load)
            answers = load.result()
        measurement = Measurement(errors=_errors(answers))
        measurement.figures |= _latencies(answers, scenario) | _speed(answers)
        if target.pid:
            measurement.figures |= _costs(answers, before, after)
            measurement.figures["memory"] = (full - empty) / 1024 / scenario.streams
        return measurement

    async def accept(self, posts: int) -> Measurement:
        """CPU from a request to "accepted": of messages whose answers begin, less what calling the provider costs."""
        async with self._serving("parley") as target:
            await self._load(target, WARM_UP)
            await asyncio.sleep(_SETTLE_S)
            before = self._weights(target)
            answers = await self._post(target, posts)
            after = self._weights(target)
            await _idle(target.port)
        python = (after.python_s - before.python_s) / posts * 1e3
        postgres = (after.postgres_s - before.postgres_s) / posts * 1e3
        said = await processes.output("-m", "scripts.bench.calls", self.provider, thinking(posts), str(posts))
        call = float(said) / posts * 1e3
        figures = {"python": python, "postgres": postgres, "call": call, "cpu": python + postgres - call}
        return Measurement(figures, _errors(answers))

    @asynccontextmanager
    async def _serving(self, subject: Subject) -> AsyncIterator[_Target]:
        """A fresh process, so that no measurement finds what an earlier one left in memory."""
        port, log = processes.free_port(), self.folder / f"{subject}.log"
        if subject == "provider":
            yield _Target(subject, urlsplit(self.provider).port or 80, "/v1/chat/completions")
        elif subject == "parley":
            async with self._gateway(subject) as (port, pid):
                yield _Target(subject, port, "/api/process-message", pid)
        elif subject == "elsewhere":
            async with self._gateway("parley") as (port, pid), self._gateway(subject) as (reading_port, reader):
                yield _Target(subject, port, "/api/process-message", pid, reader, reading_port)
        else:
            arguments = ("scripts.bench.passthrough", str(port), self.provider)
            async with processes.running(*arguments, log=log) as process:
                await processes.first_line(process)
                yield _Target(subject, port, _PASSTHROUGHS[subject], process.pid)

    @asynccontextmanager
    async def _gateway(self, name: str) -> AsyncIterator[tuple[int, int]]:
        """The port and the pid of a gateway that is ready."""
        port = processes.free_port()
        environment = {"DATABASE_URL": self.dsn, "PARLEY_PORT": str(port), "PARLEY_AUTH": "open"}
        log = self.folder / f"{name}.log"
        async with processes.running("app", "serve", log=log, environment=environment) as process:
            await processes.answered(f"http://127.0.0.1:{port}/readyz", process)
            yield port, process.pid

    async def _load(self, target: _Target, scenario: Scenario, start: int | None = None) -> list[Answer]:
        job = Job(
            target.subject,
            target.port,
            target.path,
            _body(target.subject, scenario),
            scenario.tokens,
            lanes=scenario.streams,
            start=start or monotonic_ns(),
            ramp_s=scenario.ramp_s,
            rounds=scenario.rounds,
            timeout_s=60 + 2 * scenario.seconds,
            reading_port=target.reading_port,
        )
        return await _played(job)

    async def _post(self, target: _Target, posts: int) -> list[Answer]:
        body = {"chatbot_id": "thinking", "message_text": "Take your time."}
        start = monotonic_ns()
        job = Job("parley", target.port, target.path, body, 0, lanes=1, start=start, rounds=posts, reading=False)
        return await _played(job)

    async def _weigh(
        self, target: _Target, scenario: Scenario, start: int, load: asyncio.Task[list[Answer]]
    ) -> tuple[_Weights, _Weights, int]:
        """The weights around the time in which all streams are open, and the memory at its end."""
        if not scenario.delay_ms:
            before = self._weights(target)
            await asyncio.wait([load])
            return before, self._weights(target), 0
        await _until(start + (scenario.ramp_s + scenario.first_s + _SETTLE_S) * 1e9)
        before = self._weights(target)
        await _until(start + (scenario.seconds - scenario.delay_ms / 1000) * 1e9)
        after = self._weights(target)
        return before, after, processes.memory_bytes(target.pid) if target.pid else 0

    def _weights(self, target: _Target) -> _Weights:
        python_s = processes.cpu_s(target.pid) if target.pid else 0
        reader_s = processes.cpu_s(target.reader) if target.reader else 0
        return _Weights(monotonic_ns(), python_s, processes.cpu_s(self.postgres), reader_s)


def _start() -> int:
    return monotonic_ns() + int(_LEAD_S * 1e9)


async def _until(moment: float) -> None:
    await asyncio.sleep(max(moment - monotonic_ns(), 0) / 1e9)


def _body(subject: Subject, scenario: Scenario) -> dict[str, object]:
    if subject in ("parley", "elsewhere"):
        return {"chatbot_id": scenario.name, "message_text": "Hello."}
    return {"model": scenario.model, "stream": True, "messages": [{"role": "user", "content": "Hello."}]}


async def _played(job: Job) -> list[Answer]:
    said = await processes.output("-m", "scripts.bench.load", given=orjson.dumps(asdict(job)))
    return [Answer(**answer) for answer in orjson.loads(said)]


async def _idle(port: int) -> None:
    """Wait until the answers that nobody read have ended, as a stop of the gateway would."""
    async with asyncio.timeout(60):
        while await asyncio.to_thread(processes.active_streams, port):
            await asyncio.sleep(0.2)


def _errors(answers: list[Answer]) -> Counter[str]:
    return Counter(answer.error for answer in answers if answer.error)


def _latencies(answers: list[Answer], scenario: Scenario) -> dict[str, float]:
    """From the provider's sending to the reader's receiving; to the first token from the request, less its pace."""
    events = [b - a for answer in answers for a, b in zip(answer.sent, answer.arrived, strict=True)]
    firsts = [answer.arrived[0] - answer.asked - scenario.first_s * 1e9 for answer in answers if answer.arrived]
    return {
        "first_p50": _percentile(firsts, 50) / 1e6,
        "first_p99": _percentile(firsts, 99) / 1e6,
        "event_p50": _percentile(events, 50) / 1e6,
        "event_p99": _percentile(events, 99) / 1e6,
    }


def _percentile(values: list[float] | list[int], percent: int) -> float:
    """The nearest rank; 0 where nothing came."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)] if values else 0


def _speed(answers: list[Answer]) -> dict[str, float]:
    arrived = [at for answer in answers for at in answer.arrived]
    took_ns = max(arrived, default=0) - min((answer.asked for answer in answers), default=0)
    return {"tokens": len(arrived), "rate": len(arrived) / took_ns * 1e9 if arrived else 0}


def _costs(answers: list[Answer], before: _Weights, after: _Weights) -> dict[str, float]:
    """Microseconds of CPU per token that arrived between the two weighings."""
    arrived = sum(before.at <= at < after.at for answer in answers for at in answer.arrived)
    python, postgres = after.python_s - before.python_s, after.postgres_s - before.postgres_s
    reader = after.reader_s - before.reader_s
    spent = {"python": python, "reader": reader, "postgres": postgres, "cpu": python + reader + postgres}
    return {name: seconds / max(arrived, 1) * 1e6 for name, seconds in spent.items() if seconds or name != "reader"}


async def import_cpu_s() -> float:
    """CPU seconds of a fresh interpreter that imports the whole app."""
    return float(await processes.output("-c", "import app.main, time; print(time.process_time())"))


@asynccontextmanager
async def bench(folder: Path, scenarios: tuple[Scenario, ...], posts: int) -> AsyncIterator[Bench]:
    """A database, a provider and a chatbot per scenario."""
    port = processes.free_port()
    async with (
        processes.postgres(folder / "data") as (server, postgres),
        processes.running("app", "demo-provider", "--port", str(port), log=folder / "demo.log") as provider,
    ):
        await processes.first_line(provider)
        url = f"http://127.0.0.1:{port}/v1"
        file = folder / "chatbots.yaml"
        file.write_text("\n".join(chatbots(url, scenarios, posts)))
        environment = {"DATABASE_URL": server.dsn}
        await processes.output("-m", "app", "migrate", environment=environment)
        await processes.output("-m", "app", "apply", str(file), environment=environment)
        yield Bench(url, server.dsn, postgres, folder)
