"""Where a secret is, instead of the secret: env:NAME or file:PATH."""

import os
from pathlib import Path

from app.errors import Misconfigured


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
