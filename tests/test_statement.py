"""Several rooms' queries run as one statement: each with its own values, and with what those before it returned."""

import asyncpg
import pytest

from app.statement import Part, fetch_together


async def test_each_part_has_its_own_values(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        many = Part(f"many as (select {' + '.join(f'${n}::int' for n in range(1, 12))} as sum)", tuple(range(11)))
        more = Part("more as (select sum + $1::int as sum, $2::text as said from many)", (100, "$1 is no value"))
        row = await fetch_together(connection, [many, more], "select many.sum, more.sum, said from many, more")
        assert tuple(row) == (55, 155, "$1 is no value")
    finally:
        await connection.close()


async def test_all_of_it_or_nothing(database: str) -> None:
    connection = await asyncpg.connect(database)
    try:
        await connection.execute("create table a (n int); create table b (n int check (n > 0))")
        parts = [Part("x as (insert into a values ($1))", (1,)), Part("y as (insert into b values ($1))", (-1,))]
        with pytest.raises(asyncpg.CheckViolationError):
            await fetch_together(connection, parts, "select")
        assert await connection.fetchval("select count(*) from a") == 0
        parts[1] = Part(parts[1].sql, (1,))
        await fetch_together(connection, parts, "select")
        assert await connection.fetchval("select count(*) from a, b") == 1
    finally:
        await connection.close()
