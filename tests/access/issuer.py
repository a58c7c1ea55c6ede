"""A real issuer of tokens on loopback: keys of every kind, a JWKS over HTTP, and how often it was asked for."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
from time import time
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

NAME = "https://issuer.example/"
AUDIENCE = "parley"

PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


@cache
def private_key(kid: str, algorithm: str) -> PrivateKey:
    """The same one for the same arguments."""
    match algorithm:
        case "EdDSA":
            return ed25519.Ed25519PrivateKey.generate()
        case "ES256":
            return ec.generate_private_key(ec.SECP256R1())
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def jwk(kid: str, algorithm: str) -> dict[str, Any]:
    return {**_public(private_key(kid, algorithm)), "kid": kid, "alg": algorithm, "use": "sig"}


def _public(key: PrivateKey) -> dict[str, Any]:
    match key:
        case ed25519.Ed25519PrivateKey():
            return OKPAlgorithm.to_jwk(key.public_key(), as_dict=True)
        case ec.EllipticCurvePrivateKey():
            return ECAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)


def claims(**changes: Any) -> dict[str, Any]:
    """Good ones, but for the changes; None takes one away."""
    now = int(time())
    usual = {"iss": NAME, "aud": AUDIENCE, "sub": "ann", "iat": now, "nbf": now, "exp": now + 600}
    return {name: value for name, value in (usual | changes).items() if value is not None}


def token(kid: str = "one", algorithm: str = "RS256", headers: dict[str, Any] | None = None, **changes: Any) -> str:
    named = {"kid": kid, **(headers or {})}
    return jwt.encode(claims(**changes), private_key(kid, algorithm), algorithm, headers=named)


class LocalIssuer:
    """`status`, `document` and `extra` may be changed while it runs."""

    def __init__(self) -> None:
        self.url = ""
        self.fetches = 0
        self.status = "200 OK"
        self.extra = ""
        self.document = json.dumps({"keys": [jwk("one", "RS256"), jwk("two", "ES256"), jwk("three", "EdDSA")]}).encode()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.fetches += 1
        head = (
            f"HTTP/1.1 {self.status}\r\nContent-Length: {len(self.document)}\r\n{self.extra}Connection: close\r\n\r\n"
        )
        writer.write(head.encode() + self.document)
        writer.close()


@asynccontextmanager
async def local_issuer() -> AsyncGenerator[LocalIssuer, None]:
    issuer = LocalIssuer()
    async with await asyncio.start_server(issuer.answer, "127.0.0.1", 0) as server:
        issuer.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
        yield issuer
