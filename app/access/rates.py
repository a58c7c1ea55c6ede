"""How often somebody may do something: a bucket of tries for each, that fills up again within a minute.

A bucket is one number, the moment at which it is full again: the generic cell rate algorithm (ITU-T I.371).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from time import monotonic
from typing import Literal, get_args

from app.errors import Misconfigured

# What is counted: `failures` are requests with credentials that are no good.
Activity = Literal["messages", "uploads", "changes", "reads", "connects", "failures"]
ACTIVITIES: tuple[Activity, ...] = get_args(Activity)

WINDOW_S = 60.0
# Buckets that are kept of one rate, those used last; about 200 bytes each. Whoever is forgotten has a full one.
_REMEMBERED = 10_000
# Sums of floats: the last try of a full bucket must not fail by their rounding.
_SLACK_S = 1e-6


@dataclass(frozen=True, slots=True)
class Standing:
    """After a try: of how many how many are left, and when the bucket is full again. `wait_s`: until one is allowed
    that was refused now, else 0."""

    most: int
    left: int
    full_s: float
    wait_s: float = 0.0

    def headers(self, activity: Activity) -> dict[str, str]:
        """As draft-ietf-httpapi-ratelimit-headers-10 says them."""
        again_s = ceil(self.wait_s or self.full_s)
        return {
            "RateLimit-Policy": f'"{activity}";q={self.most};w={WINDOW_S:.0f}',
            "RateLimit": f'"{activity}";r={self.left};t={again_s}',
        }


class Rate:
    """`most` tries a minute for each who tries, and as many at once after a quiet minute."""

    def __init__(self, most: int, *, remembered: int = _REMEMBERED, clock: Callable[[], float] = monotonic) -> None:
        self._most = most
        self._step_s = WINDOW_S / most
        self._remembered = remembered
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, who: str) -> Standing:
        """Count a try, unless it is one too many."""
        now = self._clock()
        used_s = max(0.0, self._full_at.pop(who, now) - now)
        over_s = used_s + self._step_s - WINDOW_S
        if over_s <= _SLACK_S:
            used_s += self._step_s
        self._full_at[who] = now + used_s
        if len(self._full_at) > self._remembered:
            self._full_at.popitem(last=False)
        if over_s > _SLACK_S:
            return Standing(self._most, 0, used_s, over_s)
        return Standing(self._most, int((WINDOW_S - used_s + _SLACK_S) / self._step_s), used_s)


def rates_of(text: str, setting: str) -> Mapping[Activity, int]:
    """`messages=120, reads=3000`, or `none`. Raises Misconfigured naming the setting."""
    found: dict[Activity, int] = {}
    for word in (word.strip() for word in text.split(",")):
        name, _, most = word.partition("=")
        activity = next((one for one in ACTIVITIES if one == name.strip()), None)
        if word in ("", "none"):
            continue
        if activity is None or not most.strip().isdecimal() or not 0 < int(most) <= 1_000_000:
            told = (
                f"PARLEY_{setting.upper()} takes what may be done how often in a minute, as `messages=120, reads=600`"
            )
            raise Misconfigured("rate_limits", f"{told}, of {', '.join(ACTIVITIES)}, or `none`; not {word!r}.")
        found[activity] = int(most)
    return found
