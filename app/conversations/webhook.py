"""Webhooks that say a conversation is complete: their signatures after Standard Webhooks 1, and each id once."""

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence

from app.errors import Misconfigured, Unauthorized
from app.postgres import Pool
from app.references import materials
from app.settings import Settings

# How far the sender's clock may be from ours, in seconds; an id is kept for longer.
_TOLERANCE_S = 5 * 60
# A sender sends one signature for each of its secrets.
_MOST_SIGNATURES = 10
_LONGEST_ID = 256

_IS_KNOWN = "select exists (select from webhook_receipts where id = $1)"
_KEEP = "insert into webhook_receipts (id) values ($1) on conflict do nothing"


def secrets_of(settings: Settings) -> list[bytes]:
    """The secrets that the setting names. Raises Misconfigured."""
    named = materials("PARLEY_WEBHOOK_SECRETS", settings.webhook_secrets, code="webhook_secret")
    return [_secret(material) for material in named]


def _secret(material: bytes) -> bytes:
    """`whsec_` and base64, as Standard Webhooks writes secrets; any other text is itself one. Raises Misconfigured."""
    if not material.startswith(b"whsec_"):
        return material
    try:
        return base64.b64decode(material.removeprefix(b"whsec_"), validate=True)
    except binascii.Error:
        detail = "A secret of PARLEY_WEBHOOK_SECRETS begins with whsec_, and the rest is no base64."
        raise Misconfigured("webhook_secret", detail) from None


def verify(headers: Mapping[str, str], body: bytes, *, secrets: Sequence[bytes], now: float) -> str:
    """The id of a webhook that one of the secrets has signed lately. Raises Unauthorized, saying nothing of why it
    does not fit.

    `now` in seconds since 1970. https://github.com/standard-webhooks/standard-webhooks, spec 1.0.0.
    """
    webhook_id, sent, signed = (headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature"))
    if not (0 < len(webhook_id) <= _LONGEST_ID and webhook_id.isascii() and webhook_id.isprintable()):
        raise _refused()
    if not (sent.isascii() and sent.isdigit() and len(sent) <= 12) or abs(now - int(sent)) > _TOLERANCE_S:
        raise _refused()
    message = f"{webhook_id}.{sent}.".encode() + body
    expected = [base64.b64encode(hmac.digest(secret, message, hashlib.sha256)) for secret in secrets]
    given = [part.removeprefix("v1,").encode() for part in signed.split(" ") if part.startswith("v1,")]
    if not any(hmac.compare_digest(one, other) for one in given[:_MOST_SIGNATURES] for other in expected):
        raise _refused()
    return webhook_id


def _refused() -> Unauthorized:
    return Unauthorized(
        "webhook_refused",
        "The webhook is not signed by a secret that is known here, or was sent more than five minutes ago.",
    )


async def is_received(pool: Pool, webhook_id: str) -> bool:
    """Whether a webhook with this id has been received and done."""
    known: bool = await pool.fetchval(_IS_KNOWN, webhook_id)
    return known


async def receive(pool: Pool, webhook_id: str) -> None:
    """To be called when it is done, so that a sender that was told of a failure may repeat it."""
    await pool.execute(_KEEP, webhook_id)
