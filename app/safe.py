"""Secrets at rest: encrypted with a master key that the database does not have, as text that says which one it was.

`enc:1:KEY:DATA` is AES-256-SIV (RFC 5297). The same secret becomes the same text, so that what is applied twice is no
change, and a rotation and an apply that meet come to the same end.
"""

import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256, sha512
from typing import Literal, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESSIV

from app.errors import Misconfigured
from app.references import is_reference, materials, resolve

# What a secret is for: one that was encrypted as the one is not taken as the other.
Purpose = Literal["chatbot", "signing"]

_PREFIX = "enc:"
_LONGEST = 8 * 1024
_SHAPE = re.compile(rf"enc:1:([0-9a-f]{{8}}):([A-Za-z0-9_-]{{23,{2 * _LONGEST}}})")
_DERIVED = b"parley master key 1"
# What people write where a reference is meant is no key.
_NO_KEY = re.compile(r"(?:env|file|enc):.*|\$.*|.{0,7}|.*[^\x21-\x7e].*", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class MasterKey:
    """`id` says which key encrypted a value, and nothing of the key."""

    id: str
    cipher: AESSIV = field(repr=False)

    @classmethod
    def of(cls, material: bytes) -> Self:
        """The same everywhere for the same material, which nobody must be able to guess."""
        secret = sha512(_DERIVED + material).digest()
        return cls(sha256(b"id" + secret).hexdigest()[:8], AESSIV(secret))


class Safe:
    """Encrypts with the first of its master keys, and reads what any of them has encrypted. It may have none."""

    def __init__(self, keys: Sequence[MasterKey] = ()) -> None:
        self._keys = tuple(keys)

    @classmethod
    def of(cls, references: str | None) -> Self:
        """As PARLEY_MASTER_KEY names them. Raises Misconfigured."""
        given = materials("PARLEY_MASTER_KEY", references, code="master_key")
        return cls([MasterKey.of(material) for material in given])

    @property
    def newest(self) -> str | None:
        """The id of the key that encrypts."""
        return self._keys[0].id if self._keys else None

    def knows(self, key_id: str) -> bool:
        return any(key.id == key_id for key in self._keys)

    def require(self) -> MasterKey:
        """The newest. Raises Misconfigured where there is none."""
        if not self._keys:
            raise Misconfigured("master_key", f"There is no master key. {_REMEDY}")
        return self._keys[0]

    def seal(self, secret: str, purpose: Purpose) -> str:
        """Raises Misconfigured where there is no master key."""
        key = self.require()
        data = key.cipher.encrypt(secret.encode(), _bound(key.id, purpose))
        return f"{_PREFIX}1:{key.id}:{_encoded(data)}"

    def open(self, sealed: str, purpose: Purpose) -> str:
        """Raises Misconfigured, without a word of the value, where it cannot be read."""
        if (parts := _SHAPE.fullmatch(sealed)) is None:
            raise _unreadable("An encrypted value is damaged: it is not of the form enc:1:KEY:DATA.")
        key_id, data = parts.groups()
        key = next((key for key in self._keys if key.id == key_id), None)
        if key is None:
            lacking = "names other keys" if self._keys else "is not set"
            raise _unreadable(f"A value is encrypted with the master key {key_id}, and PARLEY_MASTER_KEY {lacking}.")
        try:
            return key.cipher.decrypt(_decoded(data), _bound(key_id, purpose)).decode()
        except (InvalidTag, ValueError):
            why = "is damaged, or was encrypted for something else"
            raise _unreadable(f"A value that is encrypted with the master key {key_id} {why}.") from None

    def renewed(self, sealed: str, purpose: Purpose) -> str:
        """Encrypted with the newest key. Raises Misconfigured."""
        return self.seal(self.open(sealed, purpose), purpose)

    def resolve(self, given: str) -> str:
        """What a chatbot's secret is: behind a reference, or encrypted. Raises Misconfigured."""
        return self.open(given, "chatbot") if given.startswith(_PREFIX) else resolve(given)

    def stored(self, given: str) -> str:
        """How a provider's key is stored, however it was given: a reference as it is, all else encrypted.

        Raises Misconfigured where it cannot be. Without a master key an encrypted one is taken by its looks.
        """
        if is_reference(given):
            return given
        if self._keys and is_sealed(given):
            return self.renewed(given, "chatbot")
        if is_sealed(given):
            return given
        if not self._keys:
            raise Misconfigured("configuration_invalid", f"{_REFERENCE}, never the key itself")
        if _NO_KEY.fullmatch(given):
            raise Misconfigured("configuration_invalid", f"{_REFERENCE}, or a key of 8 printable characters or more")
        return self.seal(given, "chatbot")


# For who has no master key.
NO_SAFE = Safe()


def is_sealed(text: str) -> bool:
    """Whether a text looks like an encrypted value."""
    return _SHAPE.fullmatch(text) is not None


def sealed_with(sealed: str) -> str:
    """The id of the master key of what `is_sealed`."""
    return sealed.split(":")[2]


_REFERENCE = "must be a reference, env:NAME or file:/path, or what `parley keys encrypt` prints"
_REMEDY = (
    "Print one with `parley keys generate-master`, keep it out of the database, and name its place: "
    "PARLEY_MASTER_KEY=file:/path, or env:NAME."
)


def _unreadable(why: str) -> Misconfigured:
    return Misconfigured("secret_unreadable", why)


def _encoded(data: bytes) -> str:
    return urlsafe_b64encode(data).decode().rstrip("=")


def _decoded(text: str) -> bytes:
    """Raises ValueError for what `_encoded` does not write: there is one text for a value."""
    data = urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if _encoded(data) != text:
        raise ValueError("unused bits")
    return data


def _bound(key_id: str, purpose: Purpose) -> list[bytes]:
    return [b"enc:1", key_id.encode(), purpose.encode()]
