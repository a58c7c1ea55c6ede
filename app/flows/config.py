"""The chatbots file: YAML in, validated data out, errors that name the place and the remedy."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.errors import Misconfigured
from app.providers.provider import Endpoint

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE_LIMIT = 1 << 20

Name = Annotated[str, Field(pattern=f"^{_NAME.pattern}$")]


@dataclass(frozen=True, slots=True)
class Flow:
    """One kind of call: which model of which provider, told what."""

    endpoint: Endpoint
    model: str
    system: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chatbot:
    """One chatbot, complete in itself: what a stream pins by its version. `temperature` are the bounds users have."""

    flow_type: str
    flows: dict[str, Flow]
    temperature: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Chatbot":
        flows = {
            name: Flow(**{**flow, "endpoint": Endpoint(**flow["endpoint"])}) for name, flow in value["flows"].items()
        }
        bounds = value["temperature"]
        return cls(value["flow_type"], flows, (bounds[0], bounds[1]) if bounds else None)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Provider(_Strict):
    kind: Literal["openai"]
    base_url: str
    api_key: str | None = None
    include_usage: bool = True

    @field_validator("base_url")
    @classmethod
    def _url_or_reference(cls, value: str) -> str:
        if not value.startswith(("http://", "https://", "env:")):
            raise ValueError("must be an http(s) URL, or env:NAME to read it from the environment")
        return value

    @field_validator("api_key")
    @classmethod
    def _reference(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("env:", "file:")):
            raise ValueError("must be a reference, env:NAME or file:/path, never the key itself")
        return value


class _Flow(_Strict):
    provider: str
    model: Annotated[str, Field(min_length=1, max_length=256)]
    system: str = ""
    parameters: dict[str, Any] = {}

    @field_validator("parameters")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted({"model", "messages", "stream", "stream_options"} & value.keys()):
            raise ValueError(f"{', '.join(taken)} cannot be set here: Parley sets them")
        return value


class _Allow(_Strict):
    temperature: tuple[float, float] | None = Field(None, strict=False)


class _Chatbot(_Strict):
    flows: dict[Name, _Flow]
    allow: _Allow = _Allow()

    @field_validator("flows")
    @classmethod
    def _main_only(cls, value: dict[str, _Flow]) -> dict[str, _Flow]:
        if set(value) != {"main"}:
            raise ValueError("must hold exactly one flow, named main")
        return value


class _File(_Strict):
    providers: dict[Name, _Provider]
    chatbots: dict[Name, _Chatbot]


def load(path: Path) -> dict[str, Chatbot]:
    """The chatbots of a file by id. Raises Misconfigured naming every mistake at once."""
    try:
        if path.stat().st_size > _FILE_LIMIT:
            raise Misconfigured("configuration_invalid", f"{path} is larger than 1 MiB.")
        return parse(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise Misconfigured("configuration_unreadable", f"{path} cannot be read: {error}") from None


def parse(text: str, source: str = "configuration") -> dict[str, Chatbot]:
    try:
        file = _File.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise Misconfigured("configuration_invalid", f"{source} is not valid YAML: {error}") from None
    except ValidationError as error:
        wrong = "\n".join(f"  {'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors())
        raise Misconfigured("configuration_invalid", f"{source} is not usable:\n{wrong}") from None
    return {chatbot_id: _chatbot(chatbot_id, chatbot, file) for chatbot_id, chatbot in file.chatbots.items()}


def _chatbot(chatbot_id: str, chatbot: _Chatbot, file: _File) -> Chatbot:
    flows = {name: _flow(f"chatbots.{chatbot_id}.flows.{name}", flow, file) for name, flow in chatbot.flows.items()}
    return Chatbot("main", flows, chatbot.allow.temperature)


def _flow(place: str, flow: _Flow, file: _File) -> Flow:
    if (provider := file.providers.get(flow.provider)) is None:
        known = ", ".join(file.providers) or "none"
        raise Misconfigured(
            "configuration_invalid", f"{place}.provider: no provider is named {flow.provider!r} ({known})."
        )
    return Flow(Endpoint(name=flow.provider, **provider.model_dump()), flow.model, flow.system, flow.parameters)
