"""A YAML document that remembers where everything stands, so that a mistake can be told with its line.

What it holds is what JSON can hold, and plain words mean what they look like: `no`, `on`, 2024-01-01 and 010 are text.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from yaml.reader import ReaderError

from app.errors import Misconfigured
from app.text import clean

# Aliases make a small document stand for a huge one; what it stands for is counted.
_MOST_NODES = 100_000
_DEEPEST = 64
# So many digits are more than any number that is passed on exactly.
_LONGEST_NUMBER = 20
_MOST_TOLD = 100
# A mistake in words, in characters: names in it may be as long as the document.
LONGEST_MISTAKE = 500

_TAG = "tag:yaml.org,2002:"
# Each is part of what YAML 1.1 means by it, so that a text which another program did not quote is a text here too.
_SCALARS = {
    f"{_TAG}null": (r"(?:~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    f"{_TAG}bool": (r"(?:true|True|TRUE|false|False|FALSE)\Z", [*"tTfF"]),
    f"{_TAG}int": (r"[-+]?(?:0|[1-9][0-9]*)\Z", [*"-+0123456789"]),
    f"{_TAG}float": (r"[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?\Z", [*"-+.0123456789"]),
    f"{_TAG}merge": (r"<<\Z", ["<"]),
    f"{_TAG}str": (r"", []),
}
_COLLECTIONS: dict[type[yaml.Node], str] = {yaml.SequenceNode: f"{_TAG}seq", yaml.MappingNode: f"{_TAG}map"}

Place = Sequence[str | int]


class Document:
    """Raises Misconfigured, with the line, for what is not YAML, names a key twice or stands for too much."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._root: yaml.Node | None = None
        try:
            self.value = self._read(text)
        except (yaml.YAMLError, RecursionError, _NotUsable) as error:
            raise self._refused([_yaml_mistake(error, text)]) from None

    def refused(self, mistakes: Sequence[tuple[Place, str]]) -> Misconfigured:
        """All mistakes at once, each with its line and place."""
        told = sorted((self._line(place), dotted(place), text) for place, text in mistakes)
        return self._refused(
            [f"line {line}: {place}: {text}"[:LONGEST_MISTAKE] for line, place, text in told[:_MOST_TOLD]]
        )

    def _refused(self, lines: Sequence[str]) -> Misconfigured:
        told = "\n".join(f"  {line}" for line in lines)
        return Misconfigured("configuration_invalid", f"{self._source} is not usable:\n{told}")

    def _read(self, text: str) -> Any:
        loader = _Loader(text)
        try:
            self._root = loader.get_single_node()
            _check(self._root)
            return loader.construct_document(self._root) if self._root else None
        finally:
            loader.dispose()

    def _line(self, place: Place) -> int:
        """The line of a place, or of the nearest thing around it that is there."""
        node, line = self._root, 1
        for part in place:
            found = _child(node, part)
            if found is None:
                break
            node, line = found
        return line


class _NotUsable(ValueError):
    pass


def _at(node: yaml.Node, why: str) -> _NotUsable:
    return _NotUsable(f"line {node.start_mark.line + 1}: {why}")


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """By the first character of a scalar."""
    found: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (pattern, beginnings) in _SCALARS.items():
        for first in beginnings:
            found.setdefault(first, []).append((tag, re.compile(pattern)))
    return found


class _Loader(yaml.SafeLoader):
    """Names are text, whatever they look like."""

    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        self.flatten_mapping(node)
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


# -- what may stand in it


def _check(root: yaml.Node | None) -> None:
    for counted, node in enumerate(_walk(root, frozenset()), 1):
        if counted > _MOST_NODES:
            raise _NotUsable(f"it holds over {_MOST_NODES} values, counted with what its aliases stand for")
        if isinstance(node, yaml.ScalarNode):
            _check_scalar(node)
        elif node.tag != _COLLECTIONS[type(node)]:
            raise _at(node, f"the tag {_short(node.tag)} has no meaning here; leave it out")
        if isinstance(node, yaml.MappingNode):
            _check_names(node)


def _walk(node: yaml.Node | None, above: frozenset[int]) -> Iterator[yaml.Node]:
    if node is None:
        return
    if id(node) in above:
        raise _at(node, "what is named here holds itself, by an alias inside of it")
    yield node
    inside = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _walk(child, inside)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            yield from _walk(key, inside)
            yield from _walk(child, inside)


def _check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag not in _SCALARS:
        raise _at(node, f"the tag {_short(node.tag)} has no meaning here; leave it out")
    if not re.match(_SCALARS[node.tag][0], node.value):
        raise _at(node, f"{node.value[:40]!r} is no {_short(node.tag)}; leave the tag out")
    if node.tag == f"{_TAG}int" and len(node.value) > _LONGEST_NUMBER:
        raise _at(node, "the number is too large; put quotes around it if it is meant as text")


def _short(tag: str) -> str:
    return tag.replace(_TAG, "!!")


def _check_names(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _at(key, "a name must be text, not a list or other names")
        if key.value in seen:
            raise _at(key, f"{key.value[:128]!r} is there twice")
        seen.add(key.value)


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        # What was merged in stands before a mapping's own names, which win.
        for key, value in reversed(node.value):
            if key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child = node.value[part]
        return child, child.start_mark.line + 1
    return None


def faults(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[Place, str]]:
    """What no database or provider takes, of a value in JSON's types."""
    if len(place) > _DEEPEST:
        yield place[:8], "is nested too deeply"
    elif isinstance(value, dict):
        for name, member in value.items():
            if clean(name) != name:
                yield place, "a name in it holds U+0000 or half of a character"
            yield from faults(member, (*place, name))
    elif isinstance(value, list):
        for number, member in enumerate(value):
            yield from faults(member, (*place, number))
    elif isinstance(value, str) and clean(value) != value:
        yield place, "holds U+0000 or half of a character"
    elif isinstance(value, int | float) and not -(1 << 63) <= value < 1 << 63:
        yield place, "is a number that is too large"


# -- telling


def dotted(place: Place) -> str:
    """A place in words."""
    return ".".join(map(str, place)) or "file"


def _yaml_mistake(error: Exception, text: str) -> str:
    match error:
        case yaml.MarkedYAMLError(problem_mark=mark) if mark is not None:
            return f"line {mark.line + 1}: not valid YAML: {error.problem}{_remedy(error)}"
        case ReaderError():
            line = text.count("\n", 0, error.position) + 1
            return f"line {line}: not valid YAML: the character U+{ord(text[error.position]):04X}"
        case RecursionError():
            return "it is nested too deeply"
        case _:
            return str(error)


def _remedy(error: yaml.MarkedYAMLError) -> str:
    return "; indent with spaces" if "'\\t'" in str(error.problem) else ""
