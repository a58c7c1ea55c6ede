"""What the `configuration` of a request may set: what the chatbot allows, and nothing else (I12)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from app.errors import Invalid
from app.flows.config import Allow, Chatbot

_LONGEST_VALUE = 4096
# What an error repeats of names that strangers chose: so many, and so many characters of each.
_MOST_TOLD = 10
_LONGEST_TOLD = 64


@dataclass(frozen=True, slots=True)
class Wishes:
    """None and empty: as the chatbot has it."""

    temperature: float | None = None
    top_k: Mapping[str, int] = field(default_factory=dict)
    language: str = ""
    values: Mapping[str, str] = field(default_factory=dict)
    flow_type: str | None = None


def allowed(wanted: Mapping[str, Any], chatbot: Chatbot) -> Wishes:
    """Raises Invalid, naming what may be set, for everything that is not allowed or out of bounds."""
    allow = chatbot.allow
    may = _names(allow)
    if refused := sorted(wanted.keys() - set(may)):
        told = ", ".join(name[:_LONGEST_TOLD] for name in refused[:_MOST_TOLD])
        raise _refused(f"may set {', '.join(may) or 'nothing'} for this chatbot, not {told}.")
    return Wishes(
        _temperature(wanted.get("temperature"), allow),
        _top_k(wanted.get("topKSettings"), chatbot),
        _language(wanted.get("language"), chatbot),
        _values(wanted.get("values"), allow),
        _flow_type(wanted.get("flow_type"), chatbot),
    )


def _names(allow: Allow) -> list[str]:
    members = {
        "temperature": allow.temperature,
        "topKSettings": allow.top_k,
        "language": allow.languages,
        "values": allow.values,
        "flow_type": allow.flow_type,
    }
    return [name for name, permission in members.items() if permission]


def _temperature(value: Any, allow: Allow) -> float | None:
    if value is None or allow.temperature is None:
        return None
    low, high = allow.temperature
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise _refused(f".temperature must lie between {low:g} and {high:g}.")
    return value


def _top_k(value: Any, chatbot: Chatbot) -> dict[str, int]:
    if value is None or chatbot.allow.top_k is None:
        return {}
    low, high = chatbot.allow.top_k
    if not isinstance(value, dict) or value.keys() - chatbot.flows.keys():
        raise _refused(".topKSettings must be an object of this chatbot's flows and their topK.")
    if any(type(number) is not int or not low <= number <= high for number in value.values()):
        raise _refused(f".topKSettings must hold whole numbers between {low} and {high}.")
    return value


def _language(value: Any, chatbot: Chatbot) -> str:
    if value is None:
        return chatbot.language
    if value not in chatbot.allow.languages:
        raise _refused(f".language must be one of {', '.join(chatbot.allow.languages)}.")
    return str(value)


def _values(value: Any, allow: Allow) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or value.keys() - set(allow.values):
        raise _refused(f".values may hold {', '.join(allow.values)}.")
    if any(not isinstance(text, str) or len(text) > _LONGEST_VALUE for text in value.values()):
        raise _refused(f".values must hold texts of at most {_LONGEST_VALUE} characters.")
    return value


def _flow_type(value: Any, chatbot: Chatbot) -> str | None:
    if value is None:
        return None
    if value not in chatbot.answers:
        raise _refused(f".flow_type must be one of {', '.join(chatbot.answers)}.")
    return str(value)


def _refused(what: str) -> Invalid:
    space = "" if what.startswith(".") else " "
    return Invalid("configuration_refused", f"configuration{space}{what}")
