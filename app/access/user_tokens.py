"""Users' tokens: signed by an issuer (JWT, RFC 7519), checked as RFC 8725 advises, and turned into their users."""

import re
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from time import time
from typing import Any, get_args

import jwt

from app.access import issuer as issuers
from app.access.issuer import Issuer, Read
from app.access.issuer_keys import ALGORITHMS, IssuerKey, Keys
from app.access.principal import Principal, Scope
from app.errors import Misconfigured, Unauthorized
from app.settings import Settings
from app.text import PRINTABLE, clean

# Longer ones are refused unread, in bytes.
_LONGEST = 8 * 1024
# Verified tokens that are remembered; about 500 bytes each.
_REMEMBERED = 10_000
_LONGEST_USER = 256
# Later ends are no numbers that one can calculate with.
_NEVER = 1 << 53
# Headers that bring a key of their own, or change what the others mean.
_REFUSED_HEADERS = {"jku", "jwk", "x5u", "crit", "b64", "zip"}
_TYPES = {"jwt", "at+jwt", "application/jwt", "application/at+jwt"}
_SCOPES = get_args(Scope)
_DEFAULT = "signed by a key that is unknown here, or malformed"
_WHY: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "expired",
    jwt.ImmatureSignatureError: "not valid yet",
    jwt.InvalidAudienceError: "meant for somebody else (aud)",
    jwt.InvalidIssuerError: "of another issuer (iss)",
    jwt.MissingRequiredClaimError: "without one of exp, iss and sub",
}


@dataclass(frozen=True, slots=True)
class Expected:
    """What a token must say. `scopes` has a user whose token names none of ours."""

    issuer: str
    audiences: tuple[str, ...]
    parties: tuple[str, ...]
    algorithms: frozenset[str]
    leeway_s: float
    scopes: frozenset[Scope]


class UserTokens:
    """Whose token it is. Verified ones are remembered by their hash until they expire or the keys change."""

    def __init__(self, issuer: Issuer, expected: Expected, *, remembered: int = _REMEMBERED) -> None:
        self.issuer = issuer
        self._expected = expected
        self._most = remembered
        self._keys: Keys = ()
        self._known: OrderedDict[bytes, tuple[Principal, float]] = OrderedDict()

    async def principal(self, token: str) -> Principal:
        """Raises Unauthorized, or Unavailable while the issuer's keys are not known."""
        if len(token) > _LONGEST:
            raise _refused(f"longer than {_LONGEST} bytes")
        digest = sha256(token.encode()).digest()
        if (known := self._recall(digest)) is not None:
            return known
        kid, algorithm = _header(token)
        if algorithm not in self._expected.algorithms:
            raise _refused("signed with an algorithm that is not allowed")
        key = await self.issuer.key_for(kid, algorithm)
        if key is None:
            raise _refused(_DEFAULT)
        claims = self._claims(token, key)
        expires = min(int(claims["exp"]), _NEVER)
        # As long as the token would be taken, connections that it has opened may go on.
        principal = _principal(claims, self._expected.scopes, until=expires + self._expected.leeway_s)
        self._remember(digest, principal, until=expires)
        return principal

    def _recall(self, digest: bytes) -> Principal | None:
        # A key that its issuer has withdrawn takes the tokens along that it signed.
        if self._keys is not (keys := self.issuer.keys):
            self._keys = keys
            self._known.clear()
        principal, until = self._known.get(digest, (None, 0.0))
        return principal if until > time() else None

    def _remember(self, digest: bytes, principal: Principal, *, until: float) -> None:
        self._known.pop(digest, None)
        self._known[digest] = principal, until
        if len(self._known) > self._most:
            self._known.popitem(last=False)

    def _claims(self, token: str, key: IssuerKey) -> dict[str, Any]:
        expected = self._expected
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=sorted(key.algorithms & expected.algorithms),
                issuer=expected.issuer,
                audience=expected.audiences or None,
                leeway=expected.leeway_s,
                options={"require": ["exp", "iss", "sub"], "verify_aud": bool(expected.audiences)},
            )
        except jwt.PyJWTError as error:
            raise _refused(_WHY.get(type(error), _DEFAULT)) from None
        if expected.parties and claims.get("azp") not in expected.parties:
            raise _refused("given to another application (azp)")
        return claims


def _header(token: str) -> tuple[str | None, str]:
    """The key's id and the algorithm. Nothing of it is believed before the signature."""
    try:
        header = jwt.get_unverified_header(token)
    except (jwt.PyJWTError, ValueError):
        raise _refused("malformed") from None
    kid, algorithm, kind = header.get("kid"), header.get("alg"), header.get("typ", "jwt")
    if _REFUSED_HEADERS & header.keys() or not isinstance(kid, str | None):
        raise _refused("with a header that is not taken")
    if not isinstance(algorithm, str) or not isinstance(kind, str) or kind.lower() not in _TYPES:
        raise _refused("of another type")
    return kid, algorithm


def _principal(claims: dict[str, Any], usual: frozenset[Scope], *, until: float) -> Principal:
    user_id: str = claims["sub"]
    if len(user_id) > _LONGEST_USER or not re.fullmatch(PRINTABLE, clean(user_id)):
        raise _refused("without a usable user in sub")
    return Principal("user", f"user:{user_id}", _named(claims) or usual, user_id, until=until)


def _named(claims: dict[str, Any]) -> frozenset[Scope]:
    """The scopes that a token names, as `read` or `parley:read`; `admin`, which others may use, only the long way."""
    words: set[str] = set()
    for claim in (claims.get("scope"), claims.get("scp")):
        given = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else []
        words |= {word for word in given if isinstance(word, str)}
    return frozenset(one for one in _SCOPES if f"parley:{one}" in words or (one != "admin" and one in words))


def _refused(why: str) -> Unauthorized:
    return Unauthorized("credentials_invalid", f"This token is not accepted: it is {why}.")


def user_tokens(settings: Settings) -> UserTokens | None:
    """As the settings say; None where no tokens are taken. Raises Misconfigured."""
    if "jwt" not in settings.auth:
        return None
    if not settings.jwt_issuer or not (settings.jwt_audience or settings.jwt_azp):
        raise Misconfigured(
            "jwt_expectations",
            "PARLEY_AUTH=jwt needs PARLEY_JWT_ISSUER, and PARLEY_JWT_AUDIENCE or PARLEY_JWT_AZP: otherwise a token "
            "that was given to any other application of this issuer would open this one.",
        )
    algorithms = _algorithms(settings)
    expected = Expected(
        settings.jwt_issuer,
        _words(settings.jwt_audience),
        _words(settings.jwt_azp),
        algorithms,
        settings.jwt_leeway_s,
        _scopes(settings.jwt_scopes),
    )
    return UserTokens(Issuer(_source(settings, algorithms)), expected)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(word.strip() for word in (text or "").split(",") if word.strip())


def _algorithms(settings: Settings) -> frozenset[str]:
    if settings.jwt_secret:
        return frozenset({"HS256"})
    given = frozenset(_words(settings.jwt_algorithms))
    if not given or given - ALGORITHMS:
        raise Misconfigured("jwt_expectations", f"PARLEY_JWT_ALGORITHMS takes {', '.join(sorted(ALGORITHMS))} only.")
    return given


def _scopes(text: str) -> frozenset[Scope]:
    given = {word for word in _words(text) if word != "none"}
    if given - set(_SCOPES):
        raise Misconfigured("jwt_expectations", f"PARLEY_JWT_SCOPES takes {', '.join(_SCOPES)}, or none.")
    return frozenset(one for one in _SCOPES if one in given)


def _source(settings: Settings, algorithms: frozenset[str]) -> Read:
    match settings.jwt_jwks_url, settings.jwt_key_file, settings.jwt_secret:
        case str(url), None, None:
            return issuers.from_url(url, algorithms)
        case None, path, None if path is not None:
            return issuers.from_file(path, algorithms)
        case None, None, str(reference):
            return issuers.from_secret(reference)
    raise Misconfigured(
        "jwt_source", "Set exactly one of PARLEY_JWT_JWKS_URL, PARLEY_JWT_KEY_FILE and PARLEY_JWT_SECRET."
    )
