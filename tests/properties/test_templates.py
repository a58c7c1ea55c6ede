"""Whatever values hold, they come out as they went in, in their places: rendering is a single pass (I8)."""

from hypothesis import given
from hypothesis import strategies as st

from app.flows.templates import Template, TemplateError

NAMES = ("message", "history", "language", "topK", "output.router", "output.a.b-c_1", "value.tone", "value.message")

# What users may write: anything, often what looks like templates or markers.
said = st.lists(
    st.one_of(
        st.sampled_from(["{{message}}", '{{"{{"}}', "{{", "}}", "{", "}", "[[card:1]]", "%s", "{0}", "\\1", "\\g<1>"]),
        st.sampled_from(NAMES),
        st.text(max_size=5),
    ),
    max_size=6,
).map("".join)

# A template as (source, what it renders to), the second with a name for each placeholder.
literals = st.text(max_size=8).filter(lambda text: "{" not in text).map(lambda text: (text, None, text))
braces = st.sampled_from(['{{"{{"}}', '{{ "{{" }}']).map(lambda text: (text, None, "{{"))
placeholders = st.tuples(st.sampled_from(NAMES), st.sampled_from(["", " ", "\t "])).map(
    lambda pair: (f"{{{{{pair[1]}{pair[0]}{pair[1]}}}}}", pair[0], "")
)
templates = st.lists(st.one_of(literals, braces, placeholders), max_size=12)


@given(templates, st.dictionaries(st.sampled_from(NAMES), said))
def test_values_come_out_verbatim_in_their_places(
    parts: list[tuple[str, str | None, str]], values: dict[str, str]
) -> None:
    template = Template("".join(source for source, _, _ in parts))
    expected = "".join(literal if name is None else values.get(name, "") for _, name, literal in parts)
    assert template.render(values) == expected
    assert template.names == {name for _, name, _ in parts if name is not None}
    assert template.render(values) == expected


@given(st.text('{} \nmesagoutp.k"', max_size=40))
def test_a_text_is_a_template_or_refused_with_a_line_in_it(text: str) -> None:
    line = _refused(text)
    if "{{" not in text:
        assert line is None
    assert line is None or "{{" in text.split("\n")[line - 1]


def _refused(text: str) -> int | None:
    try:
        Template(text)
    except TemplateError as error:
        return error.line
    return None
