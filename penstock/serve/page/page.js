"use strict";
// The page of a server: asks it as any client does. Text of the model is only ever set as text, never as HTML.

const $ = (id) => document.getElementById(id);
const messages = []; // of the chat so far, as the server takes them
let model = null; // its name, once /live has told
let chat = true; // whether it has a chat template; else plain completion
let running = null; // the AbortController of the answer that is coming

function headers() {
  const key = $("key").value;
  return { "content-type": "application/json", ...(key && { authorization: `Bearer ${key}` }) };
}

// --- gauges ---------------------------------------------------------------------------------------------------------

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function show(live) {
  model = live.model;
  chat = live.chat !== false;
  $("model").textContent = [live.model, live.device].filter(Boolean).join(" on ");
  const { stage, done, total } = live.progress;
  const share = total ? ` ${Math.floor((100 * done) / total)} %` : "";
  tell("state", live.state === "ready" ? "ready" : `${live.state}: ${stage}${share}`);
  $("prompt-label").textContent = chat ? "Message" : "Text to go on with (the model has no chat template)";
  $("running").textContent = live.running;
  $("waiting").textContent = live.waiting;
  $("kv").textContent = percent(live.kv_cache_usage);
  $("speed").textContent = Math.round(live.tokens_per_second).toLocaleString("en");
  $("roof").textContent = !live.roof_known ? "not measured here" : live.roof_share === null ? "idle" : percent(live.roof_share);
}

// A live region is read out whenever it is set, so only set what changed.
function tell(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

async function poll() {
  try {
    const response = await fetch("live", { headers: headers(), cache: "no-store" });
    if (response.ok) show(await response.json());
    else tell("state", response.status === 401 ? "needs an API key" : `answers with ${response.status}`);
  } catch {
    tell("state", "cannot be reached");
  }
  setTimeout(poll, 1000);
}

// --- asking ---------------------------------------------------------------------------------------------------------

function body(text) {
  const asked = { model, stream: true, stream_options: { include_usage: true } };
  for (const input of $("controls").querySelectorAll("input[name]")) {
    if (input.value !== "") asked[input.name] = Number(input.value);
  }
  return chat ? { ...asked, messages: [...messages, { role: "user", content: text }] } : { ...asked, prompt: text };
}

function article(role, title, text) {
  const made = document.createElement("article");
  made.className = role;
  const head = document.createElement("h2");
  const pre = document.createElement("pre");
  const foot = document.createElement("small");
  head.textContent = title;
  pre.textContent = text;
  made.append(head, pre, foot);
  $("log").append(made);
  follow();
  return { pre, foot };
}

function follow() {
  $("log").scrollTop = $("log").scrollHeight;
}

// The data of a stream's events, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
    }
  }
}

async function problem(response) {
  const said = await response.json().catch(() => ({}));
  return new Error(said.error?.message ?? `the server answers with ${response.status}`);
}

// Streams an answer into `answer`; what it is in the end: why it ended, and how many tokens.
async function stream(asked, answer, signal) {
  const path = chat ? "v1/chat/completions" : "v1/completions";
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(asked), signal });
  if (!response.ok) throw await problem(response);
  let finish = null;
  let tokens = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") return { finish, tokens };
    const event = JSON.parse(data);
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    const delta = choice?.delta;
    answer.pre.append(delta ? (delta.reasoning_content ?? "") + (delta.content ?? "") : (choice?.text ?? ""));
    answer.content += delta?.content ?? "";
    finish = choice?.finish_reason ?? finish;
    tokens = event.usage?.completion_tokens ?? tokens;
    follow();
  }
  throw new Error("the answer was cut off");
}

async function ask(text) {
  const asked = body(text);
  $("error").hidden = true;
  article("user", chat ? "You" : "Given", text);
  const answer = { ...article("model", "Model", ""), content: "" };
  const began = performance.now();
  busy(new AbortController());
  try {
    const { finish, tokens } = await stream(asked, answer, running.signal);
    const seconds = (performance.now() - began) / 1000;
    answer.foot.textContent = `${tokens ?? "?"} tokens in ${seconds.toFixed(1)} s, ended by ${finish}`;
    remember(text, answer);
    tell("said", `Answer complete: ${answer.pre.textContent}`);
  } catch (error) {
    if (error.name === "AbortError") {
      answer.foot.textContent = "stopped";
      remember(text, answer);
      tell("said", "Stopped");
    } else {
      answer.foot.textContent = "failed";
      $("error").textContent = error.message;
      $("error").hidden = false;
    }
  } finally {
    busy(null);
  }
}

// Unless it was cleared away meanwhile.
function remember(asked, { pre, content }) {
  if (chat && pre.isConnected) messages.push({ role: "user", content: asked }, { role: "assistant", content });
}

function busy(controller) {
  running = controller;
  $("log").setAttribute("aria-busy", String(controller !== null));
  $("send").disabled = controller !== null;
  $("stop").disabled = controller === null;
}

// --- the form -------------------------------------------------------------------------------------------------------

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value;
  if (running || text === "") return;
  $("prompt").value = "";
  ask(text);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  messages.length = 0;
  $("log").replaceChildren();
  $("error").hidden = true;
  $("prompt").focus();
});
poll();
