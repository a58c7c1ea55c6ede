"""What tells operators how one server is."""

from app.journal import Journal
from app.postgres import Pool
from app.telemetry import Metrics


class Watch:
    """`failing` names the loops whose last pass went wrong, for as long as none went well."""

    def __init__(self, pool: Pool) -> None:
        self.metrics = Metrics()
        self.journal = Journal(pool, self.metrics)
        self.failing: set[str] = set()
