"""Placeholders are replaced once; a text that is no template says where and why, and what to write."""

import pytest

from app.flows.templates import Template, TemplateError, compiled


def test_each_placeholder_is_replaced_by_its_value() -> None:
    template = Template("{{language}}|{{topK}}|{{history}}|{{message}}|{{output.router}}|{{value.tone-2}}")
    values = {
        "language": "de",
        "topK": "5",
        "history": "User: hi",
        "message": "hello",
        "output.router": "billing",
        "value.tone-2": "warm",
    }
    assert template.names == set(values)
    assert template.render(values) == "de|5|User: hi|hello|billing|warm"


def test_a_text_without_placeholders_is_itself() -> None:
    template = Template('{"a": {"b": 1}} {x} }}')
    assert template.names == frozenset()
    assert template.render({"message": "hello"}) == '{"a": {"b": 1}} {x} }}'


def test_a_missing_value_is_empty_and_a_placeholder_may_come_twice() -> None:
    assert Template("<{{message}}{{history}}{{message}}>").render({"message": "a"}) == "<aa>"


def test_spaces_are_allowed_inside_the_braces_and_braces_around_them() -> None:
    assert Template("{{ message }} {{\tmessage}} {{{message}}}").render({"message": "a"}) == "a a {a}"


def test_two_literal_braces_are_written_as_a_placeholder_too() -> None:
    template = Template('{{"{{"}}message}} {{ "{{" }}{{message}}')
    assert template.names == {"message"}
    assert template.render({"message": "a"}) == "{{message}} {{a"


def test_values_are_not_looked_at_again() -> None:
    values = {"message": '{{history}} {{"{{"}} {{', "history": "{{message}}"}
    assert Template("{{message}}/{{history}}").render(values) == '{{history}} {{"{{"}} {{/{{message}}'


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("Hi\n\n{{ mesage }}", 3, "Line 3: {{mesage}} is no placeholder. Known are message, history, language, topK,"),
        ("{{output.}}", 1, "{{output.}} is no placeholder."),
        ("{{output.a b}}", 1, "{{output.a b}} is no placeholder."),
        ("{{output." + "x" * 129 + "}}", 1, "Two opening braces begin no placeholder."),
        ("{{message.x}}", 1, "{{message.x}} is no placeholder."),
        ("{{Message}}", 1, "{{Message}} is no placeholder."),
        ("{{}}", 1, "{{}} is no placeholder."),
        ("{{message}} and\n{{message", 2, "Line 2: Two opening braces begin no placeholder."),
        ("{{\nmessage}}", 1, "Two opening braces begin no placeholder."),
        ("{{{{message}}}}", 1, "Two opening braces begin no placeholder."),
        ("{{", 1, 'output.FLOW and value.NAME; to write two braces, write {{"{{"}}.'),
    ],
)
def test_a_text_that_is_no_template_is_refused_with_its_line_and_the_remedy(text: str, line: int, says: str) -> None:
    with pytest.raises(TemplateError) as refused:
        Template(text)
    assert refused.value.line == line
    assert says in str(refused.value)
    assert isinstance(refused.value, ValueError)


def test_templates_are_compiled_once_and_not_kept_without_bound() -> None:
    assert compiled("{{message}}") is compiled("{{message}}")
    assert compiled.cache_info().maxsize == 512
