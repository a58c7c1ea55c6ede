"""What requests find in `request.state`: of all parts those that some endpoint needs, by the name it knows them by."""

from functools import partial

from app import problems
from app.access.rates import Rate
from app.conversations.upkeep import each_source
from app.conversations.webhook import secrets_of
from app.gateway.parts import Parts
from app.gateway.presence import Presence
from app.health import Probe
from app.jobs.runs import next_of
from app.jobs.schedule import discovery_cron
from app.routes import State


def state_of(parts: Parts, presence: Presence) -> State:
    """For as long as the server lives."""
    settings, resources = parts.settings, parts.resources
    watch, door, allowances = parts.watch, parts.door, parts.allowances
    streaming, runs, answering, periodic = parts.streaming, parts.runs, parts.answering, parts.periodic
    return State(
        settings=settings,
        pool=resources.pool,
        wall=resources.wall,
        safe=resources.safe,
        metrics=watch.metrics,
        journal=watch.journal,
        failing=watch.failing,
        error_rows=Rate(problems.ROWS),
        probe=Probe(resources.reserve, on_silence=presence.distrust),
        credentials=door.credentials,
        links=door.links,
        proxies=door.proxies,
        limits=door.limits,
        replica=streaming.replica,
        hub=streaming.hub,
        bus=streaming.bus,
        seats=streaming.seats,
        tail=streaming.tail,
        chatbots=runs.chatbots,
        images=runs.images,
        runner=runs.runner,
        intake=answering.intake,
        waiting=answering.waiting,
        stopping=answering.stopping,
        erasure=answering.erasure,
        admit_upload=streaming.replica.admit,
        admit_question=answering.admit_question,
        analyse=answering.analyse,
        changes=parts.changes,
        figures=parts.figures,
        nudges=parts.nudges,
        news=parts.news,
        passes=periodic.passes,
        discover=partial(each_source, periodic.passes),
        discovery_cron=discovery_cron(settings),
        discovery_next=partial(next_of, resources.pool, "discovery"),
        webhook_secrets=secrets_of(settings),
        uploads=allowances.uploads,
        readings=allowances.readings,
        exports=allowances.exports,
        imports=allowances.imports,
        histories=allowances.histories,
    )
