"""The faults: each happens to a trial under way, at a moment that chance has chosen."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass

from scripts.chaos.site import Replica
from scripts.chaos.trial import Trial


@dataclass(frozen=True, slots=True)
class Fault:
    """`takes_over`: whether other replicas may claim answers because of it. `kill` and `stop` have counts of their
    own on the command line."""

    name: str
    inject: Callable[[Trial], Coroutine[None, None, None]]
    takes_over: bool = True
    family: str = ""


async def _kill_owner(trial: Trial) -> None:
    await trial.pause(0, 0.5)
    trial.strike()
    trial.owner.send(signal.SIGKILL)


async def _kill_neighbour(trial: Trial) -> None:
    await trial.pause(0, 0.5)
    trial.neighbour.send(signal.SIGKILL)


async def _stop_beyond(trial: Trial) -> None:
    """A zombie: it wakes up with events in its hands that are somebody else's answers now."""
    await trial.pause(0, 0.3)
    trial.strike()
    trial.owner.send(signal.SIGSTOP)
    trial.site.balancer.shun(trial.owner.number)
    await trial.declared_dead(trial.owner)
    await trial.pause(0, 1)
    trial.owner.send(signal.SIGCONT)
    await trial.owner.ready()


async def _stop_within(trial: Trial) -> None:
    trial.owner.send(signal.SIGSTOP)
    await asyncio.sleep(trial.site.lease_s * 0.4)
    trial.owner.send(signal.SIGCONT)


async def _roll(trial: Trial) -> None:
    """A deployment: one after the other is told to go and comes back."""
    for replica in trial.site.replicas:
        await _leave(trial, replica)
        await replica.start()


async def _leave(trial: Trial, replica: Replica) -> None:
    trial.site.balancer.shunned.add(replica.number)
    replica.send(signal.SIGTERM)
    if (code := await replica.ended()) != 0:
        trial.complaints.append(f"{replica.role} left with exit code {code}")
    trial.site.balancer.shunned.discard(replica.number)


async def _restart_fast(trial: Trial) -> None:
    await trial.site.restart(crash=False)


async def _restart_immediate(trial: Trial) -> None:
    await trial.site.restart(crash=True)


async def _outage(trial: Trial) -> None:
    """Longer than a lease: nobody may take another one for dead because of it."""
    for replica in trial.site.replicas:
        replica.database.close()
    await asyncio.sleep(trial.site.lease_s * 1.3)
    for replica in trial.site.replicas:
        replica.database.open()


async def _end_backends(trial: Trial) -> None:
    await trial.site.look.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where usename like 'replica%'"
    )


async def _mute(trial: Trial) -> None:
    for replica in trial.site.replicas:
        replica.database.mute_listeners()


async def _cut(trial: Trial) -> None:
    for _ in range(6):
        trial.site.balancer.cut()
        trial.chance.choice(trial.site.replicas).database.cut()
        await trial.pause(0.05, 0.4)


async def _shift_clock(trial: Trial) -> None:
    """A replica comes back with a wrong clock and gets work; then it may have to take over somebody else's."""
    wrong = trial.neighbour
    await _leave(trial, wrong)
    wrong.clock = trial.chance.choice(["7200", "-3600", "5400~"])
    await wrong.start()
    await trial.ask(wrong)
    # The first ones have ended meanwhile; these are for whoever is left, with a right clock or without.
    for _ in range(2):
        await trial.ask(trial.owner)
    await trial.pause(0, 0.3)
    trial.strike()
    trial.owner.send(signal.SIGKILL)
    wrong.clock = "0"


FAULTS = (
    Fault("kill -9 of the owner", _kill_owner, family="kill"),
    Fault("kill -9 of a reader's replica", _kill_neighbour, family="kill"),
    Fault("stopped beyond the lease", _stop_beyond, family="stop"),
    Fault("stopped within the lease", _stop_within, takes_over=False),
    Fault("all restarted in turn", _roll),
    Fault("PostgreSQL restarted, fast", _restart_fast, takes_over=False),
    Fault("PostgreSQL restarted, immediate", _restart_immediate, takes_over=False),
    Fault("database unreachable beyond the lease", _outage, takes_over=False),
    Fault("all backends terminated", _end_backends, takes_over=False),
    Fault("LISTEN black-holed", _mute, takes_over=False),
    Fault("connections cut, again and again", _cut, takes_over=False),
    Fault("a clock hours wrong, then a kill", _shift_clock),
)
