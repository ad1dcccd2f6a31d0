// The chat page: conversations are kept in this browser and nowhere else; every answer is asked for over the same API that
// any other client uses. What a model writes is Markdown made into HTML by marked and cleaned by DOMPurify, never trusted.

const WORDS = {
  en: {
    new: "New chat", settings: "Settings", send: "Send", stop: "Stop", question: "Message", skip: "Skip to the message box",
    conversations: "Conversations", messages: "Messages", close: "Close", save: "Save", cancel: "Cancel", copy: "Copy",
    copied: "Copied", edit: "Edit", again: "Regenerate", rename: "Rename", remove: "Delete", export: "Export", retry: "Retry",
    system: "System prompt", temperature: "Temperature", top_p: "Top p", max_tokens: "Longest answer, in tokens",
    no_limit: "what the context holds", key: "API key", welcome: "Ask something.", untitled: "New chat", title: "Name",
    really: "Delete this conversation?", thinking: "Thoughts", answering: "Answering…", done: "Answer complete", stopped: "Stopped",
    cut: "Cut: the answer has reached its limit.", lost: "The connection was lost.", full: "This browser's storage is full.",
    tokens: (u, s) => `${u.prompt_tokens} + ${u.completion_tokens} tokens, ${(u.completion_tokens / s).toFixed(1)} a second`,
    other: "中文",
  },
  zh: {
    new: "新对话", settings: "设置", send: "发送", stop: "停止", question: "输入消息", skip: "跳到输入框",
    conversations: "对话列表", messages: "消息", close: "关闭", save: "保存", cancel: "取消", copy: "复制",
    copied: "已复制", edit: "编辑", again: "重新生成", rename: "重命名", remove: "删除", export: "导出", retry: "重试",
    system: "系统提示词", temperature: "温度", top_p: "Top p", max_tokens: "回答的最大长度（token）",
    no_limit: "以上下文为限", key: "API 密钥", welcome: "请提问。", untitled: "新对话", title: "名称",
    really: "删除这个对话？", thinking: "思考", answering: "正在回答…", done: "回答完毕", stopped: "已停止",
    cut: "回答已达到长度上限。", lost: "连接已断开。", full: "浏览器的存储空间已满。",
    tokens: (u, s) => `${u.prompt_tokens} + ${u.completion_tokens} 个 token，每秒 ${(u.completion_tokens / s).toFixed(1)} 个`,
    other: "English",
  },
};
// Not characters: a font without them shows boxes.
const DRAWINGS = {
  rename: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  export: "M12 4v11m-5-5 5 5 5-5M5 20h14",
  remove: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v5m4-5v5",
};
const STORE = "zili.chat.1";
const $ = (id) => document.getElementById(id);

const state = { conversations: [], now: null, settings: {}, language: null, ...read() };
let language = state.language || (navigator.language.startsWith("zh") ? "zh" : "en");
let running = null; // { controller, conversation } of the answer that is being written
let model = "";
const say = (name) => WORDS[language][name];

// ---- what is kept

function read() {
  try {
    const kept = JSON.parse(localStorage.getItem(STORE)) || {};
    return Array.isArray(kept.conversations) ? kept : {};
  } catch {
    return {};
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    $("status").textContent = say("full");
  }
}

const current = () => state.conversations.find((one) => one.id === state.now);

function begin() {
  const conversation = { id: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}`, title: "", turns: [], at: Date.now() };
  state.conversations.unshift(conversation);
  state.now = conversation.id;
  return conversation;
}

// ---- small makers

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function button(name, act, { label = say(name), ...properties } = {}) {
  return element("button", { type: "button", textContent: label, ariaLabel: say(name), title: say(name), onclick: act, ...properties });
}

function drawn(name, act) {
  const made = button(name, act, { label: "", className: "more" });
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  const line = document.createElementNS(picture.namespaceURI, "path");
  picture.setAttribute("viewBox", "0 0 24 24");
  picture.setAttribute("aria-hidden", "true");
  line.setAttribute("d", DRAWINGS[name]);
  picture.append(line);
  made.append(picture);
  return made;
}

function markdown(text) {
  const html = marked.parse(text, { gfm: true, breaks: true, async: false });
  const clean = DOMPurify.sanitize(html, {
    USE_PROFILES: { html: true },
    FORBID_TAGS: ["style", "form", "input", "button", "textarea", "select", "img", "video", "audio", "picture", "source"],
    FORBID_ATTR: ["style", "class", "id", "name"],
    RETURN_DOM_FRAGMENT: true,
  });
  for (const link of clean.querySelectorAll("a[href]")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of clean.querySelectorAll("pre")) {
    const code = block.textContent;
    block.append(button("copy", (event) => copy(code, event.currentTarget), { className: "copy" }));
  }
  return clean;
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https
    const area = element("textarea", { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  from.textContent = say("copied");
  setTimeout(() => (from.textContent = say("copy")), 1500);
}

// ---- what is shown

function translate() {
  document.documentElement.lang = language;
  for (const node of document.querySelectorAll("[data-say]")) node.textContent = say(node.dataset.say);
  for (const node of document.querySelectorAll("[data-label]")) node.ariaLabel = say(node.dataset.label);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = say(node.dataset.hint);
  $("language").textContent = say("other");
  $("language").lang = language === "en" ? "zh" : "en";
}

function show() {
  translate();
  showList();
  showTurns();
}

function showList() {
  const rows = state.conversations.map((one) =>
    element(
      "li",
      { className: one.id === state.now ? "now" : "" },
      element("button", {
        type: "button",
        className: "open",
        textContent: one.title || say("untitled"),
        ariaCurrent: one.id === state.now ? "true" : null,
        onclick: () => open(one.id),
      }),
      drawn("rename", () => rename(one)),
      drawn("export", () => save(one)),
      drawn("remove", () => remove(one)),
    ),
  );
  $("conversations").replaceChildren(...rows);
  $("title").textContent = current()?.title || say("untitled");
  document.title = current()?.title ? `${current().title} – Zili` : "Zili";
}

function showTurns() {
  const conversation = current();
  const turns = conversation?.turns ?? [];
  const shown = turns.map((turn, index) => turnOf(conversation, turn, index));
  if (!shown.length) shown.push(element("p", { className: "welcome", textContent: say("welcome") }));
  $("messages").replaceChildren(...shown);
  $("messages").scrollTop = $("messages").scrollHeight;
  const busy = running !== null;
  $("send").hidden = busy;
  $("stop").hidden = !busy;
}

function turnOf(conversation, turn, index) {
  const body = element("div", { className: "body" });
  const tools = element("div", { className: "tools" });
  const busy = running !== null;
  if (turn.role === "user") {
    body.textContent = turn.content;
    tools.append(button("edit", () => edit(conversation, index), { disabled: busy }));
  } else {
    fill(body, turn);
    if (turn === running?.turn) body.classList.add("writing");
    else {
      tools.append(button("copy", (event) => copy(turn.content, event.currentTarget)));
      if (index === conversation.turns.length - 1)
        tools.append(button("again", () => answer(conversation, index), { disabled: busy }));
      if (turn.usage) tools.append(element("span", { className: "quiet", textContent: say("tokens")(turn.usage, turn.seconds) }));
    }
  }
  const row = element("article", { className: `turn ${turn.role}` }, body, tools);
  if (turn.cut) row.append(element("p", { className: "quiet", textContent: say("cut") }));
  if (turn.error) {
    const retry = button("retry", () => answer(conversation, index));
    row.append(element("div", { className: "error", role: "alert" }, element("p", { textContent: turn.error }), retry));
  }
  return row;
}

function fill(body, turn) {
  const parts = [];
  if (turn.thoughts?.trim()) {
    const open = body.querySelector(".thoughts")?.open ?? false; // as whoever reads it left it
    const details = element("details", { className: "thoughts", open }, element("summary", { textContent: say("thinking") }));
    details.append(element("div", {}, markdown(turn.thoughts)));
    parts.push(details);
  }
  body.replaceChildren(...parts, markdown(turn.content));
}

// ---- what can be done

function open(id) {
  state.now = id;
  keep();
  show();
  $("side").classList.remove("open");
  $("question").focus();
}

function rename(one) {
  const title = prompt(say("title"), one.title);
  if (title === null) return;
  one.title = title.trim();
  keep();
  showList();
}

function remove(one) {
  if (!confirm(say("really"))) return;
  if (running?.conversation === one) running.controller.abort();
  state.conversations = state.conversations.filter((other) => other !== one);
  if (state.now === one.id) state.now = state.conversations[0]?.id ?? null;
  keep();
  show();
}

function save(one) {
  const name = `${(one.title || "chat").replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.json`;
  const messages = one.turns.map(({ role, content }) => ({ role, content }));
  const url = URL.createObjectURL(new Blob([JSON.stringify({ title: one.title, messages }, null, 1)], { type: "application/json" }));
  element("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function edit(conversation, index) {
  const row = $("messages").children[index];
  const area = element("textarea", { value: conversation.turns[index].content, rows: 4, ariaLabel: say("edit") });
  const send = () => {
    if (!area.value.trim()) return;
    conversation.turns[index].content = area.value.trim();
    conversation.turns.length = index + 1;
    answer(conversation, index + 1);
  };
  const cancel = () => showTurns();
  area.onkeydown = (event) => {
    if (event.key === "Escape") cancel();
    if (entered(event)) send();
  };
  const buttons = element("div", { className: "row" }, button("cancel", cancel), button("send", send));
  row.replaceChildren(area, buttons);
  area.focus();
}

// Enter sends, but not while an input method is composing, nor with Shift.
const entered = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;

function ask() {
  const text = $("question").value.trim();
  if (!text || running) return;
  const conversation = current() ?? begin();
  if (!conversation.title) conversation.title = text.split("\n")[0].slice(0, 60);
  conversation.turns.push({ role: "user", content: text });
  $("question").value = "";
  grow();
  answer(conversation, conversation.turns.length);
}

// The answer that stands at `index` of the turns, in place of what is there.
async function answer(conversation, index) {
  if (running) return;
  const turn = { role: "assistant", content: "" };
  conversation.turns.splice(index, conversation.turns.length, turn);
  const controller = new AbortController();
  running = { controller, conversation, turn };
  $("status").textContent = say("answering");
  keep();
  show();
  const started = performance.now();
  try {
    for await (const event of stream(conversation.turns.slice(0, index), controller.signal)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0];
      turn.content += choice?.delta?.content ?? "";
      if (choice?.delta?.reasoning_content) turn.thoughts = (turn.thoughts ?? "") + choice.delta.reasoning_content;
      if (choice?.finish_reason === "length") turn.cut = true;
      if (event.usage) [turn.usage, turn.seconds] = [event.usage, (performance.now() - started) / 1000];
      paint(conversation, turn);
    }
    $("status").textContent = say("done");
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = say("stopped");
    else {
      turn.error = error instanceof TypeError ? say("lost") : error.message;
      $("status").textContent = "";
    }
  } finally {
    running = null;
    keep();
    show();
  }
}

let painting = false;
function paint(conversation, turn) {
  if (painting) return;
  painting = true; // once a frame, however fast the tokens come
  requestAnimationFrame(() => {
    painting = false;
    if (current() !== conversation || running?.turn !== turn) return;
    const box = $("messages");
    const follows = box.scrollHeight - box.scrollTop - box.clientHeight < 80;
    const body = box.lastElementChild?.querySelector(".body");
    if (body) fill(body, turn);
    if (follows) box.scrollTop = box.scrollHeight;
  });
}

async function* stream(turns, signal) {
  const { system, temperature, top_p, max_tokens, key } = state.settings;
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system?.trim()) messages.unshift({ role: "system", content: system });
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  for (const [name, value] of Object.entries({ temperature, top_p, max_tokens }))
    if (value !== undefined && value !== "") body[name] = Number(value);
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch("v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `${response.status} ${response.statusText}`);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new TypeError(say("lost")); // without [DONE] it is not whole
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function grow() {
  const area = $("question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// ---- settings

function openSettings() {
  const form = $("settings").querySelector("form");
  for (const name of ["system", "temperature", "top_p", "max_tokens", "key"]) form[name].value = state.settings[name] ?? "";
  $("settings").showModal();
}

$("settings").onclose = () => {
  if ($("settings").returnValue !== "save") return;
  state.settings = Object.fromEntries(new FormData($("settings").querySelector("form")));
  keep();
  findModel();
};

async function findModel() {
  const { key } = state.settings;
  try {
    const response = await fetch("v1/models", { headers: key ? { Authorization: `Bearer ${key}` } : {} });
    model = (await response.json()).data?.[0]?.id ?? "";
  } catch {
    model = "";
  }
  $("model").textContent = model;
}

$("new").onclick = () => {
  const empty = state.conversations.find((one) => !one.turns.length);
  open((empty ?? begin()).id);
};
$("open-settings").onclick = openSettings;
$("language").onclick = () => {
  language = state.language = language === "en" ? "zh" : "en";
  keep();
  show();
};
$("open-side").onclick = () => {
  $("side").classList.add("open");
  $("close-side").hidden = false;
  $("close-side").focus();
};
$("close-side").onclick = () => {
  $("side").classList.remove("open");
  $("open-side").focus();
};
$("ask").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
$("question").oninput = grow;
$("question").onkeydown = (event) => {
  if (!entered(event)) return;
  event.preventDefault();
  ask();
};
$("stop").onclick = () => running?.controller.abort();
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || $("settings").open) return;
  if ($("side").classList.contains("open")) $("close-side").click();
  else running?.controller.abort();
});
// Another tab wrote: what it has is newer, unless an answer is being written here.
window.addEventListener("storage", (event) => {
  if (event.key !== STORE || running) return;
  Object.assign(state, read());
  show();
});

show();
findModel();
$("question").focus();
