"""Users' tokens of a real issuer: who gets in, who does not, and what that costs the issuer."""

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jwt.algorithms import RSAAlgorithm

from app.access.issuer import Issuer, from_file, from_secret, from_url
from app.access.issuer_keys import ALGORITHMS, Keys, find, parse
from app.access.user_tokens import Expected, UserTokens, user_tokens
from app.demo import demo_provider
from app.errors import Misconfigured, Unauthorized, Unavailable
from app.settings import Settings, load
from tests.access.issuer import AUDIENCE, NAME, LocalIssuer, claims, jwk, local_issuer, private_key, token
from tests.access.test_guard import bearer, key_with
from tests.serving import apply_demo, serving
from tests.sse import frames

_ALLOWED = frozenset({"RS256", "ES256", "EdDSA"})
_EXPECTED = Expected(NAME, (AUDIENCE,), (), _ALLOWED, 30, frozenset({"process", "read", "sync"}))
_SECRET = "s" * 20 + "-canary-" + "t" * 20


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def _running(issuer: Issuer) -> AsyncGenerator[set[str], None]:
    """What fails, while the issuer's loop runs."""
    failing: set[str] = set()
    task = asyncio.create_task(issuer.run(failing))
    try:
        yield failing
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def local() -> AsyncGenerator[LocalIssuer, None]:
    async with local_issuer() as local:
        yield local


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def tokens(local: LocalIssuer, clock: Clock) -> AsyncGenerator[UserTokens, None]:
    issuer = Issuer(from_url(local.url, _ALLOWED), clock=clock)
    async with _running(issuer):
        yield UserTokens(issuer, _EXPECTED)


async def _refusal(tokens: UserTokens, text: str) -> str:
    with pytest.raises(Unauthorized) as caught:
        await tokens.principal(text)
    assert caught.value.code == "credentials_invalid"
    for part in text.split("."):
        assert len(part) < 8 or part not in caught.value.detail
    assert caught.value.__cause__ is None
    return caught.value.detail


def _encoded(part: object) -> str:
    given = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(given).rstrip(b"=").decode()


def _public_pem(kid: str = "one", algorithm: str = "RS256") -> bytes:
    return private_key(kid, algorithm).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _hmac_with_the_public_key() -> str:
    """As an attacker makes it, whom no library stops."""
    import hmac

    head = f"{_encoded({'alg': 'HS256', 'typ': 'JWT', 'kid': 'one'})}.{_encoded(claims())}"
    return f"{head}.{_encoded(hmac.digest(_public_pem(), head.encode(), 'sha256'))}"


# Signatures take their time on a busy machine.
_unhurried = hypothesis_settings(deadline=None)


# -- who gets in


@pytest.mark.parametrize(("kid", "algorithm"), [("one", "RS256"), ("two", "ES256"), ("three", "EdDSA")])
async def test_a_good_token_is_its_user(tokens: UserTokens, kid: str, algorithm: str) -> None:
    principal = await tokens.principal(token(kid, algorithm, sub="user|ann@example.com"))
    assert (principal.kind, principal.user_id, principal.id) == (
        "user",
        "user|ann@example.com",
        f"user:{principal.user_id}",
    )
    assert principal.scopes == {"process", "read", "sync"}


@pytest.mark.parametrize(
    ("named", "scopes"),
    [
        ({"scope": "openid parley:read"}, {"read"}),
        ({"scope": "read index"}, {"read", "index"}),
        ({"scp": ["process", 7, "x"]}, {"process"}),
        ({"scope": "read", "scp": "sync"}, {"read", "sync"}),
        ({"scope": "openid admin"}, {"process", "read", "sync"}),
        ({"scope": "parley:admin"}, {"admin"}),
        ({"scope": {"read": 1}, "scp": 5}, {"process", "read", "sync"}),
    ],
)
async def test_scopes_are_the_tokens_own_or_the_usual_ones(
    tokens: UserTokens, named: dict[str, Any], scopes: set[str]
) -> None:
    assert (await tokens.principal(token(**named))).scopes == scopes


async def test_clocks_may_differ_a_little(tokens: UserTokens) -> None:
    now = int(time())
    await tokens.principal(token(exp=now - 10))
    await tokens.principal(token(nbf=now + 10, iat=now + 10))


async def test_the_application_is_checked_where_the_issuer_names_it(tokens: UserTokens) -> None:
    apps = UserTokens(tokens.issuer, replace(_EXPECTED, audiences=(), parties=("https://chat.example", "app")))
    assert await apps.principal(token(azp="app", aud=None))
    assert await apps.principal(token(azp="https://chat.example", aud="whatever"))
    for azp in ("other", "", None, ["app"], 5):
        if not isinstance(azp, list):
            assert "azp" in await _refusal(apps, token(azp=azp, aud=None))
    both = UserTokens(tokens.issuer, replace(_EXPECTED, parties=("app",)))
    assert await both.principal(token(azp="app"))
    await _refusal(both, token(azp="app", aud="other"))


# -- who does not (A1)

_NOW = int(time())
_BAD: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "words": lambda: "not a token",
    "dots": lambda: "..",
    "beyond ASCII": lambda: "é.è.ü",
    "expired": lambda: token(exp=_NOW - 3600),
    "without an end": lambda: token(exp=None),
    "an end that is no number": lambda: token(exp="soon"),
    "not yet": lambda: token(nbf=_NOW + 3600),
    "issued tomorrow": lambda: token(iat=_NOW + 86400),
    "wrong audience": lambda: token(aud="other"),
    "wrong audiences": lambda: token(aud=["other", "parley2"]),
    "no audience": lambda: token(aud=None),
    "wrong issuer": lambda: token(iss="https://issuer.example"),
    "no issuer": lambda: token(iss=None),
    "no user": lambda: token(sub=None),
    "an empty user": lambda: token(sub=""),
    "a user of control characters": lambda: token(sub="an\nn"),
    "a user that ends in a line feed": lambda: token(sub="ann\n"),
    "half an emoji": lambda: token(sub="ann\ud83d"),
    "a user that was replaced": lambda: token(sub="ann\ufffd"),
    "a long user": lambda: token(sub="a" * 257),
    "alg none": lambda: jwt.encode(claims(), "", "none"),
    "alg None with a kid": lambda: f"{_encoded({'alg': 'None', 'kid': 'one'})}.{_encoded(claims())}.",
    "no alg": lambda: f"{_encoded({'typ': 'JWT', 'kid': 'one'})}.{_encoded(claims())}.{_encoded(b'x' * 256)}",
    "alg a list": lambda: f"{_encoded({'alg': ['RS256']})}.{_encoded(claims())}.{_encoded(b'x' * 256)}",
    "HS256 with the public key": _hmac_with_the_public_key,
    "HS256": lambda: jwt.encode(claims(), _SECRET, "HS256", headers={"kid": "one"}),
    "an allowed algorithm of another key": lambda: token("two", "ES256", {"kid": "one"}),
    "PS256, which is not allowed": lambda: jwt.encode(claims(), private_key("one", "RS256"), "PS256", {"kid": "one"}),
    "another key of the same name": lambda: jwt.encode(claims(), private_key("x", "RS256"), "RS256", {"kid": "one"}),
    "unknown kid": lambda: token("stranger"),
    "a kid that is no text": lambda: f"{_encoded({'alg': 'RS256', 'kid': 5})}.{_encoded(claims())}.{_encoded(b'x')}",
    "a kid like a path": lambda: token("../../dev/null"),
    "jku": lambda: token(headers={"jku": "https://evil.example/jwks.json"}),
    "x5u": lambda: token(headers={"x5u": "https://evil.example/x.pem"}),
    "jwk": lambda: token("evil", headers={"kid": "one", "jwk": jwk("evil", "RS256")}),
    "crit": lambda: token(headers={"crit": ["exp"], "exp": 1}),
    "another type": lambda: token(headers={"typ": "logout+jwt"}),
    "a changed claim": lambda: _with_payload({**claims(), "sub": "bob"}),
    "no object": lambda: _with_payload([1]),
    "five parts": lambda: f"{token()}.a.b",
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "a deep header": lambda: f"{_encoded(b'[' * 5000)}.e30.e30",
    "a long number": lambda: _encoded(b'{"alg":' + b"9" * 5000 + b"}") + ".e30.e30",
    "a large one": lambda: token(more="x" * 9000),
    "an API key": lambda: f"parley_{'0' * 16}_{'0' * 64}",
}


def _with_payload(payload: object) -> str:
    head, _, signature = token().split(".")
    return f"{head}.{_encoded(payload)}.{signature}"


@pytest.mark.parametrize("bad", _BAD.values(), ids=_BAD.keys())
async def test_a_bad_token_is_refused(tokens: UserTokens, bad: Callable[[], str]) -> None:
    await tokens.principal(token())
    await _refusal(tokens, bad())


@_unhurried
@given(data=st.data())
def test_a_changed_token_is_refused_or_still_says_the_same(data: st.DataObject) -> None:
    """Whatever is done to it: Unauthorized, and no other error."""
    text = list(_GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(text)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.text(st.characters(max_codepoint=255), max_size=3))
    _refused_or_ann("".join(text))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_names = st.sampled_from(["exp", "nbf", "iat", "aud", "iss", "sub", "scope", "scp", "azp", "jti"])


@_unhurried
@given(headers=st.dictionaries(st.sampled_from(["alg", "kid", "typ", "crit", "b64", "jku", "x"]), _json, max_size=4))
def test_any_header_is_refused(headers: dict[str, Any]) -> None:
    _, payload, signature = _GOOD.split(".")
    _refused_or_ann(f"{_encoded({'alg': 'RS256', 'kid': 'one', **headers, 'y': 1})}.{payload}.{signature}")


@_unhurried
@given(changes=st.dictionaries(_names, _json, min_size=1, max_size=3))
def test_no_claim_crashes_even_well_signed(changes: dict[str, Any]) -> None:
    text = _signed({**claims(), **changes})
    try:
        principal = asyncio.run(_fixed().principal(text))
    except Unauthorized:
        return
    assert principal.user_id == ({**claims(), **changes})["sub"]


def _signed(payload: dict[str, Any]) -> str:
    """Without the checks of the library that signs."""
    return jwt.PyJWS().encode(json.dumps(payload).encode(), private_key("three", "EdDSA"), "EdDSA", {"kid": "three"})


def _fixed() -> UserTokens:
    async def read() -> Keys:
        return _KEYS

    issuer = Issuer(read)
    asyncio.run(issuer.run_once())
    return UserTokens(issuer, _EXPECTED)


def _refused_or_ann(text: str) -> None:
    try:
        principal = asyncio.run(_fixed().principal(text))
    except Unauthorized:
        return
    assert principal.user_id == "ann"


_GOOD = token("one", "RS256", exp=_NOW + 86400)
_KEYS = parse(json.dumps({"keys": [jwk("one", "RS256"), jwk("three", "EdDSA")]}).encode(), _ALLOWED)


# -- what it costs the issuer (A2, A3)


async def test_ten_thousand_strangers_make_the_issuer_asked_once(
    local: LocalIssuer, tokens: UserTokens, clock: Clock
) -> None:
    await tokens.principal(token())
    assert local.fetches == 1
    _, payload, signature = token().split(".")
    for number in range(10_000):
        await _refusal(tokens, f"{_encoded({'alg': 'RS256', 'kid': f'{number}'})}.{payload}.{signature}")
    assert local.fetches == 1
    clock.now += 30
    strangers = [f"{_encoded({'alg': 'RS256', 'kid': secrets.token_hex(8)})}.{payload}.{signature}" for _ in range(500)]
    await asyncio.gather(*(_refusal(tokens, stranger) for stranger in strangers))
    await tokens.principal(token())
    assert local.fetches == 2


async def test_an_algorithm_that_is_not_allowed_makes_nobody_look(
    local: LocalIssuer, tokens: UserTokens, clock: Clock
) -> None:
    await tokens.principal(token())
    clock.now += 30
    assert "algorithm" in await _refusal(tokens, jwt.encode(claims(), _SECRET, "HS256", {"kid": "stranger"}))
    await tokens.principal(token())
    assert local.fetches == 1


async def test_a_new_key_is_found_without_waiting_for_the_next_round(
    local: LocalIssuer, tokens: UserTokens, clock: Clock
) -> None:
    await tokens.principal(token())
    local.document = json.dumps({"keys": [jwk("new", "RS256")]}).encode()
    await _refusal(tokens, token("new"))  # so soon after the last look
    clock.now += 30
    many = await asyncio.gather(*(tokens.principal(token("new", sub=f"u{i}")) for i in range(20)))
    assert {principal.user_id for principal in many} == {f"u{i}" for i in range(20)}
    assert local.fetches == 2


async def test_a_withdrawn_key_takes_its_remembered_tokens_along(
    local: LocalIssuer, tokens: UserTokens, clock: Clock
) -> None:
    known = token()
    await tokens.principal(known)
    local.document = json.dumps({"keys": [jwk("two", "ES256")]}).encode()
    clock.now += 30
    await tokens.principal(token("two", "ES256"))
    await _refusal(tokens, token("fresh"))
    await _refusal(tokens, known)


@pytest.mark.parametrize("how", ["500", "redirect", "garbage", "empty", "huge", "away"])
async def test_keys_are_kept_for_a_day_while_the_issuer_is_down(clock: Clock, how: str) -> None:
    async with local_issuer() as local:
        issuer = Issuer(from_url(local.url, _ALLOWED), clock=clock)
        await issuer.run_once()
        tokens = UserTokens(issuer, _EXPECTED)
        good = local.document
        match how:
            case "500":
                local.status = "500 Oops"
            case "redirect":
                local.status, local.extra = "302 Found", f"Location: {local.url}\r\n"
            case "garbage":
                local.document = b"<html>"
            case "empty":
                local.document = b'{"keys": []}'
            case "huge":
                local.document = good[:-1] + b" " * 300_000 + b"}"
            case "away":
                local.url = ""
        if how != "away":
            await _fails(issuer)
            assert local.fetches == 2
    clock.now += 23.9 * 3600
    await _fails(issuer)
    await tokens.principal(token())
    await _refusal(tokens, token("stranger"))
    clock.now += 0.2 * 3600
    await _fails(issuer)
    with pytest.raises(Unavailable) as caught:
        await tokens.principal(token())
    assert caught.value.code == "issuer_unavailable"


async def _fails(issuer: Issuer) -> None:
    with pytest.raises((ValueError, httpx2.TransportError)):
        await issuer.run_once()


async def test_without_any_key_nobody_is_refused_for_good(local: LocalIssuer, clock: Clock) -> None:
    local.status = "503 Busy"
    issuer = Issuer(from_url(local.url, _ALLOWED), clock=clock)
    async with _running(issuer) as failing:
        tokens = UserTokens(issuer, _EXPECTED)
        with pytest.raises(Unavailable):
            await tokens.principal(token())
        assert failing == {"issuer keys"}
        local.status = "200 OK"
        clock.now += 30
        await tokens.principal(token())
    assert local.fetches == 2


# -- what is remembered


async def test_verified_tokens_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read() -> Keys:
        return _KEYS

    issuer = Issuer(read)
    await issuer.run_once()
    tokens = UserTokens(issuer, _EXPECTED, remembered=3)
    texts = [token(sub=f"u{i}", exp=_NOW + 86400) for i in range(5)]
    made = [await tokens.principal(text) for text in texts]
    again = [await tokens.principal(text) for text in reversed(texts)]
    assert [one is other for one, other in zip(reversed(made), again, strict=True)] == [True] * 3 + [False] * 2
    assert len(tokens._known) == 3
    assert not any(text.encode() in digest for text in texts for digest in tokens._known)
    monkeypatch.setattr("app.access.user_tokens.time", lambda: _NOW + 86400.0)
    assert all(tokens._recall(digest) is None for digest in tokens._known)


# -- keys


def test_only_public_keys_for_signatures_of_good_size_are_taken() -> None:
    small = generate_private_key(public_exponent=65537, key_size=1024).public_key()
    good = jwk("one", "RS256")
    bad = [
        {**good, "use": "enc"},
        {**good, "key_ops": ["encrypt"]},
        {**good, "key_ops": 5},
        {**good, "kid": 5},
        {**good, "alg": "RSA-OAEP"},
        {**good, "alg": "HS256"},
        {**good, "d": "AQAB"},
        {**good, "n": 5},
        {**good, "n": "!"},
        {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"},
        {"kty": "strange"},
        {**RSAAlgorithm.to_jwk(small, as_dict=True), "kid": "small"},
        "text",
        None,
    ]
    for one in bad:
        with pytest.raises(ValueError, match="no usable"):
            parse(json.dumps({"keys": [one]}).encode(), ALGORITHMS)
    (key,) = parse(json.dumps({"keys": [*bad, good]}).encode(), ALGORITHMS)
    assert (key.kid, key.algorithms) == ("one", frozenset({"RS256"}))
    with pytest.raises(ValueError, match="no usable"):
        parse(json.dumps({"keys": [good]}).encode(), {"ES256"})
    with pytest.raises(ValueError, match="list"):
        parse(json.dumps({"keys": [good] * 101}).encode(), ALGORITHMS)


def test_a_key_is_found_by_its_name_and_algorithm_and_never_guessed() -> None:
    one, three = _KEYS
    nameless = replace(one, kid=None)
    assert find(_KEYS, "one", "RS256") is one
    assert find(_KEYS, None, "EdDSA") is three
    assert find((nameless, one), "one", "RS256") is one
    assert find((nameless, three), "new", "RS256") is nameless
    assert find(_KEYS, "one", "EdDSA") is None
    assert find(_KEYS, "new", "RS256") is None
    assert find((one, replace(one, kid="other")), None, "RS256") is None
    assert find((one, one), "one", "RS256") is None


@pytest.mark.parametrize("kid", ["one", "anything", None])
async def test_a_key_in_a_file_needs_no_name(tmp_path: Path, kid: str | None) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(_public_pem())
    issuer = Issuer(from_file(path, _ALLOWED))
    await issuer.run_once()
    text = jwt.encode(claims(), private_key("one", "RS256"), "RS256", {"kid": kid} if kid else None)
    tokens = UserTokens(issuer, _EXPECTED)
    assert await tokens.principal(text)
    await _refusal(tokens, _hmac_with_the_public_key())


async def test_a_shared_secret_takes_hs256_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISSUER_SECRET", _SECRET)
    settings = _settings(jwt_jwks_url=None, jwt_secret="env:ISSUER_SECRET")
    tokens = user_tokens(settings)
    assert tokens is not None
    await tokens.issuer.run_once()
    assert await tokens.principal(jwt.encode(claims(), _SECRET, "HS256"))
    await _refusal(tokens, jwt.encode(claims(), "another" + _SECRET, "HS256"))
    await _refusal(tokens, jwt.encode(claims(), _SECRET * 2, "HS512"))
    await _refusal(tokens, token())
    assert "canary" not in f"{settings!r} {tokens.issuer.keys!r}"


# -- settings


def _settings(**changes: Any) -> Settings:
    usual = {
        "auth": "jwt",
        "jwt_issuer": NAME,
        "jwt_audience": AUDIENCE,
        "jwt_jwks_url": "https://issuer.example/jwks",
    }
    return load(**{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"jwt_issuer": None}, "JWT_ISSUER"),
        ({"jwt_audience": None}, "JWT_AZP"),
        ({"jwt_jwks_url": None}, "exactly one"),
        ({"jwt_secret": "env:X"}, "exactly one"),
        ({"jwt_jwks_url": "http://issuer.example/jwks"}, "https"),
        ({"jwt_jwks_url": "https://me:secret@issuer.example/"}, "without credentials"),
        ({"jwt_jwks_url": "file:///etc/passwd"}, "https"),
        ({"jwt_jwks_url": None, "jwt_secret": "x" * 40}, "never the secret"),
        ({"jwt_jwks_url": None, "jwt_secret": "env:SHORT"}, "at least 32"),
        ({"jwt_jwks_url": None, "jwt_secret": "env:PUBLIC"}, "public"),
        ({"jwt_jwks_url": None, "jwt_key_file": "/nowhere"}, "FileNotFoundError"),
        ({"jwt_jwks_url": None, "jwt_key_file": "PRIVATE"}, "private key"),
        ({"jwt_algorithms": "RS256,HS256"}, "only"),
        ({"jwt_algorithms": "none"}, "only"),
        ({"jwt_algorithms": " , "}, "only"),
        ({"jwt_scopes": "read,write"}, "JWT_SCOPES"),
    ],
)
def test_what_would_let_strangers_in_does_not_start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    private = tmp_path / "private.pem"
    private.write_bytes(private_key("one", "RS256").private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    monkeypatch.setenv("SHORT", "hunter2")
    monkeypatch.setenv("PUBLIC", _public_pem().decode())
    changes = {name: str(private) if value == "PRIVATE" else value for name, value in changes.items()}
    with pytest.raises(Misconfigured, match=says) as caught:
        user_tokens(_settings(**changes))
    assert "hunter2" not in caught.value.detail
    assert "BEGIN" not in caught.value.detail
    assert user_tokens(_settings()) is not None
    assert user_tokens(_settings(auth="keys")) is None


# -- through the door


def _jwt_settings(local: LocalIssuer, **changes: Any) -> dict[str, Any]:
    usual = {"auth": "keys,jwt", "jwt_issuer": NAME, "jwt_audience": AUDIENCE, "jwt_jwks_url": local.url, "drain_s": 0}
    return {**usual, **changes}


async def test_keys_and_tokens_side_by_side(
    database: str, local: LocalIssuer, capfd: pytest.CaptureFixture[str]
) -> None:
    path = "/api/sessions/none/queue"
    async with serving(database, **_jwt_settings(local)) as client:
        good = token(sub="ann")
        assert (await client.get(path, headers=bearer(good))).status_code in (200, 404)
        other = await client.get(path, headers=bearer(good), params={"user_id": "bob"})
        assert (other.status_code, other.json()["code"]) == (403, "user_mismatch")
        key = await key_with(database, "read")
        assert (await client.get(path, headers=bearer(key), params={"user_id": "bob"})).status_code in (200, 404)
        scope = await client.get("/metrics", headers=bearer(good))
        assert (scope.status_code, scope.json()["code"]) == (403, "scope_missing")
        for make in _BAD.values():
            bad = make().encode("latin-1", "replace").replace(b"\n", b"")
            answer = await client.get(path, headers=[(b"authorization", b"Bearer " + (bad or b"x"))])
            assert answer.status_code == 401
            assert 'error="invalid_token"' in answer.headers["www-authenticate"]
            assert len(bad) < 20 or bad.decode("latin-1") not in answer.text
    said = "".join(capfd.readouterr())
    assert good.split(".")[2] not in said


async def test_with_tokens_alone_keys_are_refused(database: str, local: LocalIssuer) -> None:
    async with serving(database, **_jwt_settings(local, auth="jwt")) as client:
        key = await key_with(database, "read")
        assert (await client.get("/api/stream", headers=bearer(key))).status_code == 401
        assert (await client.get("/api/stream", headers=bearer(token()))).status_code == 400


async def test_while_the_issuer_is_down_the_answer_is_503(database: str, local: LocalIssuer) -> None:
    local.status = "500 Oops"
    async with serving(database, **_jwt_settings(local)) as client:
        answer = await client.get("/api/stream", headers=bearer(token()))
        assert (answer.status_code, answer.json()["code"]) == (503, "issuer_unavailable")
        assert answer.headers["retry-after"] == "5"


@pytest.mark.parametrize("chatbots", [["steady"], ["steady", "mute"], ["mute"]], ids=" and ".join)
async def test_a_stream_ends_with_the_token_that_opened_it(
    database: str, local: LocalIssuer, chatbots: list[str]
) -> None:
    """Between two frames (the strict reader fails on anything that is cut), and with a time to come back."""
    models = {"steady": "demo?delay_ms=50&tokens=5000", "mute": "demo?fault=silent"}
    settings = _jwt_settings(local, jwt_leeway_s=0, poll_s=0.05)
    async with demo_provider() as demo_url, serving(database, **settings) as client:
        await apply_demo(database, demo_url, models)
        ann, streams = bearer(token()), []
        for name in chatbots:
            message = {"chatbot_id": name, "message_text": "hello", "session_id": name}
            sent = await client.post("/api/process-message", json=message, headers=ann)
            streams.append(stream := sent.json()["streaming_session_id"])
            # Up to where one that says nothing stands.
            async with asyncio.timeout(10):
                while (await client.get(f"/api/stream-events/{stream}", headers=ann)).json()["last_event_id"] < 2:
                    pass
        url, several = f"/api/stream?streams={','.join(f'{stream}:2' for stream in streams)}", len(streams) > 1
        if not several:
            url = f"/api/stream-events/{streams[0]}?after=2"
        expires = int(time()) + 3
        short = {**bearer(token(exp=expires)), "Accept": "text/event-stream"}
        async with asyncio.timeout(20), client.stream("GET", url, headers=short) as response:
            said = await response.aread()
        assert expires - 0.5 <= time() < expires + 3
        assert said.count(b"retry: ") == 1
        got = [frame async for frame in frames(_again(said), several=several)]
        assert bool(got) == ("steady" in chatbots)
        refused = await client.get(url, headers=short)
        assert (refused.status_code, refused.json()["code"]) == (401, "credentials_invalid")
        if got:
            seen = {**ann, "Last-Event-ID": got[-1].id}
            async with client.stream("GET", url, headers={**seen, "Accept": "text/event-stream"}) as again:
                first = await anext(frames(again, several=several))
            assert first.number == got[-1].number + 1


def _again(said: bytes) -> httpx2.Response:
    async def pieces() -> AsyncGenerator[bytes, None]:
        yield said

    return httpx2.Response(200, content=pieces())


def test_a_secret_reference_is_required_to_lead_somewhere() -> None:
    with pytest.raises(Misconfigured, match="not set"):
        from_secret("env:PARLEY_NOTHING_OF_THIS_NAME")


async def test_a_user_is_the_tokens_own_all_the_way(database: str, local: LocalIssuer) -> None:
    async with demo_provider() as demo_url, serving(database, **_jwt_settings(local)) as client:
        await apply_demo(database, f"{demo_url}", {"bot": "demo?delay_ms=0"})
        message = {"chatbot_id": "bot", "message_text": "hello"}
        ann, bob = bearer(token(sub="ann")), bearer(token(sub="bob"))
        sent = await client.post("/api/process-message", json=message, headers=ann)
        assert sent.status_code in (200, 202), sent.text
        # Without the stream token, which lets whoever holds it read.
        url = sent.json()["streaming_url"].partition("?")[0]
        assert (await client.get(url, headers=ann, params={"wait": 5})).status_code == 200
        assert (await client.get(url, headers=bob)).status_code == 404
        other = await client.post("/api/process-message", json={**message, "user_id": "bob"}, headers=ann)
        assert (other.status_code, other.json()["code"]) == (403, "user_mismatch")
