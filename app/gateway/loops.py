"""What runs beside the requests: one table of what a server does from its start, one of what it does once it serves."""

import asyncio
from collections.abc import Coroutine
from functools import partial

from app.gateway.parts import Parts
from app.gateway.presence import Presence
from app.ticker import every, whenever

# How often figures of users' exchanges are written, all of them in one statement.
_FIGURES_S = 30
# How often every replica tells what the sources' states say.
_TELL_S = 30
# How often a replica looks which keys sign: one that was taken away is believed no longer than this.
_SIGNING_S = 30
# How often somebody looks whether a periodic job is due.
_JOBS_S = 10

Loop = Coroutine[None, None, None]


def loops(parts: Parts, presence: Presence) -> list[Loop]:
    """Everything that runs for as long as the server does."""
    settings, streaming, failing = parts.settings, parts.streaming, parts.watch.failing
    nudges, news, issuer = parts.nudges, parts.news, parts.door.issuer
    again, on_demand = partial(every, failing=failing), partial(whenever, failing=failing)
    return [
        streaming.log.run(),
        _serve(parts, presence),
        again(settings.poll_s, partial(_look_around, parts), name="look around"),
        again(1, parts.watch.journal.run_once, name="journal"),
        again(_FIGURES_S, parts.figures.run_once, name="figures"),
        on_demand(streaming.topics.wanted, streaming.topics.tell_once, name="topics"),
        on_demand(nudges.wanted, nudges.look_once, name="nudges"),
        on_demand(news.wanted, news.look_once, name="news"),
        *([issuer.run(failing)] if issuer else []),
    ]


async def _serve(parts: Parts, presence: Presence) -> None:
    await presence.come_up()
    async with asyncio.TaskGroup() as tasks:
        for loop in _once_up(parts, presence):
            tasks.create_task(loop)


def _once_up(parts: Parts, presence: Presence) -> list[Loop]:
    settings, answering, periodic = parts.settings, parts.answering, parts.periodic
    bus, failing = parts.streaming.bus, parts.watch.failing
    again = partial(every, failing=failing)
    return [
        bus.run(),
        again(settings.beat_s, presence.beat, name="beat"),
        again(settings.scan_s, answering.takeover.run_once, name="takeover", sooner=bus.gone),
        again(settings.scan_s, answering.stopping.run_once, name="stopping", sooner=bus.stop),
        again(settings.scan_s, partial(_look_after, parts), name="turns"),
        again(_TELL_S, periodic.passes.tell, name="sources"),
        again(_TELL_S, periodic.reconcile.tell, name="rounds"),
        again(_SIGNING_S, parts.door.signing.run_once, name="stream keys"),
        _run_jobs(parts),
        *([parts.streaming.lifeline.run(failing)] if settings.suspect else []),
    ]


async def _look_around(parts: Parts) -> None:
    event_log, failing = parts.streaming.log, parts.watch.failing
    (failing.add if event_log.waiting else failing.discard)("log")
    parts.streaming.hub.look_around(event_log.owns)
    parts.nudges.look_around()
    parts.news.look_around()


async def _look_after(parts: Parts) -> None:
    await parts.answering.turns.run_once()
    await parts.answering.abandonment.run_once()


async def _run_jobs(parts: Parts) -> None:
    try:
        await every(_JOBS_S, parts.periodic.scheduler.run_once, name="jobs", failing=parts.watch.failing)
    finally:
        parts.periodic.leadership.give_up()
