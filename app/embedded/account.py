"""The account PostgreSQL runs as: our own, or an unprivileged one when we are root, as PostgreSQL refuses root."""

import os
import pwd
from dataclasses import dataclass
from pathlib import Path

from app.errors import Misconfigured

_PREFERRED = ("postgres", "_postgres", "nobody")


@dataclass(frozen=True, slots=True)
class Account:
    uid: int
    gid: int
    name: str

    @property
    def is_ours(self) -> bool:
        return self.uid == os.geteuid()


def account_for(folder: Path) -> Account:
    """Our own account; for root the owner of an existing folder, else the first unprivileged account of the system."""
    if os.geteuid() != 0:
        return Account(os.geteuid(), os.getegid(), _name(os.geteuid()))
    if folder.exists() and (owner := folder.stat()).st_uid != 0:
        return Account(owner.st_uid, owner.st_gid, _name(owner.st_uid))
    return _unprivileged()


def _unprivileged() -> Account:
    for name in _PREFERRED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(entry.pw_uid, entry.pw_gid, name)
    raise Misconfigured(
        "embedded_account",
        f"PostgreSQL may not run as root and this system has none of the accounts {', '.join(_PREFERRED)}. "
        "Start as a normal user, or set DATABASE_URL to a PostgreSQL of your own.",
    )


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
