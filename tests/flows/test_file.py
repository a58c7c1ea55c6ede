"""The chatbots file: what it may say, and what its mistakes are answered with."""

import json
from pathlib import Path

import pytest

from app.errors import Invalid, Misconfigured
from app.flows import file
from app.flows.wishes import allowed

ROOT = Path(__file__).parents[2]
EXAMPLES = [*sorted((ROOT / "docs/examples").glob("*.yaml")), ROOT / "app/demo/chatbots.yaml"]
GOOD = """
providers:
  p: {kind: openai, base_url: "http://127.0.0.1:1/v1", api_key: env:KEY}
chatbots:
  a: {flows: {main: {provider: p, model: m}}}
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_can_be_applied(path: Path) -> None:
    assert file.load(path)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("kind: openai", "kind: other", "providers.p.kind"),
        ("http://127", "ftp://127", "http(s) URL"),
        ("env:KEY", "sk-123456", "never the key itself"),
        ("env:KEY", "env:DATABASE_URL", "names a secret of this server"),
        ("env:KEY", "env:PARLEY_MASTER_KEY", "names a secret of this server"),
        ('"http://127.0.0.1:1/v1"', "env:PGPASSWORD", "names a secret of this server"),
        ("provider: p", "provider: q", "no provider is named 'q' (p)"),
        ("model: m", "models: m", "chatbots.a.flows.main.model: is missing"),
        ("model: m", "model: m, parameters: {stream: false}", "stream cannot be set here"),
        ("  a:", "  'a b':", "chatbots.a b"),
        ("chatbots:", "chatbots: [", "not valid YAML"),
        ("chatbots:", "chatbot:", "chatbots: is missing"),
    ],
)
def test_mistakes_are_named(old: str, new: str, told: str) -> None:
    with pytest.raises(Misconfigured) as error:
        file.parse(GOOD.replace(old, new, 1), "bots.yaml")
    assert told in error.value.detail
    assert "sk-123456" not in error.value.detail


def test_a_flowise_model_is_a_chatflows_id() -> None:
    wrong = GOOD.replace("kind: openai", "kind: flowise").replace("model: m", "model: a/b")
    with pytest.raises(Misconfigured, match=r"chatbots\.a\.flows\.main\.model: the model of a flowise provider"):
        file.parse(wrong)


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(Misconfigured) as error:
        file.parse("providers: {p: {kind: x, base_url: y}}\nchatbots: {a: {}}")
    assert error.value.detail.count("\n") >= 3


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "large.yaml").write_bytes(b"#" * (2 << 20))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    for name in ("none.yaml", "large.yaml", "binary.yaml", "."):
        with pytest.raises(Misconfigured):
            file.load(tmp_path / name)


# Line 8 is the flow's; a change to what follows begins on line 9.
SHOP = """\
providers:
  p:
    kind: openai
    base_url: http://127.0.0.1:1/v1
chatbots:
  a:
    flows:
      main: {provider: p, model: m}
"""


def refused(text: str) -> list[str]:
    """Every mistake of a text, as it is told."""
    with pytest.raises(Misconfigured) as error:
        file.parse(text, "bots.yaml")
    assert error.value.code == "configuration_invalid"
    title, *mistakes = error.value.detail.splitlines()
    assert title == "bots.yaml is not usable:"
    return [mistake.removeprefix("  ") for mistake in mistakes]


def flow(members: str) -> str:
    return SHOP.replace("model: m}", f"model: m, {members}}}")


def chatbot(members: str, flows: str = "") -> str:
    return f"{SHOP}{flows}    {members}\n"


ROUTER = "      ask: {provider: p, model: m}\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "line 1: file: must be names with values"),
        ("[1, 2]", "line 1: file: must be names with values"),
        (f"{SHOP}---\n{SHOP}", "line 9: not valid YAML: but found another document"),
        (
            SHOP.replace("    flows", "\tflows"),
            "line 7: not valid YAML: found character '\\t' that cannot start any token",
        ),
        (SHOP.replace("model: m", "model: *m"), "line 8: not valid YAML: found undefined alias 'm'"),
        (SHOP.replace("model: m", "model: \x07"), "line 8: not valid YAML: the character U+0007"),
        (f"{SHOP}  a: {{}}\n", "line 9: 'a' is there twice"),
        (f"{SHOP}  'a': {{}}\n", "line 9: 'a' is there twice"),
        (flow("provider: q"), "line 8: 'provider' is there twice"),
        (flow("<<: {stream: true}, <<: {images: true}"), "line 8: '<<' is there twice"),
        (flow("<<: 7"), "line 8: not valid YAML: expected a mapping or list of mappings for merging, but found scalar"),
        (f"{SHOP}  ? [b]\n  : {{}}\n", "line 9: a name must be text, not a list or other names"),
        (chatbot("values: &v {x: *v}"), "line 9: what is named here holds itself, by an alias inside of it"),
        ("chatbots: &a [*a]", "line 1: what is named here holds itself, by an alias inside of it"),
        ("? &a [*a]\n: 1", "line 1: a name must be text, not a list or other names"),
        ("chatbots: " + "[" * 5000, "it is nested too deeply"),
        (flow("parameters: " + "{a: " * 70 + "1" + "}" * 70), "line 8: chatbots.a.flows.main.parameters.a.a.a: "),
        (
            flow("model: !!python/name:os.system x").replace("model: m, ", ""),
            "line 8: the tag !!python/name:os.system ",
        ),
        (flow("parameters: {b: !!binary aGk=}"), "line 8: the tag !!binary has no meaning here; leave it out"),
        (flow("parameters: !!set {a}"), "line 8: the tag !!set has no meaning here; leave it out"),
        (flow("stream: !!bool perhaps"), "line 8: 'perhaps' is no !!bool; leave the tag out"),
        (flow("max_tokens: !!int many"), "line 8: 'many' is no !!int; leave the tag out"),
        (flow("max_tokens: " + "9" * 5000), "line 8: the number is too large; put quotes around it if"),
        (flow("parameters: {seed: 9223372036854775808}"), "line 8: chatbots.a.flows.main.parameters.seed: is a number"),
        (
            flow("parameters: {t: 1.0e+400}"),
            "line 8: chatbots.a.flows.main.parameters.t: is a number that is too large",
        ),
        (flow(r'system: "\0"'), "line 8: chatbots.a.flows.main.system: holds U+0000 or half of a character"),
        (flow(r'parameters: {a: "\ud800"}'), "line 8: chatbots.a.flows.main.parameters.a: holds U+0000 or half"),
        (flow(r'parameters: {"\0": 1}'), "line 8: chatbots.a.flows.main.parameters: a name in it holds U+0000"),
    ],
)
def test_what_is_no_document_is_told_with_its_line(text: str, told: str) -> None:
    (mistake,) = refused(text)
    assert mistake.startswith(told)


@pytest.mark.parametrize("merge", ["*{0}", "{{<<: *{0}}}"])
def test_aliases_that_stand_for_too_much(merge: str) -> None:
    bomb = ["a: &a {x: 1, y: 2, z: 3}"]
    bomb += [
        f"{name}: &{name} [{', '.join([merge.format(of)] * 9)}]" for of, name in zip("abcdef", "bcdefg", strict=True)
    ]
    (mistake,) = refused("\n".join([*bomb, SHOP]))
    assert mistake == "it holds over 100000 values, counted with what its aliases stand for"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (flow("sytem: x"), "line 8: chatbots.a.flows.main.sytem: there is no such member; did you mean system?"),
        (
            flow("qqqqqq: x"),
            "line 8: chatbots.a.flows.main.qqqqqq: there is no such member; there are provider, model,",
        ),
        (
            SHOP.replace("base_url", "baseurl"),
            "line 4: providers.p.baseurl: there is no such member; did you mean base_url?",
        ),
        (chatbot("answer: [main]"), "line 9: chatbots.a.answer: there is no such member; did you mean answers?"),
        (
            chatbot("rules: [{if: {}, flow: main}]"),
            "line 9: chatbots.a.rules.0.if: there is no such member; there are when",
        ),
        (
            chatbot("rules: [{when: {words: [x]}, flow: main}]"),
            "line 9: chatbots.a.rules.0.when.words: there is no such",
        ),
        (
            chatbot("plan: [[{step: answer}]]"),
            "line 9: chatbots.a.plan.0.0.step: there is no such member; there are flow",
        ),
        (
            chatbot("allow: {topk: [1, 2]}"),
            "line 9: chatbots.a.allow.topk: there is no such member; did you mean top_k?",
        ),
        (
            chatbot("markers: {c: {opens: x}}"),
            "line 9: chatbots.a.markers.c.opens: there is no such member; did you mean",
        ),
        (
            chatbot("router: {flows: main}"),
            "line 9: chatbots.a.router.flows: there is no such member; did you mean flow?",
        ),
        (
            flow("fallbacks: [{models: x}]"),
            "line 8: chatbots.a.flows.main.fallbacks.0.models: there is no such member; did",
        ),
        (f"{SHOP}  'a b': {{}}\n", "line 9: chatbots.a b: a name holds only letters, digits, '.', '_' and '-'"),
        (f"{SHOP}  ~: {{}}\n", "line 9: chatbots.~: a name holds only letters"),
        (
            SHOP.replace("model: m", "model: 1.0"),
            "line 8: chatbots.a.flows.main.model: must be text; put quotes around",
        ),
        (
            chatbot("language: true"),
            "line 9: chatbots.a.language: must be text; put quotes around what is meant as text",
        ),
        (flow("top_k: 010"), "line 8: chatbots.a.flows.main.top_k: must be a whole number"),
        (flow("max_tokens: 0x10"), "line 8: chatbots.a.flows.main.max_tokens: must be a whole number"),
        (flow("timeout_s: 1:30"), "line 8: chatbots.a.flows.main.timeout_s: must be a number"),
        (flow("timeout_s: .nan"), "line 8: chatbots.a.flows.main.timeout_s: must be a number"),
        (flow("timeout_s: 2024-01-01"), "line 8: chatbots.a.flows.main.timeout_s: must be a number"),
        (flow("stream: yes"), "line 8: chatbots.a.flows.main.stream: must be true or false"),
        (flow("images: 1"), "line 8: chatbots.a.flows.main.images: must be true or false"),
        (flow("fallbacks: x"), "line 8: chatbots.a.flows.main.fallbacks: must be a list"),
        (flow("parameters: [1]"), "line 8: chatbots.a.flows.main.parameters: must be names with values"),
        (chatbot("allow: everything"), "line 9: chatbots.a.allow: must be names with values"),
        (chatbot("allow: {temperature: 1}"), "line 9: chatbots.a.allow.temperature: must be a list of two numbers"),
        (chatbot("allow: {temperature: [1, 0]}"), "line 9: chatbots.a.allow.temperature: the lower bound comes first"),
        (
            chatbot("plan: [[7]]"),
            "line 9: chatbots.a.plan.0.0: must be the name of a flow, or {flow: NAME} with when or",
        ),
        (
            chatbot("rules: [{when: {keywords: [' ']}, flow: main}]"),
            "line 9: chatbots.a.rules.0.when.keywords.0: must not",
        ),
        (chatbot("on_busy: queue"), "line 9: chatbots.a.on_busy: Input should be 'enqueue', 'reject' or 'interrupt'"),
        (
            flow("template: t@0"),
            "line 8: chatbots.a.flows.main.template: must be the name of a template, or one version",
        ),
        (flow("template: t, system: s"), "line 8: chatbots.a.flows.main: has both system and template: leave one out"),
        (
            flow("context_tokens: 1024"),
            "line 8: chatbots.a.flows.main: context_tokens is what the model reads and writes",
        ),
        (
            flow("system: '{{nobody}}'"),
            "line 8: chatbots.a.flows.main.system: line 1 of the text: {{nobody}} is no plac",
        ),
        (
            flow("prompt: '{{value.x}}'"),
            "line 8: chatbots.a.flows.main.prompt: {{value.x}} is neither in the chatbot's v",
        ),
        (
            flow("prompt: '{{output.x}}'"),
            "line 8: chatbots.a.flows.main: uses the output of 'x', which runs in no earl",
        ),
        (f"templates:\n  t: |\n    one\n    {{{{two\n{SHOP}", "line 2: templates.t: line 2 of the text: Two opening"),
        (f"templates: {{t: 1}}\n{SHOP}", "line 1: templates.t: must be text; put quotes around what is meant as text"),
        (
            flow("fallbacks: [{provider: q, model: m}]"),
            "line 8: chatbots.a.flows.main.fallbacks.0.provider: no provider is",
        ),
        (chatbot("answers: [main, main]"), "line 9: chatbots.a.answers.1: 'main' is there twice"),
        (
            chatbot("rules: [{when: {}, flow: other}]"),
            "line 9: chatbots.a.rules.0.flow: 'other' is not one of the answers (main)",
        ),
        (
            chatbot("router: {flow: ask, outcomes: {Yes: main, 'YES!': main}, default: main}", ROUTER),
            "line 10: chatbots.a.router.outcomes.YES!: is the same as",
        ),
        (
            chatbot("router: {flow: ask, outcomes: {'!': main}, default: main}", ROUTER),
            "line 10: chatbots.a.router.outcomes.!: '!' is no word",
        ),
        (chatbot("plan: [[answer, later]]"), "line 9: chatbots.a.plan.0.1: there is no flow named 'later'"),
        (
            chatbot("markers: {c: {open: '', close: x}}"),
            "line 9: chatbots.a.markers: The opening delimiter of the marker",
        ),
    ],
)
def test_every_mistake_is_told_with_line_place_and_remedy(text: str, told: str) -> None:
    assert [mistake for mistake in refused(text) if mistake.startswith(told)]


@pytest.mark.parametrize(
    "url", ["http://", "env:", "env:A B", "http://me:secret@host", "http://h/?key=secret", "http://a b"]
)
def test_urls_that_lead_nowhere_or_hold_a_secret(url: str) -> None:
    (mistake,) = refused(SHOP.replace("http://127.0.0.1:1/v1", f"'{url}'"))
    assert mistake.startswith("line 4: providers.p.base_url: must be an http(s) URL without credentials")
    assert "secret" not in mistake


def test_all_chatbots_are_looked_at_even_beside_a_broken_one() -> None:
    second = SHOP.partition("chatbots:\n")[2].replace("  a:", "  b:").replace("provider: p", "provider: q")
    third = SHOP.partition("chatbots:\n")[2].replace("  a:", "  c:") + "    answers: [other]\n"
    first = flow("template: t")
    mistakes = refused(f"templates: {{t: '{{{{'}}\n{first}{second}{third}")
    assert [mistake.split(": ")[:2] for mistake in mistakes] == [
        ["line 1", "templates.t"],
        ["line 12", "chatbots.b.flows.main.provider"],
        ["line 16", "chatbots.c.answers.0"],
    ]


def test_a_mistake_is_told_in_few_words_however_long_a_name_is() -> None:
    bot = {"flows": {"m": {"provider": "p" * 90_000, "model": "m"}}}
    with pytest.raises(Misconfigured, match="no provider is named") as in_a_file:
        file.parse(json.dumps({"chatbots": {"b": bot}}))
    with pytest.raises(Misconfigured, match="no provider is named") as alone:
        file.parse_one("b", {"chatbot": bot})
    assert max(len(error.value.detail) for error in (in_a_file, alone)) < 1000


def test_no_more_than_a_hundred_mistakes_are_told() -> None:
    # Two of each flow: it has no provider and no model.
    assert len(refused(SHOP + "".join(f"      f{number}: {{}}\n" for number in range(50)))) == 100
    assert len(refused(SHOP + "".join(f"      f{number}: {{n: 1}}\n" for number in range(50)))) == 100


def test_plain_words_are_what_they_look_like() -> None:
    text = (
        chatbot(
            "router: {flow: ask, outcomes: {yes: main, no: main, 1: main}, default: main}",
            "      2024-01-01: {provider: p, model: 2024-13-45}\n" + ROUTER,
        )
        + "    language: no\n"
    )
    a = file.parse(text).chatbots["a"]
    assert a.router is not None
    assert (a.language, [*a.router.outcomes]) == ("no", ["yes", "no", "1"])
    assert a.flows["2024-01-01"].choices[0].model == "2024-13-45"


def test_merges_and_anchors() -> None:
    text = (
        SHOP.replace("main: {", "main: &main {top_k: 3, ").rstrip()
        + """
      other: {<<: *main, model: n}
    answers: [main, other]
"""
    )
    flows = file.parse(text).chatbots["a"].flows
    assert [(of.choices[0].model, of.top_k) for of in flows.values()] == [("m", 3), ("n", 3)]
    (mistake,) = refused(text.replace("model: n", "model: 7"))
    assert mistake.startswith("line 9: chatbots.a.flows.other.model")


def test_names_that_pydantic_uses_stay_in_the_place() -> None:
    for name in ("str", "StepShape", "plan", "rules", "when"):
        (mistake,) = refused(SHOP.replace("  a:", f"  {name}:").replace("model: m", "model: 7"))
        assert mistake.startswith(f"line 8: chatbots.{name}.flows.main.model: ")
    places = [mistake.split(": ")[1] for mistake in refused(chatbot("plan: [[{flow: answer, when: {image: 7}}]]"))]
    assert places == ["chatbots.a.plan.0.0.when.image"]


def test_temperature_within_the_bounds_a_chatbot_allows() -> None:
    chatbot = file.parse(GOOD.replace("model: m}}", "model: m}}, allow: {temperature: [0, 1]}")).chatbots["a"]
    assert allowed({"temperature": 0.5}, chatbot).temperature == 0.5
    for wrong in (2, -1, True, "0.5", float("nan")):
        with pytest.raises(Invalid, match="between 0 and 1"):
            allowed({"temperature": wrong}, chatbot)
    with pytest.raises(Invalid, match="not top_p"):
        allowed({"top_p": 1}, chatbot)
