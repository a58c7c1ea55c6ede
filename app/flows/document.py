"""A YAML document that remembers where everything stands, so that a mistake can be told with its line."""

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from app.errors import Misconfigured

# Aliases make a small document stand for a huge one; what it stands for is counted.
_MOST_NODES = 100_000

Place = Sequence[str | int]


class Document:
    """Raises Misconfigured, with the line, for what is not YAML, names a key twice or stands for too much."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        loader = yaml.SafeLoader(text)
        try:
            self._root = loader.get_single_node()
            self._check()
            self.value: Any = loader.construct_document(self._root) if self._root else None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            raise self._refused([_yaml_mistake(error)]) from None
        finally:
            loader.dispose()

    def refused(self, mistakes: Sequence[tuple[Place, str]]) -> Misconfigured:
        """All mistakes at once, each with its line and place."""
        return self._refused([f"line {self._line(place)}: {dotted(place)}: {text}" for place, text in mistakes])

    def _refused(self, lines: Sequence[str]) -> Misconfigured:
        told = "\n".join(f"  {line}" for line in lines)
        return Misconfigured("configuration_invalid", f"{self._source} is not usable:\n{told}")

    def _line(self, place: Place) -> int:
        """The line of a place, or of the nearest thing around it that is there."""
        node, line = self._root, 1
        for part in place:
            found = _child(node, part)
            if found is None:
                break
            node, line = found
        return line

    def _check(self) -> None:
        for counted, node in enumerate(_walk(self._root, frozenset()), 1):
            if counted > _MOST_NODES:
                raise ValueError(f"it stands for more than {_MOST_NODES} values")
            if isinstance(node, yaml.MappingNode):
                _check_keys(node)


def _walk(node: yaml.Node | None, above: frozenset[int]) -> Iterator[yaml.Node]:
    if node is None:
        return
    if id(node) in above:
        raise ValueError("it holds itself")
    yield node
    inside = above | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _walk(child, inside)
    elif isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            yield key
            yield from _walk(child, inside)


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
            raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} is there twice")
        seen.add(key.value if isinstance(key.value, str) else id(key))


def _child(node: yaml.Node | None, part: str | int) -> tuple[yaml.Node, int] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return value, key.start_mark.line + 1
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        child = node.value[part]
        return child, child.start_mark.line + 1
    return None


def dotted(place: Place) -> str:
    """A place in words."""
    return ".".join(map(str, place)) or "file"


def _yaml_mistake(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: not valid YAML: {error.problem}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"not valid YAML: {error}" if isinstance(error, yaml.YAMLError) else str(error)
