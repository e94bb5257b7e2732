// The page: a conversation with the server, its settings, and what happens when something fails.
// All text goes into the page as text, never as markup, but for answers in Markdown, which format.js makes harmless.
// Addresses are relative, so the page may live under any path.

import { format, isFormatted } from "./format.js";
import { ask, events } from "./stream.js";
import { adopt, fields, fill, remember, remembered, setting, wanted } from "./settings.js";
import { grain, noise, Tokens } from "./tokens.js";

const SLOT = "___";
const KEPT = "illada.talk";

const $ = (id) => document.getElementById(id);
const [main, talk, message] = [document.querySelector("main"), $("talk"), $("message")];
const exchanges = []; // { user, answer, item, tokens, gaps, ... }: the conversation that is shown
let model = null; // the model as /v1/models describes it
let running = null; // the AbortController of the answer under way

// --- the server

async function meet() {
  const response = await ask("v1/models", { key: sessionStorage.getItem("illada.key") });
  model = (await response.json()).data[0];
  $("model").textContent = model.id;
  for (const chat of document.querySelectorAll(".chat")) chat.hidden = !model.chat;
  for (const one of document.querySelectorAll(".diffusion")) one.hidden = model.causal;
  adopt(model.defaults);
  $("kind").textContent = `${kind()} ${model.about ?? ""}`;
  suggest();
}

// Say what kind of model this is, in a line.
function kind() {
  const size = Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 2 }).format(model.parameters);
  const how = model.causal ? "an autoregressive model, which writes from left to right" : "a masked diffusion model";
  const what = model.chat ? "It answers messages." : "It goes on with a text; it was not taught to answer messages.";
  return `${model.id}: ${how}, ${size} parameters. ${what}`;
}

// Offer what the model's folder says that it can do; without that, what can be tried with any model.
function suggest() {
  const any = [
    { label: model.chat ? "Say hello" : "Begin a text", text: model.chat ? "Hello" : "Once upon a time" },
    ...(model.causal ? [] : [{ label: "Fill a gap", text: "one, two, ___, four" }]),
  ];
  const buttons = (model.suggestions ?? any).map(({ label, text }) => {
    const button = document.createElement("button");
    [button.textContent, button.title] = [label, text];
    button.onclick = () => {
      message.value = text;
      typed();
      submit();
    };
    return button;
  });
  $("examples").replaceChildren(...buttons);
}

function begin() {
  meet().catch((error) => {
    $("model").textContent = error.message;
    if (error.status === 401) askKey(error.message, begin);
  });
}

// Return what to send for a message, and what to show before the first step: path, body, first frame.
function request(exchange) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, diffusion: true, ...wanted() };
  if (exchange.gaps) {
    const length = setting("slot_tokens");
    const first = { start: 0, texts: [], states: "", confidences: [] };
    exchange.user.split(SLOT).forEach((text, i) => {
      first.texts.push(...Array(i ? length : 0).fill(""), text);
      first.states += "m".repeat(i ? length : 0) + "f";
    });
    delete body.max_tokens;
    return { path: "v1/completions", body: { ...body, prompt: exchange.user, slot_tokens: length }, first };
  }
  const first = noise(Math.min(setting("block_length"), setting("max_tokens")));
  if (!model.chat) return { path: "v1/completions", body: { ...body, prompt: exchange.user }, first };
  const messages = setting("system") ? [{ role: "system", content: setting("system") }] : [];
  for (const { user, answer, gaps } of exchanges.slice(0, exchanges.indexOf(exchange))) {
    if (gaps || !answer) continue;
    messages.push({ role: "user", content: user }, { role: "assistant", content: answer });
  }
  messages.push({ role: "user", content: exchange.user });
  return { path: "v1/chat/completions", body: { ...body, messages }, first };
}

// --- an exchange: a message and its answer

function part(exchange, selector) {
  return exchange.item.querySelector(selector);
}

// Show a message, with room for its answer.
function place(text) {
  $("welcome").hidden = true;
  const item = $("exchange").content.cloneNode(true).firstElementChild;
  const exchange = { user: text, answer: "", item, gaps: text.includes(SLOT) };
  exchanges.push(exchange);
  talk.append(item);
  part(exchange, ".said p").textContent = text;
  part(exchange, ".edit").onclick = () => edit(exchange);
  part(exchange, ".again").onclick = part(exchange, ".retry").onclick = () => answer(exchange);
  part(exchange, ".afresh").onclick = renew;
  part(exchange, ".copy").onclick = (event) => copy(exchange, event.target);
  part(exchange, ".view").onclick = () => view(exchange, part(exchange, ".formatted").hidden);
  part(exchange, ".tokens").onpointerover = ({ target }) => (target.title = exchange.tokens?.describe(target) ?? "");
  replayed(exchange);
  following = true;
  return exchange;
}

function say(text) {
  const exchange = place(text);
  keep();
  return answer(exchange);
}

// Show an answer formatted or as the tokens that it came as.
function view(exchange, formatted) {
  part(exchange, ".formatted").hidden = !formatted;
  part(exchange, ".tokens").hidden = formatted;
  part(exchange, ".view").textContent = formatted ? "Show tokens" : "Show formatted";
}

function offerFormatted(exchange) {
  const has = !exchange.gaps && isFormatted(exchange.answer);
  if (has) format(part(exchange, ".formatted"), exchange.answer);
  part(exchange, ".view").hidden = !has;
  view(exchange, has);
}

// Keep the conversation for a reload of this tab: what was said and the last step of each answer.
function keep() {
  const talk = exchanges.map(({ user, answer, tokens, item }) => ({
    user,
    answer,
    counts: item.querySelector(".counts").textContent,
    frame: answer && tokens ? tokens.frame : null,
  }));
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(talk));
  } catch {
    sessionStorage.removeItem(KEPT); // it has become too long
  }
}

function restore() {
  let talk = [];
  try {
    talk = JSON.parse(sessionStorage.getItem(KEPT)) ?? [];
  } catch {} // eslint-disable-line no-empty
  for (const { user, answer, counts, frame } of talk) {
    const exchange = place(user);
    if (!frame) {
      exchange.item.classList.add("failed");
      trouble(exchange, new Error("The page was loaded anew before this answer was finished."));
      continue;
    }
    exchange.answer = answer;
    exchange.tokens = new Tokens(part(exchange, ".tokens"), frame);
    part(exchange, ".counts").textContent = counts;
    offerFormatted(exchange);
  }
}

async function answer(exchange) {
  if (running || !ready()) return;
  const { item } = exchange;
  const [line, counts] = [part(exchange, ".tokens"), part(exchange, ".counts")];
  exchange.end?.();
  part(exchange, ".trouble").hidden = part(exchange, ".replay").hidden = part(exchange, ".view").hidden = true;
  view(exchange, false);
  try {
    if (!model) await meet();
  } catch (error) {
    return trouble(exchange, error);
  }
  const { path, body, first } = request(exchange);
  line.replaceChildren();
  line.style.minHeight = "";
  const tokens = (exchange.tokens = new Tokens(line, first));
  const controller = (running = new AbortController());
  const { signal } = controller;
  let [text, usage, reason, forwards] = ["", null, null, 0];
  const began = performance.now();
  const count = () => {
    const seconds = (performance.now() - began) / 1000;
    const why = exchange.gaps && reason === "length" ? "stop" : reason;
    const done = usage ?? { completion_tokens: tokens.committed, forwards };
    counts.textContent = counted(done.completion_tokens, done.forwards, seconds, why);
  };
  busy(exchange, true);
  counts.textContent = "waiting for the first step …";
  exchange.playing = true;
  exchange.end = tokens.play(Number(setting("pace")), () => (reason ? mark(exchange) : count()));
  try {
    const response = await ask(path, { key: sessionStorage.getItem("illada.key"), body, signal });
    for await (const { event, data } of events(response, signal)) {
      if (event === "wait" && forwards) continue;
      else if (event === "wait") counts.textContent = "waiting for a place at the server …";
      else if (data.error) throw Object.assign(new Error(data.error.message), { status: 500 });
      else if (event === "diffusion") {
        forwards = data.forwards;
        tokens.add(data);
      } else {
        usage = data.usage ?? usage;
        for (const { delta, text: piece, finish_reason } of data.choices) {
          text += delta?.content ?? piece ?? "";
          reason = finish_reason ?? reason;
        }
      }
    }
  } catch (error) {
    reason = signal.aborted ? "stopped" : "broken off";
    if (!signal.aborted) trouble(exchange, error);
  }
  const complete = Boolean(usage);
  if (!complete) tokens.show(tokens.last);
  tokens.finish(complete);
  item.classList.toggle("stopped", !complete);
  item.classList.toggle("failed", !tokens.last);
  if (!tokens.last) line.replaceChildren();
  exchange.answer = exchange.gaps ? tokens.text : text;
  count();
  if (complete) $("spoken").textContent = `Answer: ${exchange.answer}`;
  if (complete) offerFormatted(exchange);
  running = null;
  busy(exchange, false);
  if (tokens.last) {
    const track = part(exchange, ".track input");
    part(exchange, ".replay").hidden = false;
    track.max = tokens.last;
    part(exchange, ".most").textContent = `pass ${tokens.last}`;
    tokens.draw(part(exchange, "canvas"));
    mark(exchange);
  }
  keep();
}

function counted(tokens, forwards, seconds, reason) {
  if (!forwards) return reason === "stopped" ? "stopped before the first step" : "";
  const ended = { length: "reached the most tokens", stopped: "stopped by you", "broken off": "broken off" }[reason];
  return [
    `${tokens} tokens`,
    `${forwards} forwards`,
    `${(tokens / forwards).toFixed(2)} tokens per forward`,
    `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`,
    `${Math.round(tokens / seconds)} tokens/s`,
    ...(ended ? [ended] : []),
  ].join(" · ");
}

function busy(exchange, is) {
  exchange.item.classList.toggle("running", is);
  part(exchange, ".answer").setAttribute("aria-busy", is);
  $("send").hidden = is;
  $("stop").hidden = !is;
}

function trouble(exchange, error) {
  const box = part(exchange, ".trouble");
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} seconds.` : "";
  box.querySelector("p").textContent = error.message + wait;
  box.querySelector(".afresh").hidden = exchanges.length < 2;
  box.hidden = false;
  part(exchange, ".counts").textContent = "";
  if (error.status === 404) model = null;
  if (error.status === 401) askKey(error.message, () => answer(exchange));
}

function edit(exchange) {
  running?.abort();
  for (const { item, end } of exchanges.splice(exchanges.indexOf(exchange))) {
    end?.();
    item.remove();
  }
  keep();
  message.value = exchange.user;
  message.focus();
  typed();
}

function renew() {
  running?.abort();
  for (const { end } of exchanges.splice(0)) end?.();
  talk.replaceChildren();
  keep();
  $("welcome").hidden = false;
  message.focus();
}

async function copy(exchange, button) {
  try {
    await navigator.clipboard.writeText(exchange.answer);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(part(exchange, ".tokens"));
    button.textContent = "Selected";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

// --- replay

function mark(exchange) {
  const { tokens } = exchange;
  const playing = tokens.shown < tokens.last && exchange.playing;
  const [track, step] = [part(exchange, ".track input"), `step ${tokens.shown} of ${tokens.last}`];
  track.value = tokens.shown;
  track.setAttribute("aria-valuetext", step);
  part(exchange, "canvas").style.setProperty("--at", (tokens.shown + 1) / (tokens.last + 1));
  part(exchange, ".step").textContent = step;
  const play = part(exchange, ".play");
  play.textContent = playing ? "❚❚" : "▶";
  play.setAttribute("aria-label", playing ? "Pause" : "Play the steps");
}

function replayed(exchange) {
  const [track, canvas] = [part(exchange, ".track input"), part(exchange, "canvas")];
  const go = (step) => {
    exchange.end();
    const line = part(exchange, ".tokens");
    view(exchange, false);
    // Earlier steps may have fewer lines; the slider must stay where the user holds it.
    if (exchange.tokens.shown === exchange.tokens.last) line.style.minHeight = `${line.offsetHeight}px`;
    exchange.playing = false;
    exchange.tokens.show(Math.max(0, Math.min(exchange.tokens.last, step)));
    mark(exchange);
  };
  track.oninput = () => go(track.valueAsNumber);
  canvas.onpointerdown = canvas.onpointermove = (event) => {
    if (event.buttons) go(Math.floor((event.offsetX / canvas.clientWidth) * exchange.tokens.frames.length));
  };
  part(exchange, ".play").onclick = () => {
    const { tokens, playing } = exchange;
    go(playing ? tokens.shown : tokens.shown === tokens.last ? 0 : tokens.shown);
    if (playing) return;
    exchange.playing = true;
    exchange.end = tokens.play(Number(setting("pace")) || 100, () => mark(exchange));
    mark(exchange);
  };
}

// --- composer, dialogs, keys

function typed() {
  const count = message.value.split(SLOT).length - 1;
  $("slots").hidden = fields.slot_tokens.disabled = !count;
  $("keys").hidden = Boolean(count);
  message.rows = Math.min(8, message.value.split("\n").length);
  $("slot-count").textContent = count === 1 ? "1 gap" : `${count} gaps`;
}

// Return whether all settings can be sent; else show the first that cannot.
function ready() {
  if ($("fields").checkValidity()) return true;
  if (!fields.slot_tokens.matches(":invalid")) tune(true);
  return $("fields").reportValidity();
}

function submit() {
  const text = message.value.trim();
  if (!text || running || !ready()) return;
  message.value = "";
  typed();
  // A phone's keyboard would hide the answer.
  if (matchMedia("(hover: hover)").matches) message.focus();
  else message.blur();
  say(text);
}

let then = null;
function askKey(why, next) {
  then = next;
  $("key-why").textContent = why;
  if (!$("ask-key").open) $("ask-key").showModal();
}

function tune(open) {
  if (!open) $("settings").close();
  else if (matchMedia("(min-width: 1000px)").matches) $("settings").show();
  else $("settings").showModal();
  $("tune").setAttribute("aria-expanded", open);
}

function paint(theme) {
  const dark = theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  if (theme) document.documentElement.dataset.theme = theme;
  $("theme").setAttribute("aria-pressed", dark);
  return dark;
}

$("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};
message.oninput = typed;
message.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape") return;
  if (running && !document.querySelector(":modal")) running.abort();
  else if ($("settings").open) tune(false);
};
$("stop").onclick = () => {
  running?.abort();
  message.focus();
};
$("new").onclick = renew;
$("tune").onclick = () => tune(!$("settings").open);
$("close").onclick = () => tune(false);
$("settings").onclose = () => $("tune").setAttribute("aria-expanded", false);
$("fields").oninput = fields.slot_tokens.oninput = remember;
$("fields").onsubmit = (event) => event.preventDefault();
$("reset").onclick = () => {
  fill({});
  remember();
};
$("change-key").onclick = () => askKey("The key is sent with every request from this tab.", begin);
$("key-later").onclick = () => $("ask-key").close();
$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("illada.key", $("key").value.trim());
  $("key").value = "";
  $("ask-key").close();
  then?.();
};
$("theme").onclick = () => {
  const theme = paint() ? "light" : "dark";
  localStorage.setItem("illada.theme", theme);
  paint(theme);
};

// The page follows the end of the conversation unless the user has scrolled up.
let following = true;
let top = 0;
main.onscroll = () => {
  following = main.scrollHeight - main.scrollTop - main.clientHeight < 80 || (following && main.scrollTop >= top);
  top = main.scrollTop;
};
new ResizeObserver(() => following && main.scrollTo(0, main.scrollHeight)).observe(talk);

// The title appears as answers do: the surest words first.
function title() {
  const words = ["Text", ", ", "out", " of", " noise", "."];
  const order = [4, 0, 5, 1, 3, 2];
  const view = new Tokens($("title"), noise(words.length));
  for (let step = 1; step <= 3 * words.length; step++) {
    const kept = order.slice(0, Math.floor(step / 3));
    const states = words.map((_, i) => (kept.includes(i) ? "c" : step + i > 6 ? "p" : "m")).join("");
    const texts = words.map((word, i) => ({ c: word, p: words[(i + step) % words.length], m: "" })[states[i]]);
    view.add({ start: 0, texts, states, confidences: words.map((_, i) => (states[i] === "c" ? 1 : step / 20)) });
  }
  view.finish(true);
  if (matchMedia("(prefers-reduced-motion: reduce)").matches) view.show(view.last);
  else view.play(110, () => {});
}

grain();
paint(localStorage.getItem("illada.theme"));
fill(remembered());
typed();
title();
restore();
if (matchMedia("(hover: hover)").matches) message.focus();
begin();
