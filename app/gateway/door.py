"""What stands before every request: who asks, and how often they may."""

from collections.abc import Sequence

from app.access.anybody import anybody
from app.access.client import trusted_proxies
from app.access.credentials import Credentials, tokens_of
from app.access.keys import Keys
from app.access.limits import limits_of
from app.access.links import Links
from app.access.signing import Signing
from app.access.stream_token import SigningKey
from app.gateway.resources import Resources
from app.gateway.watch import Watch
from app.settings import Settings


class Door:
    """The parts of it. `issuer` is there where users bring tokens of their own."""

    def __init__(
        self, settings: Settings, resources: Resources, *, watch: Watch, signing_keys: Sequence[SigningKey]
    ) -> None:
        tokens = tokens_of(settings)
        self.issuer = tokens.issuer if tokens else None
        self.signing = Signing(resources.pool, given=signing_keys, safe=resources.safe)
        self.links = Links(
            None if settings.auth == "open" else self.signing,
            run_s=settings.run_timeout_s,
            queue=settings.queue_limit,
        )
        self.credentials = Credentials(
            settings.auth,
            Keys(resources.pool),
            anybody=anybody(settings),
            tokens=tokens.principal if tokens else None,
            links=self.links,
        )
        self.proxies = trusted_proxies(settings)
        self.limits = limits_of(settings, watch.metrics)
