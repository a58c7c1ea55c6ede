"""Kill, stop and cut everything while answers are read, and count what was lost (docs/chaos.md).

    .venv/bin/python -m scripts.chaos --kills 20 --stops 5 --seed 1

Exits with 1 when an event was lost, doubled or reordered, or anything else that must hold did not.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from scripts.chaos.browser import Browser, running_browser
from scripts.chaos.checks import Findings, look_at
from scripts.chaos.faults import FAULTS, Fault
from scripts.chaos.report import heading, line, totals
from scripts.chaos.site import Site, running_site
from scripts.chaos.trial import trying

_TRIAL_S = 180
# After a death, in seconds.
_AGAIN_S = 2.5


def main() -> None:
    arguments = _arguments()
    with tempfile.TemporaryDirectory(prefix="parley-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o711)  # the account of PostgreSQL passes through
        fine = asyncio.run(_run(folder, arguments))
        if not fine:
            _show_logs(folder)
    sys.exit(0 if fine else 1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="kill -9 of replicas (10)")
    parser.add_argument("--stops", type=int, help="replicas stopped beyond their lease, then continued (a tenth)")
    parser.add_argument("--others", type=int, help="trials of each other kind of fault (a fortieth, at least 1)")
    parser.add_argument("--only", help="kinds of faults whose names contain this")
    parser.add_argument("--seed", type=int, default=1, help="what chance begins with (1)")
    parser.add_argument("--replicas", type=int, default=3, choices=(2, 3, 4), help="how many (3)")
    parser.add_argument("--quick", action="store_true", help="a lease of one second instead of six")
    parser.add_argument("--no-browser", action="store_true", help="leave Chromium out")
    parser.add_argument("--within", type=float, default=3600, help="begin no trial after so many seconds (3600)")
    arguments = parser.parse_args()
    arguments.stops = max(1, arguments.kills // 10) if arguments.stops is None else arguments.stops
    arguments.others = max(1, arguments.kills // 40) if arguments.others is None else arguments.others
    return arguments


async def _run(folder: Path, arguments: argparse.Namespace) -> bool:
    chance = random.Random(arguments.seed)
    found = {fault.name: Findings() for fault in FAULTS}
    counts = dict.fromkeys(found, 0)
    over = monotonic() + arguments.within
    async with (
        running_browser(folder) as browser,
        running_site(folder, replicas=arguments.replicas, quick=arguments.quick) as site,
    ):
        for fault in _order(arguments, chance):
            if monotonic() > over:
                print("Out of time: the remaining trials are left out.", file=sys.stderr)
                break
            result = await _try(site, fault, random.Random(chance.random()), None if arguments.no_browser else browser)
            found[fault.name].add(result)
            counts[fault.name] += 1
            for sentence in result.wrong:
                print(f"{fault.name}: {sentence}", file=sys.stderr, flush=True)
    print(heading())
    for fault in FAULTS:
        if counts[fault.name]:
            print(line(fault.name, counts[fault.name], found[fault.name]))
    everything, kills = Findings(), Findings()
    for fault in FAULTS:
        everything.add(found[fault.name])
        if fault.family == "kill":
            kills.add(found[fault.name])
    print(totals(sum(counts.values()), everything, kills))
    return everything.fine


def _order(arguments: argparse.Namespace, chance: random.Random) -> list[Fault]:
    faults = list(_wanted(arguments))
    chance.shuffle(faults)
    return faults


def _wanted(arguments: argparse.Namespace) -> Iterator[Fault]:
    counts = {"kill": arguments.kills, "stop": arguments.stops, "": arguments.others}
    kinds = [fault for fault in FAULTS if not arguments.only or arguments.only in fault.name]
    for family, count in counts.items():
        of_family = [fault for fault in kinds if fault.family == family]
        each = count if family == "" else -(-count // max(1, len(of_family)))
        yield from (of_family * each)[: count * len(of_family) if family == "" else count]


async def _try(site: Site, fault: Fault, chance: random.Random, browser: Browser | None) -> Findings:
    try:
        async with asyncio.timeout(_TRIAL_S), trying(site, chance, browser) as trial:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(fault.inject(trial))
                tasks.create_task(trial.go_on())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(trial.end())
                tasks.create_task(_recover(site))
            return await look_at(trial, fault)
    except Exception as error:  # noqa: BLE001  one trial; the next ones are worth having all the same
        return Findings(wrong=[f"the trial broke: {_first(error)!r}"])


async def _recover(site: Site) -> None:
    """Somebody starts again what has died, when the others have dealt with it."""
    await asyncio.sleep(_AGAIN_S)
    await site.heal()


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error


def _show_logs(folder: Path) -> None:
    for log in sorted(folder.glob("replica_*.log")):
        print(f"--- {log.name}\n{log.read_text()[-4000:]}", file=sys.stderr)


if __name__ == "__main__":
    main()
