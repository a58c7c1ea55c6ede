"""How every run begins, when its message is accepted or when its turn in the queue has come."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any
from uuid import UUID

from app.chats import store
from app.chats.chat import Message
from app.chats.images import Images
from app.chats.picture import Picture
from app.conversations import index, recount
from app.errors import Conflict, Invalid, NotFound
from app.flows.chatbots import Chatbots
from app.flows.conditions import Ask
from app.flows.config import Chatbot, Flow
from app.flows.incoming import Incoming, decode, encode
from app.flows.plan import Plan, plan
from app.flows.run import Inputs, Run
from app.flows.wishes import Wishes, allowed
from app.postgres import Connection, Pool
from app.providers.provider import Image
from app.statement import Part
from app.streams.stream import Orphan, Stream, Streams


@dataclass(frozen=True, slots=True)
class Memory:
    """How much of a chat the model sees."""

    messages: int = 200
    bytes: int = 256 << 10


@dataclass(frozen=True, slots=True)
class Prepared:
    """A message with all that is decided about it before anything is written."""

    incoming: Incoming
    version: int
    chatbot: Chatbot
    wishes: Wishes
    plan: Plan
    picture: Picture | None = None

    @property
    def flow_type(self) -> str:
        return self.plan.decision.flow

    @property
    def flow(self) -> Flow:
        """The flow that will answer, as far as that is decided."""
        return self.chatbot.flows[self.flow_type]


class Beginning:
    """From a message to a run, in two steps: what can be refused is refused before a transaction begins."""

    def __init__(self, streams: Streams, *, chatbots: Chatbots, images: Images, memory: Memory) -> None:
        self._streams = streams
        self._chatbots = chatbots
        self._images = images
        self._memory = memory

    async def chatbot(self, chatbot_id: str) -> Chatbot:
        """The one in use. Raises NotFound."""
        return (await self._chatbots.newest(chatbot_id))[1]

    async def prepare(self, incoming: Incoming) -> Prepared:
        """Raises NotFound, Invalid or Unavailable for what this chatbot does not take, or not now.

        A picture inside the message is stored by this, and named by its id from here on.
        """
        version, chatbot = await self._chatbots.newest(incoming.chatbot_id)
        return await self._prepared(incoming, version, chatbot)

    async def _prepared(self, incoming: Incoming, version: int, chatbot: Chatbot) -> Prepared:
        wishes = allowed(incoming.configuration, chatbot)
        incoming, picture = await self._seen(incoming, chatbot)
        ask = Ask(incoming.text, picture is not None, wishes.language, wishes.flow_type)
        return Prepared(incoming, version, chatbot, wishes, plan(chatbot, ask), picture)

    async def _seen(self, incoming: Incoming, chatbot: Chatbot) -> tuple[Incoming, Picture | None]:
        if incoming.image_data is None and incoming.image_id is None:
            return incoming, None
        if not chatbot.takes_images:
            raise Invalid("images_unsupported", "This chatbot takes no images; leave image_data and image_id out.")
        if incoming.image_data is not None:
            stored = await self._images.accept_inline(incoming.image_data, user_id=incoming.user_id)
            incoming = replace(incoming, image_data=None, image_id=str(stored.id))
        assert incoming.image_id is not None
        return incoming, await self._images.read(incoming.image_id, user_id=incoming.user_id)

    async def write(
        self,
        connection: Connection,
        prepared: Prepared,
        *,
        stream_id: UUID,
        session_id: str,
        new: bool,
        queued: bool,
        seq: int | None = None,
    ) -> Run:
        """The question, the active stream and its first event, in the transaction that occupied the session.

        `seq` as of `store.save_question`. Raises Conflict where the message's id is taken.
        """
        message_id = prepared.incoming.message_id or str(uuid.uuid4())
        incoming = replace(prepared.incoming, message_id=message_id)
        names = (incoming.user_id, session_id, incoming.chatbot_id)
        stream = Stream(stream_id, *names, prepared.version, prepared.flow_type)
        history = () if new and incoming.history is None else await self.history(connection, incoming, session_id)
        begun = self._streams.begun(
            stream,
            _start(stream, prepared.plan),
            queued=queued,
            abandon_s=prepared.chatbot.cancel_when_abandoned_s,
            request=encode(incoming),
        )
        try:
            saved = await _save(connection, incoming, index.Chat(*names), seq=seq, begun=begun)
        except Conflict:
            self._streams.settle(stream_id)  # it never was
            raise
        if saved.brought_at is not None and incoming.history is None:
            history = await self._stored(connection, incoming.user_id, session_id, before=saved.position)
        inputs = _inputs(prepared, history)
        return Run(stream, prepared.chatbot, prepared.plan, inputs, incoming.request_id, incoming.received)

    async def again(self, pool: Pool, orphan: Orphan) -> Run:
        """The run of a stream that another replica had begun, with everything the first owner had.

        Raises NotFound or Invalid where its question, its picture or its chatbot's version has gone since.
        """
        stream = orphan.stream
        assert orphan.request is not None
        chatbot = await self._chatbots.version(stream.chatbot_id, stream.chatbot_version)
        names = {"user_id": stream.user_id, "session_id": stream.session_id}
        incoming = decode(orphan.request, **names, chatbot_id=stream.chatbot_id)
        asked = await store.question(pool, user_id=stream.user_id, message_id=incoming.message_id or "")
        if asked is None:
            raise NotFound("question_gone", "The message that is to be answered has been deleted.")
        prepared = await self._prepared(replace(incoming, text=asked.content), stream.chatbot_version, chatbot)
        history = incoming.history
        if history is None:
            history = await self._stored(pool, stream.user_id, stream.session_id, before=asked.position)
        started = perf_counter() - orphan.age_s
        return Run(stream, chatbot, prepared.plan, _inputs(prepared, history), incoming.request_id, started)

    async def history(self, connection: Connection, incoming: Incoming, session_id: str) -> Sequence[Message]:
        """What came before the message, as it says or as it is stored now."""
        given = incoming.history
        return await self._stored(connection, incoming.user_id, session_id) if given is None else given

    async def _stored(
        self, connection: Connection | Pool, user_id: str, chat_id: str, *, before: int | None = None
    ) -> list[Message]:
        bounds = {"limit": self._memory.messages, "max_bytes": self._memory.bytes}
        return await store.history(connection, user_id=user_id, chat_id=chat_id, **bounds, before=before)


async def _save(
    connection: Connection, incoming: Incoming, chat: index.Chat, *, seq: int | None, begun: Part
) -> store.Saved:
    """The question with its place in the index and with its stream, in one round trip; more only where the chat was
    deleted before, or a device has brought the question already.
    """
    assert incoming.message_id is not None
    saved = await store.save_question(
        connection,
        user_id=chat.user_id,
        chat_id=chat.id,
        message_id=incoming.message_id,
        content=incoming.text,
        attachments=[{"type": "image", "id": incoming.image_id}] if incoming.image_id else [],
        seq=seq,
        along=[index.asked(chat, incoming.text, client_ip=incoming.client_ip), begun],
    )
    if saved.brought_at is not None:
        ip = incoming.client_ip
        await index.asked_known(
            connection, chat, incoming.text, position=saved.position, at=saved.brought_at, client_ip=ip
        )
    if saved.came_back:
        await recount.count_within(connection, [(chat.user_id, chat.id)])
    return saved


def _inputs(prepared: Prepared, history: Sequence[Message]) -> Inputs:
    wishes = prepared.wishes
    return Inputs(
        prepared.incoming.text,
        history,
        images=[Image(prepared.picture.mime, prepared.picture.data)] if prepared.picture else [],
        language=wishes.language,
        values={**prepared.chatbot.values, **wishes.values},
        temperature=wishes.temperature,
        top_k=wishes.top_k,
    )


def _start(stream: Stream, planned: Plan) -> dict[str, Any]:
    return {
        "session_id": stream.session_id,
        "chatbot_id": stream.chatbot_id,
        "flow_type": stream.flow_type,
        "plan": planned.shown(),
    }
