"""The one table of routes, with what each may be sent, and what requests find in `request.state`."""

from starlette.middleware import Middleware
from starlette.routing import Route

from app import health, problems
from app.access import client, guard
from app.access.demands import demands
from app.bodies import BodyLimit, Pace
from app.chats import endpoints as chat_endpoints
from app.conversations import administration, discovery_endpoints, news_endpoints, usage_endpoints
from app.conversations import endpoints as conversation_endpoints
from app.flows import configuration, user_endpoints
from app.flows import endpoints as flow_endpoints
from app.openapi import Reference
from app.operations import HEADERS, OPERATIONS
from app.settings import Settings
from app.streams import endpoints as stream_endpoints
from app.sync import chat_endpoints as own_chat_endpoints
from app.sync import claim_endpoints, file_endpoints, nudge_endpoints, status_endpoints, version_endpoints
from app.sync import endpoints as sync_endpoints


class State(
    stream_endpoints.Needs,
    flow_endpoints.Needs,
    configuration.Needs,
    chat_endpoints.Needs,
    conversation_endpoints.Needs,
    administration.Needs,
    discovery_endpoints.Needs,
    usage_endpoints.Needs,
    news_endpoints.Needs,
    sync_endpoints.Needs,
    own_chat_endpoints.Needs,
    file_endpoints.Needs,
    claim_endpoints.Needs,
    user_endpoints.Needs,
    nudge_endpoints.Needs,
    version_endpoints.Needs,
    status_endpoints.Needs,
    health.Needs,
    problems.Needs,
    guard.Needs,
    client.Needs,
):
    """What requests find in `request.state`."""


def routes(settings: Settings) -> list[Route]:
    """All of them, each behind its door. Raises LookupError where the table of demands is another one."""
    table = [*_processing(settings), *_reading(), *_index(settings), *_sync(settings), *_chats(settings), *_operating()]
    guard.guard(table, demands(metrics_open=settings.metrics_open))
    return table


def _bodies(settings: Settings, most: int | None = None) -> list[Middleware]:
    """Bodies of at most so many bytes, or as many as any may have, that are whole in time."""
    limit = settings.body_limit if most is None else min(settings.body_limit, most)
    return [Middleware(BodyLimit, limit, Pace(settings.body_timeout_s))]


def _processing(settings: Settings) -> list[Route]:
    bodies = _bodies(settings)
    pace = Pace(settings.upload_timeout_s, settings.upload_stall_s, upload=True)
    pictures = [Middleware(BodyLimit, settings.upload_limit, pace)]
    return [
        Route("/api/process-message", flow_endpoints.process_message, methods=["POST"], middleware=bodies),
        Route("/api/upload-image", chat_endpoints.upload_image, methods=["POST"], middleware=pictures),
        Route(
            "/api/conversation-config/{chatbot_id}",
            configuration.conversation_config,
            methods=["GET", "PUT"],
            middleware=_bodies(settings, configuration.BODY_LIMIT),
        ),
        Route("/api/stream-events/{stream_id}/cancel", flow_endpoints.cancel, methods=["POST"], middleware=bodies),
        Route("/api/sessions/{session_id}/queue", flow_endpoints.queue),
        Route(
            "/api/sessions/{session_id}/queue/{message_id}",
            flow_endpoints.queued_message,
            methods=["PATCH", "DELETE"],
            middleware=bodies,
        ),
        Route("/api/sessions/{session_id}/queue/{message_id}/send-now", flow_endpoints.send_now, methods=["POST"]),
    ]


def _reading() -> list[Route]:
    return [
        Route("/api/stream-events/{stream_id}", stream_endpoints.stream_events),
        Route("/api/stream", stream_endpoints.several_streams),
    ]


def _index(settings: Settings) -> list[Route]:
    return [
        Route("/api/messages/conversations", conversation_endpoints.conversations),
        Route("/conversations", conversation_endpoints.conversations, name="conversations_alias"),
        Route("/api/messages/conversations/events", news_endpoints.conversation_events),
        Route("/api/messages/conversations/{conversation_id}", conversation_endpoints.conversation),
        Route("/api/messages/statistics", conversation_endpoints.message_statistics),
        Route("/api/usage", usage_endpoints.usage),
        Route("/api/sync/init", administration.init, methods=["POST"]),
        Route("/api/sync/sync", administration.sync, methods=["POST"]),
        Route("/api/sync/stats", administration.stats),
        Route("/api/sync/index", administration.delete, methods=["DELETE"]),
        Route("/api/sync/reset", administration.reset, methods=["POST"]),
        Route("/api/discovery/status", discovery_endpoints.discovery_status),
        Route(
            "/api/webhooks/conversation-complete",
            discovery_endpoints.conversation_complete,
            methods=["POST"],
            middleware=_bodies(settings, discovery_endpoints.BODY_LIMIT),
        ),
    ]


def _sync(settings: Settings) -> list[Route]:
    histories = [Middleware(BodyLimit, settings.sync_history_limit, Pace(settings.body_timeout_s))]
    bodies = _bodies(settings, sync_endpoints.BODY_LIMIT)
    return [
        Route("/api/chat/sync", sync_endpoints.sync_chats, methods=["GET", "POST"], middleware=histories),
        Route("/api/sync", status_endpoints.device_sync, methods=["GET", "POST"], middleware=bodies),
        Route("/api/chat/sync/events", nudge_endpoints.sync_events),
    ]


def _chats(settings: Settings) -> list[Route]:
    bodies = _bodies(settings, own_chat_endpoints.BODY_LIMIT)
    pace = Pace(settings.import_timeout_s, settings.upload_stall_s)
    files = [Middleware(BodyLimit, settings.import_limit, pace)]
    return [
        Route("/api/users/{user_id}", user_endpoints.erase_user, methods=["DELETE"]),
        Route("/api/chats", own_chat_endpoints.listed),
        Route("/api/chats/export", file_endpoints.export_all),
        Route("/api/chats/claim", claim_endpoints.claim_chats, methods=["POST"], middleware=bodies),
        Route("/api/chats/import", file_endpoints.import_chats, methods=["POST"], middleware=files),
        Route("/api/chats/{chat_id}", own_chat_endpoints.chat, methods=["GET", "PATCH", "DELETE"], middleware=bodies),
        Route("/api/chats/{chat_id}/export", file_endpoints.export_chat),
        Route("/api/chats/{chat_id}/messages", own_chat_endpoints.messages),
        Route("/api/chats/{chat_id}/versions", version_endpoints.chat_versions),
        Route("/api/chats/{chat_id}/versions/{version}/restore", version_endpoints.restore_version, methods=["POST"]),
        Route("/api/chats/{chat_id}/branch", own_chat_endpoints.branch, methods=["POST"], middleware=bodies),
    ]


def _operating() -> list[Route]:
    reference = Reference(OPERATIONS, HEADERS)
    return [
        Route("/api/conversation-health", health.conversation_health),
        Route("/livez", health.livez),
        Route("/readyz", health.readyz),
        Route("/metrics", health.metrics),
        Route("/openapi.json", reference.openapi),
        Route("/docs", reference.docs),
    ]
