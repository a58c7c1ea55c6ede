"""quota_usage: what users, API keys and chatbots may have in a day (UTC, by the database's clock).

Reserved by the transaction that accepts a message, settled by the one that ends its stream: exact on all replicas
together. Where nothing has a quota nothing is asked of the database.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from app.access.principal import Daily, Principal
from app.chats.chat import Message, estimated_tokens
from app.errors import TooMany
from app.expiry import Rows
from app.flows.beginning import Prepared
from app.flows.config import ANSWER, ANSWER_TOKENS, Chatbot, Flow
from app.postgres import Connection
from app.streams.stream import Reservation
from app.telemetry import Metrics

# Rows are locked in the order of their subjects, here and when they are settled: nobody waits in a circle.
_RESERVE = """
insert into quota_usage as q (day, subject, messages_reserved, tokens_reserved, messages_quota, tokens_quota)
select (parley_now() at time zone 'utc')::date, subject, 1, tokens, messages_quota, tokens_quota
from unnest($1::text[], $2::bigint[], $3::bigint[], $4::bigint[]) as w (subject, tokens, messages_quota, tokens_quota)
order by subject collate "C"
on conflict (day, subject) do update set
    messages_reserved = q.messages_reserved + 1, tokens_reserved = q.tokens_reserved + excluded.tokens_reserved,
    messages_quota = excluded.messages_quota, tokens_quota = excluded.tokens_quota
where (excluded.messages_quota is null or q.messages_used + q.messages_reserved < excluded.messages_quota)
  and (excluded.tokens_quota is null
       or q.tokens_used + q.tokens_reserved + excluded.tokens_reserved <= excluded.tokens_quota)
returning subject, day
"""
# A message counts unless all that was tried for it has failed and cost nothing, or nothing was tried.
_SETTLE = """
with held as materialized (
        select q.subject, r.tokens
        from quota_usage q join unnest($2::text[], $3::bigint[]) as r (subject, tokens) on r.subject = q.subject
        where q.day = $1 order by q.subject collate "C" for update of q),
     cost as materialized (
        select coalesce(sum(prompt_tokens::bigint + completion_tokens), 0)::bigint as tokens,
               coalesce(bool_or(outcome <> 'failed' or prompt_tokens + completion_tokens > 0), false)::int as messages
        from usage_ledger where stream_id = $4)
update quota_usage q set
    messages_reserved = q.messages_reserved - 1, messages_used = q.messages_used + cost.messages,
    tokens_reserved = q.tokens_reserved - held.tokens, tokens_used = q.tokens_used + cost.tokens
from held, cost where q.day = $1 and q.subject = held.subject
"""
# What a message that waits holds, while its text and its history change: as much as it would be given were it sent now,
# and with $5 even beyond the quota.
_FOLLOW = """
with held as materialized (
        select q.subject, q.tokens_quota, r.tokens,
               case when q.tokens_quota is null then 0 else least($4, q.tokens_quota) end as wanted,
               q.tokens_used + q.tokens_reserved - r.tokens as others
        from quota_usage q join unnest($2::text[], $3::bigint[]) as r (subject, tokens) on r.subject = q.subject
        where q.day = $1 order by q.subject collate "C" for update of q),
     told as materialized (
        select *, $5 or wanted <= tokens or others + wanted <= tokens_quota as fits from held),
     moved as (
        update quota_usage q set tokens_reserved = q.tokens_reserved - told.tokens + told.wanted
        from told where q.day = $1 and q.subject = told.subject and told.fits)
select subject, tokens_quota, wanted, wanted - tokens as more, fits from told
"""
_LOOK = """
select w.subject, coalesce(q.messages_used, 0) as messages_used, coalesce(q.messages_reserved, 0) as messages_reserved,
       coalesce(q.tokens_used, 0) as tokens_used, coalesce(q.tokens_reserved, 0) as tokens_reserved,
       extract(epoch from date_trunc('day', utc) + interval '1 day' - utc)::float8 as left_s
from unnest($1::text[]) as w (subject) cross join (select parley_now() at time zone 'utc' as utc) c
left join quota_usage q on q.day = c.utc::date and q.subject = w.subject
"""

# What a picture is reckoned as, in tokens.
_PICTURE_TOKENS = 1600
# When to come again where answers under way hold what is left, in seconds.
_SOON_S = 5


@dataclass(frozen=True, slots=True)
class Quota:
    """What one subject, `user:ann`, `key:ID` or `chatbot:shop`, may have in a day."""

    subject: str
    daily: Daily

    @property
    def of(self) -> str:
        return self.subject.partition(":")[0]


class Quotas:
    """`user` and `key` are what each of them may have that says nothing of its own."""

    def __init__(self, *, user: Daily, key: Daily, metrics: Metrics) -> None:
        self._user = user
        self._key = key
        self._metrics = metrics

    def of(self, user_id: str, chatbot: Chatbot, *, chatbot_id: str, principal: Principal | None) -> list[Quota]:
        """Those that a message counts for, in the order in which their rows are locked."""
        found = []
        if chatbot.daily_messages is not None or chatbot.daily_tokens is not None:
            found.append(Quota(f"chatbot:{chatbot_id}", Daily(chatbot.daily_messages, chatbot.daily_tokens)))
        if principal is not None and principal.kind == "key":
            own = principal.daily
            daily = Daily(own.messages or self._key.messages, own.tokens or self._key.tokens)
            if daily.limited:
                found.append(Quota(principal.id, daily))
        if user_id and self._user.limited:
            found.append(Quota(f"user:{user_id}", self._user))
        return sorted(found, key=lambda quota: quota.subject)

    async def reserve(self, connection: Connection, quotas: Sequence[Quota], tokens: int) -> Reservation:
        """A message and so many tokens of each, in the caller's transaction, which has to be given up where this raises
        TooMany. No more tokens than a quota has are taken of it: where nothing is used yet, a message is answered.
        """
        subjects = [quota.subject for quota in quotas]
        messages, most = [quota.daily.messages for quota in quotas], [quota.daily.tokens for quota in quotas]
        taken = [0 if limit is None else min(tokens, limit) for limit in most]
        rows = await connection.fetch(_RESERVE, subjects, taken, messages, most)
        if len(rows) < len(quotas):
            granted = {row["subject"] for row in rows}
            index = next(number for number, subject in enumerate(subjects) if subject not in granted)
            await self.require(connection, [quotas[index]], taken[index])
            raise self._refused(quotas[index], "messages", None)
        return Reservation(rows[0]["day"], subjects, taken)

    async def follow(
        self, connection: Connection, reservation: Reservation, tokens: int, *, force: bool = False
    ) -> Reservation:
        """So many tokens instead of those of the reservation, in the caller's transaction, which has to be given up
        where this raises TooMany: one of the quotas has no room for more. With `force` it is taken all the same.
        """
        subjects = list(reservation.subjects)
        rows = await connection.fetch(_FOLLOW, reservation.day, subjects, list(reservation.tokens), tokens, force)
        for row in rows:
            if not row["fits"]:
                quota = Quota(row["subject"], Daily(tokens=row["tokens_quota"]))
                await self.require(connection, [quota], row["more"])
                raise self._refused(quota, "tokens", None)
        taken = {row["subject"]: row["wanted"] for row in rows}
        return Reservation(reservation.day, subjects, [taken.get(subject, 0) for subject in subjects])

    async def require(self, connection: Connection, quotas: Sequence[Quota], tokens: int = 1) -> None:
        """Raises TooMany where a message would be refused now, as far as that can be known before it is reserved."""
        if not quotas:
            return
        rows = {row["subject"]: row for row in await connection.fetch(_LOOK, [quota.subject for quota in quotas])}
        for quota in quotas:
            row = rows[quota.subject]
            for of, most, more in (("messages", quota.daily.messages, 1), ("tokens", quota.daily.tokens, tokens)):
                used = row[f"{of}_used"] + more
                if most is not None and used + row[f"{of}_reserved"] > most:
                    raise self._refused(quota, of, row["left_s"] if used > most else None)

    def _refused(self, quota: Quota, what: str, day_s: float | None) -> TooMany:
        """`day_s`: until the next day, where this one is used up; else answers under way hold the rest."""
        self._metrics.limited.labels(f"daily_{what}", quota.of).inc()
        most = quota.daily.messages if what == "messages" else quota.daily.tokens
        told = f"This {quota.of} may have {most} {what} a day (UTC)"
        why = ", and answers under way hold what is left." if day_s is None else ", which are used up."
        return TooMany("quota_exceeded", told + why, retry_after=day_s or _SOON_S)


async def settle(connection: Connection, stream_id: UUID, reservation: Reservation) -> None:
    """Give back what was reserved, and use what the ledger has of the stream, in the transaction that ends it."""
    subjects, tokens = list(reservation.subjects), list(reservation.tokens)
    await connection.execute(_SETTLE, reservation.day, subjects, tokens, stream_id)


def estimate(prepared: Prepared, history: Sequence[Message]) -> int:
    """The tokens that an answer may take: for each flow of the plan what it is told, and as much as it may say."""
    chatbot, plan = prepared.chatbot, prepared.plan
    past = sum(estimated_tokens(message.content) for message in history)
    said = estimated_tokens(prepared.incoming.text)
    pictures = _PICTURE_TOKENS if prepared.picture else 0

    def of(name: str) -> int:
        return _of_flow(chatbot.flows[name], said, past=past, pictures=pictures)

    total = sum(of(name) for name in plan.steps if name != ANSWER)
    router = chatbot.router
    if router is None or plan.decision.final:
        return total + of(plan.decision.flow)
    # What starts early and is dropped is paid for beside what answers then.
    early = of(plan.decision.flow) if plan.speculative else 0
    return total + early + max(of(name) for name in {router.default, *router.outcomes.values()})


def _of_flow(flow: Flow, said: int, *, past: int, pictures: int) -> int:
    told = said + estimated_tokens(flow.system) + estimated_tokens(flow.prompt)
    told += pictures * flow.images + (past if flow.history != 0 else 0)
    answer = flow.max_tokens or ANSWER_TOKENS
    return min(told + answer, flow.context_tokens) if flow.context_tokens else told + answer


def usage_expiring(keep_s: float) -> Rows:
    """Days that nobody asks about any more."""
    return Rows("quota_usage", "day", keep_s)
