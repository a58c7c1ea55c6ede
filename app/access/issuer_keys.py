"""Public keys of an issuer, from a JWKS (RFC 7517) or PEM document, each bound to the algorithms of its kind."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

PublicKey = RSAPublicKey | EllipticCurvePublicKey | Ed25519PublicKey

_RSA = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"})
_CURVES = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
ALGORITHMS = _RSA | frozenset(_CURVES.values()) | {"EdDSA"}
# RFC 7518, 3.3 and 3.2.
_RSA_BITS = 2048
_SECRET_BYTES = 32
# How many keys one issuer may have.
_MOST = 100


@dataclass(frozen=True, slots=True)
class IssuerKey:
    """`algorithms` says what it may verify, whatever a token says of itself. `kid` is None where it has no name."""

    kid: str | None
    algorithms: frozenset[str]
    key: PublicKey | bytes = field(repr=False)


Keys = tuple[IssuerKey, ...]


def parse(document: bytes, allowed: Collection[str]) -> Keys:
    """The usable keys of a document. Raises ValueError, which says nothing of what is in it, where there is none."""
    found = _pem(document, allowed) if document.lstrip().startswith(b"-----BEGIN") else _jwks(document, allowed)
    if not found:
        raise ValueError("no usable public key for these algorithms")
    return tuple(found)


def shared_secret(secret: str) -> Keys:
    """Raises ValueError for one that is short, or public."""
    if len(secret.encode()) < _SECRET_BYTES:
        raise ValueError(f"a secret for HS256 has at least {_SECRET_BYTES} bytes")
    if "-----BEGIN" in secret or secret.startswith(("ssh-", "{")):
        raise ValueError("this is a public key, or a file of keys, and no secret")
    return (IssuerKey(None, frozenset({"HS256"}), secret.encode()),)


def find(keys: Sequence[IssuerKey], kid: str | None, algorithm: str) -> IssuerKey | None:
    """The key of this name, else the only one that fits where the token or the key has no name."""
    fitting = [key for key in keys if algorithm in key.algorithms]
    named = [key for key in fitting if key.kid == kid]
    found = named or [key for key in fitting if kid is None or key.kid is None]
    return found[0] if len(found) == 1 else None


def _pem(document: bytes, allowed: Collection[str]) -> list[IssuerKey]:
    try:
        key = load_pem_public_key(document)
    except Exception:  # noqa: BLE001  cryptography promises no type for what is no key
        raise ValueError("no public key in PEM; a certificate or a private key is none") from None
    algorithms = _algorithms_of(key, None, allowed)
    return [IssuerKey(None, algorithms, key)] if algorithms else []  # type: ignore[arg-type]


def _jwks(document: bytes, allowed: Collection[str]) -> list[IssuerKey]:
    try:
        given = orjson.loads(document)["keys"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise ValueError("neither a JWKS nor a public key in PEM") from None
    if not isinstance(given, list) or len(given) > _MOST:
        raise ValueError(f"`keys` is no list, or one of more than {_MOST}")
    return [key for one in given if isinstance(one, dict) and (key := _jwk(one, allowed)) is not None]


def _jwk(given: dict[str, Any], allowed: Collection[str]) -> IssuerKey | None:
    """None for keys that are of no use here, as an issuer may have others: for encryption, of other kinds."""
    kid, use, operations = given.get("kid"), given.get("use", "sig"), given.get("key_ops", ["verify"])
    verifies = use == "sig" and isinstance(operations, list) and "verify" in operations
    if not verifies or not isinstance(kid, str | None):
        return None
    try:
        key = jwt.PyJWK({name: value for name, value in given.items() if name != "alg"}).key
    except Exception:  # noqa: BLE001  PyJWT promises no type for members of wrong types; its texts quote the key
        return None
    algorithms = _algorithms_of(key, given.get("alg"), allowed)
    return IssuerKey(kid, algorithms, key) if algorithms else None


def _algorithms_of(key: object, named: object, allowed: Collection[str]) -> frozenset[str]:
    match key:
        case RSAPublicKey() if key.key_size >= _RSA_BITS:
            fitting = _RSA
        case EllipticCurvePublicKey() if key.curve.name in _CURVES:
            fitting = frozenset({_CURVES[key.curve.name]})
        case Ed25519PublicKey():
            fitting = frozenset({"EdDSA"})
        case _:  # secrets and private halves, too: they have no business in what everybody may read
            fitting = frozenset()
    return frozenset(one for one in fitting if one in allowed and named in (None, one))
