// The page of `minillm serve`: a conversation by the routes that every client has, and what the engine does meanwhile.
// Texts of the model are only ever put into text nodes: they cannot become HTML.

const $ = (id) => document.getElementById(id);

// --- talking to the server

class ServerError extends Error {} // its message is a sentence for the reader

const WHAT = {
  400: "The server refuses this request",
  404: "The server does not know this",
  413: "This is too long for the server",
  429: "The server is busy",
  500: "The server has failed",
  503: "The server is shutting down",
};

// GET `path`, or POST `body` there; asks the reader for an API key where the server does.
async function ask(path, { body, signal } = {}) {
  const key = sessionStorage.getItem("key");
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = { headers, signal, method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  const response = await fetch(path, options).catch(explain);
  if (response.status === 401) {
    if (key === sessionStorage.getItem("key")) await (keyGiven ??= askForKey(key !== null)); // nobody has mended it yet
    return ask(path, { body, signal });
  }
  if (!response.ok) throw new ServerError(await sentence(response));
  return response;
}

function explain(error) {
  if (error.name === "AbortError" || error instanceof ServerError) throw error;
  throw new ServerError("The server cannot be reached: is it still running?");
}

async function sentence(response) {
  const told = await response.json().then((body) => body.error.message, () => response.statusText);
  const again = response.headers.get("Retry-After");
  const what = WHAT[response.status] ?? `The server answers ${response.status}`;
  return `${what}: ${told}.` + (again && !told.includes("try again") ? ` Try again in ${again} s.` : "");
}

// The events of a stream, one JSON object each.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch(explain);
    if (done) throw new ServerError("The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((line) => line.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ServerError(`The server has stopped the answer: ${event.error.message}.`);
      yield event;
    }
  }
}

let keyGiven = null; // a promise while the dialog is open

function askForKey(wasWrong) {
  const dialog = $("key-dialog");
  $("key-wrong").hidden = !wasWrong;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((given, refused) => {
    dialog.onclose = () => {
      keyGiven = null;
      if (dialog.returnValue !== "use") return refused(new ServerError("This server answers only with an API key."));
      sessionStorage.setItem("key", $("key").value);
      $("key").value = "";
      given();
    };
  });
}

$("key-cancel").onclick = () => $("key-dialog").close();

// --- sampling

let settings = null; // the model, and what the server does where a request says nothing

const unlimited = () => $("max_tokens").value === $("max_tokens").max && !settings.chat_refusal;

const SHOWN = {
  temperature: (value) => (value === 0 ? "0: the likeliest" : value),
  top_p: (value) => (value === 1 ? "1: all" : value),
  top_k: (value) => (value === 0 ? "all" : value),
  max_tokens: (value) => (unlimited() ? "no limit" : 2 ** value),
};

function show(name) {
  document.querySelector(`label[for=${name}] output`).value = SHOWN[name]($(name).valueAsNumber);
}

// The sampling fields of a request: what the controls say.
function sampling() {
  const fields = {};
  for (const name of ["temperature", "top_p", "top_k"]) fields[name] = $(name).valueAsNumber;
  if (!unlimited()) fields.max_tokens = 2 ** $("max_tokens").valueAsNumber;
  if ($("seed").value !== "") fields.seed = $("seed").valueAsNumber;
  return fields;
}

function showSettings() {
  const longest = Math.ceil(Math.log2(settings.max_model_len)) - 1; // the largest power of two that leaves room
  $("model").textContent = settings.model;
  $("context").textContent = `${settings.max_model_len} tokens of context`;
  $("max_tokens").max = settings.chat_refusal ? longest : longest + 1;
  $("max_tokens").value = settings.chat_refusal ? Math.min(7, longest) : longest + 1;
  for (const name of ["temperature", "top_p", "top_k"]) $(name).value = settings[name];
  for (const name of Object.keys(SHOWN)) {
    show(name);
    $(name).oninput = () => show(name);
  }
  if (settings.chat_refusal) {
    $("notice").textContent = `What you write is continued, not answered: ${settings.chat_refusal}.`;
    $("notice").hidden = false;
    $("system").disabled = true;
    $("text").placeholder = "The beginning of a text. Enter sends, Shift+Enter begins a new line";
  }
}

// --- the conversation

let messages = []; // what has been said, as the API wants it
let stopper = null; // an AbortController while an answer is being written
let mine = null; // the id of this page's last answer

function request(text) {
  const common = { ...sampling(), model: settings.model, stream: true, stream_options: { include_usage: true } };
  if (settings.chat_refusal) return ["v1/completions", { ...common, prompt: text }];
  const system = $("system").value.trim();
  const before = system ? [{ role: "system", content: system }] : [];
  return ["v1/chat/completions", { ...common, messages: [...before, ...messages, { role: "user", content: text }] }];
}

async function send(text) {
  const turn = addTurn(text);
  const [path, body] = request(text);
  const conversation = messages; // a new one may begin before this answer has ended
  const told = { begun: performance.now(), first: null, answer: "", usage: null, reason: null };
  setAnswering(new AbortController());
  try {
    const response = await ask(path, { body, signal: stopper.signal });
    mine = response.headers.get("X-Request-Id");
    for await (const event of events(response)) take(event, told, turn);
  } catch (error) {
    if (error.name === "AbortError") told.reason = "stopped";
    else addParagraph(turn, "wrong", error.message).role = "alert";
  }
  if (told.answer) conversation.push({ role: "user", content: text }, { role: "assistant", content: told.answer });
  else if (told.reason === null) keepAtEnd(() => ($("text").value ||= text)); // nothing came: to be sent again
  if (told.first) addParagraph(turn, "about", about(told));
  turn.querySelector(".answer").classList.remove("growing");
  setAnswering(null);
}

function take(event, told, turn) {
  told.usage = event.usage ?? told.usage;
  for (const choice of event.choices) {
    const piece = choice.delta?.content ?? choice.text ?? "";
    if (piece) told.first ??= performance.now();
    told.answer += piece;
    told.reason = choice.finish_reason ?? told.reason;
    keepAtEnd(() => turn.querySelector(".answer").append(piece));
  }
}

function about({ begun, first, usage, reason }) {
  const seconds = (time) => `${(time / 1000).toFixed(2)} s`;
  const said = [`first token after ${seconds(first - begun)}`];
  if (usage) {
    const found = usage.prompt_tokens_details.cached_tokens;
    const rate = (usage.completion_tokens - 1) / ((performance.now() - first) / 1000);
    said.unshift(`${usage.prompt_tokens} prompt tokens, ${found} of them found in memory`);
    said.push(`${usage.completion_tokens} tokens written, ${Math.max(rate, 0).toFixed(0)} a second`);
  }
  if (reason === "length") said.push("ended by the limit of tokens");
  if (reason === "stopped") said.push("stopped");
  return said.join(" · ");
}

function addTurn(text) {
  const turn = document.createElement("div");
  turn.className = "turn";
  $("welcome")?.remove();
  $("log").append(turn);
  if (settings.chat_refusal) {
    const given = document.createElement("span");
    given.className = "given";
    given.textContent = text;
    addParagraph(turn, "answer growing").append(given);
  } else {
    addParagraph(turn, "user", text);
    addParagraph(turn, "answer growing");
  }
  $("log").scrollTop = $("log").scrollHeight;
  return turn;
}

function addParagraph(turn, kind, text = "") {
  const paragraph = document.createElement("p");
  paragraph.className = kind;
  paragraph.textContent = text;
  keepAtEnd(() => turn.append(paragraph));
  return paragraph;
}

// Whoever reads the end goes on reading it; whoever has scrolled up stays there.
function keepAtEnd(change) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function setAnswering(controller) {
  stopper = controller;
  $("send").hidden = controller !== null;
  $("stop").hidden = controller === null;
  $("log").ariaBusy = String(controller !== null); // a screen reader waits for the whole answer
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || stopper || !settings) return;
  $("text").value = "";
  send(text);
};

$("text").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
};

document.onkeydown = (event) => {
  if (event.key === "Escape") stopper?.abort();
};
$("stop").onclick = () => stopper?.abort();

$("new").onclick = () => {
  stopper?.abort();
  messages = [];
  $("log").replaceChildren();
  $("text").focus();
};

// --- the engine, live

const SECONDS_OF_RATE = 2;
const WAIT_MS = 2000; // before a lost connection is tried again
const FEWEST_SHOWN = 256; // blocks
const NUM_COLOURS = 5; // of the requests of others
const LARGEST_CELL = 14;
const MOST_HEIGHT = 230; // of the pool, in pixels, while its blocks can still be seen

let latest = null; // the last snapshot
let selected = null; // the name of the request whose blocks stand out
let watcher = null; // an AbortController while this page watches
let mostShown = 0; // blocks that have been drawn
let lastColour = 0;
const colours = new Map(); // request → number of its colour
const counts = new Map(); // request, or "" for all → [time, tokens written], of the last seconds

async function watch() {
  while (watcher) {
    try {
      for await (const event of events(await ask("live", { signal: watcher.signal }))) {
        $("watching").textContent = "";
        latest = event;
        draw();
      }
      $("watching").textContent = "– the server is shutting down";
    } catch (error) {
      if (error.name === "AbortError") return;
      $("watching").textContent = `– ${error.message}`;
    }
    await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
  }
}

// The server looks at its engine only for pages that somebody sees.
function watchWhileVisible() {
  watcher?.abort();
  watcher = document.hidden ? null : new AbortController();
  if (watcher) watch();
}

function draw() {
  const requests = [...latest.running, ...latest.waiting]; // in the engine's order, but this page's in front
  requests.sort((one, other) => isMine(other.name) - isMine(one.name));
  const names = new Set(requests.map((request) => request.name));
  for (const known of [colours, counts]) for (const name of known.keys()) if (name && !names.has(name)) known.delete(name);
  if (!names.has(selected)) selected = null;
  $("log").classList.toggle("waits", latest.waiting.some(({ name }) => isMine(name)));
  drawFigures();
  drawPool(ownersOf(latest));
  drawRows(requests);
}

function drawFigures() {
  const { running, num_waiting, num_preemptions, num_held, num_blocks, block_size } = latest;
  $("rate").textContent = rate("", latest.generation_tokens).toFixed(0);
  $("running").textContent = running.length;
  $("waiting").textContent = num_waiting;
  $("preempted").textContent = num_preemptions;
  const { prefix_cache_hits, prompt_tokens } = latest;
  $("hits").textContent = prompt_tokens ? `${((100 * prefix_cache_hits) / prompt_tokens).toFixed(0)} %` : "–";
  $("held").textContent = `– ${num_held} of ${num_blocks} held, ${block_size} tokens each`;
  const rest = num_blocks - numShown(latest);
  $("unused").textContent = rest ? `and ${rest} that have not been used yet` : "";
}

// Tokens a second over the last seconds.
function rate(name, tokens) {
  const known = counts.get(name) ?? [];
  counts.set(name, known);
  known.push([latest.time, tokens]);
  while (known.length > 2 && known[0][0] < latest.time - SECONDS_OF_RATE) known.shift();
  const [time, before] = known[0];
  return latest.time > time ? (tokens - before) / (latest.time - time) : 0;
}

// [first, count, first, count, …] → the blocks themselves.
function* unfold(runs) {
  for (let at = 0; at < runs.length; at += 2) for (let i = 0; i < runs[at + 1]; i++) yield runs[at] + i;
}

function* usedBlocks(found_again, running) {
  yield* unfold(found_again);
  for (const { blocks } of running) yield* blocks;
}

const isMine = (name) => mine !== null && name.startsWith(mine);

// The name of a request's colour; it keeps it as long as it is there.
function colourOf(name) {
  if (isMine(name)) return "--mine";
  if (!colours.has(name)) colours.set(name, (lastColour = (lastColour % NUM_COLOURS) + 1));
  return `--request-${colours.get(name)}`;
}

// How many blocks are drawn: the pool, but for the part of it that has not been used yet.
function numShown({ num_blocks, found_again, running }) {
  let end = FEWEST_SHOWN;
  for (const block of usedBlocks(found_again, running)) while (end <= block) end *= 2;
  return (mostShown = Math.min(num_blocks, Math.max(mostShown, end)));
}

// For each of these blocks the name of its colour.
function ownersOf({ found_again, running }) {
  const owners = new Array(numShown(latest)).fill("--free");
  const held = new Set();
  for (const block of unfold(found_again)) owners[block] = "--kept";
  for (const { name, blocks } of running) {
    const colour = colourOf(name);
    for (const block of blocks) {
      owners[block] = held.has(block) ? "--shared" : colour;
      held.add(block);
    }
  }
  return owners;
}

function drawPool(owners) {
  const canvas = $("pool");
  const width = canvas.clientWidth;
  const { cell, columns } = grid(owners.length, width);
  const height = Math.ceil(owners.length / columns) * cell;
  canvas.width = width * devicePixelRatio; // clears it
  canvas.height = height * devicePixelRatio;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  const style = getComputedStyle(document.documentElement);
  const values = new Map();
  const gap = cell > 2 ? 1 : 0;
  const chosen = new Set(latest.running.find(({ name }) => name === selected)?.blocks);
  owners.forEach((owner, block) => {
    if (!values.has(owner)) values.set(owner, style.getPropertyValue(owner));
    context.fillStyle = values.get(owner);
    const stands = owner === "--free" || !selected || chosen.has(block);
    context.globalAlpha = stands ? 1 : 0.25;
    context.fillRect((block % columns) * cell, Math.floor(block / columns) * cell, cell - gap, cell - gap);
  });
  canvas.ariaLabel = `${latest.num_held} of ${latest.num_blocks} blocks are held`;
}

// The largest cells with which the pool is not too high.
function grid(count, width) {
  let cell = LARGEST_CELL;
  while (cell > 1 && Math.ceil(count / Math.floor(width / cell)) * cell > MOST_HEIGHT) cell--;
  return { cell, columns: Math.floor(width / cell) };
}

function drawRows(requests) {
  const rows = new Map([...$("rows").children].map((row) => [row.dataset.name, row]));
  const now = requests.map((request) => fill(rows.get(request.name) ?? newRow(request.name), request));
  const focused = document.activeElement;
  if (now.some((row, at) => $("rows").children[at] !== row) || now.length !== rows.size) $("rows").replaceChildren(...now);
  focused?.focus({ preventScroll: true }); // a row that has moved keeps it
  const more = latest.num_waiting - latest.waiting.length;
  $("rest").textContent = !requests.length ? "Nothing runs, nothing waits." : more ? `and ${more} more that wait` : "";
  const chosen = requests.find(({ name }) => name === selected);
  $("table-of").hidden = !chosen;
  if (chosen) $("table-of").textContent = `Block table of ${shortName(selected)}: ${chosen.blocks.join(", ") || "empty"}`;
}

function newRow(name) {
  const row = document.createElement("tr");
  row.dataset.name = name;
  for (let at = 0; at < 6; at++) row.append(document.createElement("td"));
  const button = document.createElement("button");
  button.type = "button";
  button.title = "Show its blocks";
  button.append(document.createElement("i"), document.createElement("span"));
  button.onclick = () => {
    selected = selected === name ? null : name;
    draw();
  };
  row.firstChild.append(button);
  return row;
}

function fill(row, { name, prompt, computed, written, preemptions, blocks }) {
  const waits = blocks.length === 0;
  const [button] = row.firstChild.children;
  row.className = waits ? "waiting" : "";
  button.ariaPressed = String(selected === name);
  button.firstChild.style.background = waits ? "none" : `var(${colourOf(name)})`;
  button.lastChild.textContent = shortName(name);
  const speed = rate(name, written).toFixed(0);
  const cells = [prompt, computed, written, waits ? "waits" : speed, preemptions || ""];
  cells.forEach((text, at) => (row.children[at + 1].textContent = text));
  return row;
}

// chatcmpl-…3fa9c-0 → chat 3fa9c
function shortName(name) {
  const [, kind, id, rest] = /^(\w+)-(?:\w*)(\w{5})-(.*)$/.exec(name) ?? [null, "", name, "0"];
  if (isMine(name)) return "yours";
  return `${kind.startsWith("chat") ? "chat" : "text"} ${id}${rest === "0" ? "" : ` ${rest}`}`;
}


// --- begin

async function begin() {
  try {
    settings = await (await ask("page/settings")).json();
  } catch (error) {
    $("notice").textContent = `${error.message} Load this page again to try once more.`;
    $("notice").hidden = false;
    return;
  }
  showSettings();
  watchWhileVisible();
  document.onvisibilitychange = watchWhileVisible;
  window.onresize = () => {
    if (latest) draw();
  };
  matchMedia("(prefers-color-scheme: dark)").onchange = window.onresize;
}

begin();
