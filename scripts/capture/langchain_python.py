"""What LangChain's Python libraries write, by their own classes. Argument: the DSN."""

import sys
import uuid

import psycopg
from langchain_community.chat_message_histories import PostgresChatMessageHistory, SQLChatMessageHistory
from langchain_core.messages import AIMessage, AIMessageChunk, ChatMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_postgres import PostgresChatMessageHistory as NewHistory

DSN = sys.argv[1]
USAGE = {"input_tokens": 12, "output_tokens": 5, "total_tokens": 17}
MESSAGES = [
    SystemMessage("You help in a library."),
    HumanMessage("Do you have Moby-Dick?"),
    AIMessage("", tool_calls=[{"name": "find", "args": {"title": "Moby-Dick"}, "id": "call_1"}]),
    ToolMessage("2 copies", tool_call_id="call_1"),
    AIMessage("Yes, two copies.", usage_metadata=USAGE, response_metadata={"model_name": "gpt-5-mini"}),
    HumanMessage([{"type": "text", "text": "Where?"}, {"type": "text", "text": "And until when?"}]),
    AIMessageChunk("On shelf 7, until Friday."),
    ChatMessage(role="user", content="Thanks \u2028 a lot 🐋"),
]


def community() -> None:
    history = PostgresChatMessageHistory("library-1", DSN)
    for message in MESSAGES:
        history.add_message(message)
    PostgresChatMessageHistory("library-2", DSN).add_user_message("Are you open?")


def community_sql() -> None:
    dsn = DSN.replace("postgresql://", "postgresql+psycopg://")
    for session in ("sql-1", "sql-2"):
        SQLChatMessageHistory(session, connection=dsn, table_name="sql_message_store").add_messages(MESSAGES)


def postgres() -> None:
    with psycopg.connect(DSN) as connection:
        NewHistory.create_tables(connection, "chat_history")
        for number in (1, 2):
            session = str(uuid.UUID(int=number, version=4))
            NewHistory("chat_history", session, sync_connection=connection).add_messages(MESSAGES)


community()
community_sql()
postgres()
