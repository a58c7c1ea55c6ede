"""A source as it is configured."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

Kind = Literal["n8n", "langchain", "langchain-postgres", "flowise", "litellm", "proxy"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Source:
    """`dsn` is a reference, env:NAME or file:PATH, never the URL. `code` is what a webhook calls it.

    `columns`: which column is which part, where that is not recognised. `conversation`: where the conversation's id is
    in a proxy's JSON, with dots between names.
    """

    id: str
    dsn: str
    table: str
    kind: Kind | Literal["auto"] = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    conversation: str = ""
    code: str = ""
    client: str = ""
    is_enabled: bool = True

    def to_json(self) -> dict[str, Any]:
        """Without the id."""
        return {name: value for name, value in asdict(self).items() if name != "id"}

    @classmethod
    def from_json(cls, source_id: str, value: Mapping[str, Any]) -> Self:
        return cls(source_id, **value)
