// What n8n and LangChain's JavaScript write, by their own class. The connection is in PGHOST and so on.
import pg from "pg";
import { PostgresChatMessageHistory } from "@langchain/community/stores/message/postgres";
import { AIMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage } from "@langchain/core/messages";

const pool = new pg.Pool();

async function write(tableName, sessionId, messages, escapeTableName = false) {
    const history = new PostgresChatMessageHistory({ pool, tableName, sessionId, escapeTableName });
    for (const message of messages) {
        await history.addMessage(message);
    }
}

// As n8n's node does, with its table's name.
await write("n8n_chat_histories", "n8n-session-1", [
    new HumanMessage("Which orders are late?"),
    new AIMessage({ content: "", tool_calls: [{ name: "orders", args: { late: true }, id: "call_1" }] }),
    new ToolMessage({ content: '[{"order": 4711}]', tool_call_id: "call_1", name: "orders" }),
    new AIMessage("Order 4711 is late."),
    new HumanMessage("Since when? 🕰"),
    new AIMessage("Since Monday."),
]);
await write("n8n_chat_histories", "n8n-session-2", [new HumanMessage("Hello"), new AIMessage("Hello! How can I help?")]);

await write("langchain_chat_histories", "js-1", [
    new SystemMessage("Be brief."),
    new HumanMessage({
        content: [
            { type: "text", text: "What is on this picture?" },
            { type: "image_url", image_url: { url: "data:image/png;base64,iVBORw0KGgo=" } },
        ],
    }),
    new AIMessage({
        content: "A lighthouse.",
        usage_metadata: { input_tokens: 30, output_tokens: 4, total_tokens: 34 },
        response_metadata: { model_name: "gpt-5-mini", finish_reason: "stop" },
    }),
    new ChatMessage({ content: "I agree.", role: "critic" }),
]);
await pool.end();
