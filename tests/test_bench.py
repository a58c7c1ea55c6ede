"""The benchmark runs and prints its figures. No figure is judged here: machines differ, and tests run side by side."""

import asyncio
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="costs are read from /proc")


async def test_it_prints_every_figure_and_finds_no_answer_wrong() -> None:
    said, errors, code = await _bench("--runs", "1", "--scale", "0.02", "--only", "pace")
    assert code == 0, said + errors
    assert "| per event, p50, ms |" in said
    assert "### 20 streams" in said
    rows = {cells[0]: cells[1:] for line in said.splitlines() if (cells := _cells(line))}
    assert [float(cell) for cell in rows["errors"][:4]] == [0, 0, 0, 0]
    assert float(rows["import of the app, CPU seconds"][0]) > 0
    assert float(rows["request to accepted, CPU, ms"][0].replace(",", "")) > 0
    assert all(len(cells) in (2, 5) for cells in rows.values())


@pytest.mark.parametrize("what", ["storm", "catchup"])
async def test_every_reader_that_comes_back_is_served(what: str) -> None:
    small = ("--readers", "40", "--events", "3000", "--resumes", "20", "--rounds", "1")
    said, errors, code = await _bench(what, *small, module="scripts.bench.readers")
    assert code == 0, said + errors
    names, _, figures = (_cells(line) for line in said.splitlines() if line.startswith("| "))
    assert dict(zip(names, figures, strict=True))["not served"] == "0"


async def test_synchronising_is_weighed_beside_the_naive_way() -> None:
    said, errors, code = await _run("scripts/bench_sync", "--scale", "0.05")
    assert code == 0, said + errors
    rows = {cells[0]: cells[1:] for line in said.splitlines() if (cells := _cells(line))}
    assert rows["nothing new"][3:6] == ["0", "0", "0"], "neither rows nor WAL"
    total, index = map(float, rows["one message"][3:5])
    assert (rows["`sync_head`"][2], rows["`messages`"][2], round(total - index, 1)) == ("1", "1", 2)
    assert int(said.partition("The naive way writes ")[2].split()[0]) >= 100
    assert float(rows["second device has a message, p50, ms"][0]) > 0
    assert "bootstrap of 5,000 messages, p50, s" in rows


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("| ") else []


async def _bench(*arguments: str, module: str = "scripts.bench") -> tuple[str, str, int | None]:
    return await _run("-m", module, *arguments)


async def _run(*arguments: str) -> tuple[str, str, int | None]:
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=_ROOT, stdout=-1, stderr=-1)
    async with asyncio.timeout(180):
        said, errors = await process.communicate()
    return said.decode(), errors.decode(), process.returncode
