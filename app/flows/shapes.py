"""The shapes of the chatbots file, member by member, and its mistakes in words that help.

docs/chatbots.md describes every member; a test compares the two.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from app.conversations.sources.recognition import PART_NAMES
from app.conversations.sources.source import Wanted
from app.conversations.sources.table import TableName
from app.errors import Misconfigured
from app.flows.config import ANSWER_TOKENS, OnBusy
from app.flows.document import Place
from app.providers.provider import Kind, LimitName
from app.references import is_reference
from app.safe import NO_SAFE, is_sealed

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_TEMPLATE = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}(@[1-9][0-9]{0,8})?$"
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*")
# The server's own secrets: whoever may replace a chatbot must not have them sent to a provider of their own.
_OURS = re.compile(
    r"env:(DATABASE_URL|PG[A-Z]+|PARLEY_(LISTEN_URL|MASTER_KEY|SIGNING_KEYS?|\w+_SECRETS?))", re.IGNORECASE
)

Name = Annotated[str, Field(pattern=_NAME)]
Text = Annotated[str, Field(max_length=64 << 10)]
Words = Annotated[list[Annotated[str, Field(pattern=r"\S", max_length=200)]], Field(max_length=200)]
Model = Annotated[str, Field(min_length=1, max_length=256)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Daily = Annotated[int, Field(ge=1, le=10**15)]
TopK = Annotated[int, Field(ge=1, le=10_000)]
Seconds = Annotated[float, Field(gt=0, le=86400)]


def _is_url(value: str) -> bool:
    try:
        url = urlsplit(value)
        return (
            url.scheme in ("http", "https")
            and bool(url.hostname)
            and url.port != 0
            and not (url.username or url.password or url.query or url.fragment or re.search(r"\s", value))
        )
    except ValueError:
        return False


def _holds_sealed(value: Any) -> bool:
    match value:
        case str():
            return is_sealed(value)
        case dict():
            return any(map(_holds_sealed, value.values()))
        case list():
            return any(map(_holds_sealed, value))
    return False


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ProviderShape(_Strict):
    kind: Kind
    base_url: str
    api_key: str | None = None
    include_usage: bool = True
    limit_name: LimitName = "max_completion_tokens"

    @field_validator("base_url")
    @classmethod
    def _url_or_reference(cls, value: str) -> str:
        _refuse_ours(value)
        if not (_ENV.fullmatch(value) or _is_url(value)):
            raise ValueError(
                "must be an http(s) URL without credentials, ? and #, or env:NAME to read it from the environment"
            )
        return value

    @field_validator("api_key")
    @classmethod
    def _stored(cls, value: str | None, info: ValidationInfo) -> str | None:
        """As it may be stored; the safe is the context."""
        _refuse_ours(value or "")
        try:
            return None if value is None else (info.context or NO_SAFE).stored(value)
        except Misconfigured as error:
            raise ValueError(error.detail) from None


def _refuse_ours(reference: str) -> None:
    if _OURS.fullmatch(reference):
        raise ValueError("names a secret of this server, which no provider may be told; name a variable of its own")


class ChoiceShape(_Strict):
    provider: str
    model: Model
    parameters: dict[str, Any] = {}

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"model", "messages", "stream", "stream_options"} & value.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here: Parley sets them")
        if _holds_sealed(value):
            raise ValueError("holds an encrypted value, and would be sent as it is: only api_key is decrypted")
        return value


class FlowShape(ChoiceShape):
    fallbacks: Annotated[list[ChoiceShape], Field(max_length=10)] = []
    system: Text = ""
    template: Annotated[str, Field(pattern=_TEMPLATE)] | None = None
    prompt: Text = "{{message}}"
    stream: bool | None = None
    output: Literal["text", "json"] = "text"
    images: bool = False
    history: Annotated[int, Field(ge=0, le=10_000)] | None = None
    context_tokens: Count | None = None
    max_tokens: Count | None = None
    timeout_s: Seconds | None = None
    top_k: TopK | None = None
    on_break: Literal["restart", "fail"] = "restart"

    @model_validator(mode="after")
    def _one_system(self) -> "FlowShape":
        if self.system and self.template:
            raise ValueError("has both system and template: leave one out")
        return self

    @model_validator(mode="after")
    def _room(self) -> "FlowShape":
        if self.context_tokens is not None and self.context_tokens <= (self.max_tokens or ANSWER_TOKENS):
            raise ValueError(
                "context_tokens is what the model reads and writes together: it must be more than the "
                f"{self.max_tokens or ANSWER_TOKENS} that max_tokens keeps free for the answer"
            )
        return self


class ConditionShape(_Strict):
    image: bool | None = None
    language: Words = []
    keywords: Words = []
    output: Annotated[dict[Name, Words], Field(max_length=20)] = {}


class RuleShape(_Strict):
    when: ConditionShape
    flow: str

    @field_validator("when")
    @classmethod
    def _known_at_once(cls, value: ConditionShape) -> ConditionShape:
        if value.output:
            raise ValueError("a rule decides before anything is asked: it cannot look at outputs (use the router)")
        return value


class RouterShape(_Strict):
    flow: str
    outcomes: Annotated[dict[str, str], Field(min_length=1, max_length=100)]
    default: str
    speculative: bool = False


class StepShape(_Strict):
    flow: str
    when: ConditionShape = ConditionShape()
    on_failure: Literal["continue", "fail"] = "continue"


class MarkerShape(_Strict):
    open: str
    close: str


class AllowShape(_Strict):
    temperature: Annotated[tuple[float, float], Field(strict=False)] | None = None
    top_k: Annotated[tuple[TopK, TopK], Field(strict=False)] | None = None
    languages: Words = []
    values: Annotated[list[Name], Field(max_length=100)] = []
    flow_type: bool = False


class ChatbotShape(_Strict):
    flows: Annotated[dict[Name, FlowShape], Field(min_length=1, max_length=50)]
    answers: Annotated[list[str], Field(min_length=1, max_length=50)] | None = None
    rules: Annotated[list[RuleShape], Field(max_length=100)] = []
    router: RouterShape | None = None
    plan: Annotated[list[list[str | StepShape]], Field(max_length=20)] | None = None
    markers: dict[Name, MarkerShape] = {}
    language: Annotated[str, Field(max_length=64)] = ""
    values: dict[Name, Text] = {}
    allow: AllowShape = AllowShape()
    on_busy: OnBusy = "enqueue"
    cancel_when_abandoned_s: Seconds | None = None
    keep_sessions_days: Annotated[float, Field(gt=0, le=36500)] | None = None
    daily_messages: Daily | None = None
    daily_tokens: Daily | None = None


class SourceShape(_Strict):
    dsn: str
    table: str
    kind: Wanted = "auto"
    columns: Annotated[dict[str, Annotated[str, Field(min_length=1, max_length=63)]], Field(max_length=20)] = {}
    conversation: Annotated[str, Field(max_length=200)] = ""
    code: Name | None = None
    client: Name | None = None
    enabled: bool = True

    @field_validator("dsn")
    @classmethod
    def _reference(cls, value: str) -> str:
        if not is_reference(value):
            # Never the value itself, which holds a password.
            raise ValueError("must be a reference, env:NAME or file:/path, never the URL itself")
        return value

    @field_validator("columns")
    @classmethod
    def _parts(cls, value: dict[str, str]) -> dict[str, str]:
        if unknown := sorted(value.keys() - PART_NAMES):
            raise ValueError(f"there is no part {', '.join(unknown)}; there are {', '.join(sorted(PART_NAMES))}")
        return value

    @field_validator("table")
    @classmethod
    def _table(cls, value: str) -> str:
        TableName.of(value)
        return value


class FileShape(_Strict):
    providers: dict[Name, ProviderShape] = {}
    templates: dict[Name, Text] = {}
    chatbots: dict[Name, ChatbotShape]
    sources: Annotated[dict[Name, SourceShape], Field(max_length=200)] = {}


def told(error: ValidationError) -> list[tuple[Place, str]]:
    """Every mistake with its place in the file."""
    found = [(mistake, _place(mistake["loc"])) for mistake in error.errors() if not _is_other_branch(mistake["loc"])]
    return [(place, _said(place, mistake)) for mistake, place in found]


def _is_step(loc: Sequence[str | int]) -> bool:
    return len(loc) > 5 and loc[2] == "plan"


def _is_other_branch(loc: Sequence[str | int]) -> bool:
    """A step is a name or a mapping, and pydantic tells of both what is wrong with it; the mapping's says more."""
    return _is_step(loc) and loc[5] == "str"


def _place(loc: Sequence[str | int]) -> Place:
    """Without what pydantic adds: the branch that it tried, and the mark of a name."""
    place = [*loc[:5], *loc[6:]] if _is_step(loc) else [*loc]
    return place[:-1] if place[-1:] == ["[key]"] else place


_SAID = {
    "missing": "is missing",
    "string_type": "must be text; put quotes around what is meant as text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list of two numbers, the lower bound first",
    "dict_type": "must be names with values",
    "model_type": "must be names with values",
}


def _said(place: Place, mistake: Any) -> str:
    match mistake["type"]:
        case "model_type" if place[2:3] == ["plan"] and len(place) == 5:
            return "must be the name of a flow, or {flow: NAME} with when or on_failure"
        case "extra_forbidden":
            return _unknown(place)
        case "string_pattern_mismatch" if mistake["ctx"]["pattern"] == _NAME:
            return "a name holds only letters, digits, '.', '_' and '-', at most 128, and begins with a letter or digit"
        case "string_pattern_mismatch" if mistake["ctx"]["pattern"] == _TEMPLATE:
            return "must be the name of a template, or one version of it: name@2"
        case "string_pattern_mismatch":
            return "must not be blank"
        case kind:
            return _SAID.get(kind) or str(mistake["msg"]).removeprefix("Value error, ")


def _unknown(place: Place) -> str:
    known = list(shape_at(place[:-1]).model_fields)
    close = get_close_matches(str(place[-1]), known, 1)
    return "there is no such member; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")


def shape_at(place: Place) -> type[BaseModel]:
    """The shape that the members at a place have."""
    match list(place):
        case []:
            return FileShape
        case ["providers", _]:
            return ProviderShape
        case ["sources", _]:
            return SourceShape
        case ["chatbots", _]:
            return ChatbotShape
        case [_, _, "flows", _]:
            return FlowShape
        case [*_, "fallbacks", _]:
            return ChoiceShape
        case [_, _, "markers", _]:
            return MarkerShape
        case [_, _, "rules", _]:
            return RuleShape
        case [_, _, "plan", _, _]:
            return StepShape
        case [_, _, "router"]:
            return RouterShape
        case [_, _, "allow"]:
            return AllowShape
        case _:
            return ConditionShape
