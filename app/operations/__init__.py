"""What every route takes and answers, as /openapi.json tells it: one entry per method and path of the route table."""

from collections.abc import Mapping

from app.openapi import Operation
from app.operations.chats import CHATS
from app.operations.configuration import CONFIGURATION
from app.operations.discovery import DISCOVERY
from app.operations.index import INDEX
from app.operations.messages import MESSAGES
from app.operations.service import SERVICE
from app.operations.streams import STREAMS
from app.operations.sync import SYNC

HEADERS: Mapping[str, str] = {
    "Content-Disposition": "The file's name.",
    "X-Request-Id": "The id of this request: the given one if it is 1 to 64 letters, digits, `.`, `_` or `-`.",
    "Retry-After": "Seconds after which another try makes sense.",
    "Idempotent-Replayed": "`true` where this repeats the answer to an earlier request with the same key.",
    "ETag": "Of a chatbot, and of a stream that has ended; send it back as If-None-Match.",
    "Cache-Control": "`private, max-age=3600` for a stream that has ended, `private, no-cache` for a chatbot, "
    "otherwise `no-store`; SSE is never cached.",
    "Vary": "What changes the answer: `Accept`, `Last-Event-ID`, and who asks.",
    "RateLimit": "Of the tightest of the limits that the request counted for: how often more now (`r`), and in how "
    "many seconds all of it, or, where this was one too many, the next (`t`); draft-ietf-httpapi-ratelimit-headers-10.",
    "RateLimit-Policy": "That limit: how often (`q`) in how many seconds (`w`).",
    "WWW-Authenticate": "How to become somebody, as RFC 6750 says it.",
    "Content-Security-Policy": "Only the page's own script and style run; it talks to this server alone.",
}

OPERATIONS: Mapping[tuple[str, str], Operation] = {
    **MESSAGES,
    **STREAMS,
    **CONFIGURATION,
    **INDEX,
    **DISCOVERY,
    **SYNC,
    **CHATS,
    **SERVICE,
}
