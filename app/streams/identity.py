"""Stream ids as they come in URLs."""

import re
from uuid import UUID

from app.errors import NotFound

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


def stream_id_of(text: str) -> UUID:
    """Raises NotFound for what cannot be a stream's id, as for a stream that does not exist (I10, G19)."""
    if not _UUID.fullmatch(text):
        raise NotFound("stream_unknown", "There is no such stream; the id comes from POST /api/process-message.")
    return UUID(text)
