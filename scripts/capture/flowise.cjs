// Flowise's chat_message: made by its own migrations, and filled through its own entity, as its utilAddChatMessage does.
require("reflect-metadata");
const { readFileSync, readdirSync } = require("node:fs");
const { join } = require("node:path");
const { DataSource } = require("typeorm");

const dist = join(__dirname, "flowise/package/dist/database");
const { ChatMessage } = require(join(dist, "entities/ChatMessage.js"));
const { Execution } = require(join(dist, "entities/Execution.js"));
const { ChatFlow } = require(join(dist, "entities/ChatFlow.js"));

const FLOW = "6f1b3c7e-6d3a-4d2e-9a54-0d6a1f9f2a11";

// All but the few that want the whole of Flowise installed, none of which is about this table.
function migrations() {
    const folder = join(dist, "migrations/postgres");
    const names = readdirSync(folder).filter((name) => /^\d.*\.js$/.test(name));
    const fit = names.filter((name) => {
        const text = readFileSync(join(folder, name), "utf8");
        return text.includes("chat_message") || !text.includes("require(");
    });
    return fit.sort().flatMap((name) => Object.values(require(join(folder, name))));
}

async function main() {
    const source = new DataSource({
        type: "postgres",
        host: process.env.PGHOST,
        username: process.env.PGUSER,
        database: process.env.PGDATABASE,
        installExtensions: false,
        entities: [ChatMessage, Execution, ChatFlow],
        migrations: migrations(),
    });
    await source.initialize();
    // The embedded server has no contrib modules, and this is all that is used of uuid-ossp.
    await source.query("create function uuid_generate_v4() returns uuid language sql as 'select gen_random_uuid()'");
    await source.runMigrations();
    const messages = source.getRepository(ChatMessage);
    const started = new Date("2026-11-21T12:00:00.123Z").getTime();
    const add = (seconds, message) => {
        const createdDate = new Date(started + seconds * 1000);
        return messages.save(messages.create({ chatflowid: FLOW, chatType: "EXTERNAL", createdDate, ...message }));
    };
    const chat = { chatId: "0a1f9f2a-1111-4d2e-9a54-6f1b3c7e6d3a", sessionId: "visitor-7", memoryType: "Buffer Memory" };
    await add(0, { ...chat, role: "userMessage", content: "What does delivery cost?" });
    await add(2, { ...chat, role: "apiMessage", content: "Nothing above 50 €.", usedTools: "[]" });
    await add(60, { ...chat, role: "userMessage", content: "And below?" });
    await add(61, { ...chat, role: "apiMessage", content: "4.90 €." });
    const bare = { chatId: "5e0c2d4b-2222-4f6e-8a54-6f1b3c7e6d3a", chatType: "INTERNAL" };
    await add(90, { ...bare, role: "userMessage", content: "Test" });
    await add(91, { ...bare, role: "apiMessage", content: "It works." });
    await source.destroy();
}

main().catch((error) => {
    console.error(error);
    process.exit(1);
});
