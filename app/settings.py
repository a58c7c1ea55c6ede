"""Every option, once: read from the environment at start, reported all together when wrong, frozen, passed down."""

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import Misconfigured

KIB = 1024
MIB = 1024 * KIB


def _default_data_dir() -> Path:
    import os

    if os.geteuid() == 0:
        return Path("/var/lib/parley")
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "parley"


class Settings(BaseSettings):
    """The environment, validated. docs/configuration.md lists every field; a test keeps that table complete."""

    model_config = SettingsConfigDict(
        env_prefix="PARLEY_", frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True
    )

    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        repr=False,
        description="PostgreSQL to use, as postgresql://user:password@host:port/name. `parley dev` may leave it out.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    auth: Literal["keys", "jwt", "keys,jwt", "open"] = Field(
        "keys",
        description="Who may ask: whoever has an API key, a user's token (`jwt`), either (`keys,jwt`), or anybody "
        "(`open`, the default of `parley dev`).",
    )
    open_anywhere: bool = Field(
        False, description="Whether `open` is taken on other addresses than loopback: something in front must ask then."
    )
    allowed_hosts: str | None = Field(
        None,
        description="Names, separated by commas, under which an `open` server may be asked beside those of its own "
        "machine, like that of a proxy in front of it.",
    )
    metrics_open: bool = Field(
        False, description="Whether `/metrics` and `/readyz?verbose` are for everybody instead of administrators."
    )
    trusted_proxies: str | None = Field(
        None,
        description="Addresses and networks, separated by commas, of the proxies in front whose X-Forwarded-For is "
        "believed; without any the peer is the client.",
    )
    cors_origins: str | None = Field(
        None,
        description="Origins of the web pages that may ask from a browser, separated by commas, like "
        "`https://chat.example.org`; no others may.",
    )
    hsts_s: int = Field(
        0,
        ge=0,
        description="How long browsers shall insist on https, in seconds; 0 does not say it. For a name that is never "
        "served without TLS.",
    )
    jwt_issuer: str | None = Field(None, description="Issuer of users' tokens, exactly as their `iss` says it.")
    jwt_audience: str | None = Field(
        None, description="Audiences, separated by commas, of which `aud` must have one; may be left out with an azp."
    )
    jwt_azp: str | None = Field(
        None, description="Applications, separated by commas, of which `azp` must be one; for issuers without `aud`."
    )
    jwt_jwks_url: str | None = Field(None, description="URL of the issuer's JWKS; https, or http on 127.0.0.1.")
    jwt_key_file: Path | None = Field(
        None, description="File with the issuer's public key in PEM, or its JWKS, instead of a URL."
    )
    jwt_secret: str | None = Field(
        None,
        repr=False,
        description="Reference, `env:NAME` or `file:PATH`, to the secret of an issuer that signs with HS256.",
    )
    jwt_algorithms: str = Field(
        "RS256,ES256,EdDSA", description="Algorithms that tokens may be signed with, asymmetric ones only."
    )
    jwt_leeway_s: float = Field(
        30, ge=0, le=300, description="How far the issuer's clock may be from ours, in seconds."
    )
    jwt_scopes: str = Field(
        "process,read,sync",
        description="Scopes of a user whose token names none of ours in `scope` or `scp`; `none` for none.",
    )
    row_security: Literal["auto", "require", "off"] = Field(
        "auto",
        description="Whether PostgreSQL itself keeps users apart as well: where `parley migrate` found a way, always "
        "(without one the server refuses to serve), or never.",
    )
    signing_key: str | None = Field(
        None,
        repr=False,
        description="Where the key is that signs streaming URLs: `env:NAME` or `file:/path`; several with a comma "
        "between two, the first signs. Default: a key in the database.",
    )
    master_key: str | None = Field(
        None,
        repr=False,
        description="Where the key is that encrypts secrets in the database: `env:NAME` or `file:/path`; several with "
        "a comma between two, the newest first. Default: secrets are references only.",
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="Folder of the embedded PostgreSQL (`parley dev` only).",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level logged.")
    log_format: Literal["json", "text"] = Field("json", description="JSON lines, or text for a person at a terminal.")
    database_wait_s: float = Field(60, ge=0, description="How long a start waits for PostgreSQL before it gives up.")
    pool_size: int = Field(10, ge=2, le=200, description="Database connections of the API, beside the log's own one.")

    body_limit: int = Field(4 * MIB, ge=KIB, description="Largest request body, in bytes.")
    body_timeout_s: float = Field(30, gt=0, description="How long a request's body may take, in seconds.")
    upload_limit: int = Field(10 * MIB, ge=KIB, description="Largest body of upload-image, in bytes.")
    upload_timeout_s: float = Field(30, gt=0, description="How long the body of an upload may take, in seconds.")
    upload_stall_s: float = Field(
        5, gt=0, description="How long the next 64 KiB of an upload or an import may take, or its end, in seconds."
    )
    sync_history_limit: int = Field(
        16 * MIB, ge=KIB, description="Largest body of a front end that sends whole histories, in bytes."
    )
    import_limit: int = Field(256 * MIB, ge=KIB, description="Largest file of chats that is imported, in bytes.")
    import_timeout_s: float = Field(600, gt=0, description="How long importing a file may take, in seconds.")
    image_pixels: int = Field(40_000_000, ge=1, description="Most pixels of a picture; asked before it is decoded.")
    image_side: int = Field(
        2048, ge=32, le=8192, description="Pixels of a stored picture's longer side; larger ones are scaled down."
    )
    image_bytes: int = Field(
        3_670_016, ge=64 * KIB, description="Most bytes of a stored picture; larger ones are scaled down further."
    )
    image_timeout_s: float = Field(10, gt=0, description="Longest decoding of one picture, in seconds.")
    image_decoders: int = Field(
        2, ge=1, le=64, description="Processes that decode pictures; started when first needed."
    )
    message_limit: int = Field(32 * KIB, ge=1, description="Longest message_text, in UTF-8 bytes.")
    history_limit: int = Field(200, ge=0, description="Most messages in conversation_history, or read from the chat.")
    history_bytes: int = Field(256 * KIB, ge=0, description="Most UTF-8 bytes of conversation_history.")
    queue_limit: int = Field(20, ge=0, description="Messages that may wait in one session while an answer runs.")
    user_runs: int = Field(
        100, ge=1, description="Answers of one user under way on all replicas; more are refused with 429."
    )
    user_queue: int = Field(200, ge=0, description="Messages of one user that may wait in all sessions together.")
    max_runs: int = Field(2000, ge=1, description="Answers under way on this replica; more are refused with 503.")
    rate_user: str = Field(
        "messages=120, uploads=60, changes=300, reads=3000, connects=300",
        description="What one user may do in a minute on this replica, or `none`; more is refused with 429.",
    )
    rate_key: str = Field("none", description="What one API key may do in a minute on this replica.")
    rate_address: str = Field(
        "failures=60",
        description="What may be done without an API key from one address in a minute on this replica; `failures` are "
        "requests with bad credentials.",
    )
    quota_user_messages: int | None = Field(
        None, ge=1, description="Messages of one user that are answered in a day (UTC), on all replicas together."
    )
    quota_user_tokens: int | None = Field(None, ge=1, description="Tokens of one user in a day (UTC).")
    quota_key_messages: int | None = Field(
        None, ge=1, description="Messages of one API key in a day (UTC), unless the key has a quota of its own."
    )
    quota_key_tokens: int | None = Field(
        None, ge=1, description="Tokens of one API key in a day (UTC), unless the key has a quota of its own."
    )
    idempotency_hours: float = Field(24, gt=0, description="How long an Idempotency-Key is remembered, in hours.")

    connect_timeout_s: float = Field(5, gt=0, description="Connecting to a provider, in seconds.")
    first_token_timeout_s: float = Field(60, gt=0, description="From the request to the first token, in seconds.")
    gap_timeout_s: float = Field(30, gt=0, description="Longest silence between two tokens, in seconds.")
    run_timeout_s: float = Field(300, gt=0, description="Longest run of one answer, in seconds.")
    provider_networks: str = Field(
        "127.0.0.0/8,::1",
        description="Private networks where providers may be, separated by commas, like `10.0.0.0/8`, or `none`.",
    )
    provider_retries: int = Field(2, ge=0, le=10, description="Retries of a provider call before its first token.")
    provider_concurrency: int = Field(
        2000, ge=1, description="Calls under way per provider; more fail with upstream_busy."
    )
    answer_limit: int = Field(
        MIB, ge=KIB, description="Longest answer, in UTF-8 bytes; it is cut there (finish_reason length)."
    )

    flush_gap_ms: float = Field(
        8, ge=0, le=1000, description="Least time between two flushes of the log under load, in milliseconds."
    )
    flush_events: int = Field(2000, ge=1, description="Most events in one flush.")
    stream_buffer: int = Field(
        MIB, ge=4 * KIB, description="Unsaved bytes of one stream before its provider read waits."
    )
    replica_buffer: int = Field(
        64 * MIB, ge=64 * KIB, description="Unsaved bytes of all streams before all provider reads wait."
    )
    unsaved_s: float = Field(
        30, gt=0, description="How long a run may wait for the database before it stops, in seconds."
    )
    partition_days: int = Field(7, ge=1, le=60, description="Day partitions of the log that are made ahead.")
    lease_s: float = Field(6, gt=0, description="A replica silent for this long may be declared dead, in seconds.")
    beat_s: float = Field(2, gt=0, description="Interval of a replica's heartbeat, in seconds.")
    scan_s: float = Field(1, gt=0, description="Interval of looking for streams of dead replicas, in seconds.")
    suspect: bool = Field(
        True,
        description="Whether replicas hold a session lock, so that a killed one is noticed within a second. Turn it "
        "off behind a pooler that shares sessions.",
    )
    owners: int = Field(
        3, ge=1, description="Replicas that may own an answer one after the other; then it ends as failed."
    )
    restart_age_s: float = Field(
        3600, ge=0, description="An answer that was begun longer ago is not begun again by another replica, in seconds."
    )

    keep_events_hours: float = Field(
        48, ge=1, le=24 * 3650, description="How long events are kept after their day has ended, in hours."
    )
    keep_streams_days: float = Field(
        7,
        gt=0,
        le=3650,
        description="How long ended streams are known, and messages may wait, in days.",
    )
    keep_sessions_days: float = Field(
        30, gt=0, le=3650, description="How long idle sessions are kept, in days; their chats stay."
    )
    keep_errors_days: float = Field(90, gt=0, le=3650, description="How long rows of error_logs are kept, in days.")
    keep_audit_days: float = Field(
        365, gt=0, le=3650, description="How long it is known what administrators did, in days."
    )
    keep_metrics_days: float = Field(
        90,
        gt=0,
        le=3650,
        description="How long rows of conversation_processing_metrics and of sync_hours are kept, in days.",
    )
    keep_images_days: float = Field(
        90,
        gt=0,
        le=3650,
        description="How long pictures are kept that were uploaded and that no message names, in days.",
    )
    keep_deleted_days: float = Field(
        90,
        gt=0,
        le=3650,
        description="How long the contents of deleted chats are kept, in days; devices that were away for longer read "
        "everything anew.",
    )
    keep_failed_days: float = Field(
        90, gt=0, le=3650, description="How long messages are kept that failed and were not tried again, in days."
    )
    keep_quotas_days: float = Field(
        35, ge=2, le=3650, description="How long it is known what quotas were used on a day, in days."
    )
    enable_background_jobs: bool = Field(
        True,
        validation_alias=AliasChoices("ENABLE_BACKGROUND_JOBS", "enable_background_jobs"),
        description="Whether discovery, the comparison of the index and roll-ups run here. Partitions are made and "
        "old rows go in any case.",
    )
    sync_enabled: bool = Field(
        True,
        validation_alias=AliasChoices("SYNC_ENABLED", "sync_enabled"),
        description="Whether devices may synchronise chats; otherwise they are answered 403 `sync_disabled`.",
    )
    device_id: str = Field(
        "default",
        pattern=r"^[A-Za-z0-9._~:-]{1,128}$",
        validation_alias=AliasChoices("DEVICE_ID", "device_id"),
        description="Which device `/api/sync` is about where a request names none.",
    )

    discovery_cron: str = Field(
        "*/5 * * * *",
        validation_alias=AliasChoices("CONVERSATION_DISCOVERY_CRON", "discovery_cron"),
        description="When sources of conversations are looked through (cron, UTC); one that cannot be read is "
        "reported, and the default used.",
    )
    discovery_batch: int = Field(
        500, ge=1, le=10_000, description="Conversations of a source that are counted in one transaction."
    )
    discovery_pass_s: float = Field(
        30, gt=0, le=240, description="Longest pass over one source, in seconds; the next one goes on from there."
    )
    reconcile_cron: str = Field(
        "*/5 1-4 * * *",
        description="When the index of conversations is compared with what it is made of (cron, UTC): a minute each "
        "time, until all of it was compared, at most twice a day; one that cannot be read is reported, and the "
        "default used.",
    )
    search_messages: bool = Field(
        False,
        description="Whether searches may look at all messages of our own chats, and not at questions only "
        "(`in=messages`); it costs room and time for each message. The same on all replicas.",
    )
    webhook_secrets: str | None = Field(
        None,
        repr=False,
        description="Where the secrets are that sign webhooks: `env:NAME` or `file:/path`; several with a comma "
        "between two. Without any, webhooks are refused.",
    )

    sse_heartbeat_s: float = Field(15, gt=0, description="Interval of the SSE heartbeat, in seconds.")
    sse_send_timeout_s: float = Field(
        20, gt=0, description="A reader that takes no byte for this long is closed, in seconds."
    )
    sse_max_age_s: float = Field(
        600, gt=0, description="Age at which an SSE connection is closed at a frame boundary, in seconds."
    )
    sse_retry_ms: int = Field(
        1000, ge=0, description="Reconnection time told to EventSource; jittered by half, in milliseconds."
    )
    reader_events: int = Field(
        256, ge=1, description="Events buffered for one live reader before it goes back to reading the table."
    )
    reader_bytes: int = Field(
        MIB, ge=KIB, description="Bytes buffered for one live reader before it goes back to reading the table."
    )
    reader_streams: int = Field(
        20, ge=1, le=100, description="Streams that one reader may follow over one connection (`GET /api/stream`)."
    )
    max_readers: int = Field(
        5000, ge=1, description="SSE readers on this replica; further ones are told to come back later."
    )
    user_readers: int = Field(
        200, ge=1, description="Readers of one user on this replica; further ones are told to come back later."
    )
    stream_readers: int = Field(
        100, ge=1, description="Readers of one stream on this replica; further ones are told to come back later."
    )
    poll_s: float = Field(
        1, gt=0, description="Interval at which a waiting reader looks at the table by itself, in seconds."
    )
    bus: Literal["notify", "poll"] = Field(
        "notify", description="How replicas tell each other of new events: by LISTEN and NOTIFY, or not at all."
    )
    listen_url: str | None = Field(
        None, repr=False, description="PostgreSQL for LISTEN, where DATABASE_URL names a pooler; default DATABASE_URL."
    )
    drain_s: float = Field(25, ge=0, description="How long a stopping server lets running answers finish, in seconds.")


def load(**given: object) -> Settings:
    """Settings from the environment, `given` first. Raises Misconfigured naming every wrong variable at once."""
    try:
        return Settings(**given)  # type: ignore[arg-type]
    except ValidationError as error:
        wrong = "; ".join(f"{_variable(e['loc'])}: {e['msg']}" for e in error.errors())
        raise Misconfigured("settings_invalid", f"The environment is not usable: {wrong}") from None


def _variable(loc: tuple[int | str, ...]) -> str:
    name = str(loc[0])
    return name if name.isupper() else f"PARLEY_{name.upper()}"
