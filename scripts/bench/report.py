"""The table: medians of all runs, the issue's targets beside them."""

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from scripts.bench.answer import Subject
from scripts.bench.measuring import Measurement
from scripts.bench.scenarios import Scenario

_COLUMNS: Mapping[Subject, str] = {
    "provider": "provider alone",
    "relay": "blind relay",
    "passthrough": "pass-through",
    "parley": "Parley",
    "elsewhere": "Parley, read elsewhere",
}
_LABELS: Mapping[str, tuple[str, str]] = {
    "first_p50": ("first token, p50", "ms"),
    "first_p99": ("first token, p99", "ms"),
    "event_p50": ("per event, p50", "ms"),
    "event_p99": ("per event, p99", "ms"),
    "rate": ("tokens per second", ""),
    "python": ("Python CPU per event", "µs"),
    "reader": ("Python CPU per event, the readers' replica", "µs"),
    "postgres": ("PostgreSQL CPU per event", "µs"),
    "ratio": ("CPU per event, Python and PostgreSQL, to the pass-through's", "x"),
    "memory": ("memory per open stream", "KiB"),
    "errors": ("errors", ""),
}
_SHOWN: Mapping[str, tuple[str, ...]] = {
    "latency": ("first_p50", "first_p99", "event_p50", "event_p99", "python", "postgres", "errors"),
    "full": ("rate", "python", "postgres", "ratio", "errors"),
    "single": ("rate", "python", "postgres", "ratio", "errors"),
    "pace": ("event_p50", "event_p99", "python", "postgres", "ratio", "errors"),
    "many": ("event_p50", "event_p99", "python", "postgres", "memory", "errors"),
    "replicas": ("first_p50", "first_p99", "event_p50", "event_p99", "python", "reader", "postgres", "errors"),
    "crowd": ("first_p50", "first_p99", "event_p50", "event_p99", "python", "reader", "postgres", "errors"),
}
# At most this much, by scenario and figure.
_TARGETS: Mapping[tuple[str, str], float] = {
    ("latency", "first_p50"): 5,
    ("latency", "first_p99"): 15,
    ("latency", "event_p50"): 2,
    ("latency", "event_p99"): 8,
    ("full", "ratio"): 2,
    ("pace", "python"): 100,
    ("pace", "postgres"): 40,
    ("many", "memory"): 100,
    ("many", "errors"): 0,
    ("crowd", "event_p99"): 15,
    ("accept", "cpu"): 3,
    ("start", "import"): 1,
}


@dataclass(slots=True)
class Report:
    """Collects the runs. `values` by scenario, subject and figure."""

    values: dict[tuple[str, Subject, str], list[float]] = field(default_factory=dict)
    errors: Counter[str] = field(default_factory=Counter)

    def add(self, scenario: str, subject: Subject, measurement: Measurement) -> None:
        figures = {**measurement.figures, "errors": measurement.errors.total()}
        for name, value in figures.items():
            self.values.setdefault((scenario, subject, name), []).append(value)
        for error, count in measurement.errors.items():
            self.errors[f"{scenario}, {subject}: {error}"] += count

    def compare(self, scenario: Scenario) -> None:
        """Add the ratios to the pass-through of the same run; call once, when all runs are in."""
        yardstick = self.values.get((scenario.name, "passthrough", "python"), [])
        for subject in scenario.subjects:
            if yardstick and (costs := self.values.get((scenario.name, subject, "cpu"))):
                ratios = [cost / base for cost, base in zip(costs, yardstick, strict=True) if base]
                self.values[scenario.name, subject, "ratio"] = ratios

    def lines(self, scenarios: Sequence[Scenario]) -> Iterator[str]:
        for scenario in scenarios:
            self.compare(scenario)
            yield from ("", f"### {scenario.title} (`{scenario.name}`)", "")
            yield from self._table(scenario)
        yield from ("", "### Requests and start", "")
        yield from self._rest()
        for error, count in self.errors.most_common(10):
            yield f"- {count} x {error}"

    def _table(self, scenario: Scenario) -> Iterator[str]:
        yield f"| | {' | '.join(_COLUMNS[subject] for subject in scenario.subjects)} | target |"
        yield "| --- |" + " ---: |" * (len(scenario.subjects) + 1)
        for figure in _SHOWN[scenario.name]:
            cells = [self._cell(scenario.name, subject, figure) for subject in scenario.subjects]
            yield f"| {_label(figure)} | {' | '.join(cells)} | {_target(scenario.name, figure)} |"

    def _rest(self) -> Iterator[str]:
        yield "| | Parley | target |"
        yield "| --- | ---: | ---: |"
        for scenario, figure, label in (
            ("accept", "python", "request to the provider called, Python CPU, ms"),
            ("accept", "postgres", "request to the provider called, PostgreSQL CPU, ms"),
            ("accept", "call", "of which calling the provider, ms"),
            ("accept", "cpu", "request to accepted, CPU, ms"),
            ("start", "import", "import of the app, CPU seconds"),
        ):
            yield f"| {label} | {self._cell(scenario, 'parley', figure)} | {_target(scenario, figure)} |"

    def _cell(self, scenario: str, subject: Subject, figure: str) -> str:
        if not (values := self.values.get((scenario, subject, figure))):
            return ""
        median = _number(statistics.median(values))
        return median if min(values) == max(values) else f"{median} ({_number(min(values))}–{_number(max(values))})"


def _label(figure: str) -> str:
    name, unit = _LABELS[figure]
    return f"{name}, {unit}" if unit else name


def _target(scenario: str, figure: str) -> str:
    return f"<= {limit:g}" if (limit := _TARGETS.get((scenario, figure))) is not None else ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == 0 else f"{value:.3g}"
