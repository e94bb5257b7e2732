// An answer as it forms: it holds every step, shows any one of them, and draws a picture of all.
//
// A frame is one step: { start, texts, states, confidences }, tokens from `start` on, one letter of `states` for each:
// m masked, p proposed, c committed, g given by the form without a pass, f given by the user. Tokens before `start` stay as an earlier frame left them.

const calm = matchMedia("(prefers-reduced-motion: reduce)");

// Return how sure a probability is, from 0 to 3: the levels of the legend.
export const level = (confidence) => [0.5, 0.7, 0.9].filter((bound) => confidence >= bound).length;

// Return a frame in which nothing is known yet.
export const noise = (count) => ({ start: 0, texts: Array(count).fill(""), states: "m".repeat(count), confidences: [] });

// Return the same frame as it was before anything was committed.
const masked = (frame) => ({
  ...frame,
  texts: frame.texts.map((text, i) => (frame.states[i] === "f" ? text : "")),
  states: frame.states.replace(/[^f]/g, "m"),
});

export class Tokens {
  constructor(element, first) {
    Object.assign(this, { element, frames: [first], ends: new Map([[first.start, 0]]), spans: [], shown: 0 });
    this.open = true; // whether frames may still come
    element.classList.remove("formed");
    this.#put(first);
  }

  get last() {
    return this.frames.length - 1;
  }

  add(frame) {
    if (this.last === 0) this.frames[0] = masked(frame);
    this.frames.push(frame);
    this.ends.set(frame.start, this.last);
  }

  // No more frames will come. Tokens still undecided when an answer ended by itself are no part of it.
  finish(complete) {
    this.open = false;
    const frame = this.frames[this.last];
    if (complete) frame.states = frame.states.replace(/[mp]/g, "x");
    if (this.shown === this.last) this.#put(frame);
  }

  // Show the answer as it stood after a step; 0 is before the first. Touches only tokens that differ.
  show(index) {
    const before = this.frames[this.shown].start;
    const frame = this.frames[index];
    for (const [start, end] of this.ends) if (start >= before && start < frame.start) this.#put(this.frames[end]);
    this.#put(frame);
    for (const { span } of this.spans.splice(frame.start + frame.texts.length)) span.remove();
    this.shown = index;
  }

  // Show step after step, each for at least `pace` ms, until the last one; `moved` is called after each. Steps are
  // skipped when many wait, so that the view is never far behind the model. Return a function that ends it.
  play(pace, moved) {
    let due = 0;
    let frame = 0;
    const tick = (now) => {
      if (this.shown < this.last && now >= due) {
        due = now + pace;
        this.show(this.shown + Math.ceil((this.last - this.shown) / (pace ? 4000 / pace : 1)));
        moved();
      }
      if (this.open || this.shown < this.last) frame = requestAnimationFrame(tick);
      else moved();
    };
    frame = requestAnimationFrame(tick);
    return () => cancelAnimationFrame(frame);
  }

  // Return every token after the latest step, as [text, state].
  #final() {
    const tokens = [];
    for (const end of this.ends.values()) {
      const { start, texts, states } = this.frames[end];
      texts.forEach((text, i) => (tokens[start + i] = [text, states[i]]));
    }
    return tokens;
  }

  get committed() {
    return this.#final().filter(([, state]) => "cg".includes(state)).length;
  }

  // The text of the decided tokens.
  get text() {
    return this.#final().map(([text, state]) => ("cgf".includes(state) ? text : "")).join("");
  }

  // Return the answer after the latest step as one frame.
  get frame() {
    const frame = { start: 0, texts: [], states: "", confidences: [] };
    for (const end of this.ends.values()) {
      const { start, texts, states, confidences } = this.frames[end];
      frame.texts.splice(start, Infinity, ...texts);
      frame.states = frame.states.slice(0, start) + states;
      frame.confidences.splice(start, Infinity, ...texts.map((_, i) => confidences[i] ?? null));
    }
    return frame;
  }

  #put({ start, texts, states, confidences }) {
    if (states.includes("g")) this.element.classList.add("formed"); // so that the legends say what such tokens are
    texts.forEach((text, i) => {
      const at = start + i;
      const state = states[i];
      const confidence = confidences[i] ?? null;
      const cell = (this.spans[at] ??= { span: this.element.appendChild(document.createElement("span")) });
      if (cell.text === text && cell.state === state && cell.confidence === confidence) return;
      const { span } = cell;
      // An undecided line break would make the lines below jump.
      const seen = state === "p" ? text.replaceAll("\n", "⏎") : text;
      if (span.textContent !== seen) span.textContent = seen;
      const kind = state === "p" && !text ? "m" : state;
      span.className = kind === "c" ? `token c s${level(confidence)}` : `token ${kind}`;
      span.style.setProperty("--sure", kind === "p" ? (confidence ?? 0).toFixed(2) : null);
      if (state === "c" && cell.state !== "c" && cell.state && !calm.matches) {
        span.animate([{ backgroundColor: "var(--flash)" }, {}], { duration: 600, easing: "ease-out" });
      }
      Object.assign(cell, { text, state, confidence });
    });
  }

  // Return what is known about the token that `span` shows, or "".
  describe(span) {
    const cell = this.spans.find((one) => one.span === span);
    if (cell?.state === "g") return "given by the form, without a pass of the model";
    if (!cell || cell.confidence === null) return "";
    const chance = `${(100 * cell.confidence).toFixed(cell.confidence > 0.99 ? 1 : 0)} %`;
    return cell.state === "c" ? `kept at ${chance}` : `proposed at ${chance}`;
  }

  // Draw all steps: time to the right, generated tokens downwards, undecided tokens fainter the less sure they are.
  draw(canvas) {
    const slots = this.#final().flatMap(([, state], at) => (state === "f" ? [] : [at]));
    const [width, height] = [Math.min(this.frames.length, 800), Math.min(slots.length, 400)];
    Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const cells = [];
    let x = 0;
    this.frames.forEach(({ start, texts, states, confidences }, number) => {
      texts.forEach((_, i) => (cells[start + i] = [states[i], confidences[i] ?? 0]));
      for (; x < width && Math.floor((x * this.frames.length) / width) <= number; x++) {
        for (let y = 0; y < height; y++) {
          const cell = cells[slots[Math.floor((y * slots.length) / height)]];
          if (cell) image.data.set(shade(...cell), 4 * (y * width + x));
        }
      }
    });
    context.putImageData(image, 0, 0);
  }
}

// Return a colour that stands out on light and on dark. Undecided tokens are grain, and less of it the surer they are.
function shade(state, confidence) {
  if (state === "x") return [0, 0, 0, 0];
  if (state === "g") return [56, 142, 112, 255];
  if (state !== "c") return [128, 128, 128, 80 - 40 * confidence + 70 * (1 - confidence) * Math.random()];
  return [...[[214, 112, 20], [222, 150, 60], [96, 150, 214], [48, 112, 196]][level(confidence)], 255];
}

// Make the grain of masked tokens a picture that style sheets can name.
export function grain() {
  const canvas = Object.assign(document.createElement("canvas"), { width: 120, height: 60 });
  const context = canvas.getContext("2d");
  const image = context.createImageData(120, 60);
  for (let i = 0; i < image.data.length; i += 4) image.data.set([128, 128, 128, 230 * Math.random() ** 1.6], i);
  context.putImageData(image, 0, 0);
  document.documentElement.style.setProperty("--grain", `url(${canvas.toDataURL()})`);
}
