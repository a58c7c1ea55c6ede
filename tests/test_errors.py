"""docs/errors.md lists every stable code there is, with the status it has, and no other."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from app.errors import Misconfigured, ParleyError, to_problem
from app.operations import OPERATIONS
from app.problems import _MethodNotAllowed
from app.providers.provider import ErrorKind, ProviderError

ROOT = Path(__file__).parent.parent
# Codes any route may answer with, which the entries in app/operations therefore leave out.
_EVERYWHERE = {"route_unknown", "method_not_allowed", "internal_error"}
_EVERYWHERE |= {"credentials_missing", "credentials_invalid", "scope_missing", "user_mismatch", "issuer_unavailable"}
_EVERYWHERE |= {"token_invalid", "token_expired", "origin_unknown", "host_unknown", "head_too_large", "head_too_slow"}
_EVERYWHERE |= {"rate_limited", "too_many_failures"}

# Errors with an HTTP status that are never raised while a request is answered.
_NO_ANSWER = {
    "log_unavailable": {"stream"},
    "question_gone": {"stream"},
    "chatbot_version_gone": {"stream"},
    "crashed": {"command"},
}


def _subclasses(root: type[ParleyError]) -> Iterator[type[ParleyError]]:
    yield root
    for child in root.__subclasses__():
        yield from _subclasses(child)


def _calls() -> Iterator[tuple[str, str]]:
    """The name called and its first argument, where that is a text, of every call in app/."""
    for path in (ROOT / "app").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(text)), *_]):
                    yield name, text


def _raised() -> dict[str, set[str]]:
    """The codes in the source, and for each the column "Status" it deserves."""
    classes = {error.__name__: error for error in _subclasses(ParleyError) if error is not ProviderError}
    found: dict[str, set[str]] = defaultdict(set)
    for name, text in _calls():
        if name in ("Failure", "Refused"):
            found[text].add("stream" if name == "Failure" else "command")
        elif name in classes:
            misconfigured = issubclass(classes[name], Misconfigured)
            found[text].add("command" if misconfigured else str(classes[name].status))
    for kind in get_args(ErrorKind):
        found[f"upstream_{kind}"].add("stream")
    return {code: _NO_ANSWER.get(code, places) for code, places in found.items()}


def _documented() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \| (.+) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    found: dict[str, set[str]] = defaultdict(set)
    for code, status, when, remedy in rows:
        assert when.endswith(".")
        assert remedy.endswith(".")
        assert status not in found[code], f"{code} is listed twice"
        found[code].add(status)
    return dict(found)


def test_every_code_is_documented_with_its_status_and_no_other() -> None:
    assert _documented() == _raised()


def test_the_source_is_read_as_thought() -> None:
    assert _MethodNotAllowed in _subclasses(ParleyError)
    assert _raised()["session_busy"] == {"409"}
    assert _raised()["internal_error"] == {"500", "stream"}
    assert _raised()["schema_old"] == {"command"}


def test_the_api_document_names_the_codes_that_exist() -> None:
    named = {
        (code, str(status))
        for operation in OPERATIONS.values()
        for status, codes in operation.problems.items()
        for code in codes
    }
    documented = {(code, status) for code, found in _documented().items() for status in found if status.isdigit()}
    assert {(code, status) for code, status in documented if code not in _EVERYWHERE} == named


def test_no_member_of_the_document_hides_a_fixed_one() -> None:
    problem = to_problem(ParleyError("internal_error", "It broke.", next_id=7), "some-id")
    assert problem == {
        "type": "urn:parley:error:internal_error",
        "title": "Internal error",
        "status": 500,
        "detail": "It broke.",
        "code": "internal_error",
        "error_id": "some-id",
        "success": False,
        "next_id": 7,
    }
