"""Whose tries are counted where, and what those are told who try too often: 429, before anything is read or written.

Each replica counts by itself. An API key is counted as itself, and so is the user it names; a user as itself; and
whoever is no API key by the address as well, as a back end asks for many from one.
"""

from collections.abc import Mapping
from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Literal, TypedDict

from starlette.types import Scope

from app.access.client import client_address
from app.access.principal import Principal
from app.access.rates import Activity, Rate, Standing, rates_of
from app.errors import TooMany
from app.settings import Settings
from app.telemetry import Metrics

Of = Literal["user", "key", "address"]
Rates = Mapping[Activity, Rate]

# Whoever has one address of IPv6 has all that begin like it: one network, one bucket.
_NETWORK = 64
_STANDING = "rate_limit"


class Needs(TypedDict):
    limits: "Limits"


class Limits:
    """The rates of one replica. What a rate is not given for is not limited."""

    def __init__(self, rates: Mapping[Of, Rates], metrics: Metrics) -> None:
        self._rates: Mapping[Of, Rates] = {"user": {}, "key": {}, "address": {}, **rates}
        self._metrics = metrics

    def count(self, scope: Scope, activity: Activity, principal: Principal) -> None:
        """A request of somebody who is known by now. Raises TooMany where it is one too many."""
        if principal.kind == "key":
            self._count(scope, activity, "key", principal.id)
            return
        if principal.user_id is not None:
            self._count(scope, activity, "user", principal.user_id)
        if activity in self._rates["address"]:
            self._count(scope, activity, "address", _network(client_address(scope)))

    def count_named(self, scope: Scope, activity: Activity, user_id: str | None) -> None:
        """The user for whom somebody asks who is not one user. Raises TooMany."""
        principal: Principal = scope["principal"]
        if principal.user_id is None and user_id:
            self._count(scope, activity, "user", user_id)

    def count_as_well(self, scope: Scope, activity: Activity, user_id: str | None) -> None:
        """What a request is besides what its route says, for all whom it is counted for. Raises TooMany."""
        self.count(scope, activity, scope["principal"])
        self.count_named(scope, activity, user_id)

    def count_failure(self, scope: Scope) -> None:
        """Credentials that are no good. Raises TooMany: good ones from there are not asked how many were bad."""
        rate = self._rates["address"].get("failures")
        if rate is None or not (standing := rate.take(_network(client_address(scope)))).wait_s:
            return
        self._metrics.limited.labels("failures", "address").inc()
        told = "Too many requests with credentials that are no good came from this address."
        raise TooMany("too_many_failures", told, retry_after=standing.wait_s)

    def _count(self, scope: Scope, activity: Activity, of: Of, who: str) -> None:
        rate = self._rates[of].get(activity)
        if rate is None:
            return
        standing = rate.take(who)
        tightest: tuple[Activity, Standing] | None = scope.get(_STANDING)
        if tightest is None or standing.left <= tightest[1].left:
            scope[_STANDING] = (activity, standing)
        if standing.wait_s:
            self._metrics.limited.labels(activity, of).inc()
            told = f"Too many {activity} of this {of}: {standing.most} in a minute are allowed."
            raise TooMany("rate_limited", told, retry_after=standing.wait_s)


def headers_of(scope: Scope) -> dict[str, str]:
    """What the answer to a request that was counted says of the tightest of its limits, to whoever asks first."""
    counted: tuple[Activity, Standing] | None = scope.pop(_STANDING, None)
    return counted[1].headers(counted[0]) if counted else {}


@lru_cache(maxsize=4096)
def _network(address: str) -> str:
    if ":" not in address or not isinstance(ip_address(address), IPv6Address):
        return address
    return str(ip_network((address, _NETWORK), strict=False))


def limits_of(settings: Settings, metrics: Metrics) -> Limits:
    """Raises Misconfigured."""
    given: dict[Of, str] = {"user": settings.rate_user, "key": settings.rate_key, "address": settings.rate_address}
    rates: dict[Of, Rates] = {
        of: {activity: Rate(most) for activity, most in rates_of(text, f"rate_{of}").items()}
        for of, text in given.items()
    }
    return Limits(rates, metrics)
