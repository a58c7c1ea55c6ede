"""What tells operators how one server is."""

from dataclasses import dataclass, field

from app.journal import Journal
from app.telemetry import Metrics


@dataclass(frozen=True, slots=True)
class Watch:
    """`failing` names the loops whose last pass went wrong, for as long as none went well."""

    metrics: Metrics
    journal: Journal
    failing: set[str] = field(default_factory=set)
