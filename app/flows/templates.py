"""Templates of prompts: `{{name}}` replaced in a single pass by values from a fixed set of names, never evaluated.

Whatever a value holds comes out as it went in, so text of users cannot act as a template (I8).
"""

import re
from collections.abc import Mapping
from functools import lru_cache

_SIMPLE = ("message", "history", "language", "topK")
_NAME = rf"{'|'.join(_SIMPLE)}|(?:output|value)\.[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}"
_PLACEHOLDER = re.compile(rf'\{{\{{[ \t]*(?:({_NAME})|"\{{\{{")[ \t]*\}}\}}')
# What stands where a placeholder should, for the error: as much of the line as it may have been meant to take.
_ATTEMPT = re.compile(r"\{\{[ \t]*([^{}\n]{0,80})\}\}")

_KNOWN = f"Known are {', '.join(_SIMPLE)}, output.FLOW and value.NAME"
_REMEDY = 'to write two braces, write {{"{{"}}'


class TemplateError(ValueError):
    """A text that is no template. `line` counts from 1."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"Line {line}: {why} {_KNOWN}; {_REMEDY}.")
        self.line = line


class Template:
    """A text with placeholders, taken apart once. `names` are those it uses, such as `message` or `output.router`."""

    __slots__ = ("_parts", "_slots", "names")

    def __init__(self, text: str) -> None:
        self._parts: list[str] = []
        self._slots: list[tuple[int, str]] = []
        at = 0
        for found in _PLACEHOLDER.finditer(text):
            self._literal(text, at, found.start())
            self._placeholder(found[1])
            at = found.end()
        self._literal(text, at, len(text))
        self.names = frozenset(name for _, name in self._slots)

    def render(self, values: Mapping[str, str]) -> str:
        """The text with the values in their places; a value that is missing is the empty text."""
        parts = self._parts.copy()
        for index, name in self._slots:
            parts[index] = values.get(name, "")
        return "".join(parts)

    def _literal(self, text: str, start: int, end: int) -> None:
        if (braces := text.find("{{", start, end)) >= 0:
            raise _error(text, braces)
        self._parts.append(text[start:end])

    def _placeholder(self, name: str | None) -> None:
        if name is not None:
            self._slots.append((len(self._parts), name))
        self._parts.append("{{" if name is None else "")


@lru_cache(maxsize=512)
def compiled(text: str) -> Template:
    """The template of a text, kept for the next time: the last 512, none longer than a configuration may be."""
    return Template(text)


def _error(text: str, at: int) -> TemplateError:
    line = text.count("\n", 0, at) + 1
    if attempt := _ATTEMPT.match(text, at):
        return TemplateError(line, f"{{{{{attempt[1].strip()}}}}} is no placeholder.")
    return TemplateError(line, "Two opening braces begin no placeholder.")
