"""What a streaming URL carries: leave to read one stream until a moment, signed.

42 bytes as 56 characters of base64url: the id of the signing key (4), the end in seconds since 1970 (4), the stream
(16), and 18 bytes of an HMAC-SHA256 over all that.
"""

import hmac
import re
import struct
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Self
from uuid import UUID

# A multiple of four characters that uses every bit: there is one way to write a token.
_SHAPE = re.compile(r"[A-Za-z0-9_-]{56}")
_SAID = struct.Struct(">4sI16s")
_MAC = 18
# What is signed, and how: no signature serves two purposes.
_PURPOSE = b"parley stream token 1"


@dataclass(frozen=True, slots=True)
class SigningKey:
    """`id` says which key signed a token, and nothing of the key."""

    id: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def of(cls, material: bytes) -> Self:
        """The same on every replica that is given the same material, which nobody must be able to guess."""
        secret = sha256(_PURPOSE + material).digest()
        return cls(sha256(b"id" + secret).digest()[:4], secret)

    def mac(self, said: bytes) -> bytes:
        return hmac.digest(self.secret, _PURPOSE + said, sha256)[:_MAC]


@dataclass(frozen=True, slots=True)
class StreamToken:
    """What a token says. Whether that is true `is_by` tells."""

    key_id: bytes
    until: int
    stream_id: UUID
    mac: bytes = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for what cannot be a token."""
        if not _SHAPE.fullmatch(text):
            return None
        data = urlsafe_b64decode(text)
        key_id, until, stream = _SAID.unpack_from(data)
        return cls(key_id, until, UUID(bytes=stream), data[_SAID.size :])

    def is_by(self, key: SigningKey) -> bool:
        """Takes as long for a wrong signature as for a right one."""
        return hmac.compare_digest(key.mac(_said(self.key_id, self.until, self.stream_id)), self.mac)


def signed(key: SigningKey, stream_id: UUID, *, until: int) -> str:
    """A token. `until`: in seconds since 1970."""
    said = _said(key.id, until, stream_id)
    return urlsafe_b64encode(said + key.mac(said)).decode()


def _said(key_id: bytes, until: int, stream_id: UUID) -> bytes:
    return _SAID.pack(key_id, until, stream_id.bytes)
