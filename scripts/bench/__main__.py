"""Measure Parley on this machine, with a PostgreSQL, a provider and readers of its own, and print a table.

    .venv/bin/python -m scripts.bench [--runs 5] [--quick] [--only latency,pace]

Linux only: costs are read from /proc. Exits with 1 when any answer came wrong.
"""

import argparse
import asyncio
import shutil
import sys
import tempfile
from pathlib import Path

from scripts.bench.measuring import Bench, Measurement, bench, import_cpu_s
from scripts.bench.report import Report
from scripts.bench.scenarios import POSTS, SCENARIOS, Scenario


def main() -> None:
    arguments = _arguments()
    scenarios = tuple(
        scenario if arguments.scale == 1 else scenario.scaled(arguments.scale)
        for scenario in SCENARIOS
        if not arguments.only or scenario.name in arguments.only.split(",")
    )
    folder = Path(tempfile.mkdtemp(prefix="parley-bench-"))
    folder.chmod(0o755)  # the account of PostgreSQL passes through
    report = Report()
    try:
        asyncio.run(_measure(folder, report, scenarios, runs=arguments.runs, posts=round(POSTS * arguments.scale)))
    finally:
        if arguments.keep:
            print(f"Logs are in {folder}.", file=sys.stderr)
        else:
            shutil.rmtree(folder)
    print(f"Medians of {arguments.runs} runs (least–most).")
    print("\n".join(report.lines(scenarios)))
    sys.exit(1 if report.errors else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("scripts.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=5, help="medians of this many runs (5)")
    parser.add_argument("--only", help="these scenarios: " + ", ".join(scenario.name for scenario in SCENARIOS))
    parser.add_argument("--scale", type=float, default=1, help="make every scenario smaller, as in 0.2")
    parser.add_argument("--quick", action="store_true", help="one run at a fifth of the size")
    parser.add_argument("--keep", action="store_true", help="keep the folder with the logs")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs, arguments.scale = 1, min(arguments.scale, 0.2)
    return arguments


async def _measure(folder: Path, report: Report, scenarios: tuple[Scenario, ...], *, runs: int, posts: int) -> None:
    async with bench(folder, scenarios, posts) as workbench:
        await import_cpu_s()  # compiles what was never imported
        for run in range(1, runs + 1):
            for scenario in scenarios:
                for subject in scenario.subjects:
                    _say(f"run {run} of {runs}: {scenario.title}, {subject}")
                    report.add(scenario.name, subject, await workbench.measure(scenario, subject))
            _say(f"run {run} of {runs}: requests and start")
            await _measure_rest(workbench, report, posts)


async def _measure_rest(workbench: Bench, report: Report, posts: int) -> None:
    report.add("accept", "parley", await workbench.accept(posts))
    report.add("start", "parley", Measurement({"import": await import_cpu_s()}))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
