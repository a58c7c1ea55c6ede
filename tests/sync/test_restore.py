"""After a backup was restored, with the statement of docs/operations.md, devices come together by themselves."""

import re
from urllib.parse import urlsplit

import asyncpg

from app.sync.merge import AddMessage, PutChat
from tests.command import ROOT
from tests.conftest import Server
from tests.serving import serving
from tests.sync.phone import Phone


def _add(phone: Phone, *messages: str) -> None:
    for message in messages:
        phone.say(AddMessage(message, "c", "user", f"The words of {message}", phone.stamp()))


async def _raise_epochs(dsn: str) -> None:
    statement = re.search(r"^ +(UPDATE sync_head .*)$", (ROOT / "docs/operations.md").read_text(), re.M)
    assert statement is not None
    connection = await asyncpg.connect(dsn)
    await connection.execute(statement[1])
    await connection.close()


async def test_devices_come_together_after_a_restore(database: str, server: Server) -> None:
    async with serving(database, drain_s=0) as gateway:
        phone, laptop = Phone("ann", gateway), Phone("ann", gateway)
        phone.say(PutChat("c", "Trip", phone.stamp()))
        _add(phone, "m1", "m2")
        await phone.sync()
        await laptop.sync()
    backup = server.create(template=urlsplit(database).path[1:])
    try:
        async with serving(database, drain_s=0) as gateway:
            phone.gateway = laptop.gateway = gateway
            _add(phone, "after-the-backup")
            await phone.sync()
            await laptop.sync()
            assert [one.id for one in laptop.messages("c")] == ["m1", "m2", "after-the-backup"]
        _add(phone, "of-the-phone")
        _add(laptop, "of-the-laptop")
        await _raise_epochs(server.dsn_of(backup))
        async with serving(server.dsn_of(backup), drain_s=0) as gateway:
            phone.gateway = laptop.gateway = gateway
            tablet = Phone("ann", gateway)
            # Beyond the cursors of the others: by the numbers alone they would miss these.
            _add(tablet, "t1", "t2", "t3")
            await tablet.sync()
            for one in (phone, laptop, phone, tablet):
                await one.sync()
            seen = {one.id for one in phone.messages("c")}
            assert seen == {"m1", "m2", "of-the-phone", "of-the-laptop", "t1", "t2", "t3"}
            assert phone.sees() == laptop.sees() == tablet.sees()
    finally:
        server.drop(backup)
