"""Where a secret is, instead of the secret: env:NAME or file:PATH."""

import os
import re
from pathlib import Path

from app.errors import Misconfigured

_REFERENCE = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]*|file:.+", re.DOTALL)
# Shorter ones would be passwords, and those can be guessed by whoever has something that was made with them.
_SHORTEST = 32


def is_reference(text: str) -> bool:
    """Whether a text says where something is; it may still lead nowhere."""
    return _REFERENCE.fullmatch(text) is not None


def resolve(reference: str) -> str:
    """The value behind env:NAME or file:PATH; any other text is its own value. Raises Misconfigured."""
    scheme, _, rest = reference.partition(":")
    if scheme == "env":
        if not (value := os.environ.get(rest)):
            raise Misconfigured("reference_missing", f"The environment variable {rest} is not set.")
        return value.strip()
    if scheme == "file":
        try:
            return Path(rest).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            raise Misconfigured("reference_missing", f"The file {rest} cannot be read.") from None
    return reference


def materials(variable: str, references: str | None, *, code: str) -> list[bytes]:
    """The keys that a setting names, with a comma between two. Raises Misconfigured with `code`."""
    named = [part.strip() for part in (references or "").split(",") if part.strip()]
    return [_material(variable, reference, code) for reference in named]


def _material(variable: str, reference: str, code: str) -> bytes:
    # Never the value itself in a message: it may be the key.
    if not reference.startswith(("env:", "file:")):
        raise Misconfigured(code, f"{variable} must name where the key is, env:NAME or file:/path, not the key itself.")
    material = resolve(reference).encode()
    if len(material) < _SHORTEST:
        raise Misconfigured(
            code, f"The key at {reference} is too short; `openssl rand -hex 32` prints one that is not."
        )
    return material
