"""What is measured: how many streams at what pace, and what for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from scripts.bench.answer import Subject

_ALL: tuple[Subject, ...] = ("provider", "relay", "passthrough", "parley")


@dataclass(frozen=True, slots=True)
class Scenario:
    """`streams` readers at once, each reading `rounds` answers of `tokens` in turn, one token per `delay_ms`.

    They begin at random moments of the first `ramp_s` seconds. Without a delay the provider writes `batch` tokens at
    a time, as fast as they are taken.
    """

    name: str
    title: str
    streams: int
    tokens: int
    delay_ms: float
    rounds: int = 1
    ramp_s: float = 0.5
    batch: int = 16
    subjects: tuple[Subject, ...] = _ALL

    @property
    def model(self) -> str:
        return f"demo?clock=1&tokens={self.tokens}&delay_ms={self.delay_ms:g}&batch={self.batch}"

    @property
    def first_s(self) -> float:
        """What the provider itself takes before the first token: it paces the frame of the role, too."""
        return 2 * self.delay_ms / 1000

    @property
    def seconds(self) -> float:
        """How long one reader is busy at the least."""
        return self.rounds * (self.tokens + 1) * self.delay_ms / 1000

    def scaled(self, scale: float) -> "Scenario":
        """The same, smaller: fewer streams, and of the longer kinds fewer and shorter answers."""
        return replace(
            self,
            streams=max(2, round(self.streams * scale)),
            tokens=max(20, round(self.tokens * scale)) if self.tokens > 100 else self.tokens,
            rounds=max(1, round(self.rounds * scale)),
            ramp_s=self.ramp_s * scale,
        )


SCENARIOS = (
    Scenario("latency", "25 streams at 20 events/s", 25, 60, 50, rounds=6, ramp_s=3),
    Scenario("full", "50 streams at full speed", 50, 2000, 0),
    Scenario("single", "50 streams at full speed, token by token", 50, 2000, 0, batch=1),
    Scenario("pace", "20 streams at 20 ms per token", 20, 750, 20),
    Scenario(
        "many", "1,000 streams at 5 events/s", 1000, 210, 200, ramp_s=10, subjects=("provider", "passthrough", "parley")
    ),
    Scenario(
        "replicas", "25 streams at 20 events/s, two replicas", 25, 200, 50, ramp_s=1, subjects=("parley", "elsewhere")
    ),
    Scenario(
        "crowd", "250 streams at 20 events/s, two replicas", 250, 200, 50, ramp_s=3, subjects=("parley", "elsewhere")
    ),
)

# Messages to a provider that thinks long enough for none of its answers to fall into the measuring.
POSTS = 500
_PER_POST_MS = 20
WARM_UP = Scenario("warm", "warm-up", 8, 30, 2)


def chatbots(provider: str, scenarios: tuple[Scenario, ...], posts: int) -> Iterator[str]:
    """The lines of a chatbots file with a chatbot per scenario."""
    yield f'providers: {{demo: {{kind: openai, base_url: "{provider}"}}}}'
    yield "chatbots:"
    models = {scenario.name: scenario.model for scenario in (*scenarios, WARM_UP)}
    models["thinking"] = thinking(posts)
    for name, model in models.items():
        yield f'  {name}: {{flows: {{main: {{provider: demo, model: "{model}"}}}}}}'


def thinking(posts: int) -> str:
    """A model that answers when all of so many messages have come."""
    return f"demo?clock=1&tokens=1&delay_ms=0&first_ms={1000 + posts * _PER_POST_MS}"
