"""Found by Python at its start where this folder is in PYTHONPATH: a wall clock that is wrong, for this process only.

PARLEY_CHAOS_CLOCK_S says by how many seconds; with a trailing `~` it jumps back and forth between that and the truth,
every two seconds. The monotonic clock stays right, as it does when somebody sets a machine's clock.
"""

import datetime
import os
import time
from typing import Any

_WISH = os.environ.get("PARLEY_CHAOS_CLOCK_S", "0")
_OFF, _STEPS = float(_WISH.rstrip("~")), _WISH.endswith("~")
_time, _time_ns = time.time, time.time_ns
_datetime: Any = datetime.datetime


def _off() -> float:
    return 0.0 if _STEPS and int(time.monotonic()) // 2 % 2 else _OFF


class _Now(type):
    """Times made in C are no instances of the class below, and must count as such all the same."""

    def __instancecheck__(cls, instance: object) -> bool:
        return bool(isinstance(instance, _datetime))


class _Datetime(datetime.datetime, metaclass=_Now):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return _datetime.now(tz) + datetime.timedelta(seconds=_off())


if _OFF:
    time.time = lambda: _time() + _off()
    time.time_ns = lambda: _time_ns() + int(_off() * 1e9)
    datetime.datetime = _Datetime  # type: ignore[misc]
