"""Secrets at rest: what is encrypted is read back with the right key alone, and told apart from what cannot be."""

import re

import pytest
from click.testing import CliRunner
from hypothesis import example, given
from hypothesis import strategies as st

from app.__main__ import main
from app.errors import Misconfigured
from app.flows.shapes import ChoiceShape
from app.safe import NO_SAFE, MasterKey, Safe, is_sealed, sealed_with

_OLD, _NEW = (MasterKey.of(letter * 32) for letter in (b"o", b"n"))
OLD, NEW, BOTH = Safe([_OLD]), Safe([_NEW]), Safe([_NEW, _OLD])
_KEY = "sk-" + "canary" * 6


@given(st.text(min_size=1, max_size=200).filter(lambda text: text.isprintable()))
@example(_KEY)
def test_a_secret_is_read_back_and_is_the_same_text_every_time(secret: str) -> None:
    sealed = OLD.seal(secret, "chatbot")
    assert OLD.open(sealed, "chatbot") == BOTH.resolve(sealed) == secret
    assert sealed == OLD.seal(secret, "chatbot") == OLD.stored(sealed)
    assert is_sealed(sealed)
    assert len(secret) < 8 or secret not in sealed
    assert sealed != OLD.seal(secret, "signing")


@example(-1, "R")  # the same bits
@given(st.integers(0, 200), st.sampled_from("ABYZabyz0189-_:"))
def test_a_changed_value_is_never_read(place: int, other: str) -> None:
    sealed = OLD.seal(_KEY, "chatbot")
    place %= len(sealed)
    changed = sealed[:place] + other + sealed[place + 1 :]
    if changed == sealed:
        return
    with pytest.raises(Misconfigured) as caught:
        OLD.open(changed, "chatbot")
    assert caught.value.code == "secret_unreadable"
    assert changed[20:30] not in caught.value.detail


@pytest.mark.parametrize(
    ("safe", "sealed", "said"),
    [
        (NEW, OLD.seal(_KEY, "chatbot"), f"the master key {_OLD.id}, and PARLEY_MASTER_KEY names other keys"),
        (NO_SAFE, OLD.seal(_KEY, "chatbot"), f"the master key {_OLD.id}, and PARLEY_MASTER_KEY is not set"),
        (OLD, OLD.seal(_KEY, "signing"), "damaged, or was encrypted for something else"),
        (OLD, OLD.seal(_KEY, "chatbot")[:-4], "damaged"),
        (OLD, "enc:2:what", "damaged: it is not of the form"),
        (Safe([MasterKey(_OLD.id, _NEW.cipher)]), OLD.seal(_KEY, "chatbot"), "damaged"),
    ],
    ids=["unknown key", "no key", "other purpose", "cut", "no value", "wrong key"],
)
def test_what_cannot_be_read_says_why(safe: Safe, sealed: str, said: str) -> None:
    with pytest.raises(Misconfigured, match=re.escape(said)) as caught:
        safe.resolve(sealed)
    assert sealed[5:40] not in caught.value.detail


def test_a_renewed_value_is_that_of_the_newest_key() -> None:
    renewed = BOTH.renewed(OLD.seal(_KEY, "chatbot"), "chatbot")
    assert renewed == BOTH.seal(_KEY, "chatbot") == NEW.seal(_KEY, "chatbot")
    assert (sealed_with(renewed), BOTH.newest) == (_NEW.id, _NEW.id)
    with pytest.raises(Misconfigured):
        OLD.resolve(renewed)


@pytest.mark.parametrize("given", ["env:KEY", "file:/run/key"])
def test_references_are_stored_as_they_are(given: str) -> None:
    assert BOTH.stored(given) == NO_SAFE.stored(given) == given


def test_a_key_in_plain_text_is_stored_encrypted_or_refused() -> None:
    assert BOTH.stored(_KEY) == NEW.seal(_KEY, "chatbot")
    assert NO_SAFE.stored(OLD.seal(_KEY, "chatbot")) == OLD.seal(_KEY, "chatbot"), "it cannot be looked into here"
    for value in (_KEY, "enc:1:nonsense"):
        with pytest.raises(Misconfigured, match="reference"):
            NO_SAFE.stored(value)
    # What was meant as something else is nobody's key.
    for value in ("ENV:KEY", "env:a b", "$KEY", "${KEY}", "enc:1:what", "short", f"{_KEY} {_KEY}", "äääääääääää", ""):
        with pytest.raises(Misconfigured, match="reference"):
            BOTH.stored(value)
    with pytest.raises(Misconfigured, match="names other keys"):
        NEW.stored(OLD.seal(_KEY, "chatbot"))


@pytest.mark.parametrize("given", ["c0ffee" * 9, "env:PARLEY_TEST_SHORT", "env:PARLEY_TEST_NONE", "file:/none"])
def test_a_master_key_is_named_and_long(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARLEY_TEST_SHORT", "too-short-canary")
    with pytest.raises(Misconfigured) as caught:
        Safe.of(given)
    assert given.startswith(("env:", "file:")) or given not in caught.value.detail
    assert "canary" not in caught.value.detail


def test_what_is_sent_as_it_is_holds_no_encrypted_value() -> None:
    for parameters in ({"key": OLD.seal(_KEY, "chatbot")}, {"a": [{"b": OLD.seal(_KEY, "chatbot")}]}):
        with pytest.raises(ValueError, match="only api_key is decrypted"):
            ChoiceShape(provider="p", model="m", parameters=parameters)
    assert ChoiceShape(provider="p", model="m", parameters={"stop": ["enc:1:"], "seed": 1}).parameters["seed"] == 1


def test_nothing_shows_a_key() -> None:
    assert "o" * 32 not in repr([OLD, _OLD, vars(OLD)])
    assert not re.search(rb"o{32}", repr(_OLD).encode())


def test_the_commands_make_a_key_and_encrypt_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner(env={"PARLEY_MASTER_KEY": None})
    refused = runner.invoke(main, ["keys", "encrypt"], input=_KEY)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "parley keys generate-master" in refused.stderr
    made = runner.invoke(main, ["keys", "generate-master"])
    monkeypatch.setenv("PARLEY_TEST_MASTER", made.stdout.strip())
    runner = CliRunner(env={"PARLEY_MASTER_KEY": "env:PARLEY_TEST_MASTER"})
    done = runner.invoke(main, ["keys", "encrypt"], input=f"{_KEY}\n")
    assert done.exit_code == 0, done.output
    assert Safe.of("env:PARLEY_TEST_MASTER").resolve(done.stdout.strip()) == _KEY
    for wrong in ("", " \n", "two words", "k" * 9000, "ünicode"):
        refused = runner.invoke(main, ["keys", "encrypt"], input=wrong)
        assert (refused.exit_code, refused.stdout) == (2, "")
