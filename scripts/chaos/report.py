"""The table: a line per kind of fault, and the totals."""

from collections.abc import Sequence

from scripts.chaos.checks import Findings

_COLUMNS = ("fault", "trials", "answers", "connections", "lost", "doubled", "reordered", "wrong", "failed")


def heading() -> str:
    return f"| {' | '.join(_COLUMNS)} | takeover p50 / p99, s |\n|{'---|' * (len(_COLUMNS) + 1)}"


def line(name: str, trials: int, found: Findings) -> str:
    """`wrong` is everything else that must hold; `failed` are answers that ended so, as they may."""
    counts = (trials, found.answers, found.connections, found.lost, found.doubled, found.reordered, len(found.wrong))
    cells = (name, *map(str, counts), str(found.failed), _times(found.takeovers))
    return f"| {' | '.join(cells)} |"


def totals(trials: int, found: Findings, kills: Findings) -> str:
    return (
        f"{trials} trials, {found.answers} answers: lost {found.lost}, doubled {found.doubled}, "
        f"reordered {found.reordered}, wrong {len(found.wrong)}, zombie writes {found.zombie}; "
        f"takeover after kill -9, p50 / p99: {_times(kills.takeovers)} s ({len(kills.takeovers)})"
    )


def _times(seconds: Sequence[float]) -> str:
    return f"{_quantile(seconds, 0.5):.2f} / {_quantile(seconds, 0.99):.2f}" if seconds else "–"


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
