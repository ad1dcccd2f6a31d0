import OpenAI from "openai";

const [url, key] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const asked = { model: "tiny", messages: [{ role: "user", content: "snow?" }], temperature: 0, max_tokens: 9 };
const told = { models: [], streamed: "" };

for await (const model of client.models.list()) told.models.push(model.id);
const answer = await client.chat.completions.create(asked);
told.whole = answer.choices[0].message.content;
told.usage = answer.usage;
for await (const part of await client.chat.completions.create({ ...asked, stream: true })) {
  told.streamed += part.choices[0].delta.content ?? "";
}
const schema = { type: "object", properties: { colour: { enum: ["white", "blue"] } }, required: ["colour"] };
const formed = await client.chat.completions.create({
  ...asked,
  max_tokens: 60,
  response_format: { type: "json_schema", json_schema: { name: "colour", schema, strict: true } },
});
told.form = JSON.parse(formed.choices[0].message.content).colour;
try {
  await new OpenAI({ baseURL: `${url}/v1`, apiKey: "sk-wrong", maxRetries: 0 }).chat.completions.create(asked);
} catch (error) {
  told.refused = { status: error.status, code: error.code };
}
console.log(JSON.stringify(told));
